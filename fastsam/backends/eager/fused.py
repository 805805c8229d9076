"""Torch's fused operators: for the base updates, and for what else can be made of them.

On a CPU a base's update is an :class:`Update`, on other devices its ``operator``. LightSAM's
averages are torch's Adam and Adagrad with the bias correction of an infinite step.
"""

import functools
import importlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastsam.arithmetic import SMALLEST, bounded
from fastsam.kernels.layout import Scalar
from fastsam.step.batch import Batch
from fastsam.step.rule import Base, Group
from fastsam.step.spec import StepSpec, sign_of

from .blocks import blocks, flat
from .scratch import Memory, Room

#: Step counts at which the operators correct no bias, and decay no learning rate.
UNBIASED, UNDECAYED = torch.tensor([math.inf, 1.0], device="cpu").unbind()
Tensors = list[Tensor]


@functools.cache
def find(path: str) -> Any:
    """What ``"module:name"`` names, as a rule declares its fast path."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


@dataclass
class Part:
    """Parameters of one group and dtype that the operators serve, by position in the batch."""

    group: Group
    members: list[int]
    fresh: bool = False  # whether they lack a momentum buffer, or what the ascent reads
    mixed: bool = False  # whether they have first gradients that count
    base: Base | None = None

    def of(self, tensors: Sequence[Any]) -> list[Any]:
        return [tensors[k] for k in self.members]

    def column(self, tables: Sequence[Any], name: str) -> list[Tensor]:
        return [tables[k][name] for k in self.members]


class Update(ABC):
    """The base update of one part: made before anything changes, with all that could fail done.

    Attributes:
        numbers, flags: The hyper-parameters that the operator takes.
        is_one_operator: Whether torch has it as one.
        needs_spare: Whether it needs memory for an intermediate result.
        is_unsigned: Whether it is given the negative of the gradient where the group maximizes.
    """

    numbers: tuple[str, ...] = ("lr",)
    flags: tuple[str, ...] = ()
    is_one_operator = False
    needs_spare = False
    is_unsigned = False

    def __init__(
        self, batch: Batch, part: Part, spec: StepSpec, scalars: Sequence[float], memory: Memory,
        known: dict[Any, Any],
    ):  # fmt: skip
        base, group = part.base, part.group
        assert base is not None and batch.states is not None
        self.group = group
        self.fresh = part.fresh
        self.hyper: dict[str, Any] = {name: float(group[name]) for name in self.numbers}
        self.switches: dict[str, Any] = {name: bool(group[name]) for name in self.flags}
        self.weight_decay = float(group.get("weight_decay", 0.0))
        if "betas" in group:
            self.betas = tuple(map(float, group["betas"]))
        self.first = scalars[Scalar.FIRST_COEFFICIENT] if part.mixed else 0.0
        self.coefficient = scalars[Scalar.COEFFICIENT] if spec.rescales else 1.0
        if self.is_unsigned:
            self.first *= sign_of(group)
            self.coefficient *= sign_of(group)
        self.beside: list[float] = []  # what is taken away of both gradients past the base
        if spec.has_part_apart:
            lr = float(group["lr"]) * sign_of(group)
            self.beside = [lr * scalars[slot] for slot in (Scalar.APART, Scalar.FIRST_APART)]
        self.squared_norms, self.rate = scalars[Scalar.SQUARED_NORMS], scalars[Scalar.RATE]
        names = list(base.states(group))
        self.steps = part.column(batch.states, "step") if base.counts_steps else []
        streams = [part.of(batch.params), part.of(batch.grads)]
        if part.mixed:
            assert batch.firsts is not None
            streams.append(part.of(batch.firsts))
        streams += [part.column(batch.states, name) for name in names]
        self.mixed = part.mixed
        if self.is_one_operator and not spec.rescales:  # nothing to keep in the cache
            self.blocks = [(list(range(len(part.members))), streams)]
        else:
            self.blocks = list(blocks(*streams))
        # where u is computed, block by block, if it is not the gradient: all of it, and tensors
        self.rooms: list[Room | None] = [None] * len(self.blocks)
        if self.coefficient != 1 or self.mixed:
            key = ("rooms", *part.members)
            if key not in known:
                known[key] = [memory.room(xs[1]) for _, xs in self.blocks]
            self.rooms = known[key]
        if self.needs_spare:
            like = streams[0][0]
            size = max(sum(map(Tensor.numel, xs[0])) for _, xs in self.blocks)
            self.spare = like.new_empty(size)
            self.ends = like.new_empty(()), like.new_empty(())

    def run(self) -> None:
        """Change weights and state. Nothing here allocates a tensor, which might fail half-way."""
        if self.steps:
            torch._foreach_add_(self.steps, 1)
        for room, (positions, (weights, grads, *streams)) in zip(
            self.rooms, self.blocks, strict=True
        ):
            u, sources = grads, [grads]
            if room is not None:
                torch.mul(room.gather(grads), self.coefficient, out=room.whole)
                u = room.parts
            if self.mixed:
                firsts = streams.pop(0)
                sources.append(firsts)
                if self.first != 0:
                    torch._foreach_add_(u, firsts, alpha=self.first)
            steps = [self.steps[i] for i in positions] if self.steps else []
            self.update(weights, u, streams, steps)
            for scale, xs in zip(self.beside, sources, strict=False):
                if scale != 0:
                    torch._foreach_add_(weights, xs, alpha=-scale)

    @abstractmethod
    def update(self, weights: Tensors, u: Tensors, states: list[Tensors], steps: Tensors) -> None:
        """The equation, in place, of one block."""

    #: The same on another device, or None: of the lists of parameters, gradients, states by name
    #: and steps, the group, whether the momentum buffers are new, and torch's common arguments.
    operator: Callable[..., None] | None = None

    def _decay(self, weights: Tensors) -> None:
        if self.weight_decay != 0:
            torch._foreach_mul_(weights, 1 - self.hyper["lr"] * self.weight_decay)


class SGD(Update):
    numbers = ("lr", "momentum", "dampening", "weight_decay")
    flags = ("nesterov", "maximize")
    is_one_operator = True

    def update(self, weights: Tensors, u: Tensors, states: list[Tensors], steps: Tensors) -> None:
        torch._fused_sgd_(
            weights, u, states[0] if states else [], is_first_step=self.fresh,
            **self.switches, **self.hyper,
        )  # fmt: skip

    @staticmethod
    def operator(
        params: Tensors, grads: Tensors, states: dict[str, Tensors], steps: Tensors, group: Group,
        fresh: bool, common: dict[str, Any],
    ) -> None:  # fmt: skip
        torch._fused_sgd_(
            params, grads, states.get("momentum_buffer", []), momentum=group["momentum"],
            dampening=group["dampening"], nesterov=group["nesterov"], is_first_step=fresh,
            **common,
        )  # fmt: skip


class Adam(Update):
    numbers = ("lr", "weight_decay", "eps")
    flags = ("amsgrad", "maximize", "decoupled_weight_decay")
    is_one_operator = True

    def update(self, weights: Tensors, u: Tensors, states: list[Tensors], steps: Tensors) -> None:
        flags = dict(self.switches)
        decoupled = flags.pop("decoupled_weight_decay")
        operator = torch._fused_adamw_ if decoupled else torch._fused_adam_
        operator(
            weights, u, states[0], states[1], states[2] if flags["amsgrad"] else [], steps,
            beta1=self.betas[0], beta2=self.betas[1], **flags, **self.hyper,
        )  # fmt: skip

    @staticmethod
    def operator(
        params: Tensors, grads: Tensors, states: dict[str, Tensors], steps: Tensors, group: Group,
        fresh: bool, common: dict[str, Any],
    ) -> None:  # fmt: skip
        decoupled = group["decoupled_weight_decay"]
        operator = torch._fused_adamw_ if decoupled else torch._fused_adam_
        beta1, beta2 = group["betas"]
        operator(
            params, grads, states["exp_avg"], states["exp_avg_sq"],
            states.get("max_exp_avg_sq", []), steps, beta1=beta1, beta2=beta2,
            eps=group["eps"], amsgrad=group["amsgrad"], **common,
        )  # fmt: skip


class Adagrad(Update):
    numbers = ("lr", "lr_decay", "weight_decay", "eps")
    flags = ("maximize",)
    is_one_operator = True

    def update(self, weights: Tensors, u: Tensors, states: list[Tensors], steps: Tensors) -> None:
        torch._fused_adagrad_(weights, u, states[0], steps, **self.switches, **self.hyper)

    @staticmethod
    def operator(
        params: Tensors, grads: Tensors, states: dict[str, Tensors], steps: Tensors, group: Group,
        fresh: bool, common: dict[str, Any],
    ) -> None:  # fmt: skip
        torch._fused_adagrad_(
            params, grads, states["sum"], steps, lr_decay=group["lr_decay"], eps=group["eps"],
            **common,
        )  # fmt: skip


class AdaGradNorm(Update):
    def update(self, weights: Tensors, u: Tensors, states: list[Tensors], steps: Tensors) -> None:
        self._decay(weights)
        scale = self.hyper["lr"] / self.squared_norms**0.5 if self.squared_norms != 0 else 0.0
        scale = bounded(scale, weights[0])
        torch._foreach_add_(weights, u, alpha=-sign_of(self.group) * scale)


class Polyak(Update):
    """SAM-SPS's: a step of size 0 leaves the weights alone, whatever ``u`` is."""

    def update(self, weights: Tensors, u: Tensors, states: list[Tensors], steps: Tensors) -> None:
        size = min(self.rate, self.hyper["lr"])
        if size == 0:
            return
        if self.weight_decay != 0:
            torch._foreach_mul_(weights, 1 - size * self.weight_decay)
        torch._foreach_add_(weights, u, alpha=-bounded(size, weights[0]))


