"""An optimizer that exists becomes the base of one of fastsam's."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from torch.optim.optimizer import Optimizer

from .checkpoint import BASE_KEY, Loading, SharedState
from .makers import BASE, METHOD, method_name
from .receiver import OPTIONAL
from .rule import Group
from .scalars import PREFIX

Made = TypeVar("Made", bound=Optimizer)
#: Hooks that a constructor adds.
HOOKS = (
    "_optimizer_step_pre_hooks",
    "_optimizer_state_dict_pre_hooks",
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
)


class TakenOver:
    """An existing optimizer, given to a constructor in the place of a base's class.

    The constructor completes copies of its groups; the optimizer's own get what is new in them.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.groups = [dict(group) for group in optimizer.param_groups]

    def __call__(self, groups: Sequence[Group], **kwargs: Any) -> Optimizer:
        """The optimizer itself, as a class would give an instance."""
        if kwargs:
            raise TypeError(
                f"from_optimizer got an unexpected argument {next(iter(kwargs))!r}: the "
                "hyper-parameters of an optimizer that exists are those in its param_groups"
            )
        for own, group in zip(self.optimizer.param_groups, groups, strict=True):
            for key, value in group.items():
                own.setdefault(key, value)
        return self.optimizer


class Guard:
    """A step hook of an optimizer that has been taken over: nobody else may step it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.is_open = False

    def __call__(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if not self.is_open:
            raise RuntimeError(
                f"this {type(optimizer).__name__} was given to {self.name}.from_optimizer, and its "
                f"own step would not be sharpness-aware: step the {self.name} instead"
            )


def put_guard(made: Any) -> None:
    """Guard the base of an optimizer that has taken it over, or that is a copy of such a one."""
    name = vars(made).get("_taken_over_by")
    if name is not None:
        made.base_optimizer.register_step_pre_hook(Guard(name))


@contextmanager
def stepped_from_here(base: Optimizer) -> Iterator[None]:
    """In the block the base may be stepped, also if it was taken over from other code."""
    hooks = base._optimizer_step_pre_hooks.values()
    guard = next((hook for hook in hooks if isinstance(hook, Guard)), None)
    if guard is None:
        yield
        return
    guard.is_open = True
    try:
        yield
    finally:
        guard.is_open = False


def take_over(
    cls: Callable[..., Made], optimizer: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Made:
    """Make an optimizer of fastsam's around one that exists, which is as it was if that fails.

    Args:
        cls: The class to be made.
        optimizer: What exists.
        args, kwargs: Of the class's constructor, after the base optimizer.
    """
    _check(cls, optimizer)
    taken = TakenOver(optimizer)
    before = [dict(group) for group in optimizer.param_groups]
    hooks = {name: getattr(optimizer, name).copy() for name in HOOKS}
    kept = optimizer.__dict__.get("kept")
    try:
        made = cls(taken.groups, taken, *args, **kwargs)
        _check_state(made, before)
    except BaseException:
        for group, held in zip(optimizer.param_groups, before, strict=True):
            group.clear()
            group.update(held)
        vars(optimizer).update(hooks)
        if kept is not None:
            vars(optimizer)["kept"] = kept
        raise
    vars(made)["_taken_over_by"] = type(made).__name__
    put_guard(made)
    return made


def _check(cls: Any, optimizer: Any) -> None:
    name = cls.__name__
    if not takes_base(cls):
        raise TypeError(
            f"{name}.from_optimizer: {name} has an update of its own, and cannot take over that of "
            f"{_name_of(optimizer)}; make it of parameters instead"
        )
    if isinstance(optimizer, SharedState):
        raise TypeError(
            "optimizer must not be sharpness-aware itself, got one of class "
            f"{type(optimizer).__name__}"
        )
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"optimizer must be an instance of torch.optim.Optimizer, got {_name_of(optimizer)}"
        )
    if any(BASE_KEY in group for group in optimizer.param_groups):
        raise ValueError(
            f"groups of optimizer must have no {BASE_KEY}: all of them are this "
            f"{type(optimizer).__name__}'s"
        )
    loads = optimizer._optimizer_load_state_dict_pre_hooks.values()
    if any(isinstance(getattr(hook, "__self__", None), Loading) for hook in loads):
        raise ValueError(
            "optimizer must not be the base of another of fastsam's optimizers, and this "
            f"{type(optimizer).__name__} is: use the optimizer that it belongs to"
        )

    for group in optimizer.param_groups:  # of a state dict that it has loaded
        made, mine = group.get(METHOD), (method_name(cls), type(optimizer).__name__)
        base = group.get(BASE, mine[1])
        if made not in (None, mine[0]) or base != mine[1]:
            by = f"{made} on {base}" if made else base
            raise ValueError(
                f"optimizer has loaded a state dict that was made by {by}, which {mine[0]} on "
                f"{mine[1]} cannot go on with"
            )


def _check_state(made: Any, groups: Sequence[Group]) -> None:
    """Older state dicts do not say who made them; some have what only another method has.

    Args:
        made: The new optimizer.
        groups: As they were before.
    """
    known = {METHOD, BASE, *(PREFIX + name for name in (*made.kept, *OPTIONAL))}
    found = [key for group in groups for key in group if key[: len(PREFIX)] == PREFIX]
    strange = [key for key in found if key not in known]
    for group in made.param_groups:
        names = made.ascent.state_names(group)
        keys = (key for param in group["params"] for key in made.state.get(param, ()))
        strange += [key for key in keys if str(key).startswith("ascent_") and key not in names]
    if strange:
        raise ValueError(
            f"optimizer has {strange[0]!r} of another method, which {type(made).__name__} cannot "
            "go on with"
        )


def _name_of(x: Any) -> str:
    return f"the class {x.__name__}" if isinstance(x, type) else type(x).__name__


def takes_base(cls: type) -> bool:
    """Whether a class of fastsam's is made with a base optimizer of the user's choice."""
    for owner in cls.__mro__:
        if "__init__" in vars(owner):
            parameters = inspect.signature(owner.__init__).parameters  # type: ignore[misc]
            if "base_optimizer" in parameters:
                return True
            if all(p.kind is not p.VAR_POSITIONAL for p in parameters.values()):
                return False
    return False
