"""What a state dict has to be to be loaded: all of it is looked at before anything changes.

Torch takes what it is given, and cuts counts, moments of whole numbers and the state of another
optimizer to fit. Here the groups say by which method and on which base they were made, and every
field that will be read is checked. Everything that is refused is a ``ValueError``.
"""

import functools
import inspect
import math
from collections import defaultdict
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from fastsam.arithmetic import wide_dtype

from .arguments import shown
from .precision import MASTER
from .scalars import PREFIX
from .sharding import check_shards, local
from .spec import Ascent, Base, Group
from .torch_state import NUMBER, is_torchs, shapes_of

#: The group keys that say which method made a state dict, and on which base optimizer.
METHOD, BASE = PREFIX + "method", PREFIX + "base"
#: What changes with the device or the version of torch, and does not tell optimizers apart.
FLAGS = ("foreach", "fused", "capturable", "differentiable", "maximize")
#: Group keys whose tensors are looked at as the numbers that they hold.
TENSORS = ("rho", "eta", "lr", "weight_decay")
#: Hyper-parameters that may be infinite: ASGD's start, Rprop's bounds, what Adafactor clips at.
ENDLESS = ("t0", "step_sizes", "d")
#: Those of the optimizer's own numbers that only an option makes.
OPTIONAL = ("rounding_step", "slow_sharpness")


@dataclass(frozen=True)
class Receiver:
    """The optimizer that loads.

    Attributes:
        method: Name of the method; empty for a base optimizer on its own.
        groups: The present parameter groups.
        bases: The base optimizer of each.
        rules: Its declaration; None of one that is not fused.
        ascent: The rule of the perturbation, if there is one.
        kept: The optimizer's own numbers.
        least: What these are at least, by name; all are finite.
        unmeasured: Those that may be NaN, which says that nothing has been measured.
        check_group: Raises ValueError for a group whose hyper-parameters are out of range.
    """

    method: str
    groups: Sequence[Group]
    bases: Sequence[Optimizer]
    rules: Sequence[Base | None]
    ascent: Ascent | None = None
    kept: Mapping[str, Any] = field(default_factory=dict)
    least: Mapping[str, float] = field(default_factory=dict)
    unmeasured: Collection[str] = ()
    check_group: Callable[[Group], None] = lambda group: None


#: What an optimizer's own numbers are at least.
LEAST = {"t": 1.0, "squared_norms": 0.0, "ascent_squared_norms": 0.0, "rounding_step": 0.0,
         "noise_step": 0.0}  # fmt: skip
COUNTS = ("t", "rounding_step", "noise_step")


def method_name(cls: type) -> str:
    """What a class's state dicts say that they were made by.

    That is its own name for the library's classes and for those with rules of their own. Other
    subclasses compute what their parent does: they load its state dicts.
    """
    for parent in cls.__mro__:
        own_rules = {"ascent", "descent"} & vars(parent).keys()
        if own_rules or parent.__module__.partition(".")[0] == __name__.partition(".")[0]:
            return parent.__name__
    return cls.__name__


def write_marks(groups: Iterable[Group], method: str, bases: Iterable[Optimizer]) -> None:
    """Let every group say who makes its state dicts."""
    for group, base in zip(groups, bases, strict=True):
        if method:
            group[METHOD] = method
        group[BASE] = type(base).__name__


# --- numbers ---------------------------------------------------------------------------------


def number_of(value: Any) -> float | None:
    """What a real number, or a tensor of one, holds; None of anything else."""
    if isinstance(value, Tensor):
        value = local(value)
        if value.numel() != 1 or value.is_meta or value.is_complex() or value.dtype == torch.bool:
            return None
        return float(value)
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf


def check_count(name: str, value: Any, least: float = 0) -> None:
    """A count, as a number or a tensor of one.

    Raises:
        ValueError: If it is no whole number, or below ``least``.
    """
    number = number_of(value)
    if number is None or not number.is_integer() or number < least:
        raise ValueError(
            f"{name} in a state dict must be a whole number of at least {least:.0f}, got "
            f"{shown(value)}"
        )


def check_scalar(name: str, value: Any, least: float | None = None, nan: bool = False) -> None:
    """A number, or a tensor of one.

    Args:
        name: For the message.
        value: What a state dict has.
        least: What it is at least, if that is known.
        nan: Whether NaN is allowed, where it says that nothing has been measured.

    Raises:
        ValueError: If it is out of range.
    """
    number = number_of(value)
    good = number is not None and (math.isfinite(number) or nan and math.isnan(number))
    if not good or (least is not None and number < least):  # type: ignore[operator]
        bound = "" if least is None else f" and at least {least:g}"
        raise ValueError(f"{name} in a state dict must be finite{bound}, got {shown(value)}")


