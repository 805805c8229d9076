"""Scratch memory for perturbed weights, so that the weights themselves need no copy.

Between the passes a parameter points at the scratch memory, where ``w + e`` was written, and ``w``
stays where it is. That saves two copies, 16 of 52 bytes per parameter with SAM and SGD, and is safe
only where nothing else sees a parameter's memory: it has to own all of it, alone. Everything else
is copied and perturbed in place. The memory is kept for the next step: fresh pages would cost as
much as the copies.
"""

from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastsam.step.batch import Batch, identical
from fastsam.step.memory import (
    ALONE,
    alike,
    is_alone,
    owns_memory,
    references,
    still_owns_memory,
)
from fastsam.step.rule import Group
from fastsam.step.sharding import local

from ..weights import ListBackup
from .blocks import BLOCK

#: Elements below which pointing a parameter elsewhere takes longer than copying it.
WORTHWHILE = 1 << 14


def known_of(batch: Batch) -> dict[Any, Any]:
    """What has been worked out for the batch's layout, while its parameters keep their shapes.

    A layout does not know of shapes: nobody but operators on tensors minds them.
    """
    if batch.layout is None:
        return {}
    shapes = [param.shape for param in batch.params]
    known = batch.layout.operators
    if known.get("shapes") != shapes:
        known = batch.layout.operators = {"shapes": shapes}
    return known


class Room(NamedTuple):
    """Memory for intermediate results: all of it, and by tensor."""

    whole: Tensor
    parts: list[Tensor]

    def gather(self, tensors: list[Tensor]) -> Tensor:
        """What an operator reads that writes to ``whole``: the one tensor, or copies of all."""
        if len(tensors) == 1:
            return tensors[0]
        torch._foreach_copy_(self.parts, tensors)
        return self.whole


class Taken:
    """What the last ascent took, by part of the parameters, for the next one like it.

    Attributes:
        known: What is known of its batch (:func:`known_of`); the next must have the same object.
        targets: Parameters, and the scratch memory of each, or itself where it was copied.
        copies: Parameters that were copied, and the copies.
    """

    def __init__(self, known: dict[Any, Any]) -> None:
        self.known = known
        self.targets: dict[int, tuple[list[Tensor], list[Tensor]]] = {}
        self.copies: dict[int, tuple[list[Tensor], list[Tensor]]] = {}


class Memory:
    """What is kept from step to step: scratch memory, and a buffer for intermediate results."""

    def __init__(self) -> None:
        self.scratch: dict[Tensor, Tensor] = {}
        self.last = Taken({})
        self._buffers: dict[torch.dtype, Tensor] = {}

    def keep_to(self, groups: Sequence[Group]) -> None:
        """Have scratch memory of the optimizer's parameters alone, which may be fewer than before.

        Weak references would do that as well, but torch cannot convert a module with
        ``torch.__future__.set_swap_module_params_on_conversion`` while there are any.
        """
        if self.scratch:
            present = set(map(local, chain.from_iterable(group["params"] for group in groups)))
            self.scratch = {p: x for p, x in self.scratch.items() if p in present}

    def room(self, like: Sequence[Tensor]) -> Room:
        """Room for tensors in the layouts of ``like``: dense, of one dtype, of ``BLOCK`` elements
        at most. The next call gives out the same memory.

        An allocation of that size would come from the operating system, page by page. This comes
        from the middle of what is kept: with two threads an operator on all of it has each where
        it was with any other size, in its own cache.
        """
        dtype = like[0].dtype
        if dtype not in self._buffers:
            self._buffers[dtype] = torch.empty(BLOCK, dtype=dtype, device="cpu")
        buffer, sizes = self._buffers[dtype], [x.numel() for x in like]
        first = start = (BLOCK - sum(sizes)) // 2 & -64
        parts = []
        for x, size in zip(like, sizes, strict=True):
            parts.append(buffer.as_strided(x.shape, x.stride(), start))
            start += size
        return Room(buffer[first:start] if len(parts) > 1 else parts[0], parts)


