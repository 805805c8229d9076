"""ESAM's selection of samples, and which parameters take part in the perturbation."""

import copy

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

import fastsam

from networks import bits
from registry import BACKENDS, DEVICE, takes_part


@pytest.mark.parametrize(
    ("fraction", "count"), [(0.5, 5), (0.01, 1), (1.0, 9), (1 / 3, 3), (np.float32(0.5), 5)]
)
def test_those_that_rose_most(fraction, count):
    rng = np.random.default_rng(0)
    before, after = rng.standard_normal((2, 9))
    expected = sorted(np.argsort(before - after)[:count])
    losses = [torch.tensor(x, device=DEVICE, requires_grad=True) for x in (before, after)]
    found = fastsam.select_samples(*losses, fraction)
    assert found.tolist() == expected and not found.requires_grad


def test_a_step_by_hand():
    """The whole recipe, against plain torch."""
    torch.manual_seed(0)
    model, twin = (torch.nn.Linear(4, 3).to(DEVICE, torch.float64) for _ in range(2))
    twin.load_state_dict(model.state_dict())
    x = torch.randn(8, 4, device=DEVICE, dtype=torch.float64)
    y = torch.arange(8, device=DEVICE) % 3
    optimizer = fastsam.SAM(model.parameters(), torch.optim.SGD, lr=0.1, rho=0.5)
    before = cross_entropy(model(x), y, reduction="none")
    before.mean().backward()
    optimizer.first_step(zero_grad=True)
    with torch.no_grad():
        after = cross_entropy(model(x), y, reduction="none")
    chosen = fastsam.select_samples(before, after, 0.5)
    cross_entropy(model(x[chosen]), y[chosen]).backward()
    optimizer.second_step(zero_grad=True)

    start, params = bits(twin), list(twin.parameters())
    losses = cross_entropy(twin(x), y, reduction="none")
    grads = torch.autograd.grad(losses.mean(), params)
    n = torch.cat([g.flatten() for g in grads]).norm()
    with torch.no_grad():
        for p, g in zip(params, grads, strict=True):
            p += 0.5 * g / n
        rise = cross_entropy(twin(x), y, reduction="none") - losses
    four = sorted(range(8), key=lambda i: -float(rise[i]))[:4]
    second = torch.autograd.grad(cross_entropy(twin(x[four]), y[four]), params)
    assert chosen.tolist() == sorted(four)
    for p, w, g in zip(bits(model), start, second, strict=True):
        torch.testing.assert_close(p, w - 0.1 * g)


def test_a_loss_that_is_nan_is_not_hidden():
    after = torch.tensor([1.0, float("nan"), 2.0])
    assert fastsam.select_samples(torch.zeros(3), after, 0.3).tolist() == [1]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.ones(3), torch.ones(3), 0.0), ValueError, r"fraction must be .* got 0.0"),
        ((torch.ones(3), torch.ones(3), 1.5), ValueError, r"fraction must be .* got 1.5"),
        ((torch.ones(3), torch.ones(4), 0.5), ValueError, "as many losses as before, 3, got 4"),
        ((torch.ones(3, 1), torch.ones(3), 0.5), ValueError, r"before must hold .* shape \(3, 1\)"),
        ((torch.ones(3), torch.ones(()), 0.5), ValueError, r"after must hold .* shape \(\)"),
        ((torch.ones(0), torch.ones(0), 0.5), ValueError, r"before must hold .* shape \(0,\)"),
        (([1.0], torch.ones(1), 0.5), TypeError, r"before must be a tensor, got \[1.0\]"),
    ],
)
def test_bad_input(arguments, error, message):
    with pytest.raises(error, match=message):
        fastsam.select_samples(*arguments)


SGD = {"base_optimizer": torch.optim.SGD, "lr": 0.1}
COUNT = 12


def parameters():
    return [torch.nn.Parameter(torch.zeros(1 + k % 3, device=DEVICE)) for k in range(COUNT)]


def give(params, step):
    for k, param in enumerate(params):
        param.grad = torch.full_like(param, 1.0 + k % 5 + 0.1 * step)


