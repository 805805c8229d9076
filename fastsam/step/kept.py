"""What one step leaves in the memory of its first gradients, for the steps that follow."""

from functools import partial

from torch import Tensor
from torch.distributed.tensor import DTensor

from fastsam.kernels.layout import Scalar

from .base_state import parts_of_state
from .batch import Batch
from .sharding import is_sharded
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
