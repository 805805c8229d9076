"""Every method x base x backend x dtype against the float64 oracle, over 20 steps."""

import pytest

from registry import BACKENDS, COMBINATIONS, DTYPES
from trajectories import check_trajectory

STEPS = 20
#: A ragged tensor of two chunks, a small matrix, a scalar; a group each.
SHAPES = [(1031,), (6, 7), ()]
GROUPS = [
    {"params": [0]},
    {"params": [1], "rho": 0.1, "lr": 0.03},
    {"params": [2], "adaptive": False, "lr": 0.01},
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("method", "base"), COMBINATIONS)
@pytest.mark.filterwarnings("ignore:some parameters are float16 or bfloat16")
def test_trajectory(method, base, dtype, backend, record_property):
    found = check_trajectory(method, base, DTYPES[dtype], backend, SHAPES, GROUPS, STEPS)
    for name, error in found.items():
        record_property(name, error)
