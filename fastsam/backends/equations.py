"""The equations of the reference backend: ascent rules and base updates, one tensor at a time.

Arithmetic in float32, or float64 for float64 tensors. In float32 and float64 on a CPU the base
updates that are torch's perform torch's own operations in the order of its for-loop
implementations, so that they match ``torch.optim`` bit for bit.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastsam.kernels.layout import Scalar

from ..bases import Base, Group
from ..rules import Step

EPS = 1e-12
EMA_EPS = 1e-7  # VaSSO's
SMALLEST = 2.0**-126  # the smallest normal float32


def wide(x: Tensor) -> Tensor:
    """``x`` in the dtype of the arithmetic."""
    return x if x.dtype == torch.float64 else x.float()


# --- the ascent ------------------------------------------------------------------------------


def element_scale(w: Tensor, group: Group) -> Tensor | float:
    """ASAM's ``T = |w| + eta`` in an adaptive group, else 1."""
    return wide(w).abs() + group["eta"] if group["adaptive"] else 1.0


def over_root(x: Tensor, second: Tensor) -> Tensor:
    """``x / sqrt(second)``, with ``SMALLEST`` for what is below it.

    An average of squares gets there after some 50,000 zero gradients (at a beta of 0.999).
    """
    return x / second.clamp(min=SMALLEST).sqrt()


def advance(rule: str, g: Tensor, old: dict[str, Tensor], group: Group) -> dict[str, Tensor]:
    """The ascent rule's state after this gradient."""
    g = wide(g)
    if rule == "ema":
        theta, ema = group["theta"], old["ema"]
        # NaN until the first gradient, with which the average starts
        return {"ema": torch.where(ema.isnan(), g, (1 - theta) * ema + theta * g)}
    if rule == "adagrad":
        return {"ascent_sum": old["ascent_sum"] + g * g}
    if rule == "adam":
        beta1, beta2 = group["betas"]
        exp_avg = old["ascent_exp_avg"] + (1 - beta1) * (g - old["ascent_exp_avg"])
        exp_avg_sq = beta2 * old["ascent_exp_avg_sq"] + (1 - beta2) * g * g
        return {"ascent_exp_avg": exp_avg, "ascent_exp_avg_sq": exp_avg_sq}
    return {}


def direction(rule: str, g: Tensor, state: dict[str, Tensor]) -> Tensor:
    """The direction of the perturbation, from the new state."""
    if rule == "ema":
        return state["ema"]
    if rule == "adagrad":
        return over_root(wide(g), state["ascent_sum"])
    if rule == "adam":
        return over_root(state["ascent_exp_avg"], state["ascent_exp_avg_sq"])
    return g


def usable(rule: str, state: dict[str, Tensor], scalars: Tensor) -> Tensor:
    """Whether the new state may replace the old: a gradient that is not finite would stay in it."""
    if rule == "ema":
        return scalars[Scalar.ASCENT_NORM].isfinite()
    return state["ascent_sum" if rule == "adagrad" else "ascent_exp_avg_sq"].isfinite()


def radius(group: Group, step: Step, scalars: Sequence[float] | Tensor) -> Any:
    """What the direction is multiplied by; 0 where a norm gives none, so that e is never NaN.

    A 0-dim tensor; a number where the scalars are numbers.
    """
    rho, norm = group["rho"], scalars[Scalar.ASCENT_NORM]
    if isinstance(rho, Tensor) and not isinstance(scalars, Tensor):
        rho = float(rho)  # else a 0-dim float32 would round what is a number here
    usable = (norm > 0) & (norm < math.inf)
    if step.ascent.name == "unified":  # SAM at lam = 1, USAM at lam = 0
        return where(usable, rho * (1 - step.lam + step.lam / (norm + EPS)))
    if step.ascent.name == "ema":
        return where(usable, rho / (norm + EMA_EPS))
    if step.ascent.name == "adagrad_norm":
        a = scalars[Scalar.NEXT_SQUARED_NORMS]
        return where((abs(norm) < math.inf) & (a > 0), rho / (a + (a == 0)) ** 0.5)
    return torch.ones_like(norm) * rho if isinstance(norm, Tensor) else rho


def where(condition: bool | Tensor, x: Any) -> Any:
    """``x`` where the condition holds, else 0."""
    if isinstance(condition, Tensor):
        return torch.where(condition, x, 0.0)
    return x if condition else 0.0


def perturbation(w: Tensor, d: Tensor, group: Group, scale: Tensor) -> Tensor:
    """``e = scale T^2 d``, with ``scale`` from :func:`radius` and ``d`` from :func:`direction`."""
    t, d = element_scale(w, group), wide(d)
    # a cast, because two 0-dim tensors would be promoted to the wider of their dtypes
    return torch.where(scale != 0, scale.to(d) * (t * (t * d)), 0.0)


