"""GSAM: a descent rule of one's own."""

import math
from enum import IntEnum
from numbers import Real
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from fastsam.rules import Descent, SharpnessAwareOptimizer


class Columns(IntEnum):  # the hyper-parameters, as the kernels number them
    ALPHA = 0


ALPHA = tl.constexpr(int(Columns.ALPHA))


# --- in Triton ---


@triton.jit
def coefficients(state, first, second, product, h):
    """Of the second gradient, and of the first. ``second`` is the squared norm of the second."""
    alpha = tl.load(h + ALPHA).to(tl.float64)
    projection = tl.where(second > 0, product / second, 0.0)
    return 1 + alpha * projection, -alpha


# --- the same in torch, and the declaration ---


def _coefficients(state, sums, h):
    alpha = h["ALPHA"]
    projection = torch.where(sums["second"] > 0, sums["product"] / sums["second"], 0.0)
    return 1 + alpha * projection, -alpha


def _columns(group):
    return {"ALPHA": group["alpha"]}


def _check(group):
    alpha = group["alpha"]
    if not (isinstance(alpha, Real) and 0 <= float(alpha) < math.inf):
        raise ValueError(f"alpha must be at least 0 and finite, got {alpha!r}")


RULE = Descent(
    name="gsam", kernel=__name__, coefficients=_coefficients, sums=("second", "product"),
    columns=_columns, check=_check,
)  # fmt: skip


# --- the optimizer ---


class GSAM(SharpnessAwareOptimizer):
    r"""Surrogate gap guided sharpness-aware minimization.

    .. math:: u = \tilde g - \alpha \left(g - \frac{\langle g, \tilde g \rangle}{\|\tilde g\|^2}\,
              \tilde g\right)

    with :class:`fastsam.SAM`'s perturbation :math:`e`, :math:`g` the gradient at :math:`w` and
    :math:`\tilde g` the one at :math:`w + e`. In the brackets is the part of :math:`g` that is
    orthogonal to :math:`\tilde g`: to go along it leaves :math:`f(w + e)` as it is and raises
    :math:`f(w)`, so the gap between them closes. ``alpha=0`` is SAM. Where :math:`\tilde g = 0`,
    :math:`u = -\alpha g`.

    Cost: that of SAM, and a reduction over both gradients; the first one is kept until the update.
    With SGD and momentum 52 bytes per element in float32, four launches.

    Args:
        params, base_optimizer: As in :class:`fastsam.SAM`.
        rho: Radius, at least 0. Default 0.05.
        alpha: :math:`\alpha`, at least 0; the first group's counts. Default 0.4.
        **kwargs: The other arguments of :class:`fastsam.SAM`, and the base optimizer's.

    Raises:
        TypeError, ValueError, ImportError, RuntimeError: As :class:`fastsam.SAM`; ValueError also
            for an ``alpha`` out of range.

    Reference: Zhuang, Gong, Yuan, Cui, Adam, Dvornek, Tatikonda, Duncan and Liu, "Surrogate gap
    minimization improves sharpness-aware training", ICLR 2022.
    """

    descent = RULE

    def __init__(
        self,
        params: ParamsT,
        base_optimizer: type[Optimizer],
        rho: float | Tensor = 0.05,
        alpha: float = 0.4,
        **kwargs: Any,
    ):
        super().__init__(params, base_optimizer, rho=rho, own={"alpha": alpha}, **kwargs)
