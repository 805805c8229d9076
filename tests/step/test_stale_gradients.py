"""Second passes that find gradients of the first, and correct loops that are not taken for it."""

import warnings
import weakref

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

import fastsam
from fastsam.step import flight

from networks import bits, model_and_data, same
from registry import BACKENDS, DEVICE

SGD = {"base_optimizer": torch.optim.SGD, "lr": 0.1, "momentum": 0.9}
STALE = "second_step\\(\\) seems to find gradients that are still those of the first pass"
ADDED = "gradients that are the sum of its own and those of the first pass"


def make(**kwargs):
    model, loss_fn = model_and_data()
    return model, loss_fn, fastsam.SAM(model.parameters(), **SGD | kwargs)


@pytest.fixture(autouse=True)
def strict():
    """Every warning is an error here, those that the suite ignores as well."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_the_first_pass(backend):
    """They were not taken at the perturbed weights: said once, and the weights are restored."""
    model, loss_fn, optimizer = make(backend=backend)
    before = bits(model)
    loss_fn().backward()
    expected = [w - 0.1 * p.grad for w, p in zip(before, model.parameters(), strict=True)]
    optimizer.first_step()
    with pytest.warns(UserWarning, match=STALE):
        optimizer.second_step(zero_grad=True)
    for p, w in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p, w, rtol=1e-6, atol=1e-7)
    loss_fn().backward()
    optimizer.first_step()
    optimizer.second_step()  # once


@pytest.mark.parametrize("zero_grad", [False, True])
def test_gradients_that_were_added_up(zero_grad):
    model, loss_fn, optimizer = make()
    loss_fn().backward()
    optimizer.first_step(zero_grad=zero_grad)
    loss_fn().backward()
    if zero_grad:
        optimizer.second_step()
        return
    with pytest.warns(UserWarning, match=ADDED):
        optimizer.second_step(zero_grad=True)
    loss_fn().backward()
    optimizer.first_step()
    loss_fn().backward()
    optimizer.second_step()  # once


@pytest.mark.parametrize("misuse", ["still those", "the sum", "no gradient"])
def test_warnings_point_at_the_users_line(misuse):
    model, loss_fn, optimizer = make()
    with pytest.warns(UserWarning) as caught:
        if misuse == "no gradient":
            optimizer.step(loss_fn)
        else:
            loss_fn().backward()
            optimizer.first_step()
            if misuse == "the sum":
                loss_fn().backward()
            optimizer.second_step()
    assert [warning.filename for warning in caught] == [__file__]


def zero_grad_of_the_optimizer(model, optimizer):
    optimizer.zero_grad()


def zero_grad_in_place(model, optimizer):
    optimizer.zero_grad(set_to_none=False)


def zero_grad_of_the_model(model, optimizer):
    model.zero_grad(set_to_none=False)


def zeroed_by_hand(model, optimizer):
    with torch.no_grad():
        for p in model.parameters():
            p.grad.zero_()


def zeroed_unseen(model, optimizer):
    for p in model.parameters():
        p.grad.data.zero_()  # does not count as a write to the gradient


@pytest.mark.parametrize("clear", [zero_grad_of_the_optimizer, zero_grad_in_place, zeroed_by_hand,
                                   zero_grad_of_the_model])  # fmt: skip
@pytest.mark.parametrize("parts", [1, 2, 3])
def test_correct_loops_are_not_warned_of(clear, parts):
    """Whatever zeroes the gradients, in whatever way; and with micro-batches in each pass."""
    results = []
    for way in (clear, zero_grad_of_the_optimizer):
        model, loss_fn, optimizer = make()
        for _ in range(3):
            way(model, optimizer) if model[0].weight.grad is not None else None
            for _ in range(parts):
                (loss_fn() / parts).backward()
            optimizer.first_step()
            way(model, optimizer)
            for _ in range(parts):
                (loss_fn() / parts).backward()
            optimizer.second_step()
        results.append(bits(model))
    # zeros added to a gradient change at most the sign of a zero
    assert same(*results)


def test_a_single_write_looks_like_an_accumulation():
    """The price of the warning: it comes once, and the step is right."""
    with pytest.warns(UserWarning, match="seems to find gradients that are the sum"):
        test_correct_loops_are_not_warned_of(zeroed_unseen, parts=1)


@pytest.mark.parametrize("how", ["new tensors", "replaced for one end"])
def test_gradients_set_anew_are_not_warned_of(how):
    model, loss_fn, optimizer = make()
    for _ in range(2):
        optimizer.zero_grad()
        loss_fn().backward()
        optimizer.first_step()
        params = list(model.parameters())
        grads = torch.autograd.grad(loss_fn(), params)
        for p, g in zip(params, grads, strict=True):
            if how == "new tensors" or (how == "replaced for one end" and p is params[0]):
                p.grad = g
            else:
                p.grad.copy_(g)
        optimizer.second_step()


def test_clipping_and_unused_ends_are_not_warned_of():
    """A loop that scales gradients in place; and one whose ends have no part in a pass."""
    model, loss_fn, optimizer = make()
    for half in (optimizer.first_step, optimizer.second_step):
        loss_fn().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        half(zero_grad=True)
    loss_fn().backward()
    optimizer.first_step()
    model[0].weight.grad = model[2].bias.grad = None
    model[0].bias.grad.zero_()
    optimizer.second_step()


def test_gradients_in_buckets_are_not_warned_of():
    """As DistributedDataParallel keeps them: views of memory that every backward fills again."""
    model, loss_fn, optimizer = make()
    params = list(model.parameters())
    bucket = torch.zeros(sum(p.numel() for p in params), device=DEVICE)

    def backward():
        grads, start = torch.autograd.grad(loss_fn(), params), 0
        for p, g in zip(params, grads, strict=True):
            bucket[start : start + p.numel()].copy_(g.reshape(-1))
            p.grad = bucket[start : start + p.numel()].view_as(p)
            start += p.numel()

    for _ in range(2):
        for half in (optimizer.first_step, optimizer.second_step):
            backward()
            half()


@pytest.mark.parametrize("how", ["new memory", "the same memory"])
def test_an_id_that_is_used_again_is_not_warned_of(how, monkeypatch):
    """New gradients in the place of the first: their ids may be those of tensors that are gone."""
    monkeypatch.setattr(flight, "id", lambda x: 0, raising=False)
    model, loss_fn, optimizer = make()
    params = list(model.parameters())
    sizes = [p.numel() for p in params]
    flat = torch.zeros(sum(sizes), device=DEVICE)
    for half in (optimizer.first_step, optimizer.second_step):
        grads = torch.autograd.grad(loss_fn(), params)
        if how == "the same memory":
            flat.copy_(torch.cat([g.reshape(-1) for g in grads]))
            grads = [x.view_as(p) for p, x in zip(params, flat.split(sizes), strict=True)]
        for p, g in zip(params, grads, strict=True):
            p.grad = g
        half()


def test_gradients_are_not_held():
    """What the first pass has left is gone when the loop has dropped it."""
    model, loss_fn, optimizer = make()
    loss_fn().backward()
    optimizer.first_step()
    memory = [StorageWeakRef(p.grad.untyped_storage()) for p in model.parameters()]
    tensors = [weakref.ref(p.grad) for p in model.parameters()]
    optimizer.zero_grad()
    assert all(one.expired() for one in memory) and not any(one() is not None for one in tensors)
    optimizer.restore()


def test_a_step_by_closure_is_never_warned_of():
    """It zeroes the gradients itself, so the same ones come from the same function alone."""
    param = torch.nn.Parameter(torch.ones(3, device=DEVICE))
    grad = torch.ones_like(param)
    optimizer = fastsam.SAM([param], **SGD)

    def closure():
        param.grad = grad

    for _ in range(2):
        optimizer.step(closure)
