"""AdaGrad-Norm: one adaptive step size for all parameters."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from .checks import check_tensors


class AdaGradNorm(Optimizer):
    r"""AdaGrad with a single accumulator, the sum of the squared global gradient norms.

    .. math:: b^2 \leftarrow b^2 + \|g\|^2, \qquad w \leftarrow w - \frac{lr}{\sqrt{b^2}}\, g

    A base optimizer for fastsam's classes, which fuse it; it also works on its own. The
    accumulator is ``param_groups[0]["squared_norms"]``: a number at first, from the first step on
    a 0-dim float64 tensor. Nothing moves while it is zero.

    Args:
        params: Parameters or parameter groups, as in ``torch.optim``.
        lr: Learning rate, at least 0; a number or a tensor of one element. Default 1e-2.
        initial_accumulator_value: Where :math:`b^2` starts, at least 0. Default 0.
        maximize: Ascend instead of descend. Default False.

    Raises:
        ValueError: If ``lr`` or ``initial_accumulator_value`` is negative, or ``lr`` a tensor of
            several elements.

    Reference: Ward, Wu and Bottou, "AdaGrad stepsizes: sharp convergence over nonconvex
    landscapes", ICML 2019.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        *,
        initial_accumulator_value: float = 0.0,
        maximize: bool = False,
    ):
        if isinstance(lr, Tensor) and lr.numel() != 1:
            raise ValueError("Tensor lr must be 1-element")
        if not lr >= 0:
            raise ValueError(f"lr must be at least 0, got {lr}")
        if not initial_accumulator_value >= 0:
            raise ValueError(
                f"initial_accumulator_value must be at least 0, got {initial_accumulator_value}"
            )
        super().__init__(params, {"lr": lr, "maximize": maximize})
        self.param_groups[0].setdefault("squared_norms", float(initial_accumulator_value))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; returns the closure's loss if one is given.

        Raises:
            RuntimeError: For gradients that are sparse or complex, or parameters on several
                devices. Nothing has changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        if not params:
            return loss
        for p in params:
            check_tensors(p, p.grad, params[:1], type(self).__name__)
        norms = [p.grad.norm(dtype=torch.float64) for p in params]
        total = self.param_groups[0]["squared_norms"] + torch.stack(norms).square().sum()
        self.param_groups[0]["squared_norms"] = total
        for group in self.param_groups:
            lr = group["lr"]
            if isinstance(lr, Tensor):
                lr = lr.reshape(())
            scale = torch.where(total == 0, 0.0, lr / total.sqrt())
            for p in group["params"]:
                if p.grad is not None:
                    p.add_(scale * p.grad if group["maximize"] else -scale * p.grad)
        return loss
