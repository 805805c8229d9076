"""Loops that call ``backward`` before ``step(closure)``, and loops that only seem to."""

import warnings

import pytest
import torch

import fastsam

from networks import bits, closure_of, model_and_data, same
from registry import BACKENDS, DEVICE

SGD = {"base_optimizer": torch.optim.SGD, "lr": 0.1, "momentum": 0.9}
TWICE = "step\\(\\) found gradients that the closure computed again"
CUT_OFF = "gradients were parts of a larger tensor when step\\(\\) was called"


@pytest.fixture(autouse=True)
def strict():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


def until_looked_at(optimizer, closure):
    """Steps, of which the second finds what a GPU has computed after the first."""
    optimizer.step(closure)
    if DEVICE != "cpu":
        torch.cuda.synchronize()
    optimizer.zero_grad()
    optimizer.step(closure)


@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_before_the_step(backend):
    """The old recipe: the weights are right, and what is superfluous is said once."""
    results = []
    for before in (True, False):
        model, loss_fn = model_and_data()
        optimizer = fastsam.SAM(model.parameters(), backend=backend, **SGD)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(3):
                optimizer.zero_grad()
                if before:
                    loss_fn().backward()
                optimizer.step(closure_of(loss_fn))
                if DEVICE != "cpu":
                    torch.cuda.synchronize()
        # Triton's interpreter may warn of what numpy deprecates
        ours = [w for w in caught if w.category is UserWarning]
        assert [w.filename for w in ours] == [__file__] * before
        results.append(bits(model))
    assert same(*results)
    with pytest.warns(UserWarning, match=TWICE):
        loss_fn().backward()
        optimizer = fastsam.SAM(model.parameters(), **SGD)
        optimizer.zero_grad()
        loss_fn().backward()
        until_looked_at(optimizer, closure_of(loss_fn))


def test_learned_radius():
    model, loss_fn = model_and_data()
    optimizer = fastsam.LETS(fastsam.SAM(model.parameters(), **SGD))
    loss_fn().backward()
    with pytest.warns(UserWarning, match=TWICE):
        optimizer.step(closure_of(loss_fn), closure_of(loss_fn))
        if DEVICE != "cpu":
            torch.cuda.synchronize()
        optimizer.step(closure_of(loss_fn), closure_of(loss_fn))


def other_batch(model, loss_fn, optimizer):
    """Gradients of another loss, as a generator's backward leaves them in the discriminator."""
    model(torch.randn(5, 7, device=DEVICE)).square().sum().backward()


def zeros(model, loss_fn, optimizer):
    loss_fn().backward()
    optimizer.zero_grad(set_to_none=False)


def earlier_training(model, loss_fn, optimizer):
    plain = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        plain.step(closure_of(loss_fn))


def halves(model, loss_fn, optimizer):
    for half in (optimizer.first_step, optimizer.second_step):
        optimizer.zero_grad()
        loss_fn().backward()
        half()


def failed_closure(model, loss_fn, optimizer):
    """The batch is tried again after a failure."""

    def closure():
        loss_fn().backward()
        raise MemoryError

    with pytest.raises(MemoryError):
        optimizer.step(closure)


def failed_after_a_look(model, loss_fn, optimizer):
    other_batch(model, loss_fn, optimizer)
    failed_closure(model, loss_fn, optimizer)


@pytest.mark.parametrize(
    "before",
    [other_batch, zeros, earlier_training, halves, failed_closure, failed_after_a_look],
)
def test_other_gradients_are_not_warned_of(before):
    model, loss_fn = model_and_data()
    optimizer = fastsam.SAM(model.parameters(), **SGD)
    before(model, loss_fn, optimizer)
    until_looked_at(optimizer, closure_of(loss_fn))


def test_gradients_of_zero():
    """They are the same in every pass, and nobody's mistake."""
    param = torch.nn.Parameter(torch.ones(3, device=DEVICE))
    optimizer = fastsam.SAM([param], **SGD)
    (0 * param).sum().backward()
    until_looked_at(optimizer, closure_of(lambda: (0 * param).sum()))


def test_gradients_that_do_not_depend_on_the_weights():
    """They are the same in every pass, whichever was first."""
    param = torch.nn.Parameter(torch.ones(3, device=DEVICE))
    param.grad = torch.ones_like(param)
    until_looked_at(fastsam.SAM([param], **SGD), closure_of(lambda: param.sum()))


def test_the_closures_own_zeroing():
    model, loss_fn = model_and_data()
    optimizer = fastsam.SAM(model.parameters(), **SGD)

    def closure():
        optimizer.zero_grad()
        loss = loss_fn()
        loss.backward()
        return loss

    for _ in range(3):
        until_looked_at(optimizer, closure)


@pytest.mark.parametrize("kept", [True, False])
def test_buffers_that_are_cut_off(kept):
    """Said once where a step takes gradients out of the buffer that they were in."""
    model, loss_fn = model_and_data()
    params = list(model.parameters())
    flat = torch.zeros(sum(p.numel() for p in params), device=DEVICE)
    for p, part in zip(params, flat.split([p.numel() for p in params]), strict=True):
        p.grad = part.view_as(p)
    optimizer = fastsam.SAM(params, set_to_none=not kept, **SGD)
    if not kept:
        with pytest.warns(UserWarning, match=CUT_OFF):
            optimizer.step(closure_of(loss_fn))
        assert flat.count_nonzero() == 0
    optimizer.step(closure_of(loss_fn))
    assert bool(flat.count_nonzero()) == kept
