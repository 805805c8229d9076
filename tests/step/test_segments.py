"""``norm="group"`` and ``norm="layer"``: each group or parameter moves by its own radius."""

import numpy as np
import pytest
import torch

import fastsam

import oracles
from registry import BACKENDS, DTYPES, numpy, parameters, set_grads

SHAPES = [(9001,), (6, 7), (), (0,), (30,)]
#: The segments of each, by parameter.
SEGMENTS = {"group": [0, 0, 1, 1, 1], "layer": [0, 1, 2, 3, 4]}
FP32 = DTYPES["fp32"]


def make(cls, params, norm, backend, *args, **kwargs):
    groups = [{"params": params[:2]}, {"params": params[2:], "rho": 0.2}]
    kwargs = {"rho": 0.1, "lr": 0.05, "momentum": 0.9} | kwargs
    return cls(groups, torch.optim.SGD, *args, norm=norm, backend=backend, **kwargs)


def norm_of(xs):
    return np.sqrt(sum(np.sum(np.square(x)) for x in xs))


def segment_norms(xs, norm):
    segments = SEGMENTS[norm]
    found = {s: norm_of([x for x, t in zip(xs, segments, strict=True) if t == s]) for s in segments}
    return [found[s] for s in segments]


def perturbation(gs, ts, norm):
    radii = [0.1, 0.1, 0.2, 0.2, 0.2]
    norms = segment_norms([t * g for t, g in zip(ts, gs, strict=True)], norm)
    return [
        rho * t * t * g / (n + 1e-12)
        for rho, t, g, n in zip(radii, ts, gs, norms, strict=True)
    ]  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("norm", ["group", "layer"])
