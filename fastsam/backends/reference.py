"""The reference backend: every step in plain torch, one tensor at a time, to be read.

Any floating dtype; norms in float64. The equations it applies are the rules' own, from where they
are declared. The passes are generators, which give out their sums in case other devices have more
to add (``base.py``).
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from fastsam.arithmetic import wide
from fastsam.kernels.layout import Scalar
from fastsam.step.batch import Batch
from fastsam.step.sharding import total
from fastsam.step.spec import StepSpec, sign_of

from .base import DeviceBackend, Pass, Stop
from .choice import chosen
from .equations import columns_of, learning_rate, perturbation, radius, seen_by, signed
from .noise import drawn
from .rounding import rounded
from .sums import (
    descent_sums,
    finish_ascent,
    finish_descent,
    first_passes,
    global_norm,
    mixture,
    scalars_of,
    scaled_norm,
    squares_by_segment,
    undone_if_it_fails,
)
from .weights import ListBackup, at_weights, follow_parameters, weight


def advance_one(batch: Batch, k: int, spec: StepSpec, scalars: Tensor) -> Tensor:
    """Write the next ascent state of parameter ``k``; the direction that follows from it."""
    group = spec.groups[batch.groups[k]]
    if spec.ascent.noise:
        x, state = drawn(batch, k, spec, scalars), seen_by(spec.ascent, {}, batch, k, scalars)
        return spec.ascent.direction(x, state, columns_of(spec, group))
    rule, g, h = spec.ascent, signed(batch.grads[k], group), columns_of(spec, group)
    old, new = state_of(batch, k)
    if rule.advance is not None and old:
        for name, value in rule.advance(g, old, h).items():
            new[name].copy_(value)
    return rule.direction(g, seen_by(rule, old if rule.from_old else new, batch, k, scalars), h)


def measured_ones(
    directions: Sequence[Tensor], batch: Batch, spec: StepSpec, scalars: Tensor
) -> Sequence[Tensor]:
    """What the direction's norm is taken of: the directions, unless the rule says otherwise.

    The next ascent state has been written.
    """
    rule, found = spec.ascent, []
    if rule.measured is None:
        return directions
    for k, grad in enumerate(batch.grads):
        group = spec.groups[batch.groups[k]]
        old, new = state_of(batch, k)
        state = seen_by(rule, old if rule.from_old else new, batch, k, scalars)
        found.append(rule.measured(signed(grad, group), state, columns_of(spec, group)))
    return found


def state_of(batch: Batch, k: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The ascent state of parameter ``k``, old and new; empty where it has none."""
    if batch.ascent is None or batch.next is None:
        return {}, {}
    return batch.ascent[k] or {}, batch.next[k] or {}


def perturb_one(batch: Batch, k: int, d: Tensor, spec: StepSpec, scalars: Tensor) -> None:
    """Perturb parameter ``k`` along ``d``, and drop the next ascent state where it is unusable."""
    w, group = weight(batch, k), spec.groups[batch.groups[k]]
    scalars = scalars_of(batch, k, scalars)
    scale = radius(spec, group, scalars)
    e = perturbation(w, d, group, scale, spec.ascent.scales_once)
    old, new = state_of(batch, k)
    if spec.ascent.usable is not None and new:
        good = spec.ascent.usable(new, scalars[Scalar.ASCENT_NORM])
        e = torch.where(good, e, 0.0)
        for name, x in new.items():
            x.copy_(torch.where(good, x, old[name]))
    param = batch.params[k]
    param.copy_(rounded(wide(w) + e, batch, k, spec, scalars, descends=False))


#: Tensors, each with the values that it is about to take.
Values = list[tuple[Tensor, Tensor]]


def update_one(
    batch: Batch, k: int, backup: ListBackup | None, spec: StepSpec, scalars: Tensor
) -> Values:
    """The base update of parameter ``k`` at its unperturbed weights: computed, not yet written."""
    base = spec.base_of(batch.groups[k])
    assert base is not None and batch.states is not None
    stored = batch.states[k]
    param, group = batch.params[k], spec.groups[batch.groups[k]]
    before = weight(batch, k)
    if before is param and backup is not None:
        before = backup.copies.get(param, param)
    w = wide(before).clone()
    u = final_gradient(batch, k, spec, scalars).to(w.dtype)  # a parameter's may be another
    state = {name: wide(stored[name]).clone() for name in base.states(group)}
    step = None
    if base.counts_steps:
        state["step"] = stored["step"] + 1
        # a number on a CPU, for torch's own rounding
        on_cpu = stored["step"].device.type == "cpu"
        step = state["step"].item() if on_cpu else state["step"].double()
    fresh = batch.fresh is not None and batch.fresh[k]
    number = Scalar.RATE if base.takes_rate else Scalar.SQUARED_NORMS
    given = [step, fresh, scalars[number]]
    if base.takes_first:
        first = None if batch.firsts is None else batch.firsts[k]
        given.append(torch.zeros_like(w) if first is None else wide(first).to(w.dtype))
    base.update(w, u, state, group, *given)
    if spec.has_part_apart:
        w -= beside(batch, k, spec, scalars).to(w.dtype)
    if spec.skip_nonfinite:
        accepted = scalars[Scalar.ACCEPTED] != 0
        w = torch.where(accepted, w, wide(before))
        for name, new in state.items():
            state[name] = torch.where(accepted, new, wide(stored[name]))
    values = [(stored[name], new) for name, new in state.items()]
    if weight(batch, k) is not param:
        values.append((weight(batch, k), w))
    return [(param, rounded(w, batch, k, spec, scalars, descends=True)), *values]


