"""Means over steps, kept on the device of their values."""

import math
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from fastsam.step.arguments import shown

#: Steps whose values lie side by side on the device before they are added up there.
ROWS = 256
#: What a metric counts since the beginning, so that its last value is what there is to say.
COUNTS = ("skipped",)


def as_scalar(name: str, value: Any) -> Tensor:
    """A value of the user's as a 0-dim tensor, where it is."""
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex():
        return value.detach().reshape(()).to(_dtype_on(value.device))
    if isinstance(value, Real):
        return torch.full((), float(value), dtype=torch.float64, device="cpu")
    raise ValueError(f"{name} must be a number or a tensor of one element, got {shown(value)}")


def _dtype_on(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # Apple's GPUs have none


@dataclass(frozen=True)
class Sum:
    """What is known of the values of one name.

    Attributes:
        total: Of those that are finite.
        count: How many these are.
        last: The last one, finite or not.
        steps: How many there are.
    """

    total: float
    count: int
    last: float
    steps: int

    def __add__(self, other: "Sum") -> "Sum":
        return Sum(
            self.total + other.total, self.count + other.count, max(self.last, other.last),
            self.steps + other.steps,
        )  # fmt: skip

    @property
    def not_finite(self) -> int:
        return self.steps - self.count

    def value(self, name: str) -> float:
        """What a report says."""
        if name in COUNTS:
            return self.last
        return self.total / self.count if self.count else math.nan


class Table:
    """Values of some names on one device: rows for single steps, and the sums of full tables.

    Args:
        names: Of the columns.
        device: Where the values are.
    """

    def __init__(self, names: list[str], device: torch.device) -> None:
        self.names, self.device = names, device
        self._rows = torch.zeros(ROWS, len(names), dtype=_dtype_on(device), device=device)
        # of each column: the sum of its finite values, how many these are, and its last value
        self._totals = self._rows.new_zeros(3, len(names))
        self._filled = 0
        self.steps = 0

    def add(self, values: list[Tensor]) -> None:
        """Copy a step's values into the next row."""
        if self._filled == ROWS:
            self.totals()
        row = self._rows[self._filled]
        torch.stack([value.to(row.dtype) for value in values], out=row)
        self._filled += 1
        self.steps += 1

    def totals(self) -> Tensor:
        """The sums over all steps, on the device."""
        if self._filled:
            rows = self._rows[: self._filled]
            finite = rows.isfinite()
            self._totals[0] += torch.where(finite, rows, 0).sum(0)
            self._totals[1] += finite.sum(0)
            self._totals[2] = rows[-1]
            self._filled = 0
        return self._totals

    def clear(self) -> None:
        self._totals.zero_()
        self._filled = self.steps = 0
