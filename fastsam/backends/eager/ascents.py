"""Ascent rules by torch's operators on a CPU: fast paths that rules declare, and the general one.

Scalars are numbers here, which on a CPU costs nothing.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastsam.arithmetic import SMALLEST
from fastsam.kernels.layout import Scalar
from fastsam.step.batch import Batch
from fastsam.step.rule import Ascent, Group
from fastsam.step.spec import StepSpec, sign_of

from .. import reference
from ..equations import columns_of, perturbation, radius, seen_by, signed
from .blocks import LARGE, blocks
from .fused import Part, extremes, find, fused_adagrad, fused_adam
from .norms import element_scales
from .scratch import Memory

Tensors = list[Tensor]


class AlongGradient:
    """Rules whose direction is the gradient."""

    def sign(self, group: Group) -> float:
        """What directions, as they are here, are multiplied by."""
        return sign_of(group)

    def directions(
        self, batch: Batch, parts: list[Part], spec: StepSpec, others: dict[int, Tensor],
        scalars: Tensor,
    ) -> Sequence[Tensor]:  # fmt: skip
        """A direction for every parameter; ``others`` has those that the operators do not serve."""
        return batch.grads

    def starts_anew(self, batch: Batch, parts: list[Part], spec: StepSpec) -> None:
        """Called where the direction's norm is NaN and the gradient's is not."""

    def perturb(
        self, batch: Batch, part: Part, targets: Tensors, directions: Sequence[Tensor],
        spec: StepSpec, scalars: Tensor, memory: Memory,
    ) -> None:  # fmt: skip
        """Write ``w + e`` to the targets."""
        weights, group = part.of(batch.params), part.group
        scale = float(radius(spec, group, scalars.tolist()))
        scale *= self.sign(group)
        if scale == 0:  # the direction may hold infinities
            torch._foreach_copy_(targets, weights)
        elif group["adaptive"]:
            for _, (w, d, x) in blocks(weights, part.of(directions), targets):
                t = element_scales(w, group, memory)
                squares = t.whole.square_()
                if w[0].numel() >= LARGE:  # alone, and always so: it rounds differently
                    torch.addcmul(w[0], squares, d[0], value=scale, out=x[0])
                else:
                    torch._foreach_mul_(t.parts, d)
                    add_into(x, w, t.parts, scale)
        else:
            add_into(targets, weights, part.of(directions), scale)


class AlongMomentum(AlongGradient):
    """MSAM's: backwards along the base's momentum, which is of what is minimised."""

    def sign(self, group: Group) -> float:
        return -1.0


class AlongAverage(AlongGradient):
    """VaSSO's: the direction is an average of the gradients."""

    def sign(self, group: Group) -> float:
        return 1.0

    def directions(
        self, batch: Batch, parts: list[Part], spec: StepSpec, others: dict[int, Tensor],
        scalars: Tensor,
    ) -> Sequence[Tensor]:  # fmt: skip
        self._average(batch, parts, spec, starting=False)
        return [state["ascent_ema"] for state in batch.next or () if state is not None]

    def starts_anew(self, batch: Batch, parts: list[Part], spec: StepSpec) -> None:
        """The average may be NaN somewhere, and begins with the gradient there."""
        self._average(batch, parts, spec, starting=True)

    def _average(self, batch: Batch, parts: list[Part], spec: StepSpec, starting: bool) -> None:
        assert batch.ascent is not None and batch.next is not None
        for part in parts:
            old, new = (part.column(x, "ascent_ema") for x in (batch.ascent, batch.next))
            for ema, grad, result in zip(old, part.of(batch.grads), new, strict=True):
                g = signed(grad, part.group)
                if starting:
                    h = columns_of(spec, part.group)
                    assert spec.ascent.advance is not None
                    advanced = spec.ascent.advance(g, {"ascent_ema": ema}, h)
                    result.copy_(advanced["ascent_ema"])
                else:
                    torch.lerp(ema, g, float(part.group["theta"]), out=result)

    def perturb(
        self, batch: Batch, part: Part, targets: Tensors, directions: Sequence[Tensor],
        spec: StepSpec, scalars: Tensor, memory: Memory,
    ) -> None:  # fmt: skip
        assert batch.ascent is not None and batch.next is not None
        if not scalars[Scalar.ASCENT_NORM].isfinite():
            old, new = (part.column(x, "ascent_ema") for x in (batch.ascent, batch.next))
            torch._foreach_copy_(new, old)
        super().perturb(batch, part, targets, directions, spec, scalars, memory)


