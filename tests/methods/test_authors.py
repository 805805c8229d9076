"""The library against trajectories of ten steps, whose numbers are in ``trajectories.json``.

They were computed by ``authors.py``, which says how the authors' code differs from the equations.
"""

import json

import numpy as np
import pytest
import torch

import fastsam

import authors
from registry import BACKENDS, DEVICE

STORED = json.loads(authors.FILE.read_text())
SGD = {"base_optimizer": torch.optim.SGD, "lr": authors.LR, "momentum": authors.MOMENTUM}
ADAMW = {"base_optimizer": torch.optim.AdamW, "lr": 0.05, "betas": (0.9, 0.99),
         "weight_decay": 0.1}  # fmt: skip


def groups(own):
    """A group for each of weight, bias and out."""
    return lambda params: [{"params": [p]} | x for p, x in zip(params, own, strict=True)]


#: The class, what it is given, and its groups where they differ.
OURS = {
    "asam": (fastsam.ASAM, SGD | {"rho": 0.5}, groups([{}, {"adaptive": False}, {}])),
    "sam-on": (fastsam.SAM, SGD | {"rho": 0.5}, groups([{"perturb": False}, {}, {}])),
    "vasso": (fastsam.VaSSO, SGD | {"rho": 0.2, "theta": 0.4}, list),
    "friendly": (fastsam.FriendlySAM, SGD | {"rho": 0.2, "sigma": 1.0, "lmbda": 0.9}, list),
    "gsam": (fastsam.GSAM, SGD | {"rho": 0.2, "alpha": 0.4}, list),
    "wsam": (fastsam.WSAM, SGD | {"rho": 0.2, "gamma": 0.8}, list),
    "wsam-coupled": (fastsam.WSAM, SGD | {"rho": 0.2, "gamma": 0.8, "decouple": False}, list),
    "looksam": (fastsam.LookSAM, SGD | {"rho": 0.2, "k": 3, "alpha": 0.7}, list),
    "msam": (fastsam.MSAM, SGD | {"rho": 0.3}, list),
    "msam-decay": (fastsam.MSAM, SGD | {"rho": 0.3, "weight_decay": 0.05}, list),
    "msam-adamw": (fastsam.MSAM, ADAMW | {"rho": 0.3}, list),
    "bsam": (
        fastsam.BSAM,
        {"lr": 0.3, "n": 50.0, "rho": 0.1, "betas": (0.8, 0.9), "prior_precision": 2.0,
         "damping": 0.2},
        list,
    ),
    "trace": (fastsam.TraceSAM, SGD | {"rho": 0.1, "weight": 0.7}, list),
    "det": (
        fastsam.DetSAM, SGD | {"rho": 1.0, "weight": 0.5, "samples": 2, "half_width": 0.2}, list,
    ),
    "frob": (fastsam.FrobSAM, SGD | {"rho": 0.1, "weight": 0.02, "samples": 2}, list),
    "functional": (fastsam.FunctionalSAM, SGD | {"rho": 0.4}, list),
    "esam": (fastsam.ESAM, SGD | {"rho": 0.2, "beta": 0.6}, list),
}  # fmt: skip
#: How far theirs is from the equation's, which ours follows on purpose: at least so much.
DEVIATIONS = {"looksam": 1e-2, "msam-decay": 1e-3, "msam-adamw": 1e-4, "esam": 1e-2}


class Model:
    """The network of ``authors.py``, by autograd."""

    def __init__(self):
        def tensor(x):
            return torch.tensor(x, dtype=torch.float64, device=DEVICE)

        self.params = [torch.nn.Parameter(tensor(w)) for w in authors.START]
        self.x, self.y = tensor(authors.X), tensor(authors.Y)

    def losses(self, rows=slice(None), mark=lambda outputs: outputs):
        weight, bias, out = self.params
        found = mark(torch.tanh(self.x[rows] @ weight.T + bias) @ out)
        return torch.nn.functional.softplus(-self.y[rows] * found)

    def backward(self, mark=lambda outputs: outputs):
        for p in self.params:
            p.grad = None
        loss = self.losses(mark=mark).mean()
        loss.backward()
        return loss.detach()


def step(model, optimizer):
    if not isinstance(optimizer, fastsam.ESAM):
        mark = getattr(optimizer, "outputs", lambda outputs: outputs)
        optimizer.step(lambda: model.backward(mark))
        return
    before = model.losses()
    before.mean().backward()
    optimizer.first_step(zero_grad=True)
    with torch.no_grad():
        after = model.losses()
    model.losses(fastsam.select_samples(before.detach(), after, 0.75)).mean().backward()
    optimizer.second_step(zero_grad=True)


@pytest.mark.parametrize("backend", BACKENDS[:2])
@pytest.mark.parametrize("name", OURS)
def test_the_librarys_trajectory_is_the_stored_one(name, backend):
    cls, kwargs, groups_of = OURS[name]
    model = Model()
    optimizer = cls(groups_of(model.params), backend=backend, **kwargs)
    for t, expected in enumerate(STORED[name]):
        step(model, optimizer)
        found = torch.cat([p.detach().flatten() for p in model.params]).cpu().numpy()
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-9, err_msg=f"step {t}")


@pytest.mark.parametrize("name", authors.TRAJECTORIES)
def test_the_stored_numbers_are_those_of_the_equations(name):
    np.testing.assert_allclose(STORED[name], authors.recomputed(name), rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", DEVIATIONS)
def test_where_the_authors_code_is_not_followed(name):
    """It goes elsewhere than the paper's equation, which the library follows."""
    apart = np.abs(np.subtract(STORED[name], STORED[f"{name}, theirs"])).max()
    assert apart > DEVIATIONS[name]


def test_every_trajectory_is_compared():
    theirs = {f"{name}, theirs" for name in DEVIATIONS}
    assert set(STORED) == set(authors.TRAJECTORIES) == set(OURS) | theirs
    assert all(np.shape(numbers) == (authors.STEPS, 8) for numbers in STORED.values())
