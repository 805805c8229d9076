"""What ranks that train one model have to agree about.

Ranks are compared through the process group's store, which needs no device and no collective: each
puts there what it has, and the last to come compares all of it and leaves the verdict for the
others. A rank that alone sees a change can wait there as long as it likes, where in a collective it
would meet one of another kind.
"""

import contextlib
import gc
import hashlib
import json
import time
import weakref
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import is_dataclass
from itertools import chain
from numbers import Real
from operator import attrgetter, is_
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import Optimizer

from .replicas import is_distributed, replicas_behind, replicas_of
from .step.guards import warn_user
from .step.sharding import is_sharded

#: Seconds after which a rank that waits for others says so.
PATIENCE = 60.0
#: Seconds for which a rank that has agreed before waits in all; None is the process group's.
LIMIT: float | None = None
#: Seconds between looks at what came too late to be waited for.
LOOK_AGAIN = 10.0

#: Seconds for which a rank that is about to raise waits until the others have taken the verdict.
PARTING = 2.0

#: Attributes that ranks have to have alike, where an optimizer has them.
ATTRIBUTES = ("renormalize", "max_grad_norm", "skip_nonfinite", "perturb_every", "start", "stop",
              "perturb_when", "amplify", "master_weights", "rounding", "seed", "ascent_context",
              "descent_context", "backend", "lam", "rule", "_rule", "norm", "ascent_steps",
              "preconditioner", "form", "samples", "p")  # fmt: skip
#: Group keys that change how something is computed and not what.
FREE = ("params", "foreach", "fused", "capturable", "differentiable")

Settings = dict[str, str]

_wrapped: "weakref.WeakSet[DistributedDataParallel]" = weakref.WeakSet()  # that have been found
#: By what the parameters are: whose each meeting is, in the order of the first steps.
_meetings: "dict[str, list[tuple[weakref.ref[Any], Meeting]]]" = {}


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
        TypeError: If ``optimizer`` is another.
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


class StoreError(Exception):
    """What went wrong with the store."""


