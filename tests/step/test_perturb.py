"""Groups with ``perturb=False``: not perturbed, not in the norm, updated like the others."""

import numpy as np
import pytest
import torch

import fastsam

import oracles
from registry import BACKENDS, DTYPES, METHODS, base_of, build, create, numpy, parameters, set_grads

SHAPES = [(1031,), (6, 7), ()]
GROUPS = [{"params": [0], "perturb": False}, {"params": [1]}, {"params": [2], "perturb": False}]
FP32 = DTYPES["fp32"]
MOMENTUM = {"lr": 0.05, "momentum": 0.9}


def closure_of(problem, params):
    def closure():
        weights = numpy(params)
        set_grads(params, problem.grad(weights), FP32)
        return problem.loss(weights)

    return closure


def norm(xs):
    return np.sqrt(sum(np.sum(np.square(x)) for x in xs))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_norm_is_that_of_the_perturbed_groups(backend):
    """SAM by hand, with e = rho g_S / ||g_S|| on S and 0 elsewhere, and SGD with momentum."""
    problem = oracles.Problem(SHAPES, seed=7)
    params = parameters(problem.initial(), FP32)
    groups = [group | {"params": [params[i] for i in group["params"]]} for group in GROUPS]
    optimizer = fastsam.SAM(groups, torch.optim.SGD, rho=0.5, backend=backend, **MOMENTUM)
    weights, buffers = problem.initial(), [0.0] * 3
    for _ in range(3):
        optimizer.step(closure_of(problem, params))
        g = problem.grad(weights)[1]
        assert float(optimizer.metrics["grad_norm"]) == pytest.approx(norm([g]), rel=1e-5)
        perturbed = [weights[0], weights[1] + 0.5 * g / norm([g]), weights[2]]
        buffers = [0.9 * m + u for m, u in zip(buffers, problem.grad(perturbed), strict=True)]
        weights = [w - 0.05 * m for w, m in zip(weights, buffers, strict=True)]
    for ours, exact in zip(numpy(params), weights, strict=True):
        np.testing.assert_allclose(ours, exact, rtol=0, atol=3e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_radius_of_0_stays_in_the_norm(backend):
    params = parameters([np.array([3.0]), np.array([4.0])], FP32)
    groups = [{"params": params[:1], "rho": 0.0}, {"params": params[1:]}]
    optimizer = fastsam.SAM(groups, torch.optim.SGD, lr=0.1, rho=0.5, backend=backend)
    set_grads(params, [np.array([3.0]), np.array([4.0])], FP32)
    optimizer.first_step()
    assert params[1].item() == pytest.approx(4 + 0.5 * 4 / 5, rel=1e-6)
    optimizer.restore()
    optimizer.param_groups[0]["perturb"] = False
    optimizer.first_step()
    assert params[1].item() == pytest.approx(4 + 0.5, rel=1e-6)
    optimizer.restore()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("method", ["vasso", "lightsam-3", "lightsam-1", "adasam"])
def test_state_of_the_ascent_is_of_perturbed_groups_alone(method, backend):
    """These are as the method on S alone would be, where the others' gradients do not depend."""
    start = oracles.Problem(SHAPES, seed=7).initial()
    params, alone = parameters(start, FP32), parameters(start[1:2], FP32)
    optimizer = build(METHODS[method], base_of(method), params, GROUPS, backend)
    reference = create(method, alone, backend)
    rng = np.random.default_rng(1)
    for _ in range(3):
        firsts, seconds = ([rng.standard_normal(s) for s in SHAPES] for _ in range(2))
        if method == "lightsam-1":  # whose update takes a global norm
            seconds = [0 * seconds[0], seconds[1], 0 * seconds[2]]
        for one, tensors, part in ((optimizer, params, slice(3)), (reference, alone, slice(1, 2))):
            set_grads(tensors, firsts[part], FP32)
            one.first_step(zero_grad=True)
            set_grads(tensors, seconds[part], FP32)
            one.second_step(zero_grad=True)
    assert torch.equal(params[1], alone[0])
    assert not any(name.startswith("ascent") for name in optimizer.state[params[0]])
    own = {name: x for name, x in optimizer.state[params[1]].items() if "ascent" in name}
    assert own.keys() == {name for name in reference.state[alone[0]] if "ascent" in name}
    for name, x in own.items():
        assert torch.equal(x, reference.state[alone[0]][name]), name


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_samar_mixes_all_first_gradients(backend, scaled):
    """u = (1 - lam) g + lam g~ on everything; the sharpness is that of S."""
    params = parameters(oracles.Problem(SHAPES, seed=7).initial(), FP32)
    groups = [group | {"params": [params[i] for i in group["params"]]} for group in GROUPS]
    optimizer = fastsam.SAMAR(groups, torch.optim.SGD, rho=0.5, lam=0.8, lr=0.1, backend=backend)
    before, rng = numpy(params), np.random.default_rng(1)
    firsts, seconds = ([rng.standard_normal(s) for s in SHAPES] for _ in range(2))
    scaler = torch.amp.GradScaler(params[0].device.type, init_scale=4.0) if scaled else None
    if scaled:
        scaler.scale(torch.ones((), device=params[0].device))
    scale = 4.0 if scaled else 1.0
    set_grads(params, [scale * g for g in firsts], FP32)
    optimizer.first_step(zero_grad=True, grad_scaler=scaler)
    set_grads(params, [scale * g for g in seconds], FP32)
    optimizer.second_step(grad_scaler=scaler)
    for w, ours, g, second in zip(before, numpy(params), firsts, seconds, strict=True):
        exact = w - 0.1 * (0.2 * g + 0.8 * second)
        np.testing.assert_allclose(ours, exact, rtol=0, atol=1e-6)
    e = 0.5 * firsts[1] / norm(firsts[1:2])
    sharpness = np.sum((firsts[1] + seconds[1]) * e) / 2
    assert float(optimizer.metrics["sharpness"]) == pytest.approx(sharpness, rel=1e-5)


def test_where_nothing_is_perturbed_the_closure_is_called_once():
    params = parameters([np.ones(3)], FP32)
    optimizer = fastsam.VaSSO(
        [{"params": params, "perturb": False}], torch.optim.SGD, lr=0.1, backend="torch"
    )
    calls = []

    def closure():
        calls.append(1)
        set_grads(params, [np.ones(3)], FP32)
        return 0.0

    optimizer.step(closure)
    assert len(calls) == 1
    np.testing.assert_allclose(numpy(params)[0], 0.9 * np.ones(3), rtol=1e-6)


def test_wrong_values_are_refused():
    (param,) = parameters([np.ones(3)], FP32)
    with pytest.raises(ValueError, match="perturb must be True or False, got 0"):
        fastsam.SAM([{"params": [param], "perturb": 0}], torch.optim.SGD, lr=0.1)
    with pytest.raises(ValueError, match="perturb must be True in every group"):
        fastsam.SSAM([{"params": [param], "perturb": False}], torch.optim.SGD, lr=0.1)
