"""The fused base updates as data, and the optimizer classes behind LightSAM and AdaSAM."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from .adagrad_norm import AdaGradNorm
from .checks import check_uncorrected

Group = dict[str, Any]


@dataclass(frozen=True)
class Base:
    """A base optimizer whose update runs inside fastsam's own update pass.

    Attributes:
        name: Selects the equation.
        columns: A group's hyper-parameters in the order in which the kernel reads them.
        states: Names of the per-element state tensors that a group's parameters need, as
            ``torch.optim`` names them, and where they start.
        counts_steps: Whether parameters carry torch's ``step`` count.
        needs_norm: Whether the update uses the global norm of ``u``.
        wide: Whether state is in float32 whatever the parameter's dtype (float64 for float64).
    """

    name: str
    columns: Callable[[Group], list[Any]]
    states: Callable[[Group], dict[str, float]]
    counts_steps: bool = False
    needs_norm: bool = False
    wide: bool = False

    def prepare(
        self, state: dict[str, Any], param: Tensor, grad: Tensor, group: Group, wide: bool = False
    ) -> bool:
        """Create what is missing in a parameter's state; True if its momentum buffer is new.

        ``wide`` is for a parameter with master weights: its state is in float32, too.

        Raises:
            RuntimeError: If a state tensor has not the parameter's shape.
        """
        fresh, starts = False, self.states(group)
        if self.counts_steps:
            step = state.get("step", 0.0)
            if not isinstance(step, Tensor) or step.device != param.device:
                # filled in, not copied: a copy from the host would wait for the device
                step = torch.full((), float(step), device=param.device)
            state["step"] = step.to(torch.float32)
        for name, start in starts.items():
            if state.get(name) is None:
                # torch clones the first gradient into the buffer, so it has the gradient's dtype
                dtype = grad.dtype if name == "momentum_buffer" else param.dtype
                if self.wide or wide:
                    dtype = torch.promote_types(param.dtype, torch.float32)
                state[name] = torch.full_like(param, start, dtype=dtype)
                fresh = name == "momentum_buffer"
            elif state[name].shape != param.shape:
                # the kernels walk raw memory: this would be out of bounds
                raise RuntimeError(
                    f"state {name!r} has shape {tuple(state[name].shape)} and its parameter "
                    f"{tuple(param.shape)}: the state dict was made for other parameters"
                )
            elif state[name].device != param.device:  # the model moved after its optimizer
                state[name] = state[name].to(param.device)
            if self.wide or wide:  # torch's own, or a checkpoint's
                state[name] = state[name].to(torch.promote_types(state[name].dtype, torch.float32))
        dtypes = [state[name].dtype for name in starts]
        if len(set(dtypes)) > 1:  # from a checkpoint put together by hand
            widest = functools.reduce(torch.promote_types, dtypes)
            state.update({name: state[name].to(widest) for name in starts})
        return fresh


# --- columns and states of each base: functions with names, so that optimizers can be pickled ---


def _sign(group: Group) -> float:
    return -1.0 if group.get("maximize") else 1.0


def signed_lr(group: Group) -> Any:
    """The learning rate, negative where the base maximizes; 0 where it has none."""
    lr = group.get("lr")
    if isinstance(lr, Tensor):
        lr = lr.reshape(())
    return 0.0 if lr is None else _sign(group) * lr


def _sgd_columns(g: Group) -> list[Any]:
    return [g["lr"], g["momentum"], 1 - g["dampening"], g["weight_decay"],
            float(g["nesterov"]), _sign(g)]  # fmt: skip


def _adam_columns(g: Group) -> list[Any]:
    # differences and logarithms are taken here in float64: 1 - float32(0.999) has 4 good digits
    beta1, beta2 = g["betas"]
    log1, log2 = (math.log(beta) if beta > 0 else -math.inf for beta in (beta1, beta2))
    decoupled = g["decoupled_weight_decay"]
    return [g["lr"], 1 - beta1, beta2, 1 - beta2, log1, log2, g["eps"],
            0.0 if decoupled else g["weight_decay"], g["weight_decay"] if decoupled else 0.0,
            _sign(g)]  # fmt: skip


def _adagrad_columns(g: Group) -> list[Any]:
    return [g["lr"], g["lr_decay"], g["eps"], g["weight_decay"], _sign(g)]


def _adagrad_norm_columns(g: Group) -> list[Any]:
    return [g["lr"], _sign(g), g.get("weight_decay", 0.0)]


def _uncorrected_adam_columns(g: Group) -> list[Any]:
    beta1, beta2 = g["betas"]
    return [g["lr"], 1 - beta1, beta2, 1 - beta2, g["weight_decay"]]


def _uncorrected_adagrad_columns(g: Group) -> list[Any]:
    return [g["lr"], g["weight_decay"]]


def _no_states(g: Group) -> dict[str, float]:
    return {}


def _sgd_states(g: Group) -> dict[str, float]:
    return {"momentum_buffer": 0.0} if g["momentum"] != 0 else {}


def _adam_states(g: Group) -> dict[str, float]:
    names = ["exp_avg", "exp_avg_sq"] + ["max_exp_avg_sq"] * g["amsgrad"]
    return dict.fromkeys(names, 0.0)


def _adagrad_states(g: Group) -> dict[str, float]:
    return {"sum": g["initial_accumulator_value"]}


def _uncorrected_adam_states(g: Group) -> dict[str, float]:
    return _adam_states(g) | dict.fromkeys(list(_adam_states(g))[1:], g["eps"] ** 2)


def _uncorrected_adagrad_states(g: Group) -> dict[str, float]:
    return {"sum": g["eps"] ** 2}


SGD = Base("sgd", _sgd_columns, _sgd_states)
ADAM = Base("adam", _adam_columns, _adam_states, counts_steps=True)
ADAGRAD = Base("adagrad", _adagrad_columns, _adagrad_states, counts_steps=True)
ADAGRAD_NORM = Base("adagrad_norm", _adagrad_norm_columns, _no_states, needs_norm=True)
UNCORRECTED_ADAM = Base(
    "uncorrected_adam", _uncorrected_adam_columns, _uncorrected_adam_states, wide=True
)
UNCORRECTED_ADAGRAD = Base(
    "uncorrected_adagrad", _uncorrected_adagrad_columns, _uncorrected_adagrad_states, wide=True
)


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
    ):
        check_uncorrected({"lr": lr, "eps": eps, "weight_decay": weight_decay, "betas": betas})
        super().__init__(params, {"lr": lr, "eps": eps, "weight_decay": weight_decay,
                                  "betas": betas, "amsgrad": amsgrad})  # fmt: skip


class UncorrectedAdam(Uncorrected):
    """LightSAM III's update, and AdaSAM's with ``amsgrad``."""


class UncorrectedAdagrad(Uncorrected):
    """LightSAM II's update."""


class UncorrectedAdaGradNorm(Uncorrected):
    """LightSAM I's update."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.param_groups[0].setdefault("squared_norms", self.param_groups[0]["eps"] ** 2)


#: The fused base optimizers. Exact classes: a subclass may change the update.
BASES: dict[type, Base] = {
    torch.optim.SGD: SGD,
    torch.optim.Adam: ADAM,
    torch.optim.AdamW: ADAM,
    torch.optim.Adagrad: ADAGRAD,
    AdaGradNorm: ADAGRAD_NORM,
    UncorrectedAdam: UNCORRECTED_ADAM,
    UncorrectedAdagrad: UNCORRECTED_ADAGRAD,
    UncorrectedAdaGradNorm: ADAGRAD_NORM,
}
