"""Learning rates up to divergence, and a saddle: SGD, SAM and SSAM.

The claims are those of Tan et al. (JMLR 2025). Both ascents on which SSAM is published are tried:
SAM's and USAM's. The base is SGD without momentum, schedule or weight decay, so that the learning
rate is the only thing that varies; 20 % of the training labels are wrong, because on clean digits
every method that trains at all ends at 98 %. The saddle is that of ``study_saddle.py``.
"""

from __future__ import annotations

import math
import statistics
from typing import TYPE_CHECKING

import numpy as np

from . import study_saddle
from .study_core import (
    Result,
    Run,
    Size,
    Study,
    Verdict,
    accuracy,
    accuracy_cell,
    compare,
    diverged,
    group,
    mean_accuracy,
    mean_and_std,
    plot_band,
)
from .study_saddle import PAIRS, stays
from .study_training import train_network
from common.outputs import align, mean_std

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LRS = tuple(float(f"{lr:.3g}") for lr in np.geomspace(0.0125, 3.2, 17))  # a factor of sqrt(2)
RHO = 0.1
METHODS = ("sgd", "sam", "ssam", "usam", "ssam-usam")
TRAINS = 50.0  # accuracy in % that tells a network that trained from one that did not
WIDER = "SSAM beats SGD over a wider range of learning rates than SAM does."
SADDLE = "SSAM leaves the saddle where SAM stays."


def make_runs(size: Size) -> list[Run]:
    trainings = [
        Run(method, {"lr": lr} if method == "sgd" else {"lr": lr, "rho": RHO}, seed, size.epochs,
            size.data, size.label_noise, device=size.device)
        for lr in LRS
        for method in METHODS
        for seed in range(size.seeds)
    ]  # fmt: skip
    return trainings + study_saddle.make_runs()


def execute(run: Run) -> Result:
    return study_saddle.descend(run) if run.data == "saddle" else train_network(run)


def parts(results: list[Result]) -> tuple[list[Result], list[Result]]:
    """Return the trainings and the descents from the saddle."""
    saddle = [r for r in results if r.run.data == "saddle"]
    return [r for r in results if r.run.data != "saddle"], saddle


def trains(results: list[Result]) -> bool:
    return all(not r.diverged and accuracy(r) >= TRAINS for r in results)


def winning_lrs(results: list[Result], method: str) -> list[float]:
    """Return the learning rates at which the method trains and beats SGD."""
    cells = group(results, "method", "lr")
    lrs = group(results, "lr")
    return [
        lr
        for lr in lrs
        if trains(cells[method, lr]) and compare(cells[method, lr], cells["sgd", lr]).higher
    ]


def tabulate(results: list[Result]) -> str:
    trainings, saddle = parts(results)
    cells = group(trainings, "method", "lr")
    by_lr = [["lr", *(f"{m}: accuracy (%)" for m in METHODS)]]
    for lr in group(trainings, "lr"):
        by_lr.append([f"{lr:g}", *(accuracy_cell(cells[method, lr]) for method in METHODS)])
    summary = [["method", "beats SGD at", "of them lowest and highest lr", "highest lr that trains",
                "best accuracy (%)", "at lr", "diverged"]]  # fmt: skip
    for method, runs in group(trainings, "method").items():
        at = group(runs, "lr")
        won = winning_lrs(trainings, method) if method != "sgd" else []
        highest = max((lr for lr in at if trains(at[lr])), default=math.nan)
        best = max(at, key=lambda lr: mean_accuracy(at[lr]))
        summary.append([
            method, "-" if method == "sgd" else f"{len(won)} of {len(at)} lr",
            f"{min(won):g} to {max(won):g}" if won else "-", f"{highest:g}",
            accuracy_cell(at[best]), f"{best:g}", diverged(runs),
        ])  # fmt: skip
    return (
        f"{align(by_lr)}\n\n{align(summary)}\n\nSteps to leave the saddle of x^2 - y^2 at lr "
        f"{study_saddle.LR:g}, over the starts that leave within {study_saddle.STEPS}\n\n"
        f"{tabulate_saddle(saddle)}"
    )


def tabulate_saddle(saddle: list[Result]) -> str:
    """Return mean ± std of the steps over the starts that left, and how many stayed."""
    lines = [["gradient noise", "rho", *METHODS]]
    cells = group(saddle, "gradient_noise", "rho", "method")
    for noise, rho in dict.fromkeys(key[:2] for key in cells if key[2] != "sgd"):
        line = [f"{noise:g}", f"{rho:g}"]
        for method in METHODS:
            runs = cells[noise, None if method == "sgd" else rho, method]
            left = [float(r.measured["steps_to_leave"]) for r in runs if r.measured["left"]]
            stayed = f"{len(runs) - len(left)} of {len(runs)} stay"
            line.append(f"{mean_std(left, 0)}, {stayed}" if left else stayed)
        lines.append(line)
    return align(lines)


