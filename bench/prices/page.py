"""The tables of README.md and docs/choosing.md, made from price.csv."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from .tasks import TASKS
from common.outputs import mean_std
from common.pages import ROOT, write_between

#: Each table has a pair of marks: ``<!-- price: name -->`` and ``<!-- /price: name -->``.
BEGIN, END = "<!-- price: {} -->", "<!-- /price: {} -->"
#: What the rows call the contenders, in their order.
ROWS = {
    "base": "the base alone", "msam": "`MSAM`", "delayed": "`DelayedSAM`",
    "factor": "`perturb_every=5, amplify=True`", "every-third": "`perturb_every=3`",
    "looksam": "`LookSAM(k=5)`", "tail": "`tail`, the last 30 %",
    "part": "`split_closures`, a quarter of the batch", "sam": "`SAM`",
    "selected": "`select_samples`, half of the batch",
}  # fmt: skip
#: Those of README, and what it calls the tasks.
FEW = ("base", "msam", "delayed", "factor", "looksam", "part", "sam")
SHORT = {"digits": "digits", "mnist5k": "MNIST"}
#: What the columns call the comparisons.
TIMES = {"base_time": "the base's time", "sam_time": "SAM's time"}
FAILED = 20.0  # percent of accuracy: a run below it has learned nothing, as 10 % is chance
NONE = "-"

Line = Mapping[str, str]


class Results:
    """The lines of a price.csv, by task, comparison, contender and radius."""

    def __init__(self, path: Path) -> None:
        self.runs: dict[tuple[str, str, str], dict[float, list[Line]]] = {}
        with path.open(newline="", encoding="utf-8") as file:
            for line in csv.DictReader(file):
                key = line["task"], line["comparison"], line["contender"]
                self.runs.setdefault(key, {}).setdefault(float(line["rho"]), []).append(line)

    def radii(self, task: str, contender: str) -> dict[float, list[Line]]:
        """The runs of equal epochs by radius, from the lowest."""
        return dict(sorted(self.runs[task, "equal_epochs", contender].items()))

    def best(self, task: str, contender: str) -> float:
        """The radius that is best in validation."""
        radii = self.radii(task, contender)
        return max(radii, key=lambda rho: statistics.fmean(values(radii[rho], "validation")))

    def at_best(self, task: str, contender: str) -> list[Line]:
        return self.radii(task, contender)[self.best(task, contender)]

    def ratio(self, task: str, contender: str) -> str:
        """A step's time over the base's."""
        return f"{float(self.at_best(task, contender)[0]['time_ratio']):.2f}"

    def radius(self, task: str, contender: str) -> str:
        """The best radius, with a star if it is the lowest or the highest that was tried."""
        if contender == "base":
            return NONE
        radii, best = self.radii(task, contender), self.best(task, contender)
        return f"{best:g}" + "\\*" * (best in (min(radii), max(radii)))

    def in_time(self, task: str, contender: str, comparison: str) -> str:
        """The score after the time of the base, or of SAM."""
        if not any(key[:2] == (task, comparison) for key in self.runs):
            return NONE
        runs = self.runs.get((task, comparison, contender))
        # not trained once more where the time is nearly that of equal epochs
        return score(next(iter(runs.values())) if runs else self.at_best(task, contender), task)


def values(lines: Sequence[Line], column: str) -> list[float]:
    return [float(line[column]) for line in lines]


def score(lines: Sequence[Line], task: str, column: str = "score") -> str:
    """Mean and standard deviation over the seeds, of a loss with its sign back."""
    sign, digits = (1, 1) if TASKS[task].unit == "%" else (-1, 3)
    return mean_std([sign * value for value in values(lines, column)], digits)


def markdown(lines: list[list[str]]) -> str:
    """A table without the columns of which nothing is known."""
    known = [i for i in range(len(lines[0])) if any(line[i] != NONE for line in lines[1:])]
    rows = [f"| {' | '.join(line[i] for i in known)} |" for line in lines]
    return "\n".join([rows[0], "|" + " --- |" * len(known), *rows[1:]])


def of_task(results: Results, task: str) -> str:
    """A row per contender: what it costs, and what it gives in each comparison."""
    lines = [["method", "time of a step", "`rho`", "equal epochs", "best epoch", *TIMES.values()]]
    for name, title in ROWS.items():
        runs = results.at_best(task, name)
        lines.append([
            title, results.ratio(task, name), results.radius(task, name), score(runs, task),
            score(runs, task, "stopped"),
            *(results.in_time(task, name, comparison) for comparison in TIMES),
        ])  # fmt: skip
    return markdown(lines)


def of_images(results: Results) -> str:
    """README's: the same for fewer contenders, on both tasks of images."""
    head = ["method", "time of a step"]
    for short in SHORT.values():
        head += [f"{short}: {title}" for title in ("equal epochs", *TIMES.values())]
    lines = [head]
    for name in FEW:
        line = [ROWS[name], " / ".join(results.ratio(task, name) for task in SHORT)]
        for task in SHORT:
            line += [
                score(results.at_best(task, name), task),
                *(results.in_time(task, name, comparison) for comparison in TIMES),
            ]
        lines.append(line)
    return markdown(lines)


def at_radii(results: Results, task: str, contender: str) -> str:
    """The mean score at each radius, the best one in bold, and how many runs failed."""
    parts = []
    for rho, lines in results.radii(task, contender).items():
        failed = sum(value < FAILED for value in values(lines, "score"))
        text = score(lines, task).partition(" ")[0]
        if TASKS[task].unit != "%" or not failed:
            text = f"{rho:g}: {text}"
        elif failed == len(lines):
            text = f"{rho:g}: fails"
        else:
            text = f"{rho:g}: {text} ({failed} of {len(lines)} fail)"
        parts.append(f"**{text}**" if rho == results.best(task, contender) else text)
    return ", ".join(parts)


def by_radius(results: Results) -> str:
    """A row per contender, a column per task."""
    tasks = {**SHORT, "text": "text"}
    lines = [["method", *tasks.values()]]
    for name, title in ROWS.items():
        if name != "base":
            lines.append([title, *(at_radii(results, task, name) for task in tasks)])
    return markdown(lines)


def tables(results: Results) -> dict[tuple[str, str], str]:
    """Every table, by its page as seen from the root and by its name there."""
    choosing = "docs/choosing.md"
    return {
        ("README.md", "images"): of_images(results),
        **{(choosing, task): of_task(results, task) for task in TASKS},
        (choosing, "radii"): by_radius(results),
    }


def rewrite(path: Path) -> None:
    """Put the tables of a price.csv into the pages.

    Raises:
        ValueError: If a page lacks its marks, or the file a task, a contender or a column.
    """
    try:
        made = tables(Results(path))
    except KeyError as error:
        raise ValueError(f"{path} lacks {error}: run every task and method") from None
    for (page, name), text in made.items():
        write_between(ROOT / page, BEGIN.format(name), END.format(name), text)
