"""Finding the tensors of a pass, quickly where nothing has changed since the last one.

A training loop shows an optimizer the same tensors step after step, up to their addresses. What
follows from everything else is worked out once and kept with a :class:`Layout`; a pass then costs a
few sweeps over the parameters, in C wherever Python offers that.
"""

from collections.abc import Collection, Iterable, Sequence
from itertools import chain, compress, repeat
from operator import is_, itemgetter
from typing import Any

import torch
from torch import Tensor

from .bases import Base, Group
from .checks import check_partitioned, check_tensors
from .rules import Batch, Layout, identical
from .sharding import is_sharded, local, local_grad, sharding_of

#: Patterns of missing gradients that are remembered.
PATTERNS = 8


class Sweep:
    """Collects the parameters that have a gradient in one of an optimizer's passes."""

    def __init__(self) -> None:
        self.lists: list[list[Tensor]] = []  # of parameters, by group
        self._known: object = None  # lists of another sweep that are the same
        self._unique: tuple[list[Tensor], list[int]] = ([], [])
        self._shards = False  # whether some parameters are sharded
        self._layouts: dict[bytes | None, Layout] = {}
        self.made = 0  # how many layouts so far

    def collect(self, groups: Sequence[Group], name: str, before: "Sweep | None" = None) -> Batch:
        """The parameters that have a gradient, each once, in the order of their groups, checked.

        Args:
            groups: The optimizer's parameter groups.
            name: The optimizer's.
            before: The sweep that looked at the parameters earlier in this step.

        Raises:
            RuntimeError: For tensors that ``name`` does not serve (``check_tensors``).
        """
        lists = [group["params"] for group in groups]
        if not self._has(lists, before):
            params = list(chain.from_iterable(lists))
            index = chain.from_iterable(map(repeat, range(len(lists)), map(len, lists)))
            group_of = dict(zip(reversed(params), reversed(list(index)), strict=True))
            unique = list(dict.fromkeys(params))
            check_partitioned(unique)  # they may have been since they were given
            self._layouts = {}
            self._unique = unique, [group_of[param] for param in unique]
            self._shards = any(map(is_sharded, unique))
            self.lists = list(map(list, lists))  # last: they say that the others are right
        owners, indices = self._unique
        grads: list[Any]
        if self._shards:
            params, grads = list(map(local, owners)), list(map(local_grad, owners))
        else:
            params, grads = owners, [param.grad for param in owners]
        pattern = None
        addresses = _addresses(grads)
        if addresses is None:  # one is missing, or sparse
            pattern = bytes(grad is None for grad in grads)
            present = [k for k, missing in enumerate(pattern) if not missing]
            params, indices = [params[k] for k in present], [indices[k] for k in present]
            grads, owners = [grads[k] for k in present], [owners[k] for k in present]
            addresses = _addresses(grads)
        layout = self._layouts.get(pattern)
        if self._shards and layout is not None and not identical(params, layout.params):
            layout = None
        again = before is not None
        if layout is None or addresses is None or not _fits(layout, grads, addresses, again):
            for k, (param, grad) in enumerate(zip(params, grads, strict=True)):
                check_tensors(param, grad, params[:1] if k else [], name)
            if len(self._layouts) >= PATTERNS:
                self._layouts = {}
            self.made += 1
            layout = self._layouts[pattern] = Layout(
                params=params,
                groups=indices,
                addresses=list(map(Tensor.data_ptr, params)),
                sizes=list(map(Tensor.numel, params)),
                dtypes=[x.dtype for x in chain(params, grads)],
                strides=list(map(Tensor.stride, chain(params, grads))),
                contiguous=all(map(Tensor.is_contiguous, chain(params, grads))),
                ordered=tuple(param for param in params if param.ndim > 1),
                owners=owners,
                shardings=list(map(sharding_of, owners)) if self._shards else [],
                has_empty=not all(map(Tensor.numel, params)),
                members=by_device(params),
                spreads=len(by_device([p for p in self._unique[0] if p.requires_grad])) > 1,
            )
        if addresses is not None and addresses != layout.seen:
            layout.seen = addresses
        return Batch(
            params=layout.params, grads=grads, groups=layout.groups, owners=layout.owners,
            shardings=layout.shardings, ascent=layout.stateless, next=layout.stateless,
            firsts=layout.nothing, layout=layout,
        )  # fmt: skip

    def _has(self, lists: list[list[Tensor]], before: "Sweep | None") -> bool:
        """Whether these are the parameters of this sweep's last pass, in the same groups.

        Between two passes of a step nothing but their number is looked at.
        """
        known = None if before is None else before.lists
        if known is not None and known is self._known:
            return list(map(len, lists)) == list(map(len, self.lists))
        self._known = None
        if len(lists) != len(self.lists) or not all(map(identical, lists, self.lists)):
            return False
        self._known = known
        return True


def device_of(param: Tensor) -> torch.device:
    return param.device


def by_device(params: Sequence[Tensor]) -> dict[torch.device, list[int]]:
    """Positions of parameters by their devices, in the order of the devices."""
    members: dict[torch.device, list[int]] = {}
    for k, param in enumerate(params):
        members.setdefault(device_of(param), []).append(k)
    return dict(sorted(members.items(), key=lambda item: item[0].index or 0))


def _addresses(grads: list[Any]) -> list[int] | None:
    """Where the gradients are; None where one of them has no address."""
    try:
        return list(map(Tensor.data_ptr, grads))
    except (TypeError, RuntimeError):
        return None


def _fits(layout: Layout, grads: list[Tensor], addresses: list[int], again: bool) -> bool:
    """Whether gradients still have the layout, and parameters, which may have been moved.

    Those are looked at once a step; one of a single dimension, where it was, has no other order.
    """
    if list(map(Tensor.data_ptr, layout.params)) != layout.addresses:
        return False
    if not again and list(map(Tensor.numel, grads)) != layout.sizes:  # shrunk where it was
        return False
    # dtypes are looked at only where a gradient moved: a cast tensor is elsewhere, if not empty
    if layout.has_empty:
        if [x.dtype for x in chain(layout.params, grads)] != layout.dtypes:
            return False
    elif addresses != layout.seen:
        if [grad.dtype for grad in grads] != layout.dtypes[len(grads) :]:
            return False
    if layout.contiguous:
        return all(map(Tensor.is_contiguous, grads if again else chain(layout.ordered, grads)))
    strides = layout.strides[len(grads) :] if again else layout.strides
    return list(map(Tensor.stride, grads if again else chain(layout.params, grads))) == strides


class Prepared:
    """The base's state of one layout's parameters, as it was found complete."""

    def __init__(
        self, batch: Batch, base: Base, groups: Sequence[Group], everything: Iterable[Any]
    ):
        self.states = batch.states
        self._names = [list(base.states(group)) for group in groups]
        has = {id(state): self._names[i] + ["step"] * base.counts_steps
               for state, i in zip(batch.states, batch.groups, strict=True)}  # fmt: skip
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

    def is_current(self, base: Base, groups: Sequence[Group], everything: Collection[Any]) -> bool:
        """Whether the optimizer holds the same tensors still, where they were."""
        try:
            return (
                len(everything) == self._count
                and self._names == [list(base.states(group)) for group in groups]
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
