"""What LETS learns from: a network with two losses, closures with given gradients, a learner."""

import copy

import numpy as np
import torch
from torch.autograd import grad

import fastsam

from layouts import LAYOUTS
from registry import DEVICE, create

LR = 0.3


class Network:
    """Two layers with smooth losses on fixed batches, as functions of the weights, in float64."""

    def __init__(self, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(DEVICE)

        teacher = draw(3, 7)
        self.start = [0.5 * draw(*shape) for shape in ((9, 7), (9,), (3, 9), (3,))]
        self.batches = {}
        for name, size in (("training", 20), ("validation", 30)):
            x = draw(size, 7)
            self.batches[name] = x, (x @ teacher.T + draw(size, 3)).argmax(dim=1)

    def loss(self, weights, name="training"):
        (a, b, c, d), (x, y) = weights, self.batches[name]
        return torch.nn.functional.cross_entropy(torch.tanh(x @ a.T + b) @ c.T + d, y)

    def gap(self, weights):
        return self.loss(weights, "validation") - self.loss(weights)

    def grad(self, weights, name="training"):
        weights = [w.detach().requires_grad_() for w in weights]
        return grad(self.loss(weights, name), weights)

    def closures(self, params):
        def closure(name):
            loss = self.loss(params, name)
            loss.backward()
            return loss

        return lambda: closure("training"), lambda: closure("validation")


class Fed:
    """Closures of a step in which every pass's gradients are given, and both losses."""

    def __init__(self, params, passes, losses, layout=None):
        self.params, self.passes, self.losses = params, list(passes), losses
        self.layout = LAYOUTS.get(layout)
        self.calls = 0

    def _take(self, grads):
        self.calls += 1
        for param, x in zip(self.params, grads, strict=True):
            if x is not None:
                plain = torch.from_numpy(np.array(x)).to(param.device, param.dtype)
                param.grad = plain if self.layout is None else self.layout(x)

    def closure(self):
        self._take(self.passes[self.calls])
        return torch.tensor(self.losses[0], dtype=torch.float64, requires_grad=True)

    def val_closure(self):
        self._take(self.passes[3])
        return torch.tensor(self.losses[1], dtype=torch.float64)


def make(backend="torch", method="sam", network=None, wrapped=None, **kwargs):
    """A network, its weights, a learner on them, and its two closures."""
    network = network or Network()
    params = [torch.nn.Parameter(w.clone()) for w in network.start]
    optimizer = create(method, params, backend, **(wrapped or {}))
    lets = fastsam.LETS(optimizer, **({"rho_lr": 0.1} | kwargs))
    return network, params, lets, network.closures(params)


def everything(params, lets):
    """Weights and all state, as a copy."""
    return copy.deepcopy(([p.detach() for p in params], lets.state_dict()))


def same(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a.nan_to_num(-1.5), b.nan_to_num(-1.5))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b or (a != a and b != b)
