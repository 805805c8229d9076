"""Schedules of the radius."""

import copy

import pytest
import torch

import fastsam

from conftest import DEVICE
from registry import BACKENDS

SGD = {"base_optimizer": torch.optim.SGD, "lr": 0.1, "momentum": 0.9}


def groups(*sizes):
    torch.manual_seed(0)
    return [{"params": [torch.nn.Parameter(torch.randn(n, device=DEVICE))]} for n in sizes]


def sam(rho=0.2, cls=fastsam.SAM, **kwargs):
    return cls(groups(5, 3), rho=rho, **SGD, **kwargs)


def loss_of(optimizer):
    def closure():
        loss = sum((p**2).sum() for group in optimizer.param_groups for p in group["params"])
        loss.backward()
        return loss

    return closure


def radii(optimizer, key="rho"):
    return [float(group[key]) for group in optimizer.param_groups]


# --- LambdaRho ------------------------------------------------------------------------------------


def test_lambda_rho_multiplies_the_radius_at_the_start_as_lambda_lr_does():
    optimizer = sam()
    optimizer.param_groups[1]["rho"] = 0.4
    for group, lr in zip(optimizer.param_groups, (0.2, 0.4), strict=True):
        group["lr"] = lr
    torchs = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 / (1 + t))
    ours = fastsam.LambdaRho(optimizer, lambda t: 1 / (1 + t))
    for _ in range(5):
        assert radii(optimizer) == [group["lr"] for group in optimizer.param_groups]
        assert ours.get_last_rho() == torchs.get_last_lr()
        optimizer.step(loss_of(optimizer))
        torchs.step()
        ours.step()
    assert radii(optimizer) == [pytest.approx(0.2 / 6), pytest.approx(0.4 / 6)]


def test_functions_of_their_own_for_groups_and_groups_that_are_added():
    optimizer = sam()
    schedule = fastsam.LambdaRho(optimizer, [lambda t: 1.0, lambda t: 0.5**t])
    schedule.step()
    assert radii(optimizer) == [0.2, 0.1]
    optimizer = sam()
    schedule = fastsam.LambdaRho(optimizer, lambda t: 0.5**t)
    schedule.step()
    optimizer.add_param_group({**groups(2)[0], "rho": 0.8})
    schedule.step()
    assert radii(optimizer) == [0.05, 0.05, 0.2]


@pytest.mark.parametrize("backend", BACKENDS)
def test_steps_are_those_of_radii_set_by_hand(backend):
    by_hand, scheduled = sam(backend=backend), sam(backend=backend)
    schedule = fastsam.LambdaRho(scheduled, lambda t: (t + 1) / 4)
    for t in range(4):
        for group in by_hand.param_groups:
            group["rho"] = 0.2 * ((t + 1) / 4)
        by_hand.step(loss_of(by_hand))
        scheduled.step(loss_of(scheduled))
        schedule.step()
    for one, other in zip(by_hand.param_groups, scheduled.param_groups, strict=True):
        assert torch.equal(one["params"][0], other["params"][0])


def test_a_tensor_is_written_to():
    rho = torch.tensor(0.2, device=DEVICE)
    optimizer = sam(rho)
    held = [group["rho"] for group in optimizer.param_groups]
    fastsam.LambdaRho(optimizer, lambda t: 0.5)
    assert all(group["rho"] is one for group, one in zip(optimizer.param_groups, held, strict=True))
    assert radii(optimizer) == pytest.approx([0.1, 0.1])


def test_another_key():
    optimizer = fastsam.LESAM(groups(5, 3), sigma=0.4, **SGD)
    fastsam.LambdaRho(optimizer, lambda t: 0.5, key="sigma")
    assert radii(optimizer, "sigma") == [0.2, 0.2]


def test_a_radius_out_of_range_changes_nothing():
    optimizer = sam()
    schedule = fastsam.LambdaRho(optimizer, [lambda t: 1 + t, lambda t: 1.0 if t < 2 else -1.0])
    schedule.step()
    before = radii(optimizer), schedule.state_dict()
    with pytest.raises(ValueError, match="rho must be at least 0 and finite, got -0.2"):
        schedule.step()
    assert (radii(optimizer), schedule.state_dict()) == before


