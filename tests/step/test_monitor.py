"""``fastsam.Monitor``: means of what steps measure, in any loop, without waiting for the device."""

import copy
import csv
import io
import math

import numpy as np
import pytest
import torch

import fastsam
import fastsam.graphs
import fastsam.monitor
from fastsam.monitor import Report

from conftest import DEVICE
from graphs import Recorder, batches, cpu_only, problem
from reads import Reads, never_waiting
from registry import METHODS, OTHERS, create

SCALE = np.array([3.0, 1.0, 0.5])
START = np.array([1.0, -2.0, 0.25])
LR, RHO = 0.1, 0.2


class Loop:
    """Steps on the loss (scale * w**2).sum() / 2, in float64."""

    def __init__(self, cls=fastsam.SAM, backend="torch", **kwargs):
        self.w = torch.nn.Parameter(torch.tensor(START, device=DEVICE))
        self.scale = torch.tensor(SCALE, device=DEVICE)
        settings = {"lr": LR, "rho": RHO, "backend": backend} | kwargs
        bases = () if cls is fastsam.SAMSPS else (torch.optim.SGD,)
        if cls is fastsam.SAMSPS:
            settings["lr_max"] = settings.pop("lr")
        self.optimizer = cls([self.w], *bases, **settings)

    def closure(self):
        loss = (self.scale * self.w**2).sum() / 2
        loss.backward()
        return loss

    def steps(self, count):
        for _ in range(count):
            self.optimizer.step(self.closure)


def sam_by_hand(steps, rhos=None, clip=math.inf):
    """Norms of both gradients in every step, in float64."""
    w, norms = START.copy(), []
    for t in range(steps):
        rho = RHO if rhos is None else rhos[t]
        g = SCALE * w
        e = rho * g / np.linalg.norm(g)
        second = SCALE * (w + e)
        norms.append((np.linalg.norm(g), np.linalg.norm(second)))
        w = w - LR * second * min(1, clip / (np.linalg.norm(second) + 1e-6))
    return np.array(norms)


# --- what a report says ---------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
def test_means_are_those_of_the_steps_since_the_last_report(backend):
    """And norms are those before clipping."""
    loop = Loop(backend=backend, max_grad_norm=0.5)
    monitor = fastsam.Monitor(loop.optimizer)
    expected = sam_by_hand(7, rhos=[RHO] * 3 + [0.05] * 4, clip=0.5)
    loop.steps(3)
    first = monitor.report(1)
    loop.optimizer.param_groups[0]["rho"] = 0.05
    loop.steps(4)
    second = monitor.report("two")
    for report, part, rho in ((first, expected[:3], RHO), (second, expected[3:], 0.05)):
        norms, perturbed = part.mean(0)
        assert report.steps == len(part) and report.not_finite == 0
        assert report.values == pytest.approx(
            {"grad_norm": norms, "perturbed_grad_norm": perturbed, "rho": rho, "perturbed": 1},
            rel=1e-12,
        )  # fmt: skip
    assert [(r.epoch, r.step) for r in monitor.reports] == [(1, 3), ("two", 7)]
    assert monitor.reports == [first, second]


def test_lam_and_sharpness_of_samar():
    loop = Loop(fastsam.SAMAR, lam=0.8, rule=lambda lam, s, before: 0.5 * lam + s)
    monitor = fastsam.Monitor(loop.optimizer)
    loop.steps(6)
    w, lam, lams, rises = START.copy(), 0.8, [], []
    for t in range(6):
        g = SCALE * w
        e = RHO * g / np.linalg.norm(g)
        second = SCALE * (w + e)
        rise = (g + second) @ e / 2
        lams.append(lam)
        rises.append(rise)
        w = w - LR * ((1 - lam) * g + lam * second)
        if t:  # the first measurement leaves it
            lam = 0.5 * lam + rise
    values = monitor.report().values
    assert values["lam"] == pytest.approx(np.mean(lams), rel=1e-12)
    assert values["sharpness"] == pytest.approx(np.mean(rises), rel=1e-12)


