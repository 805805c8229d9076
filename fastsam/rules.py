"""What a step is made of, as data: its ascent, its descent and its base update.

Frontends fill these in; backends read them. The equations themselves are in ``kernels/`` and in
``backends/equations.py``; the base updates are declared in ``bases.py``.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, fields, replace
from operator import is_
from typing import Any

import torch
from torch import Tensor

from .bases import Base, Group
from .ratio import SharpnessRatio
from .sharding import Sharding

#: SAMAR's rule: the next lam from lam, the sharpness and the one before.
LamRule = Callable[[Tensor, Tensor, Tensor], Tensor]


def wide_dtype(x: Tensor) -> torch.dtype:
    """The dtype of the arithmetic, and of the state of the ascent rules."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class Ascent:
    """How the perturbation follows from the first gradient.

    Attributes:
        name: Selects the equation.
        columns: The rule's own hyper-parameters, at most three, in the order in which the kernel
            reads them, from a group and Unified SAM's lam.
        states: Per-element state tensors: names, and what they hold before the first gradient.
            They are kept in float32, or in float64 for float64 parameters.
        needs_norm: Whether the rule uses a global norm.
        scales: Whether ASAM's element-wise scale is defined for it.
    """

    name: str
    columns: Callable[[Group, float], list[Any]]
    states: Callable[[Group], dict[str, float]]
    needs_norm: bool = True
    scales: bool = True

    def state(self, held: dict[str, Any], param: Tensor, group: Group) -> dict[str, Tensor]:
        """A parameter's state, new where there is none; ``held`` does not change.

        Raises:
            RuntimeError: If a state tensor has not the parameter's shape.
        """
        state = {}
        for name, start in self.states(group).items():
            tensor = held.get(name)
            if tensor is None:
                tensor = torch.full_like(param, start, dtype=wide_dtype(param))
            elif tensor.shape != param.shape:
                raise RuntimeError(
                    f"state {name!r} has shape {tuple(tensor.shape)} and its parameter "
                    f"{tuple(param.shape)}: the state dict was made for other parameters"
                )
            state[name] = tensor.to(param.device, wide_dtype(param))
        return state


# functions with names, not lambdas: an optimizer that holds them can be pickled


def _no_columns(group: Group, lam: float) -> list[Any]:
    return []


def _no_states(group: Group) -> dict[str, float]:
    return {}


def _unified_columns(group: Group, lam: float) -> list[Any]:
    return [lam]


def _ema_columns(group: Group, lam: float) -> list[Any]:
    return [1 - group["theta"], group["theta"]]


def _ema_states(group: Group) -> dict[str, float]:
    return {"ema": float("nan")}  # what marks an average that has not begun


def _adagrad_states(group: Group) -> dict[str, float]:
    return {"ascent_sum": group["eps"] ** 2}


def _adam_columns(group: Group, lam: float) -> list[Any]:
    beta1, beta2 = group["betas"]
    return [1 - beta1, beta2, 1 - beta2]


def _adam_states(group: Group) -> dict[str, float]:
    return {"ascent_exp_avg": 0.0, "ascent_exp_avg_sq": group["eps"] ** 2}


UNIFIED = Ascent("unified", _unified_columns, _no_states)
EMA = Ascent("ema", _ema_columns, _ema_states)
LIGHT_NORM = Ascent("adagrad_norm", _no_columns, _no_states, scales=False)
LIGHT_ADAGRAD = Ascent("adagrad", _no_columns, _adagrad_states, needs_norm=False, scales=False)
LIGHT_ADAM = Ascent("adam", _adam_columns, _adam_states, needs_norm=False, scales=False)


@dataclass(eq=False, slots=True)
class Step:
    """One step, as the backends see it. It does not change.

    Attributes:
        groups: The optimizer's parameter groups.
        ascent: The rule of the perturbation.
        base: The fused base update; None leaves the update to a foreign optimizer.
        lam: Unified SAM's weight of normalisation in this step.
        renormalize: SSAM's descent rule.
        mix: SAMAR's descent rule: its rule for lam, or None.
        max_grad_norm: Bound on the norm of ``u``.
        skip_nonfinite: Whether a non-finite second gradient leaves weights and state alone.
        skip_first: With that, whether a non-finite first gradient does as well.
        is_scaled: Whether gradients carry a loss scale, whose inverse is among the scalars.
        has_masters: Whether 16-bit parameters have float32 master weights.
        seed: Of stochastic rounding; None rounds to nearest.
        keeps_weights: Whether the copy of the weights is needed after the update (LETS).
        adaptive: Whether some group has ASAM's element-wise scale.
        rescales: Whether ``u`` may differ from the second gradient.
    """

    groups: Sequence[Group]
    ascent: Ascent
    base: Base | None
    lam: float = 1.0
    renormalize: bool = False
    mix: LamRule | SharpnessRatio | None = None
    max_grad_norm: float | None = None
    skip_nonfinite: bool = False
    skip_first: bool = False
    is_scaled: bool = False
    has_masters: bool = False
    seed: int | None = None
    keeps_weights: bool = False
    adaptive: bool = field(init=False)
    rescales: bool = field(init=False)

    def __post_init__(self) -> None:
        self.adaptive = any([group["adaptive"] for group in self.groups])
        self.rescales = (
            self.renormalize or self.is_scaled
            or self.mix is not None or self.max_grad_norm is not None
        )  # fmt: skip

    @property
    def needs_ascent_norm(self) -> bool:
        rules = self.ascent.needs_norm or self.renormalize or self.mix is not None
        return rules or self.skip_first

    @property
    def needs_descent_norm(self) -> bool:
        needs_norm = self.base is not None and self.base.needs_norm
        return self.rescales or self.skip_nonfinite or needs_norm


