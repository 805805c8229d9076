"""What one step leaves in the memory of its first gradients, for the steps that follow."""

from functools import partial
from operator import attrgetter

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from fastsam.kernels.layout import Scalar

from .base_state import parts_of_state
from .batch import Batch, identical
from .sharding import is_sharded, local
from .spec import StepSpec
from .state import States

_writes_to = attrgetter("_version")


def keep(batch: Batch, spec: StepSpec, states: States) -> None:
    """Let what the descent has left in the place of first gradients be the optimizer's state.

    Nothing here may fail: weights have changed.
    """
    for param, x in zip(batch.owners, batch.firsts or (), strict=False):
        if x is not None:
            states[param][spec.ascent.keeps] = whole(x, param) if is_sharded(param) else x


class KnownNorm:
    """Of which tensors a norm on the device is, and whether it is still theirs.

    It is where they are the same ones, where they were, and torch has counted no write to them
    since. torch does not count the writes of kernels: call :meth:`forget` before a kernel that
    writes to such tensors is launched.
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """It is no longer theirs, or about to be not."""
        self._tensors: list[Tensor | None] = []
        self._marks: list[int] | None = None
        self._scalars: Tensor | None = None

    @property
    def is_some(self) -> bool:
        """Whether it is that of some tensors, as they were."""
        return self._marks is not None

    def remember(self, tensors: list[Tensor | None], scalars: Tensor) -> None:
        """It is that of these tensors, and among these scalars."""
        self._tensors, self._marks, self._scalars = tensors, _marks_of(tensors), scalars

    def is_of(self, tensors: list[Tensor | None], scalars: Tensor) -> bool:
        """Whether it is that of these tensors, as they are now."""
        if self._marks is None or scalars is not self._scalars:
            return False
        return identical(tensors, self._tensors) and _marks_of(tensors) == self._marks


def _marks_of(tensors: list[Tensor | None]) -> list[int] | None:
    """Where each is, and how often it has been written to; None where torch does not count."""
    present = [x for x in tensors if x is not None]
    try:
        return [*map(Tensor.data_ptr, present), *map(_writes_to, present)]
    except RuntimeError:  # as of inference tensors
        return None


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
