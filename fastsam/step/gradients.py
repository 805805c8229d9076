"""Gradients of one pass that are kept while the next pass makes others."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import repeat
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from .batch import Batch
from .capture import is_captured
from .memory import ALONE, UNSHARED_GRADIENT, Owned, holders, uses
from .sharding import is_sharded


class Room:
    """Memory for copies of some gradients, kept while the same are copied in every step."""

    def __init__(self) -> None:
        self._places: list[int] = []
        self._owned: Owned | None = None

    def copies(self, grads: Sequence[Tensor], places: list[int]) -> list[Tensor]:
        """Copies of those at ``places``; nobody holds the last ones any more, or they stay."""
        owned = self._owned
        if owned is None or places != self._places or not owned.is_alone():
            owned = self._owned = Owned([torch.empty_like(grads[k]) for k in places])
            self._places = places
        _copy(owned.tensors, [grads[k] for k in places])
        return owned.tensors


def _copy(targets: list[Tensor], sources: list[Tensor]) -> None:
    if targets:  # torch refuses empty lists on a GPU
        torch._foreach_copy_(targets, sources)


def take_over(
    batch: Batch, cleared: bool, ours: Iterable[Tensor] = (), keeps_room: bool = False
) -> list[Tensor]:
    """A pass's gradients, such that no later backward pass writes to them.

    They are copied, unless nobody else can write to them. That is so where they are about to be
    set to None, and neither they nor their memory are known elsewhere: DDP's, for one, may be views
    of buckets that the next backward fills again, and a closure may give out the same tensors in
    every call.

    Args:
        batch: Of the pass.
        cleared: Whether the caller is about to set them to None.
        ours: Those of which the caller has another list.
        keeps_room: Keep the memory of copies with the batch's layout, for the next step.
    """
    grads, layout = batch.grads, batch.layout
    places = list(range(len(grads)))
    if cleared:
        places = [k for k, alone in enumerate(_are_alone(batch, ours)) if not alone]
    room = Room()
    if keeps_room and layout is not None:
        if places and not is_captured(batch):  # a graph's memory has to be its own
            room = layout.room = layout.room or room
        else:
            layout.room = None
    kept = list(grads)
    for k, copy in zip(places, room.copies(grads, places), strict=True):
        kept[k] = copy
    return kept


def _are_alone(batch: Batch, ours: Iterable[Tensor]) -> list[bool]:
    """Of each gradient whether nobody but its parameter, and those that are named, knows it."""
    grads = batch.grads
    counts = holders(grads)  # before there is another list
    ids = set(map(id, ours))
    storages = list(map(Tensor.untyped_storage, grads))
    used = uses(storages)
    if (
        max(counts, default=0) <= UNSHARED_GRADIENT and set(used) <= {ALONE}
        and list(map(torch.UntypedStorage.nbytes, storages)) == [grad.nbytes for grad in grads]
        and not any(map(Tensor._is_view, grads))
    ):  # fmt: skip
        return [True] * len(grads)  # all are, as a rule: in half the time
    # a shard is its DTensor's as well
    shards = repeat(False) if batch.shardings is None else map(is_sharded, batch.owners)
    return [
        (is_shard or (count <= UNSHARED_GRADIENT + (id(grad) in ids) and use == ALONE))
        and not grad._is_view()
        and storage.nbytes() == grad.numel() * grad.element_size()
        for grad, count, storage, use, is_shard in zip(
            grads, counts, storages, used, shards, strict=False
        )
    ]


def set_aside(batch: Batch, cleared: bool, ours: Iterable[Tensor]) -> dict[Tensor, Tensor]:
    """The present gradients by parameter, such that no backward pass writes to them.

    The arguments are those of :func:`take_over`.
    """
    if not cleared:
        return {p: p.grad.clone() for p in batch.owners if p.grad is not None}
    kept = zip(batch.owners, take_over(batch, cleared=True, ours=ours), strict=True)
    return {p: p.grad if is_sharded(p) and p.grad is not None else x for p, x in kept}


def put_back(grads: Mapping[Tensor, Tensor]) -> None:
    """Leave gradients in ``.grad``: in the tensors that are there, or else themselves."""
    for param, grad in grads.items():
        if param.grad is None:
            param.grad = grad
        else:  # somebody keeps it, as a part of a larger buffer perhaps
            param.grad.copy_(grad)


def zero(groups: Iterable[Mapping[str, Any]], set_to_none: bool) -> None:
    """What ``torch.optim.Optimizer.zero_grad`` does, in as few operators as for fused optimizers.

    The profiler does not see it as a range of its own, which would cost more than the rest.
    """
    grads = []
    for group in groups:
        for param in group["params"]:
            if param.grad is None:
                continue
            if set_to_none:
                param.grad = None
            else:
                grads.append(param.grad)
    together: dict[Any, list[Tensor]] = defaultdict(list)
    for grad in grads:
        if grad.grad_fn is not None:
            grad.detach_()
        else:
            grad.requires_grad_(False)
        if type(grad) is Tensor and grad.layout is torch.strided:
            together[grad.device, grad.dtype].append(grad)
        else:  # sparse, or a subclass's business
            grad.zero_()
    for alike in together.values():
        torch._foreach_zero_(alike)


def zeroes_as_torch(optimizer: Optimizer) -> bool:
    """Whether ``optimizer.zero_grad`` is torch's own, and sets to None when it is told to."""
    return type(optimizer).zero_grad is Optimizer.zero_grad and "zero_grad" not in vars(optimizer)
