"""ASAM with the maximum norm, by hand, and what it serves of SAM-ON."""

import pytest
import torch

import fastsam

from registry import BACKENDS, DEVICE

INF = float("inf")
SGD = {"base_optimizer": torch.optim.SGD, "lr": 0.5}


def weights(*values):
    return torch.nn.Parameter(torch.tensor(values, device=DEVICE))


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_weight_moves_by_a_share_of_itself(backend):
    """Not where the gradient is 0 or not finite, which takes nothing from the others."""
    param = weights(2.0, -4.0, 1.0, 8.0, 0.0, 3.0)
    optimizer = fastsam.ASAM([param], **SGD, rho=0.25, eta=1.0, p=INF, backend=backend)
    param.grad = torch.tensor([1e-30, -1e30, 0.0, float("nan"), 1.0, -INF], device=DEVICE)
    optimizer.first_step()
    assert param.tolist() == [2.75, -5.25, 1.0, 8.0, 0.25, 3.0]
    param.grad = torch.ones_like(param)
    optimizer.second_step()
    assert param.tolist() == [1.5, -4.5, 0.5, 7.5, -0.5, 2.5]
    assert "grad_norm" not in optimizer.metrics


@pytest.mark.parametrize("backend", BACKENDS)
def test_groups_without_the_scale_and_several_ascents(backend):
    """T = 1 in a group that is not adaptive; each of two ascents goes half the way."""
    scaled, plain, left = weights(2.0), weights(2.0), weights(2.0)
    groups = [{"params": [scaled]}, {"params": [plain], "adaptive": False},
              {"params": [left], "perturb": False}]  # fmt: skip
    optimizer = fastsam.ASAM(
        groups, **SGD, rho=0.5, eta=0.0, p=INF, ascent_steps=2, backend=backend
    )
    for expected in ([2.5, 2.25, 2.0], [1.875, 2.0, 2.0]):
        for param in (scaled, plain, left):
            param.grad = torch.full_like(param, 1.0 if expected[0] > 2 else -1.0)
        optimizer.first_step()
        assert [p.item() for p in (scaled, plain, left)] == expected
    optimizer.restore()
    assert [p.item() for p in (scaled, plain, left)] == [2.0, 2.0, 2.0]


def test_normalization_layers_alone():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4)).to(DEVICE)
    before = [p.detach().clone() for p in model.parameters()]
    groups = fastsam.normalization_groups(model)
    optimizer = fastsam.ASAM(groups, **SGD, rho=0.5, eta=0.01, p=INF)
    model(torch.randn(2, 3, device=DEVICE)).pow(2).sum().backward()
    optimizer.first_step()
    for k, (p, w) in enumerate(zip(model.parameters(), before, strict=True)):
        move = 0.5 * (w.abs() + 0.01) * p.grad.sign() if k > 1 else torch.zeros_like(w)
        torch.testing.assert_close(p.detach(), w + move)


@pytest.mark.parametrize("p", [1, 0, 3.5, "2", None, True])
def test_other_norms_are_refused(p):
    with pytest.raises(ValueError, match="p must be 2 or inf, got"):
        fastsam.ASAM([weights(1.0)], **SGD, p=p)
    assert fastsam.ASAM([weights(1.0)], **SGD).p == 2.0
    optimizer = fastsam.ASAM([weights(1.0)], **SGD, p=INF)
    assert optimizer.p == INF
    with pytest.raises(ValueError, match="norm must be 'global' with ASAM"):
        fastsam.ASAM([weights(1.0)], **SGD, p=INF, norm="layer")