class ScratchBackup(ListBackup):
    """The unperturbed weights: of moved parameters where they always were, of others a copy.

    Args:
        memory: What is kept from step to step.
        known: What is known of the batch.
        groups: The optimizer's.
    """

    def __init__(self, memory: Memory, known: dict[Any, Any], groups: Sequence[Group]) -> None:
        if memory.last.known is not known:
            memory.last = Taken(known)
            memory.keep_to(groups)
        self.scratch = memory.scratch
        self._last = memory.last
        self._next_part = 0
        self.moved: list[tuple[Tensor, Tensor, Tensor]] = []  # parameter, scratch, home
        self.copied: list[tuple[list[Tensor], list[Tensor]]] = []
        self._copies: dict[Tensor, Tensor] = {}
        self._spent = False

    @property
    def copies(self) -> dict[Tensor, Tensor]:  # type: ignore[override]
        """The unperturbed weights by parameter."""
        if not self._copies:
            self._copies = {param: home for param, _, home in self.moved}
            for params, copies in self.copied:
                self._copies.update(zip(params, copies, strict=True))
        return self._copies

    def keep(self, batch: Batch) -> None:
        """See ``ListBackup``."""
        new = [param for param in batch.params if param not in self.copies]
        if new:
            self.copied.append((new, [param.detach().clone() for param in new]))
            self._copies = {}

    def take(self, params: list[Tensor], in_place: bool, least: int = WORTHWHILE) -> list[Tensor]:
        """Keep the weights of one part; where to write the perturbed ones.

        Args:
            params: The parameters.
            in_place: Copy them all, because the weights will be needed after the update.
            least: Elements from which on a parameter is moved.

        Returns:
            Scratch memory, to which :meth:`move` will point a parameter; or the parameter itself.
        """
        part = self._next_part
        self._next_part += 1
        last, before = self._last.targets.get(part, ([], []))
        if not identical(last, params):
            before = params  # as if all had been copied: nothing is taken for granted
        targets, copied = [], []
        for param, target in zip(params, before, strict=True):
            if in_place or param.numel() < least:
                target = param
            elif target is param or not (still_owns_memory(param) and is_alone(target)):
                target = self._scratch_of(param) if owns_memory(param) else param
            targets.append(target)
            if target is param:
                copied.append(param)
        self._last.targets[part] = params, targets
        if copied:
            last, copies = self._last.copies.get(part, ([], []))
            if not identical(last, copied):
                copies = [torch.empty_like(param) for param in copied]
                self._last.copies[part] = copied, copies
            torch._foreach_copy_(copies, copied)
            self.copied.append((copied, copies))
        return targets

    def _scratch_of(self, param: Tensor) -> Tensor:
        """The parameter's scratch memory from earlier steps if nobody sees it, else new."""
        target = self.scratch.get(param)
        if target is None or not (alike(target, param) and is_alone(target)):
            target = self.scratch[param] = torch.empty_like(param, requires_grad=False)
        return target

    def borrow(self, masters: dict[Tensor, Tensor]) -> None:
        """Restore these parameters from their master weights, which stay as they are."""
        if masters:
            self.copied.append((list(masters), list(masters.values())))

    def move(self, params: list[Tensor], targets: list[Tensor]) -> None:
        """Point the parameters at their scratch memory, which holds the perturbed weights."""
        moved = []
        for param, target in zip(params, targets, strict=True):
            if target is not param:
                self.moved.append((param, target, param.data))
                param.data = target
                moved.append(param)
        _count_as_changed(moved)

    def restore(self) -> None:
        if self._spent:
            return
        for params, copies in self.copied:
            torch._foreach_copy_(params, copies)
        for param, target, home in self.moved:
            if param.data_ptr() != target.data_ptr():  # pointed elsewhere in the meantime
                param.copy_(home)
            elif references(target) == ALONE + 1:
                param.data = home
            else:  # somebody has taken a view, which has to go on following the parameter
                target.copy_(home)
                self.scratch[param] = home
                self._last.targets.clear()  # where the parameter's own memory would be held on to
        _count_as_changed([param for param, *_ in self.moved])
        # a fused update that fails later leaves all weights as far as it got
        self._spent = bool(self.moved)


def _count_as_changed(params: list[Tensor]) -> None:
    """Let autograd know, as if they had been written to."""
    if params:
        torch.autograd.graph.increment_version(params)
