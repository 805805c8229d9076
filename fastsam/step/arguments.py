"""What a number, a switch, a name or a function may be, and the errors for anything else.

An *argument* is a function ``(name, value, look)`` that gives the value as it is kept: itself, or a
float or bool that is equal to it. It raises ValueError for anything else. ``look=False`` leaves the
values of tensors on a device alone, as the host would have to wait for them.

Arguments in parameter groups are checked in ``group_arguments.py``, attributes in ``settings.py``.
"""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from decimal import Decimal
from numbers import Integral, Real
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import Parameter

from .batch import identical

#: Integers above are not all exact as floats, and the largest overflow torch's arithmetic.
EXACT = 2**53
#: Tensors whose values can be looked at: one that stands for another has none.
PLAIN = (Tensor, Parameter)


class Argument(Protocol):
    def __call__(self, name: str, value: Any, look: bool = True) -> Any:
        """The value as it is kept; ValueError where it is not allowed."""


def shown(value: Any) -> str:
    """A value in a message, on one line and not too long; some integers have no repr."""
    if isinstance(value, Tensor) and value.numel() != 1:
        return f"a tensor of shape {tuple(value.shape)}"
    try:
        text = " ".join(repr(value).split())
    except ValueError:
        text = f"an integer of {value.bit_length()} bits"
    return text if len(text) <= 100 else f"{text[:80]}..."


def refuse(name: str, allowed: str, value: Any) -> ValueError:
    return ValueError(f"{name} must be {allowed}, got {shown(value)}")


def is_bool(value: Any) -> bool:
    """Whether it is Python's or numpy's."""
    kind = type(value)
    return kind is bool or (kind.__module__ == "numpy" and kind.__name__ in ("bool", "bool_"))


def as_float(value: Any) -> float | None:
    """A number as a float; None for anything else, and for integers that no float can hold."""
    if not isinstance(value, (Real, Decimal)) or is_bool(value):
        return None
    try:
        return float(value)
    except (OverflowError, ValueError):
        return None


@dataclass(frozen=True)
class Number:
    """A number in a range: whatever ``float`` takes, but bools, or a tensor of one element.

    Fractions, decimals and numpy's numbers are kept as floats.

    Args:
        low, high: The range. Default: at least 0.
        with_low, with_high: Whether its ends belong to it. Default: the lower one does.
        tensors: Which tensors are allowed: none (None), those of no dimension (``"0-dim"``, the
            default), or those of one element (``"one element"``).
        keeps_shape: Whether a tensor of one element is kept as it is. Default: as a view of no
            dimension.
        optional: Whether None is allowed.
        others: Whether what is neither a number, a tensor nor a string is left for other code
            to check.
        words: The range, for messages. Default: made of the above.

    Example:
        >>> probability = fastsam.rules.Number(low=0, high=1, with_high=True)
        >>> probability("beta", 0.5)
        0.5
        >>> probability("beta", 2)
        Traceback (most recent call last):
        ValueError: beta must be in [0, 1], got 2
    """

    low: float = 0.0
    high: float = math.inf
    with_low: bool = True
    with_high: bool = False
    tensors: str | None = "0-dim"
    keeps_shape: bool = False
    optional: bool = False
    others: bool = False
    words: str = ""

    def __call__(self, name: str, value: Any, look: bool = True) -> Any:
        kind = type(value)
        if kind is float:
            if self.low < value < self.high or self._has(value):
                return value
        elif isinstance(value, Tensor):
            return self._tensor(name, value, look)
        elif value is None and self.optional:
            return None
        else:
            number = as_float(value)
            is_other = self.others and not isinstance(value, (Real, Decimal, str, bytes))
            if number is None and is_other:
                return value
            if number is not None and self._has(number):
                return value if kind is int and -EXACT < value < EXACT else number
        raise refuse(name, self.allowed, value)

    def _has(self, x: float) -> bool:
        inside = self.low <= x <= self.high
        at_open_end = (x == self.low and not self.with_low) or (
            x == self.high and not self.with_high
        )
        return inside and not at_open_end

    def _tensor(self, name: str, value: Tensor, look: bool) -> Tensor:
        if self.tensors is None:
            raise refuse(name, f"{self.allowed}, and no tensor", value)
        if value.ndim != 0 and (self.tensors == "0-dim" or value.numel() != 1):
            allowed = "a number or a 0-dim tensor" if self.tensors == "0-dim" else "one number"
            raise ValueError(f"{name} must be {allowed}, got shape {tuple(value.shape)}")
        if value.is_meta or value.layout != torch.strided:
            raise ValueError(
                f"{name} must be a number or a tensor that holds one, got one on the device "
                f"{value.device} with the layout {value.layout}"
            )
        if value.is_complex() or value.dtype == torch.bool:
            raise ValueError(
                f"{name} must be a number or a tensor of a real dtype, got {value.dtype}"
            )
        if (look or value.device.type == "cpu") and type(value) in PLAIN:
            # tolist reads a CPU's memory as it is; item is an operator, as it has to be elsewhere
            number: Any = value.reshape(()).tolist()
            if not self._has(float(number)):
                raise refuse(name, self.allowed, value)
        return value if value.ndim == 0 or self.keeps_shape else value.reshape(())

    @property
    def allowed(self) -> str:
        """The range in words."""
        if self.words:
            return self.words
        none = "None or " if self.optional else ""
        if self.high < math.inf:
            left, right = "[" if self.with_low else "(", "]" if self.with_high else ")"
            return f"{none}in {left}{self.low:g}, {self.high:g}{right}"
        if self.low == -math.inf:
            return f"{none}finite"
        text = f"{'at least' if self.with_low else 'above'} {self.low:g}"
        return none + text + ("" if self.with_high else " and finite")


