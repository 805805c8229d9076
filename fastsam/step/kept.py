"""What one step leaves in the memory of its first gradients, for the steps that follow."""

from functools import partial

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from fastsam.kernels.layout import Scalar

from .base_state import parts_of_state
from .batch import Batch
from .sharding import is_sharded, local
from .spec import StepSpec
from .state import States


def keep(batch: Batch, spec: StepSpec, states: States) -> None:
    """Let what the descent has left in the place of first gradients be the optimizer's state.

    Nothing here may fail: weights have changed.
    """
    for param, x in zip(batch.owners, batch.firsts or (), strict=False):
        if x is not None:
            states[param][spec.ascent.keeps] = whole(x, param) if is_sharded(param) else x


def whole(x: Tensor, like: Tensor) -> Tensor:
    """A shard as part of a tensor that is sharded as the parameter is."""
    assert isinstance(like, DTensor)
    return DTensor.from_local(
        x, like.device_mesh, like.placements, run_check=False, shape=like.shape,
        stride=like.stride(),
    )  # fmt: skip


def give_kept(batch: Batch, spec: StepSpec, states: States, scalars: Tensor) -> None:
    """Let a step find what an earlier one has left, where it is used or may have to stay.

    Where it is used it stands in the place of the first gradients, and carries no loss scale.

    Raises:
        RuntimeError: If something has not the parameter's shape, or is sharded otherwise.
    """
    find = partial(parts_of_state, spec.ascent.keeps, states, batch.owners, batch.params)
    if spec.keeps and spec.skip_nonfinite:
        batch.kept = find()
    elif spec.descent is not None and spec.descent.reuses:
        batch.firsts = find()
        if spec.is_scaled:
            scalars[Scalar.FIRST_INVERSE_SCALE].fill_(1)


def room_for_last(batch: Batch, spec: StepSpec, states: States) -> list[Tensor]:
    """Memory for this step's gradients, as state: that of the last step's, where there is some."""
    found = parts_of_state(spec.ascent.keeps, states, batch.owners, batch.params)
    return [
        x if x is not None and x.dtype == grad.dtype
        else torch.zeros_like(param, dtype=grad.dtype, requires_grad=False)
        for x, grad, param in zip(found, batch.grads, batch.params, strict=True)
    ]  # fmt: skip


def keep_last(
    batch: Batch, room: list[Tensor], spec: StepSpec, scalars: Tensor, states: States
) -> None:
    """Keep this step's gradients, unless it is rejected. Nothing here may fail."""
    for param, x, grad in zip(batch.owners, room, batch.grads, strict=True):
        if spec.skip_nonfinite:
            accepted = (scalars[Scalar.ACCEPTED] != 0).to(x.device, non_blocking=True)
            torch.where(accepted, grad.to(x.dtype), x, out=x)
        else:
            x.copy_(grad)
        held = states[param].get(spec.ascent.keeps)
        if held is None or local(held) is not x:
            states[param][spec.ascent.keeps] = whole(x, param) if is_sharded(param) else x
