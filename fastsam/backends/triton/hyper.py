"""Hyper-parameters as the kernels read them: a row of numbers per parameter group."""

import functools
from collections.abc import Callable
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from fastsam.kernels.layout import Hyper
from fastsam.step.checkpoint import is_own
from fastsam.step.rule import Group
from fastsam.step.spec import StepSpec, is_perturbed, sign_of

from ..equations import learning_rate, radius_of
from .functions import ASCENT, BASE, DESCENT, ordered

#: Keys of groups that no row holds.
NOT_READ = frozenset(("params", "param_names"))


def hyper_values(spec: StepSpec) -> list[Any]:
    """Everything that :func:`hyper_rows` may look at."""
    values = [spec.ascent, spec.base, spec.bases, spec.lam, spec.max_grad_norm, spec.descent]
    values.append(spec.share)
    for group in spec.groups:
        values += _reader(tuple(group))(group)
    return values


@functools.cache
def _reader(names: tuple[str, ...]) -> Callable[[Group], tuple[Any, ...]]:
    """Gives those values of a group with these keys that a row may hold."""
    read = (name for name in names if name not in NOT_READ and not is_own(name))
    return itemgetter(*read)


def is_fixed(value: Any) -> bool:
    """Whether another number would be another object; tensors and lists are written to."""
    if isinstance(value, tuple):
        return all(map(is_fixed, value))
    return not isinstance(value, (Tensor, list))


def hyper_rows(
    spec: StepSpec, device: torch.device
) -> tuple[list[list[float]], list[tuple[int, int, Tensor]]]:
    """The hyper-parameters of every group, and where those go that live on the device."""
    shared = [spec.max_grad_norm or 0.0]
    if spec.descent is not None:
        shared += ordered(spec.descent, DESCENT, spec.descent.columns(spec.groups[0]))
    shared += [0.0] * (Hyper.ASCENT - Hyper.MAX_GRAD_NORM - len(shared))
    rows, on_device = [], []
    for i, group in enumerate(spec.groups):
        rho = radius_of(group)
        row = [
            rho if spec.share == 1 else rho * spec.share,
            group["adaptive"],
            group["eta"],
            *shared,
        ]
        row += ordered(spec.ascent, ASCENT, spec.ascent.columns(group, spec.lam))
        row += [0.0] * (Hyper.LR - len(row)) + [learning_rate(group), sign_of(group)]
        row.append(is_perturbed(group) if spec.ascent.momentum else 0.0)  # whether it counts
        base = spec.base_of(i)
        if base is not None:
            row += ordered(base, BASE, base.columns(group))
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
