"""The settings that have to be the same on all ranks, as text, and in what ranks differ."""

from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass
from itertools import chain
from numbers import Real
from typing import Any

from torch import Tensor

from .replicas import replicas_behind, replicas_of

#: Attributes that ranks have to have alike, where an optimizer has them.
ATTRIBUTES = ("renormalize", "max_grad_norm", "skip_nonfinite", "perturb_every", "start", "stop",
              "perturb_when", "amplify", "master_weights", "rounding", "seed", "ascent_context",
              "descent_context", "backend", "lam", "rule", "_rule", "norm", "ascent_steps",
              "preconditioner", "form", "samples", "p")  # fmt: skip
#: Group keys that change how something is computed and not what.
FREE = ("params", "foreach", "fused", "capturable", "differentiable")

#: By name.
Settings = dict[str, str]


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
