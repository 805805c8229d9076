"""Figures of what was timed: kernels against the copy, and steps against peers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .problems import CASES
from .records import Record
from speed.contenders import METHODS, SET_LABELS


def draw_all(records: Mapping[str, Record], folder: Path) -> list[Path]:
    """Draw what there are results for; the files that were written."""
    import matplotlib

    matplotlib.use("Agg")
    written = []
    for name, draw in (("kernels", draw_kernels), ("peers", draw_peers)):
        if name in records and (figure := draw(records[name])) is not None:
            written.append(folder / f"{name}.png")
            figure.savefig(written[-1], dpi=150)
    return written


def caption(record: Record) -> str:
    machine = record.machine
    text = f"{machine['gpu']}; torch {machine['torch']}, triton {machine['triton']}"
    return f"{'REHEARSAL, no measurement: ' * record.rehearsal}{text}; {machine['date']}"


def draw_kernels(record: Record) -> Any:
    """Bytes per second of every kernel, as part of the copy's."""
    from matplotlib.figure import Figure

    timed = [x for x in record.results if x.get("kernel") != "copy"]
    sizes = list(dict.fromkeys(x["size"] for x in timed))
    bars = list(dict.fromkeys((x["case"], x["kernel"]) for x in timed))
    if not bars:
        return None
    figure = Figure(figsize=(9, 0.3 * len(bars) * max(1, len(sizes)) + 1.5), layout="constrained")
    axis = figure.subplots()
    for i, size in enumerate(sizes):
        found = {(x["case"], x["kernel"]): x["of_copy"] for x in timed if x["size"] == size}
        places = [k + i / (len(sizes) + 1) for k, bar in enumerate(bars) if bar in found]
        values = [100 * found[bar] for bar in bars if bar in found]
        axis.barh(places, values, height=1 / (len(sizes) + 1), label=size)
    axis.set_yticks(
        [k + (len(sizes) - 1) / 2 / (len(sizes) + 1) for k in range(len(bars))],
        [f"{CASES[case].label}: {kernel}" for case, kernel in bars],
    )
    axis.invert_yaxis()
    axis.axvline(100, color="black", linewidth=0.8)
    axis.set(xlabel="bytes per second, % of a device copy's")
    figure.suptitle(caption(record), fontsize="small")
    axis.legend()
    return figure


def draw_peers(record: Record) -> Any:
    """Every contender's time of a step, over fastsam's."""
    from matplotlib.figure import Figure

    timed = [x for x in record.results if "seconds" in x]
    groups = list(dict.fromkeys((x["set"], x["method"]) for x in timed))
    names = list(dict.fromkeys(x["contender"] for x in timed))
    names = [name for name in names if name != "fastsam" and not name.startswith("copy")]
    if not groups or not names:
        return None
    figure = Figure(figsize=(1.6 * len(groups) + 3, 4.5), layout="constrained")
    axis = figure.subplots()
    for i, name in enumerate(names):
        places, values = [], []
        for k, (chosen, method) in enumerate(groups):
            ours = record.of(set=chosen, method=method, contender="fastsam")
            theirs = record.of(set=chosen, method=method, contender=name)
            if ours and theirs and ours[0]["seconds"] > 0:
                places.append(k + i / (len(names) + 1))
                values.append(theirs[0]["seconds"] / ours[0]["seconds"])
        axis.bar(places, values, width=1 / (len(names) + 1), label=name)
    axis.set_xticks(
        [k + (len(names) - 1) / 2 / (len(names) + 1) for k in range(len(groups))],
        [f"{SET_LABELS.get(chosen, chosen)}\n{METHODS[method].label}" for chosen, method in groups],
    )
    axis.axhline(1, color="black", linewidth=0.8)
    axis.set(ylabel="time of a step over fastsam's")
    figure.suptitle(caption(record), fontsize="small")
    axis.legend()
    return figure
