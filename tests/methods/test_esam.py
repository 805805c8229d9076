"""ESAM's selection of samples."""

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

import fastsam

from networks import bits
from registry import DEVICE


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
