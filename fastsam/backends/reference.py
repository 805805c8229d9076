"""The reference backend: every step in plain torch, one tensor at a time, to be read.

Any floating dtype; norms in float64. The equations it applies are in ``equations.py``. The passes
are generators, which give out their sums in case other devices have more to add (``lockstep.py``).
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from fastsam.kernels.layout import Scalar

from ..bases import signed_lr
from ..rules import Batch, Step
from ..sharding import total
from .equations import (
    advance,
    base_update,
    direction,
    perturbation,
    radius,
    usable,
    wide,
)
from .interface import DeviceBackend
from .lockstep import Pass
from .measures import (
    finish_ascent,
    finish_descent,
    first_passes,
    global_norm,
    measure_mixture,
    mixture,
    scaled_norm,
    undone_if_it_fails,
)
from .rounding import rounded
from .weights import ListBackup, at_weights, follow_parameters, weight


def advance_one(batch: Batch, k: int, step: Step) -> Tensor:
    """Write the next ascent state of parameter ``k``; the direction that follows from it."""
    rule, g, new = step.ascent.name, batch.grads[k], batch.next[k]
    for name, value in advance(rule, g, batch.ascent[k], step.groups[batch.groups[k]]).items():
        new[name].copy_(value)
    return direction(rule, g, new)


def perturb_one(batch: Batch, k: int, d: Tensor, step: Step, scalars: Tensor) -> None:
    """Perturb parameter ``k`` along ``d``, and drop the next ascent state where it is unusable."""
    w, group = weight(batch, k), step.groups[batch.groups[k]]
    e = perturbation(w, d, group, radius(group, step, scalars))
    if batch.next[k]:
        good = usable(step.ascent.name, batch.next[k], scalars)
        e = torch.where(good, e, 0.0)
        for name, x in batch.next[k].items():
            x.copy_(torch.where(good, x, batch.ascent[k][name]))
    param = batch.params[k]
    param.copy_(rounded(wide(w) + e, batch, k, step, scalars, descends=False))


#: Tensors, each with the values that it is about to take.
Values = list[tuple[Tensor, Tensor]]


def update_one(
    batch: Batch, k: int, backup: ListBackup | None, step: Step, scalars: Tensor
) -> Values:
    """The base update of parameter ``k`` at its unperturbed weights: computed, not yet written."""
    assert step.base is not None
    param, group, stored = batch.params[k], step.groups[batch.groups[k]], batch.states[k]
    before = weight(batch, k)
    if before is param and backup is not None:
        before = backup.copies.get(param, param)
    w = wide(before).clone()
    u = final_gradient(batch, k, step, scalars).to(w.dtype)  # a parameter's may be another
    names = step.base.states(group)
    state = {name: wide(stored[name]).clone() for name in names}
    if step.base.counts_steps:
        state["step"] = stored["step"].clone()
    base_update(step.base, w, u, state, group, batch.fresh[k], scalars[Scalar.SQUARED_NORMS])
    if step.skip_nonfinite:
        accepted = scalars[Scalar.ACCEPTED] != 0
        w = torch.where(accepted, w, wide(before))
        for name, new in state.items():
            state[name] = torch.where(accepted, new, wide(stored[name]))
    values = [(stored[name], new) for name, new in state.items()]
    if weight(batch, k) is not param:
        values.append((weight(batch, k), w))
    return [(param, rounded(w, batch, k, step, scalars, descends=True)), *values]


def write(values: Values) -> None:
    """Let tensors take their new values; nothing here needs memory."""
    for x, new in values:
        x.copy_(new)


def final_gradient(batch: Batch, k: int, step: Step, scalars: Tensor) -> Tensor:
    """``u`` of parameter ``k``, in the dtype of the arithmetic."""
    u = wide(batch.grads[k])
    first = batch.firsts[k] if step.mix is not None else None
    if first is not None:
        weights = scalars[Scalar.FIRST_COEFFICIENT], scalars[Scalar.COEFFICIENT]
        return mixture(wide(first), u, *weights)
    return scalars[Scalar.COEFFICIENT].to(u.dtype) * u if step.rescales else u


def leave_final_gradient(batch: Batch, step: Step, scalars: Tensor) -> None:
    """Leave ``u`` in ``.grad`` for a foreign base optimizer."""
    if not step.rescales:
        return
    everyone = range(len(batch.params))
    write_grads(batch, (final_gradient(batch, k, step, scalars) for k in everyone))


def write_grads(batch: Batch, values: Iterable[Tensor]) -> None:
    """Write to the gradients, for a base optimizer that reads them there."""
    for param, grad, value in zip(batch.owners, batch.grads, values, strict=True):
        if torch._debug_has_internal_overlap(grad):  # expanded: cannot be written in place
            param.grad = value.to(grad.dtype)
        else:
            grad.copy_(value)


def keep_rejected(
    batch: Batch, step: Step, scalars: Tensor, accepted: Tensor | None = None
) -> None:
    """Where the device rejects the step, the ascent state of before it stays.

    With memory for a bool nothing is allocated.
    """
    if not (step.skip_nonfinite and any(batch.next)):
        return
    accepted = torch.ne(scalars[Scalar.ACCEPTED], 0, out=accepted)
    for old, new in zip(batch.ascent, batch.next, strict=True):
        for name in new:
            here = accepted.to(new[name].device, non_blocking=True)
            torch.where(here, new[name], old[name], out=new[name])


class ReferenceBackend(DeviceBackend):
    """See the module's docstring."""

    def ascent_pass(self, batch: Batch, step: Step, scalars: Tensor) -> Pass[ListBackup]:
        everyone = range(len(batch.params))
        follow_parameters(batch, None)
        weights = at_weights(batch)
        directions = [advance_one(batch, k, step) for k in everyone]
        if step.needs_ascent_norm:
            n = m = yield from scaled_norm(batch.grads, weights, step, like=scalars)
            if step.ascent.name == "ema":
                m = yield from scaled_norm(directions, weights, step, like=scalars)
            finish_ascent(n, m, step, scalars)
        backup = ListBackup()
        try:
            # all copies come first: two parameters may be views of the same memory
            for param, w in zip(batch.params, weights.params, strict=True):
                backup.copies[param] = w.detach().clone() if w is param else w
            for k in everyone:
                perturb_one(batch, k, directions[k], step, scalars)
        except BaseException:
            backup.restore()
            raise
        return backup

    def descent_pass(
        self, batch: Batch, backup: ListBackup | None, step: Step, scalars: Tensor
    ) -> Pass[None]:
        updates: Values = []
        with undone_if_it_fails(scalars):  # what may fail comes before the first write
            if step.needs_descent_norm:
                plain = measured = yield from global_norm(batch.grads, scalars, batch.shardings)
                if step.adaptive and step.renormalize:
                    measured = yield from scaled_norm(batch.grads, batch, step, like=scalars)
                measure = measure_mixture(batch, backup, step, scalars)
                yield from finish_descent(plain, measured, measure, step, scalars, batch.leads)
            keep_rejected(batch, step, scalars)
            follow_parameters(batch, backup)
            if step.base is None:
                leave_final_gradient(batch, step, scalars)
            else:
                for k in range(len(batch.params)):
                    updates += update_one(batch, k, backup, step, scalars)
            yield None
        if backup is not None:
            updated = set(batch.params) if step.base is not None else set()
            write([(w, copy) for w, copy in backup.copies.items() if w not in updated])
        write(updates)

    def hypergradient_pass(
        self, batch: Batch, backup: ListBackup | None, hessian: str, step: Step, scalars: Tensor
    ) -> Pass[None]:
        parts = []
        perturbations = first_passes(batch, backup, step, scalars) if hessian == "diag" else None
        for k, (first, grad) in enumerate(zip(batch.firsts, batch.grads, strict=True)):
            second = wide(grad)
            if perturbations is not None:
                product = second * second * next(perturbations)[1]
            else:
                product = torch.zeros_like(second) if first is None else second - wide(first)
            validation, training = (
                torch.zeros_like(second) if x is None else wide(x)
                for x in (batch.validation[k], batch.training[k])
            )
            lr = signed_lr(step.groups[batch.groups[k]]) * torch.ones_like(scalars[0])
            parts.append(lr * ((validation - training) * product).sum(dtype=scalars.dtype))
        slope = total(parts, batch.shardings)
        yield slope
        scalars[Scalar.HYPERGRADIENT] = scalars[Scalar.COEFFICIENT] * slope
