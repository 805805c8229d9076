"""What lives from a step's first pass to its second."""

import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from fastsam.kernels.layout import Scalar

from .batch import Batch, identical
from .caches import forget_weights
from .samples import Samples
from .scaling import LossScale
from .sharding import local
from .state import AscentStates, States
from .streams import current_stream, use_here


class Backup(Protocol):
    """The unperturbed weights, from the first pass to the second."""

    def restore(self) -> None:
        """Copy every weight back, bit for bit."""

    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """Every perturbed parameter, with its unperturbed weights."""


#: Steps that have perturbed weights and not yet restored them, of all optimizers, by their ids.
_OPEN: "dict[int, weakref.ref[InFlight]]" = {}


def _forget(key: int, _: object) -> None:
    _OPEN.pop(key, None)


class Mark:
    """A parameter's gradient, to be known again, of which neither tensor nor memory is kept.

    A weak reference to the tensor would be in the way of ``torch.utils.swap_tensors``, with which
    modules are converted. One to its storage is not, and keeps the storage's address from being
    used again; a tensor's id may be.

    Attributes:
        writes: How often it has been written since; None where it is another, or there is none.
    """

    def __init__(self, param: Tensor) -> None:
        grad = param.grad
        assert grad is not None
        self._param, self._id, self._version = param, id(grad), grad._version
        self._memory = _memory_of(grad)

    @property
    def writes(self) -> int | None:
        grad = self._param.grad
        if grad is None or id(grad) != self._id or _memory_of(grad) != self._memory:
            return None
        writes = grad._version - self._version
        # a view counts what is written to any other, and may be a new one of the same memory
        return None if writes and grad._is_view() else writes


def _memory_of(x: Tensor) -> StorageWeakRef:
    return StorageWeakRef(local(x).untyped_storage())  # type: ignore[no-untyped-call]


@dataclass(eq=False)
class InFlight:
    """A step that has begun.

    Attributes:
        perturbs: Whether it has two passes.
        lam: Unified SAM's weight of normalisation in it.
        ascents: How many first passes it has.
        taken: How many of them there have been.
        scale: The loss scale that its gradients carry.
        replicas: The process group of replicas that have first gradients of their own.
        backup: The unperturbed weights; None where nothing has been perturbed.
        ascent: The ascent rule's state, old and new.
        firsts: First gradients, where the second pass needs them, and whose they are.
        samples: Sums of the gradients at several perturbations, where a step has them.
        saw_shards: Whether sharded parameters had a first gradient.
        squares: The ascent's squared norms by segment, where they are not global.
        seen: Gradients that the first pass left.
        perturbed: Copies of the perturbed weights, while the unperturbed are in their place.
        owners: The parameters that it has perturbed.
        of: Whose it is, and the name of that.
        loss: At w + e, where the descent rule takes it.
        stream: A device, and the stream on it of the pass that perturbed the weights.
    """

    perturbs: bool
    lam: float = 1.0
    ascents: int = 1
    taken: int = 0
    scale: LossScale | None = None
    replicas: Any = None
    backup: Backup | None = None
    ascent: AscentStates | None = None
    firsts: tuple[list[Tensor], list[Tensor]] | None = None
    samples: Samples | None = None
    saw_shards: bool = False
    squares: Tensor | None = None
    seen: list[Mark] = field(default_factory=list)
    perturbed: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    owners: list[Tensor] = field(default_factory=list)
    of: tuple[object, str] = None, ""
    loss: Tensor | None = None
    stream: tuple[torch.device, int] | None = None

    def begin(self, of: object, name: str, batch: Batch) -> None:
        """The weights are perturbed now."""
        if not self.owners:
            self.owners = batch.owners
        elif not identical(self.owners, batch.owners):  # of a further first pass
            self.owners = list(dict.fromkeys([*self.owners, *batch.owners]))
        self.of = of, name
        device = batch.params[0].device
        self.stream = device, current_stream(device)
        # an optimizer that is dropped between its passes does not stand in another's way
        _OPEN[id(self)] = weakref.ref(self, partial(_forget, id(self)))

    def _end(self) -> None:
        """They are, or are about to be, what they were before, or updated."""
        _OPEN.pop(id(self), None)
        forget_weights()
        if self.stream is not None and current_stream(self.stream[0]) != self.stream[1]:
            use_here(self._memory())

    def _memory(self) -> Iterator[Tensor]:
        """What the step frees at its end, and may have been allocated in its first pass."""
        if self.backup is not None:
            yield from (local(w) for _, w in self.backup.pairs())
        if self.firsts is not None:
            yield from map(local, self.firsts[1])
        if self.samples is not None:
            yield from self.samples.tensors()
        if self.ascent is not None:
            yield from (local(x) for state in self.ascent.old for x in state.values())

    @property
    def ascents_left(self) -> int:
        """How many more first passes are due."""
        return self.ascents - self.taken

    def keep_firsts(self, batch: Batch, grads: list[Tensor]) -> None:
        """Keep the first gradients for the second pass."""
        self.firsts = batch.owners, grads

    def note_gradients(self, batch: Batch) -> None:
        """Remember the first and the last parameter's gradient, to know them again."""
        ends: Sequence[Tensor] = batch.owners[:1] + batch.owners[-1:]
        self.seen = [Mark(param) for param in ends if param.grad is not None]

    def give_to(self, batch: Batch) -> bool:
        """Let the second pass's batch have what the first pass left.

        Returns:
            Whether first gradients are kept, and some of the batch's parameters had none.
        """
        if self.ascent is not None:
            self.ascent.give_to(batch)
        if self.firsts is not None:
            owners, grads = self.firsts
            if identical(owners, batch.owners):
                batch.firsts = list(grads)
            else:
                by_owner = dict(zip(owners, grads, strict=True))
                batch.firsts = [by_owner.get(param) for param in batch.owners]
                return any(first is None for first in batch.firsts)
        return False

    def start_again(self) -> None:
        """Have the unperturbed weights in the parameters, for another perturbation of them."""
        if self.backup is not None:
            write(self.backup.pairs())

    def suspend(self) -> None:
        """Have the unperturbed weights in the parameters, until :meth:`resume`.

        The backup stays as it is. A parameter's memory, too: on a CPU it may be scratch memory.
        """
        pairs = [] if self.backup is None else self.backup.pairs()
        self.perturbed = [(param, param.detach().clone()) for param, _ in pairs]
        write(pairs)

    def resume(self) -> None:
        """Have the perturbed weights in the parameters again."""
        pairs, self.perturbed = self.perturbed, []
        write(pairs)

    def undo(self) -> None:
        """Restore the weights. State has not changed yet."""
        self._end()
        if self.backup is not None:
            self.backup.restore()

    def commit(self, states: States, captured: bool) -> None:
        """Let what the first pass computed be the optimizer's state."""
        self._end()
        if self.ascent is not None:
            self.ascent.commit(states, captured)