def test_values_of_ones_own():
    loop = Loop()
    monitor = fastsam.Monitor(loop.optimizer)
    losses = []
    for t in range(3):
        loss = loop.optimizer.step(loop.closure)
        monitor.record(loss=loss, t=t)
        losses.append(loss.item())
    assert losses[0] == pytest.approx((SCALE * START**2).sum() / 2)
    values = monitor.report(accuracy=torch.tensor([90.5])).values
    assert values["loss"] == pytest.approx(np.mean(losses), rel=1e-12)
    assert values["t"] == 1 and values["accuracy"] == 90.5
    assert list(values)[-3:] == ["loss", "t", "accuracy"]
    assert "loss" not in monitor.report().values


@pytest.mark.parametrize("rows", [1, 4])
def test_means_over_more_steps_than_the_table_has_rows(rows, monkeypatch):
    monkeypatch.setattr(fastsam.monitor.means, "ROWS", rows)
    loop = Loop(perturb_every=2)
    monitor = fastsam.Monitor(loop.optimizer)
    for t in range(11):
        loop.steps(1)
        monitor.record(square=t**2)
    report = monitor.report()
    assert report.steps == 11 and report.values["square"] == np.mean(np.arange(11) ** 2)
    assert report.values["perturbed"] == pytest.approx(6 / 11)
    assert [table._rows.shape[0] for table in monitor._tables.values()] == [rows] * 3


def test_norms_of_a_step_of_the_base_are_in_no_mean():
    loop = Loop(perturb_every=2)
    monitor = fastsam.Monitor(loop.optimizer)
    norms = []
    for _ in range(4):
        loop.steps(1)
        norms += [float(x) for name, x in loop.optimizer.metrics.items() if name == "grad_norm"]
    report = monitor.report()
    assert len(norms) == 2 and report.values["grad_norm"] == pytest.approx(np.mean(norms))
    assert report.values["perturbed"] == 0.5 and report.steps == 4


def test_skipped_steps_are_counted_and_spoil_no_mean():
    loop = Loop(skip_nonfinite=True)
    monitor = fastsam.Monitor(loop.optimizer)
    scale = loop.scale.clone()
    for t in range(5):
        loop.scale.copy_(scale if t not in (1, 3) else torch.full_like(scale, math.inf))
        loop.steps(1)
        if t == 2:
            first = monitor.report()
    second = monitor.report()
    assert (first.values["skipped"], second.values["skipped"]) == (1, 2)
    expected = sam_by_hand(3)[:, 0]  # of the steps that were taken
    assert first.values["grad_norm"] == pytest.approx(expected[:2].mean(), rel=1e-12)
    assert second.values["grad_norm"] == pytest.approx(expected[2], rel=1e-12)
    assert first.not_finite >= 1 and "not finite" in str(first)
    loop.scale.fill_(math.inf)
    loop.steps(1)
    assert math.isnan(monitor.report().values["grad_norm"])


@pytest.mark.parametrize("name", sorted(METHODS | OTHERS))
def test_metrics_of_every_method(name):
    params = [torch.nn.Parameter(torch.ones(s, device=DEVICE)) for s in ((5,), (2, 3))]
    optimizer = create(name, params, "torch", (METHODS | OTHERS)[name].bases[0])
    monitor = fastsam.Monitor(optimizer)

    def closure():
        loss = sum((p * p).sum() for p in params)
        loss.backward()
        return loss

    optimizer.step(closure)
    expected = {key: float(x) for key, x in optimizer.metrics.items()}
    assert set(expected) <= set(fastsam.monitor.METRICS)
    assert monitor.report().values == pytest.approx(expected, nan_ok=True)


def test_lets():
    loop = Loop()
    optimizer = fastsam.LETS(loop.optimizer, hessian="difference")
    monitor = fastsam.Monitor(optimizer)
    radii = []
    for _ in range(3):
        optimizer.step(loop.closure, loop.closure)
        radii.append(float(optimizer.metrics["rho"]))
    report = monitor.report()
    assert report.step == report.steps == 3
    assert report.values["rho"] == pytest.approx(np.mean(radii), rel=1e-6)
    assert {"hypergradient", "validation_gap"} <= report.values.keys()


