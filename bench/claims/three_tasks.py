"""What studies on three tasks share: digits and MNIST images with wrong labels, and text.

Results are compared by one number, the higher the better: test accuracy in percent, or minus the
test loss in nats. The radius of a method is chosen by the same number on validation data.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Any

from .study_core import (
    CHANCE_ACCURACY,
    Difference,
    Outcome,
    Result,
    Run,
    Size,
    accuracy,
    best_radii,
)
from .study_training import train_network
from .text_training import ADAMW, CHANCE, test_loss, train_decoder
from common.outputs import mean_std
from train import SGD

DATA = ("digits", "mnist5k", "text")
VALIDATION = 0.2  # share of the training images; of the text it is one topic in eight
Cell = tuple[str, dict[str, Any]]  # a method and its settings


def base_of(data: str) -> Cell:
    """Return the base optimizer for these data."""
    return ("adamw", ADAMW) if data == "text" else ("sgd", SGD)


def runs_of(data: str, cells: Iterable[Cell], epochs: int, size: Size) -> list[Run]:
    """Return a run of each cell at each seed; the labels of images are wrong as the size says."""
    noise, part = (0.0, 0.0) if data == "text" else (size.label_noise, VALIDATION)
    return [
        Run(method, own, seed, epochs, data, noise, True, part, size.device)
        for method, own in cells
        for seed in range(size.seeds)
    ]


def train(run: Run) -> Result:
    return train_decoder(run) if run.data == "text" else train_network(run)


def tested(result: Result) -> float:
    """Return what is compared: accuracy in percent, or minus nats; chance for a diverged run."""
    return -test_loss(result) if result.run.data == "text" else accuracy(result)


def validated(results: list[Result]) -> float:
    """Return the mean of the same on the validation data."""
    found = []
    for result in results:
        text, measured = result.run.data == "text", result.measured
        if result.diverged:
            found.append(-CHANCE if text else CHANCE_ACCURACY)
        else:
            found.append(
                -measured["validation_loss"] if text else measured["validation_accuracy_percent"]
            )
    return statistics.fmean(found)


def tested_cell(results: list[Result]) -> str:
    """Format the mean ± std of accuracies in percent, or of losses in nats."""
    digits = 4 if results[0].run.data == "text" else 2
    return mean_std([abs(tested(result)) for result in results], digits)


def label_of(data: str) -> str:
    """Return what an axis of test results is called."""
    return "test loss (nats)" if data == "text" else "test accuracy (%)"


def chosen(results: Iterable[Result]) -> dict[str, list[Result]]:
    """Return the runs of each method at the radius of its best mean on the validation data."""
    return best_radii(results, validated, "method")


def judge_default(gaps: Iterable[Difference]) -> Outcome:
    """Return whether what is better by these on each data set is the better default.

    It is if it is better on two of them at least and worse on none; partly, if on one.
    """
    gaps = list(gaps)
    if any(gap.lower for gap in gaps) or not any(gap.higher for gap in gaps):
        return "not reproduced"
    return "reproduced" if sum(gap.higher for gap in gaps) >= 2 else "partly reproduced"
