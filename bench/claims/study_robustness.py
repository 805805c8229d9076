"""LightSAM against SAM, AdaSAM and Adam over a grid of learning rates and radii.

The claim is that of Cheng et al. (arXiv 2505.24399): LightSAM needs no tuning of either. Both grids
are the same numbers for every method, a factor of 10 apart over four orders of magnitude; they do
not mean the same perturbation, since LightSAM's rho acts per coordinate in its rules II and III
(length about rho * sqrt(d), with d = 26,000 weights on digits), and along a normalised, shrinking
direction in rule I. SAM runs on SGD with momentum 0.9; Adam has no radius, so five cells only. No
schedule, no weight decay, clean labels.
"""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

from .study_core import (
    CHANCE_LOSS,
    Result,
    Run,
    Size,
    Study,
    Verdict,
    accuracy,
    diverged,
    group,
    loss,
    mean_and_std,
)
from .study_training import train_network
from common.outputs import align, mean_std

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GRID = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # of the learning rates and of the radii
LIGHT = {"lightsam-1": "LightSAM I", "lightsam-2": "LightSAM II", "lightsam-3": "LightSAM III"}
RIVALS = {"sam": "SAM", "adasam": "AdaSAM"}
NAMES = {"adam": "Adam", **RIVALS, **LIGHT}
NEAR = 2.0  # points of accuracy
CLAIM = "LightSAM's final loss and accuracy depend less on lr and rho than SAM's and AdaSAM's."


def make_runs(size: Size) -> list[Run]:
    cells = []
    for method in NAMES:
        own = {"momentum": 0.9} if method == "sam" else {}
        radii = [{}] if method == "adam" else [{"rho": rho} for rho in GRID]
        cells += [(method, {"lr": lr, **radius, **own}) for lr in GRID for radius in radii]
    return [
        Run(method, settings, seed, size.epochs, size.data, size.label_noise, device=size.device)
        for method, settings in cells
        for seed in range(size.seeds)
    ]


def measure_spread(cells: list[Result]) -> dict[str, float]:
    """Return how a method's final numbers spread over its grid, at one seed."""
    accuracies, losses = [accuracy(r) for r in cells], [loss(r) for r in cells]
    best = max(accuracies)
    return {
        "best": best,
        "mean": statistics.fmean(accuracies),
        "range": best - min(accuracies),
        "std": statistics.stdev(accuracies),
        "near": 100 * statistics.fmean(best - a <= NEAR for a in accuracies),
        "loss range": max(losses) - min(losses),
        "loss std": statistics.stdev(losses),
    }


def spreads(results: list[Result]) -> dict[str, dict[str, list[float]]]:
    """Return for each method each number of the spread, one value a seed."""
    table: dict[str, dict[str, list[float]]] = {}
    for method, runs in group(results, "method").items():
        by_seed = [measure_spread(cells) for cells in group(runs, "seed").values()]
        table[method] = {key: [spread[key] for spread in by_seed] for key in by_seed[0]}
    return table


def tabulate(results: list[Result]) -> str:
    runs = group(results, "method")
    lines = [["method", "cells", "best accuracy (%)", "mean over cells", "max - min",
              "std over cells", f"cells within {NEAR:g} points (%)", "loss: max - min (nats)",
              "loss: std", "diverged"]]  # fmt: skip
    for method, spread in spreads(results).items():
        digits = {"best": 2, "mean": 2, "range": 2, "std": 2, "near": 0, "loss range": 3,
                  "loss std": 3}  # fmt: skip
        cells = len(group(runs[method], "lr", "rho"))
        lines.append([
            NAMES[method], str(cells), *(mean_std(spread[k], d) for k, d in digits.items()),
            diverged(runs[method]),
        ])  # fmt: skip
    return align(lines)


