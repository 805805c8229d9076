"""Parameters that point at scratch memory between the passes, and steps on them (CPU)."""

import torch

from fastsam.backends.eager import scratch

BIG, SMALL = scratch.WORTHWHILE, 50
SGD = {"base_optimizer": torch.optim.SGD, "lr": 0.1, "momentum": 0.9}


def parameters(*shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(s, generator=generator)) for s in shapes]


def gradients(params):
    """Of the weights as they are, and without a reference to them."""
    for p in params:
        p.grad = torch.sin(3 * p.detach())


def halves(optimizer, params):
    """Both passes, each before something is looked at."""
    for half in (optimizer.first_step, optimizer.second_step):
        gradients(params)
        half()
        yield


def step(optimizer, params):
    for _ in halves(optimizer, params):
        pass


def copies(params):
    return [p.detach().clone() for p in params]


def same(a, b):
    return all(map(torch.equal, a, b))
