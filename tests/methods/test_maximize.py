"""Maximising -L is minimising L, to the bit: in weights, state, metrics and what is learned."""

import numpy as np
import pytest
import torch

import fastsam

import oracles
from registry import (
    BACKENDS,
    DTYPES,
    METHODS,
    OWN_UPDATES,
    FixedLoss,
    base_of,
    build,
    build_oracle,
    create,
    numpy,
    parameters,
    set_grads,
)

SHAPES = [(1031,), (6, 7), ()]
GROUPS = [{"params": [0]}, {"params": [1], "rho": 0.1}, {"params": [2], "adaptive": False}]
STEPS = 4
ALL = ("sgd-momentum", "adamw", "adagrad_norm")
FP32 = DTYPES["fp32"]


def closure_of(problem, params, sign):
    """Of ``sign`` times the problem's loss."""

    def closure():
        weights = numpy(params)
        set_grads(params, [sign * g for g in problem.grad(weights)], FP32)
        return torch.tensor(sign * problem.loss(weights), dtype=torch.float64)

    return closure


def everything(optimizer, params):
    """Weights, state, the optimizer's own numbers and its metrics."""
    values = {f"w{k}": p.detach() for k, p in enumerate(params)}
    for k, p in enumerate(params):
        values |= {f"{name} {k}": x for name, x in optimizer.state[p].items()}
    values |= {f"metrics {name}": x for name, x in optimizer.metrics.items()}
    values |= getattr(optimizer, "kept", {})
    return {name: torch.as_tensor(x).double() for name, x in values.items()}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        assert torch.equal(found[name].nan_to_num(7.0), x.nan_to_num(7.0)), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("method", "base"),
    [(name, base) for name, method in METHODS.items() for base in ALL if base in method.bases]
    + [
        (name, "its own")
        for name, method in METHODS.items()
        if method.bases[0] in OWN_UPDATES and method.cls is not FixedLoss
    ],
)
def test_minimises_the_negative(method, base, backend):
    found = []
    for sign in (1, -1):
        problem = oracles.Problem(SHAPES, seed=5)
        params = parameters(problem.initial(), FP32)
        spec = METHODS[method], base_of(method, base)
        optimizer = build(*spec, params, GROUPS, backend, maximize=sign < 0)
        for _ in range(STEPS):
            loss = optimizer.step(closure_of(problem, params, sign))
            assert loss is not None
        found.append(everything(optimizer, params))
    assert_same(found[1], found[0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("hessian", ["diag", "difference"])
@pytest.mark.parametrize("method", ["sam", "samar-all", "vasso"])
def test_lets_learns_the_same_radius(method, hessian, backend):
    found = []
    for sign in (1, -1):
        problems = [oracles.Problem(SHAPES, seed=seed) for seed in (5, 6)]
        params = parameters(problems[0].initial(), FP32)
        wrapped = create(method, params, backend, maximize=sign < 0)
        lets = fastsam.LETS(wrapped, rho_lr=0.1, hessian=hessian)
        closures = [closure_of(problem, params, sign) for problem in problems]
        for _ in range(STEPS):
            lets.step(*closures)
        found.append(everything(lets, params))
    assert_same(found[1], found[0])
    assert float(found[0]["metrics hypergradient"]) != 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("base", [torch.optim.NAdam, torch.optim.RMSprop])
def test_a_base_that_is_not_fused(base, backend):
    found = []
    for sign in (1, -1):
        problem = oracles.Problem(SHAPES, seed=5)
        params = parameters(problem.initial(), FP32)
        optimizer = fastsam.SAM(params, base, lr=0.02, maximize=sign < 0, backend=backend)
        for _ in range(STEPS):
            optimizer.step(closure_of(problem, params, sign))
        found.append(everything(optimizer, params))
    assert_same(found[1], found[0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("method", ["sam", "vasso-all", "samar-all", "lightsam-3"])
def test_only_some_groups_maximize(method, backend):
    """As in a game: each group's part of the sharpness is that of its own objective."""
    problem = oracles.Problem(SHAPES, seed=5)
    params = parameters(problem.initial(), FP32)
    groups = [{"params": [0]}, {"params": [1], "maximize": True}, {"params": [2]}]
    spec = METHODS[method], base_of(method)
    optimizer = build(*spec, params, groups, backend)
    oracle = build_oracle(*spec, params, groups, FP32)
    for _ in range(STEPS):
        optimizer.step(closure_of(problem, params, 1))
        oracle.step(problem.grad)
    for ours, exact in zip(numpy(params), oracle.weights, strict=True):
        np.testing.assert_allclose(ours, exact, rtol=0, atol=5e-6)
    if "sharpness" in optimizer.metrics:
        sharpness = float(optimizer.metrics["sharpness"])
        assert sharpness == pytest.approx(oracle.metrics["sharpness"], rel=1e-4)


def test_the_perturbation_goes_to_worse_points():
    """What was wrong: with ``maximize`` the second gradient was taken at better points."""
    w = torch.nn.Parameter(torch.tensor([0.7, -0.2]))
    optimizer = fastsam.SAM([w], torch.optim.SGD, lr=0.1, rho=0.1, maximize=True)
    objectives = []

    def closure():
        optimizer.zero_grad()
        objective = -(w**2).sum()
        objective.backward()
        objectives.append(objective.item())
        return objective

    optimizer.step(closure)
    assert objectives[1] < objectives[0]
