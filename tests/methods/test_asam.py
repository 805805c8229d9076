"""ASAM with the maximum norm, by hand, and what it serves of SAM-ON."""

import pytest
import torch

import fastsam

import processes
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


def layerwise(ws, gs, rho, eta, p):
    """w + e by numpy-like formulas in float64."""
    ts = [w.double().norm() * (1 + eta) for w in ws]
    if p == INF:
        return [w + rho * t * g.sign() for w, t, g in zip(ws, ts, gs, strict=True)]
    n = sum((t * g.double()).square().sum() for t, g in zip(ts, gs, strict=True)) ** 0.5
    return [w + rho * t * t * g / n for w, t, g in zip(ws, ts, gs, strict=True)]


@pytest.mark.parametrize("p", [2, INF])
@pytest.mark.parametrize("backend", BACKENDS)
def test_one_scale_for_each_parameter(backend, p):
    """Also in a second step, with other weights; T = 1 in groups that say so."""
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape, device=DEVICE)) for shape in ((5, 7), (3,), ())]
    groups = [{"params": params[:2]}, {"params": params[2:], "layerwise": False}]
    optimizer = fastsam.ASAM(
        groups, **SGD, rho=0.1, eta=0.5, p=p, form="layerwise", backend=backend
    )
    assert optimizer.form == "layerwise" and optimizer.p == p
    for _ in range(2):
        before = [w.detach().clone() for w in params]
        gs = [torch.randn_like(w) for w in params]
        for param, g in zip(params, gs, strict=True):
            param.grad = g.clone()
        optimizer.first_step()
        # a parameter of norm 1 / 1.5 has T = 1
        seen = [*before[:2], torch.full_like(before[2], 1 / 1.5)]
        moved = layerwise(seen, gs, 0.1, 0.5, p)
        for w, old, x, y in zip(params, before, seen, moved, strict=True):
            torch.testing.assert_close(w.detach(), (old + (y - x)).float(), rtol=2e-6, atol=1e-6)
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.second_step()
        for w, old in zip(params, before, strict=True):
            torch.testing.assert_close(w.detach(), old - 0.5, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_scale_is_that_of_master_weights(backend):
    """And of the parameter where somebody has written to it."""
    param = torch.nn.Parameter(torch.full((4,), 1.0, dtype=torch.bfloat16, device=DEVICE))
    optimizer = fastsam.ASAM(
        [param], torch.optim.SGD, lr=0.001, rho=0.5, eta=0.0, p=INF, form="layerwise",
        master_weights=True, backend=backend,
    )  # fmt: skip

    def move():
        """T, twice, of a gradient of ones."""
        param.grad = torch.ones_like(param)
        optimizer.first_step()
        master = optimizer.state[param]["master_weight"]
        found = param.detach().float() - master
        param.grad = torch.ones_like(param)
        optimizer.second_step()
        return found[0].item()

    assert move() == pytest.approx(1.0, rel=2e-2)  # 0.5 * 2
    with torch.no_grad():
        param.fill_(4.0)
    assert move() == pytest.approx(4.0, rel=2e-2)


def sharded(rank, size):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    found = []
    for p in (2, INF):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4)).double()
        before = [w.detach().clone() for w in model.parameters()]
        x = torch.randn(4, 3, dtype=torch.float64)
        gs = torch.autograd.grad(model(x).pow(4).mean(), list(model.parameters()))
        fully_shard(model, mesh=init_device_mesh("cpu", (size,)))
        optimizer = fastsam.ASAM(model.parameters(), **SGD, rho=0.1, p=p, form="layerwise")
        model(x).pow(4).mean().backward()
        optimizer.first_step()
        moved = layerwise(before, gs, 0.1, 0.01, p)
        whole = [w.full_tensor() for w in model.parameters()]
        found.append(max(float((a - b).abs().max()) for a, b in zip(whole, moved, strict=True)))
        optimizer.restore()
    return found


def test_norms_of_sharded_parameters_are_those_of_all_shards():
    for found in processes.run(2, sharded):
        assert max(found) < 1e-13


def test_what_the_layerwise_form_refuses():
    param = weights(1.0, 2.0)
    with pytest.raises(ValueError, match="form must be one of 'elementwise', 'layerwise', got 'l'"):
        fastsam.ASAM([param], **SGD, form="l")
    with pytest.raises(ValueError, match="adaptive must be False: the perturbation has no element"):
        fastsam.ASAM([{"params": [param], "adaptive": True}], **SGD, form="layerwise")
    optimizer = fastsam.ASAM([param], **SGD, form="layerwise")
    lets = fastsam.LETS(optimizer, hessian="diag")
    with pytest.raises(RuntimeError, match="LETS needs hessian='difference' with ASAM"):
        lets.step(lambda: None, lambda: None)