# --- base updates: w and the state change in place --------------------------------------------


def sgd(w: Tensor, u: Tensor, state: dict[str, Tensor], group: Group, fresh: bool) -> None:
    if group["maximize"]:
        u = -u
    if group["weight_decay"] != 0:
        u = u.add(w, alpha=group["weight_decay"])
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


def count_step(state: dict[str, Tensor]) -> Any:
    """Advance and return the step count: a number on a CPU, for torch's own rounding."""
    state["step"] += 1
    return state["step"].item() if state["step"].device.type == "cpu" else state["step"].double()


def narrowed(x: Any, like: Tensor) -> Any:
    """A tensor of one element as one of no dimension, in the dtype of the arithmetic.

    Else two 0-dim tensors would be promoted, and shape (1, 1) would spread to the weights.
    """
    return x.reshape(()).to(like.dtype) if isinstance(x, Tensor) else x


def adam(w: Tensor, u: Tensor, state: dict[str, Tensor], group: Group) -> None:
    beta1, beta2 = group["betas"]
    lr = narrowed(group["lr"], w)
    if group["maximize"]:
        u = -u
    if group["weight_decay"] != 0:
        if group["decoupled_weight_decay"]:
            w.mul_(1 - lr * group["weight_decay"])
        else:
            u = u.add(w, alpha=group["weight_decay"])
    step = count_step(state)
    state["exp_avg"].lerp_(u, 1 - beta1)
    state["exp_avg_sq"].mul_(beta2).addcmul_(u, u, value=1 - beta2)
    second = state["exp_avg_sq"]
    if group["amsgrad"]:
        second = torch.maximum(state["max_exp_avg_sq"], second, out=state["max_exp_avg_sq"])
    step_size = narrowed(lr / (1 - beta1**step), w)
    correction = narrowed((1 - beta2**step) ** 0.5, w)
    denominator = (second.sqrt() / correction).add_(group["eps"])
    w.add_(-step_size * state["exp_avg"] / denominator)


def adagrad(w: Tensor, u: Tensor, state: dict[str, Tensor], group: Group) -> None:
    if group["maximize"]:
        u = -u
    if group["weight_decay"] != 0:
        u = u.add(w, alpha=group["weight_decay"])
    step = count_step(state)
    state["sum"].addcmul_(u, u)
    step_size = narrowed(group["lr"] / (1 + (step - 1) * group["lr_decay"]), w)
    w.add_(-step_size * u / state["sum"].sqrt().add_(group["eps"]))


def adagrad_norm(w: Tensor, u: Tensor, group: Group, squared_norms: Tensor) -> None:
    lr = narrowed(group["lr"], w)
    if group.get("weight_decay", 0.0) != 0:
        w.mul_(1 - lr * group["weight_decay"])
    # 0 where nothing has been accumulated: every gradient so far was zero
    scale = torch.where(squared_norms == 0, 0.0, lr / squared_norms.sqrt())
    w.add_((scale if group.get("maximize") else -scale).to(w.dtype) * u)


def uncorrected_adam(w: Tensor, u: Tensor, state: dict[str, Tensor], group: Group) -> None:
    """LightSAM's and AdaSAM's: no bias correction, no eps, decoupled weight decay."""
    beta1, beta2 = group["betas"]
    lr = narrowed(group["lr"], w)
    w.mul_(1 - lr * group["weight_decay"])
    state["exp_avg"].lerp_(u, 1 - beta1)
    state["exp_avg_sq"].mul_(beta2).addcmul_(u, u, value=1 - beta2)
    second = state["exp_avg_sq"]
    if group["amsgrad"]:
        second = torch.maximum(state["max_exp_avg_sq"], second, out=state["max_exp_avg_sq"])
    w.sub_(lr * over_root(state["exp_avg"], second))


def uncorrected_adagrad(w: Tensor, u: Tensor, state: dict[str, Tensor], group: Group) -> None:
    lr = narrowed(group["lr"], w)
    w.mul_(1 - lr * group["weight_decay"])
    state["sum"].addcmul_(u, u)
    w.sub_(lr * over_root(u, state["sum"]))


def base_update(
    base: Base, w: Tensor, u: Tensor, state: dict[str, Tensor], group: Group, fresh: bool,
    squared_norms: Tensor,
) -> None:  # fmt: skip
    if base.name == "sgd":
        sgd(w, u, state, group, fresh)
    elif base.name == "adam":
        adam(w, u, state, group)
    elif base.name == "adagrad":
        adagrad(w, u, state, group)
    elif base.name == "adagrad_norm":
        adagrad_norm(w, u, group, squared_norms)
    elif base.name == "uncorrected_adam":
        uncorrected_adam(w, u, state, group)
    else:
        uncorrected_adagrad(w, u, state, group)
