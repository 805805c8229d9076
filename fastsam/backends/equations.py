"""The parts of ``e = radius * T^2 * direction`` that are the same for every rule, in torch."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastsam.arithmetic import wide, wide_dtype
from fastsam.kernels.layout import Scalar
from fastsam.step.batch import Batch
from fastsam.step.rule import Ascent, Columns, Group
from fastsam.step.spec import StepSpec, is_perturbed, sign_of


def columns_of(spec: StepSpec, group: Group) -> Columns:
    """The ascent rule's hyper-parameters in one group."""
    return spec.ascent.columns(group, spec.lam)


def signed(grad: Tensor, group: Group) -> Tensor:
    """The gradient of what a group minimises, in the dtype of the arithmetic."""
    return -wide(grad) if sign_of(group) < 0 else wide(grad)


def seen_by(
    rule: Ascent, state: dict[str, Tensor], batch: Batch, k: int, scalars: Tensor
) -> dict[str, Tensor]:
    """What a direction is given as state: the ascent's, and with it what the rule reads of the
    base's, NaN where there is none, and of the accumulator."""
    if rule.sees_accumulator:
        state = {**state, "accumulated": scalars[Scalar.ACCUMULATED].clone()}
    if not rule.base_state:
        return state
    param, held = batch.params[k], None if batch.read is None else batch.read[k]
    if held is None:
        held = param.new_full((), math.nan)
    return {**state, rule.base_state: held.to(wide_dtype(param))}


def learning_rate(group: Group) -> Any:
    """A number or a 0-dim tensor; 0 where the base has none."""
    lr = group.get("lr")
    if isinstance(lr, Tensor):
        return lr.reshape(())
    return 0.0 if lr is None else lr


def radius_of(group: Group) -> Any:
    """``rho``, or 0 in a group that is not perturbed."""
    return group["rho"] if is_perturbed(group) else 0.0


def element_scale(w: Tensor, group: Group) -> Tensor | float:
    """ASAM's ``T = |w| + eta`` in an adaptive group, else 1."""
    return wide(w).abs() + group["eta"] if group["adaptive"] else 1.0


def radius(spec: StepSpec, group: Group, scalars: Sequence[float] | Tensor) -> Any:
    """What the direction is multiplied by; a number where the scalars are numbers."""
    rho = radius_of(group)
    if isinstance(rho, Tensor) and not isinstance(scalars, Tensor):
        rho = float(rho)  # else a 0-dim float32 would round what is a number here
    if spec.share != 1:
        rho = rho * spec.share
    norm, total = scalars[Scalar.ASCENT_NORM], scalars[Scalar.NEXT_ACCUMULATED]
    found = spec.ascent.radius(rho, norm, total, columns_of(spec, group))
    if isinstance(scalars, Tensor) and not isinstance(found, Tensor):
        return torch.full_like(scalars[0], found)
    return found


def perturbation(w: Tensor, d: Tensor, group: Group, scale: Tensor, once: bool = False) -> Tensor:
    """``e = scale T^2 d``, with ``scale`` from :func:`radius` and ``d`` the direction; or with
    ``T`` once."""
    t, d = element_scale(w, group), wide(d)
    if not once:
        d = t * d
    # a cast, because two 0-dim tensors would be promoted to the wider of their dtypes
    return torch.where(scale != 0, scale.to(d) * (t * d), 0.0)
