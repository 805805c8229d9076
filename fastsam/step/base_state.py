"""What an ascent reads of the base's state: found once, and read where it lies while it holds.

Or what a function of the user's computes in its place.
"""

from collections.abc import Collection, Sequence
from operator import is_, itemgetter
from typing import Any

import torch
from torch import Tensor

from fastsam.arithmetic import wide, wide_dtype

from .arguments import shown
from .batch import Batch, identical
from .precision import MASTER
from .sharding import add_up, check_shards, is_sharded, local
from .spec import StepSpec, sign_of
from .state import States, refuse_shape


class BaseStates:
    """One state tensor of the base's, of the parameters of one pass.

    Attributes:
        tensors: Each parameter's; None where there is none yet.
        in_order: Whether they lie in memory as their parameters do.
    """

    def __init__(self, batch: Batch, name: str, held: list[Any]):
        self.tensors = [
            None if x is None else part_of_state(name, x, owner, param)
            for x, owner, param in zip(held, batch.owners, batch.params, strict=True)
        ]
        pairs = zip(self.tensors, batch.params, strict=True)
        self.in_order = all(x is None or x.stride() == param.stride() for x, param in pairs)
        self._name, self._held = name, held
        # not shards, nor copies of what lies on another device: they may be others every time
        self._lasts = not any(map(is_sharded, batch.owners)) and identical(self.tensors, held)
        self._own: list[dict[str, Any]] = []  # the parameters' states, if each has it
        self._all: list[Any] = []  # those of all of the optimizer's parameters
        # of a tensor whose memory is replaced it is along with everyone's
        self._watched = [x for x in held[:1] + held[-1:] if x is not None]
        self._addresses = self._find_addresses()

    def _find_addresses(self) -> list[int]:
        return list(map(Tensor.data_ptr, self._watched)) if self._lasts else []

    def remember(self, own: list[dict[str, Any]], everything: Collection[Any]) -> None:
        """Note where it has been found."""
        if self._lasts and all(x is not None for x in self._held):
            self._own, self._all = own, list(everything)

    def is_current(self, everything: Collection[Any]) -> bool:
        """Whether the optimizer holds the same tensors still, where they were."""
        if not (self._own and identical(self._all, everything)):
            return False
        try:
            return self.has(list(map(itemgetter(self._name), self._own)))
        except KeyError:
            return False

    def has(self, held: Sequence[Any]) -> bool:
        """Whether these are the tensors, where they were."""
        same = self._lasts and len(held) == len(self._held) and all(map(is_, held, self._held))
        return same and self._find_addresses() == self._addresses


def parts_of_state(
    name: str, states: States, owners: Sequence[Tensor], params: Sequence[Tensor]
) -> list[Any]:
    """This process's part of each parameter's state of that name; None where there is none.

    Raises:
        RuntimeError: If one is no tensor, or has another shape, or is sharded otherwise.
    """
    held = [states[owner].get(name) if owner in states else None for owner in owners]
    return [
        x
        # as a rule a tensor like the parameter, where that is
        if x is None or (type(x) is Tensor and owner is param and x.shape == param.shape
                         and x.device == param.device)
        else part_of_state(name, x, owner, param)
        for x, owner, param in zip(held, owners, params, strict=True)
    ]  # fmt: skip


def part_of_state(name: str, x: Any, owner: Tensor, param: Tensor) -> Tensor:
    """This process's part of a state tensor, checked."""
    if not isinstance(x, Tensor):
        raise RuntimeError(
            f"state {name!r} of a parameter has to be a tensor, got {type(x).__name__}"
        )
    if x.shape != owner.shape:
        raise refuse_shape(name, x, owner)
    check_shards({name: x}, owner)
    found: Tensor = local(x)
    return found.to(param.device)  # the model may have moved after its optimizer


def _check_kept(name: str, state: dict[str, Any]) -> None:
    """A base that is not fused and has begun keeps what the ascent reads."""
    kept = [key for key in state if key != MASTER and not str(key).startswith("ascent_")]
    if kept:
        raise RuntimeError(
            f"base_optimizer must be one that keeps {name!r}, which the ascent reads; it keeps "
            f"{', '.join(map(repr, kept))}"
        )


