"""Bad input, found before anything changes: each error names the argument and what is allowed."""

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .arguments import refuse, shown, unified_lam
from .checkpoint import SharedState, is_own
from .rule import Ascent, Base, Descent
from .spec import is_perturbed

#: What is said of parameters that DeepSpeed has taken over.
ZERO = (
    "fastsam does not support DeepSpeed's ZeRO, which partitions parameters and calls step "
    "without a closure; use FSDP2 (torch.distributed.fsdp.fully_shard) or DDP instead"
)

#: What is said of the parameters of the older FSDP.
FSDP1 = (
    "fastsam does not support FullyShardedDataParallel: its parameters do not say what they are "
    "shards of, and norms would cover only one rank's part; use FSDP2 "
    "(torch.distributed.fsdp.fully_shard) instead"
)


def check_perturb(groups: Iterable[Mapping[str, Any]]) -> None:
    """With ``renormalize`` every group is perturbed."""
    if not all(group.get("perturb", True) for group in groups):
        raise ValueError(
            "perturb must be True in every group with renormalize=True, which compares the norms "
            "of both gradients over all of them, got False"
        )


def check_ascent_steps(
    value: int, name: str, ascent: Ascent, descent: Descent | None, rounds: Mapping[str, bool]
) -> None:
    """How many first passes a step has, and what cannot have several.

    Args:
        value: What the user gave.
        name: The optimizer's.
        ascent, descent: Its rules.
        rounds: What keeps 16-bit weights, by its argument, and whether that was asked for.

    Raises:
        ValueError: If the optimizer cannot have several.
    """
    if value == 1:
        return
    if ascent.momentum:
        why = f"{name}, which perturbs along the same direction every time"
    elif ascent.advance is not None or ascent.accumulate is not None:
        why = f"{name}, whose ascent has state that follows one gradient a step"
    elif descent is not None:
        why = f"{name}, whose update takes the one first gradient"
    else:
        why = next((argument for argument, is_so in rounds.items() if is_so), "")
        if not why:
            return
        why += ", as w + e is rounded after every ascent, and the next would begin there"
    raise ValueError(f"ascent_steps must be 1 with {why}; got {value!r}")


def check_amplify(optimizer: Any, amplify: bool | float, ascent_steps: int) -> None:
    """Whether steps may be amplified.

    Raises:
        ValueError: If not.
    """
    if not amplify:
        return
    name = type(optimizer).__name__
    if optimizer.descent is not None:
        why = f"{name}, whose update is made of both gradients by itself"
    elif optimizer.ascent.momentum:
        why = f"{name}, whose step has no first gradient"
    elif optimizer.perturb_when is not None:
        why = "perturb_when, as it counts steps by perturb_every"
    elif ascent_steps != 1:
        why = f"ascent_steps={ascent_steps}, as it takes the one first gradient"
    else:
        return
    raise ValueError(f"amplify must be False with {why}; got {amplify!r}")


def check_stop(start: int, stop: int | None) -> None:
    """The steps that are sharpness-aware end after they begin."""
    if stop is not None and stop <= start:
        raise ValueError(f"stop must be None or an integer above start={start}, got {stop!r}")


def check_partitioned(params: Iterable[Tensor]) -> None:
    """Parameters of DeepSpeed's ZeRO, stage 3, and of the older FSDP."""
    params = list(params)
    if any(hasattr(param, "ds_id") for param in params):
        raise RuntimeError(ZERO)
    # the second of these is of FSDP's own flat parameters, the first of those that are parts of one
    flat = ("_fsdp_flattened", "_is_flat_param")
    if any(getattr(param, name, False) for param in params for name in flat):
        raise RuntimeError(FSDP1)


def check_lam(value: Any) -> float:
    """What Unified SAM's schedule gave."""
    if callable(value) or isinstance(value, str):  # which lam itself may be
        raise refuse("lam", "a callable that gives a number in [0, 1]", value)
    lam: float = unified_lam("lam", value)
    return lam


def check_group_keys(kwargs: Mapping[str, Any]) -> None:
    """What groups have and constructors do not take."""
    if "perturb" in kwargs:
        raise TypeError(
            "perturb is a key of parameter groups and no argument: give it in the group, as in "
            f"{{'params': ..., 'perturb': {shown(kwargs['perturb'])}}}"
        )


def check_common(kwargs: Mapping[str, Any], cls: type) -> None:
    """What methods with an update of their own take besides their named arguments."""
    allowed = ("renormalize", "max_grad_norm", "skip_nonfinite", "norm", "perturb_every", "start",
               "stop", "perturb_when", "amplify", "master_weights", "rounding", "seed",
               "repeat_random", "ascent_steps", "ascent_context", "descent_context", "set_to_none",
               "scratch")  # fmt: skip
    check_group_keys(kwargs)
    if unknown := [key for key in kwargs if key not in allowed]:
        raise TypeError(
            f"{cls.__name__} got an unexpected argument {unknown[0]!r}; besides its own it takes "
            f"{', '.join(allowed)}"
        )


