"""What is saved of an optimizer, and what a state dict brings back.

Groups and per-parameter state are a base optimizer's own, in torch's format. The optimizer's own
numbers (the count of steps, accumulators of norms) are in every group of a state dict, under names
that begin with ``fastsam_``: so they survive whatever is done to the list of groups. In the groups
themselves these are what they were when a state dict was last made or loaded.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.optim.optimizer import Optimizer

from .loading import check_state_dict
from .receiver import Receiver, number_of
from .rule import Group
from .saved_state import fitting, is_exact, is_fastsams
from .scalars import PREFIX

#: The group key that says, where there are several, which base optimizer is the group's.
BASE_KEY = "base_optimizer"


class SharedState(Optimizer):
    """An optimizer whose groups and state are those of another one that it holds.

    An assignment to ``state`` or ``param_groups`` of one changes both.
    """

    #: Whose they are.
    _owner: Any
    #: Attributes that a copy or a pickle leaves out, and makes or finds anew.
    _TRANSIENT: tuple[str, ...] = ()

    @property
    def state(self) -> Any:
        """The state by parameter, as in ``torch.optim``."""
        return self._owner.state

    @state.setter
    def state(self, state: Any) -> None:
        self._owner.state = state

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The parameter groups, as in ``torch.optim``."""
        groups: list[dict[str, Any]] = self._owner.param_groups
        return groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self._owner.param_groups = groups

    def __getstate__(self) -> dict[str, Any]:
        # hooks stay behind as in torch, and so does the wrapper that an LR scheduler puts on step
        left = {*self._TRANSIENT, "step"}
        return {k: x for k, x in vars(self).items() if k not in left and not k.endswith("_hooks")}


def write_kept(groups: list[Group], kept: Mapping[str, Any]) -> None:
    """Put the optimizer's own numbers into every group."""
    for name, value in kept.items():
        if isinstance(value, Tensor):
            value = value.detach().clone()
        for group in groups:
            group[PREFIX + name] = value


def read_kept(groups: list[Group], kept: dict[str, Any]) -> None:
    """Take over the optimizer's own numbers from the first group that has each."""
    for name in kept:
        for group in groups:
            if PREFIX + name in group:
                value = group[PREFIX + name]
                if name == "t":  # what schedules take
                    value = int(number_of(value) or 0)
                kept[name] = value.reshape(()) if isinstance(value, Tensor) else value
                break


def is_own(key: str) -> bool:
    """Whether a group key is one of the optimizer's own numbers."""
    return key.startswith(PREFIX)


def check_bases(saved: Sequence[Group], groups: Sequence[Group]) -> None:
    """Saved groups and those that there are have the same bases, where they have several.

    Raises:
        ValueError: If not.
    """
    for i, (old, new) in enumerate(zip(saved, groups, strict=False)):
        if old.get(BASE_KEY) != new.get(BASE_KEY):
            raise ValueError(
                f"state_dict must have the base optimizers of this optimizer: its group {i} has "
                f"base_optimizer {old.get(BASE_KEY)!r}, here it is {new.get(BASE_KEY)!r}"
            )


def nothing() -> None:
    """What there is to check, or to do, by default."""


class Rollback:
    """What optimizers hold, to be put back should a load fail.

    A load makes new groups and new entries: it is enough to remember which were there.

    Args:
        optimizers: Whose attributes.
        kept: Their own numbers.
    """

    def __init__(self, optimizers: Iterable[Optimizer], kept: dict[str, Any]) -> None:
        self._attributes = [(vars(one), dict(vars(one))) for one in optimizers]
        self._kept, self._values = kept, dict(kept)

    def put_back(self) -> None:
        """Let everything be as it was."""
        for attributes, before in self._attributes:
            attributes.clear()
            attributes.update(before)
        self._kept.clear()
        self._kept.update(self._values)


@contextmanager
def all_or_nothing(optimizers: Iterable[Optimizer], kept: dict[str, Any]) -> Iterator[None]:
    """A block after whose failure everything is as it was."""
    rollback = Rollback(optimizers, kept)
    try:
        yield
    except BaseException:
        rollback.put_back()
        raise


