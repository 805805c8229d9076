"""VaSSO: SAM along an average of the gradients, not along the last one."""

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from fastsam.arithmetic import gives_direction, where
from fastsam.optimizer import SharpnessAwareOptimizer
from fastsam.step.arguments import Number
from fastsam.step.rule import Ascent, Columns, Group

EPS = 1e-7  # the authors', added to the norm


def _columns(group: Group, lam: float) -> Columns:
    return {"ONE_MINUS_THETA": 1 - group["theta"], "THETA": group["theta"]}


def _states(group: Group) -> dict[str, float]:
    return {"ascent_ema": float("nan")}  # what marks an average that has not begun


def _advance(g: Tensor, state: dict[str, Tensor], h: Columns) -> dict[str, Tensor]:
    ema = state["ascent_ema"]
    average = h["ONE_MINUS_THETA"] * ema + h["THETA"] * g
    return {"ascent_ema": torch.where(ema.isnan(), g, average)}


def _direction(g: Tensor, state: dict[str, Tensor], h: Columns) -> Tensor:
    return state["ascent_ema"]


def _radius(rho: Any, norm: Any, total: Any, h: Columns) -> Any:
    return where(gives_direction(norm), rho / (norm + EPS))


def _usable(state: dict[str, Tensor], norm: Tensor) -> Tensor:
    """A gradient that is not finite would stay in the average."""
    return norm.isfinite()


EMA = Ascent(
    name="ema",
    kernel="fastsam.kernels.ascent.ema",
    advance=_advance,
    direction=_direction,
    radius=_radius,
    usable=_usable,
    columns=_columns,
    states=_states,
    norm="direction",
    arguments={"theta": Number(high=1.0, with_high=True, tensors=None)},
    eager="fastsam.backends.eager.ascents:along_average",
)


class VaSSO(SharpnessAwareOptimizer):
    r"""Variance-suppressed sharpness-aware optimization.

    The perturbation follows an average of the gradients :math:`g` at :math:`w`:

    .. math:: s \leftarrow (1 - \theta)\, s + \theta\, g, \qquad
              e = \rho\, \frac{s}{\|s\| + 10^{-7}}

    :math:`s` starts at a parameter's first gradient. ``theta = 1`` is :class:`SAM`, but for the
    constant in the denominator. In ``adaptive`` groups, which are not in the paper, :math:`s`
    becomes :math:`T^2 s` and its norm :math:`\|T s\|`, as in :class:`SAM`.

    A first gradient whose norm is not finite perturbs nothing and stays out of :math:`s`.

    Cost: that of :class:`SAM`, and one tensor of state per parameter (``ascent_ema``, in float32,
    or in float64 for float64 parameters; NaN before the first gradient), read twice and written
    once a step: 52 bytes per element with SGD and momentum, three launches. Between the passes both
    the old and the new state are held, so that a failed step changes nothing; this memory is kept
    from step to step.

    Args:
        params, base_optimizer: As in :class:`SAM`. Groups may set ``theta`` for themselves, too.
        rho: Radius, at least 0. Default 0.05. With 0 the first pass still runs, for the average.
        theta: Weight of the present gradient, in [0, 1]. Default 0.9, as in the authors' code.
        **kwargs: The other arguments of :class:`SAM`, and the base optimizer's.

    Raises:
        TypeError, ValueError, ImportError, RuntimeError: As :class:`SAM`; ValueError also for a
            ``theta`` out of range.

    Example:
        >>> optimizer = fastsam.VaSSO(model.parameters(), torch.optim.SGD, theta=0.4, lr=0.1)
        >>> loss = optimizer.step(closure)

    Reference: Li and Giannakis, "Enhancing sharpness-aware optimization through variance
    suppression", NeurIPS 2023. The equation is that of the authors' code.
    """

    ascent = EMA

    def __init__(
        self,
        params: ParamsT,
        base_optimizer: type[Optimizer],
        rho: float | Tensor = 0.05,
        theta: float = 0.9,
        **kwargs: Any,
    ):
        super().__init__(params, base_optimizer, rho=rho, own={"theta": theta}, **kwargs)
