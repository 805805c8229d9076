"""The measurements of ``report.py``, by section; ``report_verdicts`` judges what they mean."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Sequence

import torch

from .contenders import (
    METHODS,
    Contender,
    Problem,
    compiled_contender,
    copy_contender,
    count,
    fastsam_contender,
    parameter_set,
    peer_contenders,
)
from .measure import SHORTEST, Sample, Timing, alternate, device_clock, wall_clock
from host_time import measure_in_child

SECTIONS = {
    "copy": "SAM against a plain copy of the bytes that it has to move",
    "peers": "SAM against published packages",
    "methods": "methods with more work against the copy of their own bytes",
    "host": "the triton backend's work on the host",
    "growth": "time by number of parameters, host time by number of tensors",
}
LARGE = 50 * 10**6  # parameters, from which half of the rounds are made
COMPARED = ("sam-sgd", "sam-adamw")  # the methods that peers have as well
MORE_WORK = tuple(method for method in METHODS if method not in COMPARED)
MORE_WORK_ON_GPU = ("ssam-sgd", "lightsam-3")
HOST_TENSORS = (161, 1000)
GROWTH_TENSORS = (100, 300, 1000, 3000)
GROWTH_PARAMETERS = tuple(n * 10**6 for n in (10, 30, 100, 200))
GROWTH_ELEMENTS = 250_000  # per tensor: the number of tensors grows with that of parameters


def rounds_for(parameters: int, rounds: int) -> int:
    """Half for sets whose rounds take long, and scatter less."""
    return -(-rounds // 2) if parameters > LARGE else rounds


def clock(contender: Contender, device: torch.device) -> Sample:
    return device_clock(contender.step) if device.type == "cuda" else wall_clock(contender.step)


def take_turns(
    section: str, name: str, device: torch.device, entries: Sequence[tuple[str, int, Contender]],
    parameters: int, tensors: int, rounds: int,
    clock: Callable[[Contender, torch.device], Sample] = clock,
) -> list[Timing]:  # fmt: skip
    """Time contenders, each with its method and bytes per parameter, in turns."""
    samples = {
        (method, size, contender.name): clock(contender, device)
        for method, size, contender in entries
    }
    by_events = device.type == "cuda" and section != "wall"  # which take many steps by themselves
    times = alternate(samples, rounds, 0 if by_events else SHORTEST)
    return [
        Timing(section, name, method, contender, tensors, parameters, size, taken)
        for (method, size, contender), taken in times.items()
    ]


def measure_sam(
    name: str, method: str, device: torch.device, rounds: int, with_peers: bool
) -> list[Timing]:
    """SAM on one base and one set: fastsam, the copy and, if asked for, the peers."""
    shapes = parameter_set(name)
    problem = Problem(shapes, device)
    floor = METHODS[method].floor(device)
    contenders = [fastsam_contender(problem, method), copy_contender(problem, floor)]
    if with_peers:
        contenders += peer_contenders(problem, method)
        if device.type == "cuda":
            contenders.append(compiled_contender(problem, method))
    entries = [(method, floor, contender) for contender in contenders]
    size = count(shapes)
    number = rounds_for(size, rounds)
    timings = take_turns("sam", name, device, entries, size, len(shapes), number)
    if device.type == "cuda" and size < LARGE:
        # do_bench lets the host run ahead while the cache is emptied; a training loop does not
        timings += take_turns(
            "wall", name, device, entries, size, len(shapes), number,
            lambda contender, _: wall_clock(contender.step, torch.cuda.synchronize),
        )  # fmt: skip
    return timings


def measure_methods(
    name: str, methods: Iterable[str], device: torch.device, rounds: int
) -> list[Timing]:
    """Methods on one set, and a copy for each number of bytes that one of them has to move."""
    shapes = parameter_set(name)
    problem = Problem(shapes, device)
    entries = []
    floors = dict.fromkeys(METHODS[method].floor(device) for method in methods)
    for method in methods:
        contender = fastsam_contender(problem, method)
        entries.append((method, METHODS[method].floor(device), contender))
    entries += [("", floor, copy_contender(problem, floor)) for floor in floors]
    size = count(shapes)
    return take_turns("methods", name, device, entries, size, len(shapes), rounds_for(size, rounds))


def measure_growth(sizes: Sequence[int], device: torch.device, rounds: int) -> list[Timing]:
    """SAM + SGD on sets that grow, with as many elements per tensor in all of them; in turns."""
    method = "sam-sgd"
    samples, sets = {}, {}
    for size in sizes:
        name = f"uniform:{size}:{max(1, size // GROWTH_ELEMENTS)}"
        sets[name] = parameter_set(name)
        contender = fastsam_contender(Problem(sets[name], device), method)
        samples[name] = clock(contender, device)
    times = alternate(
        samples, rounds_for(max(sizes), rounds), SHORTEST if device.type == "cpu" else 0
    )
    floor = METHODS[method].floor(device)
    return [
        Timing("growth", name, method, "fastsam", len(shapes), count(shapes), floor, times[name])
        for name, shapes in sets.items()
    ]


def free(device: torch.device) -> None:
    """Give back what the contenders of a section held before the next one begins."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def main_set(sets: Sequence[str], device: torch.device) -> str:
    """The set on which every method is timed: the one that its target names, if it is there."""
    preferred = "gpt2" if device.type == "cuda" else "resnet50"
    return preferred if preferred in sets else sets[0]


def measure(
    sections: Sequence[str], sets: Sequence[str], device: torch.device, rounds: int,
    host_rounds: int, announce: Callable[[str], None],
) -> list[Timing]:  # fmt: skip
    """Take every measurement that the sections need.

    Args:
        sections: Keys of ``SECTIONS``.
        sets: Names for ``parameter_set``.
        device: Where the tensors are.
        rounds: Turns of every contender; half of them on large sets.
        host_rounds: The same for the host's work.
        announce: Is told what comes next.
    """
    timings: list[Timing] = []
    if "copy" in sections or "peers" in sections:
        for name in sets:
            for method in COMPARED:
                announce(f"{name}: {METHODS[method].label}")
                timings += measure_sam(name, method, device, rounds, "peers" in sections)
                free(device)
    if "methods" in sections:
        name = main_set(sets, device)
        announce(f"{name}: methods with more work")
        methods = MORE_WORK_ON_GPU if device.type == "cuda" else MORE_WORK
        timings += measure_methods(name, methods, device, rounds)
        free(device)
    tensors = HOST_TENSORS if "host" in sections else ()
    if "growth" in sections:
        announce("growth: " + ", ".join(f"{size:,}" for size in GROWTH_PARAMETERS))
        timings += measure_growth(GROWTH_PARAMETERS, device, rounds)
        free(device)
        tensors = tuple(sorted({*tensors, *GROWTH_TENSORS}))
    if tensors:
        announce(f"host: {', '.join(map(str, tensors))} tensors")
        timings += measure_in_child(tensors, host_rounds)
    return timings
