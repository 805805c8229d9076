"""Hyper-parameters as the kernels read them: a row of numbers per parameter group."""

import functools
from collections.abc import Callable
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from fastsam.kernels.layout import Hyper

from ..bases import Group, signed_lr
from ..ratio import SharpnessRatio
from ..rules import Step

#: What a row holds where there is no rule.
NO_RATIO = SharpnessRatio()
#: Keys of groups that change in every step, and that no row holds.
NOT_READ = frozenset((
    "params", "param_names", "t", "lam", "sharpness", "squared_norms", "ascent_squared_norms",
    "rounding_step",
))  # fmt: skip


def hyper_values(step: Step) -> list[Any]:
    """Everything that :func:`hyper_rows` may look at."""
    values = [step.ascent, step.base, step.lam, step.max_grad_norm, step.mix]
    for group in step.groups:
        values += _reader(tuple(group))(group)
    return values


@functools.cache
def _reader(names: tuple[str, ...]) -> Callable[[Group], tuple[Any, ...]]:
    """Gives those values of a group with these keys that a row may hold."""
    return itemgetter(*(name for name in names if name not in NOT_READ))


def is_fixed(value: Any) -> bool:
    """Whether another number would be another object; tensors and lists are written to."""
    if isinstance(value, tuple):
        return all(map(is_fixed, value))
    return not isinstance(value, (Tensor, list))


def hyper_rows(
    step: Step, device: torch.device
) -> tuple[list[list[float]], list[tuple[int, int, Tensor]]]:
    """The hyper-parameters of every group, and where those go that live on the device."""
    ratio = step.mix if isinstance(step.mix, SharpnessRatio) else NO_RATIO
    shared = [step.max_grad_norm or 0.0, ratio.c, ratio.lam_min, ratio.lam_max, ratio.smoothing]
    rows, on_device = [], []
    for i, group in enumerate(step.groups):
        row = [group["rho"], group["adaptive"], group["eta"], *shared]
        row += step.ascent.columns(group, step.lam)
        row += [0.0] * (Hyper.LR - len(row)) + [signed_lr(group)]
        row += step.base.columns(group) if step.base else []
        for j, x in enumerate(row):
            if type(x) is float:
                continue
            if isinstance(x, Tensor) and x.device == device:  # it stays there
                on_device.append((i, j, x.reshape(())))  # torch allows any shape of one element
                row[j] = 0.0
            else:
                row[j] = float(x)
        rows.append(row)
    return rows, on_device
