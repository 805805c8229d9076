"""The base's and the ascent's state of a pass's parameters: found once, and kept while it holds."""

import functools
from collections import deque
from collections.abc import Collection, Iterable, MutableMapping, Sequence
from itertools import chain, compress
from operator import is_, itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from fastsam.arithmetic import wide_dtype

from .batch import Batch, identical
from .capture import is_captured
from .checkpoint import BASE_KEY
from .memory import Owned
from .rule import Ascent, Base, Group
from .saved_state import fitting, is_exact, is_fastsams
from .sharding import check_shards, is_sharded, local_state
from .spec import StepSpec

States = MutableMapping[Tensor, dict[str, Any]]


def refuse_shape(name: str, found: Tensor, param: Tensor) -> RuntimeError:
    # the kernels walk raw memory: this would be out of bounds
    return RuntimeError(
        f"state {name!r} has shape {tuple(found.shape)} and its parameter {tuple(param.shape)}: "
        "the state dict was made for other parameters"
    )


# --- the base's ------------------------------------------------------------------------------


def find_base_state(batch: Batch, spec: StepSpec, states: States, optimizer: Optimizer) -> None:
    """Give the batch the base's state of its parameters, created where it is missing.

    Where there are several bases, that of a parameter whose base is not fused is none.

    Raises:
        RuntimeError: If a state tensor has not the parameter's shape, or is sharded otherwise.
    """
    assert batch.layout is not None
    held, everything, groups = batch.layout.prepared, states.values(), spec.groups
    bases = [spec.base] * len(groups) if spec.bases is None else spec.bases
    if held is not None and held.is_current(bases, groups, everything):
        batch.states, batch.prepared, batch.fresh = held.states, held, None
        return
    batch.layout.prepared = None
    batch.states, batch.fresh = [], []
    for k, (param, grad, i) in enumerate(zip(batch.owners, batch.grads, batch.groups, strict=True)):
        base = bases[i]
        if base is None:
            _follow_cast(states.get(param, {}), param, groups[i], optimizer)
            batch.states.append({})
            batch.fresh.append(False)
            continue
        state = states.get(param, {})
        has_master = batch.masters is not None and batch.masters[k] is not None
        # should the next line fail
        batch.fresh.append(_lacks(state, base.starts_from_gradient))
        batch.fresh[-1] = create_base_state(base, state, param, grad, groups[i], has_master)
        if state:  # as in torch, a parameter without state has no entry
            states[param] = state
        check_shards(state, param)
        batch.states.append(local_state(state))
    if not any(batch.fresh):
        batch.fresh = None
        if not any(map(is_sharded, batch.owners)):
            batch.prepared = batch.layout.prepared = Prepared(batch, bases, groups, everything)


def _lacks(state: dict[str, Any], name: str) -> bool:
    return bool(name) and state.get(name) is None


def create_base_state(
    base: Base, state: dict[str, Any], param: Tensor, grad: Tensor, group: Group,
    has_master: bool = False,
) -> bool:  # fmt: skip
    """Create what is missing in a parameter's state.

    Args:
        base: Whose it is.
        state: What there is; it is added to.
        param, grad, group: The parameter's.
        has_master: Whether it has master weights: its state is in float32, too, then.

    Returns:
        Whether state that starts from the gradient is new.

    Raises:
        RuntimeError: If a state tensor has not the parameter's shape.
    """
    fresh, starts = False, base.state_names(group)
    wide = base.wide or has_master
    if base.counts_steps:
        step = state.get("step", 0.0)
        if not isinstance(step, Tensor) or step.device != param.device:
            # filled in, not copied: a copy from the host would wait for the device
            step = torch.full((), float(step), device=param.device)
        state["step"] = step.to(torch.float32)
    for name, start in starts.items():
        if state.get(name) is None:
            # torch clones the first gradient into the buffer, so it has the gradient's dtype
            dtype = grad.dtype if name == base.starts_from_gradient else param.dtype
            if wide:
                dtype = torch.promote_types(param.dtype, torch.float32)
            state[name] = torch.full_like(param, start, dtype=dtype)
            fresh |= name == base.starts_from_gradient
        elif state[name].shape != param.shape:
            raise refuse_shape(name, state[name], param)
        elif state[name].device != param.device:  # the model moved after its optimizer
            state[name] = state[name].to(param.device)
        as_grad = name == base.starts_from_gradient and state[name].dtype == grad.dtype
        if not as_grad:
            state[name] = fitting(state[name], param)  # where the model has been cast
        if wide:  # torch's own, or a checkpoint's
            state[name] = state[name].to(torch.promote_types(state[name].dtype, torch.float32))
    dtypes = [state[name].dtype for name in starts]
    if len(set(dtypes)) > 1:  # from a checkpoint put together by hand
        widest = functools.reduce(torch.promote_types, dtypes)
        state.update({name: state[name].to(widest) for name in starts})
    return fresh


