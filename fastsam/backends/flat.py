"""Copies of the weights for the triton backend, and which parameters need none."""

from collections.abc import Iterable

import torch
from torch import Tensor

from ..rules import Batch, Layout

#: Elements to which every tensor's place in a flat backup is rounded up: keeps it aligned.
ALIGNMENT = 64


class FlatBackup:
    """One flat copy of the weights per bucket, and where each parameter lies in it."""

    def __init__(self, layout: Layout | None) -> None:
        self.layout = layout  # of the first pass
        self.flats: list[Tensor] = []
        self._parts: list[tuple[list[Tensor], list[int]]] = []  # parameters, first elements
        self.written = 0  # how many of the flat copies hold their weights
        self._places: dict[Tensor, tuple[int, int]] = {}
        self.masters: dict[Tensor, Tensor] = {}  # of parameters that need no copy

    def reserve(self, params: list[Tensor], starts: list[int], size: int) -> Tensor:
        """Allocate for one bucket, by :func:`offsets`."""
        flat = torch.empty(size, dtype=params[0].dtype, device=params[0].device)
        self.flats.append(flat)
        self._parts.append((params, starts))
        return flat

    @property
    def places(self) -> dict[Tensor, tuple[int, int]]:
        """Which flat copy, and where in it, by parameter."""
        if not self._places:
            for i, (params, starts) in enumerate(self._parts):
                self._places.update(
                    (p, (i, start)) for p, start in zip(params, starts, strict=True)
                )
        return self._places

    def left_by(self, batch: Batch) -> list[Tensor]:
        """The parameters that a second pass over ``batch`` does not update."""
        cache = {} if batch.layout is None else batch.layout.cache
        if self.layout is not None and cache.get("same parameters as") is self.layout:
            return []
        updated = set(batch.params)
        left = [param for param in (*self.places, *self.masters) if param not in updated]
        if not left:
            cache["same parameters as"] = self.layout
        return left

    def restore(self, params: Iterable[Tensor] | None = None) -> None:
        """Copy weights back: those of ``params``, or all that have been copied."""
        for param in [*self.places, *self.masters] if params is None else params:
            if param in self.masters:
                param.copy_(self.masters[param])
                continue
            i, start = self.places[param]
            if i < self.written:
                # a gap-free copy's; on "meta", because an undo must not need memory
                strides = torch.empty_like(param, device="meta").stride()
                part = self.flats[i][start : start + param.numel()]
                param.copy_(part.as_strided(param.size(), strides))


def offsets(params: list[Tensor]) -> tuple[list[int], int]:
    """Where each parameter starts in a flat copy, and the size of that, in elements."""
    starts, end = [], 0
    for param in params:
        starts.append(end)
        end += -(-param.numel() // ALIGNMENT) * ALIGNMENT
    return starts, end
