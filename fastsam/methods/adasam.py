"""AdaSAM: SAM's ascent with an AMSGrad update that has no bias correction."""

from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from fastsam.bases.uncorrected import UncorrectedAdam
from fastsam.optimizer import SharpnessAwareOptimizer
from fastsam.step.checks import check_common


class AdaSAM(SharpnessAwareOptimizer):
    r"""SAM's ascent with an AMSGrad update that has no bias correction.

    .. math:: e = \rho\, \frac{g}{\|g\| + 10^{-12}}

    .. math:: m \leftarrow \beta_1 m + (1 - \beta_1)\, \tilde g, \quad
              v \leftarrow \beta_2 v + (1 - \beta_2)\, \tilde g^2, \quad
              \hat v \leftarrow \max(\hat v, v), \quad
              w \leftarrow w - lr\, \frac{m}{\sqrt{\hat v}}

    :math:`g` is the gradient at :math:`w`, :math:`\tilde g` the one at :math:`w + e`.
    :math:`v` and :math:`\hat v` start at ``eps ** 2``, :math:`m` at 0; no eps is added. For SAM on
    :class:`torch.optim.Adam` itself, use :class:`SAM` with that base.

    Cost: that of ``SAM`` on ``torch.optim.AdamW(amsgrad=True)``: 56 bytes per element in float32
    (reduce 4, perturb 16, update 36), three launches. The state is in float32 whatever the
    parameter's dtype (float64 for float64).

    Args:
        params: Parameters, named parameters or parameter groups, as in :mod:`torch.optim`.
        lr: Learning rate, at least 0.
        rho: Radius, at least 0.
        betas: Each in [0, 1). Default (0.9, 0.999).
        eps: Square root of where the accumulators start, at least 1e-18. Default 1e-8.
        weight_decay: Decoupled weight decay, at least 0; not in the paper. Default 0.
        backend: As in :class:`SAM`.
        maximize: Maximize the objective, as in :mod:`torch.optim`. Default False.
        **kwargs: ``renormalize`` and what follows it among the arguments of :class:`SAM`.

    Raises:
        ValueError: If a hyper-parameter is out of range, or ``backend`` unknown.
        ImportError, RuntimeError: As :class:`SAM`.

    Example:
        >>> optimizer = fastsam.AdaSAM(model.parameters(), lr=1e-3, rho=0.05)
        >>> loss = optimizer.step(closure)

    Reference: Sun, Shen, Zhong, Ding, Chen, Sun, Li, Sun and Tao, "AdaSAM: boosting sharpness-aware
    minimization with adaptive learning rate and momentum for training deep neural networks", 2023.
    The equations are sure.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor,
        rho: float | Tensor,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        backend: str = "auto",
        maximize: bool = False,
        **kwargs: Any,
    ):
        check_common(kwargs, type(self))
        super().__init__(
            params, UncorrectedAdam, rho=rho, backend=backend, lr=lr, betas=betas, eps=eps,
            weight_decay=weight_decay, amsgrad=True, maximize=maximize, **kwargs,
        )  # fmt: skip
