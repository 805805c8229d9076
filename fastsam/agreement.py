"""Compares the settings of ranks that train one model: on demand, and when something changes."""

from collections.abc import Callable
from itertools import chain
from operator import attrgetter, is_
from typing import Any

import torch.distributed as dist
from torch.optim.optimizer import Optimizer

from .meetings import Meeting, StoreError
from .rank_settings import (
    ATTRIBUTES,
    Settings,
    described,
    differences,
    is_other,
    keys_of,
    settings_of,
)
from .replicas import is_distributed
from .step.guards import warn_user


def compare_ranks(optimizer: Optimizer, group: Any = None) -> None:
    """Compare those settings of an optimizer on all ranks that its update depends on.

    For training loops that connect the ranks themselves. With ``DistributedDataParallel``,
    ``fully_shard`` and other ``DTensor`` parameters the comparison is automatic, before the first
    step and when a setting changes; it does not see changes of tensors on a device, so call this
    after such a change. It is a collective: every rank of the group has to call it. It may read
    from the device.

    Args:
        optimizer: One of fastsam's.
        group: The process group; None is the default one.

    Raises:
        TypeError: If ``optimizer`` is not one of fastsam's.
        RuntimeError: On every rank, if settings differ; the message has each value and its ranks.

    Example:
        >>> optimizer = fastsam.SAM(model.parameters(), torch.optim.SGD, lr=0.1)
        >>> fastsam.compare_ranks(optimizer)  # raises where another rank has another lr
    """
    mine: Settings = {}
    outer = optimizer
    while not hasattr(optimizer, "kept"):  # LETS, or a framework's
        if not hasattr(optimizer, "optimizer"):
            raise TypeError(f"optimizer must be one of fastsam's, got {type(outer).__name__}")
        for name in ("interval", "hessian"):
            if hasattr(optimizer, name):
                mine[name] = described(getattr(optimizer, name))
        optimizer = optimizer.optimizer
    if not is_distributed():
        return
    mine |= settings_of(optimizer, reads_device=True)
    ranks = dist.get_process_group_ranks(group or dist.group.WORLD)
    everyone: list[Any] = [None] * len(ranks)
    dist.all_gather_object(everyone, mine, group=group)
    if found := differences(dict(zip(ranks, everyone, strict=True))):
        raise RuntimeError(found)


class Agreement:
    """Compares an optimizer's ranks before the first step, and when a setting changes.

    Each of an attribute's changes is compared. Of a number in the groups, which a schedule may set
    in every step, so are the first eight changes and then the 16th, the 32nd and so on. Ranks that
    agree come to the same comparisons.

    Attributes:
        needed: Whether :meth:`check` has anything to do; False for good where there is one rank,
            or nothing says that others train the same model.
    """

    def __init__(self) -> None:
        self.needed = True
        self._meeting: Meeting | None = None
        self._attributes: tuple[Any, ...] = ()
        self._read: Callable[[Any], tuple[Any, ...]] = tuple
        self._groups: list[Any] = []
        self._names: list[str | None] = []  # of the groups' values; None of those that do not count
        self._values: list[Any] = []
        self._count = 0  # of the optimizer's steps
        self._changes = 0  # in the groups
        self._due = True  # to be compared again
        self._agreed: Settings = {}

    def check(self, optimizer: Any) -> None:
        """Before a step.

        Raises:
            RuntimeError: If ranks disagree, on each of them; or where this one has changed a
                setting and others have not come, after the process group's timeout.
        """
        if self._meeting is None:
            self._meeting = Meeting.of(optimizer)
            self.needed = self._meeting is not None
        if self._meeting is None or self._meeting.is_joining:
            return
        due = self._has_changed(optimizer) or self._due
        try:
            found = self._meeting.verdicts()
            if due and not found:
                self._due = True  # until it is settled, if something comes between
                mine = settings_of(optimizer)
                found = self._meeting.compare(mine, self._agreed)
                if not found:
                    self._due, self._agreed = False, mine
        except StoreError as error:
            self.needed = False
            warn_user(f"ranks' settings are not compared any more: the store failed with {error}")
            return
        if found:
            self._due = True
            raise RuntimeError(found)

    def note(self, optimizer: Any, error: BaseException) -> None:
        """Add to an error of the closure's that other ranks have come with other settings."""
        if not (self.needed and self._meeting is not None and isinstance(error, Exception)):
            return
        try:
            found = self._meeting.waiting(settings_of(optimizer))
        except Exception:  # it is about to be raised, with or without
            return
        if found and hasattr(error, "add_note"):
            error.add_note(found)
        elif found:
            warn_user(found)

    def _has_changed(self, optimizer: Any) -> bool:
        """Whether something has that is to be compared."""
        groups = optimizer.param_groups
        values = list(chain.from_iterable(map(dict.values, groups)))
        if len(values) != len(self._values) or not all(map(is_, groups, self._groups)):
            return self._look_anew(optimizer, values)
        attributes, count = self._read(optimizer), optimizer.kept["t"]
        changed = attributes != self._attributes
        changed |= not 0 <= count - self._count <= 1  # it has been loaded
        self._attributes, self._count = attributes, count
        if not all(map(is_, values, self._values)):
            old, self._values = self._values, values
            triples = zip(self._names, old, values, strict=True)
            if any(a is not b and name is not None and is_other(a, b) for name, a, b in triples):
                self._changes += 1
                changed |= self._changes <= 8 or self._changes & (self._changes - 1) == 0
        return changed

    def _look_anew(self, optimizer: Any, values: list[Any]) -> bool:
        self._read = attrgetter(*(x for x in ("__class__", *ATTRIBUTES) if hasattr(optimizer, x)))
        self._attributes, self._count = self._read(optimizer), optimizer.kept["t"]
        self._groups, self._values = list(optimizer.param_groups), values
        counted = keys_of(optimizer)
        self._names = [key if key in counted else None for group in self._groups for key in group]
        return True
