"""FriendlySAM: SAM along the part of the gradient that is particular to the batch."""

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from fastsam.arithmetic import EPS, gives_direction, where
from fastsam.optimizer import SharpnessAwareOptimizer
from fastsam.step.arguments import Number
from fastsam.step.rule import Ascent, Columns, Group


def _columns(group: Group, lam: float) -> Columns:
    lmbda = group["lmbda"]
    return {"SIGMA": group["sigma"], "LMBDA": lmbda, "ONE_MINUS_LMBDA": 1 - lmbda}


def _states(group: Group) -> dict[str, float]:
    return {"ascent_ema": float("nan")}  # what marks an average that has not begun


def _advance(g: Tensor, state: dict[str, Tensor], h: Columns) -> dict[str, Tensor]:
    ema = state["ascent_ema"]
    average = h["LMBDA"] * ema + h["ONE_MINUS_LMBDA"] * g
    return {"ascent_ema": torch.where(ema.isnan(), g, average)}


def _direction(g: Tensor, state: dict[str, Tensor], h: Columns) -> Tensor:
    ema = state["ascent_ema"]
    return g - torch.where(ema.isnan(), 0.0, h["SIGMA"] * ema)


def _radius(rho: Any, norm: Any, total: Any, h: Columns) -> Any:
    return where(gives_direction(norm), rho / (norm + EPS))


def _usable(state: dict[str, Tensor], norm: Tensor) -> Tensor:
    """A gradient that is not finite would stay in the average."""
    return norm.isfinite()


RESIDUAL = Ascent(
    name="friendly",
    kernel="fastsam.kernels.ascent.friendly",
    advance=_advance,
    direction=_direction,
    from_old=True,
    radius=_radius,
    usable=_usable,
    columns=_columns,
    states=_states,
    norm="direction",
    arguments={
        "sigma": Number(tensors=None),
        "lmbda": Number(high=1.0, with_high=True, tensors=None),
    },
)


class FriendlySAM(SharpnessAwareOptimizer):
    r"""SAM along the part of the gradient that is particular to the batch.

    :math:`m` is an average of the gradients :math:`g` at :math:`w`, an estimate of the gradient of
    the whole objective. Without it the rest of :math:`g` is the noise of the batch, and the
    perturbation follows the noise alone:

    .. math:: d = g - \sigma\, m, \qquad e = \rho\, \frac{d}{\|d\| + 10^{-12}}, \qquad
              m \leftarrow \lambda\, m + (1 - \lambda)\, g

    :math:`d` uses the average of before this step. The first :math:`d` and the first :math:`m` of a
    parameter are its first gradient. ``sigma=0`` is :class:`SAM`. If the norm of :math:`d` is 0,
    nothing is perturbed. In ``adaptive`` groups, which are not in the paper, :math:`d` becomes
    :math:`T^2 d` and its norm :math:`\|T d\|`, as in :class:`SAM`.

    A first gradient whose norm is not finite perturbs nothing and stays out of :math:`m`.

    Cost: that of :class:`SAM`, and one tensor of state per parameter (``ascent_ema``, in float32,
    or in float64 for float64 parameters; NaN before the first gradient), read twice and written
    once a step: 52 bytes per element with SGD and momentum, three launches. Between the passes both
    its old and its new value are held, so that a failed step changes nothing.

    Args:
        params, base_optimizer: As in :class:`SAM`. Groups may set ``sigma`` and ``lmbda`` for
            themselves, too.
        rho: Radius, at least 0. Default 0.05; the authors' is 0.2. With 0 the first pass still
            runs, for the average.
        sigma: How much of the average is subtracted, at least 0. Default 1.
        lmbda: :math:`\lambda`, weight of the average's past, in [0, 1]. Default 0.9; the authors'
            are 0.6 to 0.95.
        **kwargs: The other arguments of :class:`SAM`, and the base optimizer's.

    Raises:
        TypeError, ValueError, ImportError, RuntimeError: As :class:`SAM`; ValueError also for a
            ``sigma`` or ``lmbda`` out of range.

    Example:
        >>> optimizer = fastsam.FriendlySAM(model.parameters(), torch.optim.SGD, lmbda=0.6, lr=0.1)
        >>> loss = optimizer.step(closure)

    Reference: Li, Zhou, He, Cheng and Huang, "Friendly sharpness-aware minimization", CVPR 2024,
    arXiv 2403.12350. The equations are those of the authors' code.
    """

    ascent = RESIDUAL

    def __init__(
        self,
        params: ParamsT,
        base_optimizer: type[Optimizer],
        rho: float | Tensor = 0.05,
        sigma: float = 1.0,
        lmbda: float = 0.9,
        **kwargs: Any,
    ):
        own = {"sigma": sigma, "lmbda": lmbda}
        super().__init__(params, base_optimizer, rho=rho, own=own, **kwargs)
