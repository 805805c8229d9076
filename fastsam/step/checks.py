"""Bad input, found before anything changes: each error names the argument and what is allowed."""

import inspect
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .checkpoint import is_own
from .spec import Ascent, Base, Descent

#: What is said of parameters that DeepSpeed has taken over.
ZERO = (
    "fastsam does not serve DeepSpeed's ZeRO, which takes parameters and gradients apart and calls "
    "step without a closure; use FSDP2 (torch.distributed.fsdp.fully_shard) or DDP instead"
)

#: What is said of the parameters of the older FSDP.
FSDP1 = (
    "fastsam does not serve FullyShardedDataParallel, whose parameters are plain tensors that do "
    "not say of what they are shards: norms would be those of one rank's part; use FSDP2 "
    "(torch.distributed.fsdp.fully_shard) instead"
)

#: Modules whose loops call ``step`` without a closure, once imported, and what serves there.
CLOSURELESS = {
    "lightning.pytorch": "in Lightning's 16-mixed, fastsam.lightning.MixedPrecision",
    "pytorch_lightning": "in Lightning's 16-mixed, fastsam.lightning.MixedPrecision",
    "transformers.trainer": "in Hugging Face's Trainer, fastsam.huggingface.SAMTrainer",
    "accelerate": "in Accelerate, fastsam.accelerate.AcceleratedSAM",
    "deepspeed": "instead of DeepSpeed's ZeRO, FSDP2 (torch.distributed.fsdp.fully_shard)",
}


def check_group(group: Mapping[str, Any], fused: bool, scales: bool) -> None:
    """A parameter group's own hyper-parameters, and what its optimizer cannot do.

    Args:
        group: Present keys are checked, whichever they are.
        fused: Whether the base optimizer is.
        scales: Whether the ascent rule has ASAM's element-wise scale.
    """
    for key in ("rho", "eta"):
        value = group.get(key, 0.0)
        if type(value) is float and 0 <= value < math.inf:
            continue
        if isinstance(value, Tensor):
            if value.ndim != 0:
                raise ValueError(
                    f"{key} must be a number or a 0-dim tensor, got shape {tuple(value.shape)}"
                )
        elif not (isinstance(value, Real) and 0 <= float(value) < math.inf):
            raise ValueError(f"{key} must be at least 0 and finite, got {value!r}")
    if group.get("adaptive") and not scales:
        raise ValueError("adaptive must be False: LightSAM has no element-wise scale")
    if group.get("differentiable") and fused:
        raise ValueError("differentiable must be False with a fused base optimizer")


def check_perturb(group: Mapping[str, Any], renormalize: bool) -> None:
    """Whether a group is perturbed."""
    value = group.get("perturb", True)
    if value is True:
        return
    if value is not False:
        raise ValueError(f"perturb must be True or False, got {value!r}")
    if renormalize:
        raise ValueError(
            "perturb must be True in every group with renormalize=True, which compares the norms "
            "of both gradients over all of them"
        )


def check_max_grad_norm(value: Any) -> None:
    """The bound on the final gradient's norm."""
    if value is not None and not (isinstance(value, Real) and float(value) > 0):
        raise ValueError(f"max_grad_norm must be None or above 0, got {value!r}")


