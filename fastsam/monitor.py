"""Watching a run: what its steps measure, kept on the device until a report reads it."""

import csv
import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from numbers import Real
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .analysis.landscape import check_matplotlib
from .explicit import uncompiled
from .kernels import table
from .methods.lets import LETS
from .optimizer import SharpnessAwareOptimizer
from .step.arguments import Integer, shown
from .step.hooks import Observer

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Steps whose values lie side by side on the device before they are added up there.
ROWS = 256
#: What a metric counts since the beginning, so that its last value is what there is to say.
COUNTS = ("skipped",)
#: What a report has besides values.
FIELDS = ("epoch", "step", "steps", "not_finite")
#: What metrics can be called: no value of the user's may have such a name.
METRICS = ("grad_norm", "momentum_norm", "perturbed_grad_norm", "renormalization", "rho", "lam",
           "sharpness", "step_size", "perturbed_loss", "hypergradient", "validation_gap",
           "perturbed", *COUNTS)  # fmt: skip


@dataclass(frozen=True)
class Report:
    """The steps from one report to the next; as text, a line.

    Attributes:
        step: How many steps the optimizer has taken since the beginning of the training.
        epoch: What :meth:`fastsam.Monitor.report` was given; None if nothing.
        steps: How many steps the means are over.
        not_finite: How many values were not finite, and are in no mean.
        values: By name: the mean over those of the steps that have the value, NaN where none of
            them was finite; of ``skipped`` the last value, which counts from the beginning of the
            training; and what :meth:`fastsam.Monitor.report` was given, as it is.
    """

    step: int
    epoch: float | str | None = None
    steps: int = 0
    not_finite: int = 0
    values: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        place = f"step {self.step}"
        if self.epoch is not None:
            place = f"epoch {self.epoch}, {place}"
        parts = [f"{name} {value:.4g}" for name, value in self.values.items()]
        if self.not_finite:
            values = "value was" if self.not_finite == 1 else "values were"
            parts.append(f"{self.not_finite} {values} not finite")
        return f"{place}: {', '.join(parts) or 'no steps'}"


