"""Anything goes: shapes, dtypes, groups and hyper-parameters drawn by hypothesis."""

import warnings

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fastsam

from comparison import EPS, adopt, check_close
from registry import (
    BACKENDS,
    DTYPES,
    Base,
    Method,
    arithmetic,
    build,
    build_oracle,
    numpy,
    parameters,
    set_grads,
)

shapes = st.lists(
    st.sampled_from([(0,), (), (1,), (16,), (17,), (1023,), (1025,), (3, 5), (2, 3, 4), (2, 0)]),
    min_size=1,
    max_size=5,
)
fractions = st.floats(0, 1, allow_subnormal=False, width=32)
group_options = st.fixed_dictionaries(
    {"rho": fractions, "adaptive": st.booleans(), "eta": fractions, "lr": st.floats(1e-4, 0.5)}
)
bases = st.one_of(
    st.builds(
        lambda momentum, dampening, weight_decay, maximize: Base(
            torch.optim.SGD,
            "sgd",
            dict(momentum=momentum, dampening=dampening, weight_decay=weight_decay,
                 maximize=maximize),
        ),
        st.sampled_from([0.0, 0.5, 0.9]), st.sampled_from([0.0, 0.25]), fractions, st.booleans(),
    ),
    st.builds(
        lambda cls, betas, eps, amsgrad, weight_decay: Base(
            cls, cls.__name__.lower(),
            dict(betas=betas, eps=eps, amsgrad=amsgrad, weight_decay=weight_decay),
        ),
        st.sampled_from([torch.optim.Adam, torch.optim.AdamW]),
        st.sampled_from([(0.9, 0.999), (0.0, 0.99), (0.5, 0.5)]), st.sampled_from([1e-8, 1e-2]),
        st.booleans(), fractions,
    ),
    st.builds(
        lambda lr_decay, initial: Base(
            torch.optim.Adagrad, "adagrad",
            dict(lr_decay=lr_decay, initial_accumulator_value=initial),
        ),
        fractions, st.sampled_from([0.0, 0.5]),
    ),
    st.just(Base(fastsam.AdaGradNorm, "adagrad_norm", {"initial_accumulator_value": 0.5})),
)  # fmt: skip
rules = st.fixed_dictionaries(
    {"lam": fractions, "renormalize": st.booleans(),
     "max_grad_norm": st.one_of(st.none(), st.floats(0.01, 100))},
)  # fmt: skip


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(
    shapes=shapes, cut=st.integers(0, 5), first=group_options, second=group_options, base=bases,
    rule=rules, dtype=st.sampled_from(sorted(DTYPES)), backend=st.sampled_from(BACKENDS),
    missing=st.lists(st.booleans(), min_size=10, max_size=10), seed=st.integers(0, 99),
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:the second pass left no gradients")
def test_step_matches_the_oracle(
    shapes, cut, first, second, base, rule, dtype, backend, missing, seed
):
    """Two steps; in the second some parameters miss their first or second gradient."""
    dtypes = DTYPES[dtype]
    rng = np.random.default_rng(seed)
    params = parameters([rng.standard_normal(s) for s in shapes], dtypes)
    indices = list(range(len(shapes)))
    groups = [first | {"params": indices[:cut]}, second | {"params": indices[cut:]}]
    groups = [g for g in groups if g["params"]]
    method = Method(fastsam.UnifiedSAM, rule, {}, rule)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer = build(method, base, params, groups, backend)
    oracle = build_oracle(method, base, params, groups, dtypes)
    eps = EPS[arithmetic(dtypes)]
    for step in range(2):
        before = numpy(params)
        for half in ("first", "second"):
            grads = [rng.standard_normal(s) for s in shapes]
            if step == 1:
                gone = missing[:5] if half == "first" else missing[5:]
                grads = [None if gone[k] else g for k, g in enumerate(grads)]
            set_grads(params, grads, dtypes)
            if half == "first":
                optimizer.first_step()
                exact = oracle.ascend(grads)
            else:
                optimizer.second_step()
                oracle.descend(grads)
                exact = oracle.weights
            for k, ours in enumerate(numpy(params)):
                check_close(f"{half} {k}", ours, exact[k], before[k], dtypes.param, 16 * eps)
            if half == "first":
                oracle.perturbed = numpy(params)
        adopt(oracle, params, optimizer, step + 1)
