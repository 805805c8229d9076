"""The base updates on a CPU: torch's fused operators, which also serve LightSAM's averages."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastsam.kernels.layout import Scalar

from ..bases import Group
from ..rules import Batch, Step
from . import equations
from .pieces import flat, pieces
from .scratch import Memory, Room

#: Base updates for which torch has fused operators.
FUSED = ("sgd", "adam", "adagrad")
#: The hyper-parameters that these take, numbers and flags.
NEEDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "sgd": (("lr", "momentum", "dampening", "weight_decay"), ("nesterov", "maximize")),
    "adam": (("lr", "weight_decay", "eps"), ("amsgrad", "maximize", "decoupled_weight_decay")),
    "adagrad": (("lr", "lr_decay", "weight_decay", "eps"), ("maximize",)),
}
#: Step counts at which the operators correct no bias, and decay no learning rate.
UNBIASED, UNDECAYED = torch.tensor([math.inf, 1.0], device="cpu").unbind()


@dataclass
class Part:
    """Parameters of one group and dtype that the operators serve, by position in the batch."""

    group: Group
    members: list[int]
    fresh: bool = False  # whether their momentum buffers are new
    mixed: bool = False  # whether they have first gradients that count

    def of(self, tensors: Sequence[Any]) -> list[Any]:
        return [tensors[k] for k in self.members]

    def column(self, tables: Sequence[dict[str, Tensor]], name: str) -> list[Tensor]:
        return [tables[k][name] for k in self.members]


class Update:
    """The base update of one part: made before anything changes, with all that could fail done."""

    def __init__(
        self, batch: Batch, part: Part, step: Step, scalars: Tensor, memory: Memory,
        known: dict[Any, Any],
    ):  # fmt: skip
        assert step.base is not None
        self.base, self.group, self.fresh = step.base, part.group, part.fresh
        numbers, flags = NEEDS.get(step.base.name, (("lr",), ()))
        self.hyper = {name: float(part.group[name]) for name in numbers}
        self.flags: dict[str, Any] = {name: bool(part.group[name]) for name in flags}
        self.hyper.setdefault("weight_decay", float(part.group.get("weight_decay", 0.0)))
        if "betas" in part.group:
            self.hyper["beta1"], self.hyper["beta2"] = map(float, part.group["betas"])
        self.first = float(scalars[Scalar.FIRST_COEFFICIENT]) if part.mixed else 0.0
        self.coefficient = float(scalars[Scalar.COEFFICIENT]) if step.rescales else 1.0
        self.squared_norms = float(scalars[Scalar.SQUARED_NORMS])
        names = list(step.base.states(part.group))
        self.steps = part.column(batch.states, "step") if step.base.counts_steps else []
        streams = [part.of(batch.params), part.of(batch.grads)]
        streams += [part.of(batch.firsts)] * part.mixed
        streams += [part.column(batch.states, name) for name in names]
        self.mixed = part.mixed
        if step.base.name in FUSED and not step.rescales:  # one operator: nothing to keep in cache
            self.pieces = [(list(range(len(part.members))), streams)]
        else:
            self.pieces = list(pieces(*streams))
        # where u is computed, piece by piece, if it is not the gradient: all of it, and tensors
        self.rooms: list[Room | None] = [None] * len(self.pieces)
        if self.coefficient != 1 or self.mixed:
            key = ("rooms", *part.members)
            if key not in known:
                known[key] = [memory.room(xs[1]) for _, xs in self.pieces]
            self.rooms = known[key]
        if step.base.name.startswith("uncorrected"):
            like = streams[0][0]
            size = max(sum(map(Tensor.numel, xs[0])) for _, xs in self.pieces)
            self.spare = like.new_empty(size)
            self.ends = like.new_empty(()), like.new_empty(())

    def run(self) -> None:
        """Change weights and state. Nothing here allocates a tensor, which might fail half-way."""
        if self.steps:
            torch._foreach_add_(self.steps, 1)
        for room, (positions, (weights, grads, *streams)) in zip(
            self.rooms, self.pieces, strict=True
        ):
            u = grads
            if room is not None:
                torch.mul(room.gather(grads), self.coefficient, out=room.whole)
                u = room.parts
            if self.mixed:
                firsts = streams.pop(0)
                if self.first != 0:
                    torch._foreach_add_(u, firsts, alpha=self.first)
            steps = [self.steps[i] for i in positions] if self.steps else []
            getattr(self, self.base.name)(weights, u, streams, steps)

    # --- the updates, by the names of their bases ---

    def sgd(self, weights: list[Tensor], u: list[Tensor], states: Any, steps: Any) -> None:
        torch._fused_sgd_(
            weights, u, states[0] if states else [], is_first_step=self.fresh,
            **self.flags, **self._only("lr", "momentum", "dampening", "weight_decay"),
        )  # fmt: skip

    def adam(self, weights: list[Tensor], u: list[Tensor], states: Any, steps: Any) -> None:
        flags = dict(self.flags)
        operator = (
            torch._fused_adamw_ if flags.pop("decoupled_weight_decay") else torch._fused_adam_
        )
        operator(
            weights, u, states[0], states[1], states[2] if flags["amsgrad"] else [], steps, **flags,
            **self._only("lr", "beta1", "beta2", "weight_decay", "eps"),
        )  # fmt: skip

    def adagrad(self, weights: list[Tensor], u: list[Tensor], states: Any, steps: Any) -> None:
        torch._fused_adagrad_(
            weights, u, states[0], steps, **self.flags,
            **self._only("lr", "lr_decay", "weight_decay", "eps"),
        )  # fmt: skip

    def adagrad_norm(self, weights: list[Tensor], u: list[Tensor], *_: Any) -> None:
        self._decay(weights)
        scale = self.hyper["lr"] / self.squared_norms**0.5 if self.squared_norms != 0 else 0.0
        torch._foreach_add_(weights, u, alpha=scale if self.group.get("maximize") else -scale)

    def uncorrected_adam(
        self, weights: list[Tensor], u: list[Tensor], states: Any, steps: Any
    ) -> None:
        betas = self.group["betas"]
        if self._smallest(states[1]) * betas[1] >= equations.SMALLEST:
            fused_adam(weights, u, states, betas, self.hyper["lr"], self._weight_decay)
        elif len(weights) > 1:
            self._each(self.uncorrected_adam, weights, u, states)
        else:
            exp_avg, second, *highest = (x[0] for x in states)
            exp_avg.lerp_(u[0], 1 - betas[0])
            second.mul_(betas[1]).addcmul_(u[0], u[0], value=1 - betas[1])
            for x in highest:
                second = torch.maximum(x, second, out=x)
            self._move(weights, exp_avg, second)

    def uncorrected_adagrad(
        self, weights: list[Tensor], u: list[Tensor], states: Any, steps: Any
    ) -> None:
        if self._smallest(states[0]) >= equations.SMALLEST:
            self._decay(weights)
            fused_adagrad(weights, u, states[0], self.hyper["lr"])
        elif len(weights) > 1:
            self._each(self.uncorrected_adagrad, weights, u, states)
        else:
            self._move(weights, u[0], states[0][0].addcmul_(u[0], u[0]))

    # --- parts of them ---

    @staticmethod
    def _each(update: Any, weights: list[Tensor], u: list[Tensor], states: Any) -> None:
        """One tensor at a time, so that none is computed otherwise because of its neighbours."""
        for w, g, *state in zip(weights, u, *states, strict=True):
            update([w], [g], [[x] for x in state], [])

    def _smallest(self, tensors: list[Tensor]) -> float:
        if len(tensors) > 1:
            out = self.spare[: sum(map(Tensor.numel, tensors))]
            torch.cat([flat(x) for x in tensors], out=out)
            return extremes(out, self.ends)[0]
        return extremes(tensors[0], self.ends)[0]

    def _move(self, weights: list[Tensor], x: Tensor, second: Tensor) -> None:
        """Weight decay and ``w - lr x / sqrt(second)``, as ``equations.over_root`` has the root."""
        self._decay(weights)
        t = self.spare.as_strided(weights[0].shape, weights[0].stride())
        torch.clamp(second, min=equations.SMALLEST, out=t)
        weights[0].sub_(torch.div(x, t.sqrt_(), out=t).mul_(self.hyper["lr"]))

    @property
    def _weight_decay(self) -> float:
        return self.hyper["weight_decay"]

    def _decay(self, weights: list[Tensor]) -> None:
        if self._weight_decay != 0:
            torch._foreach_mul_(weights, 1 - self.hyper["lr"] * self._weight_decay)

    def _only(self, *names: str) -> dict[str, Any]:
        return {name: self.hyper[name] for name in names}


def fused_adam(
    weights: list[Tensor],
    u: list[Tensor],
    states: list[list[Tensor]],
    betas: tuple[float, float],
    lr: float,
    weight_decay: float = 0.0,
) -> None:
    """``w (1 - lr weight_decay) - lr m / sqrt(v)``, AMSGrad's where there is a third state.

    No average of squares may be below ``SMALLEST``: the operator divides by whatever root it has.
    """
    torch._fused_adamw_(
        weights, u, states[0], states[1], states[2] if len(states) > 2 else [],
        [UNBIASED] * len(weights), lr=lr, beta1=betas[0], beta2=betas[1], weight_decay=weight_decay,
        eps=0.0, amsgrad=len(states) > 2, maximize=False,
    )  # fmt: skip


def fused_adagrad(weights: list[Tensor], u: list[Tensor], sums: list[Tensor], lr: float) -> None:
    """``w - lr u / sqrt(sum)``; no sum may be below ``SMALLEST``."""
    torch._fused_adagrad_(
        weights, u, sums, [UNDECAYED] * len(weights), lr=lr, lr_decay=0.0, weight_decay=0.0,
        eps=0.0, maximize=False,
    )  # fmt: skip


def extremes(x: Tensor, ends: tuple[Tensor, Tensor] | None = None) -> tuple[float, float]:
    """The smallest and the largest element of a dense tensor; NaN where one is NaN.

    With memory for the two nothing is allocated.
    """
    if not x.numel():
        return 1.0, 1.0
    low, high = torch.aminmax(flat(x), out=ends)  # which copies what is not in order
    return float(low), float(high)
