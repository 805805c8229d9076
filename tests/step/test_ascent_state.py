"""State of the ascent: it changes when the step is complete, and not before."""

import copy
import math

import numpy as np
import pytest
import torch

from networks import bits, closure_of, loss_of, model_and_data, same
from registry import BACKENDS, DEVICE, DTYPES, create, numpy, parameters, set_grads

FP32 = DTYPES["fp32"]
#: Those whose ascent has state, and the keys of that: of parameters, or of the first group.
WITH_STATE = {
    "vasso": ("ascent_ema",), "vasso-all": ("ascent_ema",), "lightsam-1": ("ascent_squared_norms",),
    "lightsam-2": ("ascent_sum",), "lightsam-3": ("ascent_exp_avg", "ascent_exp_avg_sq"),
    "lightsam-3-all": ("ascent_exp_avg", "ascent_exp_avg_sq"),
}  # fmt: skip


def ascent_state(optimizer, keys):
    """Copies of the ascent's state."""
    kept = optimizer.kept
    held = [state[key] for state in optimizer.state.values() for key in keys if key in state]
    return [torch.as_tensor(x).clone() for x in held + [kept[k] for k in keys if k in kept]]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("method", WITH_STATE)
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failed_step_leaves_the_ascent_state(method, backend, error):
    model, loss_fn = model_and_data()
    optimizer = create(method, model.parameters(), backend)
    closure, calls = closure_of(loss_fn), []
    for _ in range(2):
        optimizer.step(closure)
    twin = copy.deepcopy({"model": model, "optimizer": optimizer})
    before = ascent_state(optimizer, WITH_STATE[method])
    assert before

    def failing():
        calls.append(1)
        closure()
        if len(calls) == 2:
            raise error("no")

    with pytest.raises(error, match="no"):
        optimizer.step(failing)
    assert same(ascent_state(optimizer, WITH_STATE[method]), before)
    optimizer.step(closure)  # as if nothing had happened
    x_loss = loss_of(twin["model"])
    twin["optimizer"].step(closure_of(x_loss))
    assert same(bits(model), bits(twin["model"]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("method", ["vasso-all", "lightsam-3-all"])
@pytest.mark.parametrize("first", [True, False])
def test_a_skipped_step_leaves_the_ascent_state(method, backend, first):
    """Also of a parameter that has no second gradient, and in the very first step."""
    shapes = [(1031,), (5, 7), (3,)]
    rng = np.random.default_rng(4)
    params = parameters([rng.standard_normal(s) for s in shapes], FP32)
    optimizer = create(method, params, backend)

    def step(bad: bool) -> None:
        set_grads(params, [rng.standard_normal(s) for s in shapes], FP32)
        optimizer.first_step()
        grads = [rng.standard_normal(s) for s in shapes]
        if bad:
            grads[1][2, 3] = math.inf
            grads[2] = None
        set_grads(params, grads, FP32)
        optimizer.second_step()

    if not first:
        step(bad=False)
    before, weights = ascent_state(optimizer, WITH_STATE[method]), numpy(params)
    step(bad=True)
    after = ascent_state(optimizer, WITH_STATE[method])
    assert optimizer.metrics["skipped"] == 1
    assert all((a == b).all() for a, b in zip(numpy(params), weights, strict=True))
    if first:  # there was none: what is there now says that nothing has been seen
        assert all(x.isnan().all() or (x == 0).all() or (x == 0.03**2).all() for x in after)
    else:
        assert same(before, after)
    step(bad=False)
    assert all(x.isfinite().all() for x in ascent_state(optimizer, WITH_STATE[method]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_rejected_step_whose_passes_have_different_parameters(backend):
    params = parameters([np.ones(3), np.ones(2)], FP32)
    optimizer = create("vasso", params, backend, skip_nonfinite=True)
    for step, second in ((0, [np.ones(3), np.ones(2)]), (1, [None, np.array([1.0, np.inf])])):
        set_grads(params, [np.full(3, 1.0 + step), None if step else np.ones(2)], FP32)
        optimizer.first_step()
        set_grads(params, second, FP32)
        optimizer.second_step()
    assert optimizer.metrics["skipped"] == 1
    assert (optimizer.state[params[0]]["ascent_ema"] == 1).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("method", ["vasso-all", "lightsam-1", "lightsam-2", "lightsam-3-all"])
@pytest.mark.filterwarnings("ignore:the second pass left no gradients")
def test_a_step_without_second_gradients_is_complete(method, backend):
    """Whatever the verdict on the step before was."""
    params = parameters([np.ones(3)], FP32)
    optimizer = create(method, params, backend, skip_nonfinite=True)
    for first, second in ((1.0, 1.0), (1.0, np.nan), (2.0, None)):
        set_grads(params, [np.full(3, first)], FP32)
        optimizer.first_step()
        set_grads(params, [None if second is None else np.full(3, second)], FP32)
        before = ascent_state(optimizer, WITH_STATE[method])
        optimizer.second_step()
    after = ascent_state(optimizer, WITH_STATE[method])
    assert optimizer.metrics["skipped"] == 1
    assert not any(torch.equal(x, y) for x, y in zip(before, after, strict=True))
    assert all(x.isfinite().all() for x in after)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("method", ["vasso", "lightsam-1"])
def test_a_gradient_that_is_not_finite_stays_out_of_the_ascent_state(method, backend):
    params = parameters([np.ones(40), np.ones(3)], FP32)
    optimizer = create(method, params, backend, "sgd", lr=0.0)
    for value in (2.0, math.nan, math.inf):
        before = ascent_state(optimizer, WITH_STATE[method])
        grads = [np.ones(40), np.ones(3)]
        grads[0][7] = value
        set_grads(params, grads, FP32)
        optimizer.first_step()
        assert all((p != 1).any() == (value == 2.0) for p in params)
        set_grads(params, [np.ones(40), np.ones(3)], FP32)
        optimizer.second_step()
        if value != 2.0:
            assert same(ascent_state(optimizer, WITH_STATE[method]), before)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("method", ["lightsam-2", "lightsam-3"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e30])
def test_lightsam_leaves_out_single_elements(method, value, backend):
    """Rules II and III know no norm: only the bad element stays where it is."""
    params = parameters([np.ones(40)], FP32)
    optimizer = create(method, params, backend, lr=0.0)
    for step in range(2):
        grad = np.ones(40)
        if step == 1:
            grad[7] = value
            before = ascent_state(optimizer, WITH_STATE[method])
        set_grads(params, [grad], FP32)
        optimizer.first_step()
        moved = params[0] != 1
        set_grads(params, [np.ones(40)], FP32)
        optimizer.second_step()
    assert moved.tolist() == [k != 7 for k in range(40)]
    for old, new in zip(before, ascent_state(optimizer, WITH_STATE[method]), strict=True):
        assert (old == new).tolist() == [k == 7 for k in range(40)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("method", ["lightsam-1", "lightsam-2", "lightsam-3", "adasam", "vasso"])
@pytest.mark.filterwarnings("ignore:some parameters are float16 or bfloat16")
def test_state_is_wide_whatever_the_parameters(method, backend):
    """eps ** 2 is 0 in float16."""
    for dtype, expected in (
        (torch.float16, torch.float32), (torch.bfloat16, torch.float32),
        (torch.float64, torch.float64),
    ):  # fmt: skip
        param = torch.nn.Parameter(torch.ones(20, dtype=dtype, device=DEVICE))
        optimizer = create(method, [param], backend, "sgd")
        for half in (optimizer.first_step, optimizer.second_step):
            param.grad = torch.full_like(param, 1e-3)
            half()
        assert all(x.dtype == expected for x in optimizer.state[param].values())
        assert param.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("method", ["vasso", "lightsam-2"])
def test_a_zero_radius_still_feeds_the_ascent(method, backend):
    """The closure is called twice, so that a radius can be scheduled up from 0."""
    model, loss_fn = model_and_data()
    optimizer = create(method, model.parameters(), backend, rho=0.0)
    calls, closure = [], closure_of(loss_fn)
    for _ in range(2):
        before = bits(model)
        optimizer.step(lambda before=before: (calls.append(same(bits(model), before)), closure()))
    assert calls == [True] * 4
    for state in optimizer.state.values():
        assert (state[WITH_STATE[method][0]] != 0).any()


@pytest.mark.parametrize("method", ["vasso", "lightsam-2", "lightsam-3"])
def test_ascent_state_of_other_parameters_is_refused(method):
    """Before anything is perturbed."""
    params = [torch.nn.Parameter(torch.ones(s, device=DEVICE)) for s in (3, 5000)]
    swapped = create(method, params[::-1], "torch")

    def closure():
        for p in params:
            p.grad = torch.ones_like(p)

    swapped.step(closure)
    optimizer = create(method, params, "triton")
    with pytest.raises(ValueError, match="made for other parameters"):
        optimizer.load_state_dict(copy.deepcopy(swapped.state_dict()))
    for p, q in zip(params, reversed(params), strict=True):
        optimizer.state[p] = dict(swapped.state[q])  # by hand
    before = numpy(params)
    closure()
    with pytest.raises(RuntimeError, match="made for other parameters"):
        optimizer.first_step()
    assert all((a == b).all() for a, b in zip(numpy(params), before, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("method", ["vasso", "lightsam-3"])
def test_state_that_somebody_holds_is_not_written_to(method, backend):
    """The memory of the state before last is used again, but not where it is known elsewhere."""
    model, loss_fn = model_and_data()
    optimizer, closure = create(method, model.parameters(), backend), closure_of(loss_fn)
    optimizer.step(closure)
    for by_memory_alone in (False, True):
        held = [x for state in optimizer.state.values() for x in map(state.get, WITH_STATE[method])]
        if by_memory_alone:
            held = [x.view(-1) for x in held]
        before = [x.clone() for x in held]
        for _ in range(3):
            optimizer.step(closure)
        assert all(torch.equal(x, y) for x, y in zip(held, before, strict=True))
