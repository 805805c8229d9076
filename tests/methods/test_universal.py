"""Trace-, Det- and Frob-SAM and their general form: the noise, the equations, and what a step of
several perturbations promises."""

import copy
import math
from statistics import NormalDist

import numpy as np
import pytest
import torch

import fastsam
from fastsam.objectives import Determinant

import oracle_noise
import oracles
from conftest import DEVICE
from noisy_universal import FP32, FP64, KINDS, SGD, Training, followed
from registry import BACKENDS, Dtypes, numpy, parameters, set_grads

HALF = Dtypes("bfloat16", "bfloat16")


# --- the noise --------------------------------------------------------------------------------


def test_the_noise_is_gaussian():
    """Within the approximation's error of the quantile, in the middle and in the tails."""
    k = np.concatenate([np.arange(40), 2**23 + np.arange(-20, 20), 2**24 - 1 - np.arange(40),
                        np.random.default_rng(0).integers(0, 2**24, 400)])  # fmt: skip
    x = (2 * k + 1 - 2.0**24) / 2**24
    z = fastsam.methods.noise.NORMAL.direction(torch.tensor(x), {}, {}).numpy()
    exact = np.array([NormalDist().inv_cdf((v + 1) / 2) for v in x])
    assert np.abs(z / exact - 1).max() < 2e-7
    many = oracle_noise.normal(3, 1, 7, 2, (1 << 18,))
    assert abs(many.mean()) < 5 / 512 and abs(many.std() - 1) < 5 / 700
    other = oracle_noise.normal(3, 1, 7, 1, (1 << 18,))
    assert abs(np.mean(many * other)) < 5 / 512 and abs(np.mean(many[1:] * many[:-1])) < 5 / 512


@pytest.mark.parametrize("backend", BACKENDS)
def test_perturbations_are_the_documented_noise(backend):
    run = Training("trace-3", backend, rho=0.5, seed=9)
    for step in range(2):
        before = numpy(run.params)
        for sample in range(3):
            run.backward()
            run.optimizer.first_step()
            for i, (w, param) in enumerate(zip(before, numpy(run.params), strict=True)):
                z = oracle_noise.normal(9, i, step, sample, w.shape)
                np.testing.assert_allclose(param - w, 0.5 * z, rtol=1e-9, atol=1e-12)
        run.optimizer.second_step()


def test_elements_are_counted_in_memory_order():
    """So a transposed parameter is perturbed as its transpose is."""
    found = []
    for backend in BACKENDS:
        data = torch.zeros(5, 3, dtype=torch.float64, device=DEVICE).t()
        param = torch.nn.Parameter(data)
        optimizer = fastsam.TraceSAM([param], torch.optim.SGD, lr=1.0, rho=1.0, backend=backend)
        param.grad = torch.zeros_like(param)
        optimizer.first_step()
        found.append(param.detach().t().cpu().numpy().copy())
        optimizer.restore()
    expected = oracle_noise.normal(0, 0, 0, 0, (5, 3))
    for x in found:
        np.testing.assert_allclose(x, expected, rtol=1e-9)


# --- the equations ----------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_equations(kind, backend):
    ours = Training(kind, backend).step(4)
    assert np.abs(ours.weights - Training(kind).weights).max() > 1e-3
    np.testing.assert_allclose(ours.weights, followed(kind, 4), atol=2e-12, rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["trace-3", "det-3", "frob"])
def test_equations_in_float32(kind, backend):
    """Gradients are rounded, and differences of losses have their rounding over rho^2."""
    ours = Training(kind, backend, FP32).step(4)
    np.testing.assert_allclose(ours.weights, followed(kind, 4, FP32), atol=1e-5, rtol=0)


