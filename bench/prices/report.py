"""What ``price.py`` leaves behind: tables, verdicts, a CSV and a figure."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .contenders import CONTENDERS
from .measure import Outcome, Split
from .peers import PEERS
from .tasks import TASKS
from common.outputs import align, mean_std, write_lines

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_TIME = 1.35  # of the base's
#: Which of the contenders are to keep how much of SAM's gain, in percent.
GOALS = {f"within {MOST_TIME:g} times the base's time": 90.0, "with one pass a step": 85.0}

#: The most that a step may take, whole, over the base's.
TIMES = {"msam": 1.10, "looksam": 1.35, "factor": 1.35, "tail": 1.35}


@dataclass(frozen=True)
class Found:
    """What was found for a task: times of a step, and outcomes.

    Attributes:
        equal_epochs: Of as many epochs as the base's, at every radius.
        base_time, sam_time: Of as many epochs as take the base's time, or SAM's, at the best.
        peers: Of equal epochs, at the best radius of fastsam's own method.
    """

    task: str
    times: Mapping[str, Split]
    equal_epochs: Sequence[Outcome]
    base_time: Sequence[Outcome] = ()
    sam_time: Sequence[Outcome] = ()
    peers: Sequence[Outcome] = ()

    def ratio(self, contender: str) -> float:
        """A step's time over the base's."""
        return self.times[contender].total / self.times["base"].total

    def best(self) -> dict[str, list[Outcome]]:
        """Each contender's runs at equal epochs, at the radius that is best in validation."""
        chosen: dict[str, list[Outcome]] = {}
        for radii in by_contender(self.equal_epochs).values():
            runs = max(radii.values(), key=mean_validation)
            chosen[runs[0].training.contender] = runs
        return chosen

    def share(self, outcomes: list[Outcome]) -> float | None:
        """The share of SAM's gain over the base that is kept, in percent; None without a gain."""
        best = self.best()
        gain = mean_score(best["sam"]) - mean_score(best["base"])
        error = spread(best["sam"]) + spread(best["base"])
        if gain <= error:
            return None
        return 100 * (mean_score(outcomes) - mean_score(best["base"])) / gain


def by_contender(outcomes: Sequence[Outcome]) -> dict[str, dict[float, list[Outcome]]]:
    """Outcomes by contender and radius."""
    found: dict[str, dict[float, list[Outcome]]] = {}
    for outcome in outcomes:
        training = outcome.training
        found.setdefault(training.contender, {}).setdefault(training.rho, []).append(outcome)
    return found


def mean_score(outcomes: Sequence[Outcome]) -> float:
    return statistics.fmean(outcome.score for outcome in outcomes)


def mean_validation(outcomes: Sequence[Outcome]) -> float:
    return statistics.fmean(outcome.validation for outcome in outcomes)


def spread(outcomes: Sequence[Outcome]) -> float:
    """The standard error of the mean; 0 for one seed."""
    scores = [outcome.score for outcome in outcomes]
    return statistics.stdev(scores) / len(scores) ** 0.5 if len(scores) > 1 else 0.0


def shown(outcomes: Sequence[Outcome], task: str) -> str:
    """Accuracies as they are, losses with their sign back."""
    text = _mean_std([outcome.score for outcome in outcomes], task)
    count = sum(outcome.diverged for outcome in outcomes)
    return text + (f" ({count} div.)" if count else "")


def _mean_std(scores: list[float], task: str) -> str:
    sign, digits = (1, 1) if TASKS[task].unit == "%" else (-1, 4)
    return mean_std([sign * score for score in scores], digits)


def shown_at(found: Found, name: str, outcomes: Sequence[Outcome]) -> tuple[str, str]:
    """Return the epochs that a contender trained for, and what that gave."""
    runs = by_contender(outcomes).get(name)
    if runs is None:
        return "-", "-"
    (same,) = runs.values()
    return f"{same[0].training.epochs:.1f}", shown(same, found.task)


def table(found: Found) -> str:
    """Return a line per contender: its price, and what it got for it."""
    unit = TASKS[found.task].unit
    measure = f"test accuracy ({unit})" if unit == "%" else f"test loss ({unit})"
    lines = [["method", "passes", "relative time", "varies by", "ms: passes", "optimizer", "rest",
              "rho", f"{measure}, equal epochs", "share of SAM's gain", "after its best epoch",
              "epochs in the base's time", "what they give", "in SAM's time",
              "what they give"]]  # fmt: skip
    for name, outcomes in found.best().items():
        split, share = found.times[name], found.share(outcomes)
        lines.append([
            CONTENDERS[name].title, f"{CONTENDERS[name].passes:.2f}", f"{found.ratio(name):.2f}",
            f"{split.variation:.0f} %", f"{split.passes:.2f}", f"{split.optimizer:.2f}",
            f"{split.rest:.2f}",
            "-" if name == "base" else f"{outcomes[0].training.rho:g}",
            shown(outcomes, found.task), "-" if share is None else f"{share:.0f} %",
            _mean_std([outcome.stopped for outcome in outcomes], found.task),
            *shown_at(found, name, found.base_time), *shown_at(found, name, found.sam_time),
        ])  # fmt: skip
    return align(lines)


