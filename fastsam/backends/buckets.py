"""Buckets: tensors that share one launch, and where in memory everything about them is."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import triton.language as tl
from torch import Tensor

from fastsam.kernels.layout import Launch, Row
from fastsam.kernels.table import Table

from ..rules import Batch, Layout, Step, wide_dtype
from .rounding import tensor_key
from .scratch import is_dense

TYPES: dict[torch.dtype, Any] = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
}
STATES = (Row.STATE0, Row.STATE1, Row.STATE2)
OLD_ASCENT = (Row.ASCENT0, Row.ASCENT1)
NEW_ASCENT = (Row.NEXT0, Row.NEXT1)
#: Elements to which every tensor's place in a flat backup is rounded up: keeps it aligned.
ALIGNMENT = 64


def like_layout(x: Tensor, model: Tensor) -> Tensor:
    """``x``, or a copy of it with ``model``'s strides, so that both are walked alike."""
    if x.stride() == model.stride() or x.numel() < 2:
        return x
    return torch.empty_like(model, dtype=x.dtype).copy_(x)


def dense(x: Tensor) -> Tensor:
    """``x`` if it fills one block of memory, else a copy that does."""
    return x if is_dense(x) else torch.empty_like(x).copy_(x)


class FlatBackup:
    """One flat copy of the weights per bucket, and where each parameter lies in it."""

    def __init__(self, layout: Layout | None) -> None:
        self.layout = layout  # of the first pass
        self.flats: list[Tensor] = []
        self._parts: list[tuple[list[Tensor], list[int]]] = []  # parameters, first elements
        self.written = 0  # how many buckets have been copied
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
                strides = torch.empty_like(param).stride()  # a gap-free copy's
                part = self.flats[i][start : start + param.numel()]
                param.copy_(part.as_strided(param.size(), strides))