def find_base_state_read(batch: Batch, spec: StepSpec, states: States) -> None:
    """Give the batch what the ascent reads of the base's state.

    Raises:
        RuntimeError: If a base that is not fused keeps other state, and not this; if a tensor has
            not the parameter's shape, or is sharded otherwise.
    """
    assert batch.layout is not None
    name, everything, found = spec.ascent.base_state, states.values(), batch.layout.read
    if found is None or not found.is_current(everything):
        own: list[dict[str, Any]] = [states.get(param, {}) for param in batch.owners]
        held = [state.get(name) for state in own]
        for state, x, i in zip(own, held, batch.groups, strict=True):
            if x is None and spec.base_of(i) is None:
                _check_kept(name, state)
        if found is None or not found.has(held):
            found = batch.layout.read = BaseStates(batch, name, held)
        found.remember(own, everything)
    batch.read, batch.prepared = found.tensors, found


class Computed:
    """Room for what a function computes for the parameters of one pass.

    It is kept, so that launches find it where it was.

    Attributes:
        tensors, in_order: As in :class:`BaseStates`.
    """

    def __init__(self, batch: Batch):
        self.tensors = [torch.empty_like(x, dtype=wide_dtype(x)) for x in batch.params]
        pairs = zip(self.tensors, batch.params, strict=True)
        self.in_order = all(x.stride() == param.stride() for x, param in pairs)

    def fits(self, batch: Batch) -> bool:
        """Whether it is room for these parameters, where they are now."""
        return len(self.tensors) == len(batch.params) and all(
            x.device == param.device and x.dtype == wide_dtype(param) and x.shape == param.shape
            for x, param in zip(self.tensors, batch.params, strict=True)
        )


def compute_what_is_read(
    batch: Batch, spec: StepSpec, states: States, inverse_scale: Tensor | None
) -> None:
    """Give the batch what the ascent's function computes: of gradients and the base's state, or of
    norms of the weights.

    Args:
        inverse_scale: Of the gradients, where they carry a loss scale.

    Raises:
        TypeError, ValueError: If it gives something else than a tensor of the gradient's shape.
    """
    rule, layout = spec.ascent, batch.layout
    by = _by_functions if rule.layer_scale is None else _by_norms
    values = by(batch, spec, states, inverse_scale)
    found = None if layout is None else layout.read
    if not (isinstance(found, Computed) and found.fits(batch)):
        found = Computed(batch)
        if layout is not None:
            layout.read = found
    for room, value in zip(found.tensors, values, strict=True):
        room.copy_(value)
    batch.read, batch.prepared = list(found.tensors), found


def _by_functions(
    batch: Batch, spec: StepSpec, states: States, inverse_scale: Tensor | None
) -> list[Tensor]:
    rule, values = spec.ascent, []
    assert rule.computes is not None
    for param, owner, grad, i in zip(
        batch.params, batch.owners, batch.grads, batch.groups, strict=True
    ):
        g = sign_of(spec.groups[i]) * wide(grad)
        if inverse_scale is not None:
            g = inverse_scale.to(g.device, g.dtype, non_blocking=True) * g
        held = {
            key: local(x) if isinstance(x, Tensor) else x
            for key, x in states.get(owner, {}).items()
            if key != MASTER
        }
        values.append(_check_computed(rule.base_state, rule.computes(g, held), param))
    return values


def _by_norms(
    batch: Batch, spec: StepSpec, states: States, inverse_scale: Tensor | None
) -> list[Tensor]:
    scale = spec.ascent.layer_scale
    assert scale is not None
    shardings = batch.shardings or [()] * len(batch.params)
    device = batch.params[0].device
    squares = {x: torch.zeros(len(batch.params), dtype=_wide(device), device=device)
               for x in shardings}  # fmt: skip
    for k, (param, sharding) in enumerate(zip(batch.params, shardings, strict=True)):
        master = None if batch.masters is None else batch.masters[k]
        w = param if master is None else torch.where(master.to(param.dtype) == param, master, param)
        norm = torch.linalg.vector_norm(w, dtype=squares[sharding].dtype)
        squares[sharding][k] = norm.square().to(device, non_blocking=True)
    norms = add_up(squares).sqrt()
    return [
        torch.as_tensor(scale(norms[k], spec.groups[i])).to(param.device, wide_dtype(param))
        for k, (param, i) in enumerate(zip(batch.params, batch.groups, strict=True))
    ]


def _wide(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64


def _check_computed(name: str, value: Any, param: Tensor) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must give a tensor, got {shown(value)}")
    if value.ndim and value.shape != param.shape:
        raise ValueError(
            f"{name} must give a tensor of the gradient's shape, {tuple(param.shape)}, or of no "
            f"dimension, got shape {tuple(value.shape)}"
        )
    return value
