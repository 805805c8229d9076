"""SAMAR's two rules on three data sets: which is to be the default, and does either beat SAM?

The formulas of the paper (Zou, Deng and Sun, arXiv 2412.16854) could not be read. Both rules are
readings of its description: SharpnessRatio multiplies lam by clipped ratios of successive sharpness
values, and was seen to let lam walk at random between its bounds; SharpnessTrend takes the clipped
ratio of a fast and a slow average. Both run with their default constants, on the digits and on
MNIST images with 20 % of the training labels wrong, and on the characters of Python's
documentation, with AdamW as the base. Each method's radius is the one of three with the best mean
result on validation data.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .study_core import (
    Difference,
    Result,
    Run,
    Size,
    Study,
    Verdict,
    difference,
    diverged,
    group,
    plot_radii,
    plot_traces,
    radius_cell,
)
from .study_regularisation import quarters
from .three_tasks import (
    DATA,
    base_of,
    chosen,
    judge_default,
    label_of,
    runs_of,
    tested,
    tested_cell,
    train,
)
from common.outputs import align, mean_std

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RADII = {"digits": (0.05, 0.1, 0.2), "mnist5k": (0.05, 0.1, 0.2), "text": (0.01, 0.03, 0.1)}
TEXT_EPOCHS = 10  # of the images' epochs one is run on the text
RULES = {
    "samar": {"lam": 1.0, "c": 1.1, "lam_min": 0.1, "lam_max": 2.0},
    "samar-trend": {"lam": 1.0, "c": 2.0, "fast": 0.9, "slow": 0.99},
}  # fastsam's defaults
DEFAULT = "the rule by two averages is the better default."
PUBLISHED = "SAMAR is better than its base optimizer and than SAM: {}"


def make_runs(size: Size) -> list[Run]:
    runs = []
    for data in DATA:
        base, settings = base_of(data)
        cells = [(base, settings)]
        for method in ("sam", *RULES):
            own = RULES.get(method, {})
            cells += [(method, {**settings, "rho": rho, **own}) for rho in RADII[data]]
        epochs = max(1, size.epochs // TEXT_EPOCHS) if data == "text" else size.epochs
        runs += runs_of(data, cells, epochs, size)
    return runs


def tabulate(results: list[Result]) -> str:
    lines = [["data", "method", "rho", "test accuracy (%), loss (nats)", "lam, first quarter",
              "lam, last quarter", "diverged"]]  # fmt: skip
    for (data, method, rho), runs in group(results, "data", "method", "rho").items():
        lam = [mean_std(q, 2) for q in quarters(runs)] if method in RULES else ["-", "-"]
        lines.append([data, method, radius_cell(rho), tested_cell(runs), *lam, diverged(runs)])
    return align(lines)


def judge(results: list[Result]) -> list[Verdict]:
    """Each method stands, on each data set, at the radius of its best mean on the validation data.
    One is better (worse) than another where the mean over the seeds of the difference of
    accuracies, or of losses with the other sign, is above (below) its standard error. The rule by
    two averages is the better default, and becomes it (reproduced), if it is better than the other
    rule on two data sets of three at least and worse on none; partly, if on one, and worse on none.
    Each rule reproduces the paper's claim if it is better than the base optimizer and than SAM on
    every data set; partly if, on one at least, it is better than one of them and worse than none.
    """
    by_data = {data: chosen(runs) for data, runs in group(results, "data").items()}

    def gaps(method: str, other: str) -> dict[str, Difference]:
        return {data: difference(best[method], best[other], tested)
                for data, best in by_data.items() if other in best}  # fmt: skip

    between = gaps("samar-trend", "samar")
    outcome = judge_default(between.values())
    told = ", ".join(f"{gap} on {data}" for data, gap in between.items())
    verdicts = [Verdict(DEFAULT, outcome, f"By two averages less by ratios: {told}.")]
    for rule in RULES:
        over = [{**gaps(rule, "sgd"), **gaps(rule, "adamw")}, gaps(rule, "sam")]
        pairs = [tuple(gap[data] for gap in over) for data in by_data]
        if all(gap.higher for pair in pairs for gap in pair):
            outcome = "reproduced"
        elif any(any(g.higher for g in pair) and not any(g.lower for g in pair) for pair in pairs):
            outcome = "partly reproduced"
        else:
            outcome = "not reproduced"
        told = "; ".join(
            f"{data} {base} against the base optimizer, {sam} against SAM"
            for data, (base, sam) in zip(by_data, pairs, strict=True)
        )
        verdicts.append(Verdict(PUBLISHED.format(rule), outcome, f"{told}."))
    return verdicts


def draw(results: list[Result], figure: Figure) -> None:
    """Draw lam against the epoch and the results by radius: a row for each data set."""
    by_data = group(results, "data")
    axes = figure.subplots(len(by_data), 2, squeeze=False)
    for (over_time, at_end), (data, runs) in zip(axes, by_data.items(), strict=True):
        best = chosen(runs)
        for rule in RULES:
            radius = best[rule][0].get("rho")
            plot_traces(over_time, best[rule], label=f"{rule}, {radius:g}")
        over_time.set(title=data, xlabel="epoch", ylabel="lam (mean of the epoch)")
        for method, same in group(runs, "method").items():
            plot_radii(at_end, same, lambda r: abs(tested(r)), label=method)
        at_end.set(xlabel="rho", ylabel=label_of(data), xscale="log")
        for axis in (over_time, at_end):
            axis.grid(alpha=0.3)
            axis.legend(fontsize=8)


STUDY = Study(
    small=Size("digits", epochs=30, seeds=5, label_noise=0.2),
    full=Size("mnist5k", epochs=60, seeds=5, label_noise=0.2),
    make_runs=make_runs,
    execute=train,
    tabulate=tabulate,
    judge=judge,
    draw=draw,
    figure_size=(11.0, 11.0),
)