class Meeting:
    """Where the ranks of one optimizer are compared.

    Args:
        store: The process group's.
        ranks: Those that train the model.
        key: Of the optimizer: the same on each of them.
        model: The DDP model, if it is one.
    """

    def __init__(self, store: Any, ranks: Sequence[int], key: str, model: Any = None) -> None:
        c10d: Any = dist
        self.of_group = store
        self._store = c10d.PrefixStore(key, store)
        self._timeout = store.timeout.total_seconds()
        self._ranks, self._rank = ranks, dist.get_rank()
        self._model = (lambda: None) if model is None else weakref.ref(model)
        self._number = 0  # of the next comparison
        self._posted = -1  # the last that this rank has come to
        self._all_came = False  # to some comparison
        self._open: list[int] = []  # comparisons that have gone on without a verdict
        self._next_look = 0.0

    @classmethod
    def of(cls, optimizer: Any) -> "Meeting | None":
        """The optimizer's; None where there is one rank, or nothing is known of others."""
        if not is_distributed() or "fake" in dist.get_backend():
            return None
        find_store = getattr(dist.distributed_c10d, "_get_default_store", None)
        ranks = ranks_of(optimizer)
        if find_store is None or ranks is None or len(ranks) < 2 or dist.get_rank() not in ranks:
            return None
        shapes = [[tuple(p.shape) for p in group["params"]] for group in optimizer.param_groups]
        digest = hashlib.sha256(repr((list(ranks), shapes)).encode()).hexdigest()
        what = f"fastsam/{digest[:16]}"
        known = _meetings.setdefault(what, [])
        for i, (whose, meeting) in enumerate(known):
            is_left = whose() is None and not meeting._all_came  # this rank alone had one
            if is_left and meeting.of_group is find_store():
                meeting._number, meeting._open = 0, []
                known[i] = weakref.ref(optimizer), meeting
                return meeting
        params = [p for group in optimizer.param_groups for p in group["params"]]
        model = None if any(map(is_sharded, params)) else find_wrapped(params)
        meeting = cls(find_store(), ranks, f"{what}/{len(known)}", model)
        known.append((weakref.ref(optimizer), meeting))
        return meeting

    @property
    def is_joining(self) -> bool:
        """Whether the ranks may take different numbers of steps: DDP's ``join`` has been used."""
        config = getattr(self._model(), "_join_config", None)
        return bool(getattr(config, "enable", False))

    def compare(self, mine: Settings, agreed: Mapping[str, str]) -> str | None:
        """Come to the next comparison with this rank's settings.

        Returns:
            What the ranks disagree about, or None.

        Raises:
            StoreError: If the store fails.
        """
        number, ranks = self._number, self._ranks
        try:
            self._store.set(f"{number}/{self._rank}", pack(mine))
            if self._posted < number:  # else it has come before, and has not come to an end
                self._posted = number
                if self._store.add(f"{number}/came", 1) == len(ranks):
                    posted = self._store.multi_get([f"{number}/{rank}" for rank in ranks])
                    found = differences(dict(zip(ranks, map(unpack, posted), strict=True)))
                    is_late = self._store.check([f"{number}/late"])
                    verdict = ("?" if is_late else "!") + found if found else "-"
                    self._store.set(f"{number}/verdict", verdict)
            if self._wait(number, PATIENCE if self._all_came or not number else 0.0):
                self._number += 1
                return self._take(number)
            absent = self._absent(number)
            if not self._all_came:
                # they may be late, or have no such optimizer: it is no reason to stop for good
                self._number += 1
                self._open.append(number)
                self._store.set(f"{number}/late", "yes")
                if not number:
                    warn_user(
                        f"ranks {absent} have not come to a first step of this {mine['method']} "
                        f"within {PATIENCE:g} s of rank {self._rank}, which goes on: settings are "
                        "compared when they come"
                    )
                return None
            change = self._change(mine, agreed)
            warn_user(f"waiting for ranks {absent}, which have not come with the change: {change}")
            limit = self._timeout if LIMIT is None else LIMIT
            if self._wait(number, limit - PATIENCE):
                self._number += 1
                return self._take(number)
            return f"ranks {absent} have not made a change of rank {self._rank}: {change}"
        except RuntimeError as error:  # torch's errors of stores are such
            raise StoreError(error) from error

    def verdicts(self) -> str | None:
        """What has been found in comparisons that went on without a verdict."""
        if not self._open or time.monotonic() < self._next_look:
            return None
        self._next_look = time.monotonic() + LOOK_AGAIN
        try:
            there = [n for n in self._open if self._store.check([f"{n}/verdict"])]
            self._open = [n for n in self._open if n not in there]
            return next(filter(None, [self._take(n) for n in there]), None)
        except RuntimeError as error:
            raise StoreError(error) from error

    def waiting(self, mine: Settings) -> str | None:
        """In what the settings differ with which other ranks wait for this one."""
        number = self._number
        if not self._all_came or self._posted >= number:
            return None
        if not self._store.check([f"{number}/came"]):
            return None
        there = [rank for rank in self._ranks if self._store.check([f"{number}/{rank}"])]
        posted = self._store.multi_get([f"{number}/{rank}" for rank in there])
        others = dict(zip(there, map(unpack, posted), strict=True))
        return differences({**others, self._rank: mine})

    def _change(self, mine: Settings, agreed: Mapping[str, str]) -> str:
        names = [x for x in dict.fromkeys((*mine, *agreed)) if mine.get(x) != agreed.get(x)]
        if not names:
            return f"rank {self._rank} has loaded a state dict"
        return "; ".join(
            f"{name} is {mine.get(name, 'not there')} on rank {self._rank} and was "
            f"{agreed.get(name, 'not there')} when the ranks last agreed"
            for name in names
            if name != "steps" or names == ["steps"]
        )

    def _wait(self, number: int, seconds: float) -> bool:
        """Whether a verdict comes in time.

        Other threads use the store as well, which a wait inside it would keep from them.
        """
        deadline, pause = time.monotonic() + seconds, 0.0005
        while not self._store.check([f"{number}/verdict"]):
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            time.sleep(min(pause, left))
            pause = min(1.5 * pause, 0.25)
        return True

    def _wait_until_gone(self, key: str, seconds: float) -> None:
        """Until the last rank has removed it, or for so long."""
        deadline, pause = time.monotonic() + seconds, 0.0005
        while self._store.check([key]) and time.monotonic() < deadline:
            time.sleep(pause)
            pause = min(1.5 * pause, 0.05)

    def _take(self, number: int) -> str | None:
        """A verdict; the last to take it removes what the comparison has left.

        One that ends the program is left to the others for a moment: this rank may be the one that
        hosts the store. What has been read counts, whatever becomes of the store afterwards.
        """
        self._all_came = True
        verdict = str(self._store.get(f"{number}/verdict").decode())
        with contextlib.suppress(RuntimeError):  # another rank has ended; the next call says so
            self._store.delete_key(f"{number}/{self._rank}")
            if self._store.add(f"{number}/taken", 1) == len(self._ranks):
                for name in ("came", "taken", "late", "verdict"):
                    self._store.delete_key(f"{number}/{name}")
            elif verdict[0] == "!":
                self._wait_until_gone(f"{number}/verdict", PARTING)
        if verdict[0] == "?":  # the other may have been of an optimizer that one rank alone had
            warn_user(verdict[1:])
        return verdict[1:] if verdict[0] == "!" else None

    def _absent(self, number: int) -> list[int]:
        return [rank for rank in self._ranks if not self._store.check([f"{number}/{rank}"])]


def ranks_of(optimizer: Any) -> Sequence[int] | None:
    """The ranks that train the optimizer's model, this one among them; None where nothing tells.

    Those of the largest mesh of its parameters; else of the DDP model that they are in.
    """
    params = [p for group in optimizer.param_groups for p in group["params"]]
    meshes = [p.device_mesh for p in params if is_sharded(p)]
    if meshes:
        ranks: list[int] = max(meshes, key=lambda mesh: mesh.size()).mesh.flatten().tolist()
        return ranks
    group = replicas_of(optimizer.ascent_context)
    if group is None and (model := find_wrapped(params)) is not None:
        group = model.process_group
    return None if group is None else dist.get_process_group_ranks(group)