def test_line():
    report = Report(190, 3, 19, 2, {"grad_norm": 1.23456, "rho": 0.05, "skipped": 2.0})
    assert str(report) == (
        "epoch 3, step 190: grad_norm 1.235, rho 0.05, skipped 2, 2 values were not finite"
    )
    assert str(Report(7)) == "step 7: no steps"
    monitor = fastsam.Monitor(Loop().optimizer)
    assert str(monitor.report(0)) == "epoch 0, step 0: no steps"


# --- loops ----------------------------------------------------------------------------------------


def by_closure(loop):
    loop.optimizer.step(loop.closure)


def by_halves(loop):
    loop.closure()
    loop.optimizer.first_step(zero_grad=True)
    loop.closure()
    loop.optimizer.second_step(zero_grad=True)


def by_micro_batches(loop):
    loop.optimizer.step_micro_batches([loop.closure, loop.closure])


@pytest.mark.parametrize("take", [by_halves, by_micro_batches])
def test_every_kind_of_step_is_taken_in_once(take):
    reports = []
    for way in (by_closure, take):
        loop = Loop()
        monitor = fastsam.Monitor(loop.optimizer)
        for _ in range(3):
            way(loop)
        reports.append(monitor.report())
    assert reports[0].steps == reports[1].steps == reports[1].step == 3
    assert reports[1].values == pytest.approx(reports[0].values, rel=1e-12)


def test_plain_steps():
    loop = Loop()
    monitor = fastsam.Monitor(loop.optimizer)
    loop.closure()
    loop.optimizer.plain_step(zero_grad=True)
    report = monitor.report()
    assert report.steps == 1 and report.values["perturbed"] == 0


def test_a_step_that_fails_is_not_taken_in():
    loop = Loop()
    monitor = fastsam.Monitor(loop.optimizer)
    loop.steps(1)
    with pytest.raises(ZeroDivisionError):
        loop.optimizer.step(lambda: 1 / 0)
    loop.closure()
    loop.optimizer.first_step(zero_grad=True)
    loop.optimizer.restore()
    report = monitor.report()
    assert report.steps == report.step == 1


def test_a_call_of_step_for_the_state_alone_is_no_step():
    """As ``torch.distributed.checkpoint`` calls it."""
    loop = Loop(momentum=0.9, lr=0.0)
    monitor = fastsam.Monitor(loop.optimizer)
    loop.w.grad = torch.zeros_like(loop.w)
    loop.optimizer.step()
    assert loop.optimizer.state
    assert monitor.report().steps == 0


def test_several_monitors_copies_and_removal():
    loop = Loop()
    one, other = (fastsam.Monitor(loop.optimizer) for _ in range(2))
    loop.steps(2)
    copied = copy.deepcopy(loop.optimizer)  # hooks stay behind, as in torch
    copied.step(lambda: copied.param_groups[0]["params"][0].sum().backward())
    one.remove()
    loop.steps(1)
    assert (one.report().steps, other.report().steps) == (2, 3)


def test_only_so_many_reports_are_kept():
    loop = Loop()
    monitor = fastsam.Monitor(loop.optimizer, history=3)
    for epoch in range(5):
        loop.steps(1)
        monitor.report(epoch)
    assert [(r.epoch, r.step) for r in monitor.reports] == [(2, 3), (3, 4), (4, 5)]


@cpu_only
def test_replays_of_a_graphed_step_are_taken_in(monkeypatch):
    reports = []
    for is_graphed in (False, True):
        model, optimizer, x, closure = problem("SAM + SGD")
        monitor = fastsam.Monitor(optimizer)

        def tensors(optimizer=optimizer):
            yield from (p for group in optimizer.param_groups for p in group["params"])
            yield from (x for state in optimizer.state.values() for x in state.values())
            yield optimizer._passes.scalars.vector

        step = lambda optimizer=optimizer, closure=closure: optimizer.step(closure)  # noqa: E731
        if is_graphed:
            monkeypatch.setattr(fastsam.graphs, "Recorder", Recorder(tensors, monkeypatch))
            step = fastsam.graphed(optimizer, closure, warmup=2)
        for batch in batches(4):
            x.copy_(batch)
            step()
        reports.append(monitor.report())
    assert step.is_captured and reports[1].steps == 4
    assert reports[1] == reports[0]


