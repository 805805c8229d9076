"""Checks what LETS is given: its arguments, the losses of its closures, and a state dict."""

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from fastsam.step.arguments import Number, shown
from fastsam.step.checks import check_closure_free
from fastsam.step.loading import check_state_dict, parts_in
from fastsam.step.receiver import Receiver, check_count, check_scalar, number_of
from fastsam.step.rule import Base


def check_lets(rho_lr: Any, rho_optimizer: Any, groups: Sequence[Any]) -> float:
    """The arguments of LETS, and the groups of the optimizer that it wraps; ``rho_lr`` as kept."""
    rho_lr = Number(tensors=None)("rho_lr", rho_lr)
    if not (isinstance(rho_optimizer, type) and issubclass(rho_optimizer, Optimizer)):
        raise TypeError(
            "rho_optimizer must be a subclass of torch.optim.Optimizer (the class itself), got "
            f"{shown(rho_optimizer)}"
        )
    check_closure_free("rho_optimizer", rho_optimizer)
    if not float(groups[0]["rho"]) > 0:
        raise ValueError(
            f"rho must be above 0 in the first group, to be learned, got {groups[0]['rho']}"
        )
    if not all(isinstance(group.get("lr"), (Real, Tensor)) for group in groups):
        raise ValueError("lr must be a number or a tensor in every group: the radius depends on it")
    return float(rho_lr)


def check_loss(name: str, loss: Any, like: Tensor) -> Tensor:
    """What a closure returned, as a 0-dim tensor of the dtype and on the device of ``like``."""
    if isinstance(loss, Real):  # filled in: a copy from the host would wait for the device
        return torch.full_like(like, float(loss))
    if not (isinstance(loss, Tensor) and loss.numel() == 1):
        raise RuntimeError(
            f"{name} must return the loss, a number or a tensor of one, got {loss!r}"
        )
    return loss.detach().reshape(()).to(like)


def check_learned(own: Any, groups: int, optimizer: Optimizer, rule: Base | None) -> None:
    """What a state dict of LETS has for the radius.

    Args:
        own: That.
        groups: How many groups there are.
        optimizer: The scalar optimizer.
        rule: Its declaration, if it has one.

    Raises:
        ValueError: If it is not what this optimizer would save.
    """
    needed = {"log_rho", "ratios", "steps", "optimizer"}
    good = isinstance(own, Mapping) and own.keys() >= needed
    if not (good and isinstance(own["ratios"], (list, tuple)) and len(own["ratios"]) == groups):
        raise ValueError("state_dict['lets'] must be made by LETS with as many groups")
    name = type(optimizer).__name__
    maker = own.get("rho_optimizer", name)
    if maker != name:
        raise ValueError(
            f"state_dict['lets'] was made with rho_optimizer={maker} and cannot be loaded with "
            f"rho_optimizer={name}"
        )
    check_scalar("log_rho", own["log_rho"])
    radius = torch.tensor(number_of(own["log_rho"]), dtype=torch.float64).exp()
    if not 0 < float(radius) < math.inf:
        raise ValueError(
            f"log_rho in a state dict must be the log of a radius, got {own['log_rho']}"
        )
    for ratio in own["ratios"]:
        check_scalar("ratios", ratio, least=0)
    check_count("steps", own["steps"])
    try:
        if not isinstance(own["optimizer"], Mapping):
            raise ValueError(f"it must be a state dict, got {shown(own['optimizer'])}")
        count = len(optimizer.param_groups)
        receiver = Receiver("", optimizer.param_groups, [optimizer] * count, [rule] * count)
        check_state_dict(own["optimizer"], receiver)
        if len(own["optimizer"]["param_groups"]) != count:
            raise ValueError(f"it must have {count} group")
    except ValueError as error:
        message = f"state_dict['lets']['optimizer'] does not fit rho_optimizer={name}: {error}"
        raise ValueError(message) from error


def check_radius(given: Mapping[str, Any], present: Any) -> None:
    """The first radius in a state dict of the optimizer that LETS wraps.

    Raises:
        ValueError: If it cannot be learned.
    """
    groups, _ = parts_in(given)
    rho = groups[0].get("rho", present) if groups else present
    number = number_of(rho)
    if number is None or not 0 < number < math.inf:
        raise ValueError(f"rho must be above 0 in the first group, to be learned, got {rho}")