# --- the whole -------------------------------------------------------------------------------


def check_state_dict(given: Mapping[str, Any], receiver: Receiver) -> None:
    """All that will be read of a state dict. Torch compares the numbers of groups and parameters.

    Raises:
        ValueError: If something is missing, out of range or made by another optimizer.
    """
    groups, state = parts_in(given)
    sizes = [len(group["params"]) for group in groups]
    if sizes != [len(group["params"]) for group in receiver.groups]:
        return  # which torch refuses, before anything changes
    merged = []
    for i, (saved, present) in enumerate(zip(groups, receiver.groups, strict=True)):
        _check_maker(saved, present, i, receiver)
        merged.append({**present, **saved})
        _check_hyperparameters(saved, merged[-1], i, receiver)
    _check_kept(groups, receiver)
    known = {"step", MASTER}
    listed: set[Hashable] = set()
    for i, saved in enumerate(groups):
        rule, ascent = receiver.rules[i], receiver.ascent
        names = {} if rule is None else rule.state_names(merged[i])
        ascents = {} if ascent is None else ascent.state_names(merged[i])
        known |= names.keys() | ascents.keys()
        listed.update(saved["params"])
        for key, param in zip(saved["params"], receiver.groups[i]["params"], strict=True):
            entry = state.get(key, {})
            if not isinstance(entry, Mapping):
                raise ValueError(
                    f"state of parameter {key!r} in a state dict must be a dict, got {shown(entry)}"
                )
            where = f"of parameter {key!r}"
            if receiver.method:
                _check_ascent(entry, ascents, param, where, receiver.method)
            if rule is not None:
                _check_base_state(entry, rule, names, param, where)
            else:
                _check_unfused(entry, receiver.bases[i], merged[i], param, where)
            _check_sharding(entry, param)
    for key, entry in state.items():
        if key not in listed and isinstance(entry, Mapping) and known & entry.keys():
            raise ValueError(
                f"state of a state dict has an entry for {key!r}, which is in none of its groups"
            )
    for base in {id(base): base for base in receiver.bases}.values():
        _rehearse(base, groups, state, receiver)


def _rehearse(
    base: Optimizer, groups: Sequence[Group], state: Mapping[Hashable, Any], receiver: Receiver
) -> None:
    """Let an unused base take over what there is: some complete it, and fail at that."""
    new_groups: list[Group] = []
    new_state: dict[Any, dict[str, Any]] = {}
    for saved, present, owner in zip(groups, receiver.groups, receiver.bases, strict=True):
        if owner is base:
            new_groups.append({**saved, "params": present["params"]})
            for key, param in zip(saved["params"], present["params"], strict=True):
                if entry := state.get(key):
                    new_state[param] = dict(entry)
    own = {} if receiver.ascent is None else receiver.ascent.state_names(receiver.groups[0])
    begun = {param: x for param, x in new_state.items() if not {*own, MASTER}.issuperset(x)}
    actor = object.__new__(type(base))
    vars(actor).update(vars(base))
    try:
        actor.__setstate__({"state": defaultdict(dict, begun), "param_groups": new_groups})
    except Exception as error:
        raise ValueError(
            f"{type(base).__name__} cannot take over the state dict: {type(error).__name__}: "
            f"{error}"
        ) from error


def parts_in(given: Mapping[str, Any]) -> tuple[list[Group], Mapping[Hashable, Any]]:
    for key in ("param_groups", "state"):
        if key not in given:
            raise ValueError(f"{key!r} is missing in the state dict, which has {', '.join(given)}")
    groups, state = given["param_groups"], given["state"]
    good = isinstance(groups, (list, tuple)) and all(
        isinstance(group, Mapping) and isinstance(group.get("params"), (list, tuple))
        for group in groups
    )
    if not good:
        raise ValueError(
            "param_groups of a state dict must be a list of dicts with a list of 'params', got "
            f"{shown(groups)}"
        )
    if not isinstance(state, Mapping):
        raise ValueError(f"state of a state dict must be a dict, got {shown(state)}")
    for key in (key for group in groups for key in group["params"]):
        try:
            hash(key)
        except TypeError:
            raise ValueError(
                f"params of a group in a state dict must be keys of its state, got {shown(key)}"
            ) from None
    for group in groups:
        for mark in (METHOD, BASE):
            if not isinstance(group.get(mark, ""), (str, type(None))):
                raise ValueError(
                    f"{mark} of a group in a state dict must be a name, got {shown(group[mark])}"
                )
    return list(groups), state


# --- who made it -----------------------------------------------------------------------------


def _made(method: Any, base: Any) -> str:
    return " on ".join(str(name) for name in (method, base) if name)


