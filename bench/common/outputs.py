"""What ``train.py`` leaves behind: a table, CSVs and figures; the studies use its parts."""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastsam.analysis.landscape import Landscape
from fastsam.monitor import Report
from fastsam.monitor.reports import FIELDS

RADIUS = 0.05  # of the sharpness measurement: one value, so that the methods can be compared
SLICES = {"gradient": "distance along the gradient",
          "random": "along a random direction, filter-normalised"}  # fmt: skip
#: Of each optimizer, the slices of each seed that did not diverge.
Slices = dict[str, list[dict[str, Landscape]]]


class Row(NamedTuple):
    """One epoch of one run; a line of the CSV. Values that do not exist are NaN."""

    optimizer: str
    lr: float  # the first, before the cosine schedule lowers it
    rho: float
    seed: int
    epoch: int
    train_loss: float
    test_accuracy_percent: float
    seconds: float
    sharpness: float  # measured after the last epoch only
    label_noise: float = 0.0  # share of the training labels that are wrong


def describe_noise(noise: float) -> str:
    """A share of wrong labels, in words."""
    return f"{100 * noise:g} % of labels wrong" if noise else "clean labels"


def mean_std(values: list[float], digits: int) -> str:
    """Format mean ± sample standard deviation; a single value has none."""
    text = f"{statistics.fmean(values):.{digits}f}"
    return text + f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else text


def make_table(rows: list[Row]) -> str:
    """Return the state after the last epoch, one line per optimizer, as plain text.

    The figures of an optimizer are over the seeds that did not diverge; how many did is said. For
    several shares of wrong labels there is the test accuracy with each.
    """
    epochs = max(row.epoch for row in rows)
    if len(noises_of(rows)) > 1:
        return _table_of_noises([row for row in rows if row.epoch == epochs])
    lines = [["optimizer", "lr", "rho", "test accuracy (%)", "train loss",
              f"sharpness (radius {RADIUS})", "s/epoch", "diverged"]]  # fmt: skip
    for name in dict.fromkeys(row.optimizer for row in rows):
        last = [row for row in rows if row.optimizer == name and row.epoch == epochs]
        good = [row for row in last if math.isfinite(row.train_loss)]
        cells = ["-"] * 4
        if good:
            seconds = [r.seconds for r in rows if r.optimizer == name and r.seconds > 0]
            cells = [
                mean_std([row.test_accuracy_percent for row in good], 2),
                f"{statistics.fmean(row.train_loss for row in good):.3g}",
                f"{statistics.fmean(row.sharpness for row in good):.3g}",
                f"{statistics.median(seconds):.3f}",
            ]
        rho = "-" if math.isnan(last[0].rho) else f"{last[0].rho:g}"
        diverged = f"{len(last) - len(good)} of {len(last)}"
        lines.append([name, f"{last[0].lr:g}", rho, *cells, diverged])
    return align(lines)


def noises_of(rows: list[Row]) -> list[float]:
    """The shares of wrong labels, from the lowest."""
    return sorted({row.label_noise for row in rows})


def _table_of_noises(rows: list[Row]) -> str:
    noises = noises_of(rows)
    lines = [["test accuracy (%)", *map(describe_noise, noises), "lr", "rho", "diverged"]]
    for name in dict.fromkeys(row.optimizer for row in rows):
        own = [row for row in rows if row.optimizer == name]
        good = [row for row in own if math.isfinite(row.train_loss)]
        cells = []
        for noise in noises:
            values = [row.test_accuracy_percent for row in good if row.label_noise == noise]
            cells.append(mean_std(values, 2) if values else "-")
        rho = "-" if math.isnan(own[0].rho) else f"{own[0].rho:g}"
        diverged = f"{len(own) - len(good)} of {len(own)}"
        lines.append([name, *cells, f"{own[0].lr:g}", rho, diverged])
    return align(lines)


