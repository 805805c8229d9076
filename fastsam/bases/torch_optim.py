"""``torch.optim``'s SGD, Adam, AdamW and Adagrad, declared.

The equations perform torch's own operations in the order of its for-loop implementations, so that
they match ``torch.optim`` bit for bit in float32 and float64 on a CPU.
"""

import math
from typing import Any

import torch
from torch import Tensor

from fastsam.arithmetic import narrowed
from fastsam.step.arguments import BETAS, FINITE, FLAG, RATE, WEIGHT, Argument
from fastsam.step.rule import Base, Columns, Group
from fastsam.step.spec import sign_of

#: As torch's constructors have them, which look at the defaults and not at groups.
SGD_ARGUMENTS: dict[str, Argument] = {
    "lr": RATE, "momentum": WEIGHT, "dampening": FINITE, "weight_decay": WEIGHT,
    "nesterov": FLAG, "maximize": FLAG,
}  # fmt: skip
ADAM_ARGUMENTS: dict[str, Argument] = {
    "lr": RATE, "betas": BETAS, "eps": WEIGHT, "weight_decay": WEIGHT, "amsgrad": FLAG,
    "maximize": FLAG, "decoupled_weight_decay": FLAG,
}  # fmt: skip
ADAGRAD_ARGUMENTS: dict[str, Argument] = {
    "lr": RATE, "lr_decay": WEIGHT, "weight_decay": WEIGHT, "initial_accumulator_value": WEIGHT,
    "eps": WEIGHT, "maximize": FLAG,
}  # fmt: skip


def _add_weight_decay(w: Tensor, u: Tensor, group: Group) -> Tensor:
    if group["maximize"]:
        u = -u
    if group["weight_decay"] != 0:
        u = u.add(w, alpha=group["weight_decay"])
    return u


# --- SGD ---


def _sgd_columns(group: Group) -> Columns:
    return {
        "LR": group["lr"], "MOMENTUM": group["momentum"],
        "ONE_MINUS_DAMPENING": 1 - group["dampening"], "WEIGHT_DECAY": group["weight_decay"],
        "NESTEROV": float(group["nesterov"]), "SIGN": sign_of(group),
    }  # fmt: skip


def _sgd_states(group: Group) -> dict[str, float]:
    return {"momentum_buffer": 0.0} if group["momentum"] != 0 else {}


def _sgd(
    w: Tensor, u: Tensor, state: dict[str, Tensor], group: Group, step: Any, fresh: bool,
    squared_norms: Tensor,
) -> None:  # fmt: skip
    u = _add_weight_decay(w, u, group)
    if group["momentum"] != 0:
        buffer = state["momentum_buffer"]
        if fresh:  # torch starts with the gradient itself, undampened
            buffer.copy_(u)
        else:
            buffer.mul_(group["momentum"]).add_(u, alpha=1 - group["dampening"])
        u = u.add(buffer, alpha=group["momentum"]) if group["nesterov"] else buffer
    if isinstance(group["lr"], Tensor):
        w.sub_(narrowed(group["lr"], w) * u)
    else:
        w.add_(u, alpha=-group["lr"])


# --- Adam and AdamW ---


def _adam_columns(group: Group) -> Columns:
    # differences and logarithms are taken here in float64: 1 - float32(0.999) has 4 good digits
    beta1, beta2 = group["betas"]
    log1, log2 = (math.log(beta) if beta > 0 else -math.inf for beta in (beta1, beta2))
    decay, decoupled = group["weight_decay"], group["decoupled_weight_decay"]
    return {
        "LR": group["lr"], "ONE_MINUS_BETA1": 1 - beta1, "BETA2": beta2,
        "ONE_MINUS_BETA2": 1 - beta2, "LOG_BETA1": log1, "LOG_BETA2": log2, "EPS": group["eps"],
        "WEIGHT_DECAY": 0.0 if decoupled else decay,
        "DECOUPLED_WEIGHT_DECAY": decay if decoupled else 0.0, "SIGN": sign_of(group),
    }  # fmt: skip


def adam_states(group: Group) -> dict[str, float]:
    """Adam's averages; with ``amsgrad`` the largest one, too."""
    names = ["exp_avg", "exp_avg_sq"] + ["max_exp_avg_sq"] * group["amsgrad"]
    return dict.fromkeys(names, 0.0)


def _adam(
    w: Tensor, u: Tensor, state: dict[str, Tensor], group: Group, step: Any, fresh: bool,
    squared_norms: Tensor,
) -> None:  # fmt: skip
    beta1, beta2 = group["betas"]
    lr = narrowed(group["lr"], w)
    if group["decoupled_weight_decay"]:
        u = -u if group["maximize"] else u
        if group["weight_decay"] != 0:
            w.mul_(1 - lr * group["weight_decay"])
    else:
        u = _add_weight_decay(w, u, group)
    state["exp_avg"].lerp_(u, 1 - beta1)
    state["exp_avg_sq"].mul_(beta2).addcmul_(u, u, value=1 - beta2)
    second = state["exp_avg_sq"]
    if group["amsgrad"]:
        second = torch.maximum(state["max_exp_avg_sq"], second, out=state["max_exp_avg_sq"])
    step_size = narrowed(lr / (1 - beta1**step), w)
    correction = narrowed((1 - beta2**step) ** 0.5, w)
    denominator = (second.sqrt() / correction).add_(group["eps"])
    w.add_(-step_size * state["exp_avg"] / denominator)


# --- Adagrad ---


def _adagrad_columns(group: Group) -> Columns:
    return {
        "LR": group["lr"], "LR_DECAY": group["lr_decay"], "EPS": group["eps"],
        "WEIGHT_DECAY": group["weight_decay"], "SIGN": sign_of(group),
    }  # fmt: skip


def _adagrad_states(group: Group) -> dict[str, float]:
    return {"sum": group["initial_accumulator_value"]}


def _adagrad(
    w: Tensor, u: Tensor, state: dict[str, Tensor], group: Group, step: Any, fresh: bool,
    squared_norms: Tensor,
) -> None:  # fmt: skip
    u = _add_weight_decay(w, u, group)
    state["sum"].addcmul_(u, u)
    step_size = narrowed(group["lr"] / (1 + (step - 1) * group["lr_decay"]), w)
    w.add_(-step_size * u / state["sum"].sqrt().add_(group["eps"]))


SGD = Base(
    name="sgd",
    kernel="fastsam.kernels.base.sgd",
    update=_sgd,
    columns=_sgd_columns,
    states=_sgd_states,
    starts_from_gradient="momentum_buffer",
    arguments=SGD_ARGUMENTS,
    eager="fastsam.backends.eager.fused:SGD",
)
ADAM = Base(
    name="adam",
    kernel="fastsam.kernels.base.adam",
    update=_adam,
    columns=_adam_columns,
    states=adam_states,
    counts_steps=True,
    arguments=ADAM_ARGUMENTS,
    eager="fastsam.backends.eager.fused:Adam",
)
ADAGRAD = Base(
    name="adagrad",
    kernel="fastsam.kernels.base.adagrad",
    update=_adagrad,
    columns=_adagrad_columns,
    states=_adagrad_states,
    counts_steps=True,
    arguments=ADAGRAD_ARGUMENTS,
    eager="fastsam.backends.eager.fused:Adagrad",
)