def test_resumed():
    def factor(t):
        return 1 / (1 + t)

    optimizer = sam()
    schedule = fastsam.LambdaRho(optimizer, factor)
    for _ in range(3):
        schedule.step()
    saved = copy.deepcopy((optimizer.state_dict(), schedule.state_dict()))
    schedule.step()
    for late in (False, True):  # made before or after the optimizer's state is loaded
        resumed = sam()
        again = None if late else fastsam.LambdaRho(resumed, factor)
        resumed.load_state_dict(saved[0])
        again = again or fastsam.LambdaRho(resumed, factor)
        again.load_state_dict(saved[1])
        again.step()
        assert radii(resumed) == radii(optimizer) == pytest.approx([0.04, 0.04])
    for wrong, error in (({"steps": 1}, KeyError), ({"steps": 1, "initial": [0.1]}, ValueError)):
        before = schedule.state_dict(), radii(optimizer)
        with pytest.raises(error):
            schedule.load_state_dict(wrong)
        assert (schedule.state_dict(), radii(optimizer)) == before


# --- ProportionalRho ------------------------------------------------------------------------------


def test_the_radius_follows_the_learning_rate_between_bounds():
    optimizer = sam(rho=0.6)
    lr = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10, eta_min=0.01)
    radius = fastsam.ProportionalRho(optimizer, rho_min=0.1, lr_min=0.01)
    assert radii(optimizer) == [0.6, 0.6]
    for _ in range(10):
        optimizer.step(loss_of(optimizer))
        lr.step()
        radius.step()
        expected = 0.1 + 0.5 * (optimizer.param_groups[0]["lr"] - 0.01) / 0.09
        assert radii(optimizer) == pytest.approx([expected] * 2, rel=1e-12)
    assert radii(optimizer) == pytest.approx([0.1, 0.1])


def test_it_is_proportional_by_default():
    optimizer = sam()
    radius = fastsam.ProportionalRho(optimizer)
    for group, lr in zip(optimizer.param_groups, (0.05, 0.02), strict=True):
        group["lr"] = lr
    radius.step()
    assert radii(optimizer) == pytest.approx([0.1, 0.04], rel=1e-12)
    resumed = sam()
    for group in resumed.param_groups:
        group["lr"] = 0.05  # as loaded
    again = fastsam.ProportionalRho(resumed)
    again.load_state_dict(radius.state_dict())
    assert radii(resumed) == pytest.approx([0.1, 0.1], rel=1e-12)


@pytest.mark.parametrize("tensor", [False, True])
def test_a_learning_rate_outside_of_its_bounds(tensor):
    """Below by rounding or in a warm-up, or above: the radius stays between its own."""
    optimizer = sam()
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(1e-5, device=DEVICE) if tensor else 1e-5
        if tensor:
            group["rho"] = torch.tensor(0.2, device=DEVICE)
    radius = fastsam.ProportionalRho(optimizer, rho_min=0.1, lr_min=1e-3, lr_max=0.1)
    assert radii(optimizer) == pytest.approx([0.1, 0.1])
    for lr, rho in ((1e-3 - 1e-18, 0.1), (0.1, 0.2), (0.3, 0.2)):
        for group in optimizer.param_groups:
            group["lr"] = torch.tensor(lr, device=DEVICE) if tensor else lr
        radius.step()
        assert radii(optimizer) == pytest.approx([rho, rho])


def test_a_learning_rate_on_the_device():
    optimizer = sam(torch.tensor(0.2, device=DEVICE))
    for group in optimizer.param_groups:
        group["rho"] = torch.tensor(0.2, device=DEVICE)
        group["lr"] = torch.tensor(0.1, device=DEVICE)
    radius = fastsam.ProportionalRho(optimizer)
    for group in optimizer.param_groups:
        group["lr"].fill_(0.025)
    radius.step()
    assert radii(optimizer) == pytest.approx([0.05, 0.05], rel=1e-6)


# --- tail -----------------------------------------------------------------------------------------


def test_tail():
    optimizer = sam()
    radius = fastsam.tail(optimizer, 20, fraction=0.5, ramp=0.4)
    seen = []
    for _ in range(20):
        calls = 0

        def closure():
            nonlocal calls
            calls += 1
            return loss_of(optimizer)()

        seen.append(radii(optimizer)[0])
        optimizer.step(closure)
        radius.step()
        assert calls == (1 if len(seen) <= 10 else 2)
    assert seen[10:] == pytest.approx([0.05, 0.1, 0.15, *[0.2] * 7])