def follow_casts(batch: Batch, spec: StepSpec, states: States, base: Optimizer) -> None:
    """Let the state of bases that are not fused follow parameters that were cast in the meantime.

    torch's operators would refuse it in the middle of a step.
    """
    assert batch.layout is not None
    if batch.layout.prepared is not None:  # what a fused base's would be in
        return
    batch.layout.prepared = True
    for param, i in zip(batch.owners, batch.groups, strict=True):
        _follow_cast(states.get(param, {}), param, spec.groups[i], base)


def _follow_cast(state: dict[str, Any], param: Tensor, group: Group, base: Optimizer) -> None:
    exact = is_exact(getattr(base, "members", {}).get(group.get(BASE_KEY), base), None)
    for name, x in state.items():
        if isinstance(x, Tensor) and name != "step" and not is_fastsams(name):
            state[name] = fitting(x, param, exact)


def forget_fresh(batch: Batch, spec: StepSpec, states: States) -> None:
    """After a failure: state that was to start from the gradient is still to start."""
    # not strict: not all may have been prepared, or all have begun
    for param, fresh, i in zip(batch.owners, batch.fresh or (), batch.groups, strict=False):
        base = spec.base_of(i)
        if fresh and base is not None:
            state = states.get(param, {})
            state.pop(base.starts_from_gradient, None)
            if not state:
                states.pop(param, None)


class Prepared:
    """The base's state of one layout's parameters, as it was found complete."""

    def __init__(
        self, batch: Batch, bases: Sequence[Base | None], groups: Sequence[Group],
        everything: Iterable[Any],
    ):  # fmt: skip
        assert batch.states is not None
        self.states = batch.states
        self._names = [
            [] if base is None else list(base.state_names(group))
            for base, group in zip(bases, groups, strict=True)
        ]
        has = {id(state): self._names[i] + ["step"] * base.counts_steps
               for state, i in zip(batch.states, batch.groups, strict=True)
               if (base := bases[i]) is not None}  # fmt: skip
        everything = list(everything)
        self._count = len(everything)
        # by name: which states have it and count, None for all of them, and the tensors
        self._tensors: dict[str, tuple[list[bool] | None, list[Tensor]]] = {}
        for name in dict.fromkeys(chain.from_iterable(has.values())):
            counts = [name in has.get(id(state), ()) for state in everything]
            tensors = [state[name] for state in compress(everything, counts)]
            self._tensors[name] = None if all(counts) else counts, tensors
        # A tensor's memory is replaced, if ever, along with everyone's: two of each name are looked
        # at. What the tables point to stays alive in any case.
        self._watched = [x for _, xs in self._tensors.values() for x in (xs[0], xs[-1])]
        self._addresses = list(map(Tensor.data_ptr, self._watched))
        self._memory = [x.detach() for _, xs in self._tensors.values() for x in xs]

    def is_current(
        self, bases: Sequence[Base | None], groups: Sequence[Group], everything: Collection[Any]
    ) -> bool:
        """Whether the optimizer holds the same tensors still, where they were."""
        try:
            return (
                len(everything) == self._count
                and self._names == [
                    [] if base is None else list(base.states(group))
                    for base, group in zip(bases, groups, strict=True)
                ]
                and all([
                    all(map(is_, map(itemgetter(name), _those(everything, counts)), tensors))
                    for name, (counts, tensors) in self._tensors.items()
                ])
                and list(map(Tensor.data_ptr, self._watched)) == self._addresses
            )  # fmt: skip
        except (KeyError, IndexError, TypeError):  # one was removed, or something else is there
            return False


