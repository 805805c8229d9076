"""Losses to look at: a quadratic in closed form, and one of a model that must stay as it was."""

import numpy as np
import torch
from torch import Tensor, nn

from conftest import DEVICE


class Quadratic:
    """w'Aw / 2 over parameters of several shapes, with its float64 values in numpy."""

    shapes = [(2,), (2, 2), (), (0,)]

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        rng = np.random.default_rng(0)
        a = rng.normal(size=(7, 7))
        self.a, self.w = a @ a.T, rng.normal(size=7)
        sizes = [int(np.prod(shape)) for shape in self.shapes]
        parts = np.split(self.w, np.cumsum(sizes)[:-1])
        self.params = [
            torch.tensor(part.reshape(shape), dtype=dtype, device=DEVICE, requires_grad=True)
            for part, shape in zip(parts, self.shapes, strict=True)
        ]
        self.matrix = torch.tensor(self.a, dtype=dtype, device=DEVICE)

    def loss(self) -> Tensor:
        w = torch.cat([p.reshape(-1) for p in self.params])
        return 0.5 * w @ self.matrix @ w

    def rise(self, e: np.ndarray) -> float:
        return float(self.a @ self.w @ e + 0.5 * e @ self.a @ e)

    def scale(self, adaptive: bool, eta: float) -> np.ndarray:
        return np.abs(self.w) + eta if adaptive else np.ones(7)


class Stateful(nn.Module):
    """BatchNorm, dropout, a tied, a frozen and an unused weight, and a buffer made anew."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 5)
        self.norm = nn.BatchNorm1d(5)
        self.drop = nn.Dropout(0.5)
        self.second = nn.Linear(5, 5)
        self.second.weight = self.first.weight
        self.frozen = nn.Parameter(torch.randn(5), requires_grad=False)
        self.unused = nn.Parameter(torch.randn(3))
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("nothing", None)

    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1
        x = self.drop(self.norm(self.first(x)).relu())
        return self.second(x) * self.frozen * self.calls


def stateful(dtype: torch.dtype = torch.float32):
    torch.manual_seed(1)
    model = Stateful().to(DEVICE, dtype)
    x = torch.randn(6, 5, device=DEVICE, dtype=dtype)
    model(x).square().sum().backward()
    return model, lambda: model(x).square().sum()


def snapshot(model: nn.Module):
    """Everything that has to be the same afterwards: objects, bits and flags."""
    tensors = [*model.parameters(), *(b for b in model.buffers())]
    grads = [p.grad for p in model.parameters()]
    copies = [None if x is None else x.detach().clone() for x in [*tensors, *grads]]
    flags = [p.requires_grad for p in model.parameters()], [m.training for m in model.modules()]
    names = [list(m._buffers) for m in model.modules()]
    state = [torch.get_rng_state()] + ([torch.cuda.get_rng_state()] if DEVICE == "cuda" else [])
    return [*tensors, *grads], copies, (flags, names), state


def assert_untouched(model: nn.Module, before) -> None:
    for old, new in zip(before, snapshot(model), strict=True):
        assert len(old) == len(new)
    objects, copies, flags, state = snapshot(model)
    assert all(x is y for x, y in zip(objects, before[0], strict=True))
    for x, y in zip([*copies, *state], [*before[1], *before[3]], strict=True):
        # bytes, as -0 equals 0
        assert x is y or torch.equal(
            x.reshape(-1).view(torch.uint8), y.reshape(-1).view(torch.uint8)
        )
    assert flags == before[2]


def meddle(model: nn.Module) -> None:
    """What a closure should not do, and is undone."""
    model.train(not model.training)
    model.frozen.requires_grad_(True)
    model.register_buffer("new", torch.ones(1))
    model.norm.num_batches_tracked.add_(5)
    torch.rand(3)
    for p in model.parameters():
        p.grad = None