def _check_maker(saved: Group, present: Group, i: int, receiver: Receiver) -> None:
    """By the marks; where there are none, by what the groups have."""
    base = type(receiver.bases[i]).__name__
    mine, made = (receiver.method, base), (saved.get(METHOD), saved.get(BASE))
    marked = [(its, own) for its, own in zip(made, mine, strict=True) if its and own]
    if any(its != own for its, own in marked):
        raise _other(_made(*made), mine)
    if len(marked) == sum(map(bool, mine)):
        return
    guess = _guess(saved, present, receiver.bases[i])
    if guess:
        raise _other(guess, mine)
    if receiver.method and made[0] is None:
        _check_unmarked(saved, present, receiver, mine)


def _other(maker: str, mine: tuple[str, str]) -> ValueError:
    return ValueError(
        f"the state dict was made by {maker} and cannot be loaded into {_made(*mine)}"
    )


def _check_unmarked(
    saved: Group, present: Group, receiver: Receiver, mine: tuple[str, str]
) -> None:
    """A group of a base on its own, or of an older version: no method's switches are in it."""
    numbers = {PREFIX + name for name in (*receiver.kept, *OPTIONAL)}
    others = [key for key in saved if key.startswith(PREFIX) and key not in {*numbers, BASE}]
    if others:
        raise _other(f"another method, with {others[0]!r}", mine)
    if PREFIX + "t" in saved:  # then its method has written all of its own
        arguments = {} if receiver.ascent is None else receiver.ascent.arguments
        needed = [PREFIX + name for name in receiver.kept if name not in OPTIONAL]
        lacks = [key for key in (*needed, *arguments) if key in present and key not in saved]
        if lacks:
            raise _other(f"another method, without {lacks[0]!r}", mine)
    switches = ["adaptive"]
    if receiver.bases and _is_fastsams(receiver.bases[0]):  # as of AdaSAM, whose update it is
        switches.append("amsgrad")
    for key in switches:
        if key in saved and key in present and saved[key] != present[key]:
            raise _other(f"another optimizer, with {key}={saved[key]!r}", mine)


def _guess(saved: Group, present: Group, base: Optimizer) -> str:
    """Which optimizer a group without marks is of, if it is not of the base; else nothing."""
    hyper = _torch_hyperparameters()
    known = {_ACCUMULATED}.union(*hyper.values())
    has = [key for key in saved if key in known and key not in present]
    lacks = [key for key in present if key in known and key not in (*saved, *_ADDED)]
    strange = {*has} - {*_ADDED} if is_torchs(base) else {*has} - {"weight_decay"}
    own_or_torchs = is_torchs(base) or _is_fastsams(base)  # whose keys are known
    if strange and (own_or_torchs or lacks and not strange <= {*FLAGS}):
        fits = {name: keys & saved.keys() for name, keys in hyper.items() if set(has) <= keys}
        likely = max(fits, key=lambda name: len(fits[name]), default="another optimizer")
        without = f" and lack {lacks[0]!r}" if lacks else ""
        return f"{likely} (its groups have {has[0]!r}{without})"
    decoupled, own = (group.get("decoupled_weight_decay") for group in (saved, present))
    is_adam = type(base).__name__ in _ADAMS.values()
    if is_torchs(base) and "betas" in present and saved.keys() >= {"betas", "capturable"}:
        # of a torch in which Adam's groups all have amsgrad, and only they
        if is_adam and "amsgrad" not in saved:
            return "RAdam (its groups lack 'amsgrad')"
        if not is_adam and "amsgrad" in saved:
            return f"{_ADAMS[decoupled is True]} (its groups have 'amsgrad')"
    if is_adam and None not in (decoupled, own):
        return "" if decoupled == own else _ADAMS[decoupled is True]
    return ""


#: Two names for one class of groups and state, by whether weight decay is decoupled.
_ADAMS = {False: "Adam", True: "AdamW"}
_ACCUMULATED = PREFIX + "squared_norms"
#: Hyper-parameters that torch completes in state dicts of its older versions.
_ADDED = (*FLAGS, "amsgrad", "nesterov", "centered", "decoupled_weight_decay")


@functools.cache
def _torch_hyperparameters() -> dict[str, frozenset[str]]:
    """The hyper-parameters of torch's optimizers, by their names, but a radius of Adadelta's."""
    return {
        name: frozenset(inspect.signature(cls).parameters) - {"params", "rho"}
        for name, cls in vars(torch.optim).items()
        if isinstance(cls, type) and issubclass(cls, Optimizer) and cls is not Optimizer
    }


def _is_fastsams(base: Optimizer) -> bool:
    return type(base).__module__.partition(".")[0] == __name__.partition(".")[0]


# --- groups ----------------------------------------------------------------------------------


