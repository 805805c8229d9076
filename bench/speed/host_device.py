"""What steps cost on the host with real launches: on a GPU, or on a stand-in for its driver."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import fastsam

from .contenders import SETS, Shape, uniform
from .measure import Timing, alternate

STEP, MOVED = "step", "step, moved gradients"
FUSED, FOREACH = "torch AdamW, fused", "torch AdamW, foreach"
STEPS = 10  # in every turn
ELEMENTS = 16  # per tensor, where the set is not a model's
SGD: dict[str, Any] = {"base_optimizer": torch.optim.SGD, "lr": 0.1, "momentum": 0.9}
ADAMW: dict[str, Any] = {"base_optimizer": torch.optim.AdamW, "lr": 1e-3}
LIGHT: dict[str, Any] = {"lr": 1e-3, "rho": 1e-3}

# How a pass finds its gradients: in tensors of the loop's own, which it sets; as from a backward
# pass, which allocates them, so that nobody else has them; where the last pass left them.
GIVEN, NEW, KEPT = "given", "new", "kept"


@dataclass(frozen=True)
class Case:
    """An optimizer of some parameters, and how its passes find their gradients."""

    make: Callable[..., Any]
    settings: dict[str, Any]
    dtype: torch.dtype = torch.float32
    gradients: str = GIVEN
    scaled: bool = False


def lets(params: list[nn.Parameter], **settings: Any) -> fastsam.LETS:
    return fastsam.LETS(fastsam.SAM(params, **settings))


CASES = {
    FUSED: Case(torch.optim.AdamW, {"lr": 1e-3, "fused": True}),
    FUSED + ", new gradients": Case(torch.optim.AdamW, {"lr": 1e-3, "fused": True}, gradients=NEW),
    FOREACH: Case(torch.optim.AdamW, {"lr": 1e-3, "foreach": True}),
    "SAM + SGD": Case(fastsam.SAM, SGD),
    "SAM + AdamW": Case(fastsam.SAM, ADAMW),
    "SAM + AdamW, gradients kept": Case(fastsam.SAM, ADAMW, gradients=KEPT),
    "SAM + AdamW, scratch memory": Case(fastsam.SAM, ADAMW | {"scratch": True}),
    "SAM + AdamW, skipping": Case(fastsam.SAM, ADAMW | {"skip_nonfinite": True}),
    "SAM + AdamW, clipping": Case(fastsam.SAM, ADAMW | {"max_grad_norm": 1.0}),
    "SAM + AdamW, norms by layer": Case(fastsam.SAM, ADAMW | {"norm": "layer"}),
    "SAM + AdamW, two ascents": Case(fastsam.SAM, ADAMW | {"ascent_steps": 2}),
    "SAM + AdamW, GradScaler": Case(fastsam.SAM, ADAMW, scaled=True),
    "SAM + AdamW, master weights": Case(
        fastsam.SAM, ADAMW | {"master_weights": True}, torch.bfloat16
    ),
    "SAM + AdamW, stochastic rounding": Case(
        fastsam.SAM, ADAMW | {"rounding": "stochastic"}, torch.bfloat16
    ),
    "ASAM + AdamW": Case(fastsam.ASAM, ADAMW),
    "USAM + AdamW": Case(fastsam.USAM, ADAMW),
    "UnifiedSAM + AdamW": Case(fastsam.UnifiedSAM, ADAMW),
    "SSAM + AdamW": Case(fastsam.SSAM, ADAMW),
    "VaSSO + SGD": Case(fastsam.VaSSO, SGD),
    "VaSSO + SGD, skipping": Case(fastsam.VaSSO, SGD | {"skip_nonfinite": True}),
    "AdaSAM": Case(fastsam.AdaSAM, LIGHT),
    "LightSAM I": Case(fastsam.LightSAM, LIGHT | {"rule": "adagrad_norm"}),
    "LightSAM II": Case(fastsam.LightSAM, LIGHT | {"rule": "adagrad"}),
    "LightSAM III": Case(fastsam.LightSAM, LIGHT | {"rule": "adam"}),
    "SAMAR + SGD, first gradients taken": Case(fastsam.SAMAR, SGD, gradients=NEW),
    "SAMAR + SGD, first gradients copied": Case(fastsam.SAMAR, SGD),
    "SAMAR + SGD, gradients kept": Case(fastsam.SAMAR, SGD, gradients=KEPT),
    "LETS, SAM + SGD": Case(lets, SGD),
}


class Loop:
    """A training loop without a model: steps of an optimizer, and their time on the host.

    Args:
        case: The optimizer.
        shapes: Of its parameters.
        device: Where they are.
    """

    def __init__(self, case: Case, shapes: Sequence[Shape], device: torch.device) -> None:
        self.params = [
            nn.Parameter(torch.zeros(shape, dtype=case.dtype, device=device)) for shape in shapes
        ]
        self.optimizer = case.make(self.params, **case.settings)
        self._case, self._device = case, device
        copies = 2 if case.gradients == KEPT else 4
        self._sets = [[torch.zeros_like(param) for param in self.params] for _ in range(copies)]
        self._turns: Iterator[int] = itertools.cycle(range(len(self._sets)))
        self._paused = 0.0  # seconds in closures
        self._passes: list[Callable[..., None]] = [self._step_of_torch]
        if isinstance(self.optimizer, fastsam.LETS):
            self._passes = [self._step_of_lets]
        elif isinstance(self.optimizer, fastsam.rules.SharpnessAwareOptimizer):
            first, second = self.optimizer.first_step, self.optimizer.second_step
            self._passes = [first] * self.optimizer.ascent_steps + [second]
        self._scaler = torch.amp.GradScaler(device.type, init_scale=1.0) if case.scaled else None
        if self._scaler is not None:
            self._scaler.scale(torch.zeros((), device=device))  # it makes its scale

    def _step_of_torch(self, zero_grad: bool) -> None:
        self.optimizer.step()
        if zero_grad:
            self.optimizer.zero_grad()

    def _step_of_lets(self, zero_grad: bool) -> None:
        def closure() -> float:
            start = time.thread_time()
            self._find_gradients(next(self._turns))
            self._paused += time.thread_time() - start
            return 0.0

        self.optimizer.step(closure, closure)
        if zero_grad:
            self.optimizer.zero_grad()

    def _find_gradients(self, turn: int) -> None:
        if self._case.gradients == KEPT and self.params[0].grad is not None:
            return
        for param, grad in zip(self.params, self._sets[turn], strict=True):
            if self._case.gradients == NEW:
                param.grad = None  # so that its memory is used again
                param.grad = torch.empty_like(grad)
            else:
                param.grad = grad

    def sample(self, moves: bool) -> Callable[[int], float]:
        """Seconds of a step that this thread spends on a processor.

        That is all the work of the optimizer, zeroing gradients included; setting them is not.
        Nothing waits for the device but before the first step. With ``moves`` no pass finds its
        gradients where a pass of the step before has found them.
        """

        def of_steps(steps: int) -> float:
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            taken = self._paused = 0.0
            for _ in range(steps):
                for number, work in enumerate(self._passes):
                    self._find_gradients(next(self._turns) if moves else number % 2)
                    options: dict[str, Any] = {"zero_grad": self._case.gradients != KEPT}
                    if self._scaler is not None:
                        options["grad_scaler"] = self._scaler
                    start = time.thread_time()
                    work(**options)
                    taken += time.thread_time() - start
                if self._scaler is not None:
                    self._scaler._per_optimizer_states.clear()  # as update does
            return (taken - self._paused) / steps

        return of_steps


def shapes_of(tensors: int) -> list[Shape]:
    """ResNet-50's, where it has so many; else small ones."""
    resnet = SETS["resnet50"]
    return resnet if len(resnet) == tensors else uniform(ELEMENTS * tensors, tensors)


