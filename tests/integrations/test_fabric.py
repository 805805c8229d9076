"""Lightning's Fabric, equal to a loop written by hand."""

import copy

import pytest
import torch

import fastsam

pytest.importorskip("lightning")
pytestmark = pytest.mark.filterwarnings("default")  # its own, of versions to come

from lightning.fabric import Fabric  # noqa: E402
from lightning.fabric.plugins import MixedPrecision  # noqa: E402

import fastsam.lightning  # noqa: E402

from networks import bits, same  # noqa: E402


def problem():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 16), torch.nn.Tanh(), torch.nn.Linear(16, 3))
    return model, torch.randn(8, 5), torch.randint(3, (8,))


def loss_of(out, y):
    return torch.nn.functional.cross_entropy(out.float(), y)


def sam_of(model):
    return fastsam.SAM(model.parameters(), torch.optim.SGD, rho=0.1, lr=0.1, momentum=0.9)


def by_hand(scale, steps):
    model, x, y = problem()
    optimizer, scaler = sam_of(model), torch.amp.GradScaler("cpu", init_scale=scale)

    def closure():
        with torch.autocast("cpu", torch.float16):
            out = model(x.half())
        scaler.scale(loss_of(out, y)).backward()

    for _ in range(steps):
        optimizer.step(closure, grad_scaler=scaler)
        scaler.update()
    return model, optimizer, scaler


def by_fabric(plugin, steps, make=sam_of):
    model, x, y = problem()
    fabric = Fabric(accelerator="cpu", plugins=plugin)
    wrapped, optimizer = fabric.setup(model, make(model))

    def closure():
        loss = loss_of(wrapped(x), y)
        fabric.backward(loss)
        return loss

    losses = [optimizer.step(closure) for _ in range(steps)]
    return model, optimizer, losses


@pytest.mark.parametrize(("scale", "skipped"), [(1024.0, 0), (2.0**40, 4)])
def test_16_mixed(scale, skipped):
    """Bit for bit, the scale too; an overflow skips the step and lowers it."""
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    plugin = fastsam.lightning.FabricMixedPrecision("16-mixed", "cpu", scaler)
    start, _, _ = problem()
    model, optimizer, losses = by_fabric(plugin, 4)
    twin, other, twin_scaler = by_hand(scale, 4)
    assert same(bits(model), bits(twin)) and same(bits(model), bits(start)) is bool(skipped)
    assert scaler.get_scale() == twin_scaler.get_scale() == scale / 2**skipped
    assert optimizer.metrics["skipped"] == other.metrics["skipped"] == skipped
    assert skipped or losses[-1] < losses[0]
    again = copy.deepcopy(plugin.state_dict())
    assert again["scale"] == scale / 2**skipped


def test_other_optimizers_step_as_before():
    ends = []
    for cls in (fastsam.lightning.FabricMixedPrecision, MixedPrecision):
        model, x, y = problem()
        fabric = Fabric(accelerator="cpu", plugins=cls("16-mixed", "cpu"))
        wrapped, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
        fabric.backward(loss_of(wrapped(x), y))
        optimizer.step()
        ends.append(bits(model))
    assert same(*ends) and not same(ends[0], bits(problem()[0]))


def test_bfloat16_needs_no_plugin():
    ends = [
        bits(by_fabric(cls("bf16-mixed", "cpu"), 2)[0])
        for cls in (fastsam.lightning.FabricMixedPrecision, MixedPrecision)
    ]
    assert same(*ends)


def test_fabrics_own_plugin_refuses_a_closure():
    with pytest.raises(RuntimeError, match="Closure"):
        by_fabric(MixedPrecision("16-mixed", "cpu"), 1)


def test_without_a_closure():
    model, x, y = problem()
    plugin = fastsam.lightning.FabricMixedPrecision("16-mixed", "cpu")
    fabric = Fabric(accelerator="cpu", plugins=plugin)
    _, optimizer = fabric.setup(model, sam_of(model))
    with pytest.raises(RuntimeError, match="SAM.step needs a closure"):
        optimizer.step()


@pytest.mark.parametrize("clears", [False, True])
def test_explicit_halves(clears):
    """Of the optimizer itself, which Fabric's wrapper holds; with the plugin's scaler."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    model, x, y = problem()
    plugin = fastsam.lightning.FabricMixedPrecision("16-mixed", "cpu", scaler)
    fabric = Fabric(accelerator="cpu", plugins=plugin)
    wrapped, optimizer = fabric.setup(model, sam_of(model))
    sam = optimizer.optimizer
    for _ in range(2):
        for half in (sam.first_step, sam.second_step):
            fabric.backward(loss_of(wrapped(x), y))
            half(zero_grad=clears, grad_scaler=scaler)
            if not clears:
                sam.zero_grad()
        scaler.update()
    assert same(bits(model), bits(by_hand(1024.0, 2)[0]))
