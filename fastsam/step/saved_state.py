"""What a parameter's entry in a state dict has to be, and which dtypes its tensors then get."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from fastsam.arithmetic import wide_dtype

from .makers import made_by_other
from .precision import MASTER
from .receiver import check_count, check_scalar, number_of
from .rule import Base, Group
from .sharding import check_shards
from .torch_state import NUMBER, is_torchs, shapes_of


def _check_tensor(
    name: str, value: Any, param: Tensor, where: str, shape: tuple[int, ...] | None = None
) -> None:
    """A state tensor, of the parameter's shape or of another."""
    wrong = ""
    if not isinstance(value, Tensor):
        wrong = f"a tensor, got {type(value).__name__}"
    elif value.layout != torch.strided or (value.is_meta and not param.is_meta):
        wrong = f"a tensor with memory of its own, got {value.layout} on {value.device}"
    elif not value.is_floating_point():
        wrong = f"of a floating dtype, got {value.dtype}"
    if wrong:
        raise ValueError(f"state {name!r} {where} in a state dict must be {wrong}")
    if value.shape != (param.shape if shape is None else shape):
        raise ValueError(
            f"state {name!r} {where} has shape {tuple(value.shape)} and its parameter "
            f"{tuple(param.shape)}: the state dict was made for other parameters"
        )


def check_saved_ascent(
    entry: Mapping[str, Any], names: Mapping[str, float], param: Tensor, where: str, method: str
) -> None:
    """An ascent's: all of it or nothing, and nothing of another method's."""
    for name, value in entry.items():
        if name in names:
            _check_tensor(name, value, param, where)
        elif isinstance(name, str) and name.startswith("ascent_"):
            raise ValueError(
                f"state {name!r} {where} in a state dict is another method's: {method} has none "
                "of that name"
            )
    if missing := [name for name in names if name not in entry]:
        if len(missing) < len(names):
            raise _missing(missing[0], where, entry)


def _missing(name: str, where: str, entry: Mapping[str, Any]) -> ValueError:
    return ValueError(
        f"state {name!r} {where} is missing in the state dict, which has {', '.join(entry)}"
    )


def check_saved_base(
    entry: Mapping[str, Any], rule: Base, names: Mapping[str, float], param: Tensor, where: str
) -> None:
    """A fused base's: nothing of it, or all but what starts from the next gradient."""
    for name, value in entry.items():
        if name == MASTER or (name in names and value is not None):
            _check_tensor(name, value, param, where)
    if "step" in entry:
        if not rule.counts_steps:
            raise ValueError(
                f"state 'step' {where} in a state dict is another optimizer's: {rule.name} counts "
                "no steps"
            )
        check_count(f"state 'step' {where}", entry["step"])
    needed = [name for name in names if name != rule.starts_from_gradient]
    needed += ["step"] * rule.counts_steps
    missing = [name for name in needed if entry.get(name) is None]
    if missing and len(missing) < len(needed):
        raise _missing(missing[0], where, entry)


def check_saved_unfused(
    entry: Mapping[str, Any], base: Optimizer, group: Group, param: Tensor, where: str
) -> None:
    """Of a base whose state is its own business: what can be known of it.

    torch's optimizers create all state of a parameter at once.
    """
    shapes = shapes_of(base, group, param, number_of)
    own = {name: x for name, x in entry.items() if not str(name).startswith("ascent_")}
    for name, value in own.items():
        if shapes is None:
            if name == "step" and is_torchs(base):
                check_count(f"state 'step' {where}", value)
            elif hasattr(value, "__array__") and not isinstance(value, Tensor):
                _check_tensor(name, value, param, where)
        elif name == "step":
            check_count(f"state 'step' {where}", value)
        elif name not in shapes or shapes[name] is not NUMBER:
            _check_tensor(name, value, param, where, shapes.get(name))
        else:
            check_scalar(f"state {name!r} {where}", value)
    missing = [name for name in shapes or () if name not in own]
    if own and missing:
        if strange := [name for name in own if name not in (shapes or ())]:
            raise made_by_other(
                f"another optimizer (its state {where} has {strange[0]!r} and lacks "
                f"{missing[0]!r})",
                ("", type(base).__name__),
            )
        raise _missing(missing[0], where, entry)


def check_saved_shards(entry: Mapping[str, Any], param: Tensor) -> None:
    """State tensors are sharded as their parameter is; ValueError if not."""
    try:
        check_shards(dict(entry), param)
    except RuntimeError as error:
        raise ValueError(str(error)) from error


# --- what goes with what ---


def fitting(x: Tensor, param: Tensor, exact: bool = False) -> Tensor:
    """A state tensor in a dtype that goes with its parameter's.

    Only tensors of the parameter's shape are cast. float64 goes with float64 alone, in both
    directions, and otherwise what there is stays.

    Args:
        x: The state tensor.
        param: Its parameter.
        exact: Whether only the parameter's own dtype goes with it.
    """
    if x.shape != param.shape or x.dtype == param.dtype or not x.is_floating_point():
        return x
    if exact:
        return x.to(param.dtype)
    if (x.dtype == torch.float64) == (param.dtype == torch.float64):
        return x
    return x.to(wide_dtype(param))


def is_fastsams(name: Any) -> bool:
    """Whether a state tensor is fastsam's own, in a dtype that no base optimizer has a say in."""
    return str(name).startswith(("ascent_", MASTER))


def is_exact(base: Optimizer, rule: Base | None) -> bool:
    """Whether a base steps with state of the parameters' dtype alone: torch's that is not fused."""
    return rule is None and is_torchs(base)
