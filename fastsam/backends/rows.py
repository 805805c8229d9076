"""Rows of the pointer table that only some kinds of pass have, by their addresses."""

from collections import defaultdict

from torch import Tensor

from fastsam.kernels.layout import Launch, Row

from ..rules import Batch, Step
from .buckets import Bucket, like_layout
from .rounding import tensor_key

STATES = (Row.STATE0, Row.STATE1, Row.STATE2)
OLD_ASCENT = (Row.ASCENT0, Row.ASCENT1)
NEW_ASCENT = (Row.NEXT0, Row.NEXT1)


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
    if step.seed is None or step.seed == bucket.seed:
        return {}
    bucket.seed = step.seed
    return {Row.KEY: [tensor_key(step.seed, batch.places[k]) for k in bucket.members]}


def ascent_states(step: Step) -> int:
    """Number of the ascent rule's state tensors."""
    return len(step.ascent.states(step.groups[0]))


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
