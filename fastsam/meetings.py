"""Where ranks that train one model compare their settings: the process group's store.

The store needs no device and no collective: each rank puts there what it has, and the last to come
compares all of it and leaves the verdict for the others. A rank that alone sees a change can wait
there as long as it likes, where in a collective it would meet one of another kind.
"""

import contextlib
import hashlib
import json
import time
import weakref
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch.distributed as dist

from .rank_settings import Settings, differences
from .ranks import find_wrapped, ranks_of
from .replicas import is_distributed
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

#: By what the parameters are: whose each meeting is, in the order of the first steps.
_meetings: "dict[str, list[tuple[weakref.ref[Any], Meeting]]]" = {}


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


def pack(settings: Settings) -> Any:
    """For the store; of many groups it is a tenth of the text."""
    return zlib.compress(json.dumps(settings).encode())


def unpack(packed: bytes) -> Settings:
    """The inverse."""
    found: Settings = json.loads(zlib.decompress(packed))
    return found
