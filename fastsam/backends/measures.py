"""Norms and dot products over all tensors, and the scalars of a step that follow from them."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from fastsam.kernels import table
from fastsam.kernels.layout import Scalar

from ..ratio import SharpnessRatio
from ..rules import Batch, LamRule, Step
from ..sharding import Sharding, total
from .equations import EPS, direction, element_scale, perturbation, radius, wide
from .lockstep import Pass
from .weights import ListBackup

#: From the coefficients of SAMAR's ``u`` its norm, and the sharpness.
MixtureMeasure = Callable[[Tensor, Tensor], Pass[tuple[Tensor, Tensor]]]


def global_norm(
    parts: Iterable[Tensor], like: Tensor, shardings: Sequence[Sharding] = ()
) -> Pass[Tensor]:
    """The L2 norm over all tensors, as a 0-dim tensor like ``like``."""
    norms = (torch.linalg.vector_norm(part, dtype=like.dtype) for part in parts)
    squared = total([norm.square().to(like.device) for norm in norms], shardings)
    yield squared
    return squared.sqrt()


def scaled_norm(vectors: Sequence[Tensor], batch: Batch, step: Step, like: Tensor) -> Pass[Tensor]:
    """``||T x||`` over all groups, at the parameters' present values."""
    parts = (
        element_scale(w, step.groups[i]) * wide(x) if step.groups[i]["adaptive"] else x
        for w, x, i in zip(batch.params, vectors, batch.groups, strict=True)
    )
    return global_norm(parts, like, batch.shardings)


def dot(
    pairs: Iterable[tuple[Tensor, Tensor]], like: Tensor, shardings: Sequence[Sharding] = ()
) -> Pass[Tensor]:
    """The sum of products over all pairs of tensors, as a 0-dim tensor like ``like``."""
    products = [(x * y).sum(dtype=like.dtype).to(like.device) for x, y in pairs]
    result = total(products, shardings)
    yield result
    return result


def finish_ascent(n: Tensor, direction_norm: Tensor, step: Step, scalars: Tensor) -> None:
    """The norms that the perturbation needs, and LightSAM I's accumulator."""
    scalars[Scalar.ASCENT_NORM] = direction_norm
    scalars[Scalar.GRAD_NORM] = n
    if step.ascent.name == "adagrad_norm":
        squared = torch.where(n.isfinite(), n.square(), 0.0)
        scalars[Scalar.NEXT_SQUARED_NORMS] = scalars[Scalar.ASCENT_SQUARED_NORMS] + squared


def first_passes(
    batch: Batch, backup: ListBackup | None, step: Step, scalars: Tensor
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
    batch: Batch, backup: ListBackup | None, step: Step, scalars: Tensor
) -> MixtureMeasure:
    """SAMAR's measurements."""

    def measure(first: Tensor, coefficient: Tensor) -> Pass[tuple[Tensor, Tensor]]:
        seconds = [wide(g) for g in batch.grads]
        firsts = list(first_passes(batch, backup, step, scalars))
        mixed = (mixture(g, g_, first, coefficient)
                 for (g, _), g_ in zip(firsts, seconds, strict=True))  # fmt: skip
        pairs = ((g + g_, e) for (g, e), g_ in zip(firsts, seconds, strict=True))
        sharpness = (yield from dot(pairs, scalars, batch.shardings)) / 2
        return (yield from global_norm(mixed, scalars, batch.shardings)), sharpness

    return measure


def finish_descent(
    plain: Tensor,
    measured: Tensor,
    measure: MixtureMeasure,
    step: Step,
    scalars: Tensor,
    adapts: bool = True,
) -> Pass[None]:
    """What follows from the second gradient: the coefficients of ``u``, and its acceptance.

    ``plain`` is its norm, ``measured`` that of ``T g~`` where it is renormalised, and ``measure``
    what SAMAR asks (:func:`measure_mixture`). Its rule is asked only where ``adapts``.
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
        norm, scalars[Scalar.SHARPNESS] = yield from measure(first, coefficient)
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
    if step.mix is not None and adapts:
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
