"""What torch's optimizers that are not fused keep for a parameter, by name and shape.

Torch says it nowhere but in the code of each: here it is a table, which a test compares with them.
"""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch.optim.optimizer import Optimizer

Shape = tuple[int, ...]
#: In the place of a shape: one number.
NUMBER: Shape | None = None
#: All of these but Muon also have ``step``.
NAMES: dict[str, tuple[str, ...]] = {
    "ASGD": ("eta", "mu", "ax"),
    "Adadelta": ("square_avg", "acc_delta"),
    "Adafactor": (),  # by the number of dimensions
    "Adamax": ("exp_avg", "exp_inf"),
    "Muon": ("momentum_buffer",),
    "NAdam": ("mu_product", "exp_avg", "exp_avg_sq"),
    "RAdam": ("exp_avg", "exp_avg_sq"),
    "RMSprop": ("square_avg",),
    "Rprop": ("prev", "step_size"),
}
NUMBERS = ("step", "eta", "mu", "mu_product")
#: What only some hyper-parameters bring, by theirs.
SWITCHED = {"RMSprop": {"momentum": "momentum_buffer", "centered": "grad_avg"}}


def is_torchs(base: Optimizer) -> bool:
    """Whether an optimizer's class is one of torch's own; its users' subclasses are not."""
    return type(base).__module__.startswith("torch.optim")


def shapes_of(
    base: Optimizer, group: Mapping[str, Any], param: Tensor, number: Callable[[Any], float | None]
) -> dict[str, Shape | None] | None:
    """What a parameter's entry has from the first step on, each with its shape.

    Args:
        base: The optimizer.
        group: The parameter's.
        param: The parameter.
        number: Reads a hyper-parameter.

    Returns:
        By name, ``NUMBER`` for numbers; None of classes that are not in the table.
    """
    name = type(base).__name__
    if not is_torchs(base) or name not in NAMES:
        return None
    shape = tuple(param.shape)
    shapes: dict[str, Shape | None] = {} if name == "Muon" else {"step": NUMBER}
    if name == "Adafactor" and len(shape) > 1:
        shapes |= {"row_var": (*shape[:-1], 1), "col_var": (*shape[:-2], 1, shape[-1])}
    elif name == "Adafactor":
        shapes["variance"] = shape
    for key in NAMES[name]:
        shapes[key] = NUMBER if key in NUMBERS else shape
    for switch, key in SWITCHED.get(name, {}).items():
        if group.get(switch) is True or number(group.get(switch)):
            shapes[key] = shape
    return shapes
