"""Norms and dot products over all tensors, and the scalars of a step that follow from them."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fastsam.arithmetic import EPS, is_finite, root, where, wide
from fastsam.kernels.layout import Scalar
from fastsam.step.batch import Batch
from fastsam.step.rule import Descent
from fastsam.step.sharding import Sharding, add_up, total
from fastsam.step.spec import StepSpec, is_perturbed

from .base import Pass
from .equations import columns_of, element_scale, perturbation, radius, seen_by, signed
from .weights import ListBackup

#: Where a descent rule's scalars are, in the order of their declaration.
SCALARS = Scalar.DESCENT0, Scalar.DESCENT1, Scalar.DESCENT2
#: And where the coefficients are of what goes past the base: of the second gradient, and the first.
BESIDE = Scalar.APART, Scalar.FIRST_APART


def global_norm(
    parts: Iterable[Tensor], like: Tensor, shardings: Sequence[Sharding] | None = None
) -> Pass[Tensor]:
    """The L2 norm over all tensors, as a 0-dim tensor like ``like``."""
    norms = (torch.linalg.vector_norm(part, dtype=like.dtype) for part in parts)
    squared = total([norm.square().to(like.device) for norm in norms], shardings)
    yield squared
    return squared.sqrt()


def scaled_norm(
    vectors: Sequence[Tensor], batch: Batch, spec: StepSpec, like: Tensor
) -> Pass[Tensor]:
    """``||T x||`` over all groups, at the parameters' present values."""
    parts = (
        element_scale(w, spec.groups[i]) * wide(x) if spec.groups[i]["adaptive"] else x
        for w, x, i in zip(batch.params, vectors, batch.groups, strict=True)
    )
    return global_norm(parts, like, batch.shardings)


def squares_by_segment(
    vectors: Sequence[Tensor], weights: Sequence[Tensor], batch: Batch, spec: StepSpec, like: Tensor
) -> Pass[Tensor]:
    """``||T x||^2`` of every segment, which goes to ``batch.squares``; the norm of all of it."""
    assert batch.squares is not None and batch.segments is not None
    shardings = batch.shardings or [()] * len(vectors)
    found = {sharding: torch.zeros_like(batch.squares) for sharding in shardings}
    for k, (w, x, i) in enumerate(zip(weights, vectors, batch.groups, strict=True)):
        part = element_scale(w, spec.groups[i]) * wide(x) if spec.groups[i]["adaptive"] else x
        norm = torch.linalg.vector_norm(part, dtype=like.dtype)
        found[shardings[k]][batch.segments[k]] += norm.square()
    squares = add_up(found)
    yield squares
    batch.squares.copy_(squares)
    return squares.sum().sqrt()


def scalars_of(batch: Batch, k: int, scalars: Tensor) -> Tensor:
    """The scalars as parameter ``k`` sees them: with the norm of its own segment."""
    if batch.squares is None or batch.segments is None:
        return scalars
    own = scalars.clone()
    own[Scalar.ASCENT_NORM] = batch.squares[batch.segments[k]].sqrt()
    return own


def dot(
    pairs: Iterable[tuple[Tensor, Tensor]],
    like: Tensor,
    shardings: Sequence[Sharding] | None = None,
) -> Pass[Tensor]:
    """The sum of products over all pairs of tensors, as a 0-dim tensor like ``like``."""
    products = [(x.to(like.dtype) * y).sum().to(like.device) for x, y in pairs]
    result = total(products, shardings)
    yield result
    return result


@contextmanager
def numbers(scalars: Tensor) -> Iterator[Any]:
    """The scalars to read and to write: a list of numbers on a CPU, where that is faster.

    They change at the end of the block, and not if it raises; on another device at once.
    """
    if scalars.device.type != "cpu":
        yield scalars
        return
    held = scalars[: len(Scalar)]  # integers follow
    values = held.tolist()
    yield values
    held.numpy()[:] = values  # a tensor of them takes three times as long


def _number(x: Any, scalars: Tensor) -> Any:
    """A number, or a tensor of one, as what :func:`numbers` gives."""
    return float(x) if scalars.device.type == "cpu" else x + torch.zeros_like(scalars[0])


def _tensor(x: Any, scalars: Tensor) -> Tensor:
    """What a rule is given in the place of a number: a 0-dim tensor of its own."""
    if isinstance(x, Tensor):
        return x.clone()
    return scalars.new_full((), x)


