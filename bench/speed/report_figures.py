"""The figures of ``report.py``: bars of step times, and how time grows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .contenders import COMPILED, FUSED, METHODS, PEERS
from .measure import Timing
from .report_verdicts import Medians, Report, label, millions
from host_time import FRESH, STEP, SWEEP

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# a colour for a package, hatched with a fused base
COLOURS = {"fastsam": "C0", **{name: f"C{i}" for i, name in enumerate(PEERS, 1)}, COMPILED: "C3"}


def draw_bars(report: Report, path: Path) -> bool:
    """Draw every contender's step time over the copy's, a panel a set; False if there is none."""
    from matplotlib.figure import Figure

    panels: dict[str, dict[str, list[Timing]]] = {}
    for t in report.timings:
        if t.section in ("sam", "methods") and t.method and not t.contender.startswith("copy"):
            panels.setdefault(t.set, {}).setdefault(t.method, []).append(t)
    if not panels:
        return False
    heights = [1.5 + sum(1 + len(bars) for bars in groups.values()) for groups in panels.values()]
    figure = Figure(figsize=(10, 1 + 0.24 * sum(heights)), layout="constrained")
    rows = figure.subplots(len(panels), 1, height_ratios=heights, squeeze=False)[:, 0]
    for axis, groups in zip(rows, panels.values(), strict=True):
        _draw_panel(axis, groups, Medians(report.timings))
    rows[-1].set_xlabel("step time ÷ time of a copy of the bytes that fastsam has to move")
    entries = {}
    for axis in rows:
        entries |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    figure.legend(entries.values(), entries, loc="outside lower center", ncols=3, fontsize=8)
    figure.suptitle(title(report), fontsize=10)
    figure.savefig(path, dpi=130)
    return True


def _draw_panel(axis: Axes, groups: Mapping[str, list[Timing]], medians: Medians) -> None:
    """Draw one set: its bars from top to bottom, by method."""
    y, ticks = 0, {}
    for timings in groups.values():
        ticks[label(timings[0].set, timings[0].method)] = y + (len(timings) - 1) / 2
        for timing in timings:
            name, ratio = timing.contender, medians.over_copy(timing)
            colour, hatch = COLOURS[name.removesuffix(FUSED)], "///" * name.endswith(FUSED)
            axis.barh(y, ratio, color=colour, edgecolor="white", hatch=hatch, label=name)
            axis.annotate(f"{ratio:.2f}", (ratio, y), (3, 0), textcoords="offset points",
                          va="center", fontsize=7)  # fmt: skip
            y += 1
        y += 1
    axis.axvline(1, color="black", linewidth=1)
    axis.set_yticks(list(ticks.values()), list(ticks))
    axis.invert_yaxis()
    axis.margins(x=0.08, y=0.02)


def draw_growth(report: Report, path: Path) -> bool:
    """Draw time by parameters and host time by tensors; False if there is neither."""
    from matplotlib.figure import Figure

    draws = {"growth": _draw_parameters, "host": _draw_tensors}
    panels = {section: sorted((t for t in report.timings if t.section == section),
                              key=lambda t: (t.parameters, t.tensors))
              for section in draws}  # fmt: skip
    panels = {section: timings for section, timings in panels.items() if timings}
    if not panels:
        return False
    figure = Figure(figsize=(5.5 * len(panels), 4.5), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (section, timings) in zip(axes, panels.items(), strict=True):
        draws[section](axis, timings)
        axis.grid(alpha=0.3, which="both")
        axis.legend(fontsize=8)
    figure.suptitle(title(report), fontsize=10)
    figure.savefig(path, dpi=130)
    return True


def _draw_parameters(axis: Axes, timings: Sequence[Timing]) -> None:
    sizes = [t.parameters for t in timings]
    axis.loglog(sizes, [1e3 * t.times.median for t in timings], "o-", label="SAM + SGD")
    first = timings[0].times.median / sizes[0]
    axis.loglog(sizes, [1e3 * first * size for size in sizes], "k:",
                label=f"proportional, from {millions(sizes[0])}")  # fmt: skip
    axis.set(xlabel="parameters", ylabel="step time (ms)")


def _draw_tensors(axis: Axes, timings: Sequence[Timing]) -> None:
    lines: dict[str, list[Timing]] = {}
    for timing in timings:
        who = METHODS[timing.method].label if timing.method else "bare sweep over addresses"
        moved = ", moved gradients" if timing.contender == FRESH else ""
        lines.setdefault(who + moved, []).append(timing)
    for name, line in lines.items():
        style = {SWEEP: "k.-", STEP: "o-", FRESH: "x--"}[line[0].contender]
        axis.loglog([t.tensors for t in line], [1e6 * t.times.median for t in line], style,
                    label=name)  # fmt: skip
    axis.set(xlabel="tensors", ylabel="host time (µs), launches left out",
             title="triton backend on the host")  # fmt: skip


def title(report: Report) -> str:
    """The hardware, the version of torch and the date."""
    hardware = report.hardware
    cores = "" if report.on_gpu else f", {hardware['cores']} cores"
    return f"{hardware['name']}{cores}; torch {report.versions['torch']}; {report.date}"