def _those(states: Iterable[Any], counts: list[bool] | None) -> Iterable[Any]:
    return states if counts is None else compress(states, counts)


# --- the ascent's ----------------------------------------------------------------------------


def ascent_state(
    ascent: Ascent, held: dict[str, Any], param: Tensor, group: Group
) -> dict[str, Tensor]:
    """A parameter's state, new where there is none; ``held`` does not change.

    Raises:
        RuntimeError: If a state tensor has not the parameter's shape.
    """
    state = {}
    for name, start in ascent.state_names(group).items():
        tensor = held.get(name)
        if tensor is None:
            tensor = torch.full_like(param, start, dtype=wide_dtype(param))
        elif tensor.shape != param.shape:
            raise refuse_shape(name, tensor, param)
        state[name] = tensor.to(param.device, wide_dtype(param))
    return state


class AscentStates:
    """The ascent rule's state of one pass's parameters: before the step, and room for the next.

    A step reads the old and writes the new. When it is complete the new becomes the state, and the
    old one's memory is kept for the step after, where nobody else holds it: fresh pages on a CPU
    cost as much as writing to them, and so many new tensors more on the host than all launches.
    Both are there from the first to the second pass in any case, when memory is scarcest.

    Attributes:
        old, new: The state of every parameter, by name.
        turn: Which of two memories holds the old one, 0 or 1.
        in_order: Whether every state tensor lies in memory as its parameter does.
    """

    def __init__(self, ascent: Ascent, batch: Batch, groups: Sequence[Group], states: States):
        self.owners = batch.owners
        self._names = [list(ascent.state_names(group)) for group in groups]
        self.old: list[dict[str, Tensor]] = []
        self.new: list[dict[str, Tensor]] = []
        for param, i in zip(batch.owners, batch.groups, strict=True):
            state = ascent_state(ascent, states.get(param, {}), param, groups[i])
            check_shards(state, param)
            self.old.append(state)
        self._shards = any(map(is_sharded, batch.owners))
        self.in_order = not self._shards and all(
            x.stride() == param.stride()
            for param, state in zip(batch.owners, self.old, strict=True)
            for x in state.values()
        )
        self._held: list[dict[str, Any]] | None = None  # the optimizer's, of all its parameters
        self._own: list[dict[str, Any]] = []  # of these
        # the memory of both, and where it is: of the old state as of the last step's end
        self._old_memory: Owned | None = None
        self._new_memory: Owned | None = None
        self._is_spare = False  # whether the new one's memory is that of the state before last
        self._old_addresses: list[int] = []
        self._new_addresses: list[int] = []
        self.turn = 0

    def locate(self) -> None:
        """Note where the old state is."""
        if not self._shards:
            tensors = chain.from_iterable(map(dict.values, self.old))
            self._old_addresses = list(map(Tensor.data_ptr, tensors))

    def is_current(
        self, ascent: Ascent, batch: Batch, groups: Sequence[Group], states: States
    ) -> bool:
        """Whether the optimizer holds this state still, where it was."""
        if self._shards or self._held is None or self._old_memory is None:
            return False
        if self._names != [list(ascent.states(group)) for group in groups]:
            return False
        if not (identical(self._held, states.values()) and identical(self.owners, batch.owners)):
            return False
        try:
            pairs = zip(self._own, self.old, strict=True)
            there = [own[name] for own, old in pairs for name in old]
        except KeyError:
            return False
        tensors, addresses = self._old_memory.tensors, self._old_addresses
        # a tensor's memory is replaced, if ever, along with everyone's
        watched = list(map(Tensor.data_ptr, tensors[:1] + tensors[-1:]))
        return identical(there, tensors) and watched == addresses[:1] + addresses[-1:]

    def make_room(self, captured: bool) -> None:
        """Have memory for the next state; new memory where a graph goes on to write to it."""
        memory, spare = self._new_memory, self._is_spare and not captured
        self._is_spare = False
        if not (spare and memory is not None and memory.is_alone()):
            self.new = [
                {
                    name: torch.empty_like(param, dtype=x.dtype, requires_grad=False)
                    for name, x in old.items()
                }
                for param, old in zip(self.owners, self.old, strict=True)
            ]
            tensors = list(chain.from_iterable(map(dict.values, self.new)))
            self._new_memory = None if self._shards else Owned(tensors, holders=1)
            self._new_addresses = [] if self._shards else list(map(Tensor.data_ptr, tensors))

    def give_to(self, batch: Batch) -> None:
        """Let a pass over some of the parameters find its state."""
        old: list[Any] = self.old
        new: list[Any] = self.new
        batch.held = self
        if self._shards:
            old, new = list(map(local_state, old)), list(map(local_state, new))
            batch.held = None
        if not identical(batch.owners, self.owners):
            place = {param: k for k, param in enumerate(self.owners)}
            positions = [place.get(param) for param in batch.owners]
            old = [None if k is None else old[k] for k in positions]
            new = [None if k is None else new[k] for k in positions]
            batch.held = None
        batch.ascent, batch.next = old, new

    def addresses(self, count: int, j: int, members: Sequence[int]) -> tuple[list[int], list[int]]:
        """Where the old and the new ``j``-th state tensors of some parameters are.

        ``count`` is the number of state tensors of every parameter.
        """
        old, new = self._old_addresses[j::count], self._new_addresses[j::count]
        if len(members) == len(old):
            return old, new
        return [old[k] for k in members], [new[k] for k in members]

    def others(self, batch: Batch) -> Batch:
        """A batch with the state alone of parameters that another batch has not."""
        if identical(batch.owners, self.owners):
            return Batch()
        updated = set(batch.owners)
        rest = [k for k, param in enumerate(self.owners) if param not in updated]
        return Batch(
            ascent=[local_state(self.old[k]) for k in rest],
            next=[local_state(self.new[k]) for k in rest],
        )

    def commit(self, states: States, captured: bool) -> None:
        """Let the new state be the optimizer's.

        Args:
            states: The optimizer's.
            captured: Whether a graph reads the old state, and will look for the new one there.
        """
        if captured:
            for old, new in zip(self.old, self.new, strict=True):
                for name, x in new.items():
                    old[name].copy_(x)
        else:
            self.old, self.new = self.new, self.old
            self._old_memory, self._new_memory = self._new_memory, self._old_memory
        if self._held is None or not identical(self._held, states.values()):
            self._own = [states[param] for param in self.owners]
            self._held = list(states.values())
        deque(map(dict.update, self._own, self.old), maxlen=0)  # in C
        if self._shards or captured:
            self._held = None  # to be looked at anew
            return
        assert self._old_memory is not None
        self._old_addresses, self._new_addresses = self._new_addresses, self._old_addresses
        self.turn = 1 - self.turn
        self._is_spare = self._new_memory is not None


def find_ascent_state(
    ascent: Ascent, batch: Batch, groups: Sequence[Group], states: States
) -> AscentStates | None:
    """The ascent's state of a batch, with room for the next; the batch gets it.

    Raises:
        RuntimeError: If a state tensor has not the parameter's shape, or is sharded otherwise.
    """
    if not any(ascent.states(group) for group in groups):
        return None
    assert batch.layout is not None
    held = batch.layout.held
    if held is None or not held.is_current(ascent, batch, groups, states):
        held = batch.layout.held = AscentStates(ascent, batch, groups, states)
        held.locate()
    held.make_room(is_captured(batch))
    held.give_to(batch)
    return held  # type: ignore[no-any-return]
