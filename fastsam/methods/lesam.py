"""LE-SAM: SAM with a radius that gives a fixed rise of the loss."""

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from fastsam.arithmetic import EPS, gives_direction, where
from fastsam.optimizer import SharpnessAwareOptimizer
from fastsam.step.arguments import Number
from fastsam.step.rule import Ascent, Columns, Group


def _columns(group: Group, lam: float) -> Columns:
    return {"SIGMA": group["sigma"]}


def _radius(rho: Any, norm: Any, total: Any, h: Columns) -> Any:
    length = h["SIGMA"] / (norm + EPS)
    if isinstance(length, Tensor):
        length = torch.where(length < rho, length, rho)
    else:
        length = min(length, rho)
    return where(gives_direction(norm), length / (norm + EPS))


BY_RISE = Ascent(
    name="lesam",
    kernel="fastsam.kernels.ascent.lesam",
    radius=_radius,
    columns=_columns,
    arguments={"sigma": Number(tensors=None)},
    eager="fastsam.backends.eager.ascents:along_gradient",
)


class LESAM(SharpnessAwareOptimizer):
    r"""SAM with a radius at which the loss rises by a given amount.

    .. math:: e = \min\!\left(\frac{\sigma}{\|g\|}, \rho_{\max}\right) \frac{g}{\|g\|}

    So :math:`\langle g, e \rangle = \sigma`: to first order the loss rises by :math:`\sigma`,
    unless the radius is bounded by :math:`\rho_{\max}`. The radius grows as the gradient shrinks;
    without the bound it would grow without limit as training converges. In ``adaptive`` groups,
    which are not in the paper, :math:`g` becomes :math:`T^2 g` and :math:`\|g\|` becomes
    :math:`\|T g\|`, as in :class:`SAM`; :math:`\sigma` keeps its meaning. 1e-12 is added to norms
    in denominators. A first gradient whose norm is 0 or not finite perturbs nothing.

    Cost: that of :class:`SAM`. No state.

    Args:
        params, base_optimizer: As in :class:`SAM`. Groups may have their own ``sigma``, and their
            own :math:`\rho_{\max}` under the key ``rho``.
        sigma: Rise of the loss, at least 0 and finite. Default 0.35.
        rho_max: Largest radius, at least 0 and finite; a 0-dim tensor stays on its device.
            Default 0.5.
        **kwargs: The other arguments of :class:`SAM`, and the base optimizer's.

    Raises:
        TypeError, ValueError, ImportError, RuntimeError: As :class:`SAM`; TypeError also for a
            ``rho``, ValueError for a ``sigma`` or ``rho_max`` out of range.

    Example:
        >>> optimizer = fastsam.LESAM(model.parameters(), torch.optim.SGD, sigma=0.1, lr=0.1)
        >>> loss = optimizer.step(closure)

    Reference: Wang, Liu, Xie and Gao, "Fix the loss, not the radius: rethinking the adversarial
    perturbation of sharpness-aware minimization", ICML 2026, arXiv 2605.10183. The equation is that
    of the authors' code. They let :math:`\sigma` fall to 0 in the last epochs, along a cosine:
    ``sigma`` is a group key, and can be scheduled as ``rho`` can.
    """

    ascent = BY_RISE

    def __init__(
        self,
        params: ParamsT,
        base_optimizer: type[Optimizer],
        sigma: float = 0.35,
        rho_max: float | Tensor = 0.5,
        **kwargs: Any,
    ):
        if "rho" in kwargs:
            raise TypeError("LESAM takes no rho; rho_max is the largest radius, and a group's rho")
        rho_max = Number()("rho_max", rho_max)
        super().__init__(params, base_optimizer, rho=rho_max, own={"sigma": sigma}, **kwargs)
