"""Closures as users get them wrong, and calls out of order."""

import copy
import warnings
from contextlib import nullcontext

import pytest
import torch

import fastsam

from networks import bits, closure_of, model_and_data, same
from registry import BACKENDS, DEVICE

SGD = {"base_optimizer": torch.optim.SGD, "lr": 0.1, "momentum": 0.9}
NO_GRADIENT = "the closure left no gradient in any parameter"


def make(cls=fastsam.SAM, **kwargs):
    model, loss_fn = model_and_data()
    return model, loss_fn, cls(model.parameters(), **SGD | kwargs)


@pytest.fixture(autouse=True)
def strict():
    """Every warning is an error here, those that the suite ignores as well."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


# --- what a closure does and returns --------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_the_closure_returns(backend):
    """The first call's value comes back as it is; backward called before the step is of no use."""
    model, loss_fn, optimizer = make(backend=backend)
    values = iter([("loss at w", 1), ("loss at w + e", 2)])
    before = loss_fn().detach()
    loss_fn().backward()

    def closure():
        loss_fn().backward()
        return next(values)

    with pytest.warns(UserWarning, match="that the closure computed again"):
        assert optimizer.step(closure) == ("loss at w", 1)
        if DEVICE != "cpu":
            torch.cuda.synchronize()  # after which the next step sees it
        loss = optimizer.step(closure_of(loss_fn))
    assert loss.requires_grad and loss < before
    assert optimizer.step(lambda: loss_fn().backward()) is None  # to return nothing is allowed


def steps(closure_for, backend="torch", **kwargs):
    model, loss_fn, optimizer = make(backend=backend, **kwargs)
    for _ in range(3):
        optimizer.step(closure_for(optimizer, model, loss_fn))
    return bits(model), [p.grad for p in model.parameters()]


def with_zero_grad(set_to_none):
    def closure_for(optimizer, model, loss_fn):
        def closure():
            optimizer.zero_grad(set_to_none=set_to_none)
            return closure_of(loss_fn)()

        return closure

    return closure_for


def with_assignment(optimizer, model, loss_fn):
    def closure():
        grads = torch.autograd.grad(loss_fn(), list(model.parameters()))
        for p, g in zip(model.parameters(), grads, strict=True):
            p.grad = g

    return closure


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("closure_for", [with_zero_grad(True), with_zero_grad(False),
                                         with_assignment])  # fmt: skip
def test_ways_to_get_gradients_are_equal(closure_for, backend):
    """With a zero_grad of its own, of either kind, and without backward at all."""
    weights, grads = steps(lambda optimizer, model, loss_fn: closure_of(loss_fn), backend)
    others, other_grads = steps(closure_for, backend)
    assert same(weights, others) and same(grads, other_grads)


@pytest.mark.parametrize("value", [1.5, "loss", [], torch.ones(())])
def test_what_is_no_closure(value):
    model, loss_fn, optimizer = make()
    optimizer.step(closure_of(loss_fn))
    before, grads = bits(model), [p.grad.clone() for p in model.parameters()]
    message = f"closure must be a function .* got {type(value).__name__}"
    with pytest.raises(TypeError, match=message):  # as in step(loss)
        optimizer.step(value)
    with pytest.raises(RuntimeError, match="SAM.step needs a closure .* first_step and second_st"):
        optimizer.step(None)
    with pytest.raises(RuntimeError, match="SAM.step needs a closure"):
        optimizer.step()
    assert same(bits(model), before)
    assert same([p.grad for p in model.parameters()], grads)  # nothing was zeroed for it
    optimizer.step(closure_of(loss_fn))


