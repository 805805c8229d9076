"""Contexts that ``step`` enters around its two calls of the closure."""

import contextlib
import copy

import pytest
import torch

import fastsam

from networks import bits, closure_of, loss_of, model_and_data, same
from registry import BACKENDS, DEVICE, create

SGD = {"base_optimizer": torch.optim.SGD, "lr": 0.1, "momentum": 0.9}


class Noted(contextlib.AbstractContextManager):
    """Puts down when it is entered and left; fails on demand."""

    def __init__(self, name, log, fails=""):
        self.name, self.log, self.fails = name, log, fails

    def __enter__(self):
        self.log.append(f"+{self.name}")
        if self.fails == "enter":
            raise ValueError("enter")

    def __exit__(self, kind, *_):
        self.log.append(f"-{self.name}{' ' + kind.__name__ if kind else ''}")
        if self.fails == "exit" and kind is None:
            raise ValueError("exit")


def make(log=None, **kwargs):
    model, loss_fn = model_and_data()
    log = [] if log is None else log
    contexts = {f"{name}_context": lambda name=name: Noted(name, log)
                for name in ("ascent", "descent")}  # fmt: skip
    return model, loss_fn, fastsam.SAM(model.parameters(), **SGD | contexts | kwargs)


def noting(log, loss_fn):
    def closure():
        log.append("forward")
        loss = loss_fn()
        loss.register_hook(lambda g: log.append("backward"))
        loss.backward()
        return loss

    return closure


WORK = ["forward", "backward"]


def test_order():
    """Each is entered once, around forward and backward of its pass and nothing else."""
    log: list = []
    model, loss_fn, optimizer = make(log, perturb_every=2)
    ascend = optimizer.first_step
    optimizer.first_step = lambda **kwargs: (log.append("perturb"), ascend(**kwargs))[1]
    closure = noting(log, loss_fn)
    optimizer.step(closure)
    assert log == ["+ascent", *WORK, "-ascent", "perturb", "+descent", *WORK, "-descent"]
    log.clear()
    optimizer.step(closure)  # of the base alone: neither pass of a sharpness-aware step
    assert log == WORK
    log.clear()
    optimizer.perturb_every = 1
    optimizer.step_micro_batches([closure, closure])
    assert log == ["+ascent", *WORK, "-ascent", "perturb", "+descent", *WORK, "-descent"] * 2


def test_modes_that_contexts_set():
    """Gradients are enabled inside them, and their own modes hold in both directions."""
    seen = []

    def autocast():
        return torch.autocast(DEVICE, dtype=torch.bfloat16)

    model, loss_fn, optimizer = make(ascent_context=torch.no_grad, descent_context=autocast)

    def closure():
        seen.append((torch.is_grad_enabled(), torch.is_autocast_enabled(DEVICE)))
        with torch.enable_grad():
            closure_of(loss_fn)()

    optimizer.step(closure)
    assert [autocasts for _, autocasts in seen] == [False, True]
    assert seen[1][0] and not torch.is_autocast_enabled(DEVICE)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("fails", ["enter", "exit"])
@pytest.mark.parametrize("which", ["ascent", "descent"])
@pytest.mark.parametrize("micro_batches", [False, True])
def test_failing_contexts_undo_the_step(which, fails, micro_batches, backend):
    log: list = []
    model, loss_fn, optimizer = make(log, backend=backend)
    closure = closure_of(loss_fn)
    optimizer.step(closure)
    before, state = bits(model), copy.deepcopy(optimizer.state_dict())
    context = f"{which}_context"
    good = getattr(optimizer, context)
    setattr(optimizer, context, lambda: Noted(which, log, fails))
    with pytest.raises(ValueError, match=fails):
        if micro_batches:
            optimizer.step_micro_batches([closure, closure])
        else:
            optimizer.step(closure)
    assert same(bits(model), before)
    assert str(optimizer.state_dict()) == str(state)
    setattr(optimizer, context, good)
    optimizer.step(closure)
    twin, twin_fn, other = make(backend=backend)
    for _ in range(2):
        other.step(closure_of(twin_fn))
    assert same(bits(model), bits(twin))


def test_exceptions_reach_the_context():
    log: list = []
    model, loss_fn, optimizer = make(log)
    calls = []

    def failing():
        calls.append(1)
        loss_fn().backward()
        if len(calls) == 2:
            raise KeyError("no")

    with pytest.raises(KeyError):
        optimizer.step(failing)
    assert log == ["+ascent", "-ascent", "+descent", "-descent KeyError"]

    @contextlib.contextmanager
    def swallowing():  # its pass has no result: the gradients that are there count
        with contextlib.suppress(KeyError):
            yield

    optimizer.descent_context = swallowing
    calls.clear()
    before = bits(model)
    assert optimizer.step(failing) is None
    assert not same(bits(model), before)


def test_attributes_change_between_steps_and_copies_keep_them():
    log: list = []
    model, loss_fn, optimizer = make(log)
    other, twin = copy.deepcopy((optimizer, model))
    optimizer.ascent_context = None
    optimizer.descent_context = lambda: Noted("other", log)
    optimizer.step(closure_of(loss_fn))
    assert log == ["+other", "-other"]
    log.clear()
    other.step(closure_of(loss_of(twin)))
    assert log == ["+ascent", "-ascent", "+descent", "-descent"]
    assert "context" not in str(optimizer.state_dict())


@pytest.mark.parametrize("method", ["unified-1/t", "vasso", "samar", "lightsam-3", "adasam"])
def test_every_class_takes_them(method):
    log: list = []
    model, loss_fn = model_and_data()
    optimizer = create(method, model.parameters(), "torch",
                       ascent_context=lambda: Noted("a", log))  # fmt: skip
    optimizer.step(closure_of(loss_fn))
    assert log == ["+a", "-a"]


class LeavesAutogradOn(contextlib.AbstractContextManager):
    def __exit__(self, *_):
        torch.set_grad_enabled(True)


def decides(t, metrics):
    torch.set_grad_enabled(True)
    return True


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "where",
    [{"ascent_context": LeavesAutogradOn}, {"descent_context": LeavesAutogradOn},
     {"perturb_when": decides}],
    ids=lambda where: next(iter(where)),
)  # fmt: skip
def test_code_that_switches_autograd_on_inside_a_step_changes_nothing(where, backend):
    results = []
    for kwargs in ({}, where):
        model, loss_fn = model_and_data()
        optimizer = fastsam.SAM(model.parameters(), backend=backend, **SGD, **kwargs)
        for _ in range(2):
            optimizer.step(closure_of(loss_fn))
        assert torch.is_grad_enabled()
        results.append(bits(model))
    assert same(*results)
