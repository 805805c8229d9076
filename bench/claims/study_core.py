"""What the studies of ``studies.py`` share: runs, results, and how results are compared.

A run that does not end in finite numbers is a result like any other. Wherever results are
averaged it counts as what a network that always answers the same class gets, 10 % of accuracy and
a loss of ln 10, so that no method gains by diverging; how many did is told beside every mean.
"""

from __future__ import annotations

import inspect
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from common.data import CLASSES
from common.outputs import mean_std

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CHANCE_ACCURACY = 100 / CLASSES
CHANCE_LOSS = math.log(CLASSES)


@dataclass(frozen=True)
class Run:
    """Everything that decides the outcome of one training (or of one descent of a function)."""

    method: str  # a key of study_training.METHODS
    settings: dict[str, Any]  # the optimizer's arguments
    seed: int  # of the first weights, the batches and the wrong labels
    epochs: int
    data: str = "digits"
    label_noise: float = 0.0
    cosine: bool = False  # lower the learning rate to 0 along a cosine
    validation: float = 0.0  # share of the training images kept for validation
    device: str = "cpu"


@dataclass(frozen=True)
class Result:
    """What a run gave; ``trace`` is the watched number at the start and its mean in each epoch."""

    run: Run
    measured: dict[str, float]
    diverged: bool = False
    seconds: float = 0.0
    trace: tuple[float, ...] = ()

    def get(self, key: str) -> Any:
        """Return the method, a setting or a field of the run; None where it has none."""
        return self.run.settings.get(key, getattr(self.run, key, None))


class Size(NamedTuple):
    """How much of a study is run."""

    data: str
    epochs: int
    seeds: int
    label_noise: float = 0.0
    device: str = "cpu"


Outcome = Literal["reproduced", "partly reproduced", "not reproduced"]


class Verdict(NamedTuple):
    """A claim, what became of it, and the numbers that say so."""

    claim: str
    outcome: Outcome
    evidence: str


@dataclass(frozen=True)
class Study:
    """A study is these functions; the docstring of ``judge`` is the criterion that is printed."""

    small: Size  # for two CPU cores
    full: Size  # for a GPU
    make_runs: Callable[[Size], list[Run]]
    execute: Callable[[Run], Result]
    tabulate: Callable[[list[Result]], str]
    judge: Callable[[list[Result]], list[Verdict]]
    draw: Callable[[list[Result], Figure], None]
    figure_size: tuple[float, float] = (11.0, 4.5)  # inches
    images: Size | None = None  # on MNIST images, for two CPU cores, where that is another run

    @property
    def criterion(self) -> str:
        return inspect.cleandoc(self.judge.__doc__ or "")


def accuracy(result: Result) -> float:
    """Return the final test accuracy in percent, chance for a run that diverged."""
    return CHANCE_ACCURACY if result.diverged else result.measured["test_accuracy_percent"]


def loss(result: Result) -> float:
    """Return the final training loss, at most that of chance, which a diverged run gets too."""
    return CHANCE_LOSS if result.diverged else min(result.measured["train_loss"], CHANCE_LOSS)


def group(results: Iterable[Result], *keys: str) -> dict[Any, list[Result]]:
    """Return the results by the value of a key, or by the tuple of several, in their order."""
    groups: dict[Any, list[Result]] = {}
    for result in results:
        values = tuple(result.get(key) for key in keys)
        groups.setdefault(values if len(keys) > 1 else values[0], []).append(result)
    return groups


def mean_accuracy(results: list[Result]) -> float:
    return statistics.fmean(map(accuracy, results))


def diverged(results: list[Result]) -> str:
    return f"{sum(result.diverged for result in results)} of {len(results)}"


def accuracy_cell(results: list[Result]) -> str:
    """Format mean ± standard deviation over the seeds, with the diverged ones told."""
    count = sum(result.diverged for result in results)
    return mean_std([accuracy(r) for r in results], 2) + (f" ({count} div.)" if count else "")


