"""SAMAR, which weights the sharpness adaptively, against SGD, SAM and VaSSO.

The claim is that of Zou, Deng and Sun (arXiv 2412.16854). What is run is fastsam's reconstruction
of SAMAR with its default constants, since the paper's own could not be read: a failure here says as
much about the reconstruction as about the paper. Each sharpness-aware method runs at the same three
radii, and is compared at its own best one, with clean labels and with 20 % of the training labels
wrong.
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
    best_radii,
    compare,
    diverged,
    group,
    loss,
    mean_accuracy,
    mean_and_std,
    plot_traces,
    radius_cell,
)
from .study_training import train_network
from common.outputs import align, mean_std
from train import SGD

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RADII = (0.05, 0.1, 0.2)
RULE = {"lam": 1.0, "c": 1.1, "lam_min": 0.1, "lam_max": 2.0}  # fastsam's defaults
OWN = {"sgd": {}, "sam": {}, "vasso": {"theta": 0.9}, "samar": RULE}
RIVALS = ("sgd", "sam", "vasso")
CLAIM = "SAMAR is more accurate than SGD, SAM and VaSSO."


def make_runs(size: Size) -> list[Run]:
    cells = []
    for method, own in OWN.items():
        radii = [{}] if method == "sgd" else [{"rho": rho} for rho in RADII]
        cells += [(method, {**SGD, **radius, **own}) for radius in radii]
    return [
        Run(method, settings, seed, size.epochs, size.data, noise, cosine=True, device=size.device)
        for noise in dict.fromkeys((0.0, size.label_noise))
        for method, settings in cells
        for seed in range(size.seeds)
    ]


def quarters(results: list[Result]) -> tuple[list[float], list[float]]:
    """Return the mean lam in the first and in the last quarter of the epochs, one value a seed.

    The start is not an epoch. A run that diverged has its last quarter before that.
    """
    traces = [result.trace[1:] for result in results]
    lengths = [max(1, len(trace) // 4) for trace in traces]
    pairs = list(zip(traces, lengths, strict=True))
    return [float(np.mean(t[:n])) for t, n in pairs], [float(np.mean(t[-n:])) for t, n in pairs]


def tabulate(results: list[Result]) -> str:
    lines = [["labels wrong (%)", "method", "rho", "test accuracy (%)", "training loss (nats)",
              "lam, first quarter", "lam, last quarter", "diverged"]]  # fmt: skip
    for (noise, method, rho), runs in group(results, "label_noise", "method", "rho").items():
        lam = [mean_std(q, 2) for q in quarters(runs)] if method == "samar" else ["-", "-"]
        lines.append([
            f"{100 * noise:g}", method, radius_cell(rho), accuracy_cell(runs),
            mean_std([loss(r) for r in runs], 3), *lam, diverged(runs),
        ])  # fmt: skip
    return align(lines)


def judge(results: list[Result]) -> list[Verdict]:
    """Each method stands at the radius of its highest mean accuracy. SAMAR is better (worse) than
    another where the mean over the seeds of the difference is above (below) its standard error.
    Reproduced: better than SGD, SAM and VaSSO, with clean labels and with wrong ones. Partly:
    in one setting at least, better than one of them and worse than none. Else not reproduced.
    """
    settings, told = [], []
    for noise, runs in group(results, "label_noise").items():
        best = best_radii(runs, mean_accuracy, "method")
        gaps = {rival: compare(best["samar"], best[rival]) for rival in RIVALS}
        settings.append(gaps)
        told.append(
            f"with {100 * noise:g} % wrong labels (rho {best['samar'][0].get('rho'):g}): "
            + ", ".join(f"{gap} against {rival}" for rival, gap in gaps.items())
        )
    if all(gap.higher for gaps in settings for gap in gaps.values()):
        outcome = "reproduced"
    elif any(
        any(gap.higher for gap in gaps.values()) and not any(gap.lower for gap in gaps.values())
        for gaps in settings
    ):
        outcome = "partly reproduced"
    else:
        outcome = "not reproduced"
    return [Verdict(CLAIM, outcome, f"SAMAR's points of accuracy {'; '.join(told)}.")]


def draw(results: list[Result], figure: Figure) -> None:
    """Draw lam against the epoch, and the accuracies: a panel each for clean and wrong labels."""
    by_noise = group(results, "label_noise")
    axes = figure.subplots(len(by_noise), 2, width_ratios=[1, 1.2], squeeze=False)
    colours = {method: f"C{i}" for i, method in enumerate(OWN)}
    for (over_time, at_end), (noise, runs) in zip(axes, by_noise.items(), strict=True):
        samar = [r for r in runs if r.run.method == "samar"]
        for rho, cell in group(samar, "rho").items():
            plot_traces(over_time, cell, label=f"rho = {rho:g}")
        over_time.axhline(1, color="grey", lw=0.8, ls=":")
        over_time.set(xlabel="epoch", ylabel="lam (mean of the epoch)",
                      title=f"SAMAR, {100 * noise:g} % wrong labels")  # fmt: skip
        over_time.legend(fontsize=8)
        cells = group(runs, "method", "rho")
        mean, std = mean_and_std(cells.values())
        names = [method if rho is None else f"{method}\n{rho:g}" for method, rho in cells]
        at_end.errorbar(range(len(names)), mean, std, fmt="none", color="grey", capsize=3)
        at_end.scatter(
            range(len(names)), mean, c=[colours[method] for method, _ in cells], zorder=3
        )
        at_end.set_xticks(range(len(names)), names, fontsize=7)
        at_end.set(xlabel="method, rho", ylabel="test accuracy (%)",
                   title=f"{100 * noise:g} % wrong labels")  # fmt: skip
    for axis in axes.flat:
        axis.grid(alpha=0.3)


STUDY = Study(
    small=Size("digits", epochs=40, seeds=5, label_noise=0.2),
    full=Size("mnist5k", epochs=60, seeds=5, label_noise=0.2),
    images=Size("mnist5k", epochs=6, seeds=3, label_noise=0.2),
    make_runs=make_runs,
    execute=train_network,
    tabulate=tabulate,
    judge=judge,
    draw=draw,
    figure_size=(11.0, 8.0),
)