def judge(results: list[Result]) -> list[Verdict]:
    """Three numbers tell how far a method depends on its grid, at each seed: the standard deviation
    over the cells of the final accuracy, that of the final training loss (at most ln 10, that of
    chance, which a diverged run gets too), and the share of cells within 2 points of accuracy of
    the method's best. Means over the seeds are compared. A LightSAM rule is better in a number
    where it is better than both SAM and AdaSAM, and in none if its best cell is more than 2 points
    below theirs: failing everywhere alike is no robustness. Reproduced: all three rules are better
    in all three numbers, with at least 80 % of their cells near the best. Partly: some rule is
    better in at least two numbers. Else not reproduced.
    """
    mean = {
        method: {key: statistics.fmean(values) for key, values in spread.items()}
        for method, spread in spreads(results).items()
    }
    better = {method: count_better(mean[method], [mean[r] for r in RIVALS]) for method in LIGHT}
    if all(better[method] == 3 and mean[method]["near"] >= 80 for method in LIGHT):
        outcome = "reproduced"
    else:
        outcome = "partly reproduced" if max(better.values()) >= 2 else "not reproduced"
    told = "; ".join(
        f"{name} {m['std']:.1f} points, {m['loss std']:.2f} nats, {m['near']:.0f} %"
        for name, m in ((name, mean[method]) for method, name in NAMES.items())
    )
    counts = ", ".join(f"{LIGHT[method]} in {count}" for method, count in better.items())
    evidence = (
        f"Spread over the grid (std of accuracy, std of loss, cells within {NEAR:g} points): "
        f"{told}. Better than both SAM and AdaSAM: {counts} of 3 numbers."
    )
    return [Verdict(CLAIM, outcome, evidence)]


def count_better(own: dict[str, float], others: list[dict[str, float]]) -> int:
    """Return in how many of the three numbers a method as good at its best is better than all."""
    if own["best"] < max(other["best"] for other in others) - NEAR:
        return 0
    less = sum(all(own[key] < other[key] for other in others) for key in ("std", "loss std"))
    return less + all(own["near"] > other["near"] for other in others)


def draw(results: list[Result], figure: Figure) -> None:
    """Draw two heat maps per method, accuracy and loss: mean and standard deviation in a cell."""
    axes = figure.subplots(3, 4)
    runs = group(results, "method")
    kinds = (
        (accuracy, "test accuracy (%)", "{:.1f}\n±{:.1f}", "viridis", 100.0),
        (loss, "training loss (nats)", "{:.2f}\n±{:.2f}", "viridis_r", CHANCE_LOSS),
    )
    ticks = [f"{value:g}" for value in GRID]
    for kind, (value, label, text, colours, high) in enumerate(kinds):
        columns = axes[:, kind::2]  # a method's two maps stand side by side
        for axis, (method, name) in zip(columns.flat, NAMES.items(), strict=True):
            at = group(runs[method], "lr", "rho")
            radii = [None] if method == "adam" else GRID
            mean, std = mean_and_std((at[lr, rho] for rho in radii for lr in GRID), value)
            image = axis.imshow(
                mean.reshape(len(radii), -1), cmap=colours, vmin=0, vmax=high, origin="lower"
            )
            for i, numbers in enumerate(zip(mean, std, strict=True)):
                y, x = divmod(i, len(GRID))
                red, green, blue, _ = image.cmap(image.norm(numbers[0]))
                ink = "black" if 0.3 * red + 0.6 * green + 0.1 * blue > 0.5 else "white"
                axis.text(x, y, text.format(*numbers), ha="center", va="center", fontsize=6.5,
                          color=ink)  # fmt: skip
            axis.set_xticks(range(len(GRID)), ticks, fontsize=7)
            axis.set_yticks(range(len(radii)), ["none"] if method == "adam" else ticks, fontsize=7)
            axis.set(xlabel="learning rate", ylabel="rho")
            axis.set_title(f"{name}: {label}", fontsize=9)
        side = ("left", "right")[kind]
        figure.colorbar(image, ax=axes, label=label, location=side, fraction=0.02, aspect=50)


STUDY = Study(
    small=Size("digits", epochs=20, seeds=3),
    full=Size("mnist5k", epochs=40, seeds=5),
    images=Size("mnist5k", epochs=6, seeds=1),
    make_runs=make_runs,
    execute=train_network,
    tabulate=tabulate,
    judge=judge,
    draw=draw,
    figure_size=(16.0, 9.5),
)
