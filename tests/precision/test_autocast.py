"""Autocast keeps casts of the weights until its outermost region ends: also where a step is inside.

The second pass would then run at the first one's weights, and sharpness-aware minimization would
be the base optimizer. Each test compares with a region around each forward pass alone.
"""

from contextlib import nullcontext

import pytest
import torch

import fastsam

from networks import bits, closure_of, model_and_data, same
from registry import BACKENDS, DEVICE

SGD = {"base_optimizer": torch.optim.SGD, "lr": 0.1, "rho": 2.0}


def autocast():
    return torch.autocast(DEVICE, torch.bfloat16)


def run(kind, where, backend):
    """The losses that each call of the closure gave, and the weights after two steps."""
    model, loss_fn = model_and_data()
    optimizer = fastsam.SAM(model.parameters(), backend=backend, **SGD)
    inside, around = (autocast, nullcontext) if where == "inside" else (nullcontext, autocast)
    losses = []

    def forward():
        with inside():
            losses.append(loss_fn())
        return losses[-1]

    with around():
        for _ in range(2):
            if kind == "closure":
                optimizer.step(closure_of(forward))
            elif kind == "micro-batches":
                optimizer.step_micro_batches([closure_of(forward)] * 2)
            else:
                forward().backward()
                optimizer.first_step(zero_grad=True)
                forward().backward()
                optimizer.second_step(zero_grad=True)
    return torch.stack(losses).detach(), bits(model)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["closure", "explicit", "micro-batches"])
def test_a_region_around_the_step(kind, backend):
    (inside, weights), (outside, others) = (run(kind, w, backend) for w in ("inside", "outside"))
    assert torch.equal(inside, outside) and same(weights, others)
    assert inside[1] > inside[0] + 0.1  # a radius of 2 is seen


def test_an_undone_step():
    """After ``restore`` the casts are of the restored weights."""
    model, loss_fn = model_and_data()
    optimizer = fastsam.SAM(model.parameters(), **SGD)
    with autocast():
        first = loss_fn()
        first.backward()
        optimizer.first_step()
        assert loss_fn() > first + 0.1
        optimizer.restore()
        assert loss_fn() == first


def test_flatness():
    model, loss_fn = model_and_data()

    def forward():
        with autocast():
            return loss_fn()

    expected = fastsam.sharpness(model, forward, rho=2.0)
    slice_ = fastsam.loss_landscape(model, forward, directions="gradient", points=5)
    drawn = fastsam.loss_landscape(model, forward, points=4)  # which leaves out w itself
    with autocast():
        loss_fn()  # its casts are kept
        assert (fastsam.loss_landscape(model, loss_fn, points=4).losses == drawn.losses).all()
        assert fastsam.sharpness(model, loss_fn, rho=2.0) == expected > 0.1
        found = fastsam.loss_landscape(model, loss_fn, directions="gradient", points=5)
        assert (found.losses == slice_.losses).all() and found.losses.std() > 0.01
        with torch.no_grad():  # and the weights are as they were
            assert loss_fn() == forward()