class ByEquations(AlongGradient):
    """Any rule, by the equations that it declares, block by block."""

    def directions(
        self, batch: Batch, parts: list[Part], spec: StepSpec, others: dict[int, Tensor],
        scalars: Tensor,
    ) -> Sequence[Tensor]:  # fmt: skip
        if spec.ascent.norm != "direction":  # they are worked out with the perturbation
            return batch.grads
        found = dict(others)
        for part in parts:
            h = columns_of(spec, part.group)
            for k in part.members:
                state = self._advance(batch, k, spec, h)
                if spec.ascent.from_old:
                    state = (batch.ascent[k] if batch.ascent is not None else None) or {}
                state = seen_by(spec.ascent, state, batch, k, scalars)
                found[k] = spec.ascent.direction(signed(batch.grads[k], part.group), state, h)
        return [found[k] for k in range(len(batch.grads))]

    def _advance(self, batch: Batch, k: int, spec: StepSpec, h: Any) -> dict[str, Tensor]:
        """Write the next state of parameter ``k``, and give it."""
        old = (batch.ascent[k] if batch.ascent is not None else None) or {}
        new = (batch.next[k] if batch.next is not None else None) or {}
        if spec.ascent.advance is not None and old:
            g = signed(batch.grads[k], spec.groups[batch.groups[k]])
            for name, x in spec.ascent.advance(g, old, h).items():
                new[name].copy_(x)
        return new

    def perturb(
        self, batch: Batch, part: Part, targets: Tensors, directions: Sequence[Tensor],
        spec: StepSpec, scalars: Tensor, memory: Memory,
    ) -> None:  # fmt: skip
        names, group = list(spec.ascent.states(part.group)), part.group
        streams = [part.of(batch.params), part.of(batch.grads), targets]
        along = spec.ascent.norm == "direction"
        streams += [part.of(directions)] * along
        for tables in (batch.ascent, batch.next):
            streams += [part.column(tables or (), name) for name in names]
        name, reads = spec.ascent.base_state, False
        if name and not along:
            assert batch.read is not None
            reads = not part.fresh
            streams += [part.of(batch.read)] * reads
        scale = radius(spec, group, scalars)
        h, more = columns_of(spec, group), {}
        if spec.ascent.sees_accumulator:
            more["accumulated"] = scalars[Scalar.ACCUMULATED].clone()
        for _, lists in blocks(*streams):
            for w, grad, x, *rest in zip(*lists, strict=True):
                g = signed(grad, group)
                d = rest.pop(0) if along else None
                read = rest.pop() if reads else w.new_full((), math.nan)
                old = dict(zip(names, rest[: len(names)], strict=True))
                new = dict(zip(names, rest[len(names) :], strict=True))
                if names and not along:
                    assert spec.ascent.advance is not None
                    for name, value in spec.ascent.advance(g, old, h).items():
                        new[name].copy_(value)
                if d is None:
                    state = old if spec.ascent.from_old else new
                    seen = {**state, **more, name: read} if name else {**state, **more}
                    d = spec.ascent.direction(g, seen, h)
                e = perturbation(w, d, group, scale, spec.ascent.scales_once)
                if names and spec.ascent.usable is not None:
                    good = spec.ascent.usable(new, scalars[Scalar.ASCENT_NORM])
                    e = torch.where(good, e, 0.0)
                    for name, value in new.items():
                        value.copy_(torch.where(good, value, old[name]))
                torch.add(w, e, out=x) if x is not w else w.add_(e)


class ByNoise(AlongGradient):
    """Rules whose direction is random numbers, one tensor at a time."""

    def perturb(
        self, batch: Batch, part: Part, targets: Tensors, directions: Sequence[Tensor],
        spec: StepSpec, scalars: Tensor, memory: Memory,
    ) -> None:  # fmt: skip
        rho = float(radius(spec, part.group, scalars.tolist()))
        for k, target in zip(part.members, targets, strict=True):
            w = batch.params[k]
            if rho == 0:
                target.copy_(w)
            else:
                d = reference.advance_one(batch, k, spec, scalars)
                torch.add(w, d, alpha=rho, out=target)