def align(lines: list[list[str]]) -> str:
    """Return lines of cells as plain text whose columns are aligned."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def write_csv(rows: list[Row], path: Path) -> None:
    """Write one line per optimizer, seed and epoch; an empty field is a value not measured."""
    write_lines([Row._fields, *rows], path)


def write_metrics(seen: list[tuple[str, float, int, Report]], path: Path) -> None:
    """Write one line per report of a monitor, of which it is said whose it is.

    Args:
        seen: Optimizer, share of wrong labels, seed, and a report.
        path: Of the CSV.
    """
    names = list(dict.fromkeys(name for *_, report in seen for name in report.values))
    lines: list[Sequence[Any]] = [["optimizer", "label_noise", "seed", *FIELDS, *names]]
    for *whose, report in seen:
        fields = [getattr(report, field) for field in FIELDS]
        lines.append([*whose, *fields, *(report.values.get(name, "") for name in names)])
    write_lines(lines, path)


def write_lines(lines: Iterable[Sequence[Any]], path: Path) -> None:
    """Write lines of values as a CSV file, with nothing in the place of a NaN."""

    def blank_if_nan(value: Any) -> Any:
        return "" if isinstance(value, float) and math.isnan(value) else value

    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(map(blank_if_nan, line) for line in lines)


def write_figure(rows: list[Row], title: str, path: Path) -> None:
    """Draw test accuracy and training loss against the epoch: mean over seeds, ± std as a band.

    For several shares of wrong labels it is the test accuracy with each, side by side.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    noises = noises_of(rows)
    accuracy, loss = "test_accuracy_percent", "train_loss"
    labels = {accuracy: "test accuracy (%)", loss: "training loss (nats)"}
    panels = [(noise, accuracy) for noise in noises]
    if len(noises) == 1:
        panels.append((noises[0], loss))
    figure, axes = plt.subplots(
        1, len(panels), figsize=(5.5 * len(panels), 4.5), layout="constrained",
        sharey=len(noises) > 1,
    )  # fmt: skip
    for axis, (noise, field) in zip(axes, panels, strict=True):
        _draw_epochs(axis, [row for row in rows if row.label_noise == noise], field)
        axis.set(xlabel="epoch", ylabel=labels[field] if axis is axes[0] or field == loss else "")
        axis.set_title(describe_noise(noise) if len(noises) > 1 else "")
        axis.grid(alpha=0.3)
        # not so if every run diverged at once
        if field == loss and any(row.train_loss > 0 for row in rows):
            axis.set_yscale("log")
    axes[0].legend(title="optimizer")
    figure.suptitle(title)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _draw_epochs(axis: Any, rows: list[Row], field: str) -> None:
    """Draw one field of each optimizer against the epoch."""
    for name in dict.fromkeys(row.optimizer for row in rows):
        runs: dict[int, list[float]] = {}
        for row in rows:
            if row.optimizer == name:
                runs.setdefault(row.seed, []).append(getattr(row, field))
        values = np.array(list(runs.values()))  # NaN from a divergence on ends the line there
        epochs = np.arange(1, values.shape[1] + 1)
        mean, std = values.mean(0), values.std(0, ddof=1) if len(values) > 1 else 0.0
        (line,) = axis.plot(epochs, mean, label=name, marker="." if len(epochs) == 1 else "")
        # no lower than the lowest seed: below zero there is nothing on a logarithmic axis
        low, high = np.maximum(mean - std, values.min(0)), mean + std
        axis.fill_between(epochs, low, high, alpha=0.2, color=line.get_color())


def write_landscape(slices: dict[float, Slices], title: str, path: Path) -> None:
    """Draw each optimizer's slices: mean over seeds, and from the lowest to the highest as a band.

    Args:
        slices: for each share of wrong labels, which has a row of panels.
        title: of the figure.
        path: of the PNG.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5 * len(slices)), layout="constrained")
    panels = figure.subplots(len(slices), 2, squeeze=False)
    for row, (noise, of_noise) in zip(panels, slices.items(), strict=True):
        for axis, (kind, label) in zip(row, SLICES.items(), strict=True):
            for name, runs in of_noise.items():
                losses = np.array([run[kind].losses for run in runs])
                x = runs[0][kind].coordinates
                (line,) = axis.plot(x, losses.mean(0), label=name)
                low, high = losses.min(0), losses.max(0)
                axis.fill_between(x, low, high, alpha=0.15, color=line.get_color())
            axis.set(xlabel=label, ylabel="training loss (nats)")
            axis.set_title(describe_noise(noise) if len(slices) > 1 else "")
            axis.grid(alpha=0.3)
        if of_noise:
            row[0].legend(title="optimizer")
    figure.suptitle(title)
    figure.savefig(path, dpi=150)