def check_flag(name: str, value: Any) -> None:
    """A switch: ``"False"`` would count as true."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {value!r}")


def check_ascent_steps(
    value: Any, name: str, ascent: Ascent, descent: Descent | None, rounds: Mapping[str, bool]
) -> None:
    """How many first passes a step has, and what cannot have several.

    Args:
        value: What the user gave.
        name: The optimizer's.
        ascent, descent: Its rules.
        rounds: What keeps 16-bit weights, by its argument, and whether that was asked for.

    Raises:
        ValueError: If it is out of range, or the optimizer cannot have several.
    """
    if value == 1 and type(value) is int:
        return
    if isinstance(value, bool) or not (isinstance(value, int) and value >= 1):
        raise ValueError(f"ascent_steps must be an integer of at least 1, got {value!r}")
    if ascent.advance is not None or ascent.accumulate is not None:
        why = f"{name}, whose ascent has state that follows one gradient a step"
    elif descent is not None:
        why = f"{name}, whose update takes the one first gradient"
    else:
        why = next((argument for argument, is_so in rounds.items() if is_so), "")
        if not why:
            return
        why += ", as w + e is rounded after every ascent, and the next would begin there"
    raise ValueError(f"ascent_steps must be 1 with {why}; got {value!r}")


def check_schedule(perturb_every: Any, start: Any, stop: Any) -> None:
    """Which steps are sharpness-aware."""
    for name, value, least in (("perturb_every", perturb_every, 1), ("start", start, 0)):
        if isinstance(value, bool) or not (isinstance(value, int) and value >= least):
            raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
    if isinstance(stop, bool) or not (stop is None or (isinstance(stop, int) and stop > start)):
        raise ValueError(f"stop must be None or an integer above start={start}, got {stop!r}")


def entered(context: Callable[[], AbstractContextManager[Any]]) -> AbstractContextManager[Any]:
    """What a closure is called in: ``ascent_context`` or ``descent_context`` gives it."""
    try:
        return context()
    except TypeError as error:
        if callable(context) and not hasattr(context, "__enter__"):
            raise  # its own
        raise TypeError(
            "ascent_context and descent_context must be None or functions that give a context "
            f"manager (model.no_sync, not model.no_sync()), got {type(context).__name__}"
        ) from error


def check_closure(name: str, closure: Any) -> None:
    """What ``step`` was given."""
    if closure is None:
        others = dict.fromkeys(use for module, use in CLOSURELESS.items() if module in sys.modules)
        raise RuntimeError(
            f"{name}.step needs a closure that computes the loss and calls backward; without one, "
            "alternate first_step and second_step; with a GradScaler, call step(closure, "
            f"grad_scaler=scaler) instead of scaler.step{''.join('; ' + use for use in others)}"
        )
    if not callable(closure):
        raise TypeError(
            f"closure must be a function that computes the loss, calls backward and returns the "
            f"loss, got {type(closure).__name__}"
        )
    # Lightning's closure has the last micro-batch alone; the others have been accumulated
    module = next(iter(getattr(closure, "args", None) or ()), None)
    micro_batches = getattr(getattr(module, "_trainer", None), "accumulate_grad_batches", 1)
    if isinstance(micro_batches, int) and micro_batches > 1:
        raise RuntimeError(
            "accumulate_grad_batches must be 1 with automatic optimization, which does not repeat "
            f"the micro-batches before the last one for the second pass, got {micro_batches}; use "
            "manual optimization, with a closure that runs all of them"
        )


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
    """Unified SAM's weight, or what its schedule gave."""
    if isinstance(value, Real) and 0 <= float(value) <= 1:
        return float(value)
    raise ValueError(
        "lam must be a number in [0, 1], '1/t', '1-1/t', or a callable that gives a number in "
        f"[0, 1], got {value!r}"
    )


def check_rule(rule: Any, known: Iterable[str]) -> None:
    """LightSAM's rule, by name."""
    if rule not in known:
        raise ValueError(f"rule must be one of {', '.join(map(repr, known))}, got {rule!r}")


def check_common(kwargs: Mapping[str, Any], cls: type) -> None:
    """What methods with an update of their own take besides their named arguments."""
    allowed = ("renormalize", "max_grad_norm", "skip_nonfinite", "norm", "perturb_every", "start",
               "stop", "master_weights", "rounding", "seed", "repeat_random", "ascent_steps",
               "ascent_context", "descent_context", "set_to_none")  # fmt: skip
    if unknown := [key for key in kwargs if key not in allowed]:
        raise TypeError(
            f"{cls.__name__} got an unexpected argument {unknown[0]!r}; besides its own it takes "
            f"{', '.join(allowed)}"
        )


def check_lets(
    rho_lr: Any, hessian: Any, interval: Any, rho_optimizer: Any, groups: Sequence[Any]
) -> None:
    """The arguments of LETS, and the groups of the optimizer that it wraps."""
    if not (isinstance(rho_lr, Real) and 0 <= float(rho_lr) < math.inf):
        raise ValueError(f"rho_lr must be at least 0 and finite, got {rho_lr!r}")
    if hessian not in ("diag", "difference"):
        raise ValueError(f"hessian must be 'diag' or 'difference', got {hessian!r}")
    if isinstance(interval, bool) or not (isinstance(interval, int) and interval >= 1):
        raise ValueError(f"interval must be an integer of at least 1, got {interval!r}")
    if not (isinstance(rho_optimizer, type) and issubclass(rho_optimizer, Optimizer)):
        raise TypeError(
            "rho_optimizer must be a subclass of torch.optim.Optimizer (the class itself), got "
            f"{rho_optimizer!r}"
        )
    check_closure_free("rho_optimizer", rho_optimizer)
    if not float(groups[0]["rho"]) > 0:
        raise ValueError(
            f"rho must be above 0 in the first group, to be learned, got {groups[0]['rho']}"
        )
    if not all(isinstance(group.get("lr"), (Real, Tensor)) for group in groups):
        raise ValueError("lr must be a number or a tensor in every group: the radius depends on it")


def check_loss(name: str, loss: Any, like: Tensor) -> Tensor:
    """What a closure returned, as a 0-dim tensor of the dtype and on the device of ``like``."""
    if isinstance(loss, Real):  # filled in: a copy from the host would wait for the device
        return torch.full_like(like, float(loss))
    if not (isinstance(loss, Tensor) and loss.numel() == 1):
        raise RuntimeError(
            f"{name} must return the loss, a number or a tensor of one, got {loss!r}"
        )
    return loss.detach().reshape(()).to(like)


def check_base(base: Any, not_below: type) -> None:
    """The base optimizer: a class, not sharpness-aware itself, that steps without a closure."""
    if not (isinstance(base, type) and issubclass(base, Optimizer)):
        raise TypeError(
            f"base_optimizer must be a subclass of torch.optim.Optimizer (the class itself), "
            f"got {base!r}"
        )
    if issubclass(base, not_below):
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
