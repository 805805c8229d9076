"""What a monitor reports, as a line of text, a CSV file or a figure."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass, field
from os import PathLike
from typing import TYPE_CHECKING

from fastsam.step.arguments import shown

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: What a report has besides values.
FIELDS = ("epoch", "step", "steps", "not_finite")


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


def write_csv(reports: Sequence[Report], path: "str | PathLike[str]") -> None:
    """A line for each report; :meth:`fastsam.Monitor.to_csv` describes them."""
    names = names_of(reports)
    with open(path, "w", newline="", encoding="utf-8") as file:
        out = csv.writer(file)
        out.writerow([*FIELDS, *names])
        for report in reports:
            fields = ["" if (x := getattr(report, key)) is None else x for key in FIELDS]
            out.writerow([*fields, *(report.values.get(name, "") for name in names)])


def draw(reports: Sequence[Report], names: Sequence[str] | None) -> "Figure":
    """A figure with a panel for each name; :meth:`fastsam.Monitor.plot` describes it."""
    known = names_of(reports)
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
        points = [(r.step, r.values[name]) for r in reports if name in r.values]
        panel.plot(*zip(*points, strict=True), marker="." if len(points) < 50 else "")
        panel.set(xlabel="step", title=name)
        panel.grid(alpha=0.3)
    for panel in figure.axes[len(names) :]:
        panel.remove()
    return figure


def names_of(reports: Sequence[Report]) -> list[str]:
    """Of all values that the reports have, in the order in which they came."""
    return list(dict.fromkeys(name for report in reports for name in report.values))
