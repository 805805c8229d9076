"""The optimizer that loads a state dict, and what the numbers in that may be.

A number of a state dict may be Python's, numpy's or a tensor of one element.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from .arguments import shown
from .rule import Ascent, Base, Group
from .sharding import local

#: What an optimizer's own numbers are at least.
LEAST = {"t": 1.0, "squared_norms": 0.0, "ascent_squared_norms": 0.0, "rounding_step": 0.0,
         "noise_step": 0.0, "momentum_squared_norm": -2.0}  # fmt: skip
#: Those that count something.
COUNTS = ("t", "rounding_step", "noise_step")
#: Those that only an option makes.
OPTIONAL = ("rounding_step", "slow_sharpness", "momentum_squared_norm")


@dataclass(frozen=True)
class Receiver:
    """The optimizer that loads.

    Attributes:
        method: Name of the method; empty for a base optimizer on its own.
        groups: The present parameter groups.
        bases: The base optimizer of each.
        rules: Its declaration; None of one that is not fused.
        ascent: The rule of the perturbation, if there is one.
        kept: The optimizer's own numbers.
        least: What these are at least, by name; all are finite.
        unmeasured: Those that may be NaN, which says that nothing has been measured.
        check_group: Raises ValueError for a group whose hyper-parameters are out of range.
    """

    method: str
    groups: Sequence[Group]
    bases: Sequence[Optimizer]
    rules: Sequence[Base | None]
    ascent: Ascent | None = None
    kept: Mapping[str, Any] = field(default_factory=dict)
    least: Mapping[str, float] = field(default_factory=dict)
    unmeasured: Collection[str] = ()
    check_group: Callable[[Group], None] = lambda group: None


def number_of(value: Any) -> float | None:
    """What a real number, or a tensor of one, holds; None of anything else."""
    if isinstance(value, Tensor):
        value = local(value)
        if value.numel() != 1 or value.is_meta or value.is_complex() or value.dtype == torch.bool:
            return None
        return float(value)
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf


def check_count(name: str, value: Any, least: float = 0) -> None:
    """A count, as a number or a tensor of one.

    Raises:
        ValueError: If it is no whole number, or below ``least``.
    """
    number = number_of(value)
    if number is None or not number.is_integer() or number < least:
        raise ValueError(
            f"{name} in a state dict must be a whole number of at least {least:.0f}, got "
            f"{shown(value)}"
        )


def check_scalar(name: str, value: Any, least: float | None = None, nan: bool = False) -> None:
    """A number, or a tensor of one.

    Args:
        name: For the message.
        value: What a state dict has.
        least: What it is at least, if that is known.
        nan: Whether NaN is allowed, where it says that nothing has been measured.

    Raises:
        ValueError: If it is out of range.
    """
    number = number_of(value)
    good = number is not None and (math.isfinite(number) or nan and math.isnan(number))
    if not good or (least is not None and number < least):  # type: ignore[operator]
        bound = "" if least is None else f" and at least {least:g}"
        raise ValueError(f"{name} in a state dict must be finite{bound}, got {shown(value)}")
