"""Watching a run: what its steps measure, kept on the device until a report reads it."""

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastsam.analysis.landscape import check_matplotlib
from fastsam.explicit import uncompiled
from fastsam.kernels import table
from fastsam.methods.lets import LETS
from fastsam.optimizer import SharpnessAwareOptimizer
from fastsam.step.arguments import Integer, shown
from fastsam.step.hooks import Observer

from .means import COUNTS, Sum, Table, as_scalar
from .reports import FIELDS, Report, draw, write_csv

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["METRICS", "Monitor", "Report"]

#: What metrics can be called: no value of the user's may have such a name.
METRICS = ("grad_norm", "momentum_norm", "perturbed_grad_norm", "renormalization", "rho", "lam",
           "sharpness", "step_size", "perturbed_loss", "hypergradient", "validation_gap",
           "perturbed", *COUNTS)  # fmt: skip


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
        TypeError: If ``optimizer`` is not one of fastsam's.
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
        self._tables: dict[tuple[Any, ...], Table] = {}
        self._carried: dict[str, Sum] = {}  # of steps before a state dict was made
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
        write_csv(self._reports, path)

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
        return draw(self._reports, names)

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
            carried = {str(name): Sum(**part) for name, part in state_dict["sums"].items()}
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
                self._tables[key] = Table(list(here), device)
            self._tables[key].add(list(here.values()))

    def _read(self) -> "dict[str, Sum]":
        """What has been collected since the last report, by name."""
        found = {name: part for name, part in self._carried.items()}
        by_device: dict[torch.device, list[Table]] = {}
        for one in self._tables.values():
            if one.steps:
                by_device.setdefault(one.device, []).append(one)
        for tables in by_device.values():
            numbers = iter(torch.cat([one.totals().flatten() for one in tables]).tolist())
            for one in tables:
                sums, counts, lasts = ([next(numbers) for _ in one.names] for _ in range(3))
                for name, *part in zip(one.names, sums, counts, lasts, strict=True):
                    new = Sum(part[0], int(part[1]), part[2], one.steps)
                    found[name] = found[name] + new if name in found else new
        return found

    def _forget(self) -> None:
        for one in self._tables.values():
            one.clear()
        self._carried = {}
        self._steps = 0

    def _check_names(self, names: Iterable[str]) -> None:
        for name in names:
            if name in FIELDS or name in METRICS:
                what = "a part of the report" if name in FIELDS else "a metric"
                raise ValueError(f"a value must not have the name of {what}, got {name!r}")

    def _check_reported(self, call: str) -> None:
        if not self._reports:
            raise RuntimeError(f"there is nothing to {call}: call report first")


# under these names in monitors that earlier versions pickled
_Sum, _Table = Sum, Table