def write(values: Values) -> None:
    """Let tensors take their new values; nothing here needs memory."""
    for x, new in values:
        x.copy_(new)


def final_gradient(batch: Batch, k: int, spec: StepSpec, scalars: Tensor) -> Tensor:
    """``u`` of parameter ``k``, in the dtype of the arithmetic."""
    u = wide(batch.grads[k])
    first = batch.firsts[k] if spec.descent is not None and batch.firsts is not None else None
    if first is not None:
        weights = scalars[Scalar.FIRST_COEFFICIENT], scalars[Scalar.COEFFICIENT]
        return mixture(wide(first), u, *weights)
    return scalars[Scalar.COEFFICIENT].to(u.dtype) * u if spec.rescales else u


def beside(batch: Batch, k: int, spec: StepSpec, scalars: Tensor) -> Tensor:
    """What a descent rule takes away from parameter ``k`` past the base."""
    group, second = spec.groups[batch.groups[k]], wide(batch.grads[k])
    first = None if batch.firsts is None else batch.firsts[k]
    g = torch.zeros_like(second) if first is None else wide(first)
    apart = scalars[Scalar.APART]
    part = mixture(g, torch.where(apart != 0, second, 0.0), scalars[Scalar.FIRST_APART], apart)
    change: Tensor = learning_rate(group) * sign_of(group) * part
    return change


def leave_kept(
    batch: Batch, spec: StepSpec, scalars: Tensor, members: Iterable[int] | None = None
) -> None:
    """Leave what a descent rule keeps in the place of first gradients; of all, or of some."""
    if not spec.keeps or batch.firsts is None:
        return
    weights = scalars[Scalar.FIRST_APART], scalars[Scalar.APART]
    for k in range(len(batch.params)) if members is None else members:
        first = batch.firsts[k]
        if first is None:
            continue
        second = torch.where(weights[1] != 0, wide(batch.grads[k]), 0.0)
        new = mixture(wide(first), second, *weights)
        if spec.skip_nonfinite:
            old = None if batch.kept is None else batch.kept[k]
            held = torch.zeros_like(new) if old is None else wide(old)
            new = torch.where(scalars[Scalar.ACCEPTED] != 0, new, held)
        first.copy_(new)


def leave_final_gradient(batch: Batch, spec: StepSpec, scalars: Tensor) -> None:
    """Leave ``u`` in ``.grad`` of the parameters whose base optimizer is not fused."""
    if not spec.rescales:
        return
    members = unfused(batch, spec)
    if batch.beside is not None:  # of gradients that are about to be written over
        for k in members:
            batch.beside[batch.params[k]] = beside(batch, k, spec, scalars)
    some = batch
    if spec.bases is not None:
        some = Batch(
            owners=[batch.owners[k] for k in members], grads=[batch.grads[k] for k in members]
        )
    write_grads(some, (final_gradient(batch, k, spec, scalars) for k in members))


def unfused(batch: Batch, spec: StepSpec) -> list[int]:
    """Positions of the parameters whose base optimizer is not fused."""
    return [k for k, i in enumerate(batch.groups) if spec.base_of(i) is None]


def write_grads(batch: Batch, values: Iterable[Tensor]) -> None:
    """Write to the gradients, for a base optimizer that reads them there."""
    for param, grad, value in zip(batch.owners, batch.grads, values, strict=True):
        if torch._debug_has_internal_overlap(grad):  # expanded: cannot be written in place
            param.grad = value.to(grad.dtype)
        else:
            grad.copy_(value)


