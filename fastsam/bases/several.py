"""Several base optimizers in one: Muon for the groups of matrices, AdamW for the others."""

import inspect
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from fastsam.step.checkpoint import BASE_KEY, parts_of
from fastsam.step.checks import check_group_keys
from fastsam.step.group_arguments import named
from fastsam.step.rule import Base, Group

from . import find_base

Classes = dict[str, type[Optimizer]]


def named_classes(
    params: Any, default: type[Optimizer], check: Callable[[Any], None]
) -> tuple[Any, Classes]:
    """The classes that groups name for their bases, by name, after the default; and ``params``.

    Args:
        params: What a constructor was given; an iterator comes back as a list.
        default: The class for groups that name none.
        check: Raises for what is no class of base optimizers.

    Raises:
        ValueError: If two classes have the same name.
    """
    classes = {default.__name__: default}
    if isinstance(params, Tensor):  # which torch refuses
        return params, classes
    params = list(params)
    for group in params:
        found = group.get(BASE_KEY) if isinstance(group, dict) else None
        if found is not None:
            check(found)
            if classes.setdefault(found.__name__, found) is not found:
                raise ValueError(
                    f"base_optimizer of groups must have different names, got two classes "
                    f"{found.__name__}"
                )
    return params, classes


def check_together(name: str, has_own: bool, classes: Classes, master_weights: bool) -> None:
    """What several bases cannot do.

    Args:
        name: Of the method.
        has_own: Whether it has an update of its own.
        classes: The bases.
        master_weights: Whether there are to be any.

    Raises:
        TypeError, ValueError: If it is asked for.
    """
    if len(classes) == 1:
        return
    if has_own:
        raise TypeError(f"{name} has an update of its own: groups must have no base_optimizer")
    for cls in classes.values():
        base = find_base(cls)
        if base is not None and base.needs_norm:
            raise ValueError(
                f"base_optimizer must not be {cls.__name__} in some groups: it has one step size "
                "for all parameters"
            )
        if base is None and master_weights:
            raise ValueError(
                "master_weights must be False with a base optimizer that is not fused, as "
                f"{cls.__name__} is not"
            )


def make_base(
    base: Callable[..., Optimizer], classes: Classes, groups: list[Group], kwargs: Mapping[str, Any]
) -> Optimizer:
    """The base optimizer: one for all groups, or several in one."""
    check_group_keys(kwargs)
    if len(classes) > 1:
        return Several(groups, classes, kwargs)
    for group in groups:
        group.pop(BASE_KEY, None)
    with named(next(iter(classes.values())), kwargs):
        return base(groups, **kwargs)


def complete(base: Optimizer, group: Group) -> None:
    """Give a group that is to be added the keys of its base.

    Raises:
        TypeError, ValueError: As the base's constructor does; ValueError also if the optimizer was
            made without that base.
    """
    if isinstance(base, Several):
        base.complete(group)
    elif group.get(BASE_KEY) is not None:
        _name_among({type(base).__name__: type(base)}, group[BASE_KEY])
        del group[BASE_KEY]


def members_of(base: Optimizer) -> list[Optimizer]:
    """The optimizers that a base consists of."""
    return list(base.members.values()) if isinstance(base, Several) else [base]


def bases_of(base: Optimizer, groups: Sequence[Group]) -> list[Optimizer]:
    """The optimizer of each group."""
    if not isinstance(base, Several):
        return [base] * len(groups)
    return [base.member_of(group) for group in groups]


def _name_among(classes: Classes, found: Any) -> str:
    for name, cls in classes.items():
        if found is cls or found == name:
            return name
    raise ValueError(
        f"base_optimizer of a group must be one of those that the optimizer was made with, "
        f"{', '.join(classes)}, got {getattr(found, '__name__', found)!r}"
    )


