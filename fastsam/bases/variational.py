"""bSAM's update: a mean and a precision for every weight."""

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from fastsam.arithmetic import narrowed
from fastsam.step.arguments import BETAS, FLAG, RATE, Argument, Number
from fastsam.step.group_arguments import settle
from fastsam.step.rule import Base, Columns, Group
from fastsam.step.spec import sign_of

ARGUMENTS: dict[str, Argument] = {
    "lr": RATE, "n": Number(1, tensors=None), "betas": BETAS,
    "prior_precision": Number(tensors=None), "damping": Number(tensors=None), "maximize": FLAG,
}  # fmt: skip


class Variational(Optimizer):
    """Groups and checks of bSAM's update, which runs only fused."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor,
        n: float,
        betas: tuple[float, float],
        prior_precision: float,
        damping: float,
        maximize: bool = False,
    ):
        defaults: dict[str, Any] = dict(lr=lr, n=n, betas=betas, prior_precision=prior_precision)
        defaults |= dict(damping=damping, maximize=maximize)
        settle(defaults, ARGUMENTS)
        super().__init__(params, defaults)


def _columns(group: Group) -> Columns:
    beta1, beta2 = group["betas"]
    prior = group["prior_precision"] / group["n"]
    return {
        "LR": group["lr"], "ONE_MINUS_BETA1": 1 - beta1, "BETA2": beta2,
        "ONE_MINUS_BETA2": 1 - beta2, "PRIOR": prior, "FLOOR": group["damping"] + prior,
        "SIGN": sign_of(group),
    }  # fmt: skip


def _states(group: Group) -> dict[str, float]:
    return {"exp_avg": 0.0, "precision": 1.0}


def _update(
    w: Tensor, u: Tensor, state: dict[str, Tensor], group: Group, step: Any, fresh: bool,
    squared_norms: Tensor, first: Tensor,
) -> None:  # fmt: skip
    beta1, beta2 = group["betas"]
    prior = group["prior_precision"] / group["n"]
    m, s = state["exp_avg"], state["precision"]
    m.lerp_(sign_of(group) * u + prior * w, 1 - beta1)
    w.sub_(narrowed(group["lr"], w) * m / s)
    size = s.sqrt() * first.abs() + (group["damping"] + prior)
    later = beta2 * s + (1 - beta2) * size
    s.copy_(torch.where(later.isfinite(), later, s))


VARIATIONAL = Base(
    name="variational",
    kernel="fastsam.kernels.base.variational",
    update=_update,
    columns=_columns,
    states=_states,
    wide=True,
    takes_first=True,
    arguments=ARGUMENTS,
)
