"""What the measurements of ``report.py`` say: ratios, their targets, and whether they are met."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from .contenders import COMPILED, FUSED, METHODS, SET_LABELS
from .measure import Timing
from .report_sections import COMPARED, GROWTH_TENSORS, HOST_TENSORS
from host_time import FRESH, STEP, SWEEP

# On a CPU and ResNet-50: fastsam's time over the copy's, and peers' over fastsam's.
COPY_TARGETS = {"copy": 1.15, "methods": 1.3}
MEASURED_IN = {"copy": "sam", "methods": "methods"}  # the timings that a section looks at
PEER_TARGETS = {"sam-sgd": 2.0, "sam-adamw": 3.2}
FUSED_PEER_TARGETS = {"sam-sgd": 1.7, "sam-adamw": 2.3}
# On a GPU: share of the copy's bandwidth, from so many parameters on.
GPU_LARGE = 100 * 10**6
GPU_BANDWIDTH = {"sam-sgd": 0.9, "sam-adamw": 0.9, "ssam-sgd": 0.9, "lightsam-3": 0.85}
GPU_FUSED_PEER_TARGET = 1.5
GPU_COMPILED_TARGET = {"gpt2": 1.1, "small": 2.0}
HOST_TARGETS = {161: 8.0, 1000: 6.0}
GROWTH_TARGET = 1.1

NO_GPU = "not measured: no GPU"


@dataclass(frozen=True)
class Row:
    """A line of the report; without a value ``note`` says why there is none."""

    section: str
    what: str
    value: float | None
    target: float | None = None
    relation: Literal["≤", "≥"] = "≤"
    note: str = ""

    @property
    def verdict(self) -> str:
        """``pass`` or ``FAIL``; ``-`` where there is nothing to judge."""
        if self.value is None or self.target is None:
            return "-"
        met = self.value <= self.target if self.relation == "≤" else self.value >= self.target
        return "pass" if met else "FAIL"

    def cells(self) -> list[str]:
        measured = self.note if self.value is None else f"{self.value:.3f}"
        target = "-" if self.target is None else f"{self.relation} {self.target:g}"
        return [self.what, measured, target, self.verdict]

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"verdict": self.verdict}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Row:
        return cls(**{key: value for key, value in fields.items() if key != "verdict"})


class Medians:
    """Median seconds by section, set, method and contender."""

    def __init__(self, timings: Iterable[Timing]):
        self.timings = list(timings)

    def of(self, section: str, name: str, method: str, contender: str) -> float | None:
        for t in self.timings:
            if (t.section, t.set, t.method, t.contender) == (section, name, method, contender):
                return t.times.median
        return None

    def over_copy(self, timing: Timing) -> float:
        """A contender's time over that of the copy that moves as many bytes."""
        (copy,) = (
            t
            for t in self.timings
            if (t.section, t.set) == (timing.section, timing.set)
            and t.bytes_per_parameter == timing.bytes_per_parameter
            and t.contender.startswith("copy")
        )
        return timing.times.median / copy.times.median

    def best_peer(
        self, section: str, name: str, method: str, fused: bool | None = None
    ) -> tuple[str, float] | None:
        """The fastest peer's name and seconds; ``fused`` says which bases count, None all."""
        peers = [
            (t.contender, t.times.median)
            for t in self.timings
            if (t.section, t.set, t.method) == (section, name, method)
            and not t.contender.startswith(("fastsam", "copy", COMPILED))
            and fused in (None, t.contender.endswith(FUSED))
        ]
        return min(peers, key=lambda peer: peer[1], default=None)


def label(name: str, method: str) -> str:
    return f"{SET_LABELS.get(name, name)} · {METHODS[method].label}"


