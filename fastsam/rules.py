"""What a step is made of, as data: the ascent, the descent and the base update of a method.

Frontends fill these in; backends read them. The equations themselves are in ``kernels/`` and in
``backends/reference.py``.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .adagrad_norm import AdaGradNorm

Group = dict[str, Any]


@dataclass(frozen=True)
class Base:
    """A base optimizer whose update runs inside fastsam's own update pass.

    Attributes:
        name: Selects the equation.
        columns: A group's hyper-parameters in the order in which the kernel reads them.
        states: Names of the per-element state tensors that a group's parameters need, as
            ``torch.optim`` names them.
        counts_steps: Whether parameters carry torch's ``step`` count.
        needs_norm: Whether the update uses the global norm of ``u``.
    """

    name: str
    columns: Callable[[Group], list[Any]]
    states: Callable[[Group], tuple[str, ...]]
    counts_steps: bool = False
    needs_norm: bool = False

    def prepare(self, state: dict[str, Any], param: Tensor, grad: Tensor, group: Group) -> bool:
        """Create what is missing in a parameter's state; True if its momentum buffer is new.

        Raises:
            RuntimeError: If a state tensor has not the parameter's shape.
        """
        fresh, names = False, self.states(group)
        if self.counts_steps:
            step = state.get("step", 0.0)
            if not isinstance(step, Tensor) or step.device != param.device:
                # filled in, not copied: a copy from the host would wait for the device
                step = torch.full((), float(step), device=param.device)
            state["step"] = step.to(torch.float32)
        for name in names:
            if state.get(name) is None:
                # torch clones the first gradient into the buffer, so it has the gradient's dtype
                dtype = grad.dtype if name == "momentum_buffer" else param.dtype
                fill = group["initial_accumulator_value"] if name == "sum" else 0.0
                state[name] = torch.full_like(param, fill, dtype=dtype)
                fresh = name == "momentum_buffer"
            elif state[name].shape != param.shape:
                # the kernels walk raw memory: this would be out of bounds
                raise RuntimeError(
                    f"state {name!r} has shape {tuple(state[name].shape)} and its parameter "
                    f"{tuple(param.shape)}: the state dict was made for other parameters"
                )
            elif state[name].device != param.device:  # the model moved after its optimizer
                state[name] = state[name].to(param.device)
        dtypes = [state[name].dtype for name in names]
        if len(set(dtypes)) > 1:  # from a checkpoint put together by hand
            widest = functools.reduce(torch.promote_types, dtypes)
            state.update({name: state[name].to(widest) for name in names})
        return fresh


def _sign(group: Group) -> float:
    return -1.0 if group["maximize"] else 1.0


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


def _adam_states(g: Group) -> tuple[str, ...]:
    states = ("exp_avg", "exp_avg_sq")
    return (*states, "max_exp_avg_sq") if g["amsgrad"] else states


def _adagrad_states(g: Group) -> tuple[str, ...]:
    return ("sum",)


def _sgd_states(g: Group) -> tuple[str, ...]:
    return ("momentum_buffer",) if g["momentum"] != 0 else ()


def _adagrad_norm_columns(g: Group) -> list[Any]:
    return [_sign(g) * g["lr"]]


def _adagrad_norm_states(g: Group) -> tuple[str, ...]:
    return ()


# functions with names, not lambdas: an optimizer that holds them can be pickled
SGD = Base("sgd", _sgd_columns, _sgd_states)
ADAM = Base("adam", _adam_columns, _adam_states, counts_steps=True)
ADAGRAD = Base("adagrad", _adagrad_columns, _adagrad_states, counts_steps=True)
ADAGRAD_NORM = Base("adagrad_norm", _adagrad_norm_columns, _adagrad_norm_states, needs_norm=True)

#: The fused base optimizers. Exact classes: a subclass may change the update.
BASES: dict[type, Base] = {
    torch.optim.SGD: SGD,
    torch.optim.Adam: ADAM,
    torch.optim.AdamW: ADAM,
    torch.optim.Adagrad: ADAGRAD,
    AdaGradNorm: ADAGRAD_NORM,
}


@dataclass(frozen=True)
class Step:
    """One step, as the backends see it.

    Attributes:
        groups: The optimizer's parameter groups.
        base: The fused base update; None leaves the update to a foreign optimizer.
        lam: Unified SAM's weight of normalisation in this step.
        renormalize: SSAM's descent rule.
        max_grad_norm: Bound on the norm of ``u``.
        skip_nonfinite: Whether a non-finite second gradient leaves weights and state alone.
    """

    groups: Sequence[Group]
    base: Base | None
    lam: float = 1.0
    renormalize: bool = False
    max_grad_norm: float | None = None
    skip_nonfinite: bool = False

    @property
    def adaptive(self) -> bool:
        return any(group["adaptive"] for group in self.groups)

    @property
    def rescales(self) -> bool:
        """Whether ``u`` may differ from the second gradient."""
        return self.renormalize or self.max_grad_norm is not None

    @property
    def needs_descent_norm(self) -> bool:
        needs_norm = self.base is not None and self.base.needs_norm
        return self.rescales or self.skip_nonfinite or needs_norm


@dataclass
class Batch:
    """The parameters that take part in one pass, in the order of their groups."""

    params: list[Tensor]
    grads: list[Tensor]
    groups: list[int]  # index of each parameter's group
    states: list[dict[str, Any]]
    fresh: list[bool]  # whether the momentum buffer was created for this very update
