"""What a backend is, and how its passes run: alone, or in step with those of other devices.

A pass is a generator. It yields every sum over its own tensors, which is to be made that over all
tensors, in place, before it goes on; it yields None before it changes what cannot be changed back,
and ``Stop.UNFUSED`` where bases that are not fused have to be stepped. On one device there is
nothing to be added, and it runs to its end.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Sequence
from enum import Enum
from functools import partial
from typing import Any, Protocol, TypeAlias, TypeVar

from torch import Tensor

from fastsam.step.batch import Batch
from fastsam.step.flight import Backup
from fastsam.step.spec import StepSpec

Result = TypeVar("Result")


class Stop(Enum):
    """Where a pass stops that yields no sum."""

    #: Gradients and weights are there for bases that are not fused; fused updates follow.
    UNFUSED = 1


Pass: TypeAlias = Generator[Tensor | Stop | None, None, Result]


def nothing() -> None:
    """Where there is nothing to be done in between."""


def complete(one: Pass[Result], step_unfused: Callable[[], None] = nothing) -> Result:
    """Run a pass over all the tensors that there are."""
    while True:
        try:
            stop = next(one)
        except StopIteration as end:
            result: Result = end.value
            return result
        if stop is Stop.UNFUSED:
            try:
                step_unfused()
            except BaseException:
                one.close()
                raise


def together(
    passes: Sequence[Pass[Any]], results: list[Any], step_unfused: Callable[[], None] = nothing
) -> None:
    """Run passes over parts of the tensors, and append what each gives to ``results``.

    If one fails, the others are ended where they stopped. Those that had come to their end, as
    ``results`` shows, are the caller's to undo.
    """
    try:
        while len(results) < len(passes):
            sums: list[Tensor | Stop | None] = []
            for one in passes:
                try:
                    sums.append(next(one))
                except StopIteration as end:
                    results.append(end.value)
            if Stop.UNFUSED in [x for x in sums if isinstance(x, Stop)]:
                step_unfused()
            add_up([x for x in sums if isinstance(x, Tensor)])
    except BaseException:
        for one in passes:
            one.close()
        raise


def add_up(sums: Sequence[Tensor]) -> None:
    """Let all become their sum, added in their order, without waiting for a device.

    Each gets the same bits.
    """
    if len(sums) > 1:
        total = sums[0].clone()
        for x in sums[1:]:
            total += x.to(total.device, non_blocking=True)
        for x in sums:
            x.copy_(total, non_blocking=True)


class Backend(Protocol):
    """What a backend does for the optimizer, with at least one parameter in the batch.

    Nothing here synchronises with the host on a GPU. ``takes_scaled`` says whether gradients may
    carry a loss scale, whose inverse is then among the scalars. ``knows_norms`` says whether it
    heeds what a batch says of norms that are known from step to step: where ``kept_is_known`` is
    False it measures what an earlier step has kept, where ``leaves_norm`` it measures the momentum
    that it writes, and leaves either's squared norm among the scalars.
    """

    takes_scaled: bool
    knows_norms: bool

    def ascend(self, batch: Batch, spec: StepSpec, scalars: Tensor, kept: Any = None) -> Backup:
        """Set ``w <- w + e`` and keep ``w``. If it fails, the weights are as they were.

        ``kept`` is what it gave before in the same step, where there are several ascents. Then that
        stays the one copy, of the weights as they were before all of them, and is given again.

        ``batch.ascent`` is the ascent rule's state, which stays; the new one goes to
        ``batch.next``.
        """

    def descend(self, batch: Batch, backup: Any, spec: StepSpec, scalars: Tensor) -> None:
        """Restore the weights and apply the base update to ``u``.

        ``backup`` is what this backend's ``ascend`` gave, or None where nothing was perturbed.
        A base that is not fused (``spec.base_of`` is None) gets ``u`` in ``.grad`` and updates by
        itself: when this is done, or, if others are fused, before those, when this calls
        ``batch.step_unfused``. Where the device rejects the step, ``batch.next`` becomes
        ``batch.ascent`` again.
        """

    def hypergradient(
        self, batch: Batch, backup: Any, hessian: str, spec: StepSpec, scalars: Tensor
    ) -> None:
        """LETS: the sum of ``lr * coefficient * (validation - training) * H e``, to its scalar.

        ``batch``, ``backup`` and the other scalars are those of the step, which is complete;
        ``hessian`` says how ``H e`` is approximated: ``"diag"`` or ``"difference"``.
        """


class DeviceBackend(ABC):
    """A :class:`Backend` for one device, whose passes may also run in lockstep with others."""

    takes_scaled = False
    knows_norms = False

    def ascend(self, batch: Batch, spec: StepSpec, scalars: Tensor, kept: Any = None) -> Any:
        return complete(self.ascent_pass(batch, spec, scalars, kept))

    def descend(self, batch: Batch, backup: Any, spec: StepSpec, scalars: Tensor) -> None:
        step = nothing if batch.step_unfused is None else partial(batch.step_unfused, scalars)
        complete(self.descent_pass(batch, backup, spec, scalars), step)

    def hypergradient(
        self, batch: Batch, backup: Any, hessian: str, spec: StepSpec, scalars: Tensor
    ) -> None:
        complete(self.hypergradient_pass(batch, backup, hessian, spec, scalars))

    def forget(self) -> None:  # noqa: B027 - most keep nothing there
        """Take nothing on the device for what it was: a capture has failed."""

    @abstractmethod
    def ascent_pass(
        self, batch: Batch, spec: StepSpec, scalars: Tensor, kept: Any = None
    ) -> Pass[Any]: ...

    @abstractmethod
    def descent_pass(
        self, batch: Batch, backup: Any, spec: StepSpec, scalars: Tensor
    ) -> Pass[None]: ...

    @abstractmethod
    def hypergradient_pass(
        self, batch: Batch, backup: Any, hessian: str, spec: StepSpec, scalars: Tensor
    ) -> Pass[None]: ...
