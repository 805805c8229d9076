"""SAM along the gradient of the step before, in one pass."""

from typing import Any

from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from fastsam.arithmetic import EPS, gives_direction, where
from fastsam.step.rule import Ascent, Columns, Group

from .momentum import MSAM


def _columns(group: Group, lam: float) -> Columns:
    return {"AHEAD": 1.0}


def _radius(rho: Any, norm: Any, total: Any, h: Columns) -> Any:
    return where(gives_direction(norm), rho / (norm + EPS))


ALONG_LAST = Ascent(
    name="delayed", kernel="fastsam.kernels.ascent.momentum", radius=_radius, columns=_columns,
    momentum="ascent_last", keeps="ascent_last",
    eager="fastsam.backends.eager.ascents:along_gradient",
)  # fmt: skip


class DelayedSAM(MSAM):
    r"""SAM along the perturbed gradient of the step before, with one forward and backward pass.

    A heuristic, not a published method. It needs no momentum in the base. Instead of the gradient
    at :math:`w` it uses the gradient of the last step, which was taken at other weights and from
    another batch. It has been measured on three small tasks (docs/choosing.md):

    .. math:: e_t = \rho\, \frac{\tilde g_{t-1}}{\|\tilde g_{t-1}\| + 10^{-12}}, \qquad
              w \leftarrow \mathrm{base}(w, \tilde g_t)

    In the first step, and for a parameter that had no gradient yet, :math:`e = 0`. In ``adaptive``
    groups :math:`\tilde g_{t-1}` becomes :math:`T^2 \tilde g_{t-1}` and its norm that of
    :math:`T \tilde g_{t-1}`, as in :class:`SAM`. A norm that is 0 or not finite perturbs nothing;
    the gradient of a step that is skipped is not kept. A step of the base alone keeps its gradient,
    too. :math:`e` is along the gradient, where :class:`MSAM`'s is against the momentum.

    Steps are those of :class:`MSAM`, by ``step(closure)`` or ``perturb()`` and ``step()``, and what
    that refuses is refused here. ``metrics["grad_norm"]`` is :math:`\|\tilde g_{t-1}\|`.

    Cost: one forward and backward pass. With SGD and momentum 40 bytes per element in float32
    (reduce 4, perturb 16, update 20), three launches, and a copy of the gradient by torch's
    operators: 8 bytes and a launch per parameter. One tensor of state per parameter
    (``ascent_last``), in the gradient's dtype.

    Args:
        params: As in :class:`SAM`.
        base_optimizer: A fused one, with a momentum or without.
        rho: Radius, at least 0. Default 0.05. A group key.
        **kwargs: The other arguments of :class:`SAM`, and the base optimizer's.

    Raises:
        TypeError, ValueError, ImportError, RuntimeError: As :class:`MSAM`, except those about
            a momentum.

    Example:
        >>> optimizer = fastsam.DelayedSAM(model.parameters(), torch.optim.Adagrad, lr=0.1)
        >>> loss = optimizer.step(closure)  # calls it once
    """

    def __init__(
        self,
        params: ParamsT,
        base_optimizer: type[Optimizer],
        rho: float | Tensor = 0.05,
        **kwargs: Any,
    ):
        super().__init__(params, base_optimizer, rho=rho, **kwargs)

    @staticmethod
    def _rule_of(base_optimizer: Any) -> Ascent:
        return ALONG_LAST