class Uncorrected(Update):
    """What LightSAM's and AdaSAM's have in common."""

    needs_spare = True
    is_unsigned = True

    def _each(self, weights: Tensors, u: Tensors, states: list[Tensors]) -> None:
        """One tensor at a time, so that none is computed otherwise because of its neighbours."""
        for w, g, *state in zip(weights, u, *states, strict=True):
            self.update([w], [g], [[x] for x in state], [])

    def _smallest(self, tensors: Tensors) -> float:
        if len(tensors) > 1:
            out = self.spare[: sum(map(Tensor.numel, tensors))]
            torch.cat([flat(x) for x in tensors], out=out)
            return extremes(out, self.ends)[0]
        return extremes(tensors[0], self.ends)[0]

    def _move(self, weights: Tensors, x: Tensor, second: Tensor) -> None:
        """Weight decay and ``w - lr x / sqrt(second)``, with the root of ``over_root``."""
        self._decay(weights)
        t = self.spare.as_strided(weights[0].shape, weights[0].stride())
        torch.clamp(second, min=SMALLEST, out=t)
        weights[0].sub_(torch.div(x, t.sqrt_(), out=t).mul_(self.hyper["lr"]))


class UncorrectedAdam(Uncorrected):
    def update(self, weights: Tensors, u: Tensors, states: list[Tensors], steps: Tensors) -> None:
        betas = self.group["betas"]
        if self._smallest(states[1]) * betas[1] >= SMALLEST:
            fused_adam(weights, u, states, betas, self.hyper["lr"], self.weight_decay)
        elif len(weights) > 1:
            self._each(weights, u, states)
        else:
            exp_avg, second, *highest = (x[0] for x in states)
            exp_avg.lerp_(u[0], 1 - betas[0])
            second.mul_(betas[1]).addcmul_(u[0], u[0], value=1 - betas[1])
            for x in highest:
                second = torch.maximum(x, second, out=x)
            self._move(weights, exp_avg, second)


class UncorrectedAdagrad(Uncorrected):
    def update(self, weights: Tensors, u: Tensors, states: list[Tensors], steps: Tensors) -> None:
        if self._smallest(states[0]) >= SMALLEST:
            self._decay(weights)
            fused_adagrad(weights, u, states[0], self.hyper["lr"])
        elif len(weights) > 1:
            self._each(weights, u, states)
        else:
            self._move(weights, u[0], states[0][0].addcmul_(u[0], u[0]))


def update_of(base: Base) -> type[Update] | None:
    """The fast path of a base, if it has one."""
    return find(base.eager) if base.eager else None


# --- operators that serve more than one rule ---


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
