"""SAM-SPS's update: plain gradient steps whose size the descent rule gives."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from fastsam.arithmetic import narrowed
from fastsam.step.arguments import RATE, WEIGHT, Argument
from fastsam.step.group_arguments import settle
from fastsam.step.rule import Base, Columns, Group

ARGUMENTS: dict[str, Argument] = {"lr": RATE, "weight_decay": WEIGHT}


class PolyakSteps(Optimizer):
    """Groups and checks of the update, which runs only fused; ``lr`` is the largest step size."""

    def __init__(self, params: ParamsT, lr: float | Tensor, weight_decay: float):
        defaults = dict(lr=lr, weight_decay=weight_decay)
        settle(defaults, ARGUMENTS)
        super().__init__(params, defaults)


def _columns(group: Group) -> Columns:
    return {"LR": group["lr"], "WEIGHT_DECAY": group["weight_decay"]}


def _check(group: Mapping[str, Any]) -> None:
    if group.get("maximize"):
        raise ValueError("maximize must be False with SAMSPS, which minimises its loss, got True")


def _update(
    w: Tensor, u: Tensor, state: dict[str, Tensor], group: Group, step: Any, fresh: bool,
    rate: Tensor,
) -> None:  # fmt: skip
    """A step of size 0 leaves the weights alone, whatever ``u`` is."""
    lr = narrowed(group["lr"], w)
    size = torch.where(rate < lr, rate, lr).to(w.dtype)
    if group["weight_decay"] != 0:
        u = u + narrowed(group["weight_decay"], w) * w
    w.copy_(torch.where(size != 0, w - size * u, w))


POLYAK = Base(
    name="sps", kernel="fastsam.kernels.base.sps", update=_update, columns=_columns,
    takes_rate=True, arguments=ARGUMENTS, check=_check,
    eager="fastsam.backends.eager.fused:Polyak",
)  # fmt: skip
