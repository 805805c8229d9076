"""A second closure: another function's gradient for the update, in steps of the base, too."""

import copy

import pytest
import torch

import fastsam

from conftest import DEVICE
from registry import BACKENDS

SGD = {"lr": 0.1, "momentum": 0.9}


def problem():
    torch.manual_seed(0)
    w = torch.nn.Parameter(torch.randn(7, dtype=torch.float64, device=DEVICE))
    calls = []

    def closure_of(name, power):
        def closure():
            calls.append(name)
            loss = (w**power).sum()
            loss.backward()
            return loss

        return closure

    return w, calls, closure_of("first", 2), closure_of("second", 4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "settings", [{"rho": 0.0}, {"stop": 1, "start": 0, "perturb_every": 2}, {"start": 9}]
)
def test_a_step_of_the_base_takes_the_second_ones_gradient(settings, backend):
    w, calls, first, second = problem()
    optimizer = fastsam.SAM([w], torch.optim.SGD, backend=backend, **settings, **SGD)
    if "stop" in settings:  # a step with a perturbation comes first
        optimizer.step(first, second)
    expected = torch.nn.Parameter(w.detach().clone())
    base = torch.optim.SGD([expected], foreach=False, **SGD)
    base.load_state_dict(copy.deepcopy(optimizer.base_optimizer.state_dict()))
    for _ in range(3):
        calls.clear()
        loss = optimizer.step(first, second)
        assert calls == ["first", "second"]
        assert loss.item() == pytest.approx(float((expected.detach() ** 2).sum()), rel=1e-12)
        base.zero_grad()
        (expected**4).sum().backward()
        base.step()
        torch.testing.assert_close(w, expected, rtol=1e-13, atol=1e-14)


def test_one_closure_is_called_once():
    w, calls, first, _ = problem()
    optimizer = fastsam.SAM([w], torch.optim.SGD, rho=0.0, **SGD)
    optimizer.step(first)
    optimizer.step(first, first)
    assert calls == ["first", "first"]


def test_functional_sam_calls_the_first_alone():
    """Its two closures have one gradient where nothing is perturbed."""
    w, calls, first, second = problem()
    optimizer = fastsam.FunctionalSAM([w], torch.optim.SGD, start=1, by_hand=True, **SGD)
    optimizer.step(first, second)
    assert calls == ["first"]
    optimizer.step(first, second)
    assert calls == ["first", "first", "second"]


def test_the_second_one_fails_in_a_step_of_the_base():
    w, _, first, _ = problem()
    optimizer = fastsam.SAM([w], torch.optim.SGD, rho=0.0, **SGD)
    before = w.detach().clone()

    def fails():
        raise RuntimeError("of the user's")

    with pytest.raises(RuntimeError, match="of the user's"):
        optimizer.step(first, fails)
    assert torch.equal(w, before) and not optimizer.state[w]
