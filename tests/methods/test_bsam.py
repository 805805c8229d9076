"""bSAM against its equations, and what its noise, its update and its state promise."""

import copy
import math

import numpy as np
import pytest
import torch

import fastsam

import oracle_noise
from conftest import DEVICE
from noisy_bsam import FP32, FP64, GROUPS, SETTINGS, Training, followed
from registry import BACKENDS, Dtypes, numpy

# --- the equations ----------------------------------------------------------------------------


@pytest.mark.parametrize(("dtypes", "near"), [(FP64, 1e-12), (FP32, 1e-5)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_equations(backend, dtypes, near):
    run = Training(backend, dtypes)
    start = run.weights
    ours = run.step(5).weights
    assert np.abs(ours - start).max() > 0.1
    np.testing.assert_allclose(ours, followed(5, dtypes), atol=near, rtol=0)
    state = run.optimizer.state[run.params[0]]
    assert state.keys() == {"exp_avg", "precision"}


@pytest.mark.parametrize("backend", BACKENDS)
def test_explicit_passes_are_the_same_step(backend):
    whole, parts = Training(backend).step(2), Training(backend)
    parts.explicit()
    parts.explicit()
    np.testing.assert_array_equal(whole.weights, parts.weights)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_that_are_missing(backend):
    """A first one counts as zeros; without a second a parameter is only restored."""
    run = Training(backend)
    run.missing = {1: [0]}
    np.testing.assert_allclose(run.step().weights, followed(1, missing=[0]), atol=1e-13, rtol=0)
    run = Training(backend)
    run.missing, before = {2: [1]}, numpy(run.params)
    after = numpy(run.step().params)
    assert np.array_equal(after[1], before[1]) and not np.array_equal(after[0], before[0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, in the interpreter
def test_a_first_gradient_that_is_not_finite_stays_out_of_the_state(backend, bad):
    run = Training(backend)
    run.bad = {1: bad}
    np.testing.assert_allclose(run.step().weights, followed(1, bad=bad), atol=1e-13, rtol=0)
    assert float(run.optimizer.state[run.params[0]]["precision"].flatten()[3]) == 1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("call", [3, 4])
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_skipping(backend, call):
    run = Training(backend, skip_nonfinite=True).step()
    before, state = run.weights, copy.deepcopy(run.optimizer.state_dict()["state"])
    run.bad = {call: math.nan}
    run.step()
    np.testing.assert_array_equal(run.weights, before)
    after = run.optimizer.state_dict()["state"]
    assert all(torch.equal(after[i][k], x) for i, held in state.items() for k, x in held.items())
    assert float(run.optimizer.metrics["skipped"]) == 1
    assert not np.array_equal(run.step().weights, before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_loss_scale(backend):
    plain, scaled = Training(backend), Training(backend)
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


def test_maximising_is_minimising_the_negative():
    down, up = Training(), Training(maximize=True)
    up.sign = -1.0
    np.testing.assert_allclose(up.step(3).weights, down.step(3).weights, rtol=0, atol=1e-14)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("setting", [{"master_weights": True}, {"rounding": "stochastic"}, {}])
@pytest.mark.filterwarnings("ignore:some parameters are float16 or bfloat16")
def test_16_bit_weights(backend, setting):
    run = Training(backend, Dtypes("bfloat16", "bfloat16"), **setting).step(3)
    near = np.abs(run.weights - followed(3))
    assert near.max() < 0.2 and near.mean() < 0.01  # where nothing is rounded
    assert run.optimizer.state[run.params[0]]["precision"].dtype == torch.float32


@pytest.mark.parametrize("backend", BACKENDS)
def test_noise_and_perturbation_are_rounded_by_bits_of_their_own(backend):
    """Weights that the noise has rounded up are in the ascent, half a step away, as any others."""
    param = torch.nn.Parameter(torch.ones(1 << 14, dtype=torch.bfloat16, device=DEVICE))
    optimizer = fastsam.BSAM([param], n=1e6, rho=2**-8, rounding="stochastic", backend=backend)
    with optimizer.noise():
        up = param.detach() > 1
    with optimizer.sampled(0):
        other = param.detach() > 1
    with optimizer.noise():
        assert torch.equal(up, param.detach() > 1)
        param.grad = torch.ones_like(param)
    optimizer.first_step()
    both = (param.detach() > 1)[up].double().mean()
    assert 400 < up.sum() < 1200 and abs(float(both) - 0.5) < 0.1
    assert float((up & other).double().mean()) < 0.008


# --- samples ----------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_samples_are_of_the_gaussian(backend):
    run = Training(backend, seed=4).step(2)
    before = numpy(run.params)
    seen = {}
    for number in (None, 0, 1, 0):
        block = run.optimizer.noise() if number is None else run.optimizer.sampled(number)
        with block:
            inside = numpy(run.params)
        for i, (w, x) in enumerate(zip(before, inside, strict=True)):
            sample = 0 if number is None else number + 1
            s = numpy([run.optimizer.state[run.params[i]]["precision"]])[0]
            z = oracle_noise.normal(4, i, 2, sample, w.shape) * (i < 2)
            n = (SETTINGS | GROUPS[i])["n"]
            np.testing.assert_allclose(x - w, z / np.sqrt(n * s), rtol=1e-9, atol=1e-12)
        assert all(map(np.array_equal, numpy(run.params), before))
        seen.setdefault(number, inside)
    assert not np.array_equal(seen[0][0], seen[1][0])
    assert not np.array_equal(seen[None][0], seen[0][0])


def test_a_block_that_fails_ends_with_the_weights():
    run = Training()
    before = run.weights
    with pytest.raises(KeyError), run.optimizer.sampled(3):
        raise KeyError
    np.testing.assert_array_equal(run.weights, before)
    run.step()


def test_calls_come_in_order():
    run = Training()
    optimizer = run.optimizer
    run.backward()
    with pytest.raises(RuntimeError, match=r"put optimizer.noise\(\) around"):
        optimizer.first_step()
    with optimizer.noise():
        run.backward()
        for call in (optimizer.first_step, lambda: optimizer.step(run.backward)):
            with pytest.raises(RuntimeError, match="while a sample is in the model"):
                call()
        with pytest.raises(RuntimeError, match="while a sample is in the model"):
            with optimizer.sampled(1):
                pass
    optimizer.first_step()
    with pytest.raises(RuntimeError, match="expected second_step"), optimizer.noise():
        pass
    optimizer.restore()
    with pytest.raises(RuntimeError, match="around forward and backward"):
        optimizer.first_step()
    with pytest.raises(ValueError, match="number must be"), optimizer.sampled(-1):
        pass


# --- failures and state -----------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("call", [3, 4])
def test_a_closure_that_fails_changes_nothing(backend, call):
    run, other = Training(backend).step(), Training(backend).step()
    before = run.weights
    run.bad = {call: KeyError("data")}
    with pytest.raises(KeyError):
        run.step()
    np.testing.assert_array_equal(run.weights, before)
    np.testing.assert_array_equal(run.step(2).weights, other.step(2).weights)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_resumed_run_goes_on_bit_for_bit(backend):
    run, other = Training(backend).step(2), Training(backend)
    with torch.no_grad():
        for param, saved in zip(other.params, run.params, strict=True):
            param.copy_(saved)
    other.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
    np.testing.assert_array_equal(other.step(2).weights, run.step(2).weights)


def test_a_copy_goes_on():
    run = Training().step()
    params, optimizer = copy.deepcopy((run.params, run.optimizer))
    run.step()
    run.params, run.optimizer, ours = params, optimizer, run.weights
    np.testing.assert_array_equal(run.step().weights, ours)


# --- refusals ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "error", "words"),
    [
        ({"n": 0}, ValueError, "n must be at least 1"),
        ({"lr": -1.0}, ValueError, "lr must be"),
        ({"betas": (1.0, 0.9)}, ValueError, "betas"),
        ({"prior_precision": -1.0}, ValueError, "prior_precision must be"),
        ({"damping": math.nan}, ValueError, "damping must be"),
        ({"perturb_every": 2}, ValueError, "perturb_every, start, stop and perturb_when must stay"),
        ({"stop": 5}, ValueError, "perturb_every, start, stop and perturb_when must stay"),
        ({"ascent_steps": 2}, ValueError, "ascent_steps"),
        ({"norm": "layer"}, ValueError, "norm"),
        ({"adaptive": True}, TypeError, "adaptive"),
        ({"momentum": 0.9}, TypeError, "momentum"),
    ],
)
def test_arguments(kwargs, error, words):
    with pytest.raises(error, match=words):
        Training(**kwargs)


def test_what_it_does_not_combine_with():
    run = Training()
    with pytest.raises(TypeError, match="'n'"):
        fastsam.BSAM(run.params)
    with pytest.raises(RuntimeError, match="no step of its base alone"):
        run.optimizer.plain_step()
    with pytest.raises(RuntimeError, match="perturbations by micro-batch"):
        run.optimizer.step_micro_batches([run.backward])
    lets = fastsam.LETS(run.optimizer)
    with pytest.raises(RuntimeError, match="LETS does not support BSAM"):
        lets.step(run.backward, run.backward)
    with pytest.raises(TypeError, match="from_optimizer|base"):
        fastsam.BSAM.from_optimizer(torch.optim.SGD(run.params, lr=0.1), n=10)
