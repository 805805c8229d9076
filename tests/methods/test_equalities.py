"""What must agree bit for bit: special cases, repeated runs, other groupings of one model."""

import numpy as np
import pytest
import torch

import fastsam

import oracles
from registry import BACKENDS, BASES, DTYPES, METHODS, build, create, numpy, parameters, set_grads

SHAPES = [(1031,), (6, 7), (2048,), (), (5,), (3, 5)]
FP32 = DTYPES["fp32"]


def trajectory(make, backend, groups=None, steps=5, dtype="fp32", metrics=()):
    """Weights after some steps, and what the metrics said on the way."""
    problem = oracles.Problem(SHAPES, seed=11)
    params = parameters(problem.initial(), DTYPES[dtype])
    groups = groups or [[0, 1, 2, 3, 4, 5]]
    optimizer = make([{"params": [params[i] for i in members]} for members in groups], backend)
    seen = []
    for _ in range(steps):
        for half in (optimizer.first_step, optimizer.second_step):
            set_grads(params, problem.grad(numpy(params)), DTYPES[dtype])
            half()
        seen.append([float(optimizer.metrics[name]) for name in metrics])
    return [p.detach().clone() for p in params], seen


def assert_same_bits(a, b):
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x, y)


def sgd(cls, **kwargs):
    return lambda params, backend: cls(
        params, torch.optim.SGD, lr=0.05, momentum=0.9, backend=backend, **kwargs
    )


#: lam stays where it started.
FIXED = fastsam.SharpnessRatio(c=1.0, lam_min=0.0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", ["fp32", "fp64"])
@pytest.mark.parametrize(
    ("special", "general"),
    [
        (sgd(fastsam.SAM), sgd(fastsam.UnifiedSAM, lam=1.0)),
        (sgd(fastsam.USAM), sgd(fastsam.UnifiedSAM, lam=0.0)),
        (sgd(fastsam.SAM, renormalize=True), sgd(fastsam.SSAM)),
        (sgd(fastsam.ASAM), sgd(fastsam.SAM, rho=0.5, adaptive=True, eta=0.01)),
        (sgd(fastsam.SAM), sgd(fastsam.SAM, max_grad_norm=1e9, skip_nonfinite=True)),
        (sgd(fastsam.SAM), sgd(fastsam.SAMAR, rule=FIXED)),
        (sgd(fastsam.SSAM), sgd(fastsam.SAMAR, rule=FIXED, renormalize=True)),
        (sgd(fastsam.SAM, rho=0.0), sgd(fastsam.SAMAR, lam=0.0, rho=1.0, rule=FIXED)),
        (sgd(fastsam.VaSSO), sgd(fastsam.VaSSO, max_grad_norm=1e9, skip_nonfinite=True)),
    ],
    ids=[
        "unified-1",
        "unified-0",
        "renormalize",
        "asam",
        "idle-guards",
        "samar-1",
        "samar-ssam",
        "samar-0",
        "vasso-idle-guards",
    ],
)
def test_special_cases(special, general, backend, dtype):
    a, _ = trajectory(special, backend, dtype=dtype)
    b, _ = trajectory(general, backend, dtype=dtype)
    assert_same_bits(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", ["fp32", "fp64"])
@pytest.mark.parametrize("adaptive", [False, True])
def test_ssam_is_sam_where_the_norms_agree(backend, dtype, adaptive):
    """A linear loss has the same gradient everywhere; rho = 0 keeps T the same, too."""
    results = []
    for cls in (fastsam.SAM, fastsam.SSAM):
        problem = oracles.Problem(SHAPES, seed=12)
        params = parameters(problem.initial(), DTYPES[dtype])
        rho = 0.0 if adaptive else 0.5
        optimizer = cls(
            params, torch.optim.AdamW, rho=rho, adaptive=adaptive, lr=0.1, backend=backend
        )
        for _ in range(3):
            grads = problem.grad(numpy(params))
            for half in (optimizer.first_step, optimizer.second_step):
                set_grads(params, grads, DTYPES[dtype])
                half()
        if cls is fastsam.SSAM:
            assert float(optimizer.metrics["renormalization"]) == 1.0
        results.append([p.detach().clone() for p in params])
    assert_same_bits(*results)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("method", "base"),
    [
        ("asam", "adamw"), ("asam", "adagrad_norm"),
        ("ssam-adaptive-clip", "adamw"), ("ssam-adaptive-clip", "adagrad_norm"),
        ("vasso-all", "adamw"), ("samar-all", "adagrad_norm"), ("lightsam-1", ""),
        ("lightsam-2", ""), ("lightsam-3-all", ""), ("adasam", ""),
    ],
)  # fmt: skip
def test_runs_and_groupings_agree(method, base, backend):
    """Two runs, and the same tensors in one, two or six groups, give the same bits."""

    def make(params, backend):
        return create(method, params, backend, base)

    names = ("rho",) if method == "lightsam-2" else ("grad_norm",)  # it takes no norm
    first = trajectory(make, backend, metrics=names)
    for groups in (None, [[0, 1, 2], [3, 4, 5]], [[0], [1], [2], [3], [4], [5]]):
        again = trajectory(make, backend, groups, metrics=names)
        assert_same_bits(first[0], again[0])
        assert first[1] == again[1]


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_reduction_is_deterministic(backend):
    grad = np.random.default_rng(0).standard_normal(50_000)
    norms = set()
    for _ in range(2):
        params = parameters([np.zeros(50_000)], FP32)
        optimizer = fastsam.SAM(params, torch.optim.SGD, backend=backend)
        set_grads(params, [grad], FP32)
        optimizer.first_step()
        norms.add(float(optimizer.metrics["grad_norm"]))
    assert len(norms) == 1
    exact = np.linalg.norm(grad.astype(np.float32).astype(np.float64))
    assert norms.pop() == pytest.approx(exact, rel=1e-6)  # pairwise float32 sums


def test_backends_agree():
    """The same trajectory on all three, within float32 roundings that the curvature enlarges."""
    spec = METHODS["ssam-adaptive-clip"], BASES["adamw"]
    results = []
    for backend in BACKENDS:
        problem = oracles.Problem(SHAPES, seed=13)
        params = parameters(problem.initial(), FP32)
        optimizer = build(*spec, params, [{"params": [0, 1, 2, 3, 4, 5]}], backend)
        for _ in range(10):
            for half in (optimizer.first_step, optimizer.second_step):
                set_grads(params, problem.grad(numpy(params)), FP32)
                half()
        results.append([p.detach().clone() for p in params])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
