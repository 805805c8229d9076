"""SAM-ON's groups: which parameters are perturbed, by how much, and at what cost."""

import pytest
import torch
import triton
from torch import nn

import fastsam

import launches
from registry import BACKENDS, DEVICE

SGD = {"base_optimizer": torch.optim.SGD, "lr": 0.1, "momentum": 0.9}


class OtherRMSNorm(nn.Module):
    """As language models have their own."""

    def __init__(self, size):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.inner = nn.Linear(size, size)  # is no part of what it normalizes by

    def forward(self, x):
        return self.weight * x * x.square().mean(-1, keepdim=True).rsqrt()


class Derived(OtherRMSNorm):
    pass


class Whitening(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))


class Model(nn.Module):
    """No name says what a layer is."""

    def __init__(self):
        super().__init__()
        self.a, self.norm = nn.Conv2d(3, 4, 3), nn.Linear(4, 4)
        self.b = nn.Sequential(nn.BatchNorm2d(4), nn.SyncBatchNorm(4), nn.GroupNorm(2, 4))
        self.c = nn.ModuleList([nn.LayerNorm(4), nn.RMSNorm(4), nn.InstanceNorm1d(4, affine=True)])
        self.d = nn.ModuleList([OtherRMSNorm(4), Derived(4), nn.LayerNorm(4, bias=False)])
        self.e = nn.BatchNorm1d(4, affine=False)
        self.f = Whitening()
        self.d[2].weight = self.c[0].weight  # shared


def test_selects_by_what_a_module_is():
    model = Model()
    names = {p: name for name, p in model.named_parameters()}
    inside, others = fastsam.normalization_groups(model)
    assert [names[p] for p in inside["params"]] == [
        "b.0.weight", "b.0.bias", "b.1.weight", "b.1.bias", "b.2.weight", "b.2.bias",
        "c.0.weight", "c.0.bias", "c.1.weight", "c.2.weight", "c.2.bias", "d.0.weight",
        "d.1.weight",
    ]  # fmt: skip
    assert [names[p] for p in others["params"]] == [
        "a.weight", "a.bias", "norm.weight", "norm.bias", "d.0.inner.weight", "d.0.inner.bias",
        "d.1.inner.weight", "d.1.inner.bias", "f.scale",
    ]  # fmt: skip
    assert "perturb" not in inside and others["perturb"] is False
    inside, others = fastsam.normalization_groups(model, more=(Whitening,))
    assert model.f.scale in set(inside["params"]) and model.f.scale not in set(others["params"])


def test_a_parameter_that_others_share():
    model = nn.Sequential(Whitening(), nn.LayerNorm(3))
    model[0].scale = model[1].weight
    (group,) = fastsam.normalization_groups(model)
    assert [id(p) for p in group["params"]] == [id(model[1].weight), id(model[1].bias)]


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ((nn.Linear(2, 2).parameters(),), TypeError, "model must be a torch.nn.Module, got"),
        ((nn.Linear(2, 2),), ValueError, "model must have a normalization layer .* in Linear"),
        ((nn.BatchNorm1d(2, affine=False),), ValueError, "model must have a normalization layer"),
        ((Model(), ("Whitening",)), TypeError, "more must hold subclasses of .* got 'Whitening'"),
        ((Model(), (torch.Tensor,)), TypeError, "more must hold subclasses of torch.nn.Module"),
    ],
)
def test_bad_input(given, error, message):
    with pytest.raises(error, match=message):
        fastsam.normalization_groups(*given)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("adaptive", [False, True])
def test_perturbs_those_alone_and_updates_all(adaptive, backend):
    """e = rho T^2 g / ||T g|| over the layers, in float64; u is the gradient at w + e."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5), nn.Linear(5, 2)).double().to(DEVICE)
    for p in model.parameters():
        nn.init.normal_(p)
    x = torch.linspace(-1, 1, 12, dtype=torch.float64, device=DEVICE).view(4, 3)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = fastsam.SAM(
        fastsam.normalization_groups(model), **SGD | {"momentum": 0.0}, rho=0.5, backend=backend,
        adaptive=adaptive, eta=0.1,
    )  # fmt: skip

    def gradients():
        model.zero_grad()
        model(x).sin().sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    g = gradients()
    inside = {"1.weight", "1.bias"}
    t = {name: before[name].abs() + 0.1 if adaptive else 1.0 for name in inside}
    norm = torch.cat([t[name] * g[name] for name in inside]).norm() + 1e-12
    optimizer.first_step()
    for name, p in model.named_parameters():
        e = 0.5 * t[name] ** 2 * g[name] / norm if name in inside else torch.zeros_like(p)
        torch.testing.assert_close(p.detach(), before[name] + e, rtol=0, atol=1e-14)
    second = gradients()
    optimizer.second_step()
    for name, p in model.named_parameters():
        exact = before[name] - 0.1 * second[name]
        torch.testing.assert_close(p.detach(), exact, rtol=0, atol=1e-14)


@pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="counts in Triton's interpreter")
def test_the_first_pass_touches_those_alone():
    model = nn.Sequential(nn.Linear(128, 200), nn.LayerNorm(200))
    optimizer = fastsam.SAM(fastsam.normalization_groups(model), **SGD, backend="triton")
    params = list(model.parameters())
    size = sum(p.numel() for p in params)
    for execute in (False, True):
        with launches.record(execute) as log:
            for half in (optimizer.first_step, optimizer.second_step):
                for p in params:
                    p.grad = torch.ones_like(p)
                half(zero_grad=True)
    traffic = (log.loaded + log.stored) / size
    print(f"\nSAM-ON + SGD: {traffic:.2f} B per element, {len(log.launches)} launches")
    assert log.kernels == ["reduce_kernel", "perturb_kernel", "update_kernel"]
    assert 20 + 20 * 400 / size <= traffic < 20 + 20 * 400 / size + 0.5
