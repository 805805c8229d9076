"""Several optimizers whose steps overlap: refused where they share parameters, else independent."""

import gc

import pytest
import torch

import fastsam

from networks import bits, closure_of, model_and_data, same
from registry import BACKENDS

SGD = {"base_optimizer": torch.optim.SGD, "lr": 0.1, "momentum": 0.9}
REFUSED = "{} cannot step parameters between first_step and second_step of another .*SAM\\)"


def two(backend="torch"):
    model, loss_fn = model_and_data()
    first = fastsam.SAM(model.parameters(), backend=backend, **SGD)
    second = fastsam.ASAM(model[2].parameters(), backend=backend, **SGD)
    return model, loss_fn, first, second


def half(optimizer, loss_fn):
    loss_fn().backward()
    optimizer.first_step(zero_grad=True)


def by_halves(optimizer, loss_fn):
    half(optimizer, loss_fn)


def by_closure(optimizer, loss_fn):
    optimizer.step(closure_of(loss_fn))


def by_micro_batches(optimizer, loss_fn):
    optimizer.step_micro_batches([closure_of(loss_fn)] * 2)


def by_the_base(optimizer, loss_fn):
    loss_fn().backward()
    optimizer.plain_step()


def learned(optimizer, loss_fn):
    fastsam.LETS(optimizer).step(closure_of(loss_fn), closure_of(loss_fn))


@pytest.mark.parametrize(
    ("take", "backend"),
    [(take, "torch") for take in (by_closure, by_micro_batches, by_the_base, learned)]
    + [(by_halves, backend) for backend in BACKENDS],
)
def test_same_parameters(take, backend):
    """Neither step is lost: the second optimizer refuses, and the first goes on as if alone."""
    model, loss_fn, first, second = two(backend)
    half(first, loss_fn)
    perturbed = bits(model)
    with pytest.raises(RuntimeError, match=REFUSED.format("ASAM")):
        take(second, loss_fn)
    assert same(bits(model), perturbed) and not second.between_passes and not second.state
    second.zero_grad()
    first.zero_grad()
    loss_fn().backward()
    first.second_step()
    alone, alone_loss = model_and_data()
    other = fastsam.SAM(alone.parameters(), backend=backend, **SGD)
    half(other, alone_loss)
    alone_loss().backward()
    other.second_step()
    assert same(bits(model), bits(alone))
    by_closure(second, loss_fn)


def test_the_one_that_is_inside():
    """In a closure's second call another optimizer of the same parameters is between the passes."""
    model, loss_fn, first, second = two()
    before, calls = bits(model), []

    def closure():
        calls.append(1)
        if len(calls) == 2:
            by_closure(second, loss_fn)
        loss_fn().backward()

    with pytest.raises(RuntimeError, match=REFUSED.format("ASAM")):
        first.step(closure)
    assert len(calls) == 2 and same(bits(model), before)
    by_closure(second, loss_fn)


def test_a_gradient_that_comes_in_the_second_pass():
    """Of a parameter that the other has perturbed: the second half would move it."""
    model, loss_fn, first, second = two()
    half(second, loss_fn)
    model.zero_grad()
    loss_fn().backward()
    model[2].weight.grad = model[2].bias.grad = None
    first.first_step(zero_grad=True)  # of the other layer alone
    loss_fn().backward()
    with pytest.raises(RuntimeError, match=REFUSED.format("SAM")):
        first.second_step()
    assert not first.between_passes and second.between_passes
    second.second_step()


@pytest.mark.parametrize("order", ["nested", "interleaved"])
def test_different_parameters(order):
    """As of a generator and a discriminator: each step is what it is alone."""
    results = []
    for overlap in (True, False):
        model, loss_fn = model_and_data()
        before = bits(model)
        one = fastsam.SAM(model[0].parameters(), **SGD)
        other = fastsam.VaSSO(model[2].parameters(), **SGD)
        gradients = {}
        for name, optimizer in (
            ("one", one),
            ("other", other),
        ):  # of passes that do not see another
            optimizer.zero_grad()
            loss_fn().backward()
            gradients[name] = [p.grad.clone() for p in optimizer.param_groups[0]["params"]]

        def take(optimizer, name, call, gradients=gradients):
            for p, g in zip(optimizer.param_groups[0]["params"], gradients[name], strict=True):
                p.grad = g.clone()
            getattr(optimizer, call)()

        calls = {
            "nested": [(one, 1), (other, 1), (other, 2), (one, 2)],
            "interleaved": [(one, 1), (other, 1), (one, 2), (other, 2)],
        }[order]
        if not overlap:
            calls = [(one, 1), (one, 2), (other, 1), (other, 2)]
        for optimizer, number in calls:
            name = "one" if optimizer is one else "other"
            take(optimizer, name, ("first_step", "second_step")[number - 1])
        assert not same(bits(model), before)
        results.append(bits(model))
    assert same(*results)


@pytest.mark.parametrize("how", ["restored", "failed", "dropped"])
def test_a_step_that_is_over(how):
    """However it ended, its parameters are free."""
    model, loss_fn, first, second = two()
    half(first, loss_fn)
    if how == "restored":
        first.restore()
    elif how == "failed":
        model[0].weight.grad = torch.eye(33, 7).to_sparse()
        with pytest.raises(RuntimeError, match="sparse"):
            first.second_step()
        model.zero_grad()
    else:
        del first
        gc.collect()
    by_closure(second, loss_fn)
