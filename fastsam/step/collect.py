"""Finding the tensors of a pass, quickly where nothing has changed since the last one.

A training loop shows an optimizer the same tensors step after step, up to their addresses. What
follows from everything else is worked out once and kept with a :class:`Layout`; a pass then costs a
few sweeps over the parameters, in C wherever Python offers that.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain, repeat
from typing import Any

import torch
from torch import Tensor

from .base_state import parts_of_state
from .batch import Batch, Layout, identical
from .checks import check_partitioned, check_tensors
from .rule import Group
from .sharding import is_sharded, local, local_grad, sharding_of
from .spec import is_perturbed
from .state import States

Momentum = Callable[[list[Tensor], list[Tensor]], list[Any]]
#: Patterns of missing gradients that are remembered.
PATTERNS = 8


def ignore(params: list[Tensor]) -> None:
    """What there is to check by default."""


class Sweep:
    """Collects the parameters that have a gradient in one of an optimizer's passes.

    Args:
        check: Called with the parameters where they, or their dtypes, are not those of the last
            pass; may raise.
    """

    def __init__(self, check: Callable[[list[Tensor]], None] = ignore) -> None:
        self._check = check
        self.lists: list[list[Tensor]] = []  # of parameters, by group
        self._known: object = None  # lists of another sweep that are the same
        self._unique: tuple[list[Tensor], list[int]] = ([], [])
        self._shards = False  # whether some parameters are sharded
        self.layouts: dict[bytes | None, Layout] = {}
        self.made = 0  # how many layouts so far

    def collect(
        self, groups: Sequence[Group], name: str, before: "Sweep | None" = None,
        perturbs: bool = False, momentum: Momentum | None = None,
    ) -> Batch:  # fmt: skip
        """The parameters that have a gradient, each once, in the order of their groups, checked.

        Args:
            groups: The optimizer's parameter groups.
            name: The optimizer's.
            before: The sweep that looked at the parameters earlier in this step.
            perturbs: Leave out the groups that are not perturbed.
            momentum: Gives what stands in the place of gradients, for the optimizer's parameters
                and this process's parts of them.

        Raises:
            RuntimeError: For tensors that ``name`` does not serve (``check_tensors``).
        """
        lists = [group["params"] for group in groups]
        if perturbs:
            lists = [xs if is_perturbed(x) else [] for xs, x in zip(lists, groups, strict=True)]
        if not self._has(lists, before):
            params = list(chain.from_iterable(lists))
            index = chain.from_iterable(map(repeat, range(len(lists)), map(len, lists)))
            group_of = dict(zip(reversed(params), reversed(list(index)), strict=True))
            unique = list(dict.fromkeys(params))
            check_partitioned(unique)  # they may have been since they were given
            self.layouts = {}
            self._unique = unique, [group_of[param] for param in unique]
            self._shards = any(map(is_sharded, unique))
            self.lists = list(map(list, lists))  # last: they say that the others are right
        owners, indices = self._unique
        grads: list[Any]
        if momentum is not None:
            params = list(map(local, owners)) if self._shards else owners
            grads = momentum(owners, params)
        elif self._shards:
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
        layout = self.layouts.get(pattern)
        if self._shards and layout is not None and not identical(params, layout.params):
            layout = None
        again = before is not None
        if layout is None or addresses is None or not _fits(layout, grads, addresses, again):
            for k, (param, grad) in enumerate(zip(params, grads, strict=True)):
                check_tensors(param, grad, params[:1] if k else [], name)
            self._check(params)
            if len(self.layouts) >= PATTERNS:
                self.layouts = {}
            self.made += 1
            layout = self.layouts[pattern] = Layout(
                params=params,
                groups=indices,
                addresses=list(map(Tensor.data_ptr, params)),
                sizes=list(map(Tensor.numel, params)),
                dtypes=[x.dtype for x in chain(params, grads)],
                strides=list(map(Tensor.stride, chain(params, grads))),
                contiguous=all(map(Tensor.is_contiguous, chain(params, grads))),
                ordered=tuple(param for param in params if param.ndim > 1),
                owners=owners,
                shardings=list(map(sharding_of, owners)) if self._shards else None,
                has_empty=not all(map(Tensor.numel, params)),
                members=by_device(params),
                spreads=len(by_device([p for p in self._unique[0] if p.requires_grad])) > 1,
            )
        if addresses is not None and addresses != layout.seen:
            layout.seen = addresses
        return Batch(
            params=layout.params, grads=grads, groups=layout.groups, owners=layout.owners,
            shardings=layout.shardings, layout=layout,
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

    A parameter of a single dimension, where it was, has no other order.
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
        return all(map(Tensor.is_contiguous, chain(layout.ordered, grads)))
    return list(map(Tensor.stride, chain(layout.params, grads))) == layout.strides


def _momenta(
    name: str, states: States, owners: list[Tensor], params: list[Tensor]
) -> list[Tensor | None]:
    """The momentum of each parameter that has one and still is trained."""
    found = parts_of_state(name, states, owners, params)
    return [x if p.requires_grad else None for x, p in zip(found, owners, strict=True)]


def _those_trained(owners: Sequence[Tensor], params: Sequence[Tensor]) -> list[Any]:
    pairs = zip(owners, params, strict=True)
    return [param.detach() if owner.requires_grad else None for owner, param in pairs]


class Collector:
    """Finds the tensors of an optimizer's passes: a :class:`Sweep` for each kind of pass.

    Args:
        check: As a sweep has it.
    """

    def __init__(self, check: Callable[[list[Tensor]], None] = ignore) -> None:
        self._check = check
        names = ("first", "further", "second", "only", "other", "momentum", "weights")
        self._sweeps = {name: Sweep(check) for name in names}
        self._made = 0  # layouts of the first pass that the second pass's sweep knows of

    def first(self, groups: Sequence[Group], name: str) -> Batch:
        """The perturbed parameters that have a first gradient, checked; see ``Sweep``."""
        batch = self._sweeps["first"].collect(groups, name, perturbs=True)
        if self._sweeps["first"].made != self._made:
            for name_ in ("further", "second"):  # which do not look at everything again
                self._sweeps[name_] = Sweep(self._check)
            self._made = self._sweeps["first"].made
        return batch

    def further(self, groups: Sequence[Group], name: str) -> Batch:
        """The same of a first pass that comes after another in its step.

        Parameters may be elsewhere by then, so this is not the first one's sweep.
        """
        return self._sweeps["further"].collect(groups, name, self._sweeps["first"], perturbs=True)

    def momentum(self, groups: Sequence[Group], name: str, state: str, states: States) -> Batch:
        """The perturbed parameters that have a momentum, with that in the place of gradients.

        Args:
            groups, name: The optimizer's.
            state: The momentum's name in the base's state.
            states: The optimizer's.
        """
        return self._sweeps["momentum"].collect(
            groups, name, perturbs=True, momentum=partial(_momenta, state, states)
        )

    def weights(self, groups: Sequence[Group], name: str) -> Batch:
        """The perturbed parameters that need a gradient, with themselves in the place of it."""
        return self._sweeps["weights"].collect(groups, name, perturbs=True, momentum=_those_trained)

    def second(
        self, groups: Sequence[Group], name: str, after_first: bool, along_momentum: bool = False
    ) -> Batch:
        """All that have a second gradient, or with ``after_first=False`` a step's only one.

        These have a sweep of their own, as parameters may be elsewhere between two passes. Where
        the first of these was ``along_momentum`` it has not looked at the gradients' parameters.
        """
        if along_momentum and after_first:
            return self._sweeps["second"].collect(groups, name)
        if not after_first:
            return self._sweeps["only"].collect(groups, name)
        return self._sweeps["second"].collect(groups, name, self._sweeps["first"])

    def other(self, groups: Sequence[Group], name: str) -> Batch:
        """All that have a gradient, at another time."""
        return self._sweeps["other"].collect(groups, name)

    def layouts(self) -> Iterator[Layout]:
        """Everything that is remembered."""
        for sweep in self._sweeps.values():
            yield from sweep.layouts.values()

    def forget(self) -> None:
        """Look at everything anew from now on."""
        self.__init__(self._check)  # type: ignore[misc]
