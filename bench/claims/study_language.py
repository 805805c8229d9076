"""Sharpness-aware training of a language model: is SAM worse than AdamW, does Functional-SAM help?

Singh et al. (ICML 2025, arXiv 2502.02407) find SAM no better than AdamW on language models of every
size, and Functional-SAM better. Here a transformer of 118k parameters learns the characters of
Python's documentation; its topics are split into training, validation and test. Each method's
radius is the one of three with the lowest validation loss; the radii were chosen around the best
of one epoch at another seed. AdamW and MSAM take one pass a step, so they also run for twice the
epochs: as many passes as the others have.
"""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

from .study_core import (
    Difference,
    Result,
    Run,
    Size,
    Study,
    Verdict,
    best_radii,
    difference,
    diverged,
    group,
    plot_radii,
    radius_cell,
)
from .text_training import ADAMW, CHANCE, ONE_PASS, test_loss, train_decoder
from common.outputs import align, mean_std

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RADII = {
    "adamw": (),
    "sam": (0.01, 0.03, 0.1),
    "asam": (0.05, 0.2, 0.5),
    "sam-on": (0.03, 0.1, 0.3),
    "functional": (0.01, 0.03, 0.1),
    "functional-p": (0.01, 0.03, 0.1),
    "msam": (0.03, 0.1, 0.3),
}
OWN = {"functional-p": {"warmup": 100}}  # of the 543 steps; by default 1,000
WORSE = "at equal passes, SAM's test loss is higher than AdamW's."
BETTER = "Functional-SAM's test loss is lower than SAM's, and at equal epochs lower than AdamW's."


def make_runs(size: Size) -> list[Run]:
    runs = []
    for method, radii in RADII.items():
        for epochs in (size.epochs, 2 * size.epochs) if method in ONE_PASS else (size.epochs,):
            for radius in [{"rho": rho} for rho in radii] or [{}]:
                settings = {**ADAMW, **radius, **OWN.get(method, {})}
                runs += [
                    Run(method, settings, seed, epochs, "text", cosine=True, device=size.device)
                    for seed in range(size.seeds)
                ]
    return runs


def validation_loss(results: list[Result]) -> float:
    losses = [CHANCE if r.diverged else r.measured["validation_loss"] for r in results]
    return statistics.fmean(losses)


def pick_best(results: list[Result]) -> dict[tuple[str, int], list[Result]]:
    """Return the runs by method and epochs, at the radius of the lowest mean validation loss."""
    return best_radii(results, lambda runs: -validation_loss(runs), "method", "epochs")


def tabulate(results: list[Result]) -> str:
    lines = [["method", "rho", "passes over the text", "training loss (nats)", "validation loss",
              "test loss", "diverged"]]  # fmt: skip
    for (method, epochs, rho), runs in group(results, "method", "epochs", "rho").items():
        good = [r.measured for r in runs if not r.diverged]
        losses = [
            mean_std([m[f"{part}_loss"] for m in good], 4) if good else "-"
            for part in ("train", "validation", "test")
        ]
        passes = f"{epochs if method in ONE_PASS else 2 * epochs}"
        lines.append([method, radius_cell(rho), passes, *losses, diverged(runs)])
    return align(lines)


def judge(results: list[Result]) -> list[Verdict]:
    """Each method stands at the radius of its lowest mean validation loss. One test loss is lower
    (higher) than another where the mean over the seeds of the difference is below (above) 0 by more
    than its standard error. First claim: reproduced if SAM's is higher than AdamW's with twice the
    epochs, partly if it is neither higher nor lower, else not. Second: reproduced if
    Functional-SAM's, plain or preconditioned, is lower than SAM's and lower than AdamW's at equal
    epochs; partly if it is lower than one of the two; else not.
    """
    best = pick_best(results)
    short = min(epochs for _, epochs in best)

    def gap(method: str, other: tuple[str, int]) -> Difference:
        return difference(best[method, short], best[other], test_loss)

    over_adamw = gap("sam", ("adamw", 2 * short))
    first = Verdict(
        WORSE,
        "reproduced" if over_adamw.higher else
        "not reproduced" if over_adamw.lower else "partly reproduced",
        f"SAM less AdamW, in nats: {over_adamw} at equal passes, "
        f"{gap('sam', ('adamw', short))} at equal epochs.",
    )  # fmt: skip
    outcomes, told = [], []
    for method in ("functional", "functional-p"):
        gaps = gap(method, ("sam", short)), gap(method, ("adamw", short))
        outcomes.append(sum(one.lower for one in gaps))
        told.append(f"{method} less SAM {gaps[0]}, less AdamW at equal epochs {gaps[1]}, at equal "
                    f"passes {gap(method, ('adamw', 2 * short))}")  # fmt: skip
    outcome = ("not reproduced", "partly reproduced", "reproduced")[max(outcomes)]
    return [first, Verdict(BETTER, outcome, "; ".join(told) + ".")]


def draw(results: list[Result], figure: Figure) -> None:
    """Draw the test loss against the radius, a line a method, and AdamW's as bands."""
    axis = figure.subplots()
    short = min(result.run.epochs for result in results)
    for (method, epochs), runs in group(results, "method", "epochs").items():
        label = method if epochs == short else f"{method}, twice the epochs"
        plot_radii(axis, runs, test_loss, label, ls="--" if epochs == short else ":")
    axis.set(xlabel="rho (each method's own measure)", ylabel="test loss (nats per character)",
             xscale="log")  # fmt: skip
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)


STUDY = Study(
    small=Size("text", epochs=3, seeds=3),
    full=Size("text", epochs=20, seeds=5),
    make_runs=make_runs,
    execute=train_decoder,
    tabulate=tabulate,
    judge=judge,
    draw=draw,
    figure_size=(8.0, 5.0),
)
