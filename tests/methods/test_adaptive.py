"""What is particular to VaSSO, LightSAM and AdaSAM; the rest is in the tests of all methods."""

import copy
import math

import numpy as np
import pytest
import torch

import fastsam

import launches
from networks import bits, closure_of, loss_of, model_and_data, same
from registry import (
    APART,
    BACKENDS,
    DEVICE,
    DTYPES,
    METHODS,
    OTHERS,
    create,
    numpy,
    parameters,
    set_grads,
)

FP32 = DTYPES["fp32"]
SGD = {"base_optimizer": torch.optim.SGD, "lr": 0.1}


# VaSSO


@pytest.mark.parametrize("backend", BACKENDS)
def test_vasso_with_theta_1_is_sam(backend):
    results = []
    for cls, kwargs in ((fastsam.SAM, {}), (fastsam.VaSSO, {"theta": 1.0})):
        model, loss_fn = model_and_data()
        optimizer = cls(model.parameters(), momentum=0.9, backend=backend, **SGD, **kwargs)
        for _ in range(20):
            optimizer.step(closure_of(loss_fn))
        results.append(torch.cat([w.flatten() for w in bits(model)]))
    assert not torch.equal(*results)  # 1e-7 against 1e-12 in the denominator
    torch.testing.assert_close(*results, rtol=0, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.filterwarnings("ignore:the second pass left no gradients")
def test_vasso_around_a_base_that_is_not_fused(backend):
    """Such a base initialises a parameter that has no state at all: VaSSO's must not be seen."""
    model, loss_fn = model_and_data()
    optimizer = fastsam.VaSSO(model.parameters(), torch.optim.RMSprop, lr=0.01, backend=backend)
    for p in list(model.parameters())[:2]:
        p.grad = torch.ones_like(p)
    optimizer.first_step(zero_grad=True)  # parameters that have their first gradient and no other
    optimizer.second_step()
    for _ in range(2):
        optimizer.step(closure_of(loss_fn))
    for state in optimizer.state.values():
        assert {"ascent_ema", "square_avg", "step"} <= state.keys()
    saved = copy.deepcopy({"model": model, "state": optimizer.state_dict()})
    optimizer.step(closure_of(loss_fn))
    resumed = fastsam.VaSSO(saved["model"].parameters(), torch.optim.RMSprop, backend=backend)
    resumed.load_state_dict(saved["state"])
    resumed.step(closure_of(loss_of(saved["model"])))
    assert same(bits(model), bits(saved["model"]))


# LightSAM


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("rule", "size"), [("adagrad", 1.0), ("adam", 0.1 / math.sqrt(0.001))])
def test_lightsams_first_step_is_the_sign(rule, size, backend):
    params = parameters([np.zeros(5)], FP32)
    optimizer = fastsam.LightSAM(params, lr=0.1, rho=0.01, rule=rule, backend=backend)
    grad = np.array([1.0, -2.0, 0.5, -1e-3, 0.0])
    set_grads(params, [grad], FP32)
    optimizer.first_step()
    np.testing.assert_allclose(numpy(params)[0], 0.01 * size * np.sign(grad), rtol=1e-6)
    set_grads(params, [grad], FP32)
    optimizer.second_step()
    np.testing.assert_allclose(numpy(params)[0], -0.1 * size * np.sign(grad), rtol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("second", [0.0, 7e-43, 1e-39])
def test_long_silence_is_not_a_division_by_zero(second, backend):
    """An average of squares ends near 7e-43 after 50,000 zero gradients, where a GPU sees 0."""
    params = parameters([np.ones(3)], FP32)
    optimizer = fastsam.LightSAM(params, lr=0.1, rho=0.1, betas=(0.9, 1 - 1e-7), backend=backend)
    smallest = 2.0**-126
    for step in range(2):
        if step == 1:
            state = optimizer.state[params[0]]
            for name in ("exp_avg_sq", "ascent_exp_avg_sq"):
                state[name].fill_(second)
            for name in ("exp_avg", "ascent_exp_avg"):
                state[name].copy_(torch.tensor([0.0, 1e-20, -1e-25]))
        before = numpy(params)[0]
        for half in (optimizer.first_step, optimizer.second_step):
            set_grads(params, [np.zeros(3)], FP32)
            half()
            assert params[0].isfinite().all()
    expected = before - 0.1 * 0.9 * np.array([0, 1e-20, -1e-25]) / smallest**0.5
    np.testing.assert_allclose(numpy(params)[0], expected, rtol=1e-6)


# Launches


@pytest.mark.skipif(DEVICE != "cpu", reason="counts in Triton's interpreter")
@pytest.mark.parametrize(
    ("method", "kernels"),
    [
        ("lightsam-2", ["perturb_kernel", "update_kernel"]),
        ("lightsam-3", ["perturb_kernel", "update_kernel"]),
    ],
)
def test_no_norm_is_taken_that_nothing_needs(method, kernels):
    params = parameters([np.ones(5)], FP32)
    optimizer = create(method, params, "triton")
    with launches.record() as log:
        for half in (optimizer.first_step, optimizer.second_step):
            set_grads(params, [np.ones(5)], FP32)
            half()
    assert log.kernels == kernels
    assert "grad_norm" not in optimizer.metrics


# Bad input


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda p: fastsam.VaSSO(p, theta=1.5, **SGD), ValueError, r"theta must be in \[0, 1\]"),
        (lambda p: fastsam.VaSSO(p, theta="a", **SGD), ValueError, r"theta must be in \[0, 1\]"),
        (lambda p: fastsam.LightSAM(p, 0.1, 0.1, "sgd"), ValueError, "rule must be one of"),
        (lambda p: fastsam.LightSAM(p, -1, 0.1), ValueError, "lr must be at least 0"),
        (lambda p: fastsam.LightSAM(p, 0.1, -1), ValueError, "rho must be at least 0"),
        (lambda p: fastsam.LightSAM(p, 0.1, 0.1, betas=(1, 0)), ValueError, "betas must be two"),
        (lambda p: fastsam.LightSAM(p, 0.1, 0.1, eps=0), ValueError, "eps must be at least 1e-18"),
        (lambda p: fastsam.LightSAM(p, 0.1, 0.1, weight_decay=-1), ValueError, "weight_decay must"),
        (lambda p: fastsam.LightSAM(p, 0.1, 0.1, momentum=1), TypeError, "argument 'momentum'"),
        (lambda p: fastsam.LightSAM([{"params": p, "adaptive": True}], 0.1, 0.1), ValueError,
         "adaptive must be False"),
        (lambda p: fastsam.LightSAM([{"params": p, "betas": (0, 2)}], 0.1, 0.1), ValueError,
         "betas must be two"),
        (lambda p: fastsam.LightSAM(p, 0.1, 0.1).add_param_group({"params": [], "eps": 0}),
         ValueError, "eps must be"),
        (lambda p: fastsam.AdaSAM(p, 0.1, 0.1, eps=math.nan), ValueError, "eps must be"),
        (lambda p: fastsam.AdaSAM(p, 0.1, 0.1, adaptive=True), TypeError, "argument 'adaptive'"),
        (lambda p: fastsam.SAMAR(p, lam=-1, **SGD), ValueError, "lam must be at least 0"),
        (lambda p: fastsam.SAMAR(p, rule=3, **SGD), TypeError, "rule must be a SharpnessRatio"),
        (lambda p: fastsam.SharpnessRatio(c=0.9), ValueError, "c must be at least 1"),
        (lambda p: fastsam.SharpnessRatio(lam_min=3), ValueError, "lam_min must be at most"),
        (lambda p: fastsam.SharpnessRatio(smoothing=1), ValueError, r"smoothing must be in \[0, 1"),
    ],
)  # fmt: skip
def test_bad_arguments(build, error, message):
    with pytest.raises(error, match=message):
        build([torch.nn.Parameter(torch.ones(2))])


def test_every_class_is_in_the_registry():
    rows = (METHODS | OTHERS).values()
    tested = {cls for method in rows for cls in method.cls.__mro__[:2]} | set(APART)
    classes = {getattr(fastsam, name) for name in fastsam.__all__}
    base = fastsam.optimizer.SharpnessAwareOptimizer
    own = {cls for cls in classes if isinstance(cls, type) and issubclass(cls, base)}
    assert fastsam.LightSAM in own and own <= tested
