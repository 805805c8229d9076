"""The stages of ``gpu.py``: what each does, and for how long it may."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch


@dataclass
class Context:
    """What a stage is given.

    Attributes:
        device: The GPU.
        rehearsal: Whether to take small sizes, and each thing once.
        folder: Where its results go.
        python: The command that runs a Python script.
        add: Called with each line of results, which is then on disk.
        say: Prints a line for the user who waits.
    """

    device: torch.device
    rehearsal: bool
    folder: Path
    python: list[str]
    add: Callable[..., None]
    say: Callable[[str], None]


class Stage(NamedTuple):
    """One of the stages.

    Attributes:
        title: What it does.
        seconds: After which it is ended.
        function: ``"module:name"`` of what does it, in this package.
    """

    title: str
    seconds: int
    function: str

    def run(self, context: Context) -> Any:
        module, _, name = self.function.partition(":")
        return getattr(importlib.import_module(f"on_gpu.{module}"), name)(context)


#: In the order in which they run: what has to be right before what has to be fast.
STAGES = {
    "memory": Stage("accesses and races of one step, by the vendor's checker", 100,
                    "checks:memory"),
    "tests": Stage("tests of captures, edges and methods", 170, "checks:tests"),
    "kernels": Stage("every kernel against a device copy", 90, "kernels:kernels"),
    "peers": Stage("SAM against published packages and torch.compile", 170, "steps:peers"),
    "graphs": Stage("steps in a CUDA graph against steps without", 40, "steps:graphs"),
    "candidates": Stage("other launch configurations", 90, "kernels:candidates"),
    "profile": Stage("kernels under torch.profiler", 40, "profiles:profile"),
}  # fmt: skip