def identical(xs: Collection[Any], ys: Collection[Any]) -> bool:
    """Whether both hold the same objects; ``==`` would compare tensors by their elements."""
    return len(xs) == len(ys) and all(map(is_, xs, ys))


@dataclass(eq=False)
class Layout:
    """What passes have in common while nothing moves but gradients (``sweep.py``).

    Attributes:
        params: The parameters that have a gradient.
        groups: Index of each parameter's group.
        addresses: Where the parameters are.
        sizes: Their numbers of elements.
        dtypes: Of the parameters, then of the gradients.
        strides: Of the parameters, then of the gradients.
        contiguous: Whether all of them are.
        ordered: The parameters of several dimensions.
        owners: The optimizer's parameters, of which ``params`` may be shards.
        shardings: How each is sharded over processes (``sharding.py``); empty where none is.
        has_empty: Whether one of them has no elements.
        members: Positions of the parameters by their devices, these in a fixed order.
        spreads: Whether the optimizer's parameters, also those not here, lie on several devices.
        seen: Where the gradients were in the last pass.
        cache: What a backend has worked out from this.
        stateless, nothing: An empty dict and None for every parameter.
    """

    params: list[Tensor]
    groups: list[int]
    addresses: list[int]
    sizes: list[int]
    dtypes: list[torch.dtype]
    strides: list[tuple[int, ...]]
    contiguous: bool
    ordered: tuple[Tensor, ...]
    owners: list[Tensor]
    shardings: list[Sharding]
    has_empty: bool
    members: dict[torch.device, list[int]]
    spreads: bool = False
    seen: list[int] = field(default_factory=list)
    cache: dict[Any, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.stateless: list[dict[str, Tensor]] = [{}] * len(self.params)
        self.nothing: list[Tensor | None] = [None] * len(self.params)

    def of_device(self, device: torch.device) -> "Layout":
        """The part that lies on one device."""
        positions = self.members[device]
        both = [*positions, *(len(self.params) + k for k in positions)]

        def pick(xs: list[Any]) -> list[Any]:
            return [xs[k] for k in (positions if len(xs) == len(self.params) else both)]

        lists = {field.name: getattr(self, field.name) for field in fields(self)}
        picked: Any = {name: pick(xs) for name, xs in lists.items() if isinstance(xs, list) and xs}
        members = {device: list(range(len(positions)))}
        return replace(self, **picked, members=members, cache={})


@dataclass(slots=True)
class Batch:
    """The parameters that take part in one pass, in the order of their groups."""

    params: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    groups: list[int] = field(default_factory=list)  # index of each parameter's group
    # what the optimizer holds, of which params may be shards, and how they are sharded
    owners: list[Tensor] = field(default_factory=list)
    shardings: list[Sharding] = field(default_factory=list)
    states: list[dict[str, Any]] = field(default_factory=list)  # of the base
    fresh: list[bool] = field(default_factory=list)  # whether the momentum buffer is new
    # the ascent rule's state before the step and after it; empty for unperturbed parameters
    ascent: list[dict[str, Tensor]] = field(default_factory=list)
    next: list[dict[str, Tensor]] = field(default_factory=list)
    # gradients of other passes, None where a parameter had none
    firsts: list[Tensor | None] = field(default_factory=list)
    validation: list[Tensor | None] = field(default_factory=list)  # at the updated weights
    training: list[Tensor | None] = field(default_factory=list)
    # of 16-bit parameters: float32 weights behind them; and every parameter's place among all,
    # which its random bits depend on. Empty where no step needs them
    masters: list[Tensor | None] = field(default_factory=list)
    places: list[int] = field(default_factory=list)
    # where equal ones mean that what was worked out from them still holds
    layout: Layout | None = None
    prepared: object = None
    # which of several devices' it is, by number; None where there is but one
    part: int | None = None

    @property
    def leads(self) -> bool:
        """Whether what is asked of the host once a step is asked here."""
        return not self.part
