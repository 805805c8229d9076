"""Buckets: tensors that share one launch, and where in memory everything about them is."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from fastsam.kernels.layout import CHUNK, Row
from fastsam.kernels.table import Table

from ..rules import Batch, Step
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

    def __init__(self) -> None:
        self.places: dict[Tensor, tuple[Tensor, int]] = {}  # flat tensor, first element
        self.written: list[Tensor] = []  # parameters whose copy has been made

    def reserve(self, params: list[Tensor]) -> None:
        """Allocate for one bucket."""
        starts, end = [], 0
        for param in params:
            starts.append(end)
            end += -(-param.numel() // ALIGNMENT) * ALIGNMENT
        flat = torch.empty(end, dtype=params[0].dtype, device=params[0].device)
        for param, start in zip(params, starts, strict=True):
            self.places[param] = flat, start

    def address(self, param: Tensor) -> int | None:
        place = self.places.get(param)
        if place is None:
            return None
        flat, start = place
        return flat.data_ptr() + start * flat.element_size()

    def restore(self, params: Iterable[Tensor] | None = None) -> None:
        for param in self.written if params is None else params:
            flat, start = self.places[param]
            strides = torch.empty_like(param).stride()  # a gap-free copy's
            param.copy_(flat[start : start + param.numel()].as_strided(param.size(), strides))


@dataclass
class Bucket:
    """Tensors that share one launch, laid out for the kernels."""

    members: list[int]  # positions in the batch
    params: list[Tensor]  # dense: the parameters, or copies of those with gaps
    grads: list[Tensor]
    types: dict[str, Any]  # the kernels' dtype arguments
    table: Table
    kept: list[Tensor] = field(default_factory=list)  # copies whose addresses are in the table

    def keep(self, x: Tensor) -> Tensor:
        """Keep a tensor alive until the launches of this pass are made."""
        self.kept.append(x)
        return x


def backup_rows(bucket: Bucket, batch: Batch, backup: FlatBackup | None) -> dict[Row, list[int]]:
    """Where the unperturbed weights are."""
    originals = [batch.params[k] for k in bucket.members]
    return {
        Row.BACKUP: [
            (backup and backup.address(p)) or w.data_ptr()
            for p, w in zip(originals, bucket.params, strict=True)
        ]
    }


def state_rows(bucket: Bucket, batch: Batch, step: Step) -> dict[Row, list[int]]:
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
            rows[Row.CHUNKS].append(max(1, -(-w.numel() // CHUNK)))
        rows[Row.FRESH].append(int(batch.fresh[k]))
    return rows


def ascent_states(batch: Batch) -> int:
    """Number of the ascent rule's state tensors."""
    return max(map(len, batch.next), default=0)


def ascent_rows(bucket: Bucket, batch: Batch) -> dict[Row, list[int]]:
    """Addresses of the ascent rule's state, old and new; 0 for parameters without."""
    rows: dict[Row, list[int]] = {}
    for tensors, names in ((batch.ascent, OLD_ASCENT), (batch.next, NEW_ASCENT)):
        if not tensors:  # LETS needs no old state
            continue
        for row, j in zip(names, range(ascent_states(batch)), strict=False):
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
        for k, w, grad in zip(bucket.members, bucket.params, bucket.grads, strict=True):
            x = tensors[k]
            if x is not None:
                x = bucket.keep(like_layout(x, w).to(grad.dtype))
            rows[row].append(0 if x is None else x.data_ptr())
    return rows


def write_back(bucket: Bucket, batch: Batch) -> None:
    """Copy to the parameters that the kernels could not walk in place."""
    for k, w in zip(bucket.members, bucket.params, strict=True):
        if w is not batch.params[k]:
            batch.params[k].copy_(w)