def offsets(params: list[Tensor]) -> tuple[list[int], int]:
    """Where each parameter starts in a flat copy, and the size of that, in elements."""
    starts, end = [], 0
    for param in params:
        starts.append(end)
        end += -(-param.numel() // ALIGNMENT) * ALIGNMENT
    return starts, end


@dataclass
class Bucket:
    """Tensors that share one launch, laid out for the kernels."""

    members: list[int]  # positions in the batch
    params: list[Tensor]  # dense: the parameters, or copies of those with gaps
    grads: list[Tensor]
    types: dict[str, Any]  # the kernels' dtype arguments
    in_place: bool = False  # whether the kernels walk parameters and gradients, not copies
    has_master: bool = False  # whether the parameters have master weights
    table: Table = field(init=False)
    kept: list[Tensor] = field(default_factory=list)  # copies whose addresses are in the table
    described: bool = False  # whether the table holds what does not move

    def __post_init__(self) -> None:
        self.grad_dtype = self.grads[0].dtype
        self.arithmetic = wide_dtype(self.params[0])
        self._grad_addresses: list[int] = []
        self._offsets: tuple[list[int], int] | None = None
        # where the copies of the weights are: which flat one, and the first byte, or -1
        self._places: tuple[np.ndarray, np.ndarray] | None = None
        self._copied = False  # whether all of them have been
        self._backup: tuple[Layout | None, list[int]] | None = None
        self._masters: tuple[list[int], list[int]] | None = None
        self._seed: int | None = None  # of the keys in the table

    def keep(self, x: Tensor) -> Tensor:
        """Keep a tensor alive until the launches of this pass are made."""
        self.kept.append(x)
        return x

    def reserve(self, batch: Batch, backup: FlatBackup) -> None:
        """Allocate for the copies of this bucket's weights."""
        if self._offsets is None:
            self._originals = [batch.params[k] for k in self.members]
            self._offsets = offsets(self._originals)
        if self.has_master:
            masters = (batch.masters[k] for k in self.members)
            backup.masters.update(
                (w, x) for w, x in zip(self._originals, masters, strict=True) if x is not None
            )
        else:
            backup.reserve(self._originals, *self._offsets)

    def locate(self, batch: Batch, backup: FlatBackup | None, rows: dict[Row, Any]) -> None:
        """Bring the table up to date; ``rows`` are those that only this kind of pass has."""
        if self.grads or batch.layout is None:
            grad_addresses = list(map(Tensor.data_ptr, self.grads))
        else:
            grad_addresses = batch.layout.seen
            if len(grad_addresses) != len(self.members):
                grad_addresses = [grad_addresses[k] for k in self.members]
        if grad_addresses != self._grad_addresses:
            rows[Row.GRAD] = self._grad_addresses = grad_addresses
        if self.has_master:
            self._locate_masters(batch, backup, rows)
        else:
            self._locate_copies(batch, backup, rows)
        if self.described:
            if rows:
                self.table.move(rows)
            return
        rows[Row.PARAM] = list(map(Tensor.data_ptr, self.params))
        sizes = [w.numel() for w in self.params]
        self.table.set(rows, sizes, [batch.groups[k] for k in self.members])
        self.described = True

    def _locate_masters(
        self, batch: Batch, backup: FlatBackup | None, rows: dict[Row, Any]
    ) -> None:
        perturbed = {} if backup is None else backup.masters
        masters, sources = [], []
        for k in self.members:
            master = batch.masters[k]
            assert master is not None
            masters.append(master.data_ptr())
            param = batch.params[k]
            sources.append(masters[-1] if param in perturbed else param.data_ptr())
        if self._masters != (masters, sources):
            self._masters = masters, sources
            rows[Row.MASTER], rows[Row.BACKUP] = masters, sources

    def _locate_copies(self, batch: Batch, backup: FlatBackup | None, rows: dict[Row, Any]) -> None:
        layout = None if backup is None else backup.layout
        flats = [] if backup is None else list(map(Tensor.data_ptr, backup.flats))
        if self._backup is None or self._backup[0] is not layout or layout is None:
            self._find(batch, backup)
        if self._backup != (layout, flats):
            rows[Row.BACKUP] = self._backup_row(flats)
            self._backup = layout, flats

    def _find(self, batch: Batch, backup: FlatBackup | None) -> None:
        places = {} if backup is None else backup.places
        pairs = [places.get(batch.params[k], (0, -1)) for k in self.members]
        flat, start = np.array(pairs, np.int64).reshape(-1, 2).T
        self._copied = bool((start >= 0).all())
        size = self.params[0].element_size()
        self._places = flat, np.where(start < 0, -1, start * size)

    def _backup_row(self, flats: list[int]) -> Any:
        """Addresses of the unperturbed weights: of the copies, or the parameters' own."""
        assert self._places is not None
        flat, start = self._places
        copies = np.array(flats or [0], np.int64)[flat] + start
        if self._copied:
            return copies
        return np.where(start < 0, list(map(Tensor.data_ptr, self.params)), copies)


def state_rows(bucket: Bucket, batch: Batch, step: Step, launch: Launch) -> dict[Row, list[int]]:
    """Addresses of the base's state, and what else the update kernel needs per tensor."""
    if step.base is None:
        return {}
    rows: dict[Row, list[int]] = defaultdict(list)
    for k, w in zip(bucket.members, bucket.params, strict=True):
        state = batch.states[k]
        for row, name in zip(STATES, step.base.states(step.groups[batch.groups[k]]), strict=False):
            state[name] = like_layout(state[name], w)
            rows[row].append(state[name].data_ptr())
        if step.base.counts_steps:
            rows[Row.STEP].append(state["step"].data_ptr())
            rows[Row.CHUNKS].append(max(1, -(-w.numel() // launch.chunk)))
        rows[Row.FRESH].append(int(batch.fresh[k]))
    return rows


def key_rows(bucket: Bucket, batch: Batch, step: Step) -> dict[Row, list[int]]:
    """What the tensors' random bits depend on, where they are rounded stochastically."""
    if step.seed is None or step.seed == bucket._seed:
        return {}
    bucket._seed = step.seed
    return {Row.KEY: [tensor_key(step.seed, batch.places[k]) for k in bucket.members]}


def ascent_states(step: Step) -> int:
    """Number of the ascent rule's state tensors."""
    return max((len(step.ascent.states(group)) for group in step.groups), default=0)


def ascent_rows(bucket: Bucket, batch: Batch, step: Step) -> dict[Row, list[int]]:
    """Addresses of the ascent rule's state, old and new; 0 for parameters without."""
    rows: dict[Row, list[int]] = {}
    for tensors, names in ((batch.ascent, OLD_ASCENT), (batch.next, NEW_ASCENT)):
        if not tensors:  # LETS needs no old state
            continue
        for row, j in zip(names, range(ascent_states(step)), strict=False):
            rows[row] = []
            for k, w in zip(bucket.members, bucket.params, strict=True):
                held = list(tensors[k].values())
                if held:
                    held[j] = bucket.keep(like_layout(held[j], w))
                rows[row].append(held[j].data_ptr() if held else 0)
    return rows


def grad_rows(bucket: Bucket, grads: dict[Row, list[Tensor | None]]) -> dict[Row, list[int]]:
    """Addresses of other passes' gradients, as the kernels walk them; 0 where there is none."""
    rows: dict[Row, list[int]] = {}
    for row, tensors in grads.items():
        rows[row] = []
        for k, w in zip(bucket.members, bucket.params, strict=True):
            x = tensors[k]
            if x is not None:
                x = bucket.keep(like_layout(x, w).to(bucket.grad_dtype))
            rows[row].append(0 if x is None else x.data_ptr())
    return rows


def release(buckets: list[Bucket]) -> None:
    """Let go of what the launches of a pass needed."""
    for bucket in buckets:
        bucket.kept = []


def write_back(bucket: Bucket, batch: Batch) -> None:
    """Copy to the parameters that the kernels could not walk in place."""
    if bucket.in_place:
        return
    for k, w in zip(bucket.members, bucket.params, strict=True):
        if w is not batch.params[k]:
            batch.params[k].copy_(w)
