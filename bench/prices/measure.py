"""Times of steps, contenders in turns, and trainings, each in a process of one thread."""

from __future__ import annotations

import itertools
import math
import time
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim.lr_scheduler import CosineAnnealingLR

from .contenders import Closure, Loop
from .peers import EVERYONE
from .tasks import TASKS, Problem

STEPS = 30  # of a turn: whole periods of everything that has one


@dataclass(frozen=True)
class Training:
    """Everything that decides the outcome of one training."""

    task: str
    contender: str
    rho: float
    seed: int
    epochs: float
    device: str = "cpu"


@dataclass(frozen=True)
class Outcome:
    """What a training gave: scores, higher being better; chance if it diverged.

    Attributes:
        score: On the test data, at the end.
        validation: On the validation data, at the end.
        stopped: On the test data, after the epoch that was the best on the validation data.
    """

    training: Training
    score: float
    diverged: bool
    validation: float
    stopped: float


class Split(NamedTuple):
    """Milliseconds of a step: forward and backward passes, the optimizer's own, and the rest.

    ``variation`` is the range of the middle half of the turns, in percent of their median.
    """

    passes: float
    optimizer: float
    rest: float
    variation: float = 0.0

    @property
    def total(self) -> float:
        return self.passes + self.optimizer + self.rest


def prepare(training: Training, steps: int | None = None) -> tuple[Problem, Loop, int]:
    """Return the problem, what takes its steps, and how many there will be."""
    task, contender = TASKS[training.task], EVERYONE[training.contender]
    problem = task.make(training.seed, training.device)
    params = problem.model.parameters()
    optimizer = contender.make(params, task.base, task.settings, training.rho)
    steps = round(training.epochs * problem.steps) if steps is None else steps
    return problem, contender.loop(problem, optimizer, steps), steps


def train(training: Training) -> Outcome:
    """Train once. At a given seed every contender gets the same weights, labels and batches.

    The learning rate falls to 0 along a cosine, whatever the number of epochs.
    """
    chance = TASKS[training.task].chance
    problem, loop, steps = prepare(training)
    schedule = CosineAnnealingLR(loop.scheduled, T_max=steps)
    score = validation = highest = stopped = -math.inf
    for number, batch in enumerate(itertools.islice(problem.forever(), steps), 1):
        loop.step(batch)
        loop.after()
        schedule.step()
        if number == steps or number % problem.steps == 0:
            validation, score = problem.validate(), problem.score()
            if validation > highest:  # never where it is NaN
                highest, stopped = validation, score
    finite = all(bool(p.isfinite().all()) for p in problem.model.parameters())
    diverged = not (finite and math.isfinite(score))
    if diverged:
        score = validation = -math.inf
    return Outcome(
        training, max(score, chance), diverged, max(validation, chance), max(stopped, chance)
    )


# --- times ---


def now(device: str) -> float:
    """Seconds, when the device has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


class TimedLoop:
    """A loop whose steps are timed, with their closures apart."""

    def __init__(self, training: Training):
        # never at an end: a schedule has no part in the time of a step
        self.problem, self.loop, _ = prepare(training, steps=STEPS)
        self.batches = self.problem.forever()
        self.device, self.inside = training.device, 0.0
        self.loop.timed = self._timed

    def _timed(self, closure: Closure) -> Closure:
        def timed() -> Tensor:
            start = now(self.device)
            result = closure()
            self.inside += now(self.device) - start
            return result

        return timed

    def turn(self) -> Split:
        """Take ``STEPS`` steps and return the mean of their times."""
        self.loop.begin_turn(STEPS)
        self.inside = stepping = 0.0
        start = now(self.device)
        for batch in itertools.islice(self.batches, STEPS):
            before = now(self.device)
            self.loop.step(batch)
            stepping += now(self.device) - before
        whole = now(self.device) - start
        parts = self.inside, stepping - self.inside, whole - stepping
        return Split(*(1000 * part / STEPS for part in parts))


def time_steps(
    task: str, contenders: list[str], rounds: int, device: str = "cpu"
) -> dict[str, Split]:
    """Return each contender's times of a step: the median turn of ``rounds``, taken in turns."""
    radius = TASKS[task].radius
    loops = {
        name: TimedLoop(Training(task, name, radius * EVERYONE[name].multiples[0], 0, 1, device))
        for name in contenders
    }
    turns: dict[str, list[Split]] = {name: [] for name in contenders}
    for round_ in range(rounds + 1):
        for name, loop in loops.items():
            split = loop.turn()
            if round_:  # the first one prepares
                turns[name].append(split)
    return {name: median(splits) for name, splits in turns.items()}


def median(turns: list[Split]) -> Split:
    """The turn of the median time, with their variation."""
    turns = sorted(turns, key=lambda split: split.total)
    middle = turns[len(turns) // 2]
    low, high = (turns[int(q * (len(turns) - 1))].total for q in (0.25, 0.75))
    return middle._replace(variation=100 * (high - low) / middle.total)