def peers_table(found: Found) -> str:
    """Return a line per peer, each after fastsam's own method with the same radius."""
    task = found.task
    lines = [["against peers", "relative time", "ms: passes", "optimizer", "rest", "rho",
              f"{TASKS[task].unit}, equal epochs", "relative to fastsam's"]]  # fmt: skip

    def line(title: str, name: str, outcomes: list[Outcome], ratio: str) -> list[str]:
        split = found.times[name]
        return [title, f"{found.ratio(name):.2f}", f"{split.passes:.2f}", f"{split.optimizer:.2f}",
                f"{split.rest:.2f}", f"{outcomes[0].training.rho:g}", shown(outcomes, task),
                ratio]  # fmt: skip

    best = found.best()
    for name, radii in by_contender(found.peers).items():
        like = PEERS[name].like
        ratio = found.times[name].total / found.times[like].total
        lines.append(line(CONTENDERS[like].title, like, best[like], "1"))
        lines.append(line(PEERS[name].title, name, next(iter(radii.values())), f"{ratio:.2f}"))
    return align(lines)


def radii_table(found: Found) -> str:
    """Return what every radius that was tried gave, at equal epochs."""
    lines = [["method", "rho", "validation", "test"]]
    for name, radii in by_contender(found.equal_epochs).items():
        for rho, outcomes in radii.items():
            radius = "-" if name == "base" else f"{rho:g}"
            validation = _mean_std([outcome.validation for outcome in outcomes], found.task)
            lines.append([CONTENDERS[name].title, radius, validation, shown(outcomes, found.task)])
    return align(lines)


def time_verdicts(found: Found) -> list[str]:
    """Return whether steps are as quick as they are to be."""
    lines = []
    for name, goal in TIMES.items():
        if name in found.times:
            verdict = "met" if found.ratio(name) <= goal else "MISSED"
            lines.append(
                f"A step of {CONTENDERS[name].title} takes {found.ratio(name):.2f} times the "
                f"base's (goal {goal:g}): {verdict}."
            )
    return lines


def verdicts(found: Found) -> list[str]:
    """Return whether the goals are met: the best share of SAM's gain within a multiple of time."""
    best = found.best()
    if found.share(best["sam"]) is None:
        return ["SAM gains nothing here that is above the error of its mean: no share is told."]
    rivals = [name for name in best if name not in ("base", "sam")]
    members = (
        [name for name in rivals if found.ratio(name) <= MOST_TIME],
        [name for name in rivals if CONTENDERS[name].passes == 1],
    )
    lines = []
    for (which, goal), names in zip(GOALS.items(), members, strict=True):
        shares = {name: found.share(best[name]) or 0.0 for name in names}
        if not shares:
            lines.append(f"None was run {which}.")
            continue
        name = max(shares, key=lambda key: shares[key])
        verdict = "met" if shares[name] >= goal else "MISSED"
        lines.append(
            f"{which.capitalize()}, {CONTENDERS[name].title} keeps {shares[name]:.1f} % of SAM's "
            f"gain (goal {goal:g} %): {verdict}."
        )
    return lines


def write_csv(found: Sequence[Found], path: Path) -> None:
    """Write one line per training."""
    lines: list[Sequence[object]] = [["task", "comparison", "contender", "rho", "seed", "epochs",
                                      "score", "validation", "stopped", "diverged",
                                      "time_ratio"]]  # fmt: skip
    for one in found:
        for comparison in ("equal_epochs", "base_time", "sam_time", "peers"):
            for outcome in getattr(one, comparison):
                t = outcome.training
                lines.append([t.task, comparison, t.contender, t.rho, t.seed, t.epochs,
                              outcome.score, outcome.validation, outcome.stopped,
                              int(outcome.diverged),
                              round(one.ratio(t.contender), 4)])  # fmt: skip
    write_lines(lines, path)


FAR = 8  # times the median distance from the base: such a point is drawn at the edge


def draw(found: Sequence[Found], figure: Figure) -> None:
    """Draw what is got against its price, a panel a task: equal epochs, each at its best radius.

    Bars are standard deviations over the seeds.
    """
    axes = figure.subplots(1, len(found), squeeze=False)[0]
    for axis, one in zip(axes, found, strict=True):
        unit = TASKS[one.task].unit
        sign = 1 if unit == "%" else -1
        best = one.best()
        base = mean_score(best["base"])
        edge = FAR * statistics.median(abs(mean_score(runs) - base) for runs in best.values())
        for i, (name, outcomes) in enumerate(best.items()):
            x, y, title = one.ratio(name), mean_score(outcomes), CONTENDERS[name].title
            bar = statistics.stdev(o.score for o in outcomes) if len(outcomes) > 1 else 0.0
            if edge and base - y > edge:
                y, bar = base - edge, 0.0
                axis.annotate(f"below: {shown(outcomes, one.task)}", (x, sign * y), (0, 9),
                              fontsize=8, textcoords="offset points", ha="center")  # fmt: skip
            axis.errorbar(x, sign * y, bar, marker="osD^v<>Ph*"[i % 10], capsize=3, ls="none",
                          color=f"C{i % 10}", label=title)  # fmt: skip
        score = "test accuracy in %" if unit == "%" else "test loss in nats (lower is better)"
        axis.set(xlabel="time of a step, relative to the base's", ylabel=score,
                 title=TASKS[one.task].title)  # fmt: skip
        if sign < 0:
            axis.invert_yaxis()  # better is higher in all panels
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
