"""What a state dict has to be to be loaded: all of it is looked at before anything changes.

Torch takes what it is given, and cuts counts, moments of whole numbers and the state of another
optimizer to fit. Here the groups say by which method and on which base they were made
(``makers.py``), and every field that will be read is checked: those of the groups here, those of
the parameters' state in ``saved_state.py``. Everything that is refused is a ``ValueError``.
"""

import math
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from .arguments import shown
from .makers import BASE, FLAGS, METHOD, check_maker, is_fastsams_base, torch_hyperparameters
from .precision import MASTER
from .receiver import COUNTS, OPTIONAL, Receiver, check_count, check_scalar, number_of
from .rule import Group
from .saved_state import (
    check_saved_ascent,
    check_saved_base,
    check_saved_shards,
    check_saved_unfused,
)
from .scalars import PREFIX
from .torch_state import is_torchs

#: Group keys whose tensors are looked at as the numbers that they hold.
TENSORS = ("rho", "eta", "lr", "weight_decay")
#: Hyper-parameters that may be infinite: ASGD's start, Rprop's bounds, what Adafactor clips at.
ENDLESS = ("t0", "step_sizes", "d")


# --- the whole -------------------------------------------------------------------------------


def check_state_dict(given: Mapping[str, Any], receiver: Receiver) -> None:
    """All that will be read of a state dict. Torch compares the numbers of groups and parameters.

    Raises:
        ValueError: If something is missing, out of range or made by another optimizer.
    """
    groups, state = parts_in(given)
    sizes = [len(group["params"]) for group in groups]
    if sizes != [len(group["params"]) for group in receiver.groups]:
        return  # which torch refuses, before anything changes
    merged = []
    for i, (saved, present) in enumerate(zip(groups, receiver.groups, strict=True)):
        check_maker(saved, present, i, receiver)
        merged.append({**present, **saved})
        _check_hyperparameters(saved, merged[-1], i, receiver)
    _check_kept(groups, receiver)
    known = {"step", MASTER}
    listed: set[Hashable] = set()
    for i, saved in enumerate(groups):
        rule, ascent = receiver.rules[i], receiver.ascent
        names = {} if rule is None else rule.state_names(merged[i])
        ascents = {} if ascent is None else ascent.state_names(merged[i])
        known |= names.keys() | ascents.keys()
        listed.update(saved["params"])
        for key, param in zip(saved["params"], receiver.groups[i]["params"], strict=True):
            entry = state.get(key, {})
            if not isinstance(entry, Mapping):
                raise ValueError(
                    f"state of parameter {key!r} in a state dict must be a dict, got {shown(entry)}"
                )
            where = f"of parameter {key!r}"
            if receiver.method:
                check_saved_ascent(entry, ascents, param, where, receiver.method)
            if rule is not None:
                check_saved_base(entry, rule, names, param, where)
            else:
                check_saved_unfused(entry, receiver.bases[i], merged[i], param, where)
            check_saved_shards(entry, param)
    for key, entry in state.items():
        if key not in listed and isinstance(entry, Mapping) and known & entry.keys():
            raise ValueError(
                f"state of a state dict has an entry for {key!r}, which is in none of its groups"
            )
    for base in {id(base): base for base in receiver.bases}.values():
        _rehearse(base, groups, state, receiver)


def _rehearse(
    base: Optimizer, groups: Sequence[Group], state: Mapping[Hashable, Any], receiver: Receiver
) -> None:
    """Let an unused base take over what there is: some complete it, and fail at that."""
    new_groups: list[Group] = []
    new_state: dict[Any, dict[str, Any]] = {}
    for saved, present, owner in zip(groups, receiver.groups, receiver.bases, strict=True):
        if owner is base:
            new_groups.append({**saved, "params": present["params"]})
            for key, param in zip(saved["params"], present["params"], strict=True):
                if entry := state.get(key):
                    new_state[param] = dict(entry)
    own = {} if receiver.ascent is None else receiver.ascent.state_names(receiver.groups[0])
    begun = {param: x for param, x in new_state.items() if not {*own, MASTER}.issuperset(x)}
    actor = object.__new__(type(base))
    vars(actor).update(vars(base))
    try:
        actor.__setstate__({"state": defaultdict(dict, begun), "param_groups": new_groups})
    except Exception as error:
        raise ValueError(
            f"{type(base).__name__} cannot take over the state dict: {type(error).__name__}: "
            f"{error}"
        ) from error


