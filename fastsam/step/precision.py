"""Parameters in 16 bits: master weights, and what stochastic rounding depends on."""

from collections.abc import Iterable
from itertools import chain
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from .batch import Batch, identical
from .capture import is_captured, refuse
from .rule import Group
from .sharding import coordinate_of, is_sharded, local

HALF = (torch.float16, torch.bfloat16)
ROUNDINGS = ("nearest", "stochastic")
#: The key of a parameter's master weights in its state.
MASTER = "master_weight"


def check_precision(master_weights: bool, rounding: str, fused: bool) -> None:
    """How 16-bit parameters are kept.

    Raises:
        ValueError: If it does not go together.
    """
    if master_weights and rounding == "stochastic":
        raise ValueError(
            "rounding must be 'nearest' with master_weights=True, got 'stochastic': use one of "
            "the two"
        )
    if master_weights and not fused:
        raise ValueError("master_weights must be False with a base optimizer that is not fused")


class Masters:
    """The master weights of one layout's parameters, as they were found complete.

    Attributes:
        tensors: Those of every parameter; None of one that has none.
    """

    def __init__(self, batch: Batch, states: Any, tensors: list[Tensor | None]) -> None:
        self.tensors = tensors
        self._everything = list(states.values())
        pairs = [
            (states[p], x) for p, x in zip(batch.owners, tensors, strict=True) if x is not None
        ]
        self._own = [state for state, _ in pairs]
        self._held = [x for _, x in pairs]
        # memory is replaced, if ever, along with everyone's
        self._watched = self._held[:1] + self._held[-1:]
        self._addresses = list(map(Tensor.data_ptr, self._watched))

    def are_current(self, states: Any) -> bool:
        """Whether the optimizer holds the same tensors still, where they were."""
        try:
            there = list(map(itemgetter(MASTER), self._own))
        except KeyError:
            return False
        return (
            identical(self._everything, states.values())
            and identical(there, self._held)
            and list(map(Tensor.data_ptr, self._watched)) == self._addresses
        )


def find_masters(name: str, batch: Batch, states: Any) -> list[Tensor | None]:
    """The master weights of a batch's parameters, created where they are missing.

    They are the same list as long as nothing about them changes.

    Raises:
        RuntimeError: If one has not its parameter's shape, or would be created under capture.
    """
    layout = batch.layout
    if layout is not None and layout.masters is not None and layout.masters.are_current(states):
        found: list[Tensor | None] = layout.masters.tensors
        return found
    masters: list[Tensor | None] = []
    for param in batch.owners:
        if param.dtype not in HALF:
            masters.append(None)
            continue
        master = states[param].get(MASTER)
        if master is None:
            if is_captured(batch):
                raise refuse(name, "it has no master weights yet: take a step outside")
            master = torch.empty_like(param, dtype=torch.float32, requires_grad=False).copy_(param)
        elif master.shape != param.shape:
            raise RuntimeError(
                f"state {MASTER!r} has shape {tuple(master.shape)} and its parameter "
                f"{tuple(param.shape)}: the state dict was made for other parameters"
            )
        elif not is_sharded(param) and (
            master.stride() != param.stride() or master.dtype != torch.float32
        ):
            like = torch.empty_like(param, dtype=torch.float32, requires_grad=False)
            if (master.stride(), master.dtype) != (like.stride(), like.dtype):
                master = like.copy_(master)
        master = master.to(param.device)
        states[param][MASTER] = master
        masters.append(local(master))
    if layout is not None and layout.shardings is None:
        layout.masters = Masters(batch, states, masters)
    return masters


def find_places(batch: Batch, groups: Iterable[Group]) -> list[int]:
    """Every parameter's place among all, in the order of the groups."""
    layout = batch.layout
    if layout is not None and layout.places is not None:
        return layout.places
    everyone = chain.from_iterable(group["params"] for group in groups)
    place = {param: i for i, param in enumerate(dict.fromkeys(everyone))}
    # shards of one parameter round by bits of their own
    places = [place[param] + len(place) * coordinate_of(param) for param in batch.owners]
    if layout is not None:
        layout.places = places
    return places
