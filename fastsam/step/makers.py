"""Which method on which base optimizer made a state dict.

The groups of a state dict say so. Those of a base optimizer on its own, or of an older version, do
not: then their keys and those of torch's optimizers are compared.
"""

import functools
import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch.optim.optimizer import Optimizer

from .receiver import OPTIONAL, Receiver
from .rule import Group
from .scalars import PREFIX
from .torch_state import is_torchs

#: The group keys that say which method made a state dict, and on which base optimizer.
METHOD, BASE = PREFIX + "method", PREFIX + "base"
#: What changes with the device or the version of torch, and does not tell optimizers apart.
FLAGS = ("foreach", "fused", "capturable", "differentiable", "maximize")
#: Two names for one class of groups and state, by whether weight decay is decoupled.
_ADAMS = {False: "Adam", True: "AdamW"}
_ACCUMULATED = PREFIX + "squared_norms"
#: Hyper-parameters that torch completes in state dicts of its older versions.
_ADDED = (*FLAGS, "amsgrad", "nesterov", "centered", "decoupled_weight_decay")


def method_name(cls: type) -> str:
    """What a class's state dicts say that they were made by.

    That is its own name for the library's classes and for those with rules of their own. Other
    subclasses compute what their parent does: they load its state dicts.
    """
    for parent in cls.__mro__:
        own_rules = {"ascent", "descent"} & vars(parent).keys()
        if own_rules or parent.__module__.partition(".")[0] == __name__.partition(".")[0]:
            return parent.__name__
    return cls.__name__


def write_marks(groups: Iterable[Group], method: str, bases: Iterable[Optimizer]) -> None:
    """Let every group say who makes its state dicts."""
    for group, base in zip(groups, bases, strict=True):
        if method:
            group[METHOD] = method
        group[BASE] = type(base).__name__


def _made(method: Any, base: Any) -> str:
    return " on ".join(str(name) for name in (method, base) if name)


def check_maker(saved: Group, present: Group, i: int, receiver: Receiver) -> None:
    """The receiver's method and base, by the marks; where there are none, by what the groups have.

    Raises:
        ValueError: If it was another.
    """
    base = type(receiver.bases[i]).__name__
    mine, made = (receiver.method, base), (saved.get(METHOD), saved.get(BASE))
    marked = [(its, own) for its, own in zip(made, mine, strict=True) if its and own]
    if any(its != own for its, own in marked):
        raise made_by_other(_made(*made), mine)
    if len(marked) == sum(map(bool, mine)):
        return
    guess = _guess(saved, present, receiver.bases[i])
    if guess:
        raise made_by_other(guess, mine)
    if receiver.method and made[0] is None:
        _check_unmarked(saved, present, receiver, mine)


def made_by_other(maker: str, mine: tuple[str, str]) -> ValueError:
    """An error that names the maker, and the method and base that load."""
    return ValueError(
        f"the state dict was made by {maker} and cannot be loaded into {_made(*mine)}"
    )


def _check_unmarked(
    saved: Group, present: Group, receiver: Receiver, mine: tuple[str, str]
) -> None:
    """A group of a base on its own, or of an older version: no method's switches are in it."""
    numbers = {PREFIX + name for name in (*receiver.kept, *OPTIONAL)}
    others = [key for key in saved if key.startswith(PREFIX) and key not in {*numbers, BASE}]
    if others:
        raise made_by_other(f"another method, with {others[0]!r}", mine)
    if PREFIX + "t" in saved:  # then its method has written all of its own
        arguments = {} if receiver.ascent is None else receiver.ascent.arguments
        needed = [PREFIX + name for name in receiver.kept if name not in OPTIONAL]
        lacks = [key for key in (*needed, *arguments) if key in present and key not in saved]
        if lacks:
            raise made_by_other(f"another method, without {lacks[0]!r}", mine)
    switches = ["adaptive"]
    if receiver.bases and is_fastsams_base(receiver.bases[0]):  # as of AdaSAM, whose update it is
        switches.append("amsgrad")
    for key in switches:
        if key in saved and key in present and saved[key] != present[key]:
            raise made_by_other(f"another optimizer, with {key}={saved[key]!r}", mine)


def _guess(saved: Group, present: Group, base: Optimizer) -> str:
    """Which optimizer a group without marks is of, if it is not of the base; else nothing."""
    hyper = torch_hyperparameters()
    known = {_ACCUMULATED}.union(*hyper.values())
    has = [key for key in saved if key in known and key not in present]
    lacks = [key for key in present if key in known and key not in (*saved, *_ADDED)]
    strange = {*has} - {*_ADDED} if is_torchs(base) else {*has} - {"weight_decay"}
    own_or_torchs = is_torchs(base) or is_fastsams_base(base)  # whose keys are known
    if strange and (own_or_torchs or lacks and not strange <= {*FLAGS}):
        fits = {name: keys & saved.keys() for name, keys in hyper.items() if set(has) <= keys}
        likely = max(fits, key=lambda name: len(fits[name]), default="another optimizer")
        without = f" and lack {lacks[0]!r}" if lacks else ""
        return f"{likely} (its groups have {has[0]!r}{without})"
    decoupled, own = (group.get("decoupled_weight_decay") for group in (saved, present))
    is_adam = type(base).__name__ in _ADAMS.values()
    if is_torchs(base) and "betas" in present and saved.keys() >= {"betas", "capturable"}:
        # of a torch in which Adam's groups all have amsgrad, and only they
        if is_adam and "amsgrad" not in saved:
            return "RAdam (its groups lack 'amsgrad')"
        if not is_adam and "amsgrad" in saved:
            return f"{_ADAMS[decoupled is True]} (its groups have 'amsgrad')"
    if is_adam and None not in (decoupled, own):
        return "" if decoupled == own else _ADAMS[decoupled is True]
    return ""


@functools.cache
def torch_hyperparameters() -> dict[str, frozenset[str]]:
    """The hyper-parameters of torch's optimizers, by their names, but a radius of Adadelta's."""
    return {
        name: frozenset(inspect.signature(cls).parameters) - {"params", "rho"}
        for name, cls in vars(torch.optim).items()
        if isinstance(cls, type) and issubclass(cls, Optimizer) and cls is not Optimizer
    }


def is_fastsams_base(base: Optimizer) -> bool:
    """Whether a base optimizer is one of fastsam's own."""
    return type(base).__module__.partition(".")[0] == __name__.partition(".")[0]