@pytest.mark.parametrize("wrong", [0, 1])
def test_what_is_no_closure_for_lets(wrong):
    model, loss_fn, optimizer = make()
    lets, closures = fastsam.LETS(optimizer), [closure_of(loss_fn)] * 2
    before = bits(model)
    closures[wrong] = loss_fn()
    with pytest.raises(TypeError):
        lets.step(*closures)
    assert same(bits(model), before)


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW, torch.optim.NAdam])
@pytest.mark.parametrize("lr", [0.0, torch.tensor(0.0)])
def test_a_step_without_a_closure_that_creates_state(base, lr):
    """As ``torch.distributed.checkpoint`` takes it: all rates and gradients 0, no step before."""
    model, loss_fn = model_and_data()
    optimizer = fastsam.VaSSO(model.parameters(), base, lr=lr)
    before = bits(model)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    assert optimizer.step(closure=None) is None
    assert same(bits(model), before)
    for p in model.parameters():
        assert "ascent_ema" in optimizer.state[p] and all(
            torch.equal(x, torch.zeros_like(x))
            for name, x in optimizer.state[p].items()
            if name not in ("ascent_ema", "step", "mu_product")
        )
    if optimizer.state[next(model.parameters())].keys() != {"ascent_ema"}:
        with pytest.raises(RuntimeError, match="needs a closure"):
            optimizer.step(None)  # there is state
    optimizer.param_groups[0]["lr"] = 0.1
    with pytest.raises(RuntimeError, match="needs a closure"):
        optimizer.step(None)


# --- a step inside a closure ----------------------------------------------------------------------