@cpu_only
def test_a_replay_of_ones_own_is_taken_in_where_it_is_said():
    loop = Loop()
    monitor = fastsam.Monitor(loop.optimizer)
    loop.steps(2)
    norm = float(loop.optimizer.metrics["grad_norm"])
    monitor.report()
    monitor.collect()
    report = monitor.report()
    assert report.steps == 1 and report.values["grad_norm"] == norm


# --- the device -----------------------------------------------------------------------------------


def test_no_step_reads_from_the_device(monkeypatch):
    """Nor does a table that is full."""
    monkeypatch.setattr(fastsam.monitor.means, "ROWS", 2)
    loop = Loop(fastsam.SAMAR, backend="triton", perturb_every=2, skip_nonfinite=True)
    monitor = fastsam.Monitor(loop.optimizer)
    with Reads() as reads:
        for _ in range(5):
            monitor.record(loss=loop.optimizer.step(loop.closure))
    assert reads.seen == []
    assert monitor.report().steps == 5


@pytest.mark.gpu
def test_gpu_is_never_waited_for():
    loop = Loop(fastsam.SAMAR, backend="triton", perturb_every=2, skip_nonfinite=True)
    monitor = fastsam.Monitor(loop.optimizer)
    loop.steps(2)  # compiles
    with never_waiting():
        for _ in range(5):
            monitor.record(loss=loop.optimizer.step(loop.closure))
    assert monitor.report().steps == 7


# --- what is left of a run ------------------------------------------------------------------------


@pytest.fixture
def watched():
    loop = Loop(perturb_every=2, start=1)
    monitor = fastsam.Monitor(loop.optimizer)
    for epoch, steps in enumerate((1, 3, 2)):
        loop.steps(steps)
        monitor.report(epoch, **({"accuracy": 10.0 * epoch} if epoch else {}))
    return monitor


