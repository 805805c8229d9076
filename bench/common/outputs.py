"""What ``train.py`` leaves behind: a table, a CSV and a figure; the studies use its parts."""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

RADIUS = 0.05  # of the sharpness measurement: one value, so that the methods can be compared


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


def mean_std(values: list[float], digits: int) -> str:
    """Format mean ± sample standard deviation; a single value has none."""
    text = f"{statistics.fmean(values):.{digits}f}"
    return text + f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else text


def make_table(rows: list[Row]) -> str:
    """Return the state after the last epoch, one line per optimizer, as plain text.

    The figures of an optimizer are over the seeds that did not diverge; how many did is said.
    """
    epochs = max(row.epoch for row in rows)
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


def write_lines(lines: Iterable[Sequence[Any]], path: Path) -> None:
    """Write lines of values as a CSV file, with nothing in the place of a NaN."""

    def blank_if_nan(value: Any) -> Any:
        return "" if isinstance(value, float) and math.isnan(value) else value

    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(map(blank_if_nan, line) for line in lines)


def write_figure(rows: list[Row], title: str, path: Path) -> None:
    """Draw test accuracy and training loss against the epoch: mean over seeds, ± std as a band."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    panels = {"test_accuracy_percent": "test accuracy (%)", "train_loss": "training loss (nats)"}
    for axis, (field, label) in zip(axes, panels.items(), strict=True):
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
        axis.set(xlabel="epoch", ylabel=label)
        axis.grid(alpha=0.3)
    if any(row.train_loss > 0 for row in rows):  # not so if every run diverged at once
        axes[1].set_yscale("log")
    axes[0].legend(title="optimizer")
    figure.suptitle(title)
    figure.savefig(path, dpi=150)
    plt.close(figure)