def measure(
    tensors: int, rounds: int, device: torch.device, names: Sequence[str] = tuple(CASES)
) -> list[Timing]:
    """Time all cases in turns, in one process: with the gradients of the last step, and moved."""
    shapes = shapes_of(tensors)
    size = sum(torch.Size(shape).numel() for shape in shapes)
    loops = {name: Loop(CASES[name], shapes, device) for name in names}
    timings = []
    for contender in (STEP, MOVED):
        samples = {
            name: loop.sample(contender == MOVED)
            for name, loop in loops.items()
            if contender == STEP or CASES[name].gradients == GIVEN
        }
        for name, times in alternate(samples, rounds, steps=STEPS).items():
            timings.append(
                Timing("host", f"{tensors} tensors", name, contender, tensors, size, 0, times)
            )
    return timings


def table(timings: Sequence[Timing]) -> str:
    """Microseconds of a step by case, and their ratios to torch's AdamW in the same turns."""
    medians = {(t.method, t.contender): t.times.median for t in timings}
    lines = [f"{timings[0].tensors} tensors: microseconds on the host; times fused, times foreach"]
    for contender in (STEP, MOVED):
        lines.append(f"{contender}:")
        for name in dict.fromkeys(t.method for t in timings):
            seconds = medians.get((name, contender))
            if seconds is None:
                continue
            ratios = [seconds / medians[peer, contender] for peer in (FUSED, FOREACH)]
            lines.append(
                f"  {name:36s} {seconds * 1e6:8.1f}  " + "  ".join(f"{x:5.2f}" for x in ratios)
            )
    return "\n".join(lines)
