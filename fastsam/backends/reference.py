"""The reference backend: every step in plain torch, one tensor at a time, to be read.

Any floating dtype; norms in float64. The equations it applies are in ``equations.py``.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from fastsam.kernels import table
from fastsam.kernels.layout import Scalar

from ..bases import signed_lr
from ..ratio import SharpnessRatio
from ..rules import Batch, LamRule, Step
from ..sharding import Sharding, total
from .equations import (
    EPS,
    advance,
    base_update,
    direction,
    element_scale,
    perturbation,
    radius,
    usable,
    wide,
)
from .rounding import rounded

# --- norms and scalars -----------------------------------------------------------------------


def global_norm(
    parts: Iterable[Tensor], like: Tensor, shardings: Sequence[Sharding] = ()
) -> Tensor:
    """The L2 norm over all tensors, as a 0-dim tensor of the dtype of ``like``."""
    norms = [torch.linalg.vector_norm(part, dtype=like.dtype) for part in parts]
    return total([norm.square() for norm in norms], shardings).sqrt()


def scaled_norm(vectors: Sequence[Tensor], batch: Batch, step: Step, like: Tensor) -> Tensor:
    """``||T x||`` over all groups, at the parameters' present values."""
    return global_norm(
        (
            element_scale(w, step.groups[i]) * wide(x) if step.groups[i]["adaptive"] else x
            for w, x, i in zip(batch.params, vectors, batch.groups, strict=True)
        ),
        like,
        batch.shardings,
    )


def weight(batch: Batch, k: int) -> Tensor:
    """Parameter ``k``, or the master weights behind it."""
    master = batch.masters[k] if batch.masters else None
    return batch.params[k] if master is None else master


def at_weights(batch: Batch) -> Batch:
    """The batch with master weights in the place of their parameters."""
    if not any(master is not None for master in batch.masters):
        return batch
    return replace(batch, params=[weight(batch, k) for k in range(len(batch.params))])


def follow_parameters(batch: Batch, backup: "ListBackup | None") -> None:
    """Let master weights take over what somebody has written to parameters since the last step."""
    for param, master in zip(batch.params, batch.masters, strict=False):
        if master is not None and (backup is None or param not in backup.copies):
            in_step = master.to(param.dtype) == param
            torch.where(in_step, master, wide(param), out=master)


def dot(
    pairs: Iterable[tuple[Tensor, Tensor]], like: Tensor, shardings: Sequence[Sharding] = ()
) -> Tensor:
    """The sum of products over all pairs of tensors, as a 0-dim tensor of the dtype of ``like``."""
    return total([(x * y).sum(dtype=like.dtype) for x, y in pairs], shardings)


def finish_ascent(n: Tensor, direction_norm: Tensor, step: Step, scalars: Tensor) -> None:
    """The norms that the perturbation needs, and LightSAM I's accumulator."""
    scalars[Scalar.ASCENT_NORM] = direction_norm
    scalars[Scalar.GRAD_NORM] = n
    if step.ascent.name == "adagrad_norm":
        squared = torch.where(n.isfinite(), n.square(), 0.0)
        scalars[Scalar.NEXT_SQUARED_NORMS] = scalars[Scalar.ASCENT_SQUARED_NORMS] + squared