def _check_hyperparameters(saved: Group, merged: Group, i: int, receiver: Receiver) -> None:
    """As at construction, with tensors looked at as numbers are."""
    looked = dict(merged)
    for key in TENSORS:
        value = looked.get(key)
        if isinstance(value, Tensor) and (value.ndim == 0 or (key == "lr" and value.numel() == 1)):
            number = number_of(value)
            if number is None:
                raise ValueError(f"{key} in a state dict must be a number, got {shown(value)}")
            looked[key] = number
    base = receiver.bases[i]
    for key, default in base.defaults.items() if is_torchs(base) or _is_fastsams(base) else ():
        value, wrong = looked.get(key, default), ""
        if key in ("foreach", "fused"):
            if not isinstance(value, bool) and value is not None:
                wrong = "True, False or None"
        elif isinstance(default, bool):
            if not isinstance(value, bool):
                wrong = "True or False"
        elif isinstance(default, (int, float, Tensor)):
            number = number_of(value)
            if number is None or math.isnan(number):
                wrong = "a number"
            elif number < 0 and key in ("lr", "weight_decay", "eps"):
                wrong = "at least 0"
            elif math.isinf(number) and key not in ENDLESS:
                wrong = "finite"
            elif key == "alpha" and type(base).__name__ == "RMSprop" and number > 1:
                wrong = "in [0, 1]"
        elif isinstance(default, tuple):
            wrong = _wrong_numbers(key, value, default)
        if wrong:
            raise ValueError(
                f"{key} of group {i} in a state dict must be {wrong}, got {shown(value)}"
            )
    try:
        receiver.check_group(looked)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"group {i} in a state dict is not usable: {error}") from error
    if is_torchs(base):
        _check_by_construction(type(base), looked, i)


def _wrong_numbers(key: str, value: Any, default: tuple[Any, ...]) -> str:
    """What several numbers must be, if they are not. None is one where it is in the default."""
    found = list(map(number_of, value)) if isinstance(value, (tuple, list)) else []
    numbers = [x for x in found if x is not None]
    if len(found) != len(default) or any(
        x is None and not (given is None and own is None)
        for x, given, own in zip(found, value, default, strict=True)
    ):
        return f"{len(default)} numbers"
    if key == "betas" and not all(0 <= x < 1 for x in numbers):
        return "numbers in [0, 1)"
    if any(math.isnan(x) or (math.isinf(x) and key not in ENDLESS) for x in numbers):
        return "finite"
    return ""


def _check_by_construction(cls: type[Optimizer], group: Group, i: int) -> None:
    """Torch checks hyper-parameters in its constructors alone."""
    keys = [key for key in _torch_hyperparameters().get(cls.__name__, ()) if key not in FLAGS]
    values = {key: group[key] for key in keys if key in group}

    def complaint(**some: Any) -> Exception | None:
        try:
            cls([torch.zeros(1, 1)], **some)
        except Exception as error:  # whatever it says of a value of the wrong type
            return error
        return None

    if (error := complaint(**values)) is None:
        return
    for key, value in values.items():
        if complaint(**{key: value}) is not None:
            raise ValueError(
                f"{key} of group {i} in a state dict is out of range, got {shown(value)}: {error}"
            )
    raise ValueError(f"group {i} in a state dict is not usable: {error}")


def _check_kept(groups: Sequence[Group], receiver: Receiver) -> None:
    """The optimizer's own numbers, which are in every group or in none."""
    for name in receiver.kept:
        key, found = PREFIX + name, []
        for group in groups:
            if key in group:
                found.append(group[key])
            elif name not in OPTIONAL and (group.get(METHOD) if receiver.method else BASE in group):
                raise ValueError(f"{key!r} is missing in a group of the state dict")
        for value in found:
            if name in COUNTS:
                check_count(key, value, receiver.least.get(name, 0))
            else:
                check_scalar(key, value, receiver.least.get(name), name in receiver.unmeasured)
        numbers = [number_of(value) for value in found]
        if any(x != numbers[0] and x == x for x in numbers):
            raise ValueError(
                f"{key!r} must be the same in every group of a state dict, got {numbers}"
            )


# --- state -----------------------------------------------------------------------------------


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


def _check_ascent(
    entry: Mapping[str, Any], names: Mapping[str, float], param: Tensor, where: str, method: str
) -> None:
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


def _check_base_state(
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


def _check_unfused(
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
            raise _other(
                f"another optimizer (its state {where} has {strange[0]!r} and lacks "
                f"{missing[0]!r})",
                ("", type(base).__name__),
            )
        raise _missing(missing[0], where, entry)


def _check_sharding(entry: Mapping[str, Any], param: Tensor) -> None:
    try:
        check_shards(dict(entry), param)
    except RuntimeError as error:
        raise ValueError(str(error)) from error


# --- what goes with what ---------------------------------------------------------------------


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
