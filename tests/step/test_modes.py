"""``train`` and ``eval`` reach bases whose weights have two forms, as schedule-free ones do."""

import copy

import numpy as np
import pytest
import torch

import fastsam

from conftest import DEVICE
from registry import BACKENDS

LR, BETA = 0.1, 0.9
START = np.array([0.5, -1.0, 2.0])


class ScheduleFree(torch.optim.Optimizer):
    """SGD that trains y, between z (which it steps) and x (their average, to be evaluated)."""

    def __init__(self, params, lr=LR, beta=BETA):
        super().__init__(params, {"lr": lr, "beta": beta, "trains": True, "k": 0})

    def train(self):
        self._show(True)

    def eval(self):
        self._show(False)

    @torch.no_grad()
    def _show(self, trains):
        for group in self.param_groups:
            beta = group["beta"]
            for param in group["params"] if group["trains"] != trains else ():
                if "z" in self.state[param]:  # y = beta x + (1 - beta) z
                    param.lerp_(self.state[param]["z"], 1 - beta if trains else 1 - 1 / beta)
            group["trains"] = trains

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            if not group["trains"]:
                raise RuntimeError("call train() before a step")
            beta, group["k"] = group["beta"], group["k"] + 1
            for param in group["params"]:
                state = self.state[param]
                z = state.setdefault("z", param.detach().clone())
                x = (param - (1 - beta) * z) / beta
                z -= group["lr"] * param.grad
                x.lerp_(z, 1 / group["k"])
                param.copy_(beta * x + (1 - beta) * z)


def gradient(w):
    return np.sin(3 * w) if isinstance(w, np.ndarray) else torch.sin(3 * w.detach())


def by_hand(steps, rho):
    """The weights to train and to evaluate after some steps of SAM, in float64."""
    x, z, y = START.copy(), START.copy(), START.copy()
    for k in range(1, steps + 1):
        g = gradient(y)
        z = z - LR * gradient(y + rho * g / (np.linalg.norm(g) + 1e-12))
        x = x + (z - x) / k
        y = BETA * x + (1 - BETA) * z
    return y, x


def create(base=ScheduleFree, backend="reference", **kwargs):
    param = torch.nn.Parameter(torch.tensor(START, device=DEVICE))
    return param, fastsam.SAM([param], base, rho=0.3, backend=backend, **kwargs)


def take_step(optimizer, param, inside=lambda: None):
    def closure():
        inside()
        param.grad = gradient(param)
        return 0.0

    optimizer.step(closure)


def close(param, expected):
    np.testing.assert_allclose(param.detach().cpu().numpy(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_both_kinds_of_weights(backend):
    param, optimizer = create(backend=backend)
    for steps in range(1, 5):
        optimizer.train()
        take_step(optimizer, param)
        trained, evaluated = by_hand(steps, 0.3)
        close(param, trained)
        optimizer.eval()
        close(param, evaluated)
        optimizer.eval()  # twice is once
        close(param, evaluated)
    assert np.abs(trained - evaluated).max() > 1e-3


def test_a_step_in_the_wrong_mode_changes_nothing():
    """The base refuses it, after the first pass."""
    param, optimizer = create()
    take_step(optimizer, param)
    optimizer.eval()
    before = param.detach().clone()
    with pytest.raises(RuntimeError, match="call train"):
        take_step(optimizer, param)
    assert torch.equal(param, before) and optimizer.kept["t"] == 2
    optimizer.train()
    take_step(optimizer, param)
    close(param, by_hand(2, 0.3)[0])


@pytest.mark.parametrize("base", [ScheduleFree, torch.optim.SGD])
def test_eval_between_the_passes(base):
    param, optimizer = create(base, lr=LR)
    optimizer.train()
    param.grad = gradient(param)
    optimizer.first_step()
    perturbed = param.detach().clone()
    with pytest.raises(RuntimeError, match="another eval: first_step and second_step alternate"):
        optimizer.eval()
    optimizer.train()  # as loops do before every pass
    assert torch.equal(param, perturbed)
    param.grad = gradient(param)
    optimizer.second_step()
    if base is ScheduleFree:
        close(param, by_hand(1, 0.3)[0])


def test_train_between_the_passes_of_a_step_that_began_in_another_mode():
    param, optimizer = create()
    take_step(optimizer, param)
    optimizer.eval()
    param.grad = gradient(param)
    optimizer.first_step()
    with pytest.raises(RuntimeError, match="another train"):
        optimizer.train()
    optimizer.restore()
    close(param, by_hand(1, 0.3)[1])


def test_inside_a_closure():
    param, optimizer = create()
    with pytest.raises(RuntimeError, match="eval cannot be called from inside a closure"):
        take_step(optimizer, param, optimizer.eval)
    optimizer.train()
    take_step(optimizer, param, optimizer.train)
    close(param, by_hand(1, 0.3)[0])


def test_bases_without_modes():
    param, optimizer = create(torch.optim.SGD, lr=LR)
    twin, other = create(torch.optim.SGD, lr=LR)
    take_step(other, twin)
    optimizer.train()
    take_step(optimizer, param, optimizer.train)
    optimizer.eval()
    assert torch.equal(param, twin)


def test_lets_passes_them_on():
    param, sam = create()
    optimizer = fastsam.LETS(sam, rho_lr=0.0)

    def closure():
        param.grad = gradient(param)
        return 0.0

    optimizer.train()
    optimizer.step(closure, closure)
    close(param, by_hand(1, 0.3)[0])
    optimizer.eval()
    close(param, by_hand(1, 0.3)[1])


def test_a_copy_and_a_resumed_run():
    """The mode is the base's; what is saved while evaluating goes on."""
    param, optimizer = create()
    take_step(optimizer, param)
    optimizer.eval()
    twin = copy.deepcopy(optimizer)
    (copied,) = twin.param_groups[0]["params"]
    other, resumed = create()
    with torch.no_grad():
        other.copy_(param)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for one, weights in ((twin, copied), (resumed, other), (optimizer, param)):
        one.train()
        take_step(one, weights)
        close(weights, by_hand(2, 0.3)[0])