def choices(optimizer, params, steps, first=0):
    """Which parameters each step perturbs; the weights are put back to 0."""
    found = []
    for step in range(first, first + steps):
        with torch.no_grad():
            for param in params:
                param.zero_()
        give(params, step)
        optimizer.first_step()
        found.append([bool((param != 0).any()) for param in params])
        give(params, step)
        optimizer.second_step()
    return found


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_parameter_takes_part_with_its_probability(backend):
    """As the hash says, in every step anew, and with as much length as if all did."""
    params, seed = parameters(), 7
    optimizer = fastsam.ESAM(params, **SGD, rho=0.3, beta=0.4, seed=seed, backend=backend)
    give(params, 0)
    optimizer.first_step()
    part = [k for k in range(COUNT) if takes_part(k, 0.4, 0, seed)]
    assert 0 < len(part) < COUNT
    n = sum(p.grad.square().sum() for k, p in enumerate(params) if k in part) ** 0.5
    assert optimizer.metrics["grad_norm"].item() == pytest.approx(n.item(), rel=1e-6)
    for k, param in enumerate(params):
        e = 0.3 / 0.4 * param.grad / n if k in part else torch.zeros_like(param)
        torch.testing.assert_close(param.detach(), e)
    optimizer.restore()
    assert all(not p.any() for p in params)
    steps = 3 if backend == "triton" else 12  # the interpreter takes its time
    found = choices(optimizer, params, steps)
    assert found == [[takes_part(k, 0.4, t, seed) for k in range(COUNT)] for t in range(steps)]


@pytest.mark.parametrize("beta", [0.1, 0.6])
def test_choices_are_as_frequent_as_they_should_be(beta):
    """And independent of each other: counts by parameter, step and seed vary as they should."""
    found = np.array([[[takes_part(k, beta, t, seed) for k in range(30)] for t in range(40)]
                      for seed in range(8)])  # fmt: skip
    deviation = (beta * (1 - beta)) ** 0.5
    assert found.mean() == pytest.approx(beta, abs=4 * deviation / found.size**0.5)
    for axes in ((0, 1), (0, 2), (1, 2)):
        counts = found.mean(axes)
        expected = deviation * (counts.size / found.size) ** 0.5
        assert 0.4 < counts.std() / expected < 1.8


@pytest.mark.parametrize("backend", BACKENDS)
def test_choices_go_on_where_they_were(backend):
    """In copies, from a state dict, and with the steps of the base alone counted."""
    params = parameters()
    optimizer = fastsam.ESAM(params, **SGD, beta=0.5, backend=backend)
    expected = choices(optimizer, params, 3)
    give(params, 0)
    optimizer.plain_step()
    others, twin = copy.deepcopy([params, optimizer])
    fresh = parameters()
    resumed = fastsam.ESAM(fresh, **SGD, beta=0.5, backend=backend)
    resumed.load_state_dict(optimizer.state_dict())
    later = choices(optimizer, params, 2)
    assert later == choices(twin, others, 2) == choices(resumed, fresh, 2)
    assert later[0] == [takes_part(k, 0.5, 4) for k in range(COUNT)] not in expected


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_takes_no_part_is_not_looked_at(backend):
    """A gradient that is not finite there neither perturbs nor stops anything."""
    params = parameters()
    optimizer = fastsam.ESAM(params, **SGD, beta=0.5, backend=backend)
    give(params, 0)
    out = next(k for k in range(COUNT) if not takes_part(k, 0.5, 0))
    params[out].grad.fill_(float("nan"))
    optimizer.first_step()
    assert [bool(p.any()) for p in params] == [takes_part(k, 0.5, 0) for k in range(COUNT)]
    inside = next(k for k in range(COUNT) if takes_part(k, 0.5, 0))
    optimizer.restore()
    params[inside].grad.fill_(float("inf"))
    optimizer.first_step()
    assert not any(p.any() for p in params)


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_of_it_is_sam(backend):
    ours, theirs = parameters(), parameters()
    esam = fastsam.ESAM(ours, **SGD, rho=0.5, beta=1.0, backend=backend)
    sam = fastsam.SAM(theirs, **SGD, rho=0.5, backend=backend)
    for optimizer, params in ((esam, ours), (sam, theirs)):
        give(params, 0)
        optimizer.first_step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=3e-7, atol=0)


def test_esam_refuses():
    params = parameters()
    with pytest.raises(ValueError, match="renormalize must be False with ESAM"):
        fastsam.ESAM(params, **SGD, renormalize=True)
    with pytest.raises(ValueError, match=r"beta must be in \(0, 1\], got 0.0"):
        fastsam.ESAM(params, **SGD, beta=0.0)
    optimizer = fastsam.ESAM(params, **SGD)
    with pytest.raises(ValueError, match="renormalize must be False with ESAM"):
        optimizer.renormalize = True
    lets = fastsam.LETS(optimizer, hessian="diag")
    with pytest.raises(RuntimeError, match="LETS needs hessian='difference' with ESAM"):
        lets.step(lambda: None, lambda: None)
