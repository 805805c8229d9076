"""The tensors of one pass, and what passes have in common while nothing but gradients moves."""

from collections.abc import Callable, Collection
from dataclasses import dataclass, field, fields, replace
from operator import is_
from typing import Any

import torch
from torch import Tensor

from .sharding import Sharding


def identical(xs: Collection[Any], ys: Collection[Any]) -> bool:
    """Whether both hold the same objects; ``==`` would compare tensors by their elements."""
    return len(xs) == len(ys) and all(map(is_, xs, ys))


@dataclass(eq=False)
class Layout:
    """What passes have in common while nothing moves but gradients (``collect.py``).

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
        shardings: How each is sharded over processes (``sharding.py``); None where none is.
        has_empty: Whether one of them has no elements.
        members: Positions of the parameters by their devices, these in a fixed order.
        spreads: Whether the optimizer's parameters, also those not here, lie on several devices.
        seen: Where the gradients were in the last pass.
        token: Stands for this layout where the layout itself must not be kept alive.
        operators: What the torch backend has worked out from this, by kind.
        plans: The triton backend's launches, by pass.
        targets: Where the triton backend's last ascent wrote to, if parameters have moved.
        parts: Layouts of each device's tensors.
        prepared: The base's state, found complete (``state.py``).
        held: The ascent's state, found complete (``state.py``).
        masters: The master weights, found complete (``precision.py``).
        room: Memory for copies of the gradients (``gradients.py``).
        read: The base's state that the ascent reads (``base_state.py``).
        places: Every parameter's place among all.
        choices: A seed, and what the choices that follow from it depend on (``precision.py``).
        segments: The segment of each parameter (``segments.py``).
        after: Token of the first pass's layout whose parameters are all here, unchanged; in a
            further ascent, of one that has all that are here.
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
    shardings: list[Sharding] | None
    has_empty: bool
    members: dict[torch.device, list[int]]
    spreads: bool = False
    seen: list[int] = field(default_factory=list)
    token: object = field(default_factory=object)
    operators: dict[Any, Any] = field(default_factory=dict)
    plans: dict[Any, Any] = field(default_factory=dict)
    targets: list[Tensor] = field(default_factory=list)
    parts: "dict[torch.device, Layout]" = field(default_factory=dict)
    prepared: Any = None
    held: Any = None
    masters: Any = None
    room: Any = None
    read: Any = None
    places: list[int] | None = None
    choices: tuple[int, list[int]] | None = None
    segments: list[int] | None = None
    after: object = None

    def of_device(self, device: torch.device) -> "Layout":
        """The part that lies on one device."""
        positions = self.members[device]
        both = [*positions, *(len(self.params) + k for k in positions)]

        def pick(xs: list[Any]) -> list[Any]:
            return [xs[k] for k in (positions if len(xs) == len(self.params) else both)]

        lists = {field.name: getattr(self, field.name) for field in fields(self)}
        picked: Any = {name: pick(xs) for name, xs in lists.items() if isinstance(xs, list) and xs}
        return replace(
            self, **picked, members={device: list(range(len(positions)))}, token=object(),
            operators={}, plans={}, parts={}, prepared=None, held=None, read=None, masters=None,
            room=None, choices=None, after=None,
        )  # fmt: skip


@dataclass(slots=True)
class Batch:
    """The parameters that take part in one pass, in the order of their groups.

    A list has one entry per parameter. None stands for what is not there: in the place of a list,
    where no parameter has it, and in a list.

    Attributes:
        params: The parameters; shards, where the optimizer's are sharded.
        grads: Their gradients.
        groups: Index of each parameter's group.
        owners: What the optimizer holds.
        shardings: How each is sharded.
        states: Of the base.
        fresh: Whether the state that starts from the gradient (a momentum buffer) is new.
        ascent, next: The ascent rule's state before the step, and room for the one after it.
        read: The base's state that the ascent rule reads, in the first pass.
        firsts: First gradients, in the second pass.
        kept: What an earlier step has left that this one replaces, where it may be rejected.
        kept_is_known: Whether the squared norm of what an earlier step has left, and this one
            reuses, is among the scalars; None where the step has no need to know.
        norm_is_known: In the first pass, whether the squared norm of the momentum that the ascent
            follows is among the scalars.
        leaves_norm: In the second, whether the update is to leave it there.
        validation, training: LETS's gradients at the updated weights.
        masters: Float32 weights behind 16-bit parameters.
        places: Every parameter's place among all, which its random bits depend on.
        choices: What decides at random whether a parameter is perturbed.
        segments, squares: Where the ascent's norm is not global, each parameter's segment, and the
            squared norms of all segments.
        layout: Where equal ones mean that what was worked out from them still holds.
        prepared: The base's state as it was found complete, or what the ascent reads of it; another
            object where it is another.
        held: The ascent's state, where it is that of exactly these parameters.
        part: Which of several devices' it is, by number; None where there is but one.
        step_unfused: Steps the bases that are not fused, where others are: takes the scalars.
        beside: What has to be taken away from parameters after a base that is not fused.
    """

    params: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    groups: list[int] = field(default_factory=list)
    owners: list[Tensor] = field(default_factory=list)
    shardings: list[Sharding] | None = None
    states: list[dict[str, Any]] | None = None
    fresh: list[bool] | None = None
    ascent: list[dict[str, Tensor] | None] | None = None
    next: list[dict[str, Tensor] | None] | None = None
    read: list[Tensor | None] | None = None
    firsts: list[Tensor | None] | None = None
    kept: list[Tensor | None] | None = None
    kept_is_known: bool | None = None
    norm_is_known: bool = False
    leaves_norm: bool = False
    validation: list[Tensor | None] | None = None
    training: list[Tensor | None] | None = None
    masters: list[Tensor | None] | None = None
    places: list[int] | None = None
    choices: list[int] | None = None
    segments: list[int] | None = None
    squares: Tensor | None = None
    layout: Layout | None = None
    prepared: object = None
    held: Any = None
    part: int | None = None
    step_unfused: Callable[[Tensor], None] | None = None
    beside: dict[Tensor, Tensor] | None = None

    @property
    def leads(self) -> bool:
        """Whether what is asked of the host once a step is asked here."""
        return not self.part