def parts_in(given: Mapping[str, Any]) -> tuple[list[Group], Mapping[Hashable, Any]]:
    for key in ("param_groups", "state"):
        if key not in given:
            raise ValueError(f"{key!r} is missing in the state dict, which has {', '.join(given)}")
    groups, state = given["param_groups"], given["state"]
    good = isinstance(groups, (list, tuple)) and all(
        isinstance(group, Mapping) and isinstance(group.get("params"), (list, tuple))
        for group in groups
    )
    if not good:
        raise ValueError(
            "param_groups of a state dict must be a list of dicts with a list of 'params', got "
            f"{shown(groups)}"
        )
    if not isinstance(state, Mapping):
        raise ValueError(f"state of a state dict must be a dict, got {shown(state)}")
    for key in (key for group in groups for key in group["params"]):
        try:
            hash(key)
        except TypeError:
            raise ValueError(
                f"params of a group in a state dict must be keys of its state, got {shown(key)}"
            ) from None
    for group in groups:
        for mark in (METHOD, BASE):
            if not isinstance(group.get(mark, ""), (str, type(None))):
                raise ValueError(
                    f"{mark} of a group in a state dict must be a name, got {shown(group[mark])}"
                )
    return list(groups), state


# --- groups ----------------------------------------------------------------------------------


def _check_hyperparameters(saved: Group, merged: Group, i: int, receiver: Receiver) -> None:
    """As at construction, with tensors looked at as numbers are."""
    looked = dict(merged)
    for key in TENSORS:
        value = looked.get(key)
        if isinstance(value, Tensor) and (value.ndim == 0 or (key == "lr" and value.numel() == 1)):
            number = number_of(value)
            if number is None:
                raise ValueError(f"{key} in a state dict must be a number, got {shown(value)}")
            looked[key] = number
    base = receiver.bases[i]
    for key, default in base.defaults.items() if is_torchs(base) or is_fastsams_base(base) else ():
        value, wrong = looked.get(key, default), ""
        if key in ("foreach", "fused"):
            if not isinstance(value, bool) and value is not None:
                wrong = "True, False or None"
        elif isinstance(default, bool):
            if not isinstance(value, bool):
                wrong = "True or False"
        elif isinstance(default, (int, float, Tensor)):
            number = number_of(value)
            if number is None or math.isnan(number):
                wrong = "a number"
            elif number < 0 and key in ("lr", "weight_decay", "eps"):
                wrong = "at least 0"
            elif math.isinf(number) and key not in ENDLESS:
                wrong = "finite"
            elif key == "alpha" and type(base).__name__ == "RMSprop" and number > 1:
                wrong = "in [0, 1]"
        elif isinstance(default, tuple):
            wrong = _wrong_numbers(key, value, default)
        if wrong:
            raise ValueError(
                f"{key} of group {i} in a state dict must be {wrong}, got {shown(value)}"
            )
    try:
        receiver.check_group(looked)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"group {i} in a state dict is not usable: {error}") from error
    if is_torchs(base):
        _check_by_construction(type(base), looked, i)


def _wrong_numbers(key: str, value: Any, default: tuple[Any, ...]) -> str:
    """What several numbers must be, if they are not. None is one where it is in the default."""
    found = list(map(number_of, value)) if isinstance(value, (tuple, list)) else []
    numbers = [x for x in found if x is not None]
    if len(found) != len(default) or any(
        x is None and not (given is None and own is None)
        for x, given, own in zip(found, value, default, strict=True)
    ):
        return f"{len(default)} numbers"
    if key == "betas" and not all(0 <= x < 1 for x in numbers):
        return "numbers in [0, 1)"
    if any(math.isnan(x) or (math.isinf(x) and key not in ENDLESS) for x in numbers):
        return "finite"
    return ""


def _check_by_construction(cls: type[Optimizer], group: Group, i: int) -> None:
    """Torch checks hyper-parameters in its constructors alone."""
    keys = [key for key in torch_hyperparameters().get(cls.__name__, ()) if key not in FLAGS]
    values = {key: group[key] for key in keys if key in group}

    def complaint(**some: Any) -> Exception | None:
        try:
            cls([torch.zeros(1, 1)], **some)
        except Exception as error:  # whatever it says of a value of the wrong type
            return error
        return None

    if (error := complaint(**values)) is None:
        return
    for key, value in values.items():
        if complaint(**{key: value}) is not None:
            raise ValueError(
                f"{key} of group {i} in a state dict is out of range, got {shown(value)}: {error}"
            )
    raise ValueError(f"group {i} in a state dict is not usable: {error}")


def _check_kept(groups: Sequence[Group], receiver: Receiver) -> None:
    """The optimizer's own numbers, which are in every group or in none."""
    for name in receiver.kept:
        key, found = PREFIX + name, []
        for group in groups:
            if key in group:
                found.append(group[key])
            elif name not in OPTIONAL and (group.get(METHOD) if receiver.method else BASE in group):
                raise ValueError(f"{key!r} is missing in a group of the state dict")
        for value in found:
            if name in COUNTS:
                check_count(key, value, receiver.least.get(name, 0))
            else:
                check_scalar(key, value, receiver.least.get(name), name in receiver.unmeasured)
        numbers = [number_of(value) for value in found]
        if any(x != numbers[0] and x == x for x in numbers):
            raise ValueError(
                f"{key!r} must be the same in every group of a state dict, got {numbers}"
            )