@pytest.mark.parametrize("dtype", ["fp32", "fp64", "bf16-fp32"])
@pytest.mark.filterwarnings("ignore:some parameters are float16 or bfloat16")
def test_each_segment_has_a_radius_of_its_own(norm, dtype, backend):
    rng = np.random.default_rng(3)
    start = [rng.standard_normal(shape) for shape in SHAPES]
    params = parameters(start, DTYPES[dtype])
    start = numpy(params)
    optimizer = make(fastsam.SAM, params, norm, backend)
    gs = [rng.standard_normal(shape) * 10.0**k for k, shape in enumerate(SHAPES)]
    set_grads(params, gs, DTYPES[dtype])
    optimizer.first_step()
    eps = {"fp32": 2**-23, "fp64": 2**-45, "bf16-fp32": 2**-8}[dtype]
    for w, ours, e in zip(start, numpy(params), perturbation(gs, [1.0] * 5, norm), strict=True):
        np.testing.assert_allclose(ours, w + e, rtol=2 * eps, atol=2 * eps)
    optimizer.second_step()
    assert float(optimizer.metrics["grad_norm"]) == pytest.approx(norm_of(gs), rel=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("norm", ["group", "layer"])
@pytest.mark.parametrize("adaptive", [False, True])
def test_training(norm, adaptive, backend):
    """SAM and SGD with momentum by hand, a few steps."""
    problem = oracles.Problem(SHAPES, seed=7)
    params = parameters(problem.initial(), FP32)
    optimizer = make(fastsam.SAM, params, norm, backend, adaptive=adaptive, eta=0.01)
    weights, buffers = problem.initial(), [0.0] * 5

    def closure():
        set_grads(params, problem.grad(numpy(params)), FP32)
        return 0.0

    for _ in range(3):
        optimizer.step(closure)
        ts = [np.abs(w) + 0.01 if adaptive else 1.0 for w in weights]
        es = perturbation(problem.grad(weights), ts, norm)
        gs = problem.grad([w + e for w, e in zip(weights, es, strict=True)])
        buffers = [0.9 * m + u for m, u in zip(buffers, gs, strict=True)]
        weights = [w - 0.05 * m for w, m in zip(weights, buffers, strict=True)]
    for ours, exact in zip(numpy(params), weights, strict=True):
        np.testing.assert_allclose(ours, exact, rtol=0, atol=5e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_samars_sharpness_has_the_same_norms(backend):
    rng = np.random.default_rng(3)
    params = parameters([rng.standard_normal(shape) for shape in SHAPES], FP32)
    optimizer = make(fastsam.SAMAR, params, "layer", backend, momentum=0.0)
    firsts, seconds = ([rng.standard_normal(s) for s in SHAPES] for _ in range(2))
    set_grads(params, firsts, FP32)
    optimizer.first_step(zero_grad=True)
    set_grads(params, seconds, FP32)
    optimizer.second_step()
    es = perturbation(firsts, [1.0] * 5, "layer")
    sharpness = sum(np.sum((g + h) * e) / 2 for g, h, e in zip(firsts, seconds, es, strict=True))
    assert float(optimizer.metrics["sharpness"]) == pytest.approx(sharpness, rel=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_vasso_divides_by_the_averages_of_each(backend):
    rng = np.random.default_rng(3)
    start = [rng.standard_normal(shape) for shape in SHAPES]
    params, average = parameters(start, FP32), None
    optimizer = make(fastsam.VaSSO, params, "layer", backend, theta=0.4, lr=0.0)
    for _ in range(2):
        gs = [rng.standard_normal(shape) for shape in SHAPES]
        average = gs if average is None else [
            0.6 * s + 0.4 * g for s, g in zip(average, gs, strict=True)
        ]  # fmt: skip
        set_grads(params, gs, FP32)
        optimizer.first_step()
        es = perturbation(average, [1.0] * 5, "layer")
        for w, ours, e in zip(start, numpy(params), es, strict=True):
            np.testing.assert_allclose(ours, np.float32(w) + e, rtol=0, atol=1e-6)
        optimizer.second_step()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_segment_that_is_not_finite_is_not_perturbed(backend):
    params = parameters([np.ones(3), np.ones(3), np.ones(3)], FP32)
    optimizer = fastsam.SAM(params, torch.optim.SGD, lr=0.1, rho=0.1, norm="layer", backend=backend)
    set_grads(params, [np.full(3, np.inf), np.zeros(3), np.array([3.0, 0.0, 4.0])], FP32)
    optimizer.first_step()
    first, second, third = numpy(params)
    assert (first == 1).all() and (second == 1).all()
    np.testing.assert_allclose(third, [1.06, 1, 1.08], rtol=1e-6)
    optimizer.restore()


@pytest.mark.parametrize("backend", BACKENDS)
def test_lets_learns_a_radius_of_each_layer(backend):
    """The hypergradient's diagonal makes the same perturbation once more."""
    rng = np.random.default_rng(3)
    params = parameters([rng.standard_normal(shape) for shape in SHAPES], FP32)
    wrapped = make(fastsam.SAM, params, "layer", backend, momentum=0.0)
    lets = fastsam.LETS(wrapped, rho_lr=0.1)
    passes = [[rng.standard_normal(s) for s in SHAPES] for _ in range(4)]
    left, losses = list(passes), iter([1.0, 1.0, 1.0, 3.0])

    def closure():
        set_grads(params, left.pop(0), FP32)
        return next(losses)

    lets.step(closure, closure)
    first, second, training, validation = passes
    es = perturbation(first, [1.0] * 5, "layer")
    slope = -2 * 0.05 * sum(
        np.sum((v - t) * g**2 * e)
        for v, t, g, e in zip(validation, training, second, es, strict=True)
    )  # fmt: skip
    assert float(lets.metrics["hypergradient"]) == pytest.approx(slope / 0.1, rel=1e-4)


def test_what_divides_by_no_norm_refuses():
    params = parameters([np.ones(3)], FP32)
    for rule in ("adam", "adagrad_norm"):
        with pytest.raises(ValueError, match="norm must be 'global' with LightSAM"):
            fastsam.LightSAM(params, lr=0.1, rho=0.1, rule=rule, norm="layer")
    with pytest.raises(ValueError, match="norm must be 'global' with USAM"):
        fastsam.USAM(params, torch.optim.SGD, lr=0.1, norm="layer")
    with pytest.raises(ValueError, match="norm must be one of 'global', 'group', 'layer'"):
        fastsam.SAM(params, torch.optim.SGD, lr=0.1, norm=2)
    optimizer = fastsam.SAM(params, torch.optim.SGD, lr=0.1, norm="layer")
    assert optimizer.norm == "layer"
    with pytest.raises(AttributeError, match="norm must stay 'layer'"):
        optimizer.norm = "global"
