"""Base updates: (weight, descent direction u, state, hyper-parameters) -> (weight, new state)."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

Array = np.ndarray
State = dict[str, Any]
Group = dict[str, Any]


def _sgd(w: Array, u: Array, state: State, h: Group) -> tuple[Array, State]:
    """d = u + wd w; buf = mu buf + (1 - damp) d, first buf = d; w -= lr (buf or d + mu buf)."""
    d = u + h["weight_decay"] * w
    if h["momentum"] == 0:
        return w - h["lr"] * d, {}
    old = state.get("momentum_buffer")
    buf = d if old is None else h["momentum"] * old + (1 - h["dampening"]) * d
    direction = d + h["momentum"] * buf if h["nesterov"] else buf
    return w - h["lr"] * direction, {"momentum_buffer": buf}


def _adam(w: Array, u: Array, state: State, h: Group) -> tuple[Array, State]:
    """m = b1 m + (1-b1) d; v = b2 v + (1-b2) d^2; w -= lr m^ / (sqrt(v^) + eps).

    m^ = m / (1 - b1^t), v^ = v / (1 - b2^t). Adam (Kingma & Ba 2015): d = u + wd w. AdamW
    (Loshchilov & Hutter 2019): d = u, and w first decays by lr wd. amsgrad (Reddi et al. 2018)
    has the maximum over t of v in the place of v, and corrects that maximum's bias.
    """
    b1, b2 = h["betas"]
    t = state.get("step", 0) + 1
    d, decayed = u + h["weight_decay"] * w, w
    if h["decoupled_weight_decay"]:
        d, decayed = u, (1 - h["lr"] * h["weight_decay"]) * w
    m = b1 * state.get("exp_avg", 0.0) + (1 - b1) * d
    v = b2 * state.get("exp_avg_sq", 0.0) + (1 - b2) * d * d
    new = {"step": t, "exp_avg": m, "exp_avg_sq": v}
    if h["amsgrad"]:
        v = new["max_exp_avg_sq"] = np.maximum(state.get("max_exp_avg_sq", 0.0), v)
    root = np.sqrt(v / _one_minus_power(b2, t))
    return decayed - h["lr"] * (m / _one_minus_power(b1, t)) / (root + h["eps"]), new


def _one_minus_power(beta: float, t: int) -> float:
    """1 - beta^t without cancellation, which costs three digits at beta = 0.999 and t = 1."""
    return -math.expm1(t * math.log(beta)) if beta > 0 else 1.0


def _adagrad(w: Array, u: Array, state: State, h: Group) -> tuple[Array, State]:
    """Duchi et al. 2011: d = u + wd w; sum += d^2; w -= lr/(1+(t-1)decay) d/(sqrt(sum)+eps)."""
    d = u + h["weight_decay"] * w
    t = state["step"] + 1
    total = state["sum"] + d * d
    lr = h["lr"] / (1 + (t - 1) * h["lr_decay"])
    return w - lr * d / (np.sqrt(total) + h["eps"]), {"step": t, "sum": total}


def _adagrad_norm(w: Array, u: Array, state: State, h: Group) -> tuple[Array, State]:
    """Ward, Wu & Bottou 2019; `Oracle.descend` has divided u by the square root of b2."""
    return w - h["lr"] * u, {}


def over_root(x: Array, a: Array) -> Array:
    """x / sqrt(a); 0 where a is 0, as an average of squares is once it has forgotten its start."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(a == 0, 0.0, x / np.sqrt(a))


# AdaSAM's base and LightSAM's: no correction of biases and nothing added to a root. The second
# moments start at eps^2 instead, at the step that first needs them.


def _uncorrected_adam(w: Array, u: Array, state: State, h: Group) -> tuple[Array, State]:
    """LightSAM III: m = b1 m + (1-b1) u; v = b2 v + (1-b2) u^2, from eps^2; w -= lr m/sqrt(v)."""
    new = _moments(u, state, h)
    return _decayed(w, h) - h["lr"] * over_root(new["exp_avg"], new["exp_avg_sq"]), new


def _uncorrected_amsgrad(w: Array, u: Array, state: State, h: Group) -> tuple[Array, State]:
    """AdaSAM (Sun et al. 2023): the same, but for v^ = max(v^, v), from eps^2, under the root."""
    new = _moments(u, state, h)
    largest = np.maximum(state.get("max_exp_avg_sq", h["eps"] ** 2), new["exp_avg_sq"])
    new["max_exp_avg_sq"] = largest
    return _decayed(w, h) - h["lr"] * over_root(new["exp_avg"], largest), new


def _light_adagrad(w: Array, u: Array, state: State, h: Group) -> tuple[Array, State]:
    """LightSAM II: sum += u^2, from eps^2; w -= lr u/sqrt(sum)."""
    total = state.get("sum", h["eps"] ** 2) + u * u
    new = {"sum": total}
    return _decayed(w, h) - h["lr"] * over_root(u, total), new


def _light_adagrad_norm(w: Array, u: Array, state: State, h: Group) -> tuple[Array, State]:
    """LightSAM I; as in AdaGrad-Norm, u comes divided by the square root of b2."""
    return _decayed(w, h) - h["lr"] * u, {}


def _moments(u: Array, state: State, h: Group) -> State:
    b1, b2 = h["betas"]
    return {
        "exp_avg": b1 * state.get("exp_avg", 0.0) + (1 - b1) * u,
        "exp_avg_sq": b2 * state.get("exp_avg_sq", h["eps"] ** 2) + (1 - b2) * u * u,
    }


def _decayed(w: Array, h: Group) -> Array:
    return (1 - h["lr"] * h["weight_decay"]) * w


def _sps(w: Array, u: Array, state: State, h: Group) -> tuple[Array, State]:
    """Of the size that `Oracle.descend` has found; one of 0 leaves the weights alone."""
    size = min(h.get("rate", np.inf), h["lr"])
    return (w - size * (u + h["weight_decay"] * w) if size != 0 else w), {}


_SGD = {"lr": 1e-3, "momentum": 0.0, "dampening": 0.0, "nesterov": False, "weight_decay": 0.0}
_ADAM = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "amsgrad": False}
_ADAGRAD = {"lr": 1e-2, "lr_decay": 0.0, "eps": 1e-10, "weight_decay": 0.0}
_LIGHT = {"lr": 1e-3, "eps": 1e-8, "weight_decay": 0.0}
_UNCORRECTED = _LIGHT | {"betas": (0.9, 0.999)}
BASES: dict[str, tuple[Callable[..., tuple[Array, State]], Group]] = {
    "sgd": (_sgd, _SGD),
    "adam": (_adam, _ADAM | {"weight_decay": 0.0, "decoupled_weight_decay": False}),
    "adamw": (_adam, _ADAM | {"weight_decay": 1e-2, "decoupled_weight_decay": True}),
    "adagrad": (_adagrad, _ADAGRAD | {"initial_accumulator_value": 0.0}),
    "adagrad_norm": (_adagrad_norm, {"lr": 1e-2, "initial_accumulator_value": 0.0}),
    "uncorrected_adam": (_uncorrected_adam, _UNCORRECTED),
    "uncorrected_amsgrad": (_uncorrected_amsgrad, _UNCORRECTED),
    "light_adagrad": (_light_adagrad, _LIGHT),
    "light_adagrad_norm": (_light_adagrad_norm, _LIGHT),
    "sps": (_sps, {"lr": 1.0, "weight_decay": 5e-4, "loss_min": 0.0}),
}

# Those to which `Oracle.descend` hands u divided by the square root of its scalar b2.
BY_NORM = ("adagrad_norm", "light_adagrad_norm")
