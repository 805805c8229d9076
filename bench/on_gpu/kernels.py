"""Stages that time kernels: each alone against a copy, and under other launch configurations."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from fastsam.kernels.layout import Launch, Launches

from .clock import Clock
from .problems import CASES, Trial, fitting, release
from .stages import Context

#: Elements and dtype of every size, and in how many tensors they come.
SIZES = [
    ("100M float32", 100_000_000, torch.float32, 150),
    ("100M bfloat16", 100_000_000, torch.bfloat16, 150),
    ("1B bfloat16", 1_000_000_000, torch.bfloat16, 300),
]
REHEARSED = [("20k float32", 20_000, torch.float32, 5), ("20k bfloat16", 20_000, torch.bfloat16, 5)]
TIMES = 20
#: A kind of launch, elements per program, and the case and dtype on which it is tried.
CONFIGURATIONS = [
    (kind, chunk, case, dtype)
    for kind, chunks, trials in [
        ("reduce_streams", (2048, 4096, 8192), [
            ("samar-sgd", torch.float32), ("vasso-sgd", torch.float32),
            ("samar-sgd", torch.bfloat16),
        ]),
        ("reduce", (8192, 16_384), [("sam-adamw", torch.float32), ("sam-adamw", torch.bfloat16)]),
        ("reduce_scaled", (2048, 4096), [("asam-sgd", torch.float32)]),
        ("perturb", (1024, 2048), [("sam-adamw", torch.float32), ("sam-adamw", torch.bfloat16)]),
        ("update", (1024, 2048), [("sam-adamw", torch.bfloat16), ("sam-sgd", torch.float32)]),
    ]
    for case, dtype in trials for chunk in chunks
]  # fmt: skip
#: Elements at which the order of what follows a reduction is tried: from what a cache holds to far
#: beyond.
WALKED = (4_000_000, 10_000_000, 30_000_000, 100_000_000)


def kernels(context: Context) -> None:
    """Bytes per second of a copy and of every kernel, by size."""
    clock = Clock(context.device, context.rehearsal)
    times = 2 if context.rehearsal else TIMES
    for size, elements, dtype, tensors in REHEARSED if context.rehearsal else SIZES:
        speed = _copy(clock, elements, dtype, times)
        context.add(size=size, case="copy", kernel="copy", bytes_per_second=speed)
        for name in CASES:
            count = fitting(name, elements, dtype, release(context.device))
            trial = Trial(name, count, tensors, dtype, context.device)
            for kernel, seconds in clock.of_kernels(trial.first, trial.second, times).items():
                moved = count * trial.case.bytes_of(kernel, dtype, trial.scratch)
                context.add(
                    size=size, case=name, kernel=kernel, elements=count, bytes=moved,
                    seconds=seconds, **_rates(moved, seconds, speed),
                )  # fmt: skip
            del trial
            context.say(f"{size}: {CASES[name].label}")


def _rates(moved: int, seconds: float, speed: float) -> dict[str, float]:
    """Bytes per second, and what part of the copy's that is."""
    rate = moved / seconds if seconds > 0 else 0.0
    return {"bytes_per_second": rate, "of_copy": rate / speed if speed > 0 else 0.0}


def _copy(clock: Clock, elements: int, dtype: torch.dtype, times: int) -> float:
    free = release(clock.device)
    while elements > 1024 and 2 * elements * dtype.itemsize > free // 2:
        elements //= 2
    source = torch.zeros(elements, dtype=dtype, device=clock.device)
    target = torch.empty_like(source)
    seconds = clock.median(lambda: target.copy_(source), times)
    return 2 * elements * dtype.itemsize / seconds if seconds > 0 else 0.0


# --- candidates ------------------------------------------------------------------------------


def candidates(context: Context) -> None:
    """What a measurement has to decide: sizes of chunks, and their order."""
    clock = Clock(context.device, context.rehearsal)
    times = 2 if context.rehearsal else TIMES
    elements = 20_000 if context.rehearsal else 100_000_000
    tensors = 5 if context.rehearsal else 150
    chosen = CONFIGURATIONS[:: 9 if context.rehearsal else 1]
    for kind, chunk, name, dtype in chosen:
        count = fitting(name, elements, dtype, release(context.device))
        launches = with_chunk(kind, chunk)
        trial = Trial(name, count, tensors, dtype, context.device, launches)
        found = clock.of_kernels(trial.first, trial.second, times)
        context.add(
            what="chunk", kind=kind, chunk=chunk, case=name, dtype=str(dtype)[6:],
            in_use=is_in_use(launches, kind, dtype), elements=count, seconds=found,
        )  # fmt: skip
        del trial
        context.say(f"{kind} {chunk}: {CASES[name].label}, {str(dtype)[6:]}")
    for count in (20_000,) if context.rehearsal else WALKED:
        count = fitting("sam-sgd", count, torch.float32, release(context.device))
        for backwards in (True, False):
            launches = dataclasses.replace(Launches(), backwards=backwards)
            trial = Trial("sam-sgd", count, tensors, torch.float32, context.device, launches)
            found = clock.of_kernels(trial.first, trial.second, times)
            context.add(what="order", backwards=backwards, elements=count, seconds=found)
            del trial
        context.say(f"order of the chunks: {count:,}")


def with_chunk(kind: str, chunk: int) -> Launches:
    """Launch configurations with so many elements per program of one kind, whatever the dtype."""
    lanes = getattr(Launches(), kind).lanes
    changed: dict[str, Any] = {kind: Launch(chunk, lanes)}
    return dataclasses.replace(Launches(), **changed)


def is_in_use(launches: Launches, kind: str, dtype: torch.dtype) -> bool:
    """Whether tensors of this dtype are launched like that as it is."""
    halves = dtype.itemsize == 2
    return bool(getattr(launches, kind).on(halves) == getattr(Launches(), kind).on(halves))
