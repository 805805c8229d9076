"""What one step leaves in the memory of its first gradients, for the steps that follow."""

from functools import partial
from itertools import chain
from operator import attrgetter
from weakref import WeakValueDictionary

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
    since. torch does not count the writes of kernels, nor those of its own fused optimizers: call
    :meth:`forget` before something of that kind writes to such tensors. Other optimizers may hold
    the same tensors; :func:`forget_elsewhere` is for their norms.
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
        if id(self) not in _NORMS:
            _NORMS[id(self)] = self

    def is_of(self, tensors: list[Tensor | None], scalars: Tensor) -> bool:
        """Whether it is that of these tensors, as they are now."""
        if self._marks is None or scalars is not self._scalars:
            return False
        return identical(tensors, self._tensors) and _marks_of(tensors) == self._marks

    def is_in(self, places: set[int]) -> bool:
        """Whether some of its tensors are at one of these addresses."""
        return self._marks is not None and not places.isdisjoint(
            self._marks[: len(self._marks) // 2]
        )


#: All that have been known in this process, by ``id``.
_NORMS: WeakValueDictionary[int, KnownNorm] = WeakValueDictionary()


def forget_elsewhere(batch: Batch, *own: KnownNorm) -> None:
    """Let norms of other optimizers be unknown, where an update is about to write to their tensors.

    State is shared by what ``copy.copy`` makes, and where a state dict is loaded that was not
    copied.

    Args:
        batch: Of the update.
        own: The norms of the optimizer that updates, which has seen to them.
    """
    norms = (reference() for reference in _NORMS.valuerefs())
    others = [x for x in norms if x is not None and x.is_some and x not in own]
    if others:
        held = chain(*map(dict.values, batch.states or ()), batch.firsts or (), batch.kept or ())
        places = {x.data_ptr() for x in held if isinstance(x, Tensor) and x.numel()}
        for norm in others:
            if norm.is_in(places):
                norm.forget()


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