class Difference(NamedTuple):
    """A number of one method less another's, over the seeds that both have."""

    mean: float
    error: float  # standard error of the mean; 0 for a single seed

    @property
    def higher(self) -> bool:
        """Whether it is above 0 by more than its error: better, of an accuracy."""
        return self.mean > self.error

    @property
    def lower(self) -> bool:
        """Whether it is below 0 by more than its error: better, of a loss."""
        return self.mean < -self.error

    def __str__(self) -> str:
        digits = 2 if max(abs(self.mean), self.error) >= 0.1 else 4
        return f"{self.mean:+.{digits}f} ± {self.error:.{digits}f}"


def difference(
    first: list[Result], second: list[Result], value: Callable[[Result], float]
) -> Difference:
    """Compare seed by seed: runs of one seed share weights and batches, so that noise cancels.

    Of several runs at one seed the mean counts.
    """
    own, other = (
        {seed: statistics.fmean(map(value, runs)) for seed, runs in group(results, "seed").items()}
        for results in (first, second)
    )
    gaps = [mean - other[seed] for seed, mean in own.items() if seed in other]
    error = statistics.stdev(gaps) / math.sqrt(len(gaps)) if len(gaps) > 1 else 0.0
    return Difference(statistics.fmean(gaps), error)


def compare(first: list[Result], second: list[Result]) -> Difference:
    """Compare accuracies, in points."""
    return difference(first, second, accuracy)


def best_radii(
    results: Iterable[Result], score: Callable[[list[Result]], float], *keys: str
) -> dict[Any, list[Result]]:
    """Return for each value of the keys the runs at the radius with the highest score.

    Of radii with the same score it is the smallest. Scores are rounded: where two radii have as
    many correct answers, the means of their accuracies still differ in the last bits.
    """
    return {
        value: max(
            sorted(group(runs, "rho").values(), key=lambda same: same[0].get("rho") or 0.0),
            key=lambda same: round(score(same), 4),
        )
        for value, runs in group(results, *keys).items()
    }


def radius_cell(rho: float | None) -> str:
    """Format a radius, of a method that has one."""
    return "-" if rho is None else f"{rho:g}"


def mean_and_std(
    cells: Iterable[list[Result]], value: Callable[[Result], float] = accuracy
) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean and the sample standard deviation (0 for one seed) of each cell."""
    values = [[value(result) for result in cell] for cell in cells]
    std = [statistics.stdev(v) if len(v) > 1 else 0.0 for v in values]
    return np.array([statistics.fmean(v) for v in values]), np.array(std)


def plot_band(
    axis: Axes, x: Sequence[float], mean: np.ndarray, std: np.ndarray, **options: Any
) -> None:
    """Draw a line of means with mean ± std as a band."""
    (line,) = axis.plot(x, mean, **options)
    axis.fill_between(x, mean - std, mean + std, color=line.get_color(), alpha=0.15)


def plot_radii(
    axis: Axes, results: Iterable[Result], value: Callable[[Result], float], label: str,
    ls: str = "--",
) -> None:  # fmt: skip
    """Draw mean ± std against the radius; of runs without one a horizontal line of style ``ls``."""
    cells = group(results, "rho")
    mean, std = mean_and_std(cells.values(), value)
    if None in cells:
        axis.axhline(mean[0], color="grey", ls=ls, label=label)
        axis.axhspan(mean[0] - std[0], mean[0] + std[0], color="grey", alpha=0.2)
    else:
        axis.errorbar(list(cells), mean, std, marker="o", capsize=3, label=label)


def plot_traces(
    axis: Axes, results: list[Result], label: str, log: bool = False, per_epoch: int = 1
) -> None:
    """Draw mean ± std of the traces against the epoch, up to where the shortest one ends.

    Args:
        axis, results, label: Where, what, and its name.
        log: Take the logarithms' mean and std.
        per_epoch: How many numbers a trace has for an epoch.
    """
    length = min(len(result.trace) for result in results)
    traces = np.array([result.trace[:length] for result in results])
    if log:
        traces = np.log10(traces)
    mean, std = traces.mean(0), traces.std(0, ddof=1) if len(traces) > 1 else np.zeros(length)
    middle, low, high = (10**x if log else x for x in (mean, mean - std, mean + std))
    x = np.arange(length) / per_epoch
    (line,) = axis.plot(x, middle, label=label)
    axis.fill_between(x, low, high, color=line.get_color(), alpha=0.15)
