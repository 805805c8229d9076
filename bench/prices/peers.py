"""What others offer for the same methods: published packages, and loops in plain torch.

Each is trained at the radius that was best for fastsam's own method of the same kind, on torch's
fused base.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .contenders import CONTENDERS, EVERY, TAIL, Contender, Loop
from .tasks import Batch, Problem


class PlainSAM:
    """SAM as a loop in plain torch, tensor by tensor.

    Args:
        params: Parameters.
        base: Class of the base optimizer.
        settings: Its arguments.
        rho: Radius.
    """

    def __init__(
        self, params: Iterable[Tensor], base: type, settings: dict[str, Any], rho: float
    ) -> None:
        self.params, self.rho = list(params), rho
        self.base: torch.optim.Optimizer = base(self.params, fused=True, **settings)
        self.perturbations: dict[Tensor, Tensor] = {}

    def zero_grad(self) -> None:
        self.base.zero_grad()

    @torch.no_grad()
    def perturb(self, along: dict[Tensor, Tensor], rho: float) -> None:
        """Add ``rho d / ||d||`` to the parameters."""
        if not along:
            return
        norm = torch.stack([d.norm() for d in along.values()]).norm()
        for p, d in along.items():
            self.perturbations[p] = d * (rho / (norm + 1e-12))
            p.add_(self.perturbations[p])

    @torch.no_grad()
    def update(self) -> None:
        """Take the perturbation back, and a step of the base."""
        for p, e in self.perturbations.items():
            p.sub_(e)
        self.perturbations.clear()
        self.base.step()

    def gradients(self) -> dict[Tensor, Tensor]:
        return {p: p.grad for p in self.params if p.grad is not None}

    def momentum(self) -> dict[Tensor, Tensor]:
        """The base's momentum, of parameters that have one."""
        names = ("momentum_buffer", "exp_avg")
        state = self.base.state
        found = {p: [state[p][n] for n in names if n in state[p]] for p in self.params}
        return {p: buffers[0] for p, buffers in found.items() if buffers}


class PlainLoop(Loop):
    """Two passes."""

    @property
    def scheduled(self) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = self.optimizer.base
        return optimizer

    def step(self, batch: Batch) -> None:
        closure = self.timed(self.closure(*batch))
        closure()
        self.optimizer.perturb(self.optimizer.gradients(), self.optimizer.rho)
        closure()
        self.optimizer.update()


class PlainMomentumLoop(PlainLoop):
    """One pass, at weights perturbed against the base's momentum."""

    def step(self, batch: Batch) -> None:
        self.optimizer.perturb(self.optimizer.momentum(), -self.optimizer.rho)
        self.timed(self.closure(*batch))()
        self.optimizer.update()


class LookSAMLoop(Loop):
    """pytorch-optimizer's LookSAM by its halves: its ``step`` goes back twice in every step."""

    def __init__(self, problem: Problem, optimizer: Any):
        super().__init__(problem, optimizer)
        self.count = 0

    @property
    def scheduled(self) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = self.optimizer.base_optimizer
        return optimizer

    def step(self, batch: Batch) -> None:
        closure = self.timed(self.closure(*batch))
        closure()
        if self.count % EVERY == 0:
            self.optimizer.first_step()
            closure()
        self.optimizer.second_step()
        self.count += 1


class TemperonLoop(Loop):
    """Temperon: SAM in the last part of training."""

    @property
    def scheduled(self) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = self.optimizer.optimizer
        return optimizer

    def begin_turn(self, steps: int) -> None:
        self.optimizer.tail_start = self.optimizer.step_count + steps - round(TAIL * steps)


def _looksam(params: Iterable[Tensor], base: type, settings: dict[str, Any], rho: float) -> Any:
    import pytorch_optimizer

    return pytorch_optimizer.LookSAM(
        params, base, rho=rho, k=EVERY, alpha=0.7, fused=True, **settings
    )


def _temperon(params: Iterable[Tensor], base: type, settings: dict[str, Any], rho: float) -> Any:
    import temperon

    # the number of steps is known to the loop, which sets it
    inner = base(params, fused=True, **settings)
    return temperon.Temperon(inner, total_steps=1, tail_frac=TAIL, rho=rho)


def _temperon_loop(problem: Problem, optimizer: Any, steps: int) -> Loop:
    optimizer.total_steps = steps
    optimizer.tail_start = round((1 - TAIL) * steps)
    return TemperonLoop(problem, optimizer)


@dataclass(frozen=True)
class Peer(Contender):
    """A contender of others.

    Attributes:
        like: Which of fastsam's contenders it is compared with.
        module: What has to be installed; None where torch is enough.
    """

    like: str = "sam"
    module: str | None = None


PEERS = {
    "plain-sam": Peer(
        "SAM, plain loop", 2.0, (1.0,), PlainSAM,
        lambda problem, optimizer, steps: PlainLoop(problem, optimizer),
    ),
    "plain-msam": Peer(
        "MSAM, plain loop", 1.0, (5.0,), PlainSAM,
        lambda problem, optimizer, steps: PlainMomentumLoop(problem, optimizer), like="msam",
    ),
    "pytorch-optimizer": Peer(
        f"LookSAM(k={EVERY}), pytorch-optimizer", 1 + 1 / EVERY, (1.0,), _looksam,
        lambda problem, optimizer, steps: LookSAMLoop(problem, optimizer), like="looksam",
        module="pytorch_optimizer",
    ),
    "temperon": Peer(
        f"tail, last {TAIL:.0%}, Temperon", 1 + TAIL, (1.0,), _temperon, _temperon_loop,
        like="tail", module="temperon",
    ),
}  # fmt: skip
EVERYONE: dict[str, Contender] = {**CONTENDERS, **PEERS}


def peers_of(names: Iterable[str]) -> list[str]:
    """The peers of these contenders that are installed here."""
    known = set(names)
    return [
        name for name, peer in PEERS.items()
        if peer.like in known and (not peer.module or importlib.util.find_spec(peer.module))
    ]  # fmt: skip
