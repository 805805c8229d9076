"""Unified SAM between its two ends: which lam is best, at which radius.

Published (Oikonomou and Loizou, ICLR 2025; WRN-28-10, CIFAR-10, clean labels, accuracy in %):
SGD 95.35, and at the radii 0.1, 0.2, 0.3, 0.4 the best lam is 1 (95.90), then 1-1/t (95.98, 95.99,
95.79). So at three radii of four neither USAM (lam = 0) nor SAM (lam = 1) is best, and every best
one beats SGD. Here the radii are the same; 20 % of the training labels are wrong, because on clean
digits every method ends at 98 to 99 % and nothing could be told apart.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .study_core import (
    Result,
    Run,
    Size,
    Study,
    Verdict,
    accuracy_cell,
    compare,
    group,
    mean_accuracy,
    mean_and_std,
)
from .study_training import train_network
from common.outputs import align
from train import SGD

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LAMS = (0.0, 0.5, 1.0, "1/t", "1-1/t")
ENDS = (0.0, 1.0)  # USAM and SAM
RADII = (0.1, 0.2, 0.3, 0.4)
CLAIM = "a lam between USAM's 0 and SAM's 1 is best at most radii, and better than SGD."


def make_runs(size: Size) -> list[Run]:
    cells = [("sgd", SGD)]
    cells += [("unified", {**SGD, "rho": rho, "lam": lam}) for rho in RADII for lam in LAMS]
    return [
        Run(method, settings, seed, size.epochs, size.data, size.label_noise, cosine=True,
            device=size.device)
        for method, settings in cells
        for seed in range(size.seeds)
    ]  # fmt: skip


def tabulate(results: list[Result]) -> str:
    """Return the published table's shape: test accuracy in %, a line per lam, a column per rho."""
    cells = group(results, "method", "lam", "rho")
    lines = [["test accuracy (%)", *(f"rho = {rho:g}" for rho in RADII)]]
    for lam in LAMS:
        lines.append([f"lam = {lam}", *(accuracy_cell(cells["unified", lam, r]) for r in RADII)])
    lines.append(["SGD", accuracy_cell(cells["sgd", None, None]), *[""] * (len(RADII) - 1)])
    return align(lines)


def judge(results: list[Result]) -> list[Verdict]:
    """At a radius, an in-between lam (0.5, 1/t or 1-1/t) wins if the best of them, by its mean over
    the seeds, exceeds the better end (lam 0 or 1) by more than the standard error of the
    seed-by-seed difference, and exceeds SGD likewise. Reproduced: it wins at 3 radii of 4 at
    least, as published. Partly: at 1 or 2. Not reproduced: at none.
    """
    cells = group(results, "method", "lam", "rho")
    sgd = cells["sgd", None, None]
    wins, told = 0, []
    for rho in RADII:
        at = {lam: cells["unified", lam, rho] for lam in LAMS}
        between = max((x for x in LAMS if x not in ENDS), key=lambda lam: mean_accuracy(at[lam]))
        end = max(ENDS, key=lambda lam: mean_accuracy(at[lam]))
        over_end, over_sgd = compare(at[between], at[end]), compare(at[between], sgd)
        wins += over_end.higher and over_sgd.higher
        told.append(f"rho {rho:g}: best in between {between}, {over_end} against lam = {end:g}, "
                    f"{over_sgd} against SGD")  # fmt: skip
    outcome = "reproduced" if wins >= 3 else "partly reproduced" if wins else "not reproduced"
    evidence = f"Won at {wins} of {len(RADII)} radii. Points of accuracy: " + "; ".join(told) + "."
    return [Verdict(CLAIM, outcome, evidence)]


def draw(results: list[Result], figure: Figure) -> None:
    """Draw accuracy against the radius, a line per lam, and SGD's as a band."""
    axis = figure.subplots()
    cells = group(results, "method", "lam", "rho")
    for i, lam in enumerate(LAMS):
        mean, std = mean_and_std(cells["unified", lam, rho] for rho in RADII)
        x = np.array(RADII) + 0.003 * (i - 2)  # side by side, so that the bars can be told apart
        axis.errorbar(x, mean, std, marker="osD^v"[i], capsize=3, label=f"lam = {lam}")
    (mean,), (std,) = mean_and_std([cells["sgd", None, None]])
    axis.axhline(mean, color="grey", ls="--", label="SGD")
    axis.axhspan(mean - std, mean + std, color="grey", alpha=0.2)
    axis.set(xlabel="rho (length of the perturbation at lam = 1)", ylabel="test accuracy (%)",
             xticks=RADII)  # fmt: skip
    axis.grid(alpha=0.3)
    axis.legend()


STUDY = Study(
    small=Size("digits", epochs=40, seeds=5, label_noise=0.2),
    full=Size("mnist5k", epochs=60, seeds=5, label_noise=0.2),
    images=Size("mnist5k", epochs=6, seeds=3, label_noise=0.2),
    make_runs=make_runs,
    execute=train_network,
    tabulate=tabulate,
    judge=judge,
    draw=draw,
    figure_size=(8.0, 5.0),
)