def test_radius_0_is_the_base_optimizer():
    run = Training("det-3", rho=0.0).step(3)
    assert run.calls == 3
    params = parameters(run.problem.initial(), FP64)
    base = torch.optim.SGD(params, **SGD)
    for _ in range(3):
        set_grads(params, run.problem.grad(numpy(params)), FP64)
        base.step()
    assert all(map(torch.equal, run.params, params))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["det", "frob", "general"])
@pytest.mark.parametrize("rho", [0.0, "tensor", 1e-200])
def test_a_radius_that_becomes_0_leaves_the_gradient(rho, kind, backend):
    """Bit for bit: on the device, in explicit passes, and where only the square is 0."""
    on_device = torch.zeros((), dtype=torch.float64, device=DEVICE)
    run = Training(kind, backend, rho=on_device if rho == "tensor" else rho)
    base = Training("trace", backend, rho=0.0)
    for _ in range(2):
        while run.optimizer.ascents_left:
            run.optimizer.first_step(zero_grad=True, loss=run.backward())
        run.optimizer.second_step(loss=run.backward())
        base.step()
    np.testing.assert_array_equal(run.weights, base.weights)


def test_exponentials_are_relative_to_the_largest():
    """exp(800) overflows; the coefficients do not."""
    xs = [torch.tensor(x, dtype=torch.float64) for x in (-1600.0, -1599.0, -1598.0)]
    found = Determinant().mixture(xs, 1.0, 3)
    assert float(found.first) == 1 and float(found.last) == 0 == float(found.weighted)
    decay, weight = Determinant().running(xs)
    assert float(decay) == 1 and float(weight) == pytest.approx(math.exp(-1))
    single = Determinant().mixture([torch.tensor(3.0, dtype=torch.float64)], 2.0, 1)
    assert float(single.last) == pytest.approx(2 * math.exp(3), rel=1e-14)


# --- explicit passes --------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["trace", "det-3", "frob-4"])
def test_explicit_passes_are_the_same_step(kind, backend):
    whole, parts = Training(kind, backend).step(2), Training(kind, backend)
    for _ in range(2):
        for left in range(parts.optimizer.samples, 0, -1):
            assert parts.optimizer.ascents_left == left
            parts.optimizer.first_step(zero_grad=True, loss=parts.backward())
        parts.optimizer.second_step(loss=torch.tensor(parts.backward(), dtype=torch.float64))
    np.testing.assert_array_equal(whole.weights, parts.weights)


def test_a_missing_loss_is_refused_before_anything_changes():
    run = Training("det-3")
    before = run.weights
    run.backward()
    with pytest.raises(TypeError, match="DetSAM needs the loss of every pass"):
        run.optimizer.first_step()
    np.testing.assert_array_equal(run.weights, before)
    run.optimizer.first_step(loss=1.0)
    with pytest.raises(TypeError, match="loss of every pass"):
        run.optimizer.first_step(loss=torch.ones(2))
    run.optimizer.first_step(loss=1.0)
    run.optimizer.first_step(loss=1.0)
    with pytest.raises(TypeError, match="loss of every pass"):
        run.optimizer.second_step()
    assert not run.optimizer.between_passes
    np.testing.assert_array_equal(run.weights, before)
    with pytest.raises(TypeError, match="loss of every pass"):
        run.optimizer.step(lambda: (run.backward(), None)[1])
    np.testing.assert_array_equal(run.weights, before)


# --- failures, state, settings ----------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("call", range(4))
def test_a_closure_that_fails_changes_nothing(backend, call):
    run, other = Training("det-3", backend).step(1), Training("det-3", backend).step(1)
    before, state = run.weights, copy.deepcopy(run.optimizer.state_dict())
    run.bad = {run.calls + call: KeyError("data")}
    with pytest.raises(KeyError):
        run.step()
    np.testing.assert_array_equal(run.weights, before)
    after = run.optimizer.state_dict()
    assert after["param_groups"] == state["param_groups"]
    np.testing.assert_array_equal(run.step(2).weights, other.step(2).weights)


