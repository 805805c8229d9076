"""What is saved of an optimizer, and what a state dict brings back.

Groups and per-parameter state are a base optimizer's own, in torch's format. The optimizer's own
numbers (the count of steps, accumulators of norms) are in every group of a state dict, under names
that begin with ``fastsam_``: so they survive whatever is done to the list of groups. In the groups
themselves these are what they were when a state dict was last made or loaded.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Any

from torch import Tensor
from torch.optim.optimizer import Optimizer

from .scalars import PREFIX
from .spec import Group


class SharedState(Optimizer):
    """An optimizer whose groups and state are those of another one that it holds.

    Whoever assigns to ``state`` or ``param_groups`` of one changes both.
    """

    #: Whose they are.
    _owner: Any

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
                kept[name] = group[PREFIX + name]
                break


def is_own(key: str) -> bool:
    """Whether a group key is one of the optimizer's own numbers."""
    return key.startswith(PREFIX)


def nothing() -> None:
    """What there is to check, or to do, where nobody says otherwise."""


class Loading:
    """What torch's ``load_state_dict`` leaves out, as hooks around it.

    Group keys that the saved groups lack keep their present values. State tensors keep the dtype in
    which they were saved, so that a resumed run goes on exactly. The optimizer's own numbers are
    taken over.

    Args:
        kept: The optimizer's own numbers.
        check: Called before anything changes; may raise.
        done: Called when all is loaded.
    """

    def __init__(
        self,
        kept: dict[str, Any],
        check: Callable[[], None] = nothing,
        done: Callable[[], None] = nothing,
    ) -> None:
        self._kept, self._check, self._done = kept, check, done
        self._before: list[Group] = []
        self._given: dict[str, Any] = {}

    def pre(self, optimizer: Optimizer, given: dict[str, Any]) -> None:
        """Before torch loads ``given``; the last of such hooks, so that users' count."""
        self._check()
        self._before, self._given = optimizer.param_groups, given

    def post(self, optimizer: Optimizer) -> None:
        """After it; the first of such hooks, so that users' find everything complete."""
        before, given = self._before, self._given
        self._before, self._given = [], {}
        groups: list[Group] = optimizer.param_groups
        for old, new in zip(before, groups, strict=True):
            for key, value in old.items():
                new.setdefault(key, value)
        saved_ids = chain.from_iterable(g["params"] for g in given["param_groups"])
        params = chain.from_iterable(g["params"] for g in groups)
        for saved_id, param in zip(saved_ids, params, strict=True):
            for key, value in given["state"].get(saved_id, {}).items():
                held = optimizer.state[param].get(key)
                if isinstance(value, Tensor) and held is not None and held.dtype != value.dtype:
                    optimizer.state[param][key] = value.to(held.device, copy=True)
        read_kept(given["param_groups"], self._kept)
        self._done()

    @contextmanager
    def around(self, optimizer: Optimizer) -> Iterator[None]:
        """Have the hooks on the optimizer in the block."""
        handles = [
            optimizer.register_load_state_dict_pre_hook(self.pre),
            optimizer.register_load_state_dict_post_hook(self.post, prepend=True),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def stay(self, optimizer: Optimizer) -> None:
        """Have the hooks on the optimizer for good."""
        optimizer.register_load_state_dict_pre_hook(self.pre)
        optimizer.register_load_state_dict_post_hook(self.post, prepend=True)


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
