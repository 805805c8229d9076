"""Trace-, Det- and Frob-SAM, and their general form, at work, and their equations in float64."""

import math

import numpy as np
import torch

import fastsam

import oracle_noise
import oracles
from registry import Dtypes, numpy, parameters, set_grads

SHAPES = [(1031,), (6, 7), ()]
SGD = {"lr": 0.05, "momentum": 0.9}
FP32, FP64 = Dtypes("float32", "float32"), Dtypes("float64", "float64")


def det(xs, gs, g, weight):
    m = np.mean(np.exp(-xs / 2))
    parts = [math.exp(-x / 2) * (gi - g) for x, gi in zip(xs, gs, strict=True)]
    return g + weight * m**-3 * np.mean(parts, axis=0)


def trace(xs, gs, g, weight):
    return g + weight * (np.mean(gs, axis=0) - g)


def frob(xs, gs, g, weight):
    """With ``L_i / rho^2`` for ``x_i``, from which that differs by what is the same for all."""
    n = len(xs)
    products = sum(x * gi for x, gi in zip(xs, gs, strict=True))
    return g + weight * (products / (n - 1) - sum(xs) * sum(gs) / (n * (n - 1)))


def general(xs, gs, g, weight):
    """``phi = sqrt`` and ``psi = exp``."""
    m = np.mean(np.exp(xs))
    parts = [math.exp(x) * (gi - g) for x, gi in zip(xs, gs, strict=True)]
    return g + weight / (2 * math.sqrt(m)) * np.mean(parts, axis=0)


def bounded(xs, gs, g, weight):
    """``phi = exp`` and ``psi = atan``."""
    parts = [(gi - g) / (1 + x**2) for x, gi in zip(xs, gs, strict=True)]
    return g + weight * math.exp(np.mean(np.arctan(xs))) * np.mean(parts, axis=0)


GENERAL = {"phi": torch.sqrt, "psi": torch.exp}
BOUNDED = {"phi": torch.exp, "psi": torch.atan}
#: The class, its arguments, u by the paper's equation, and h where the noise is uniform.
KINDS = {
    "trace": (fastsam.TraceSAM, {"rho": 0.1, "weight": 0.7}, trace, None),
    "trace-3": (fastsam.TraceSAM, {"rho": 0.1, "weight": 1.0, "samples": 3}, trace, None),
    "det": (fastsam.DetSAM, {"rho": 4.0, "weight": 0.5, "half_width": 0.05}, det, 0.05),
    "det-3": (
        fastsam.DetSAM, {"rho": 4.0, "weight": 0.5, "half_width": 0.05, "samples": 3}, det, 0.05,
    ),
    "frob": (fastsam.FrobSAM, {"rho": 0.1, "weight": 0.002}, frob, None),
    "frob-4": (fastsam.FrobSAM, {"rho": 0.1, "weight": 0.002, "samples": 4}, frob, None),
    "general": (
        fastsam.UniversalSAM,
        {"rho": 4.0, "weight": 0.5, "mu": "uniform", "half_width": 0.05, "samples": 2} | GENERAL,
        general, 0.05,
    ),
    "general-normal": (fastsam.UniversalSAM, {"rho": 0.5, "weight": 0.5} | BOUNDED, bounded, None),
}  # fmt: skip


class Training:
    """A problem, its parameters and the optimizer, whose closures evaluate it in float64."""

    def __init__(self, kind="frob", backend="reference", dtypes=FP64, base=torch.optim.SGD,
                 groups=None, shapes=SHAPES, **kwargs):  # fmt: skip
        cls, own, *_ = KINDS[kind]
        self.problem = oracles.Problem(shapes, seed=5)
        self.dtypes, self.sign, self.calls = dtypes, 1.0, 0
        self.params = parameters(self.problem.initial(), dtypes)
        groups = groups or [{"params": [0, 1]}, {"params": [2]}]
        groups = [g | {"params": [self.params[i] for i in g["params"]]} for g in groups]
        given = own | (SGD if base is torch.optim.SGD else {"lr": 0.05}) | kwargs
        self.optimizer = cls(groups, base, backend=backend, **given)
        self.bad = {}  # what the gradients or the loss are in a call, by its number

    def backward(self):
        weights = numpy(self.params)
        grads = [self.sign * g for g in self.problem.grad(weights)]
        loss = self.sign * self.problem.loss(weights)
        if self.calls in self.bad:
            what = self.bad[self.calls]
            if isinstance(what, Exception):
                self.calls += 1
                raise what
            loss, grads = (loss, [g * what for g in grads]) if what == 0 or what != what else (
                what, grads)  # fmt: skip
        self.calls += 1
        set_grads(self.params, grads, self.dtypes)
        return loss

    def step(self, steps=1):
        for _ in range(steps):
            self.optimizer.step(self.backward)
        return self

    @property
    def weights(self):
        return np.concatenate([w.ravel() for w in numpy(self.params)])


def followed(kind, steps, dtypes=FP64, rest=1.0, groups=None, **own):
    """Where the equations lead, in float64 with the weights stored in their dtype."""
    _, given, formula, half_width = KINDS[kind]
    given = given | own
    rho, weight, store = given["rho"], given["weight"], oracles.rounding(dtypes.param)
    problem = oracles.Problem(SHAPES, seed=5)
    ws = [store(w) for w in problem.initial()]
    buffers = [0.0] * len(ws)
    for step in range(steps):
        g, at_w = problem.grad(ws), problem.loss(ws)
        losses, gradients = [], []
        for sample in range(given.get("samples", 2 if formula is frob else 1)):
            draw = oracle_noise.normal if half_width is None else oracle_noise.uniform
            vs = [draw(0, i, step, sample, w.shape) * (half_width or 1) for i, w in enumerate(ws)]
            perturbed = [store(w + rho * v) for w, v in zip(ws, vs, strict=True)]
            losses.append(problem.loss(perturbed))
            gradients.append(problem.grad(perturbed))
        xs = (np.array(losses) - at_w) / rho**2
        for i, w in enumerate(ws):
            u = formula(xs, [gi[i] for gi in gradients], g[i], weight)
            buffers[i] = SGD["momentum"] * buffers[i] + u
            ws[i] = store(w - SGD["lr"] * buffers[i])
    return np.concatenate([w.ravel() for w in ws])
