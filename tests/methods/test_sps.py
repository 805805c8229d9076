"""SAM-SPS by hand: step sizes of given losses, where the loss comes from, and what is refused."""

import math

import pytest
import torch

import fastsam

import processes
from registry import BACKENDS, DEVICE

NAN, INF = float("nan"), float("inf")


def weights(*values):
    return torch.nn.Parameter(torch.tensor(values, device=DEVICE))


def take(optimizer, param, first, second, loss):
    """One step by explicit passes; the change of the weight."""
    before = param.detach().clone()
    param.grad = torch.tensor(first, device=DEVICE)
    optimizer.first_step()
    param.grad = torch.tensor(second, device=DEVICE)
    optimizer.second_step(loss=loss)
    return (param.detach() - before).tolist()


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_step_size(backend):
    """e = (0.3, 0.4), <e, g~> = 0.5 and ||g~||^2 = 4, or 0.16 and 0.0016."""
    param = weights(0.0, 0.0)
    optimizer = fastsam.SAMSPS([param], rho=0.5, lr_max=2.0, weight_decay=0.0, backend=backend)
    for loss, size in ((2.5, 0.5), (0.4, 0.0), (1e9, 2.0), (INF, 2.0), (NAN, 0.0)):
        for given in (loss, torch.tensor(loss, device=DEVICE), torch.tensor([[loss]])):
            param.data.zero_()
            found = take(optimizer, param, [3.0, 4.0], [1.0, 3**0.5], given)
            rise = 0.3 + 0.4 * 3**0.5
            size = size if math.isinf(loss) or loss in (0.4, 1e9) else (loss - rise) / 4
            size = 0.0 if math.isnan(loss) else size
            assert found == pytest.approx([-size, -size * 3**0.5], rel=1e-6)
            assert optimizer.metrics["step_size"].item() == pytest.approx(size, rel=1e-6)
            assert optimizer.metrics["perturbed_loss"].item() == pytest.approx(loss, nan_ok=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_that_give_no_quotient(backend):
    param = weights(1.0, 2.0)
    optimizer = fastsam.SAMSPS([param], rho=0.5, lr_max=2.0, weight_decay=0.1, backend=backend)
    # 0 / 0 is no step, not even of weight decay; 1 / 0 is the largest one
    assert take(optimizer, param, [0.0, 0.0], [0.0, 0.0], 0.0) == [0.0, 0.0]
    found = take(optimizer, param, [0.0, 0.0], [0.0, 0.0], 1.0)
    assert found == pytest.approx([-0.2, -0.4], rel=1e-6)
    assert take(optimizer, param, [3.0, 4.0], [NAN, 1.0], 1.0) == [0.0, 0.0]
    assert optimizer.metrics["step_size"].item() == 0.0
    # a first gradient that is not finite perturbs nothing: the rise is 0
    found = take(optimizer, param, [INF, 4.0], [0.0, 2.0], 1.0)
    w = param.detach().tolist()
    assert optimizer.metrics["step_size"].item() == pytest.approx(0.25)
    before = [w[0] - found[0], w[1] - found[1]]
    exact = [-0.25 * 0.1 * before[0], -0.25 * (2 + 0.1 * before[1])]
    assert found == pytest.approx(exact, rel=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_groups_have_radii_and_largest_steps_of_their_own(backend):
    """<e, g~> is over what is perturbed; ||g~||^2 over everything."""
    a, b, c = weights(0.0), weights(0.0), weights(0.0)
    groups = [{"params": [a], "rho": 1.0}, {"params": [b], "rho": 2.0, "lr": 0.01},
              {"params": [c], "perturb": False}]  # fmt: skip
    optimizer = fastsam.SAMSPS(groups, weight_decay=0.0, loss_min=-1.0, backend=backend)
    for param, g in ((a, 3.0), (b, 4.0), (c, 100.0)):
        param.grad = torch.full_like(param, g)
    optimizer.first_step()
    assert (a.item(), b.item(), c.item()) == pytest.approx((0.6, 1.6, 0.0))
    for param, g in ((a, 1.0), (b, 2.0), (c, 5.0)):
        param.grad = torch.full_like(param, g)
    optimizer.second_step(loss=7.0)
    size = (7 + 1 - (0.6 + 3.2)) / 30
    found = a.item(), b.item(), c.item()
    assert found == pytest.approx((-size, -0.02, -5 * size), rel=1e-6)


def test_closures_return_the_loss():
    """That of the second call, and of the only one where nothing is perturbed."""
    param = weights(1.0, -2.0)
    optimizer = fastsam.SAMSPS([param], rho=0.5, weight_decay=0.0, perturb_every=2)
    losses = []

    def closure():
        loss = 0.5 * param.square().sum()
        loss.backward()
        losses.append(loss.item())
        return loss

    assert optimizer.step(closure).item() == losses[0] == 2.5
    assert optimizer.metrics["perturbed_loss"].item() == pytest.approx(losses[1])
    # of this quadratic <e, g~> + f(w) <= f(w + e): from w + e the tangent is at f(w) - |e|^2 / 2
    n = 5**0.5
    size = (2.5 - 0.125) / (n + 0.5) ** 2
    assert optimizer.metrics["step_size"].item() == pytest.approx(size, rel=1e-6)
    before = param.detach().clone()
    assert optimizer.step(closure).item() == losses[2]
    assert len(losses) == 3
    assert optimizer.metrics["step_size"].item() == pytest.approx(0.5)  # f / ||g||^2
    torch.testing.assert_close(param.detach(), before / 2)


def test_it_finds_the_least_of_a_quadratic():
    param = weights(1.0, -2.0, 3.0)
    optimizer = fastsam.SAMSPS([param], rho=1e-3, weight_decay=0.0)
    curvature = torch.tensor([1.0, 4.0, 9.0], device=DEVICE)

    def closure():
        loss = 0.5 * (curvature * param.square()).sum()
        loss.backward()
        return loss

    first = optimizer.step(closure).item()
    for _ in range(60):
        last = optimizer.step(closure).item()
    assert last < 1e-4 * first


def test_what_is_refused():
    param = weights(1.0, 2.0)
    optimizer = fastsam.SAMSPS([param])
    param.grad = torch.ones_like(param)
    for wrong in (None, "1", torch.ones(2), True):
        optimizer.first_step()
        with pytest.raises(TypeError, match="loss must be a number or a tensor of one element"):
            optimizer.second_step(loss=wrong)
        assert param.tolist() == [1.0, 2.0] and not optimizer.between_passes
    with pytest.raises(TypeError, match="which plain_step needs with SAMSPS, got None"):
        optimizer.plain_step()

    def closure():
        param.grad = torch.ones_like(param)

    with pytest.raises(TypeError, match="which the closure has to return with SAMSPS, got None"):
        optimizer.step(closure)
    assert param.tolist() == [1.0, 2.0] and not optimizer.between_passes
    lets = fastsam.LETS(optimizer)
    with pytest.raises(RuntimeError, match="LETS does not support SAMSPS, whose step size depends"):
        lets.step(closure, closure)
    optimizer.param_groups[0]["maximize"] = True
    with pytest.raises(ValueError, match="maximize must be False with SAMSPS"):
        optimizer.step(closure)
    with pytest.raises(ValueError, match="lr_max must be at least 0 and finite, got -1.0"):
        fastsam.SAMSPS([param], lr_max=-1.0)
    with pytest.raises(TypeError, match="unexpected argument 'momentum'"):
        fastsam.SAMSPS([param], momentum=0.9)
    with pytest.raises(ValueError, match="ascent_steps must be 1 with SAMSPS"):
        fastsam.SAMSPS([param], ascent_steps=2)


def averaged(rank, size):
    """The step size of two ranks with losses of their own, with DDP."""
    model = torch.nn.Linear(2, 1, bias=False).double()
    torch.nn.init.ones_(model.weight)
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = fastsam.SAMSPS(model.parameters(), rho=0.0, weight_decay=0.0, lr_max=100.0)
    x = torch.tensor([[1.0, 0.0]], dtype=torch.float64) * (rank + 1)

    def closure():
        loss = wrapped(x).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return optimizer.metrics["step_size"].item(), model.weight.tolist()


def test_the_loss_is_averaged_over_ranks():
    """Losses 1 and 2, gradients (1, 0) and (2, 0): 1.5 / 1.5^2."""
    for size, weight in processes.run(2, averaged):
        assert size == pytest.approx(1.5 / 1.5**2)
        assert weight[0] == pytest.approx([0.0, 1.0])