def judge(
    timings: Sequence[Timing], sections: Sequence[str], sets: Sequence[str], on_gpu: bool
) -> list[Row]:
    """The rows of the report, in the order of the sections."""
    medians = Medians(timings)
    rows: list[Row] = []
    for section in sections:
        if section in MEASURED_IN:
            rows += judge_copy(medians, section, on_gpu)
        elif section == "peers":
            rows += judge_gpu_peers(medians, sets) if on_gpu else judge_peers(medians, sets)
        elif section == "host":
            rows += judge_host(medians)
        else:
            rows += judge_growth(timings)
    return rows


def judge_copy(medians: Medians, section: str, on_gpu: bool) -> list[Row]:
    """fastsam's time over the copy's; on a GPU, as is usual there, bandwidth over bandwidth."""
    rows = []
    for t in medians.timings:
        if t.section != MEASURED_IN[section] or t.contender != "fastsam":
            continue
        what, ratio = label(t.set, t.method), medians.over_copy(t)
        size = f"{t.bytes_per_parameter} B per parameter"
        if on_gpu:
            target = GPU_BANDWIDTH.get(t.method) if t.parameters >= GPU_LARGE else None
            what += f": bandwidth ÷ that of a copy, {size}"
            rows.append(Row(section, what, 1 / ratio, target, "≥"))
        else:
            target = COPY_TARGETS[section] if t.set == "resnet50" else None
            what += f": time ÷ that of a copy of {size}"
            rows.append(Row(section, what, ratio, target))
    return rows


def _faster(
    section: str, what: str, ours: float | None, theirs: tuple[str, float] | None,
    target: float | None,
) -> Row:  # fmt: skip
    if theirs is None or ours is None:
        return Row(section, what, None, target, "≥", "not measured: none is installed")
    return Row(section, f"{what} ({theirs[0]})", theirs[1] / ours, target, "≥")


def judge_peers(medians: Medians, sets: Sequence[str]) -> list[Row]:
    """On a CPU: ResNet-50 has targets of its own, elsewhere no peer may be faster."""
    rows = []
    for name in sets:
        for method in COMPARED:
            ours = medians.of("sam", name, method, "fastsam")
            what = f"{label(name, method)}: times as fast as the best peer"
            if name == "resnet50":
                best = medians.best_peer("sam", name, method, fused=False)
                rows.append(_faster("peers", what, ours, best, PEER_TARGETS[method]))
                best = medians.best_peer("sam", name, method, fused=True)
                what += " on a fused base"
                rows.append(_faster("peers", what, ours, best, FUSED_PEER_TARGETS[method]))
            else:
                best = medians.best_peer("sam", name, method)
                rows.append(_faster("peers", f"{what} of all", ours, best, 1.0))
    return rows


def judge_gpu_peers(medians: Medians, sets: Sequence[str]) -> list[Row]:
    rows = []
    for section, clock in (("sam", ""), ("wall", ", wall clock")):
        for name in sets:
            for method in COMPARED:
                ours = medians.of(section, name, method, "fastsam")
                if ours is None:  # large sets have no times by the wall clock
                    continue
                what = f"{label(name, method)}{clock}: times as fast as"
                judged = section == "sam"
                rows.append(_faster(
                    "peers", f"{what} the best peer on a fused base", ours,
                    medians.best_peer(section, name, method, fused=True),
                    GPU_FUSED_PEER_TARGET if judged else None,
                ))  # fmt: skip
                compiled = medians.of(section, name, method, COMPILED)
                if compiled is not None:
                    target = GPU_COMPILED_TARGET.get(name) if judged else None
                    rows.append(Row("peers", f"{what} {COMPILED} of a foreach SAM",
                                    compiled / ours, target, "≥"))  # fmt: skip
    return rows


def judge_host(medians: Medians) -> list[Row]:
    rows = []
    for tensors in HOST_TENSORS:
        name = f"{tensors} tensors"
        sweep = medians.of("host", name, "", SWEEP)
        for method in COMPARED:
            for contender in (STEP, FRESH):
                seconds = medians.of("host", name, method, contender)
                if sweep is None or seconds is None:
                    continue
                what = f"{METHODS[method].label}, {name}: host time of a {contender} ÷ a bare sweep"
                target = HOST_TARGETS.get(tensors) if contender == STEP else None
                rows.append(Row("host", what, seconds / sweep, target))
    return rows


