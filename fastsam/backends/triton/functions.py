"""A rule's Triton functions, found by the module that it declares, and checked."""

import importlib
from dataclasses import dataclass
from enum import IntEnum
from typing import Any
from weakref import WeakKeyDictionary

from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from fastsam.kernels.layout import WIDTH, Hyper
from fastsam.step.rule import Ascent, Base, Columns, Descent

Rule = Ascent | Descent | Base
#: What ``@triton.jit`` makes of a function, compiled or interpreted.
TRITON = (JITFunction, InterpretedFunction)
#: What has been found, as long as the rule is there.
_FUNCTIONS: "WeakKeyDictionary[Rule, dict[str, Any]]" = WeakKeyDictionary()
_NAMES: "WeakKeyDictionary[Rule, tuple[str, ...]]" = WeakKeyDictionary()


@dataclass(frozen=True)
class Kind:
    """What a kind of rule has room for in the table of hyper-parameters, and what it may define."""

    name: str
    columns: int
    functions: tuple[str, ...]


ASCENT = Kind("ascent", Hyper.LR - Hyper.ASCENT,
              ("advance", "direction", "measured", "radius", "usable", "accumulate"))  # fmt: skip
DESCENT = Kind("descent", Hyper.ASCENT - Hyper.DESCENT, ("coefficients", "adapt"))
BASE = Kind("base", WIDTH - Hyper.BASE, ("update",))


def _needed(rule: Rule) -> list[str]:
    if isinstance(rule, Ascent):
        optional = "advance", "measured", "usable", "accumulate"
        own = [name for name in optional if getattr(rule, name)]
        return ["direction", "radius", *own]
    if isinstance(rule, Descent):
        return ["coefficients"] + ["adapt"] * (rule.adapt is not None and not rule.adapts_on_host)
    return ["update"]


def functions_of(rule: Rule, kind: Kind) -> dict[str, Any]:
    """The functions by name, None for those that the rule does not need.

    Raises:
        ImportError: If the module cannot be imported.
        AttributeError: If it has not all that the declaration needs.
        TypeError: If something of that name is not a Triton function.
    """
    if rule not in _FUNCTIONS:
        _FUNCTIONS[rule] = _find_functions(rule, kind)
    return _FUNCTIONS[rule]


def _find_functions(rule: Rule, kind: Kind) -> dict[str, Any]:
    module = importlib.import_module(rule.kernel)
    needed = _needed(rule)
    if missing := [name for name in needed if not hasattr(module, name)]:
        raise AttributeError(
            f"kernel {rule.kernel!r} of {kind.name} {rule.name!r} needs a function {missing[0]!r}"
        )
    if getattr(rule, "adapts_on_host", False) and hasattr(module, "adapt"):
        needed.append("adapt")  # not run, so that one kernel serves both
    found: dict[str, Any] = {}
    for name in kind.functions:
        found[name] = getattr(module, name) if name in needed else None
        if found[name] is not None and not isinstance(found[name], TRITON):
            raise TypeError(
                f"{name!r} in kernel {rule.kernel!r} of {kind.name} {rule.name!r} must be a "
                "function with @triton.jit"
            )
    return found


def _find_names(rule: Rule, kind: Kind) -> tuple[str, ...]:
    columns = getattr(importlib.import_module(rule.kernel), "Columns", None)
    if columns is None:
        return ()
    if not (isinstance(columns, type) and issubclass(columns, IntEnum)):
        raise TypeError(f"Columns in kernel {rule.kernel!r} must be an IntEnum")
    names = tuple(columns.__members__)
    if [int(x) for x in columns] != list(range(len(names))) or len(names) > kind.columns:
        raise ValueError(
            f"Columns in kernel {rule.kernel!r} must be numbered from 0, at most {kind.columns}"
        )
    return names


def ordered(rule: Rule, kind: Kind, columns: Columns) -> list[Any]:
    """A rule's hyper-parameters in the order of its kernel's ``Columns``.

    Raises:
        ValueError: If the names are not the same.
    """
    if rule not in _NAMES:
        _NAMES[rule] = _find_names(rule, kind)
    names = _NAMES[rule]
    if columns.keys() != set(names):
        wrong = sorted(columns.keys() ^ set(names))
        raise ValueError(
            f"columns of {kind.name} {rule.name!r} and Columns in kernel {rule.kernel!r} must have "
            f"the same names, and only one of them has {wrong[0]!r}"
        )
    return [columns[name] for name in names]
