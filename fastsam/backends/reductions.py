"""Reductions of the triton backend: their launches, and what they depend on."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastsam.kernels.layout import Scalar, Task

from ..ratio import SharpnessRatio
from ..rules import Step
from ..sharding import Sharding, add_up
from .launcher import Launched
from .lockstep import Pass

NOTHING = nullcontext()
SUMS = slice(Scalar.SUM0, Scalar.SUM4 + 1)


@dataclass
class Reduction:
    """The launches of a reduction, by how their sums are sharded.

    The last finishes it, unless others have to be added first.
    """

    scalars: Tensor
    parts: dict[Sharding, list[Launched]] = field(default_factory=dict)
    finish: Callable[[], Any] | None = None

    def run(self) -> Pass[None]:
        if self.finish is None:
            with on(self.scalars.device):
                for launches in self.parts.values():
                    for launch in launches:
                        launch()
            return
        sums = {}
        with on(self.scalars.device):
            for sharding, launches in self.parts.items():
                for launch in launches:
                    launch()
                sums[sharding] = self.scalars[SUMS].clone()
        total = add_up(sums)
        yield total
        self.scalars[SUMS] = total
        with on(self.scalars.device):
            self.finish()


def constants_of(kind: str, step: Step) -> tuple[dict[str, Any], int, bool]:
    """A reduction's constants and tasks, and whether it reads more than two streams."""
    rule, adaptive, tasks, streams = step.ascent.name, step.adaptive, Task(0), True
    states, sums = 0, 1
    if kind in ("mix", "diag"):  # what makes the perturbation once more
        states = len(step.ascent.states(step.groups[0]))
    if kind == "ascent":
        if rule == "ema":
            sums = 2
        else:
            streams = False
            rule = rule if rule == "adagrad_norm" else "unified"
    elif kind in ("descent", "mix"):
        scaled = adaptive and step.renormalize  # whether the norm is that of T g~
        tasks = (
            Task.RENORMALIZE * step.renormalize
            | Task.CLIP * (step.max_grad_norm is not None)
            | Task.SKIP * step.skip_nonfinite
            | Task.SKIP_FIRST * step.skip_first
            | Task.ACCUMULATE * (step.base is not None and step.base.needs_norm)
            | Task.COMMIT * (rule == "adagrad_norm")
            | Task.ADAPT * (type(step.mix) is SharpnessRatio)
        )
        sums = 5
        if kind == "descent":
            rule, streams, adaptive = "unified", False, scaled
            # the plain norm is a sum of its own only where T makes the other one different
            needs_plain = Task.CLIP | Task.SKIP | Task.ACCUMULATE
            sums = 2 if scaled and tasks & needs_plain else 1
        elif scaled:
            kind = "scaled mix"
    elif kind == "difference":
        rule, adaptive = "unified", False
    constants = {"KIND": kind, "RULE": rule, "STATES": states, "ADAPTIVE": adaptive, "SUMS": sums}
    return constants, int(tasks), streams


def on(device: torch.device) -> AbstractContextManager[Any]:
    """With the device as the present one, where launches ask for that."""
    return torch.cuda.device(device) if device.type == "cuda" else NOTHING
