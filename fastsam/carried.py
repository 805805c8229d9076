"""Norms that one step leaves for the next: whether they are known, and when they no longer are."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from .backends import Backends
from .replicas import is_distributed
from .step.batch import Batch
from .step.kept import KnownNorm, forget_elsewhere
from .step.left import LeftNorm, may_leave
from .step.spec import StepSpec


class CarriedNorms:
    """Two norms of an optimizer's: of what a step keeps for later ones, and of the momentum.

    A pass asks for one before it runs, which tells the backend through the batch whether to measure
    it. Afterwards the pass says what has been measured.

    Args:
        backends: The optimizer's.
        kept: Its own numbers; a state dict may have brought one of the momentum's norm.
    """

    def __init__(self, backends: Backends, kept: dict[str, Any]) -> None:
        self._backends, self._kept = backends, kept
        self._of_kept = KnownNorm()
        self._of_momentum = LeftNorm()
        self._steps_base = False  # whether the base's own step is called from here
        self.look_at_number()

    def before_first(self, batch: Batch, spec: StepSpec, scalars: Tensor, backend: str) -> None:
        """A first pass follows: say whether the norm of the momentum is known."""
        if spec.ascent.momentum and spec.knows_momentum:
            allowed = self._may_leave(batch, spec, backend)
            batch.norm_is_known = self._of_momentum.is_known(batch, scalars, allowed)

    def after_first(self, batch: Batch, scalars: Tensor) -> None:
        """The weights are perturbed."""
        if batch.norm_is_known:
            self._of_momentum.note_perturbed(scalars)

    def before_update(
        self, batch: Batch, spec: StepSpec, scalars: Tensor, backend: str, goes_on: bool
    ) -> None:
        """An update follows: say what it is to measure, and forget what it is about to change.

        Args:
            batch, spec, scalars, backend: Of the pass.
            goes_on: Whether the schedule lets the next step perturb.
        """
        if spec.ascent.momentum and not spec.ascent.follows_last:
            allowed = goes_on and self._may_leave(batch, spec, backend)
            batch.leaves_norm = self._of_momentum.prepare(batch, spec, scalars, allowed)
        reuses = spec.ascent.keeps and not spec.ascent.follows_last and spec.reuses_by_norm
        if reuses and batch.params and batch.firsts is not None:
            if self._may_know(batch, backend):
                batch.kept_is_known = self._of_kept.is_of(batch.firsts, scalars)
        forget_elsewhere(batch, self._of_kept, self._of_momentum.norm)

    def after_update(self, batch: Batch, spec: StepSpec, scalars: Tensor) -> None:
        """The update has measured it. Nothing here may fail: weights have changed."""
        if batch.kept_is_known is False:
            assert batch.firsts is not None
            self._of_kept.remember(batch.firsts, scalars)
        if batch.leaves_norm:
            self._of_momentum.remember(batch, spec, scalars)

    def _may_leave(self, batch: Batch, spec: StepSpec, backend: str) -> bool:
        """Whether an update may leave the norm of the momentum for the next perturbation."""
        return may_leave(batch, spec) and self._may_know(batch, backend)

    def _may_know(self, batch: Batch, backend: str) -> bool:
        """Whether a norm may be known from step to step."""
        # collectives write to tensors, too, and torch does not count that
        apart = is_distributed() or (batch.shardings is not None and any(batch.shardings))
        return not apart and self._backends.serving(backend, batch).knows_norms

    # --- other code, and other steps ---

    def forget_kept(self) -> None:
        """What steps keep is about to be replaced, perhaps in the same memory."""
        self._of_kept.forget()

    def forget(self) -> None:
        """Measure all anew: other code writes to the state."""
        self._of_kept.forget()
        self._of_momentum.forget()

    def begin_anew(self) -> None:
        """The same where something has failed, and nothing is known of what the device holds."""
        self.forget()
        self._of_momentum.begin_anew()

    @contextmanager
    def while_base_steps(self) -> Iterator[None]:
        """A block in which the base's own step is called from here.

        It writes to no state that a norm is known of.
        """
        self._steps_base = True
        try:
            yield
        finally:
            self._steps_base = False

    def base_steps(self) -> None:
        """The base's own step begins: if other code has called it, no norm is known any more."""
        if not self._steps_base:
            self.forget()

    def settle(self, scalars: Tensor | None) -> None:
        """Let the optimizer's own numbers have the norm of the momentum, if there is one."""
        self._of_momentum.settle(scalars)

    def look_at_number(self) -> None:
        """Heed what a state dict says of the norm of the momentum."""
        if (number := self._kept.get("momentum_squared_norm")) is not None:
            self._of_momentum.loaded(number)
