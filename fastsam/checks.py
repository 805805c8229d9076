"""Bad input, found before anything changes: each error names the argument and what is allowed."""

import inspect
import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def check_group(group: Mapping[str, Any], fused: bool) -> None:
    """A parameter group's radius and eta, and what a fused base optimizer cannot do."""
    for key in ("rho", "eta"):
        value = group.get(key, 0.0)
        if isinstance(value, Tensor):
            if value.ndim != 0:
                raise ValueError(
                    f"{key} must be a number or a 0-dim tensor, got shape {tuple(value.shape)}"
                )
        elif not (isinstance(value, Real) and 0 <= float(value) < math.inf):
            raise ValueError(f"{key} must be at least 0 and finite, got {value!r}")
    if group.get("differentiable") and fused:
        raise ValueError("differentiable must be False with a fused base optimizer")


def check_max_grad_norm(value: Any) -> None:
    """The bound on the final gradient's norm."""
    if value is not None and not (isinstance(value, Real) and float(value) > 0):
        raise ValueError(f"max_grad_norm must be None or above 0, got {value!r}")


def check_lam(value: Any) -> float:
    """Unified SAM's weight, or what its schedule gave."""
    if isinstance(value, Real) and 0 <= float(value) <= 1:
        return float(value)
    raise ValueError(
        "lam must be a number in [0, 1], '1/t', '1-1/t', or a callable that gives a number in "
        f"[0, 1], got {value!r}"
    )


def check_base(base: Any, not_below: type) -> None:
    """The base optimizer: a class, not sharpness-aware itself, that steps without a closure."""
    if not (isinstance(base, type) and issubclass(base, Optimizer)):
        raise TypeError(
            f"base_optimizer must be a subclass of torch.optim.Optimizer (the class itself), "
            f"got {base!r}"
        )
    if issubclass(base, not_below):
        raise TypeError(f"base_optimizer must not be sharpness-aware itself, got {base.__name__}")
    closure = inspect.signature(base.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise TypeError(
            f"base_optimizer must step without a closure, and {base.__name__} needs one"
        )


def check_keys(base: Optimizer, own: Sequence[str]) -> None:
    """A base optimizer whose group keys mean something else here."""
    if clash := [key for key in own if key in base.defaults]:
        raise TypeError(
            f"base_optimizer must have none of the group keys {', '.join(own)}, which are "
            f"fastsam's, and {type(base).__name__} has {', '.join(clash)}"
        )


def check_tensors(param: Tensor, grad: Tensor, others: Sequence[Tensor], name: str) -> None:
    """A parameter and its gradient, among the others that take part in the step."""
    if grad.layout != torch.strided:
        raise RuntimeError(f"{name} does not support sparse gradients, got {grad.layout}")
    if is_traceable_wrapper_subclass(param):
        raise RuntimeError(f"{name} does not support {type(param).__name__} parameters")
    if grad.shape != param.shape:
        raise RuntimeError(
            f"{name} got a gradient of shape {tuple(grad.shape)} for a parameter of shape "
            f"{tuple(param.shape)}"
        )
    if param.is_complex() or grad.is_complex():
        raise RuntimeError(
            f"{name} does not support complex gradients; optimize torch.view_as_real(param)"
        )
    if torch._debug_has_internal_overlap(param) == 1:
        raise RuntimeError(
            f"{name} needs parameters whose elements have memory of their own, got one of shape "
            f"{tuple(param.shape)} and strides {param.stride()}; optimize a clone"
        )
    if others and param.device != others[0].device:
        raise RuntimeError(
            f"{name} needs all parameters on one device, got {others[0].device} and {param.device}"
        )