@dataclass(frozen=True)
class Pair:
    """Two numbers, each in the range of ``each``."""

    each: Number

    def __call__(self, name: str, value: Any, look: bool = True) -> Any:
        if isinstance(value, Sequence) and not isinstance(value, str) and len(value) == 2:
            try:
                kept = tuple([self.each(name, x, look) for x in value])
            except ValueError:
                pass
            else:
                return value if identical(kept, value) else kept
        raise refuse(name, f"two numbers {self.each.allowed}", value)


@dataclass(frozen=True)
class Flag:
    """True or False, Python's or numpy's; nothing that merely counts as one of them.

    Args:
        only: The one of both that is allowed. Default None: both are.
        why: What is said of it.

    Example:
        >>> fastsam.rules.Flag()("centered", "yes")
        Traceback (most recent call last):
        ValueError: centered must be True or False, got 'yes'
    """

    only: bool | None = None
    why: str = ""

    def __call__(self, name: str, value: Any, look: bool = True) -> bool:
        if value is not True and value is not False and not is_bool(value):
            raise refuse(name, "True or False", value)
        kept = bool(value)
        if self.only is not None and kept is not self.only:
            raise ValueError(f"{name} must be {self.only}{self.why}")
        return kept


@dataclass(frozen=True)
class Integer:
    """An integer of at least ``low`` and, if ``high`` is given, below that."""

    low: int
    high: int | None = None
    optional: bool = False

    def __call__(self, name: str, value: Any, look: bool = True) -> int | None:
        if value is None and self.optional:
            return None
        if isinstance(value, Integral) and not is_bool(value):
            kept = int(value)
            if kept >= self.low and (self.high is None or kept < self.high):
                return kept
        none = "None or " if self.optional else ""
        power = "" if self.high is None else f" and below 2**{self.high.bit_length() - 1}"
        raise refuse(name, f"{none}an integer of at least {self.low}{power}", value)


@dataclass(frozen=True)
class Choice:
    """One of some names."""

    names: Sequence[str]

    def __call__(self, name: str, value: Any, look: bool = True) -> str:
        if isinstance(value, str) and value in self.names:
            return value
        raise refuse(name, f"one of {', '.join(map(repr, self.names))}", value)


@dataclass(frozen=True)
class FlagOr:
    """True or False, as of a :class:`Flag`, or one of some names."""

    names: Sequence[str]

    def __call__(self, name: str, value: Any, look: bool = True) -> bool | str:
        if isinstance(value, str) and value in self.names:
            return value
        if value is True or value is False or is_bool(value):
            return bool(value)
        raise refuse(name, f"True, False or {', '.join(map(repr, self.names))}", value)


@dataclass(frozen=True)
class FlagOrNumber:
    """True or False, as of a :class:`Flag`, or a number in the range of ``number``."""

    number: Number

    def __call__(self, name: str, value: Any, look: bool = True) -> Any:
        if value is True or value is False or is_bool(value):
            return bool(value)
        try:
            return self.number(name, value, look)
        except (TypeError, ValueError):
            allowed = f"True, False or a number {self.number.allowed}"
            raise refuse(name, allowed, value) from None


#: At least 0 and finite, as most hyper-parameters are.
POSITIVE = Number()
FINITE = Number(low=-math.inf, with_low=False)
#: As ``torch.optim`` has it: a number, or a tensor of one element.
RATE = Number(tensors="one element", keeps_shape=True)
WEIGHT = Number(tensors="one element")
BETAS = Pair(Number(high=1.0, tensors="one element"))
FLAG = Flag()


# --- functions ---


#: Gives a context manager, for one pass.
Context = Callable[[], AbstractContextManager[Any]]
#: From the number of the next step, from 0, and what the host knows, to whether it perturbs.
Policy = Callable[[int, Mapping[str, Any]], bool]


def needs_no_argument(function: Callable[..., Any]) -> bool:
    """Whether it can be called as it is, as far as it says."""
    try:
        inspect.signature(function).bind()
    except TypeError:
        return False
    except ValueError:  # it does not say
        pass
    return True


def context(name: str, value: Any, look: bool = True) -> Any:
    """None, or a function that gives a context manager. Many of these are decorators as well."""
    if value is None or (callable(value) and needs_no_argument(value)):
        return value
    raise TypeError(
        f"{name} must be None or a function that gives a context manager (model.no_sync, not "
        f"model.no_sync()), got {type(value).__name__}"
    )


def policy(name: str, value: Any, look: bool = True) -> Any:
    """None, or a function that says which steps are sharpness-aware."""
    if value is None or callable(value):
        return value
    raise TypeError(
        f"{name} must be None or a function of the step and what the host knows, got {shown(value)}"
    )


def unified_lam(name: str, value: Any, look: bool = True) -> Any:
    """Unified SAM's weight, a schedule of it, or the name of one."""
    if callable(value) or (isinstance(value, str) and value in ("1/t", "1-1/t")):
        return value
    number = as_float(value)
    if number is not None and 0 <= number <= 1:
        return number
    allowed = "a number in [0, 1], '1/t', '1-1/t', or a callable that gives a number in [0, 1]"
    raise refuse(name, allowed, value)
