"""Timing contenders in turns, and saying on what they were timed.

What is compared is timed in one process and in alternation, A B C A B C: whatever slows the machine
for a while then meets all of them, and the ratio of two medians keeps its meaning.
"""

from __future__ import annotations

import dataclasses
import gc
import importlib.metadata
import os
import platform
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

#: Takes the seconds of a step: their mean over the given number of consecutive steps.
Sample = Callable[[int], float]

WARMUP = 3  # samples before the first that counts: state and scratch memory are there then
SHORTEST = 2e-3  # seconds; a sample is as many steps as take so long, for the clock's sake


class Times(NamedTuple):
    """Seconds of a step: median and quartiles of so many samples of so many steps."""

    median: float
    lower: float
    upper: float
    rounds: int
    steps: int


@dataclass(frozen=True)
class Timing:
    """A contender's times and what they are of; a line of the results.

    ``bytes_per_parameter`` is what the method has to move, or what the copy moves; 0 where bytes
    are not what is looked at.
    """

    section: str
    set: str
    method: str
    contender: str
    tensors: int
    parameters: int
    bytes_per_parameter: int
    times: Times

    def to_json(self) -> dict[str, Any]:
        fields = dataclasses.asdict(self)
        return fields | {"times": self.times._asdict()}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Timing:
        return cls(**{**fields, "times": Times(**fields["times"])})


def _nothing() -> None:
    pass


def wall_clock(step: Callable[[], Any], synchronize: Callable[[], None] = _nothing) -> Sample:
    """Time by the wall clock; ``synchronize`` waits until the device has done the steps."""

    def sample(steps: int) -> float:
        synchronize()
        start = time.perf_counter()
        for _ in range(steps):
            step()
        synchronize()
        return (time.perf_counter() - start) / steps

    return sample


def device_clock(step: Callable[[], Any]) -> Sample:
    """Time by a GPU's events: Triton's ``do_bench``, which empties the cache before every step."""
    from triton.testing import do_bench

    def sample(steps: int) -> float:
        del steps  # do_bench chooses their number
        return do_bench(step, return_mode="median") / 1e3

    return sample


def alternate(
    samples: Mapping[Any, Sample], rounds: int, shortest: float = SHORTEST, steps: int | None = None
) -> dict[Any, Times]:
    """Sample all contenders in turns.

    Args:
        samples: By contender, in the order of the turns.
        rounds: How often each gets its turn.
        shortest: Seconds that a turn takes at least, by taking several steps; 0 for one step.
        steps: Steps of every turn, instead of ``shortest``.
    """
    counts = {}
    for name, sample in samples.items():
        fastest = min(sample(1) for _ in range(WARMUP))
        counts[name] = steps or max(1, min(1000, int(np.ceil(shortest / max(fastest, 1e-9)))))
    taken: dict[Any, list[float]] = {name: [] for name in samples}
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()  # a collection would fall into some measurement
    try:
        for _ in range(rounds):
            for name, sample in samples.items():
                taken[name].append(sample(counts[name]))
    finally:
        if enabled:
            gc.enable()
    result = {}
    for name, seconds in taken.items():
        lower, median, upper = (float(x) for x in np.percentile(seconds, (25, 50, 75)))
        result[name] = Times(median, lower, upper, rounds, counts[name])
    return result


def describe_hardware(device: torch.device) -> dict[str, Any]:
    """The GPU's name, or the processor's and how much of it is used."""
    if device.type == "cuda":
        return {"kind": "gpu", "name": torch.cuda.get_device_name(device),
                "processor": _processor()}  # fmt: skip
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"kind": "cpu", "name": _processor(), "cores": cores,
            "threads": torch.get_num_threads()}  # fmt: skip


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE)
        if found:
            return found[1].strip()
    return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """What was compared, by package; packages that are not installed are left out."""
    found = {"Python": platform.python_version(), "torch": torch.__version__}
    for name in ("triton", "fastsam", "pytorch-optimizer", "unifiedsam"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