class ByFused(AlongGradient):
    """LightSAM II's and III's perturbations, which are steps of Adagrad and Adam."""

    def __init__(self, operator: Any) -> None:
        self._operator = operator

    def perturb(
        self, batch: Batch, part: Part, targets: Tensors, directions: Sequence[Tensor],
        spec: StepSpec, scalars: Tensor, memory: Memory,
    ) -> None:  # fmt: skip
        assert batch.ascent is not None and batch.next is not None
        names = list(spec.ascent.states(part.group))
        rho = float(radius(spec, part.group, scalars.tolist()))
        streams = [part.column(batch.ascent, name) for name in names]
        streams += [part.column(batch.next, name) for name in names]
        inputs = part.of(batch.params), part.of(batch.grads), targets
        for _, (w, g, x, *states) in blocks(*inputs, *streams):
            self._block(w, g, x, states, part.group, spec, scalars, memory, rho)

    def _block(
        self, weights: Tensors, grads: Tensors, targets: Tensors, states: list[Tensors],
        group: Group, spec: StepSpec, scalars: Tensor, memory: Memory, rho: float,
    ) -> None:  # fmt: skip
        rule, names = spec.ascent, list(spec.ascent.states(group))
        assert rule.advance is not None and rule.usable is not None
        grads = [signed(grad, group) for grad in grads]
        old, new = states[: len(names)], states[len(names) :]
        for before, after in zip(old, new, strict=True):
            torch._foreach_copy_(after, before)
        perturbed = [w.clone() if same_memory(x, w) else x.copy_(w)
                     for x, w in zip(targets, weights, strict=True)]  # fmt: skip
        self._operator(perturbed, grads, new, group, -rho)
        if not usable(new[-1], memory):
            h = columns_of(spec, group)
            for k, (w, g, x) in enumerate(zip(weights, grads, perturbed, strict=True)):
                if usable(new[-1][k : k + 1], memory):
                    continue
                state = {name: column[k] for name, column in zip(names, old, strict=True)}
                advanced = rule.advance(g, state, h)
                good = rule.usable(advanced, scalars[Scalar.ASCENT_NORM])
                d = rule.direction(g, advanced, h)
                e = perturbation(w, d, group, scalars.new_tensor(rho))
                x.copy_(w + torch.where(good, e, 0.0))
                for name, column in zip(names, new, strict=True):
                    column[k].copy_(torch.where(good, advanced[name], state[name]))
        for x, target in zip(perturbed, targets, strict=True):
            if x is not target:
                target.copy_(x)


def _adagrad(
    weights: Tensors, grads: Tensors, states: list[Tensors], group: Group, lr: float
) -> None:
    fused_adagrad(weights, grads, states[0], lr)


def _adam(weights: Tensors, grads: Tensors, states: list[Tensors], group: Group, lr: float) -> None:
    fused_adam(weights, grads, states, group["betas"], lr)


along_gradient, along_average, by_noise = AlongGradient(), AlongAverage(), ByNoise()
along_momentum = AlongMomentum()
by_adagrad, by_adam, by_equations = ByFused(_adagrad), ByFused(_adam), ByEquations()


def path_of(ascent: Ascent) -> AlongGradient:
    """The fast path of a rule, or the general one."""
    if ascent.noise:
        return by_noise
    path: AlongGradient = find(ascent.eager) if ascent.eager else by_equations
    return path


# --- parts of them ---


def add_into(targets: list[Tensor], weights: list[Tensor], xs: Sequence[Tensor], a: float) -> None:
    """``targets = weights + a * xs``; a target may be its weight."""
    in_place: tuple[list[Tensor], list[Tensor]] = ([], [])
    for target, w, x in zip(targets, weights, xs, strict=True):
        if target is w or same_memory(target, w):
            in_place[0].append(w)
            in_place[1].append(x)
        else:
            torch.add(w, x, alpha=a, out=target)
    if in_place[0]:
        torch._foreach_add_(*in_place, alpha=a)


def same_memory(x: Tensor, y: Tensor) -> bool:
    return x.data_ptr() == y.data_ptr()


def usable(averages: Tensors, memory: Memory) -> bool:
    """Whether averages of squares are finite, and not so small that their root is not taken."""
    low, high = extremes(memory.room(averages).gather(averages))
    return low >= SMALLEST and high < math.inf
