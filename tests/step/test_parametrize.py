"""``torch.nn.utils.parametrize.cached`` around a step: every pass sees the weights of its own."""

from contextlib import nullcontext

import pytest
import torch
from torch.nn.utils import parametrize

import fastsam

from networks import bits, closure_of, same
from registry import BACKENDS, DEVICE

SGD = {"base_optimizer": torch.optim.SGD, "lr": 0.1, "momentum": 0.9, "rho": 0.5}


class Symmetric(torch.nn.Module):
    """Saves nothing for backward, which would have autograd find out."""

    def forward(self, x):
        return x.triu() + x.triu(1).mT


def network():
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 4, bias=False, device=DEVICE)
    parametrize.register_parametrization(model, "weight", Symmetric())
    x = torch.randn(8, 4, device=DEVICE)
    return model, lambda: model(x).square().mean()


def by_closure(optimizer, loss_fn):
    optimizer.step(closure_of(loss_fn))


def by_halves(optimizer, loss_fn):
    for half in (optimizer.first_step, optimizer.second_step):
        loss_fn().backward()
        half(zero_grad=True)


def by_micro_batches(optimizer, loss_fn):
    optimizer.step_micro_batches([closure_of(loss_fn)] * 2)


def undone(optimizer, loss_fn):
    loss_fn().backward()
    optimizer.first_step(zero_grad=True)
    loss_fn()
    optimizer.restore()
    by_closure(optimizer, loss_fn)


def by_the_base(optimizer, loss_fn):
    loss_fn().backward()
    optimizer.plain_step(zero_grad=True)


def learned(optimizer, loss_fn):
    fastsam.LETS(optimizer).step(closure_of(loss_fn), closure_of(loss_fn))


def measured(optimizer, loss_fn):
    rise = fastsam.sharpness(optimizer.param_groups[0]["params"], loss_fn, rho=0.5)
    assert rise > 1e-3
    by_closure(optimizer, loss_fn)


WAYS = [by_closure, by_halves, by_micro_batches, undone, by_the_base, learned, measured]


@pytest.mark.parametrize(
    ("take", "backend"), [(take, "torch") for take in WAYS] + [(by_closure, b) for b in BACKENDS]
)
def test_cached(take, backend):
    results = []
    for cached in (parametrize.cached, nullcontext):
        model, loss_fn = network()
        optimizer = fastsam.SAM(model.parameters(), backend=backend, **SGD)
        losses = []
        for _ in range(2):
            with cached():
                for _ in range(2):
                    take(optimizer, loss_fn)
                losses.append(loss_fn().detach())
        results.append(bits(model) + losses)
    assert same(*results)


def test_what_is_cached_stays_where_nothing_moves():
    model, loss_fn = network()
    with parametrize.cached():
        weight = model.weight
        fastsam.SAM(model.parameters(), **SGD)
        assert model.weight is weight
