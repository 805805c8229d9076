"""The stage under torch's profiler: what the driver says of each kernel that runs."""

from __future__ import annotations

import json
import statistics
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from .problems import Trial, fitting, release
from .stages import Context

#: Reductions and updates of 16-bit tensors, and a reduction that reads two streams.
PROFILED = [("sam-adamw", torch.bfloat16), ("samar-sgd", torch.float32)]
#: What a trace says of a kernel beside its time.
WORTH_KEEPING = ("grid", "block", "registers per thread", "shared memory", "blocks per SM",
                 "warps per SM", "est. achieved occupancy %")  # fmt: skip
STEPS = 10


def profile(context: Context) -> None:
    """Time, registers and occupancy of every kernel in a few steps.

    Raises:
        RuntimeError: If the profiler sees none.
    """
    elements = 20_000 if context.rehearsal else 100_000_000
    for name, dtype in PROFILED:
        count = fitting(name, elements, dtype, release(context.device))
        trial = Trial(name, count, 5 if context.rehearsal else 150, dtype, context.device)
        for _ in range(3):
            trial.first()
            trial.second()
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profiler:
            for _ in range(2 if context.rehearsal else STEPS):
                trial.first()
                trial.second()
            torch.cuda.synchronize(context.device)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            profiler.export_chrome_trace(str(path))
            found = kernels_in(json.loads(path.read_text(encoding="utf-8")))
        if not found and not context.rehearsal:
            raise RuntimeError("the profiler has seen no kernel: it may lack the right to look")
        for kernel in found:
            context.add(case=name, dtype=str(dtype)[6:], elements=count, **kernel)
        del trial
        context.say(f"{name}, {str(dtype)[6:]}: {len(found)} kernels")


def kernels_in(trace: dict[str, Any]) -> list[dict[str, Any]]:
    """The kernels of a trace: name, number of launches, median seconds, and what else it says."""
    launches: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for event in trace.get("traceEvents", ()):
        if event.get("cat") == "kernel":
            launches[event["name"]].append(event)
    return [
        {
            "kernel": name,
            "launches": len(events),
            "seconds": statistics.median(event["dur"] for event in events) / 1e6,
            **{key: events[0]["args"][key] for key in WORTH_KEEPING
               if key in events[0].get("args", {})},
        }
        for name, events in launches.items()
    ]  # fmt: skip
