"""LightSAM's and AdaSAM's updates: nothing is bias-corrected, and no eps is added."""

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from fastsam.arithmetic import narrowed, over_root
from fastsam.step.arguments import BETAS, FLAG, RATE, WEIGHT, Argument, Number
from fastsam.step.group_arguments import settle
from fastsam.step.rule import Base, Columns, Group
from fastsam.step.spec import sign_of

from .torch_optim import adam_states

#: The square of eps must be a normal number in float32.
EPS = Number(1e-18, 1e18, tensors="one element", words="at least 1e-18 and below 1e18")
ARGUMENTS: dict[str, Argument] = {
    "lr": RATE, "eps": EPS, "weight_decay": WEIGHT, "betas": BETAS, "amsgrad": FLAG,
    "maximize": FLAG,
}  # fmt: skip


class Uncorrected(Optimizer):
    """Groups and checks of LightSAM's and AdaSAM's updates, which run only fused.

    These have no bias correction and add no eps: accumulators start at ``eps ** 2`` instead. Weight
    decay is decoupled.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor,
        eps: float,
        weight_decay: float,
        betas: tuple[float, float] = (0.9, 0.999),
        amsgrad: bool = False,
        maximize: bool = False,
    ):
        defaults = dict(lr=lr, eps=eps, weight_decay=weight_decay, betas=betas, amsgrad=amsgrad)
        defaults["maximize"] = maximize
        settle(defaults, ARGUMENTS)
        super().__init__(params, defaults)


class UncorrectedAdam(Uncorrected):
    """LightSAM III's update, and AdaSAM's with ``amsgrad``."""


class UncorrectedAdagrad(Uncorrected):
    """LightSAM II's update."""


class UncorrectedAdaGradNorm(Uncorrected):
    """LightSAM I's update."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.kept: dict[str, Any] = {"squared_norms": self.param_groups[0]["eps"] ** 2}


def _adam_columns(group: Group) -> Columns:
    beta1, beta2 = group["betas"]
    return {
        "LR": group["lr"], "ONE_MINUS_BETA1": 1 - beta1, "BETA2": beta2,
        "ONE_MINUS_BETA2": 1 - beta2, "WEIGHT_DECAY": group["weight_decay"],
        "SIGN": sign_of(group),
    }  # fmt: skip


def _adam_states(group: Group) -> dict[str, float]:
    exp_avg, *squares = adam_states(group)
    return {exp_avg: 0.0} | dict.fromkeys(squares, group["eps"] ** 2)


def _adam(
    w: Tensor, u: Tensor, state: dict[str, Tensor], group: Group, step: Any, fresh: bool,
    squared_norms: Tensor,
) -> None:  # fmt: skip
    beta1, beta2 = group["betas"]
    lr, u = narrowed(group["lr"], w), -u if group["maximize"] else u
    w.mul_(1 - lr * group["weight_decay"])
    state["exp_avg"].lerp_(u, 1 - beta1)
    state["exp_avg_sq"].mul_(beta2).addcmul_(u, u, value=1 - beta2)
    second = state["exp_avg_sq"]
    if group["amsgrad"]:
        second = torch.maximum(state["max_exp_avg_sq"], second, out=state["max_exp_avg_sq"])
    w.sub_(lr * over_root(state["exp_avg"], second))


def _adagrad_columns(group: Group) -> Columns:
    return {"LR": group["lr"], "WEIGHT_DECAY": group["weight_decay"], "SIGN": sign_of(group)}


def _adagrad_states(group: Group) -> dict[str, float]:
    return {"sum": group["eps"] ** 2}


def _adagrad(
    w: Tensor, u: Tensor, state: dict[str, Tensor], group: Group, step: Any, fresh: bool,
    squared_norms: Tensor,
) -> None:  # fmt: skip
    lr, u = narrowed(group["lr"], w), -u if group["maximize"] else u
    w.mul_(1 - lr * group["weight_decay"])
    state["sum"].addcmul_(u, u)
    w.sub_(lr * over_root(u, state["sum"]))


UNCORRECTED_ADAM = Base(
    name="uncorrected_adam",
    kernel="fastsam.kernels.base.uncorrected_adam",
    update=_adam,
    columns=_adam_columns,
    states=_adam_states,
    wide=True,
    arguments=ARGUMENTS,
    eager="fastsam.backends.eager.fused:UncorrectedAdam",
)
UNCORRECTED_ADAGRAD = Base(
    name="uncorrected_adagrad",
    kernel="fastsam.kernels.base.uncorrected_adagrad",
    update=_adagrad,
    columns=_adagrad_columns,
    states=_adagrad_states,
    wide=True,
    arguments=ARGUMENTS,
    eager="fastsam.backends.eager.fused:UncorrectedAdagrad",
)