@pytest.mark.parametrize("fraction, start", [(1.0, 0), (0.3, 7), (0.01, 9)])
def test_where_the_tail_begins(fraction, start):
    optimizer = sam(start=3, stop=5)
    fastsam.tail(optimizer, 10, fraction=fraction, ramp=0.0)
    assert (optimizer.start, optimizer.stop) == (start, None)
    assert radii(optimizer) == [0.2, 0.2]


def test_a_tail_resumed_is_the_tail():
    def run(optimizer, radius, steps):
        for _ in range(steps):
            optimizer.step(loss_of(optimizer))
            radius.step()

    whole = sam()
    radius = fastsam.tail(whole, 12, fraction=0.5, ramp=1.0)
    run(whole, radius, 8)
    saved = copy.deepcopy((whole.state_dict(), radius.state_dict()))
    weights = [group["params"][0].detach().clone() for group in whole.param_groups]
    run(whole, radius, 4)
    resumed = sam()
    for group, w in zip(resumed.param_groups, weights, strict=True):
        group["params"][0].data.copy_(w)
    resumed.load_state_dict(saved[0])
    radius = fastsam.tail(resumed, 12, fraction=0.5, ramp=1.0)
    radius.load_state_dict(saved[1])
    run(resumed, radius, 4)
    for one, other in zip(whole.param_groups, resumed.param_groups, strict=True):
        assert torch.equal(one["params"][0], other["params"][0])


@pytest.mark.parametrize("comes_before_the_state", [False, True])
def test_a_tail_called_in_mid_run_counts_the_optimizers_steps(comes_before_the_state):
    """Without the schedule's state: the rise is where it is in a run that was not interrupted."""
    whole = sam()
    for _ in range(4):
        whole.step(loss_of(whole))
    resumed = sam()
    if not comes_before_the_state:
        resumed.load_state_dict(whole.state_dict())
    radius = fastsam.tail(resumed, 12, fraction=0.5, ramp=0.5)
    if comes_before_the_state:
        resumed.load_state_dict(whole.state_dict())
    seen = []
    for _ in range(4, 12):
        seen.append(radii(resumed)[0])
        resumed.step(loss_of(resumed))
        radius.step()
    assert seen[2:] == pytest.approx([0.2 / 3, 0.4 / 3, *[0.2] * 4])
    assert radius.state_dict()["steps"] == 12


# --- what is refused ------------------------------------------------------------------------------


def lets():
    return fastsam.LETS(sam())


REFUSED = [
    (lambda: fastsam.LambdaRho(lets(), lambda t: 1.0), TypeError, "LETS learns its own"),
    (lambda: fastsam.LambdaRho(torch.optim.SGD(groups(2)), lambda t: 1.0), TypeError,
     "optimizer must be one of fastsam's, got"),
    (lambda: fastsam.LambdaRho(sam(), 0.5), TypeError, "rho_lambda must be callable, got 0.5"),
    (lambda: fastsam.LambdaRho(sam(), [lambda t: 1.0]), ValueError,
     "a function for each of 2 groups, got 1"),
    (lambda: fastsam.LambdaRho(sam(), lambda t: 1.0, key="sigma"), ValueError, "got 'sigma'"),
    (lambda: fastsam.ProportionalRho(sam(), rho_min=-1.0), ValueError, "rho_min must be at least"),
    (lambda: fastsam.ProportionalRho(sam(), lr_min=0.1), ValueError,
     "lr_max must be above lr_min=0.1, got 0.1"),
    (lambda: fastsam.tail(sam(), 0), ValueError, "total_steps must be an integer of at least 1"),
    (lambda: fastsam.tail(sam(), 10, fraction=0.0), ValueError, r"fraction must be .*\(0, 1\]"),
    (lambda: fastsam.tail(sam(), 10, ramp=1.5), ValueError, r"ramp must be .*\[0, 1\]"),
    (lambda: fastsam.tail(lets(), 10), TypeError, "LETS learns its own"),
]  # fmt: skip


@pytest.mark.parametrize("make, error, words", REFUSED)
def test_refused(make, error, words):
    with pytest.raises(error, match=words):
        make()


def test_a_schedule_of_ones_own_defines_rho_of():
    with pytest.raises(NotImplementedError, match="must define rho_of"):
        fastsam.RhoScheduler(sam())