def finish_ascent(n: Tensor, direction_norm: Tensor, spec: StepSpec, scalars: Tensor) -> None:
    """The norms that the perturbation needs, and the rule's accumulator."""
    scalars[Scalar.ASCENT_NORM] = direction_norm
    scalars[Scalar.GRAD_NORM] = n
    if spec.ascent.accumulate is not None:
        old = scalars[Scalar.ACCUMULATED].clone()
        scalars[Scalar.NEXT_ACCUMULATED] = spec.ascent.accumulate(old, n)
    settle(n, spec, scalars)


def settle(n: Tensor, spec: StepSpec, scalars: Tensor) -> None:
    """The coefficients of ``u`` where they depend on no sums, after a first pass."""
    rule = spec.descent
    if rule is None or rule.sums or rule.given:
        return
    found = rule.coefficients(_scalars_of(rule, scalars), {}, rule.columns(spec.groups[0]))
    with numbers(scalars) as s:
        c, c1, *beside = (_number(x, scalars) for x in found)
        usable = is_finite(_number(n, scalars))
        s[Scalar.COEFFICIENT] = where(usable, c, 1.0)
        s[Scalar.FIRST_COEFFICIENT] = where(usable, c1, 0.0)
        for slot, x in zip(BESIDE, beside, strict=False):
            s[slot] = where(usable, x, 0.0)


