"""Whole trajectories of published implementations on a network, in float64."""

import pytest
import torch

import fastsam

from registry import BACKENDS, DEVICE

pytorch_optimizer = pytest.importorskip("pytorch_optimizer")
unifiedsam = pytest.importorskip("unifiedsam")

BASES = {
    "sgd": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3}),
    "adamw": (torch.optim.AdamW, {"lr": 1e-2}),
}


def model_and_loss():
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(1, 4, 3), torch.nn.GELU(), torch.nn.Flatten(), torch.nn.Linear(144, 5)
    ).to(DEVICE, torch.float64)
    x = torch.randn(16, 1, 8, 8, dtype=torch.float64, device=DEVICE)
    y = torch.randint(5, (16,), device=DEVICE)
    return model, lambda: torch.nn.functional.cross_entropy(model(x), y)


def train(make, closure_first: bool, steps: int = 20):
    model, loss_fn = model_and_loss()
    optimizer = make(model.parameters())

    def closure():
        optimizer.zero_grad()
        loss = loss_fn()
        loss.backward()
        return loss

    for _ in range(steps):
        if closure_first:  # these classes expect the first gradient to be there
            closure()
        optimizer.step(closure)
    return list(model.parameters())


def assert_close(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        # 20 steps in float64, and Adam's first ones divide by small numbers
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("lam", [0.0, 0.3, 1.0, "1/t", "1-1/t"])
def test_unifiedsam(lam, base, backend):
    cls, kwargs = BASES[base]
    ours = train(
        lambda p: fastsam.UnifiedSAM(p, cls, rho=0.2, lam=lam, backend=backend, **kwargs), False
    )
    theirs = train(lambda p: unifiedsam.unifiedSAM(p, cls, rho=0.2, lambd=lam, **kwargs), True)
    assert_close(ours, theirs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("adaptive", [False, True])
def test_pytorch_optimizer_sam(adaptive, base, backend):
    cls, kwargs = BASES[base]
    kwargs = kwargs | {"rho": 0.2, "adaptive": adaptive}
    ours = train(lambda p: fastsam.SAM(p, cls, backend=backend, **kwargs), False)
    theirs = train(lambda p: pytorch_optimizer.SAM(p, cls, **kwargs), True)
    # its norm is rounded to float32: 6e-8 of the perturbation, enlarged over 20 steps
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