def with_all_firsts(batch: Batch, scalars: Tensor | None) -> Batch:
    """The second pass's batch, in which a first gradient that is missing is the second one.

    Args:
        batch: After :meth:`InFlight.give_to`.
        scalars: The optimizer's, where gradients carry loss scales, which may differ. Else None.
    """
    assert batch.firsts is not None
    firsts: list[Tensor | None] = []
    for first, grad in zip(batch.firsts, batch.grads, strict=True):
        if first is None and scalars is not None:
            ratio = scalars[Scalar.INVERSE_SCALE] / scalars[Scalar.FIRST_INVERSE_SCALE]
            first = (grad * ratio.to(grad.device, non_blocking=True)).to(grad.dtype)
        firsts.append(grad if first is None else first)
    return replace(batch, firsts=firsts)


def write(pairs: list[tuple[Tensor, Tensor]]) -> None:
    """Let parameters take values, in whatever shape they have by now."""
    forget_weights()
    alike = [(param, x) for param, x in pairs if x.shape == param.shape]
    if alike:  # torch refuses empty lists on a GPU
        torch._foreach_copy_([param for param, _ in alike], [x for _, x in alike])
    for param, x in pairs:
        if x.shape != param.shape:
            param.copy_(x.reshape(param.shape))


def check_unperturbed(of: object, name: str, batch: Batch) -> None:
    """No other optimizer has perturbed these parameters.

    It would restore them afterwards, and lose what is done to them now.

    Args:
        of: The optimizer that asks, which "other" does not mean.
        name: The optimizer's.
        batch: The parameters.

    Raises:
        RuntimeError: If one has.
    """
    # a copy, as other threads may have optimizers of their own
    for flight in [ref() for ref in list(_OPEN.values())]:
        if flight is None or flight.of[0] is of:
            continue
        if not set(map(id, flight.owners)).isdisjoint(map(id, batch.owners)):
            raise RuntimeError(
                f"{name} cannot step parameters between first_step and second_step of another "
                f"optimizer that has perturbed them ({flight.of[1]}): one of the two updates would "
                "be lost. Call second_step or restore of that optimizer first"
            )