def judge_growth(timings: Sequence[Timing]) -> list[Row]:
    rows = []
    grown = sorted((t for t in timings if t.section == "growth"), key=lambda t: t.parameters)
    if grown:
        each = [t.times.median / t.parameters for t in grown]
        what = (f"SAM + SGD: time per parameter, slowest ÷ fastest of "
                f"{millions(grown[0].parameters)} to {millions(grown[-1].parameters)}")  # fmt: skip
        rows.append(Row("growth", what, max(each) / min(each), GROWTH_TARGET))
    host = sorted((t for t in timings if t.section == "host" and t.contender == STEP
                   and t.method == "sam-sgd" and t.tensors in GROWTH_TENSORS),
                  key=lambda t: t.tensors)  # fmt: skip
    if len(host) > 1:
        first, last = host[0], host[-1]
        ratio = (last.times.median / last.tensors) / (first.times.median / first.tensors)
        what = (f"SAM + SGD: host time per tensor, {last.tensors:,} tensors ÷ "
                f"{first.tensors:,}")  # fmt: skip
        rows.append(Row("growth", what, ratio, GROWTH_TARGET))
        slope, start = host_line(host)
        what = "SAM + SGD: host time, line fitted: microseconds "
        rows.append(Row("growth", what + "per tensor", 1e6 * slope))
        rows.append(Row("growth", what + "per step", 1e6 * start))
    return rows


def host_line(host: Sequence[Timing]) -> tuple[float, float]:
    """Seconds per tensor and per step: the line that fits the relative errors best."""
    tensors = np.array([t.tensors for t in host], float)
    seconds = np.array([t.times.median for t in host])
    slope, start = np.polyfit(tensors, seconds, 1, w=1 / seconds)
    return float(slope), float(start)


def millions(parameters: int) -> str:
    return f"{parameters / 1e6:.3g}M"


def not_measured(sections: Sequence[str], note: str = NO_GPU) -> list[Row]:
    """The targets of a GPU, where none has been measured."""
    rows = []
    large = f"{millions(GPU_LARGE)} parameters and more"
    for method, target in GPU_BANDWIDTH.items():
        section = "copy" if method in COMPARED else "methods"
        what = f"GPU, {large} · {METHODS[method].label}: bandwidth ÷ that of a copy"
        rows.append(Row(section, what, None, target, "≥", note))
    what = "GPU: times as fast as the best peer on a fused base"
    rows.append(Row("peers", what, None, GPU_FUSED_PEER_TARGET, "≥", note))
    for name, target in GPU_COMPILED_TARGET.items():
        what = f"GPU, {SET_LABELS[name]}: times as fast as {COMPILED} of a foreach SAM"
        rows.append(Row("peers", what, None, target, "≥", note))
    return [row for row in rows if row.section in sections]


@dataclass(frozen=True)
class Report:
    """Everything that one run of ``report.py`` found: what its JSON file holds."""

    hardware: dict[str, Any]
    versions: dict[str, str]
    date: str
    rounds: int
    quick: bool
    timings: list[Timing]
    rows: list[Row]

    @property
    def on_gpu(self) -> bool:
        return self.hardware["kind"] == "gpu"

    @property
    def name(self) -> str:
        """Of its files: ``cpu``, or the GPU's."""
        return re.sub(r"[^a-z0-9]+", "-", self.hardware["name"].lower()) if self.on_gpu else "cpu"

    def save(self, path: Path) -> None:
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        for key in ("timings", "rows"):
            fields[key] = [entry.to_json() for entry in fields[key]]
        path.write_text(json.dumps(fields, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Report:
        fields = json.loads(path.read_text(encoding="utf-8"))
        fields["timings"] = [Timing.from_json(entry) for entry in fields["timings"]]
        fields["rows"] = [Row.from_json(entry) for entry in fields["rows"]]
        return cls(**fields)