def keep_rejected(
    batch: Batch, spec: StepSpec, scalars: Tensor, accepted: Tensor | None = None
) -> None:
    """Where the device rejects the step, the ascent state of before it stays.

    With memory for a bool nothing is allocated.
    """
    if not spec.skip_nonfinite or batch.ascent is None or batch.next is None:
        return
    accepted = torch.ne(scalars[Scalar.ACCEPTED], 0, out=accepted)
    for old, new in zip(batch.ascent, batch.next, strict=True):
        for name in new or ():
            assert old is not None and new is not None
            here = accepted.to(new[name].device, non_blocking=True)
            torch.where(here, new[name], old[name], out=new[name])


def adapts_here(batch: Batch, spec: StepSpec) -> bool:
    """Whether the descent rule's scalars follow here; a user's function is asked once a step."""
    return batch.leads or spec.descent is None or not spec.descent.adapts_on_host


class ReferenceBackend(DeviceBackend):
    """See the module's docstring."""

    def ascent_pass(
        self, batch: Batch, spec: StepSpec, scalars: Tensor, kept: ListBackup | None = None
    ) -> Pass[ListBackup]:
        everyone = range(len(batch.params))
        batch = chosen(batch, spec, scalars)
        follow_parameters(batch, None)
        weights = at_weights(batch)
        directions = [advance_one(batch, k, spec, scalars) for k in everyone]
        if spec.needs_ascent_norm:
            n = m = yield from scaled_norm(batch.grads, weights, spec, like=scalars)
            along: Sequence[Tensor] = batch.grads
            if spec.ascent.norm == "direction":
                along = measured_ones(directions, batch, spec, scalars)
                m = yield from scaled_norm(along, weights, spec, like=scalars)
            if batch.squares is not None:
                m = yield from squares_by_segment(along, weights.params, batch, spec, scalars)
            finish_ascent(n, m, spec, scalars)
        backup = ListBackup() if kept is None else kept
        try:
            # all copies come first: two parameters may be views of the same memory
            if kept is not None:
                kept.keep(batch)
            for param, w in zip(batch.params, weights.params, strict=True) if kept is None else ():
                backup.copies[param] = w.detach().clone() if w is param else w
            for k in everyone:
                perturb_one(batch, k, directions[k], spec, scalars)
        except BaseException:
            backup.restore()
            raise
        return backup

    def descent_pass(
        self, batch: Batch, backup: ListBackup | None, spec: StepSpec, scalars: Tensor
    ) -> Pass[None]:
        updates: Values = []
        with undone_if_it_fails(scalars):  # what may fail comes before the first write
            if spec.needs_descent_norm:
                plain = measured = yield from global_norm(batch.grads, scalars, batch.shardings)
                if spec.adaptive and spec.renormalize:
                    measured = yield from scaled_norm(batch.grads, batch, spec, like=scalars)
                sums = yield from descent_sums(batch, backup, spec, scalars)
                finish_descent(plain, measured, sums, spec, scalars, adapts_here(batch, spec))
            keep_rejected(batch, spec, scalars)
            leave_kept(batch, spec, scalars)
            follow_parameters(batch, backup)
            fused = [k for k, i in enumerate(batch.groups) if spec.base_of(i) is not None]
            if spec.base is None and spec.bases is None:
                leave_final_gradient(batch, spec, scalars)
            for k in fused:
                updates += update_one(batch, k, backup, spec, scalars)
            yield None
        if backup is not None:
            updated = {batch.params[k] for k in fused}
            write([(w, copy) for w, copy in backup.copies.items() if w not in updated])
        if spec.bases is not None and spec.has_unfused:
            leave_final_gradient(batch, spec, scalars)
            yield Stop.UNFUSED
        write(updates)

    def hypergradient_pass(
        self, batch: Batch, backup: ListBackup | None, hessian: str, spec: StepSpec, scalars: Tensor
    ) -> Pass[None]:
        parts = []
        perturbations = first_passes(batch, backup, spec, scalars) if hessian == "diag" else None
        for k, grad in enumerate(batch.grads):
            first = None if batch.firsts is None else batch.firsts[k]
            group = spec.groups[batch.groups[k]]
            second = signed(grad, group)
            if perturbations is not None:
                product = second * second * next(perturbations)[1]
            else:
                product = (
                    torch.zeros_like(second) if first is None else second - signed(first, group)
                )
            validation, training = (
                torch.zeros_like(second) if xs is None or xs[k] is None else wide(xs[k])  # type: ignore[arg-type]
                for xs in (batch.validation, batch.training)
            )
            lr = learning_rate(group) * torch.ones_like(scalars[0])
            parts.append(lr * ((validation - training) * product).sum(dtype=scalars.dtype))
        slope = total(parts, batch.shardings)
        yield slope
        weight = scalars[Scalar.COEFFICIENT] + scalars[Scalar.APART]  # of the second gradient
        scalars[Scalar.HYPERGRADIENT] = weight * slope