def check_base(base: Any) -> None:
    """The base optimizer: a class, not sharpness-aware itself, that steps without a closure."""
    if not (isinstance(base, type) and issubclass(base, Optimizer)):
        raise TypeError(
            f"base_optimizer must be a subclass of torch.optim.Optimizer (the class itself), "
            f"got {shown(base)}"
        )
    if issubclass(base, SharedState):
        raise TypeError(f"base_optimizer must not be sharpness-aware itself, got {base.__name__}")
    check_closure_free("base_optimizer", base)


def check_closure_free(name: str, cls: type[Optimizer]) -> None:
    """An optimizer class that is stepped without a closure."""
    closure = inspect.signature(cls.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise TypeError(f"{name} must step without a closure, and {cls.__name__} needs one")


def check_keys(base: Optimizer, own: Sequence[str]) -> None:
    """A base optimizer whose group keys mean something else here."""
    if clash := [key for key in base.defaults if key in own or is_own(key)]:
        raise TypeError(
            f"base_optimizer must have none of the group keys {', '.join(own)}, which are "
            f"fastsam's, and {type(base).__name__} has {', '.join(clash)}"
        )


def check_states(
    base: Base, ascent: Ascent, more: Sequence[str], groups: Sequence[Mapping[str, Any]]
) -> None:
    """A fused base whose state has names that mean something else here."""
    for group in groups:
        own = {*ascent.state_names(dict(group)), *more}
        if clash := [name for name in base.state_names(dict(group)) if name in own]:
            raise TypeError(
                f"base {base.name!r} must have none of the states {', '.join(sorted(own))}, which "
                f"are fastsam's, and has {', '.join(clash)}"
            )


def check_base_state(
    ascent: Ascent, base: Base | None, name: str, group: Mapping[str, Any]
) -> None:
    """A perturbed group's base has the state that the ascent reads.

    Of one that is not fused this is not known before its first step.
    """
    read = ascent.momentum or ("" if ascent.is_computed else ascent.base_state)
    if not read or not is_perturbed(group):
        return
    if base is None and ascent.follows_last:
        raise TypeError(
            f"base_optimizer must be one whose update is fused with {ascent.name!r}, which keeps "
            f"the gradient that others may write to; got {name}"
        )
    if ascent.follows_last:
        return
    if base is None and ascent.momentum:
        raise TypeError(
            f"base_optimizer must be one whose update is fused with {ascent.name!r}, which "
            f"perturbs along the {read!r} that it keeps, in every group that is perturbed; got "
            f"{name}"
        )
    if base is not None and read not in base.state_names(dict(group)):
        has_none = " with momentum=0" if group.get("momentum") == 0 else ""
        raise TypeError(
            f"base_optimizer must be one that keeps {read!r}, which the ascent "
            f"{ascent.name!r} reads, in every group that is perturbed; got {name}{has_none}"
        )


def check_rules(ascent: Ascent, descent: Descent | None) -> None:
    """What reads the base's state is not made once more when the second gradient is there."""
    if ascent.chooses and descent is not None and descent.needs_perturbation:
        raise TypeError(
            f"descent {descent.name!r} needs the perturbation again in the second pass, and ascent "
            f"{ascent.name!r} chooses it at random in the first pass alone"
        )
    if ascent.base_state and descent is not None and descent.needs_perturbation:
        raise TypeError(
            f"descent {descent.name!r} needs the perturbation again in the second pass, and ascent "
            f"{ascent.name!r} reads the base's {ascent.base_state!r} in the first pass alone"
        )


def check_tensors(param: Tensor, grad: Tensor, others: Sequence[Tensor], name: str) -> None:
    """A parameter and its gradient, among the others that take part in the step."""
    if grad.layout != torch.strided:
        raise RuntimeError(
            f"{name} does not support sparse gradients, got {grad.layout}; use a layer whose "
            "gradient is dense, such as torch.nn.Embedding with sparse=False"
        )
    if is_traceable_wrapper_subclass(param):  # a DTensor's shard is none
        raise RuntimeError(f"{name} does not support {type(param).__name__} parameters")
    if grad.shape != param.shape:
        raise RuntimeError(
            f"{name} got a gradient of shape {tuple(grad.shape)} for a parameter of shape "
            f"{tuple(param.shape)}"
        )
    if param.is_complex() or grad.is_complex():
        raise RuntimeError(
            f"{name} does not support complex gradients; make torch.view_as_real(param) the "
            "parameter, and use torch.view_as_complex of it in the forward pass"
        )
    if torch._debug_has_internal_overlap(param) == 1:
        raise RuntimeError(
            f"{name} needs parameters whose elements have memory of their own, got one of shape "
            f"{tuple(param.shape)} and strides {param.stride()}; optimize a clone"
        )
    if others and param.device.type != others[0].device.type:
        raise RuntimeError(
            f"{name} needs all parameters on devices of one type, got {others[0].device} and "
            f"{param.device}"
        )
