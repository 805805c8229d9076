"""AdaGrad-Norm: one adaptive step size for all parameters."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from fastsam.arithmetic import bounded, narrowed
from fastsam.step.arguments import FLAG, POSITIVE, RATE, Argument
from fastsam.step.checkpoint import Loading, write_kept
from fastsam.step.checks import check_tensors
from fastsam.step.group_arguments import settle
from fastsam.step.makers import write_marks
from fastsam.step.receiver import LEAST, Receiver
from fastsam.step.rule import Base, Columns, Group
from fastsam.step.spec import sign_of

from .uncorrected import ARGUMENTS as LIGHT_ARGUMENTS

ARGUMENTS: dict[str, Argument] = {"lr": RATE, "maximize": FLAG}


class AdaGradNorm(Optimizer):
    r"""AdaGrad with a single accumulator, the sum of the squared global gradient norms.

    .. math:: b^2 \leftarrow b^2 + \|g\|^2, \qquad w \leftarrow w - \frac{lr}{\sqrt{b^2}}\, g

    A base optimizer for fastsam's classes, which fuse it; it also works on its own. The
    accumulator is ``kept["squared_norms"]``: a number at first, from the first step on a 0-dim
    float64 tensor. A state dict has it in every group, as ``fastsam_squared_norms``. Nothing moves
    while it is zero. Norms are right over the whole range of float32; :math:`lr / \sqrt{b^2}` is at
    most the largest number of the parameter's dtype.

    Args:
        params: Parameters or parameter groups, as in :mod:`torch.optim`.
        lr: Learning rate, at least 0; a number or a tensor of one element. Default 1e-2.
        initial_accumulator_value: Where :math:`b^2` starts, at least 0. Default 0.
        maximize: Ascend instead of descend. Default False.

    Raises:
        ValueError: If ``lr`` or ``initial_accumulator_value`` is negative or not finite, ``lr`` a
            tensor of several elements, or ``maximize`` neither True nor False.

    Example:
        >>> optimizer = fastsam.SAM(model.parameters(), fastsam.AdaGradNorm, rho=0.05, lr=1.0)
        >>> loss = optimizer.step(closure)

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
        start = POSITIVE("initial_accumulator_value", initial_accumulator_value)
        defaults = {"lr": lr, "maximize": maximize}
        settle(defaults, ARGUMENTS)
        super().__init__(params, defaults)
        self.kept: dict[str, Any] = {"squared_norms": float(start)}
        self._write_own(self.param_groups)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in :mod:`torch.optim`.

        Raises:
            ValueError: If a hyper-parameter is out of range; nothing has been added then.
        """
        settle(param_group, ARGUMENTS)
        super().add_param_group(param_group)
        if hasattr(self, "kept"):
            self._write_own(self.param_groups[-1:])

    def _write_own(self, groups: list[Group]) -> None:
        write_marks(groups, "", [self] * len(groups))
        write_kept(groups, self.kept)

    def state_dict(self) -> dict[str, Any]:
        """As in :mod:`torch.optim`, with the accumulator in every group."""
        self._write_own(self.param_groups)
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in :mod:`torch.optim`, with the accumulator.

        Raises:
            ValueError: If the state dict is another optimizer's, or a number in it out of range.
                Nothing has changed then.
        """
        with Loading(self.kept, self._receiver).around(self):
            super().load_state_dict(state_dict)

    def _receiver(self) -> Receiver:
        kept = {"squared_norms": self.kept["squared_norms"]}  # an optimizer around it has others
        count = len(self.param_groups)
        return Receiver(
            "", self.param_groups, [self] * count, [ADAGRAD_NORM] * count, kept=kept, least=LEAST,
            check_group=_check,
        )  # fmt: skip

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"kept": self.kept}

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
        total = self.kept["squared_norms"] + torch.stack(norms).square().sum()
        self.kept["squared_norms"] = total
        for group in self.param_groups:
            lr = group["lr"]
            if isinstance(lr, Tensor):
                lr = lr.reshape(())
            scale = torch.where(total == 0, 0.0, lr / total.sqrt())
            for p in group["params"]:
                if p.grad is not None:
                    step = bounded(scale, p) * p.grad
                    p.add_(step if group["maximize"] else -step)
        return loss


def _check(group: Group) -> None:
    """As at construction."""
    AdaGradNorm([torch.zeros(1)], lr=group["lr"], maximize=group["maximize"])


def adagrad_norm_columns(group: Group) -> Columns:
    """Those of ``kernels/base/adagrad_norm.py``."""
    return {
        "LR": group["lr"], "SIGN": sign_of(group), "WEIGHT_DECAY": group.get("weight_decay", 0.0)
    }  # fmt: skip


def adagrad_norm(
    w: Tensor, u: Tensor, state: dict[str, Tensor], group: Group, step: Any, fresh: bool,
    squared_norms: Tensor,
) -> None:  # fmt: skip
    """The equation, in place; with decoupled weight decay where a group has it."""
    lr = narrowed(group["lr"], w)
    if group.get("weight_decay", 0.0) != 0:
        w.mul_(1 - lr * group["weight_decay"])
    # 0 where nothing has been accumulated: every gradient so far was zero
    scale = torch.where(squared_norms == 0, 0.0, lr / squared_norms.sqrt())
    scale = bounded(scale, w)
    w.add_((scale if group.get("maximize") else -scale).to(w.dtype) * u)


def no_start(group: Group) -> float:
    """Where the accumulator starts, but for what the optimizer itself was given."""
    return 0.0


ADAGRAD_NORM = Base(
    name="adagrad_norm",
    kernel="fastsam.kernels.base.adagrad_norm",
    update=adagrad_norm,
    columns=adagrad_norm_columns,
    accumulator=no_start,
    arguments=LIGHT_ARGUMENTS | ARGUMENTS,
    eager="fastsam.backends.eager.fused:AdaGradNorm",
)
