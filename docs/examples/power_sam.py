"""PowerSAM: an ascent rule of one's own. Not from a paper."""

from enum import IntEnum
from numbers import Real
from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from fastsam.rules import Ascent, SharpnessAwareOptimizer, gives_direction, where


class Columns(IntEnum):  # the hyper-parameters, as the kernels number them
    POWER = 0


POWER = tl.constexpr(int(Columns.POWER))


# --- in Triton ---


@triton.jit
def direction(g, state, h):
    return g


@triton.jit
def radius(rho, norm, total, h):
    """0 where the norm is 0 or not finite: nothing is perturbed there."""
    scale = rho * tl.exp(-tl.load(h + POWER) * tl.log(norm + 1e-12))
    return tl.where((norm > 0) & (norm < float("inf")), scale, 0.0)


# --- the same in torch, and the declaration ---


def _radius(rho, norm, total, h):
    return where(gives_direction(norm), rho / (norm + 1e-12) ** h["POWER"])


def _columns(group, lam):
    return {"POWER": group["power"]}


def _check(group):
    power = group["power"]
    if not (isinstance(power, Real) and 0 <= float(power) <= 1):
        raise ValueError(f"power must be in [0, 1], got {power!r}")


RULE = Ascent(name="power", kernel=__name__, radius=_radius, columns=_columns, check=_check)


# --- the optimizer ---


class PowerSAM(SharpnessAwareOptimizer):
    r"""SAM with a perturbation whose length follows a power of the gradient's norm.

    .. math:: e = \rho\, \frac{T^2 g}{(\|T g\| + 10^{-12})^p}

    ``power=1`` is SAM and ``power=0`` is USAM, within rounding. :math:`T` is as in
    :class:`fastsam.SAM`: 1, or :math:`|w| + \eta` in adaptive groups.

    Cost: that of SAM. With SGD and momentum 40 bytes per element in float32, three launches.

    Args:
        params, base_optimizer: As in :class:`fastsam.SAM`. Groups may set ``power`` for themselves.
        rho: Radius where the norm is 1, at least 0. Default 0.05.
        power: :math:`p`, in [0, 1]. Default 0.5.
        **kwargs: The other arguments of :class:`fastsam.SAM`, and the base optimizer's.

    Raises:
        TypeError, ValueError, ImportError, RuntimeError: As :class:`fastsam.SAM`; ValueError also
            for a ``power`` out of range.
    """

    ascent = RULE

    def __init__(
        self,
        params: ParamsT,
        base_optimizer: type[Optimizer],
        rho: float | Tensor = 0.05,
        power: float = 0.5,
        **kwargs: Any,
    ):
        super().__init__(params, base_optimizer, rho=rho, own={"power": power}, **kwargs)