def first_passes(
    batch: Batch, backup: "ListBackup | None", step: Step, scalars: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """First gradients and the perturbations made of them, before these were rounded."""
    for k, first in enumerate(batch.firsts):
        if first is None:  # counts as zeros
            zeros = torch.zeros_like(wide(batch.grads[k]))
            yield zeros, zeros
            continue
        param, group = batch.params[k], step.groups[batch.groups[k]]
        w = param if backup is None else backup.copies.get(param, param)
        d = direction(step.ascent.name, first, batch.next[k])
        yield wide(first), perturbation(w, d, group, radius(group, step, scalars))


@contextmanager
def undone_if_it_fails(scalars: Tensor) -> Iterator[None]:
    """Put the scalars back if the block raises: some of them are state."""
    before = scalars.clone()
    try:
        yield
    except BaseException:
        scalars.copy_(before)
        raise


def measure_mixture(
    batch: Batch, backup: "ListBackup | None", step: Step, scalars: Tensor
) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """SAMAR's measurements: from the coefficients of ``u`` its norm, and the sharpness."""

    def measure(first: Tensor, coefficient: Tensor) -> tuple[Tensor, Tensor]:
        seconds = [wide(g) for g in batch.grads]
        firsts = list(first_passes(batch, backup, step, scalars))
        mixed = (mixture(g, g_, first, coefficient)
                 for (g, _), g_ in zip(firsts, seconds, strict=True))  # fmt: skip
        pairs = ((g + g_, e) for (g, e), g_ in zip(firsts, seconds, strict=True))
        sharpness = dot(pairs, scalars, batch.shardings) / 2
        return global_norm(mixed, scalars, batch.shardings), sharpness

    return measure


def finish_descent(
    plain: Tensor,
    measured: Tensor,
    measure: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    step: Step,
    scalars: Tensor,
) -> None:
    """What follows from the second gradient: the coefficients of ``u``, and its acceptance.

    ``plain`` is its norm, ``measured`` that of ``T g~`` where it is renormalised, and ``measure``
    what SAMAR asks (:func:`measure_mixture`).
    """
    n = scalars[Scalar.GRAD_NORM].clone()
    gamma = torch.ones_like(n)
    if step.renormalize:
        # n = n~ gives exactly 1, so that SSAM is then SAM bit for bit; so does a non-finite n,
        # where nothing was perturbed and there is no norm to restore
        exact = (n == measured) | ~n.isfinite()
        gamma = torch.where(exact, 1.0, n / (measured + EPS))
    first, coefficient = torch.zeros_like(n), gamma
    norm = gamma * plain  # of u
    if step.mix is not None:
        lam = scalars[Scalar.LAM].clone()
        scalars[Scalar.USED_LAM] = lam
        # a first gradient that is not finite stays out of u, as it stayed out of the perturbation
        first = torch.where(n.isfinite(), 1 - lam, 0.0)
        coefficient = torch.where(n.isfinite(), lam * gamma, gamma)
        norm, scalars[Scalar.SHARPNESS] = measure(first, coefficient)
    clip = torch.ones_like(n)
    if step.max_grad_norm is not None:
        clip = step.max_grad_norm / (norm + 1e-6)
        clip = torch.where(clip >= 1, 1.0, clip)  # NaN stays, as in torch
    accepted = torch.ones_like(plain, dtype=torch.bool)
    if step.skip_nonfinite:
        accepted = plain.isfinite() & (scalars[Scalar.FOUND_INF] == 0)
    if step.skip_first:
        accepted = accepted & n.isfinite()
    scalars[Scalar.PERTURBED_GRAD_NORM] = measured
    scalars[Scalar.RENORMALIZATION] = gamma
    scalars[Scalar.COEFFICIENT] = coefficient * clip
    scalars[Scalar.FIRST_COEFFICIENT] = first * clip
    scalars[Scalar.ACCEPTED] = accepted
    scalars[Scalar.SKIPPED] += 1 - scalars[Scalar.ACCEPTED]
    if step.base is not None and step.base.needs_norm:
        scalars[Scalar.SQUARED_NORMS] += torch.where(accepted, (norm * clip).square(), 0.0)
    if step.ascent.name == "adagrad_norm":
        a, new = scalars[Scalar.ASCENT_SQUARED_NORMS], scalars[Scalar.NEXT_SQUARED_NORMS]
        scalars[Scalar.ASCENT_SQUARED_NORMS] = torch.where(accepted, new, a)
    if step.mix is not None:
        adapt(step.mix, scalars)


def mixture(g: Tensor, second: Tensor, first: Tensor, coefficient: Tensor) -> Tensor:
    """``first * g + coefficient * second``; without weight g may be infinite or NaN."""
    u = coefficient.to(second.dtype) * second
    return u + torch.where(first != 0, first.to(g.dtype) * g, 0.0)


def adapt(rule: LamRule | SharpnessRatio, scalars: Tensor) -> None:
    """SAMAR's next lam; it stays where nothing was measured, and at the first measurement."""
    n, sharpness = scalars[Scalar.GRAD_NORM], scalars[Scalar.SHARPNESS].clone()
    lam, old = scalars[Scalar.LAM].clone(), scalars[Scalar.SMOOTHED_SHARPNESS].clone()
    known = ~old.isnan()  # NaN before the first measurement
    if isinstance(rule, SharpnessRatio):
        smoothed = rule.smoothing * old + (1 - rule.smoothing) * sharpness
        sharpness = torch.where(known, smoothed, sharpness)
    perturbed = n.isfinite() & (scalars[Scalar.SHARPNESS] != 0)
    valid = (scalars[Scalar.ACCEPTED] != 0) & sharpness.isfinite() & perturbed
    adapted = rule(lam, sharpness, old)
    if not isinstance(adapted, Tensor):  # filled in: a copy from the host would wait
        if table.is_capturing(lam.device):
            raise RuntimeError("rule must give a tensor to be captured in a CUDA graph")
        adapted = torch.full_like(lam, adapted)
    usable = valid & known & adapted.isfinite()
    scalars[Scalar.LAM] = torch.where(usable, adapted.to(lam), lam)
    scalars[Scalar.SMOOTHED_SHARPNESS] = torch.where(valid, sharpness, old)


# --- the backend -----------------------------------------------------------------------------


class ListBackup:
    """The unperturbed weights by parameter: copies of them, or master weights."""

    def __init__(self) -> None:
        self.copies: dict[Tensor, Tensor] = {}

    def restore(self) -> None:
        for param, copy in self.copies.items():
            param.copy_(copy)


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
    u = final_gradient(batch, k, step, scalars)
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
            torch.where(accepted, new[name], old[name], out=new[name])


class ReferenceBackend:
    """See the module's docstring."""

    takes_scaled = False

    def ascend(self, batch: Batch, step: Step, scalars: Tensor) -> ListBackup:
        everyone = range(len(batch.params))
        follow_parameters(batch, None)
        weights = at_weights(batch)
        directions = [advance_one(batch, k, step) for k in everyone]
        if step.needs_ascent_norm:
            n = m = scaled_norm(batch.grads, weights, step, like=scalars)
            if step.ascent.name == "ema":
                m = scaled_norm(directions, weights, step, like=scalars)
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

    def descend(self, batch: Batch, backup: ListBackup | None, step: Step, scalars: Tensor) -> None:
        updates: Values = []
        with undone_if_it_fails(scalars):  # what may fail comes before the first write
            if step.needs_descent_norm:
                plain = measured = global_norm(batch.grads, scalars, batch.shardings)
                if step.adaptive and step.renormalize:
                    measured = scaled_norm(batch.grads, batch, step, like=scalars)
                measure = measure_mixture(batch, backup, step, scalars)
                finish_descent(plain, measured, measure, step, scalars)
            keep_rejected(batch, step, scalars)
            follow_parameters(batch, backup)
            if step.base is None:
                leave_final_gradient(batch, step, scalars)
            else:
                for k in range(len(batch.params)):
                    updates += update_one(batch, k, backup, step, scalars)
        if backup is not None:
            updated = set(batch.params) if step.base is not None else set()
            write([(w, copy) for w, copy in backup.copies.items() if w not in updated])
        write(updates)

    def hypergradient(
        self, batch: Batch, backup: ListBackup | None, hessian: str, step: Step, scalars: Tensor
    ) -> None:
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
            parts.append(lr * dot([(validation - training, product)], like=scalars))
        scalars[Scalar.HYPERGRADIENT] = scalars[Scalar.COEFFICIENT] * total(parts, batch.shardings)