class Loading:
    """What torch's ``load_state_dict`` leaves out, as hooks around it.

    All that will be read is looked at before anything changes, and after a failure everything is
    as it was. Group keys that the saved groups lack keep their present values. State tensors keep
    the dtype in which they were saved, so that a resumed run goes on exactly, unless it does not go
    with the parameter's. The optimizer's own numbers are taken over.

    Args:
        kept: The optimizer's own numbers.
        receiver: Gives what the state dict has to fit; may raise, before anything changes.
        done: Called when all is loaded.
    """

    def __init__(
        self,
        kept: dict[str, Any],
        receiver: Callable[[], Receiver | None],
        done: Callable[[], None] = nothing,
    ) -> None:
        self._kept, self._receiver, self._done = kept, receiver, done
        self._before: list[Group] = []
        self._given: dict[str, Any] = {}
        # by group: whether state has the parameter's dtype alone, and which of it the gradient's
        self._dtypes: list[tuple[bool, str]] = []
        self._rollback: Rollback | None = None

    def pre(self, optimizer: Optimizer, given: dict[str, Any]) -> None:
        """Before torch loads ``given``; the last of such hooks, so that users' count."""
        receiver = self._receiver()
        if receiver is not None:
            check_state_dict(given, receiver)
            check_bases(given["param_groups"], receiver.groups)
            self._dtypes = [
                (is_exact(base, rule), "" if rule is None else rule.starts_from_gradient)
                for base, rule in zip(receiver.bases, receiver.rules, strict=True)
            ]
        self._rollback = Rollback(_holders(optimizer), self._kept)
        self._before, self._given = optimizer.param_groups, given

    def post(self, optimizer: Optimizer) -> None:
        """After it; the first of such hooks, so that users' find everything complete."""
        rollback = self._rollback
        try:
            self._complete(optimizer)
        except BaseException:
            if rollback is not None:
                rollback.put_back()
            raise

    def _complete(self, optimizer: Optimizer) -> None:
        before, given, dtypes = self._before, self._given, self._dtypes
        self._forget()
        groups: list[Group] = optimizer.param_groups
        for old, new in zip(before, groups, strict=True):
            for key, value in old.items():
                new.setdefault(key, value)
        for k, (saved, group) in enumerate(zip(given["param_groups"], groups, strict=True)):
            exact, of_gradient = dtypes[k] if k < len(dtypes) else (False, "")
            for saved_id, param in zip(saved["params"], group["params"], strict=True):
                for key, value in given["state"].get(saved_id, {}).items():
                    held = optimizer.state[param].get(key)
                    if isinstance(value, Tensor) and held is not None and held.dtype != value.dtype:
                        if key not in ("step", of_gradient):
                            value = fitting(value, param, exact and not is_fastsams(key))
                        optimizer.state[param][key] = value.to(held.device, copy=True)
        read_kept(given["param_groups"], self._kept)
        self._done()

    def _forget(self) -> None:
        self._before, self._given, self._dtypes, self._rollback = [], {}, [], None

    @contextmanager
    def around(self, optimizer: Optimizer) -> Iterator[None]:
        """Have the hooks on the optimizer in the block, after whose failure all is as it was."""
        handles = [
            optimizer.register_load_state_dict_pre_hook(self.pre),
            optimizer.register_load_state_dict_post_hook(self.post, prepend=True),
        ]
        try:
            with all_or_nothing(_holders(optimizer), self._kept):
                yield
        finally:
            self._forget()
            for handle in handles:
                handle.remove()

    def stay(self, optimizer: Optimizer) -> None:
        """Have the hooks on the optimizer for good."""
        optimizer.register_load_state_dict_pre_hook(self.pre)
        optimizer.register_load_state_dict_post_hook(self.post, prepend=True)


def _holders(optimizer: Optimizer) -> Iterable[Optimizer]:
    """The optimizer, and the one whose groups and state it shows."""
    return {id(x): x for x in (optimizer, getattr(optimizer, "_owner", optimizer))}.values()


def parts_of(base: Optimizer) -> tuple[type[Optimizer], dict[str, Any]]:
    """What a copy of a base optimizer is made of."""
    return type(base), base.__getstate__()


def set_parts(base: Optimizer, parts: Mapping[str, Any], own: set[str]) -> None:
    """Let a base take over its parts, and complete what older versions of torch saved.

    It takes a parameter with any state for one that it has begun with.

    Args:
        base: The base optimizer.
        parts: State, groups, and what else it is made of.
        own: Names of state that are not the base's.
    """
    held: dict[Any, Any] = dict(parts.get("state", {}))
    begun = {
        key: state
        for key, state in held.items()
        if isinstance(state, dict) and not own.issuperset(state)
    }
    base.__setstate__({**parts, "state": defaultdict(dict, begun)})
    base.state.update({key: state for key, state in held.items() if key not in begun})