class Monitor:
    """Watches an optimizer: the norms, radius and whatever else its steps measure, by epoch.

    A monitor collects ``optimizer.metrics`` after every step, from the moment it is made. It serves
    all kinds of steps: ``step``, ``first_step`` and ``second_step``, ``plain_step``,
    ``step_micro_batches`` and :func:`graphed`. :meth:`report` gives the means since the last
    report; :meth:`to_csv` and :meth:`plot` show all reports, and :meth:`write` writes the last one
    to TensorBoard.

    Values mean the same as in ``optimizer.metrics``: norms are those of unscaled gradients before
    they are clipped, and nothing is measured for the monitor that the step does not need. After
    ``step_micro_batches`` they are those of the last micro-batch. ``perturbed`` is the share of the
    steps that were sharpness-aware. A step that raises an error is not counted. Means leave out
    values that are not finite, as in a step that is skipped for a loss scale.

    In distributed training each rank watches its own optimizer. A report needs no communication, so
    that one rank can report alone.

    Cost: no step waits for the device. Each copies its values to a table on the device, which has
    room for 256 steps and is added up there when it is full. On a GPU that is some four launches a
    step, of a few bytes. A report waits for the device once.

    Args:
        optimizer: One of fastsam's.
        history: How many reports are kept, at least 1. The oldest are dropped. Default 10,000.

    Raises:
        TypeError: If ``optimizer`` is another one.
        ValueError: If ``history`` is out of range.

    Example:
        >>> optimizer = fastsam.SAM(model.parameters(), torch.optim.SGD, lr=0.1, perturb_every=2)
        >>> monitor = fastsam.Monitor(optimizer)
        >>> for epoch in range(2):
        ...     for _ in range(4):
        ...         monitor.record(loss=optimizer.step(closure))
        ...     report = monitor.report(epoch)  # printed, it is one line
        >>> report.step, report.values["perturbed"]
        (8, 0.5)
        >>> figure = monitor.plot(["loss", "grad_norm"])
    """

    def __init__(self, optimizer: SharpnessAwareOptimizer | LETS, history: int = 10_000):
        if not isinstance(optimizer, (SharpnessAwareOptimizer, LETS)):
            inner = getattr(optimizer, "optimizer", None)
            hint = ""
            if isinstance(inner, (SharpnessAwareOptimizer, LETS)):
                hint = "; give it the one that this holds, its attribute optimizer"
            raise TypeError(f"optimizer must be one of fastsam's, got {shown(optimizer)}{hint}")
        Integer(1)("history", history)
        self.optimizer = optimizer
        self._reports: deque[Report] = deque(maxlen=history)
        self._tables: dict[tuple[Any, ...], _Table] = {}
        self._carried: dict[str, _Sum] = {}  # of steps before a state dict was made
        self._steps = 0
        self._handle = optimizer.register_step_post_hook(Observer(self._look))

    @property
    def reports(self) -> list[Report]:
        """The reports so far, the oldest first; each has ``step``, ``epoch`` and ``values``."""
        return list(self._reports)

    # --- in the loop ---

    @uncompiled
    @torch.no_grad()
    def collect(self) -> None:
        """Collect ``optimizer.metrics`` as those of one more step.

        This happens by itself after every step. Call it only after replays of a CUDA graph that you
        have captured yourself, of which the monitor is not told.
        """
        metrics = self.optimizer.metrics
        if metrics:
            self._steps += 1
            self._take(metrics)

    @uncompiled
    @torch.no_grad()
    def record(self, **values: Tensor | float) -> None:
        """Collect values of your own, such as the loss: the report has their means.

        A tensor is copied on its device, which is not waited for::

            monitor.record(loss=optimizer.step(closure))

        Args:
            **values: Numbers, or tensors of one element.

        Raises:
            ValueError: If a value is something else, or has the name of a metric or of a part of
                the report. Nothing is collected then.
        """
        self._check_names(values)
        self._take({name: as_scalar(name, value) for name, value in values.items()})

    @torch.no_grad()
    def report(self, epoch: float | str | None = None, **values: Tensor | float) -> Report:
        """The means since the last report. Printed, it is one line.

        Args:
            epoch: What the report is called: a number or a name. Default None: its step says it.
            **values: Numbers, or tensors of one element, that the report has as they are, such as
                a test accuracy.

        Returns:
            The report, which is also kept: see :attr:`reports`.

        Raises:
            TypeError: If ``epoch`` is something else.
            ValueError: If a value is something else, or has the name of a metric, of a part of the
                report, or of what :meth:`record` was given. No report is made then.
        """
        if not (epoch is None or isinstance(epoch, (int, float, str))):
            raise TypeError(f"epoch must be a number, a name or None, got {shown(epoch)}")
        self._check_names(values)
        given = {name: float(as_scalar(name, value)) for name, value in values.items()}
        sums = self._read()
        if twice := sums.keys() & given.keys():
            raise ValueError(f"report was given {min(twice)!r}, and so was record")
        means = {name: part.value(name) for name, part in sums.items()}
        report = Report(
            self._taken, epoch, self._steps, sum(part.not_finite for part in sums.values()),
            means | given,
        )  # fmt: skip
        self._forget()
        self._reports.append(report)
        return report

    def remove(self) -> None:
        """Stop collecting. What has been collected can still be reported."""
        self._handle.remove()

    # --- what is left of a run ---

    def to_csv(self, path: "str | PathLike[str]") -> None:
        """Write the reports that are kept, a line each, under their names.

        The first columns are ``epoch``, ``step``, ``steps`` and ``not_finite``. A field is empty
        where a report has no such value.

        Args:
            path: Of the file, which is written anew.
        """
        names = self._names()
        with open(path, "w", newline="", encoding="utf-8") as file:
            out = csv.writer(file)
            out.writerow([*FIELDS, *names])
            for report in self._reports:
                fields = ["" if (x := getattr(report, key)) is None else x for key in FIELDS]
                out.writerow([*fields, *(report.values.get(name, "") for name in names)])

    def write(self, writer: Any, prefix: str = "fastsam/") -> None:
        """Write the last report to TensorBoard, a scalar for each value.

        Args:
            writer: A ``torch.utils.tensorboard.SummaryWriter``, or what has its ``add_scalar(name,
                value, step)``.
            prefix: What the names begin with. Default ``"fastsam/"``.

        Raises:
            TypeError: If ``writer`` is something else.
            RuntimeError: Before the first report.
        """
        if not callable(getattr(writer, "add_scalar", None)):
            raise TypeError(f"writer must have a method add_scalar, got {shown(writer)}")
        self._check_reported("write")
        last = self._reports[-1]
        for name, value in last.values.items():
            writer.add_scalar(prefix + name, value, last.step)

    def plot(self, names: Sequence[str] | None = None) -> "Figure":
        """Draw the values of the reports that are kept against the step, a panel for each name.

        Args:
            names: Of the values. Default None: all that there are.

        Returns:
            A matplotlib figure, which pyplot does not know of; ``savefig`` writes it.

        Raises:
            ImportError: If matplotlib is not installed.
            RuntimeError: Before the first report.
            ValueError: If no report has a value of such a name.
        """
        check_matplotlib()
        self._check_reported("plot")
        known = self._names()
        if isinstance(names, str):
            names = [names]
        names = known if names is None else list(names)
        for name in names:
            if name not in known:
                raise ValueError(f"names must be among {', '.join(known)}, got {shown(name)}")
        if not names:
            raise ValueError("names must have at least one, and the reports have no values")
        from matplotlib.figure import Figure

        columns = min(3, len(names))
        rows = -(-len(names) // columns)
        figure = Figure(figsize=(4 * columns, 2.6 * rows), layout="constrained")
        panels = figure.subplots(rows, columns, squeeze=False).flat
        for panel, name in zip(panels, names, strict=False):
            points = [(r.step, r.values[name]) for r in self._reports if name in r.values]
            panel.plot(*zip(*points, strict=True), marker="." if len(points) < 50 else "")
            panel.set(xlabel="step", title=name)
            panel.grid(alpha=0.3)
        for panel in figure.axes[len(names) :]:
            panel.remove()
        return figure

    # --- saving ---

    def state_dict(self) -> dict[str, Any]:
        """The reports, and what has been collected since the last one.

        ``torch.load`` reads it with ``weights_only=True``. Making it waits for the device.
        """
        return {
            "reports": [asdict(report) for report in self._reports],
            "steps": self._steps,
            "sums": {name: asdict(part) for name, part in self._read().items()},
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on where a monitor was saved; what this one has is dropped.

        Raises:
            ValueError: If the state dict is not a monitor's. Nothing has changed then.
        """
        try:
            reports = [Report(**report) for report in state_dict["reports"]]
            carried = {str(name): _Sum(**part) for name, part in state_dict["sums"].items()}
            steps = int(state_dict["steps"])
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                "state_dict must be a monitor's, with reports, steps and sums: "
                f"{type(error).__name__}: {error}"
            ) from error
        self._forget()
        self._reports = deque(reports, maxlen=self._reports.maxlen)
        self._carried, self._steps = carried, steps

    # --- parts of the above ---

    @property
    def _stepped(self) -> SharpnessAwareOptimizer:
        """The optimizer that counts."""
        return self.optimizer.optimizer if isinstance(self.optimizer, LETS) else self.optimizer

    @property
    def _taken(self) -> int:
        """How many steps it has taken."""
        return int(self._stepped.kept["t"]) - 1

    def _look(self) -> None:
        """After a call of ``step`` or the like."""
        stepped = self._stepped
        # Checkpoints call step without a closure, before any, for the state that it creates. What
        # is launched under capture runs in replays, whose rows in the table would be the same.
        vector = stepped._passes.scalars.vector
        if stepped._last is None or vector is None or table.is_capturing(vector.device):
            return
        self.collect()

    def _take(self, values: Mapping[str, Tensor]) -> None:
        """Copy 0-dim tensors to the tables of their devices."""
        devices = dict.fromkeys(value.device for value in values.values())
        for device in devices:
            here = {name: value for name, value in values.items() if value.device == device}
            key = device, *here
            if key not in self._tables:
                self._tables[key] = _Table(list(here), device)
            self._tables[key].add(list(here.values()))

    def _read(self) -> "dict[str, _Sum]":
        """What has been collected since the last report, by name."""
        found = {name: part for name, part in self._carried.items()}
        by_device: dict[torch.device, list[_Table]] = {}
        for one in self._tables.values():
            if one.steps:
                by_device.setdefault(one.device, []).append(one)
        for tables in by_device.values():
            numbers = iter(torch.cat([one.totals().flatten() for one in tables]).tolist())
            for one in tables:
                sums, counts, lasts = ([next(numbers) for _ in one.names] for _ in range(3))
                for name, *part in zip(one.names, sums, counts, lasts, strict=True):
                    new = _Sum(part[0], int(part[1]), part[2], one.steps)
                    found[name] = found[name] + new if name in found else new
        return found

    def _forget(self) -> None:
        for one in self._tables.values():
            one.clear()
        self._carried = {}
        self._steps = 0

    def _names(self) -> list[str]:
        """Of all values that the reports have, in the order in which they came."""
        return list(dict.fromkeys(name for report in self._reports for name in report.values))

    def _check_names(self, names: Iterable[str]) -> None:
        for name in names:
            if name in FIELDS or name in METRICS:
                what = "a part of the report" if name in FIELDS else "a metric"
                raise ValueError(f"a value must not have the name of {what}, got {name!r}")

    def _check_reported(self, call: str) -> None:
        if not self._reports:
            raise RuntimeError(f"there is nothing to {call}: call report first")


def as_scalar(name: str, value: Any) -> Tensor:
    """A value of the user's as a 0-dim tensor, where it is."""
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex():
        return value.detach().reshape(()).to(_dtype_on(value.device))
    if isinstance(value, Real):
        return torch.full((), float(value), dtype=torch.float64, device="cpu")
    raise ValueError(f"{name} must be a number or a tensor of one element, got {shown(value)}")


def _dtype_on(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # Apple's GPUs have none


@dataclass(frozen=True)
class _Sum:
    """What is known of the values of one name.

    Attributes:
        total: Of those that are finite.
        count: How many these are.
        last: The last one, finite or not.
        steps: How many there are.
    """

    total: float
    count: int
    last: float
    steps: int

    def __add__(self, other: "_Sum") -> "_Sum":
        return _Sum(
            self.total + other.total, self.count + other.count, max(self.last, other.last),
            self.steps + other.steps,
        )  # fmt: skip

    @property
    def not_finite(self) -> int:
        return self.steps - self.count

    def value(self, name: str) -> float:
        """What a report says."""
        if name in COUNTS:
            return self.last
        return self.total / self.count if self.count else math.nan


class _Table:
    """Values of some names on one device: rows for single steps, and the sums of full tables.

    Args:
        names: Of the columns.
        device: Where the values are.
    """

    def __init__(self, names: list[str], device: torch.device) -> None:
        self.names, self.device = names, device
        self._rows = torch.zeros(ROWS, len(names), dtype=_dtype_on(device), device=device)
        # of each column: the sum of its finite values, how many these are, and its last value
        self._totals = self._rows.new_zeros(3, len(names))
        self._filled = 0
        self.steps = 0

    def add(self, values: list[Tensor]) -> None:
        """Copy a step's values into the next row."""
        if self._filled == ROWS:
            self.totals()
        row = self._rows[self._filled]
        torch.stack([value.to(row.dtype) for value in values], out=row)
        self._filled += 1
        self.steps += 1

    def totals(self) -> Tensor:
        """The sums over all steps, on the device."""
        if self._filled:
            rows = self._rows[: self._filled]
            finite = rows.isfinite()
            self._totals[0] += torch.where(finite, rows, 0).sum(0)
            self._totals[1] += finite.sum(0)
            self._totals[2] = rows[-1]
            self._filled = 0
        return self._totals

    def clear(self) -> None:
        self._totals.zero_()
        self._filled = self.steps = 0