def find_wrapped(params: Sequence[Tensor]) -> Any:
    """The ``DistributedDataParallel`` that has one of the parameters, which do not say so; or None.

    Once for an optimizer all objects are looked at, which takes some tens of milliseconds.
    """
    ours = set(map(id, params))

    def among(models: Any) -> Any:
        for model in models:
            if not ours.isdisjoint(map(id, model.parameters())):
                return model
        return None

    known = among(list(_wrapped))
    if known is not None:
        return known
    # by type(): isinstance would ask objects that stand for others for their __class__
    objects = gc.get_objects()
    kinds = {kind for kind in set(map(type, objects)) if issubclass(kind, DistributedDataParallel)}
    if kinds:
        _wrapped.update(x for x in objects if type(x) in kinds and hasattr(x, "reducer"))
    return among(list(_wrapped))


def keys_of(optimizer: Any) -> set[str]:
    """Group keys that have to be the same."""
    keys = {*optimizer.defaults, "perturb", "base_optimizer"}
    members = getattr(getattr(optimizer, "base_optimizer", None), "members", {})  # several in one
    return keys.union(*(member.defaults for member in members.values())) - set(FREE)


def settings_of(optimizer: Any, reads_device: bool = False) -> Settings:
    """What has to be the same on all ranks, by name and as text."""
    groups = optimizer.param_groups
    base = getattr(optimizer, "base_optimizer", None)
    found = {
        "method": type(optimizer).__name__,
        "base_optimizer": type(base).__name__,
        "parameters by group": str([len(group["params"]) for group in groups]),
    }
    lam = getattr(optimizer, "lam", 0.0)
    if optimizer._has_schedule or optimizer.rounding != "nearest" or not isinstance(lam, Real):
        found["steps"] = str(optimizer.kept["t"] - 1)  # what the next step is depends on it
    for name in ATTRIBUTES:
        if hasattr(optimizer, name):
            value = getattr(optimizer, name)
            if name.endswith("_context"):
                found[name] = described_context(name, value)
            else:
                found[name.lstrip("_")] = described(value, reads_device)
    counted = keys_of(optimizer)
    for i, group in enumerate(groups):
        for key, value in group.items():
            if key in counted:
                found[f"{key} of group {i}"] = described(value, reads_device)
    return found


def described(value: Any, reads_device: bool = False) -> str:
    """A setting as text that is the same in every process.

    A tensor's value where it can be had without waiting, or ``reads_device`` allows to wait.
    """
    if isinstance(value, Tensor):
        is_there = value.ndim == 0 and (reads_device or value.device.type == "cpu")
        return repr(value.item()) if is_there else "a tensor"
    if value is None or isinstance(value, (bool, str)):
        return repr(value)
    if isinstance(value, Real):
        number = float(value)
        return str(int(number)) if number.is_integer() else repr(number)
    if isinstance(value, (tuple, list)):
        return f"({', '.join(described(x, reads_device) for x in value)})"
    if is_dataclass(value):  # SAMAR's rule
        return repr(value)
    return getattr(value, "__qualname__", type(value).__name__)


def is_other(old: Any, new: Any) -> bool:
    """Whether a value in a group has changed; what a tensor holds is not looked at."""
    if type(old) is type(new) is float:
        return bool(old != new)
    if isinstance(old, Tensor) and isinstance(new, Tensor):
        return False
    return described(old) != described(new)


def described_context(name: str, context: Any) -> str:
    """Whether a context is known to keep the replicas' gradients apart; others may do anything."""
    if context is None:
        return "None"
    replicas = replicas_behind(context) if name == "ascent_context" else replicas_of(context)
    return "another" if replicas is None else "of replicas"


def differences(settings: Mapping[int, Settings]) -> str | None:
    """What ranks have differently, with each value and whose it is; None if nothing."""
    names = dict.fromkeys(chain.from_iterable(settings.values()))
    lines = []
    for name in names:
        by_value: dict[str, list[int]] = {}
        for rank, found in settings.items():
            by_value.setdefault(found.get(name, "not there"), []).append(rank)
        if len(by_value) > 1 and not (name == "steps" and "not there" in by_value):
            each = (f"{value} on {_named(ranks)}" for value, ranks in by_value.items())
            lines.append(f"{name} is {' and '.join(each)}")
    if not lines:
        return None
    return f"ranks disagree about settings that have to be the same: {'; '.join(lines)}"


def _named(ranks: Sequence[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"


def pack(settings: Settings) -> Any:
    """For the store; of many groups it is a tenth of the text."""
    return zlib.compress(json.dumps(settings).encode())


def unpack(packed: bytes) -> Settings:
    """The inverse."""
    found: Settings = json.loads(zlib.decompress(packed))
    return found
