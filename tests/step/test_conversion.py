"""Modules converted by swapping their tensors: nothing of an optimizer's is in the way of it."""

import pytest
import torch

import fastsam

from large import BIG
from networks import same
from registry import DEVICE

SIDE = round(BIG**0.5) + 1  # a matrix that gets scratch memory


@pytest.fixture(autouse=True)
def _swapping():
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(before)


def make(kind, model):
    optimizer = {
        "sam": lambda: fastsam.SAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9),
        "vasso": lambda: fastsam.VaSSO(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9),
        "samar": lambda: fastsam.SAMAR(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9),
        "unfused": lambda: fastsam.ASAM(model.parameters(), torch.optim.RMSprop, lr=0.01),
        "lets": lambda: fastsam.SAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9),
    }[kind]()
    return fastsam.LETS(optimizer) if kind == "lets" else optimizer


def run(kind, convert):
    torch.manual_seed(0)
    model = torch.nn.Linear(SIDE, SIDE, device=DEVICE)
    x = torch.randn(4, SIDE, device=DEVICE)

    def closure():
        loss = model(x.to(model.weight.dtype)).square().mean()
        loss.backward()
        return loss

    optimizer = make(kind, model)
    convert(model)
    for _ in range(3):
        optimizer.step(closure, closure) if kind == "lets" else optimizer.step(closure)
        convert(model)
    state = [x.clone() for p in model.parameters() for x in optimizer.state[p].values()]
    return [*model.parameters(), *state], len(optimizer.state)


@pytest.mark.parametrize("kind", ["sam", "vasso", "samar", "unfused", "lets"])
def test_between_the_steps(kind):
    """There and back again, with gradients and without: nothing is lost, and state goes with it."""

    def there_and_back(model):
        for grads in (True, False):
            if not grads:
                model.zero_grad()
            weight = model.weight
            model.double()
            assert model.weight is weight and weight.dtype == torch.float64
            model.float()

    found, count = run(kind, there_and_back)
    expected, _ = run(kind, lambda model: model.zero_grad())
    assert same(found, expected)
    assert count == 2  # of both parameters, under the names they have


def test_training_goes_on_in_the_other_dtype():
    torch.manual_seed(0)
    model = torch.nn.Linear(SIDE, SIDE, device=DEVICE)
    x = torch.randn(4, SIDE, device=DEVICE)
    optimizer = make("sam", model)

    def closure():
        loss = model(x.to(model.weight.dtype)).square().mean()
        loss.backward()
        return loss

    before = optimizer.step(closure)
    model.double()
    assert optimizer.step(closure) < before
    assert model.weight.dtype == torch.float64


def test_between_the_halves():
    """Whole, also where the gradients of the first pass are still there."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)).to(DEVICE)
    optimizer = make("sam", model)
    model(torch.ones(5, 3, device=DEVICE)).sum().backward()
    optimizer.first_step()
    model.double()
    assert {x.dtype for p in model.parameters() for x in (p, p.grad)} == {torch.float64}
    optimizer.restore()
