"""What is compared: the base, SAM, and what keeps of SAM as much as it can for less time."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import fastsam

from .tasks import Batch, Problem

EVERY = 5  # steps from one second pass to the next, for what leaves it out
TAIL = 0.3
PART = 0.25  # of the batch that the first pass sees
KEPT = 0.5  # of the samples that ESAM's second pass sees
Closure = Callable[[], Tensor]


class Loop:
    """Steps of an optimizer on a problem's batches: ``optimizer.step(closure)``.

    Args:
        problem: Has the model and the losses.
        optimizer: What is stepped.

    Attributes:
        timed: Goes around each closure. Default: the closure itself.
    """

    def __init__(self, problem: Problem, optimizer: Any):
        self.problem, self.optimizer = problem, optimizer
        self.timed: Callable[[Closure], Closure] = lambda closure: closure

    @property
    def scheduled(self) -> torch.optim.Optimizer:
        """Whose learning rate is scheduled."""
        optimizer: torch.optim.Optimizer = self.optimizer
        return optimizer

    def closure(self, x: Tensor, y: Tensor) -> Closure:
        def closure() -> Tensor:
            self.optimizer.zero_grad()
            loss = self.problem.losses(x, y).mean()
            loss.backward()
            return loss

        return closure

    def step(self, batch: Batch) -> None:
        self.optimizer.step(self.timed(self.closure(*batch)))

    def after(self) -> None:
        """What comes after each step, beside the schedule of the learning rate."""

    def begin_turn(self, steps: int) -> None:
        """Before as many steps are timed, for what does not treat all steps alike."""


class FirstPassOnPart(Loop):
    """The first pass sees a part of the batch, the second all of it."""

    def step(self, batch: Batch) -> None:
        closures = fastsam.split_closures(lambda part: self.closure(*part)(), batch, PART)
        self.optimizer.step(*map(self.timed, closures))


class SelectedSamples(Loop):
    """ESAM's second pass: over the samples whose loss has risen most."""

    def step(self, batch: Batch) -> None:
        x, y = batch
        before: list[Tensor] = []

        def first() -> Tensor:
            self.optimizer.zero_grad()
            losses = self.problem.losses(x, y)
            before.append(losses.detach())
            loss = losses.mean()
            loss.backward()
            return loss

        def second() -> Tensor:
            with torch.no_grad():
                after = self.problem.losses(x, y)
            chosen = fastsam.select_samples(before[0], after, KEPT)
            return self.closure(x[chosen], y[chosen])()

        self.optimizer.step(self.timed(first), self.timed(second))


class Tail(Loop):
    """SAM in the last part of training."""

    def __init__(self, problem: Problem, optimizer: Any, total_steps: int):
        super().__init__(problem, optimizer)
        self.radius = fastsam.tail(optimizer, total_steps, TAIL)

    def after(self) -> None:
        self.radius.step()

    def begin_turn(self, steps: int) -> None:
        self.optimizer.start = self.optimizer.kept["t"] - 1 + steps - round(TAIL * steps)


@dataclass(frozen=True)
class Contender:
    """A way to train, and what is tried of it.

    Attributes:
        title: As it is shown.
        passes: Forward and backward passes in a step, on average; a forward pass counts a third.
        multiples: Radii that are tried, over the task's.
        make: From parameters, base, the base's settings and the radius to the optimizer.
        loop: From problem, optimizer and the number of steps to what takes the steps.
    """

    title: str
    passes: float
    multiples: tuple[float, ...]
    make: Callable[..., Any]
    loop: Callable[[Problem, Any, int], Loop] = lambda problem, optimizer, steps: Loop(
        problem, optimizer
    )


def of(cls: Callable[..., Any], **own: Any) -> Callable[..., Any]:
    """What makes an optimizer by a class of fastsam's."""

    def make(params: Iterable[Tensor], base: type, settings: dict[str, Any], rho: float) -> Any:
        return cls(params, base, rho=rho, **own, **settings)

    return make


def base_alone(params: Iterable[Tensor], base: type, settings: dict[str, Any], rho: float) -> Any:
    """torch's own, fused."""
    return base(params, fused=True, **settings)


LIKE_SAM = (0.5, 1.0, 2.0)
CONTENDERS = {
    "base": Contender("base alone", 1.0, (0.0,), base_alone),
    "sam": Contender("SAM", 2.0, LIKE_SAM, of(fastsam.SAM)),
    "msam": Contender("MSAM", 1.0, (1.5, 5.0, 10.0), of(fastsam.MSAM)),
    "delayed": Contender("DelayedSAM", 1.0, LIKE_SAM, of(fastsam.DelayedSAM)),
    "looksam": Contender(
        f"LookSAM(k={EVERY})", 1 + 1 / EVERY, LIKE_SAM, of(fastsam.LookSAM, k=EVERY)
    ),
    "factor": Contender(
        f"perturb_every={EVERY}, amplify", 1 + 1 / EVERY, LIKE_SAM,
        of(fastsam.SAM, perturb_every=EVERY, amplify=True),
    ),
    "every-third": Contender(
        "perturb_every=3", 4 / 3, (1.0, 2.0, 4.0), of(fastsam.SAM, perturb_every=3)
    ),
    "tail": Contender(
        f"tail, last {TAIL:.0%}", 1 + TAIL, LIKE_SAM, of(fastsam.SAM), Tail
    ),
    "part": Contender(
        f"split_closures, {PART:.0%}", 1 + PART, LIKE_SAM, of(fastsam.SAM),
        lambda problem, optimizer, steps: FirstPassOnPart(problem, optimizer),
    ),
    "selected": Contender(
        f"select_samples, {KEPT:.0%}", 1 + 1 / 3 + KEPT, LIKE_SAM, of(fastsam.SAM),
        lambda problem, optimizer, steps: SelectedSamples(problem, optimizer),
    ),
}  # fmt: skip