CALLS = {
    "step": lambda o: o.step(lambda: None),
    "step_micro_batches": lambda o: o.step_micro_batches([lambda: None]),
    "first_step": lambda o: o.first_step(),
    "second_step": lambda o: o.second_step(),
    "plain_step": lambda o: o.plain_step(),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("call", [1, 2])
@pytest.mark.parametrize("explicit", [False, True])
def test_recursion(name, call, explicit):
    """It is refused, the whole step undone if the error leaves the closure, and all is well."""
    model, loss_fn, optimizer = make()
    twin, twin_fn, other = make()
    for f, o in ((loss_fn, optimizer), (twin_fn, other)):
        o.step(closure_of(f))
    before, state, calls = bits(model), copy.deepcopy(optimizer.state_dict()), []

    def closure():
        calls.append(1)
        loss = closure_of(loss_fn)()
        if len(calls) == call:
            with pytest.raises(RuntimeError, match=f"^{name} cannot be called from inside"):
                CALLS[name](optimizer)
            if explicit:
                CALLS[name](optimizer)
        return loss

    if explicit:
        with pytest.raises(RuntimeError, match="from inside a closure"):
            optimizer.step(closure)
        assert same(bits(model), before) and str(optimizer.state_dict()) == str(state)
        optimizer.step(closure_of(loss_fn))
    else:  # caught inside: the step goes on
        optimizer.step(closure)
    other.step(closure_of(twin_fn))
    assert same(bits(model), bits(twin))


def test_other_optimizers_may_step_inside():
    """Only the optimizer's own steps are refused."""
    model, loss_fn, optimizer = make()
    inner, inner_fn, other = make()

    def closure():
        other.step(closure_of(inner_fn))
        return closure_of(loss_fn)()

    optimizer.step(closure)
    assert other.state and optimizer.state


# --- no gradients, and calls out of order ---------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cls", [fastsam.SAM, fastsam.VaSSO, fastsam.SAMAR])
def test_closure_without_gradients(cls, backend):
    """Said once; nothing moves, momentum and weight decay included."""
    model, loss_fn, optimizer = make(cls, backend=backend, weight_decay=0.1)
    optimizer.step(closure_of(loss_fn))
    before, state = bits(model), copy.deepcopy(optimizer.state_dict())
    with pytest.warns(UserWarning, match=NO_GRADIENT):
        loss = optimizer.step(loss_fn)  # backward is forgotten
    assert torch.equal(loss, loss_fn())
    optimizer.step(loss_fn)
    assert same(bits(model), before)
    assert str(optimizer.state_dict()["state"]) == str(state["state"])
    optimizer.step(closure_of(loss_fn))
    assert not same(bits(model), before)


@pytest.mark.parametrize("explicit", [False, True])
def test_a_second_pass_without_gradients(explicit):
    """Said once; the step changes nothing, and warnings of other misuse still come."""
    model, loss_fn, optimizer = make()
    before, calls = bits(model), []

    def closure():
        loss = loss_fn()
        if len(calls) % 2 == 0:
            loss.backward()
        calls.append(1)
        return loss

    def step():
        if not explicit:
            return optimizer.step(closure)
        loss_fn().backward()
        optimizer.first_step(zero_grad=True)
        optimizer.second_step()

    with pytest.warns(UserWarning, match="the second pass left no gradients") as seen:
        step()
    assert len(seen) == 1 and seen[0].filename == __file__
    step()
    assert same(bits(model), before)
    with pytest.warns(UserWarning, match=NO_GRADIENT):
        optimizer.step(loss_fn)


@pytest.mark.parametrize("name", ["ascent_context", "descent_context"])
@pytest.mark.parametrize("wrong", [torch.no_grad(), nullcontext(), "x", 0])
def test_what_is_no_function_that_gives_a_context(wrong, name):
    message = rf"{name} must be None or a function that gives a context manager .*, got "
    with pytest.raises(TypeError, match=message):
        make(**{name: wrong})
    model, loss_fn, optimizer = make()
    before = bits(model)
    with pytest.raises(TypeError, match=message):
        setattr(optimizer, name, wrong)
    setattr(optimizer, name, lambda: wrong)  # not known before it is called
    if not hasattr(wrong, "__enter__"):
        with pytest.raises((TypeError, AttributeError)):
            optimizer.step(closure_of(loss_fn))
        assert same(bits(model), before)

    def own():
        raise TypeError("of the function's own")

    setattr(optimizer, name, own)
    with pytest.raises(TypeError, match="of the function's own"):
        optimizer.step(closure_of(loss_fn))
    setattr(optimizer, name, None)
    optimizer.step(closure_of(loss_fn))
    assert not same(bits(model), before)


@pytest.mark.parametrize(
    ("name", "value"), [("perturb_every", 0), ("start", -1), ("stop", 0), ("max_grad_norm", 0.0)]
)
def test_attributes_out_of_range(name, value):
    """They stay as they are."""
    _, loss_fn, optimizer = make()
    before = getattr(optimizer, name)
    with pytest.raises(ValueError, match=f"{name} must be .*, got {value}"):
        setattr(optimizer, name, value)
    assert getattr(optimizer, name) == before
    optimizer.step(closure_of(loss_fn))


def test_settings_that_exclude_each_other():
    """In any order of setting them; a step says so, before anything changes."""
    model, loss_fn, optimizer = make(start=2, stop=5)
    before = bits(model)
    optimizer.start = 9
    loss_fn().backward()
    closure = closure_of(loss_fn)
    for call in (
        lambda: optimizer.step(closure),
        lambda: optimizer.step_micro_batches([closure]),
        optimizer.first_step,
        optimizer.plain_step,
    ):
        with pytest.raises(ValueError, match="stop must be .* above start=9, got 5"):
            call()
    assert same(bits(model), before)
    optimizer.stop = 10
    optimizer.zero_grad()
    optimizer.step(closure)


def test_groups_out_of_range_in_a_step_of_the_base():
    model, loss_fn, optimizer = make()
    loss_fn().backward()
    optimizer.param_groups[0]["rho"] = -1.0
    with pytest.raises(ValueError, match="rho must be"):
        optimizer.plain_step()


def test_order_of_the_passes():
    """Each refusal leaves everything as it was, so that the pass that is due can come."""
    model, loss_fn, optimizer = make()
    for f in (optimizer.second_step, lambda: optimizer.second_step(zero_grad=True)):
        with pytest.raises(RuntimeError, match="expected first_step, .* another second_step"):
            f()
    state = copy.deepcopy(optimizer.state_dict())
    loss_fn().backward()
    optimizer.first_step()
    perturbed, grads = bits(model), [p.grad.clone() for p in model.parameters()]
    for name, call in {
        "first_step": optimizer.first_step,
        "plain_step": optimizer.plain_step,
        "step": lambda: optimizer.step(closure_of(loss_fn)),
        "step_micro_batches": lambda: optimizer.step_micro_batches([closure_of(loss_fn)]),
    }.items():
        with pytest.raises(RuntimeError, match=f"expected second_step, .* another {name}:"):
            call()
    with pytest.raises(RuntimeError, match="load_state_dict cannot come between passes"):
        optimizer.load_state_dict(state)
    assert same(bits(model), perturbed)
    assert same([p.grad for p in model.parameters()], grads)
    optimizer.zero_grad()
    loss_fn().backward()
    optimizer.second_step()
    twin, twin_fn, other = make()
    other.step(closure_of(twin_fn))
    assert same(bits(model), bits(twin))