class Several(Optimizer):
    """Several optimizers over one list of groups and one mapping of state.

    Every group has the name of its own under ``"base_optimizer"``, and so it has in a state dict.

    Args:
        groups: Each with a class, its name or nothing under that key, and the arguments of that
            class, which completes and checks it.
        classes: By name. The first is for groups that name none.
        kwargs: Further arguments of the first class, for its groups.

    Raises:
        TypeError, ValueError: As the constructors of the classes do; ValueError also for a class
            that is not among them.

    Attributes:
        members: The optimizers by name. The groups of each are some of these groups, its state is
            this state.
    """

    def __init__(self, groups: list[Group], classes: Classes, kwargs: Mapping[str, Any]) -> None:
        self._classes, self._kwargs = dict(classes), dict(kwargs)
        self.members: dict[str, Optimizer] = {}
        self._names: list[str] = []
        self._bases: tuple[Base | None, ...] = ()
        super().__init__(groups, {})
        for name, cls in self._classes.items():
            own = self._groups_of(name)
            given = self._arguments(name, own[0] if own else {}, needed=True)
            with named(cls, given):
                self.members[name] = member = cls(own or [{"params": []}], **given)
            self.state.update(member.state)
        self.share()
        of_all = set.intersection(*(set(member.defaults) for member in self.members.values()))
        first, *_ = self.members.values()
        self.defaults.update({key: first.defaults[key] for key in of_all})

    def share(self) -> None:
        """Let the members have these groups and this state, whatever has been done to them."""
        for name, member in self.members.items():
            member.param_groups = self._groups_of(name)
            member.state = self.state

    def _groups_of(self, name: str) -> list[Group]:
        return [group for group in self.param_groups if group.get(BASE_KEY) == name]

    # --- what each group's base is ---

    @property
    def bases(self) -> tuple[Base | None, ...]:
        """How each group's base is declared; None where it is not fused. Kept while it holds."""
        names = [group.get(BASE_KEY) for group in self.param_groups]
        if names != self._names:
            self._bases = tuple(map(self.base_of, self.param_groups))
            self._names = names  # type: ignore[assignment]
        return self._bases

    def base_of(self, group: Mapping[str, Any]) -> Base | None:
        """The same of one group."""
        return find_base(self._classes[_name_among(self._classes, group.get(BASE_KEY))])

    def member_of(self, group: Mapping[str, Any]) -> Optimizer:
        """Whose a group is."""
        return self.members[_name_among(self._classes, group.get(BASE_KEY))]

    @property
    def fused_members(self) -> list[Optimizer]:
        """Those that fastsam never steps."""
        return [x for x in self.members.values() if find_base(type(x)) is not None]

    # --- groups ---

    def complete(self, group: Group) -> None:
        """Give a group the keys of its base, whose constructor checks those that it has."""
        first = next(iter(self._classes))
        name = _name_among(self._classes, group.get(BASE_KEY) or first)
        if not isinstance(group["params"], (Tensor, set)):
            group["params"] = list(group["params"])
        given = self._arguments(name, group)
        with named(self._classes[name], given):
            trial = self._classes[name]([{"params": group["params"]}], **given)
        for key, value in trial.param_groups[0].items():
            if key not in ("params", "param_names"):
                group.setdefault(key, value)
        group[BASE_KEY] = name

    def _arguments(self, name: str, group: Group, needed: bool = False) -> dict[str, Any]:
        """Arguments of a class for a group: all that the group has, or those without a default."""
        own = self._kwargs if name == next(iter(self._classes)) else {}
        signature = inspect.signature(self._classes[name]).parameters
        of_group = {
            key: group[key]
            for key, parameter in signature.items()
            if key in group and key != "params"
            if not needed or (parameter.default is parameter.empty and key not in own)
        }
        return {**own, **of_group}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in ``torch.optim``; the group's own base completes it."""
        self.complete(param_group)
        super().add_param_group(param_group)
        self.share()

    # --- steps ---

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step all members; returns the closure's loss if one is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.share()
        for member in self.members.values():
            if member.param_groups:
                member.step()
        return loss

    def step_unfused(self) -> None:
        """Step those members whose update is not fused."""
        self.share()
        for member in self.members.values():
            if member.param_groups and find_base(type(member)) is None:
                with named(type(member), *member.param_groups):
                    member.step()

    def train(self) -> None:
        """Let the members train that have a mode for it."""
        self._set_mode("train")

    def eval(self) -> None:
        """Let the members show the weights to evaluate that have a mode for it."""
        self._set_mode("eval")

    def _set_mode(self, mode: str) -> None:
        self.share()
        for member in self.members.values():
            if hasattr(member, mode):
                getattr(member, mode)()

    # --- copies and checkpoints ---

    def __getstate__(self) -> dict[str, Any]:
        made_of = {}
        for name, member in self.members.items():
            cls, parts = parts_of(member)
            own = {key: x for key, x in parts.items() if key not in ("state", "param_groups")}
            made_of[name] = cls, own
        own = {"_classes": self._classes, "_kwargs": self._kwargs, "_made_of": made_of}
        return super().__getstate__() | own

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        made_of = state.pop("_made_of", None)
        if made_of is not None:
            self.members, self._names, self._bases = {}, [], ()
        super().__setstate__(state)
        for name in self._classes:
            parts: dict[str, Any] = {}
            if made_of is not None:
                cls, parts = made_of[name]
                self.members[name] = cls.__new__(cls)
            groups = self._groups_of(name)
            params = [p for group in groups for p in group["params"] if p in self.state]
            # a member completes what old versions of torch saved, in its own parameters' state
            own = defaultdict(dict, {p: self.state[p] for p in params})
            self.members[name].__setstate__({**parts, "state": own, "param_groups": groups})
            self.state.update(own)
        self.share()
