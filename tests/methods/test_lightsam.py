"""LightSAM against its published pseudo-code, on a network, in float64."""

import pytest
import torch
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import fastsam

from networks import model_and_data
from oracles import Oracle
from registry import BACKENDS, DEVICE, numpy

STEPS = 20
RULES = ("adagrad_norm", "adagrad", "adam")
#: In I the steps are shares of one norm, in II and III they are taken by every coordinate.
SIZES = {
    "adagrad_norm": {"lr": 0.5, "rho": 0.3},
    "adagrad": {"lr": 0.01, "rho": 0.005},
    "adam": {"lr": 0.01, "rho": 0.005},
}
#: The oracle's bases; its ascent rules have LightSAM's names.
BASES = {
    "adagrad_norm": "light_adagrad_norm",
    "adagrad": "light_adagrad",
    "adam": "uncorrected_adam",
}
DEFAULTS = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
OPTIONS = {
    "defaults": {},
    "others": {"betas": (0.6, 0.9), "eps": 1e-3, "weight_decay": 0.1},
}


class Scaled:
    """What LightSAM does to a gradient, on the way up as on the way down."""

    def __init__(self, rule, betas, eps):
        self.rule, self.betas = rule, betas
        self.average, self.square = 0.0, eps**2

    def __call__(self, g):
        if self.rule == "adagrad_norm":
            self.square = self.square + torch.dot(g, g)
            return g / torch.sqrt(self.square)
        if self.rule == "adagrad":
            self.square = self.square + g * g
            return g / torch.sqrt(self.square)
        beta1, beta2 = self.betas
        self.average = beta1 * self.average + (1 - beta1) * g
        self.square = beta2 * self.square + (1 - beta2) * g * g
        return self.average / torch.sqrt(self.square)


class Published:
    """LightSAM-I, II and III (arXiv 2505.24399) on all parameters as one vector.

    The weight decay is not the paper's.
    """

    def __init__(self, params, rule, lr, rho, betas, eps, weight_decay):
        self.params = list(params)
        self.lr, self.rho, self.weight_decay = lr, rho, weight_decay
        self.up, self.down = (Scaled(rule, betas, eps) for _ in range(2))

    @torch.no_grad()
    def step(self, loss):
        x = parameters_to_vector(self.params)
        self.put(x + self.rho * self.up(self.grad(loss)))
        g = self.grad(loss)
        self.put(x - self.lr * self.weight_decay * x - self.lr * self.down(g))

    @torch.enable_grad()
    def grad(self, loss):
        return parameters_to_vector(torch.autograd.grad(loss(), self.params))

    def put(self, x):
        vector_to_parameters(x, self.params)


def network():
    """The small network's model and loss, in float64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        return model_and_data()
    finally:
        torch.set_default_dtype(before)


def published(rule, options):
    """The parameters after every step, as vectors."""
    model, loss = network()
    optimizer = Published(model.parameters(), rule, **SIZES[rule], **DEFAULTS | options)
    for _ in range(STEPS):
        optimizer.step(loss)
        yield parameters_to_vector(model.parameters()).detach().clone()


def assert_close(ours, theirs):
    """A few roundings in each of 20 steps, measured as 1e-15; 1 - beta2 may cancel three digits."""
    assert (ours - theirs).abs().max() <= 1e-12 * theirs.abs().max()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("rule", RULES)
def test_lightsam_is_as_published(rule, options, backend):
    options = OPTIONS[options]
    model, loss_fn = network()
    params = model.parameters()
    optimizer = fastsam.LightSAM(params, rule=rule, backend=backend, **SIZES[rule], **options)

    def closure():
        optimizer.zero_grad()
        loss = loss_fn()
        loss.backward()
        return loss

    losses = []
    for theirs in published(rule, options):
        losses.append(optimizer.step(closure).detach())
        assert_close(parameters_to_vector(model.parameters()), theirs)
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("rule", RULES)
def test_the_oracle_is_as_published(rule, options):
    options = OPTIONS[options]
    model, loss = network()
    params = list(model.parameters())

    def grad(weights):
        with torch.no_grad():
            for param, w in zip(params, weights, strict=True):
                param.copy_(torch.from_numpy(w))
        return numpy(torch.autograd.grad(loss(), params))

    known = {"rho", "lr", "eps", "weight_decay"} | ({"betas"} if rule == "adam" else set())
    group = {k: v for k, v in (SIZES[rule] | DEFAULTS | options).items() if k in known}
    oracle = Oracle(numpy(params), [{"params": range(4)} | group], BASES[rule], ascent=rule)
    for theirs in published(rule, options):
        oracle.step(grad)
        ours = torch.cat([torch.from_numpy(w).flatten() for w in oracle.weights])
        assert_close(ours.to(DEVICE), theirs)
