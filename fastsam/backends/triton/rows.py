"""Rows of the pointer table that only some kinds of pass have, by their addresses."""

from collections import defaultdict
from typing import Any

from torch import Tensor

from fastsam.kernels.layout import Launch, Row
from fastsam.step.base_state import BaseStates, Computed
from fastsam.step.batch import Batch
from fastsam.step.bits import tensor_key
from fastsam.step.spec import StepSpec
from fastsam.step.state import AscentStates

from .buckets import Bucket, like_layout, of

STATES = (Row.STATE0, Row.STATE1, Row.STATE2)
OLD_ASCENT = (Row.ASCENT0, Row.ASCENT1)
NEW_ASCENT = (Row.NEXT0, Row.NEXT1)


def state_rows(
    bucket: Bucket, batch: Batch, spec: StepSpec, launch: Launch
) -> dict[Row, list[int]]:
    """Addresses of the base's state, and what else the update kernel needs per tensor."""
    base = bucket.base
    if base is None:
        return {}
    assert batch.states is not None
    rows: dict[Row, list[int]] = defaultdict(list)
    for k, w in zip(bucket.members, bucket.params, strict=True):
        state = batch.states[k]
        for row, name in zip(STATES, base.states(spec.groups[batch.groups[k]]), strict=False):
            state[name] = like_layout(state[name], w)
            rows[row].append(state[name].data_ptr())
        if base.counts_steps:
            rows[Row.STEP].append(state["step"].data_ptr())
            rows[Row.CHUNKS].append(max(1, -(-w.numel() // launch.chunk)))
        rows[Row.FRESH].append(0 if batch.fresh is None else int(batch.fresh[k]))
    return rows


def key_rows(bucket: Bucket, batch: Batch, spec: StepSpec) -> dict[Row, list[int]]:
    """What the tensors' random bits depend on, where some are needed."""
    if spec.seed is None or spec.seed == bucket.seed:
        return {}
    bucket.seed = spec.seed
    assert batch.places is not None
    return {Row.KEY: [tensor_key(spec.seed, batch.places[k]) for k in bucket.members]}


def norm_rows(bucket: Bucket, batch: Batch) -> dict[Row, list[int]]:
    """Where the squared norm of each tensor's segment is."""
    assert batch.squares is not None and batch.segments is not None
    start, size = batch.squares.data_ptr(), batch.squares.element_size()
    return {Row.NORM: [start + size * batch.segments[k] for k in bucket.members]}


def ascent_states(spec: StepSpec) -> int:
    """Number of the ascent rule's state tensors."""
    return len(spec.ascent.states(spec.groups[0]))


def ascent_rows(bucket: Bucket, batch: Batch, spec: StepSpec) -> dict[Row, list[int]]:
    """Addresses of the ascent rule's state, old and new; 0 for parameters without."""
    rows: dict[Row, list[int]] = {}
    found: AscentStates | None = batch.held
    if found is not None and found.in_order and bucket.in_place and batch.ascent is not None:
        count = ascent_states(spec)
        for j, (old, new) in enumerate(zip(OLD_ASCENT, NEW_ASCENT, strict=True)):
            if j < count:
                rows[old], rows[new] = found.addresses(count, j, bucket.members)
        return rows
    for tensors, names in ((batch.ascent, OLD_ASCENT), (batch.next, NEW_ASCENT)):
        if tensors is None:  # LETS needs no old state
            continue
        for row, j in zip(names, range(ascent_states(spec)), strict=False):
            rows[row] = []
            for k, w in zip(bucket.members, bucket.params, strict=True):
                held = list((tensors[k] or {}).values())
                if held:
                    held[j] = bucket.keep(like_layout(held[j], w))
                rows[row].append(held[j].data_ptr() if held else 0)
    return rows


def read_rows(bucket: Bucket, batch: Batch) -> dict[Row, list[int]]:
    """Addresses of the base's state that the ascent rule reads; 0 for parameters without."""
    assert batch.read is not None and isinstance(batch.prepared, (BaseStates, Computed))
    if bucket.described and batch.prepared.in_order:
        return {}
    addresses = []
    for k, w in zip(bucket.members, bucket.params, strict=True):
        x = batch.read[k]
        addresses.append(0 if x is None else bucket.keep(like_layout(x, w)).data_ptr())
    return {Row.STATE0: addresses}


def grad_rows(bucket: Bucket, grads: dict[Row, list[Tensor | None] | None]) -> dict[Row, list[int]]:
    """Addresses of other passes' gradients, as the kernels walk them; 0 where there is none."""
    rows: dict[Row, list[int]] = {}
    for row, tensors in grads.items():
        if tensors is not None and bucket.in_place:
            found = _where_alike(bucket, of(tensors, bucket.members))
            if found is not None:
                rows[row] = found
                continue
        rows[row] = []
        for k, w in zip(bucket.members, bucket.params, strict=True):
            x = None if tensors is None else tensors[k]
            if x is not None:
                x = bucket.keep(like_layout(x, w).to(bucket.grad_dtype))
            rows[row].append(0 if x is None else x.data_ptr())
    return rows


def _where_alike(bucket: Bucket, tensors: list[Any]) -> list[int] | None:
    """Addresses of tensors that all lie as the parameters do; None where one has to be copied."""
    try:
        alike = (
            all(map(Tensor.is_contiguous, tensors))
            if bucket.is_contiguous
            else (list(map(Tensor.stride, tensors)) == bucket.strides)
        )
    except TypeError:  # one is missing
        return None
    if not alike or [x.dtype for x in tensors] != [bucket.grad_dtype] * len(tensors):
        return None
    return list(map(Tensor.data_ptr, tensors))
