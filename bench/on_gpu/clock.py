"""Time on the device, by its events: of a step, and of each kernel inside a step."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

#: Cycles for which the device is kept busy, so that the host is ahead of it: about a millisecond.
AHEAD = 2_000_000
#: Buffers that are written to before each measurement: this many times what the L2 cache holds.
BEYOND_CACHE = 4
LEAST = 64 * 2**20

Event = Any


class Clock:
    """Measures on one device, with a cold cache and without the host's share.

    Before each measurement a buffer far larger than the L2 cache is written, and the device is kept
    busy until the host has queued what is measured.
    """

    def __init__(self, device: torch.device, rehearsal: bool = False) -> None:
        self.device = device
        cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)
        size = 1024 if rehearsal else max(LEAST, BEYOND_CACHE * cache)
        self._buffer = torch.empty(size, dtype=torch.int8, device=device)
        self._sleep = None if rehearsal else getattr(torch.cuda, "_sleep", None)

    def prepare(self) -> None:
        """Have a cold cache, and a device that is busy for a while."""
        self._buffer.zero_()
        if self._sleep is not None:
            self._sleep(AHEAD)

    def median(self, step: Callable[[], Any], times: int, warmup: int = 3) -> float:
        """Seconds of a call, from the first thing that it has the device do to the last."""
        for _ in range(warmup):
            step()
        pairs = []
        for _ in range(times):
            self.prepare()
            start, end = _event(), _event()
            start.record()
            step()
            end.record()
            pairs.append((start, end))
        torch.cuda.synchronize(self.device)
        return statistics.median(map(_seconds, pairs))

    def sample(self, step: Callable[[], Any], times: int) -> Callable[[int], float]:
        """The same as ``speed.measure.alternate`` takes it."""
        return lambda steps: self.median(step, times, warmup=1)

    def of_kernels(
        self, first: Callable[[], Any], second: Callable[[], Any], times: int, warmup: int = 3
    ) -> dict[str, float]:
        """Median seconds of every kernel in a step of two passes, each measured alone.

        The last launch of the first pass is the perturbation, the last of the second the update;
        what comes before is a reduction.
        """
        for _ in range(warmup):
            first()
            second()
        taken: dict[str, list[tuple[Event, Event]]] = defaultdict(list)
        for _ in range(times):
            self.prepare()
            with events_of_launches() as pairs:
                first()
                before = len(pairs)
                second()
            names = launch_names(before, len(pairs) - before)
            for name, pair in zip(names, pairs, strict=True):
                taken[name].append(pair)
        torch.cuda.synchronize(self.device)
        return {name: statistics.median(map(_seconds, pairs)) for name, pairs in taken.items()}


def launch_names(first: int, second: int) -> list[str]:
    """What the launches of both passes are.

    Raises:
        RuntimeError: If they are not those of one bucket.
    """
    if first not in (1, 2) or second not in (1, 2):
        raise RuntimeError(
            f"expected one or two launches in each pass, got {first} and {second}: bench/on_gpu/"
            "clock.py has to follow a change of the triton backend"
        )
    return ["reduce"][: first - 1] + ["perturb"] + ["reduce again"][: second - 1] + ["update"]


@contextmanager
def events_of_launches() -> Iterator[list[tuple[Event, Event]]]:
    """Put an event before and one behind every launch of the triton backend."""
    from fastsam.backends.triton.launcher import Launched

    pairs: list[tuple[Event, Event]] = []
    original = Launched.__call__

    def launch(self: Launched) -> None:
        start, end = _event(), _event()
        start.record()
        original(self)
        end.record()
        pairs.append((start, end))

    Launched.__call__ = launch  # type: ignore[method-assign]
    try:
        yield pairs
    finally:
        Launched.__call__ = original  # type: ignore[method-assign]


def _event() -> Event:
    return torch.cuda.Event(enable_timing=True)


def _seconds(pair: tuple[Event, Event]) -> float:
    return pair[0].elapsed_time(pair[1]) / 1e3