def judge(results: list[Result]) -> list[Verdict]:
    """A method trains at a learning rate if every seed ends finite and at 50 % accuracy or more. It
    beats SGD there if it trains and its accuracy exceeds SGD's at the same learning rate by more
    than the standard error of the seed-by-seed difference; SGD's accuracy counts as 10 % where it
    diverged. First claim: reproduced if SSAM beats SGD at more of the learning rates than SAM, and
    SSAM on USAM's ascent at more than USAM; partly if only one of the two holds; else not.
    Second claim: a method stays if at least half of its starts have not left in 1,000 steps.
    Over the noises, radii and ascents where SAM (or USAM) stays, SSAM on the same ascent leaves in
    all: reproduced; in some: partly. In none: partly if, where both leave, SSAM takes fewer steps
    in the median in more than half of the cases; else not reproduced.
    """
    trainings, saddle = parts(results)
    return [judge_range(trainings), judge_saddle(saddle)]


def judge_range(trainings: list[Result]) -> Verdict:
    wider, told = 0, []
    for method, stable in PAIRS:
        counts = [len(winning_lrs(trainings, name)) for name in (method, stable)]
        wider += counts[1] > counts[0]
        total = len(group(trainings, "lr"))
        told.append(f"{stable} beats SGD at {counts[1]} and {method} at {counts[0]} of {total}")
    outcome = ("not reproduced", "partly reproduced", "reproduced")[wider]
    return Verdict(WIDER, outcome, f"Of the learning rates, {'; '.join(told)}.")


def judge_saddle(saddle: list[Result]) -> Verdict:
    cells = group(saddle, "method", "gradient_noise", "rho")
    stuck = freed = both = sooner = 0
    for method, stable in PAIRS:
        for (name, noise, rho), runs in cells.items():
            if name != method:
                continue
            other = cells[stable, noise, rho]
            if stays(runs):
                stuck += 1
                freed += not stays(other)
            elif not stays(other):
                both += 1
                sooner += median_steps(other) < median_steps(runs)
    if stuck and freed == stuck:
        outcome = "reproduced"
    elif freed or 2 * sooner > both:
        outcome = "partly reproduced"
    else:
        outcome = "not reproduced"
    evidence = (
        f"SAM or USAM stays in {stuck} settings, and SSAM leaves in {freed} of them. Both leave in "
        f"{both}, SSAM in fewer steps in {sooner} of them. Without noise SSAM cannot leave where "
        f"SAM stays: it rescales the step, and does not turn it."
    )
    return Verdict(SADDLE, outcome, evidence)


def median_steps(runs: list[Result]) -> float:
    return statistics.median(r.measured["steps_to_leave"] for r in runs)


def draw(results: list[Result], figure: Figure) -> None:
    """Draw accuracy against the learning rate, and steps to leave the saddle against the radius."""
    trainings, saddle = parts(results)
    above, below = figure.subfigures(2, 1, height_ratios=[1.2, 1])
    top = above.subplots()
    axes = below.subplots(1, len(study_saddle.NOISES), sharey=True, squeeze=False)[0]
    styles = {m: {"color": f"C{i}", "marker": "osD^v"[i], "ms": 4} for i, m in enumerate(METHODS)}
    for method, runs in group(trainings, "method").items():
        at = group(runs, "lr")
        plot_band(top, list(at), *mean_and_std(at.values()), label=method, **styles[method])
    top.set(xscale="log", xlabel="learning rate", ylabel="test accuracy (%)",
            title=f"training, rho = {RHO:g}")  # fmt: skip
    top.legend()
    for axis, noise in zip(axes, study_saddle.NOISES, strict=True):
        by_method = group((r for r in saddle if r.get("gradient_noise") == noise), "method")
        for method, runs in by_method.items():
            at = group(runs, "rho")
            mean, std = mean_and_std(at.values(), lambda r: r.measured["steps_to_leave"])
            if method == "sgd":
                axis.axhline(mean[0], ls="--", color=styles[method]["color"])  # has no rho
            else:
                low = np.minimum(std, mean - mean.min() / 2)  # a bar may not reach zero
                axis.errorbar(list(at), mean, [low, std], capsize=2, **styles[method])
        axis.axhline(study_saddle.STEPS, color="grey", lw=0.8, ls=":")
        axis.set(xscale="log", yscale="log", xlabel="rho", ylim=(20, 1.3 * study_saddle.STEPS),
                 title=f"saddle, noise {noise:g} (dashed: sgd)")  # fmt: skip
        axis.set_xticks(study_saddle.RADII, [f"{rho:g}" for rho in study_saddle.RADII])
        axis.minorticks_off()
    axes[0].set_ylabel(f"steps to leave ({study_saddle.STEPS}: stays)")
    for axis in (top, *axes):
        axis.grid(alpha=0.3)


STUDY = Study(
    small=Size("digits", epochs=30, seeds=3, label_noise=0.2),
    full=Size("mnist5k", epochs=60, seeds=5, label_noise=0.2),
    images=Size("mnist5k", epochs=6, seeds=1, label_noise=0.2),
    make_runs=make_runs,
    execute=execute,
    tabulate=tabulate,
    judge=judge,
    draw=draw,
    figure_size=(11.0, 9.0),
)
