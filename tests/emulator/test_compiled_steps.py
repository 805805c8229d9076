"""Compiled kernels against the float64 oracle: whole steps, launched by the triton backend.

The cases of the default run are chosen for what is compiled, as that takes most of the time. In
float32 they are all methods and all bases; other dtypes are dealt out to rules of every kind.
"""

import os
import zlib

import pytest
import torch

import compiled_launches
from registry import COMBINATIONS, DTYPES, METHODS, Dtypes
from trajectories import check_master_trajectory, check_trajectory

pytestmark = pytest.mark.filterwarnings("ignore:some parameters are float16 or bfloat16")
EVERY_CASE = os.environ.get("FASTSAM_EVERY_CASE", "0") != "0"


def misplaced(tensor):
    """A copy that starts one element behind a boundary, and ends where its memory does."""
    flat = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)
    return flat[1:].view(tensor.shape).copy_(tensor)


#: Ragged tensors of two chunks, one of them misaligned, and one whose gradient is; a whole chunk;
#: a matrix, a scalar, one element, none.
SHAPES = [(1031,), (1030,), (523,), (1024,), (6, 7), (), (1,), (0,)]
PLACES, GRAD_PLACES = {1: misplaced}, {2: misplaced}
GROUPS = [
    {"params": [0, 1, 6]},
    {"params": [2, 4, 7], "rho": 0.1, "lr": 0.03},
    {"params": [3, 5], "adaptive": False, "lr": 0.01},
]
STEPS = 3

#: Every base, with ascents and descents of all kinds.
RULES = [
    ("sam", "sgd"), ("asam", "sgd-nesterov"), ("usam", "sgd-dampening"), ("sam-clip", "adagrad"),
    ("ssam-adaptive-clip", "adamw"), ("vasso-all", "adam"), ("friendly-all", "sgd-momentum"),
    ("samar", "adam-amsgrad"), ("gsam-first-all", "adagrad_norm"),
    ("lightsam-1", "light_adagrad_norm"),
    ("lightsam-2", "light_adagrad"), ("lightsam-3-all", "uncorrected_adam"),
    ("adasam", "uncorrected_amsgrad"),
]  # fmt: skip
DEALT = ("bf16", "fp16", "bf16", "fp64", "bf16", "bf16-fp32")
#: With these all bases are tested in float32, as they make two kernels of each; the other methods
#: take one each, in turn.
PLAIN, CHECKED = "sam", "ssam-adaptive-clip"
CASES = [(method, base, "fp32") for method, base in COMBINATIONS if method in (PLAIN, CHECKED)]
CASES += [
    (name, method.bases[i % len(method.bases)], "fp32")
    for i, (name, method) in enumerate(METHODS.items())
    if name not in (PLAIN, CHECKED)
]
CASES += [(*rules, DEALT[i % len(DEALT)]) for i, rules in enumerate(RULES)]
if EVERY_CASE:
    CASES = [(*rules, dtype) for rules in COMBINATIONS for dtype in DTYPES]


def seed_of(*case) -> int:
    """A random order of blocks and warps for each case, the same in every run."""
    return zlib.crc32(repr(case).encode())


def follow(machine, method, base, dtypes: Dtypes, **settings) -> None:
    seed = seed_of(method, base, dtypes)
    with compiled_launches.on(machine, seed=seed, **settings) as kernels:
        check_trajectory(
            method, base, dtypes, "triton", SHAPES, GROUPS, STEPS, PLACES, GRAD_PLACES
        )  # fmt: skip
    assert kernels.count("perturb_kernel") == kernels.count("update_kernel") == STEPS


@pytest.mark.parametrize(("method", "base", "dtype"), CASES)
def test_trajectory(machine, method, base, dtype):
    follow(machine, method, base, DTYPES[dtype])


@pytest.mark.parametrize(
    ("method", "base", "dtype"),
    CASES if EVERY_CASE else [("asam", "adamw", "bf16"), ("samar-all", "adagrad_norm", "fp32")],
)
def test_trajectory_on_ampere(machine, method, base, dtype):
    """Before sm_90 there are no instructions for bfloat16: other code."""
    follow(machine, method, base, DTYPES[dtype], architecture=80)


MASTERS = ["bf16", "bf16", "bf16", "fp16", "bf16-fp32", "bf16", "bf16", "bf16"]


@pytest.mark.parametrize(
    ("method", "base"),
    COMBINATIONS if EVERY_CASE else [
        ("asam", "adamw"), ("vasso-all", "adagrad"), ("samar-all", "adagrad_norm"),
        ("lightsam-3-all", "uncorrected_adam"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("mixed", [False, True] if EVERY_CASE else [False])
def test_master_weights(machine, method, base, mixed):
    stored = MASTERS if mixed else ["bf16"] * len(SHAPES)
    with compiled_launches.on(machine, seed=seed_of(method, base)):
        check_master_trajectory(method, base, stored, "triton", SHAPES, GROUPS, STEPS)
