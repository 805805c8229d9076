"""A small network with its loss, and exact comparison of its weights."""

import torch

from registry import DEVICE


def model_and_data(seed: int = 0):
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(7, 33), torch.nn.Tanh(), torch.nn.Linear(33, 3)).to(
        DEVICE
    )
    x, y = torch.randn(20, 7, device=DEVICE), torch.randint(3, (20,), device=DEVICE)
    return model, lambda: torch.nn.functional.cross_entropy(model(x), y)


def bits(model) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def same(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def closure_of(loss_fn):
    """What ``step`` takes."""

    def closure():
        loss = loss_fn()
        loss.backward()
        return loss

    return closure


def loss_of(model):
    """The loss of ``model_and_data`` for another copy of its model."""
    _, loss_fn = model_and_data()
    _, x, y = (cell.cell_contents for cell in loss_fn.__closure__)
    return lambda: torch.nn.functional.cross_entropy(model(x), y)
