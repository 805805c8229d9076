"""Lion: a base optimizer of one's own, whose update runs fused."""

from collections.abc import Callable
from enum import IntEnum
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from fastsam.rules import Base, register_base


class Columns(IntEnum):  # the hyper-parameters, as the kernel numbers them
    LR = 0
    ONE_MINUS_BETA1 = 1
    ONE_MINUS_BETA2 = 2
    WEIGHT_DECAY = 3
    SIGN = 4  # -1 where it maximizes


LR, ONE_MINUS_BETA1, ONE_MINUS_BETA2, WEIGHT_DECAY, SIGN = (tl.constexpr(int(x)) for x in Columns)


# --- in Triton ---


@triton.jit
def update(w, u, state, h, step, fresh, squared_norms):
    lr = tl.load(h + LR)
    change = tl.load(h + SIGN) * u - state[0]
    c = state[0] + tl.load(h + ONE_MINUS_BETA1) * change
    sign = tl.where(c > 0, 1.0, tl.where(c < 0, -1.0, 0.0))
    average = state[0] + tl.load(h + ONE_MINUS_BETA2) * change
    return w * (1 - lr * tl.load(h + WEIGHT_DECAY)) - lr * sign, (average,)


# --- the same in torch, and what the kernel is given ---


def _update(w, u, state, group, *unused):
    beta1, beta2 = group["betas"]
    average = state["exp_avg"]
    u = -u if group["maximize"] else u
    w.mul_(1 - group["lr"] * group["weight_decay"])
    w.sub_(group["lr"] * torch.sign(average.lerp(u, 1 - beta1)))
    average.lerp_(u, 1 - beta2)


def _columns(group):
    beta1, beta2 = group["betas"]
    return {  # 1 - beta is taken here, in float64: float32 would lose digits of it
        "LR": group["lr"], "ONE_MINUS_BETA1": 1 - beta1, "ONE_MINUS_BETA2": 1 - beta2,
        "WEIGHT_DECAY": group["weight_decay"], "SIGN": -1.0 if group["maximize"] else 1.0,
    }  # fmt: skip


def _states(group):
    return {"exp_avg": 0.0}


# --- the optimizer ---


class Lion(Optimizer):
    r"""Evolved sign momentum: every weight moves by the learning rate.

    .. math:: c = \beta_1 m + (1 - \beta_1)\, u, \quad m \leftarrow \beta_2 m + (1 - \beta_2)\, u,
              \quad w \leftarrow (1 - lr\, \lambda)\, w - lr\; \mathrm{sign}(c)

    :math:`u` is the gradient, or its negative with ``maximize``. Works by itself, and as the base
    of fastsam's classes, which fuse it: ``fastsam.SAM(params, Lion, lr=1e-4)``.

    Cost: one tensor of state per parameter, ``exp_avg``. Under :class:`fastsam.SAM` 40 bytes per
    element in float32, three launches.

    Args:
        params: Parameters or parameter groups, as in ``torch.optim``.
        lr: Learning rate, at least 0. Default 1e-4.
        betas: Each in [0, 1). Default (0.9, 0.99).
        weight_decay: :math:`\lambda`, decoupled, at least 0. Default 0.
        maximize: Ascend instead of descend. Default False.

    Raises:
        ValueError: If a hyper-parameter is out of range.

    Reference: Chen, Liang, Huang, Real, Wang, Liu, Pham, Dong, Luong, Hsieh, Lu and Le, "Symbolic
    discovery of optimization algorithms", NeurIPS 2023.
    """

    def __init__(
        self, params: ParamsT, lr: float | Tensor = 1e-4, betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0, maximize: bool = False,
    ):  # fmt: skip
        if not (lr >= 0 and weight_decay >= 0):
            raise ValueError(f"lr and weight_decay must be at least 0, got {lr}, {weight_decay}")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas must be in [0, 1), got {betas}")
        defaults = dict(lr=lr, betas=betas, weight_decay=weight_decay, maximize=maximize)
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; returns the closure's loss if one is given."""
        with torch.enable_grad():
            loss = None if closure is None else closure()
        for group in self.param_groups:
            for param in (p for p in group["params"] if p.grad is not None):
                if not self.state[param]:
                    self.state[param]["exp_avg"] = torch.zeros_like(param)
                _update(param, param.grad, self.state[param], group)
        return loss


LION = Base(name="lion", kernel=__name__, update=_update, columns=_columns, states=_states)
register_base(Lion, LION)