@pytest.mark.parametrize("kind", ["trace", "frob-4"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_resumed_run_goes_on_bit_for_bit(kind, backend):
    run = Training(kind, backend).step(2)
    other = Training(kind, backend)
    with torch.no_grad():
        for param, saved in zip(other.params, run.params, strict=True):
            param.copy_(saved)
    other.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
    assert float(other.optimizer.kept["noise_step"]) == 2
    np.testing.assert_array_equal(other.step(2).weights, run.step(2).weights)


def test_seeds_and_steps_draw_other_noise():
    found = [Training("trace", seed=seed).step(1).weights for seed in (0, 1)]
    assert not np.array_equal(*found)


def test_schedule():
    run = Training("frob-4", perturb_every=2).step(4)
    assert run.calls == 5 + 1 + 5 + 1
    assert float(run.optimizer.kept["noise_step"]) == 2


#: Of a step of frob-4, whose calls are 5: the gradients of one are not finite, or its loss is not.
BAD = [(call, bad) for call in range(5) for bad in (math.nan, math.inf)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("call", "bad"), BAD)
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, in the interpreter
def test_what_is_not_finite_skips_the_step(backend, call, bad):
    run = Training("frob-4", backend, skip_nonfinite=True).step(1)
    before = run.weights
    run.bad = {run.calls + call: bad}
    run.step()
    np.testing.assert_array_equal(run.weights, before)
    assert float(run.optimizer.metrics["skipped"]) == 1
    assert np.isfinite(run.step().weights).all() and not np.array_equal(run.weights, before)
    assert float(run.optimizer.metrics["skipped"]) == 1
    run.optimizer.perturb_every = 100
    before = run.weights
    assert not np.array_equal(run.step().weights, before)


def test_an_overflow_of_the_determinant_is_skipped():
    run = Training("det", rho=1e-3, half_width=1e4, skip_nonfinite=True)
    before = run.weights
    run.step()
    assert float(run.optimizer.metrics["skipped"]) == 1
    np.testing.assert_array_equal(run.weights, before)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["det", "frob-4"])
def test_clipping_is_of_the_mixture(kind, backend):
    plain, clipped = Training(kind, backend, momentum=0.0), Training(kind, backend, momentum=0.0)
    clipped.optimizer.max_grad_norm = 0.5
    moves = [run.step().weights - start for run, start in ((plain, plain.weights),
                                                           (clipped, clipped.weights))]  # fmt: skip
    n = np.linalg.norm(moves[0]) / SGD["lr"]
    assert n > 1
    np.testing.assert_allclose(moves[1], moves[0] * 0.5 / (n + 1e-6), rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("backend", BACKENDS)
def test_groups_that_are_not_perturbed_take_part_in_the_update(backend):
    groups = [{"params": [0, 1]}, {"params": [2], "perturb": False}]
    run = Training("trace-3", backend, groups=groups, weight=0.5)
    start, gradients = numpy(run.params), []
    run.backward()
    run.optimizer.first_step()
    for left in (2, 1, 0):
        assert np.array_equal(numpy(run.params)[2], start[2])
        run.backward()
        gradients.append(numpy([p.grad for p in run.params])[2])
        run.optimizer.first_step() if left else run.optimizer.second_step()
    g = run.problem.grad(start)[2]
    u = g + 0.5 * (np.mean(gradients) - g)
    np.testing.assert_allclose(numpy(run.params)[2], start[2] - SGD["lr"] * u, rtol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_that_are_missing_count_as_zeros(backend):
    """At w, at the first perturbation, at the last."""
    run = Training("trace-3", backend, weight=0.5, momentum=0.0)
    start = numpy(run.params)
    found = []
    for number in range(4):
        run.backward()
        found.append(numpy([p.grad for p in run.params]))
        for k, missing in ((0, 0), (1, 1), (2, 3)):
            if number == missing:
                run.params[k].grad = None
        if number < 3:
            run.optimizer.first_step()
            for k, w in enumerate(numpy(run.params)):  # what has no gradient is not perturbed
                assert np.array_equal(w, start[k]) == ((k, number) in ((0, 0), (1, 1)))
    run.optimizer.second_step()
    us = [sum(found[n][0] for n in (1, 2, 3)) / 6,
          found[0][1] / 2 + sum(found[n][1] for n in (2, 3)) / 6, 0.0]  # fmt: skip
    for w, before, u in zip(numpy(run.params), start, us, strict=True):
        np.testing.assert_allclose(w, before - SGD["lr"] * u, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("kind", ["trace-3", "det", "frob"])
def test_maximising_is_minimising_the_negative(kind):
    down, up = Training(kind), Training(kind, maximize=True)
    up.sign = -1.0
    np.testing.assert_allclose(up.step(3).weights, down.step(3).weights, rtol=0, atol=1e-14)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_unfused_base_gets_the_mixture(backend):
    run = Training("frob", backend, base=torch.optim.RMSprop)
    other = Training("frob", backend, momentum=0.0, lr=1.0)
    start = other.weights
    run.step()
    u = np.concatenate([g.ravel() for g in numpy([p.grad for p in run.params])])
    np.testing.assert_allclose(start - other.step().weights, u, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["det", "frob"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_loss_scale(kind, backend):
    """A scale by a power of 2 changes no bit."""
    plain, scaled = Training(kind, backend), Training(kind, backend)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=1024.0)

    def closure():
        loss = scaled.backward()
        scaler.scale(torch.zeros((), device=DEVICE))
        for param in scaled.params:
            param.grad.mul_(1024.0)
        return loss

    for _ in range(2):
        scaled.optimizer.step(closure, grad_scaler=scaler)
        scaler.update()
    np.testing.assert_allclose(scaled.weights, plain.step(2).weights, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("setting", [{"master_weights": True}, {"rounding": "stochastic"}, {}])
@pytest.mark.filterwarnings("ignore:some parameters are float16 or bfloat16")
def test_16_bit_weights(backend, setting):
    """Every perturbation starts from the weights, whose master is not touched by it."""
    run = Training("trace-3", backend, HALF, **setting)
    start, seen = numpy(run.params), []
    for _ in range(3):
        run.backward()
        run.optimizer.first_step(zero_grad=True)
        seen.append(numpy(run.params))
    for sample, found in enumerate(seen):
        for i, (w, x) in enumerate(zip(start, found, strict=True)):
            e = 0.1 * oracle_noise.normal(0, i, 0, sample, w.shape)
            assert (np.abs(x - w - e) <= oracles.ulp(w + e, "bfloat16")).all()
    run.backward()
    run.optimizer.second_step()
    if "master_weights" in setting:
        near = followed("trace-3", 1)
        masters = [run.optimizer.state[p]["master_weight"] for p in run.params]
        found = np.concatenate([x.ravel() for x in numpy(masters)])
        assert np.abs(found - near).max() < 0.01  # w, w + e and gradients were rounded
    run.step(2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_perturbation_is_rounded_by_bits_of_its_own(backend):
    """Up in both as often as two independent numbers say."""
    param = torch.nn.Parameter(torch.ones(1 << 14, dtype=torch.bfloat16, device=DEVICE))
    optimizer = fastsam.TraceSAM([param], torch.optim.SGD, lr=0.1, rho=0.2 * 2**-7, samples=2,
                                 rounding="stochastic", backend=backend)  # fmt: skip
    ups, chances = [], []
    for sample in range(2):
        param.grad = torch.zeros_like(param)
        optimizer.first_step()
        ups.append(numpy([param])[0] > 1)
        chances.append(np.clip(0.2 * oracle_noise.normal(0, 0, 0, sample, (1 << 14,)), 0, 1))
    optimizer.restore()
    alone = [up.mean() for up in ups]
    np.testing.assert_allclose(alone, np.mean(chances, axis=1), atol=0.01)
    both, expected = (ups[0] & ups[1]).mean(), np.mean(chances[0] * chances[1])
    assert abs(both - expected) < 0.003  # with the same bits the mean of the smaller: 0.02 more


def test_parameters_may_move_to_scratch_memory():
    for backend in BACKENDS[1:]:
        moved = Training("frob-4", backend, scratch=True)
        np.testing.assert_array_equal(
            moved.step(2).weights, Training("frob-4", backend, scratch=False).step(2).weights
        )
        moved.bad = {moved.calls + 3: KeyError("data")}
        before = moved.weights
        with pytest.raises(KeyError):
            moved.step()
        np.testing.assert_array_equal(moved.weights, before)


# --- refusals ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "error", "words"),
    [
        ({"renormalize": True}, ValueError, "renormalize must be False with DetSAM"),
        ({"ascent_steps": 2}, ValueError, "ascent_steps must be 1 with DetSAM"),
        ({"adaptive": True}, ValueError, "adaptive"),
        ({"samples": 0}, ValueError, "samples"),
        ({"samples": 1.5}, ValueError, "samples"),
        ({"weight": -1.0}, ValueError, "weight"),
        ({"half_width": 0.0}, ValueError, "half_width"),
        ({"norm": "layer"}, ValueError, "norm"),
    ],
)
def test_arguments(kwargs, error, words):
    with pytest.raises(error, match=words):
        Training("det", **kwargs)


def test_arguments_of_the_others():
    with pytest.raises(ValueError, match="samples must be .*at least 2"):
        Training("frob", samples=1)
    with pytest.raises(ValueError, match="mu must be"):
        Training("general", mu="cauchy")
    with pytest.raises(TypeError, match="half_width must be None"):
        Training("general", mu="normal")
    with pytest.raises(TypeError, match="phi must be a function"):
        Training("general", phi=2.0)
    with pytest.raises(TypeError, match="psi must give a 0-dim tensor"):
        Training("general", psi=torch.Tensor.tolist).step()
    with pytest.raises(ValueError, match="rho must not be 0 in the first"):
        Training("det", groups=[{"params": [0], "rho": 0.0}, {"params": [1, 2]}]).step()
    run = Training("trace-3")
    with pytest.raises(AttributeError, match="samples must stay 3"):
        run.optimizer.samples = 4


def test_what_it_does_not_combine_with():
    run = Training("trace")
    with pytest.raises(RuntimeError, match="takes one closure"):
        run.optimizer.step(run.backward, run.backward)
    with pytest.raises(RuntimeError, match="perturbations by micro-batch"):
        run.optimizer.step_micro_batches([run.backward])
    lets = fastsam.LETS(run.optimizer)
    with pytest.raises(RuntimeError, match="LETS does not support TraceSAM"):
        lets.step(run.backward, run.backward)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["trace", "frob"])
def test_the_user_may_unscale_some_passes_of_a_step(kind, backend):
    cls = {"trace": fastsam.TraceSAM, "frob": fastsam.FrobSAM}[kind]

    def trained(unscaled):
        p = torch.nn.Parameter(torch.ones(4, device=DEVICE))
        optimizer = cls([p], torch.optim.SGD, rho=0.3, weight=0.2, samples=3, lr=0.05,
                        backend=backend)  # fmt: skip
        scaler = torch.amp.GradScaler(DEVICE, init_scale=256.0)
        for k in range(4):
            loss = (p**4).sum()
            scaler.scale(loss).backward()
            if k in unscaled:
                scaler.unscale_(optimizer)
            take = optimizer.first_step if k < 3 else optimizer.second_step
            take(zero_grad=True, grad_scaler=scaler, loss=loss.detach())
        return p.detach()

    expected = trained([])
    for unscaled in ([0], [1], [2], [3], [0, 2]):
        torch.testing.assert_close(trained(unscaled), expected, rtol=1e-6, atol=1e-6)
