"""Gradients at several perturbations of one step, added up as they come."""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from fastsam.arithmetic import wide, wide_dtype

from .batch import Batch
from .gradients import take_over

#: A number, or a 0-dim tensor on any device.
Factor = Any


class Samples:
    """Sums of the gradients at a step's perturbations, but for the last.

    Args:
        plain: Whether their sum is needed.
        weighted: Whether one with weights is.

    Attributes:
        decay, weight: What the weighted sum so far and the next gradient are multiplied by.
        inverse: The inverse loss scale of the gradients at ``w``, which the sums carry; None
            without.
    """

    def __init__(self, plain: bool, weighted: bool) -> None:
        self._plain: dict[Tensor, Tensor] | None = {} if plain else None
        self._weighted: dict[Tensor, Tensor] | None = {} if weighted else None
        self.decay: Factor = 1.0
        self.weight: Factor = 1.0
        self.inverse: Tensor | None = None

    def tensors(self) -> Iterator[Tensor]:
        """The sums."""
        for sums in (self._plain, self._weighted):
            yield from () if sums is None else sums.values()

    def add(
        self, batch: Batch, cleared: bool, ours: Iterable[Tensor], scale: Tensor | None = None
    ) -> None:
        """Take in the gradients of one pass, times ``scale``; the rest is ``take_over``'s."""
        factor: Factor = 1.0 if scale is None else scale
        if self._weighted is not None:
            weight = self.weight * factor
            _add(self._weighted, batch.owners, batch.grads, self.decay, weight)
        if self._plain == {} and scale is None:
            own = take_over(batch, cleared, ours)
            self._plain.update(zip(batch.owners, map(wide, own), strict=True))
        elif self._plain is not None:
            _add(self._plain, batch.owners, batch.grads, 1.0, factor)

    def mix(
        self, firsts: tuple[list[Tensor], list[Tensor]], first: Factor, plain: Factor,
        weighted: Factor,
    ) -> tuple[list[Tensor], list[Tensor]]:  # fmt: skip
        """``first * g`` and the sums times their factors, by parameter, in the dtype of ``g``.

        A factor that is the number 0 leaves out what it belongs to, whatever that is.
        """
        found = dict(zip(*firsts, strict=True))
        terms = [(found, first), (self._plain or {}, plain), (self._weighted or {}, weighted)]
        terms = [(xs, factor) for xs, factor in terms if isinstance(factor, Tensor) or factor != 0]
        owners = list(dict.fromkeys([*found, *(owner for xs, _ in terms for owner in xs)]))
        mixed = []
        for owner in owners:
            held = [(xs[owner], factor) for xs, factor in terms if owner in xs]
            parts = [_times(wide(x), factor) for x, factor in held]
            total = sum(parts[1:], start=parts[0]) if parts else torch.zeros_like(found[owner])
            mixed.append(total.to(found[owner].dtype) if owner in found else total)
        return owners, mixed


def _add(
    sums: dict[Tensor, Tensor], owners: list[Tensor], grads: list[Tensor], decay: Factor,
    weight: Factor,
) -> None:  # fmt: skip
    """``sum <- decay * sum + weight * grad``."""
    alike: dict[Any, tuple[list[Tensor], list[Tensor]]] = defaultdict(lambda: ([], []))
    for owner, grad in zip(owners, grads, strict=True):
        if owner not in sums:
            sums[owner] = torch.zeros_like(grad, dtype=wide_dtype(grad))
        held = alike[grad.device, grad.dtype]
        held[0].append(sums[owner])
        held[1].append(wide(grad))
    for there, new in alike.values():
        if isinstance(decay, Tensor) or decay != 1:
            torch._foreach_mul_(there, _like(decay, there[0]))
        if isinstance(weight, Tensor) or weight != 1:
            new = list(torch._foreach_mul(new, _like(weight, there[0])))
        torch._foreach_add_(there, new)


def _times(x: Tensor, factor: Factor) -> Tensor:
    if isinstance(factor, Tensor) or factor != 1:
        x = x * _like(factor, x)
    return x


def _like(factor: Factor, x: Tensor) -> Any:
    """A factor, such that it leaves a tensor's dtype as it is."""
    if isinstance(factor, Tensor):
        return factor.to(x.device, wide_dtype(x), non_blocking=True)
    return factor
