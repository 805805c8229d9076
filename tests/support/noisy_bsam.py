"""bSAM at work, and its equations in float64."""

import numpy as np

import fastsam

import oracle_noise
import oracles
from registry import Dtypes, numpy, parameters, set_grads

SHAPES = [(1031,), (6, 7), ()]
FP32, FP64 = Dtypes("float32", "float32"), Dtypes("float64", "float64")
SETTINGS = {"lr": 0.3, "n": 50.0, "rho": 0.1, "betas": (0.8, 0.9), "prior_precision": 2.0,
            "damping": 0.2}  # fmt: skip
#: The second has others, and the third is not perturbed.
GROUPS = [
    {"params": [0]}, {"params": [1], "rho": 0.2, "lr": 0.1, "n": 80.0},
    {"params": [2], "perturb": False},
]  # fmt: skip


class Training:
    """A problem, its parameters and the optimizer."""

    def __init__(self, backend="reference", dtypes=FP64, **kwargs):
        self.problem, self.dtypes = oracles.Problem(SHAPES, seed=5), dtypes
        self.params = parameters(self.problem.initial(), dtypes)
        groups = [g | {"params": [self.params[i] for i in g["params"]]} for g in GROUPS]
        self.optimizer = fastsam.BSAM(groups, backend=backend, **SETTINGS | kwargs)
        self.calls, self.sign, self.bad = 0, 1.0, {}
        self.missing = {}  # by call, the parameters without a gradient

    def backward(self):
        self.calls += 1
        if (bad := self.bad.get(self.calls)) is not None and isinstance(bad, Exception):
            raise bad
        grads = [self.sign * g for g in self.problem.grad(numpy(self.params))]
        if bad is not None:
            grads[0][3] = bad
        set_grads(self.params, grads, self.dtypes)
        for k in self.missing.get(self.calls, ()):
            self.params[k].grad = None
        return self.problem.loss(numpy(self.params))

    def step(self, steps=1):
        for _ in range(steps):
            self.optimizer.step(self.backward)
        return self

    def explicit(self):
        with self.optimizer.noise():
            self.backward()
        self.optimizer.first_step(zero_grad=True)
        self.backward()
        self.optimizer.second_step()

    @property
    def weights(self):
        return np.concatenate([w.ravel() for w in numpy(self.params)])


def followed(steps, dtypes=FP64, seed=0, missing=(), bad=None):
    """The equations, in float64 with the weights and gradients stored in their dtype."""
    store = oracles.rounding(dtypes.param)
    problem = oracles.Problem(SHAPES, seed=5)
    ws = [store(w) for w in problem.initial()]
    ms, ss = [np.zeros_like(w) for w in ws], [np.ones_like(w) for w in ws]
    hs = [SETTINGS | group for group in GROUPS]
    for step in range(steps):
        noisy, perturbed = [], []
        for i, (w, s, h) in enumerate(zip(ws, ss, hs, strict=True)):
            z = oracle_noise.normal(seed, i, step, 0, w.shape) * h.get("perturb", True)
            noisy.append(store(w + z / np.sqrt(h["n"] * s)))
        first = [store(g) for g in problem.grad(noisy)]
        if bad is not None:
            first[0][3] = bad
        for i in missing:
            first[i] = np.zeros_like(first[i])
        for w, s, g, h in zip(ws, ss, first, hs, strict=True):
            e = h["rho"] * g / s * h.get("perturb", True)
            perturbed.append(store(w + np.where(np.isfinite(e), e, 0)))
        second = [store(g) for g in problem.grad(perturbed)]
        for i, h in enumerate(hs):
            (beta1, beta2), delta = h["betas"], h["prior_precision"] / h["n"]
            ms[i] = beta1 * ms[i] + (1 - beta1) * (second[i] + delta * ws[i])
            ws[i] = store(ws[i] - h["lr"] * ms[i] / ss[i])
            size = np.sqrt(ss[i]) * np.abs(first[i]) + h["damping"] + delta
            new = beta2 * ss[i] + (1 - beta2) * size
            ss[i] = np.where(np.isfinite(new), new, ss[i])
    return np.concatenate([w.ravel() for w in ws])