def first_passes(
    batch: Batch, backup: ListBackup | None, spec: StepSpec, scalars: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """First gradients, of what is minimised, and the perturbations made of them, unrounded."""
    for k, grad in enumerate(batch.grads):
        first = None if batch.firsts is None else batch.firsts[k]
        zeros = torch.zeros_like(wide(grad))
        if first is None:  # counts as zeros
            yield zeros, zeros
            continue
        param, group = batch.params[k], spec.groups[batch.groups[k]]
        if not is_perturbed(group):
            yield signed(first, group), zeros
            continue
        w = param if backup is None else backup.copies.get(param, param)
        states = batch.ascent if spec.ascent.from_old else batch.next
        state = None if states is None else states[k]
        g = signed(first, group)
        state = seen_by(spec.ascent, state or {}, batch, k, scalars)
        d = spec.ascent.direction(g, state, columns_of(spec, group))
        scale = radius(spec, group, scalars_of(batch, k, scalars))
        yield g, perturbation(w, d, group, scale, spec.ascent.scales_once)


class undone_if_it_fails:  # noqa: N801 - used like a function
    """Put the scalars back if the block raises: some of them are state."""

    def __init__(self, scalars: Tensor) -> None:
        self._scalars = scalars

    def __enter__(self) -> None:
        self._before = self._scalars.clone()

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None:
            self._scalars.copy_(self._before)


def descent_sums(
    batch: Batch, backup: ListBackup | None, spec: StepSpec, scalars: Tensor
) -> Pass[dict[str, Tensor]]:
    """What a descent rule asks for, but for the second gradient's norm (``spec.SUMS``)."""
    rule = spec.descent
    if rule is None:
        return {}
    parts = []
    passes = first_passes(batch, backup, spec, scalars)
    for (g, e), grad, i in zip(passes, batch.grads, batch.groups, strict=True):
        second = signed(grad, spec.groups[i])
        first = g.to(scalars.dtype)
        # alike, so that they are equal where the gradients are
        found = [(first * first).sum(), (first * second).sum()]
        if "rise" in rule.sums:
            found.append((second * e).sum(dtype=scalars.dtype))
        elif rule.needs_perturbation:
            found.append(((g + second) * e).sum(dtype=scalars.dtype) / 2)
        parts.append(torch.stack(found).to(scalars.device))
    sums = total(parts, batch.shardings)
    yield sums
    names = "first", "product", "rise" if "rise" in rule.sums else "sharpness"
    return dict(zip(names, sums.unbind(), strict=False))


def finish_descent(
    plain: Tensor,
    measured: Tensor,
    sums: dict[str, Tensor],
    spec: StepSpec,
    scalars: Tensor,
    adapts: bool = True,
) -> None:
    """What follows from the second gradient: the coefficients of ``u``, and its acceptance.

    ``plain`` is its norm, ``measured`` that of ``T g~`` where it is renormalised, and ``sums`` what
    a descent rule asks for. The rule's scalars follow only where it ``adapts``.
    """
    with numbers(scalars) as s:
        values = {name: _number(x, scalars) for name, x in sums.items()}
        _finish(_number(plain, scalars), _number(measured, scalars), values, spec, scalars, s)
    if spec.descent is not None and adapts:
        adapt(spec.descent, spec, scalars)


def _finish(
    plain: Any, measured: Any, sums: dict[str, Any], spec: StepSpec, scalars: Tensor, s: Any
) -> None:
    """Fill in ``s``, which is to become the ``scalars``: numbers, or 0-dim tensors."""
    n = s[Scalar.GRAD_NORM]
    zero, one = _number(0.0, scalars), _number(1.0, scalars)
    gamma = one
    if spec.renormalize:
        # n = n~ gives exactly 1, so that SSAM is then SAM bit for bit; so does a non-finite n,
        # where nothing was perturbed and there is no norm to restore
        gamma = where((n != measured) & is_finite(n), n / (measured + EPS), 1.0)
    first, coefficient = zero, gamma
    norm = gamma * plain  # of u
    rule = spec.descent
    if rule is not None:
        state = _scalars_of(rule, scalars)
        s[Scalar.USED_DESCENT0] = s[Scalar.DESCENT0]
        given = sums | {"second": norm * norm, "product": gamma * sums["product"]}
        given |= {"rise": gamma * sums.get("rise", 0.0), "loss": s[Scalar.LOSS]}
        tensors = {name: _tensor(x, scalars) for name, x in given.items() if name in rule.sums}
        found = rule.coefficients(state, tensors, rule.columns(spec.groups[0]))
        c, c1, *beside = (_number(x, scalars) for x in found)
        # a first gradient that is not finite stays out of u, as it stayed out of the perturbation
        usable = is_finite(n) & is_finite(sums["first"])  # n is that of what is perturbed
        first = where(usable, c1, 0.0)
        coefficient = where(usable, c * gamma, gamma)
        if rule.rate:
            s[Scalar.RATE] = beside.pop()
        for slot, x, scale in zip(BESIDE, beside, (gamma, 1.0), strict=False):
            s[slot] = where(usable, x * scale, 0.0)
        own = coefficient * plain
        squared = own * own + 2 * first * coefficient * sums["product"]
        squared = squared + where(first != 0, first * first * sums["first"], 0.0)
        # with g alone or g~ alone there is nothing to cancel, nor NaN from what is left out
        norm = where(first == 0, own, root(squared))
        s[Scalar.SHARPNESS] = sums.get("sharpness", zero)
    clip = one
    if spec.max_grad_norm is not None:
        clip = spec.max_grad_norm / (norm + 1e-6)
        clip = where(clip >= 1, 1.0, clip)  # NaN stays, as in torch
    accepted = one == 1
    if spec.skip_nonfinite:
        accepted = is_finite(plain) & (s[Scalar.FOUND_INF] == 0)
    if spec.skip_first:
        accepted = accepted & is_finite(n)
    s[Scalar.PERTURBED_GRAD_NORM] = measured
    s[Scalar.RENORMALIZATION] = gamma
    s[Scalar.COEFFICIENT] = coefficient * clip
    s[Scalar.FIRST_COEFFICIENT] = first * clip
    s[Scalar.ACCEPTED] = accepted
    s[Scalar.SKIPPED] += 1 - s[Scalar.ACCEPTED]
    if spec.base is not None and spec.base.needs_norm:
        clipped = norm * clip
        s[Scalar.SQUARED_NORMS] += where(accepted, clipped * clipped, 0.0)
    if spec.ascent.accumulate is not None:
        a, new = s[Scalar.ACCUMULATED], s[Scalar.NEXT_ACCUMULATED]
        s[Scalar.ACCUMULATED] = where(accepted, new, a)


def mixture(g: Tensor, second: Tensor, first: Tensor, coefficient: Tensor) -> Tensor:
    """``first * g + coefficient * second``; without weight g may be infinite or NaN."""
    u = coefficient.to(second.dtype) * second
    return u + torch.where(first != 0, first.to(g.dtype) * g, 0.0)


def _scalars_of(rule: Descent, scalars: Tensor) -> dict[str, Tensor]:
    names = rule.scalars or rule.given
    return {name: scalars[slot].clone() for name, slot in zip(names, SCALARS, strict=False)}


def adapt(rule: Descent, spec: StepSpec, scalars: Tensor) -> None:
    """The descent rule's scalars after this step; they stay where nothing was measured."""
    if rule.adapt is None:
        return
    n, sharpness = scalars[Scalar.GRAD_NORM], scalars[Scalar.SHARPNESS].clone()
    # 0 says that nothing was perturbed
    perturbed = n.isfinite() & sharpness.isfinite() & (sharpness != 0)
    valid = (scalars[Scalar.ACCEPTED] != 0) & perturbed
    state = _scalars_of(rule, scalars)
    new = rule.adapt(state, sharpness, rule.columns(spec.groups[0]))
    for name, slot in zip(rule.scalars, SCALARS, strict=False):
        scalars[slot] = torch.where(valid, new[name], state[name])