def test_csv_has_the_reports(watched, tmp_path):
    watched.to_csv(tmp_path / "run.csv")
    with (tmp_path / "run.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert list(lines[0])[:4] == ["epoch", "step", "steps", "not_finite"]
    assert lines[0]["grad_norm"] == lines[0]["accuracy"] == ""  # a step of the base alone
    for line, report in zip(lines, watched.reports, strict=True):
        assert int(line["epoch"]) == report.epoch and int(line["step"]) == report.step
        found = {name: float(x) for name, x in line.items() if x and name in report.values}
        assert found == report.values  # all digits


def test_tensorboard_gets_the_last_report(watched):
    class Writer:
        def __init__(self):
            self.scalars = []

        def add_scalar(self, tag, scalar_value, global_step=None):
            self.scalars.append((tag, scalar_value, global_step))

    writer, last = Writer(), watched.reports[-1]
    watched.write(writer)
    assert writer.scalars == [(f"fastsam/{k}", x, 6) for k, x in last.values.items()]
    watched.write(writer, prefix="")
    assert writer.scalars[-1] == ("accuracy", 20.0, 6)


def test_tensorboard_reads_what_was_written(watched, tmp_path):
    pytest.importorskip("tensorboard", reason="needs tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(tmp_path) as writer:
        watched.write(writer)
    events, last = EventAccumulator(str(tmp_path)).Reload(), watched.reports[-1]
    assert set(events.Tags()["scalars"]) == {f"fastsam/{name}" for name in last.values}
    for name, value in last.values.items():
        (event,) = events.Scalars(f"fastsam/{name}")
        assert (event.step, event.value) == (last.step, np.float32(value))  # it keeps float32


def test_plot_draws_the_reports(watched):
    figure = watched.plot()
    reports = watched.reports
    names = list(dict.fromkeys(name for r in reports for name in r.values))
    assert [axes.get_title() for axes in figure.axes] == names and "grad_norm" in names
    for axes, name in zip(figure.axes, names, strict=True):
        (line,) = axes.lines
        has = [r for r in reports if name in r.values]
        assert list(line.get_xdata()) == [r.step for r in has]
        assert list(line.get_ydata()) == [r.values[name] for r in has]
    assert [axes.get_title() for axes in watched.plot(["rho"]).axes] == ["rho"]


def test_a_run_in_two_parts_is_the_run():
    """Also one that is cut between two reports."""
    reports = []
    for cut in (False, True):
        loop = Loop(perturb_every=2)
        monitor = fastsam.Monitor(loop.optimizer)
        loop.steps(3)
        monitor.report(0)
        loop.steps(2)
        monitor.record(mine=1.0)
        if cut:
            buffer = io.BytesIO()
            torch.save(monitor.state_dict(), buffer)
            monitor.remove()
            monitor = fastsam.Monitor(loop.optimizer)
            buffer.seek(0)
            monitor.load_state_dict(torch.load(buffer, weights_only=True))
        loop.steps(2)
        monitor.record(mine=2.0)
        monitor.report(1, accuracy=50)
        reports.append(monitor.reports)
    assert [r.steps for r in reports[1]] == [3, 4]
    for one, other in zip(*reports, strict=True):
        assert one.values == pytest.approx(other.values, rel=1e-14)
    assert reports[1][1].values["mine"] == 1.5


# --- errors ---------------------------------------------------------------------------------------


def test_what_is_no_optimizer_of_fastsams_is_refused():
    sgd = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1)
    with pytest.raises(TypeError, match="optimizer must be one of fastsam's, got SGD"):
        fastsam.Monitor(sgd)

    class Wrapper:
        optimizer = Loop().optimizer

    with pytest.raises(TypeError, match="its attribute optimizer"):
        fastsam.Monitor(Wrapper())
    with pytest.raises(ValueError, match="history must be .*, got 0"):
        fastsam.Monitor(Wrapper.optimizer, history=0)


def test_bad_values_are_refused_and_change_nothing():
    loop = Loop()
    monitor = fastsam.Monitor(loop.optimizer)
    loop.steps(1)
    for call in (monitor.record, monitor.report):
        with pytest.raises(ValueError, match="name of a metric, got 'grad_norm'"):
            call(loss=1.0, grad_norm=2.0)
        with pytest.raises(ValueError, match="name of a part of the report, got 'step'"):
            call(step=3)
        for bad in ("high", None, 1j, torch.ones(2), torch.ones((), dtype=torch.complex64)):
            with pytest.raises(ValueError, match="loss must be a number or a tensor of one elem"):
                call(fine=1.0, loss=bad)
    with pytest.raises(TypeError, match=r"epoch must be a number, a name or None, got \[1\]"):
        monitor.report([1])
    monitor.record(loss=1.0)
    with pytest.raises(ValueError, match="report was given 'loss', and so was record"):
        monitor.report(loss=2.0)
    assert monitor.reports == []
    report = monitor.report()
    assert report.steps == 1 and report.values["loss"] == 1 and "fine" not in report.values


def test_bad_state_dicts_are_refused_and_change_nothing(watched):
    before, saved = watched.reports, watched.state_dict()
    for bad in ({}, saved | {"reports": [{"steps": 3, "what": 1}]}, saved | {"sums": {"rho": {}}},
                saved | {"steps": "many"}, {"state": {}, "param_groups": []}, []):  # fmt: skip
        with pytest.raises(ValueError, match="state_dict must be a monitor's"):
            watched.load_state_dict(bad)
    assert watched.reports == before


def test_what_needs_a_report_says_so(watched, tmp_path, monkeypatch):
    class Writer:
        add_scalar = print

    monitor = fastsam.Monitor(Loop().optimizer)
    with pytest.raises(RuntimeError, match="nothing to write: call report first"):
        monitor.write(Writer())
    with pytest.raises(TypeError, match="writer must have a method add_scalar, got 'runs'"):
        monitor.write("runs")
    with pytest.raises(RuntimeError, match="nothing to plot: call report first"):
        monitor.plot()
    with pytest.raises(ValueError, match="names must be among .*grad_norm.*, got 'lam'"):
        watched.plot(["rho", "lam"])
    monitor.to_csv(tmp_path / "empty.csv")
    assert (tmp_path / "empty.csv").read_text().split() == ["epoch,step,steps,not_finite"]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="a figure needs the package matplotlib"):
        watched.plot()


def test_parts_are_found_where_older_pickles_look_for_them():
    assert fastsam.monitor._Sum is fastsam.monitor.means.Sum
    assert fastsam.monitor._Table is fastsam.monitor.means.Table
