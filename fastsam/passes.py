"""The two passes that every method shares, and the contract of a step."""

import weakref
from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler

from fastsam.kernels.layout import Scalar

from . import backends
from .backends.measures import undone_if_it_fails
from .capture import is_captured
from .checks import check_max_grad_norm, entered
from .guards import GuardedOptimizer
from .interrupts import uninterrupted
from .replicas import agree, is_distributed, replicas_of
from .rules import Batch, Step
from .scaling import check_scaler, is_scaled, record, unscaled, write_scale
from .sharding import local_state
from .stateful import uncompiled


class TwoPassOptimizer(GuardedOptimizer):
    """``first_step`` and ``second_step``, or ``plain_step``; and what a failure in them leaves."""

    max_grad_norm: float | None

    @uncompiled
    @torch.no_grad()
    def first_step(self, zero_grad: bool = False, *, grad_scaler: GradScaler | None = None) -> None:
        """Perturb the weights along the present gradients: ``w <- w + e``.

        Args:
            zero_grad: Zero the gradients afterwards.
            grad_scaler: The scaler of the loss that they, and those of the second pass, are of.

        Raises:
            RuntimeError: If ``second_step`` is due; if a gradient is sparse or complex, or the
                parameters lie on several types of device. Nothing has changed then.
            ValueError: If a group's hyper-parameter has been set out of range.
            TypeError: If ``grad_scaler`` is something else, or not given by its name.
        """
        self._expect("first_step")
        scaler = check_scaler(grad_scaler, self, zero_grad)
        self._run_hooks("pre")
        self._check_groups()
        batch = self._collect("ascent")
        self._check_capture(batch)
        self._begin_step(scaler, perturbs=True)
        scalars = self._scalars_for(batch)
        batch = self._scale(batch, Scalar.FIRST_INVERSE_SCALE, scalars)
        firsts = self._take_over(batch, cleared=zero_grad) if self._keeps_first else {}
        pending = self._ascent_state_of(batch) if self._has_ascent_state else {}
        try:
            with uninterrupted():
                if batch.params:
                    backend = self._backend_for(batch)
                    self._backup = backend.ascend(batch, self._describe(), scalars)
                else:
                    scalars[Scalar.GRAD_NORM].zero_()
                    scalars[Scalar.NEXT_SQUARED_NORMS] = scalars[Scalar.ASCENT_SQUARED_NORMS]
                self._firsts, self._pending = firsts, pending
                self._saw_shards = any(batch.shardings)
                self._between_passes = True
                torch.clear_autocast_cache()  # of the weights as they were
            if self._replicas is not None and (
                self.renormalize or self._is_scaled or self._records
            ):
                agree(scalars, self._replicas)
            if zero_grad:
                self.zero_grad()
            elif not self._inside_step and "stale gradients" not in self._warned:
                ends = batch.owners[:1] + batch.owners[-1:]
                self._seen = [(param, weakref.ref(param.grad), param.grad._version)
                              for param in ends if param.grad is not None]  # fmt: skip
        except BaseException:
            self.restore()
            raise

    @uncompiled
    @torch.no_grad()
    def second_step(
        self, zero_grad: bool = False, *, grad_scaler: GradScaler | None = None
    ) -> None:
        """Restore the weights and update them with the gradients taken at ``w + e``.

        Warns once where there are no gradients, or they are still those of the first pass, or were
        added to them.

        Args:
            zero_grad: Zero the gradients afterwards.
            grad_scaler: The same, or None, as in :meth:`first_step`. ``grad_scaler.update()`` is to
                be called after this. A gradient that is not finite in either pass skips the step.

        Raises:
            RuntimeError: If ``first_step`` is due; if a gradient is sparse or complex; if
                ``grad_scaler`` is another than in the first pass. The weights have been restored
                then, and the step is over without an update.
        """
        self._expect("second_step")
        try:
            if check_scaler(grad_scaler, self, zero_grad) is not self._scaler and grad_scaler:
                raise RuntimeError("grad_scaler has to be given to first_step as well")
            self._warn_of_stale_gradients()
            batch = self._collect("descent")
            if self._backup is not None and not batch.params:
                self._warn_once(
                    "no second gradients",
                    "the second pass left no gradients: backward has to be called on the loss at "
                    "the perturbed weights as well; the step changes nothing",
                )
            self._check_reduced(batch)
            self._descend(batch)
        except BaseException:
            self.restore()
            raise
        self._after_step(zero_grad)

    @uncompiled
    @torch.no_grad()
    def plain_step(self, zero_grad: bool = False, *, grad_scaler: GradScaler | None = None) -> None:
        """The base optimizer's step with the present gradients: one pass, nothing perturbed.

        For loops that take turns between the two kinds of step; ``perturbs_next`` says which is
        due by ``perturb_every``, ``start`` and ``stop``.

        Args:
            zero_grad: Zero the gradients afterwards.
            grad_scaler: As in :meth:`second_step`.

        Raises:
            RuntimeError: If ``second_step`` is due; if a gradient is sparse or complex.
            ValueError: If a group's hyper-parameter has been set out of range.
        """
        self._expect("first_step", "plain_step")
        scaler = check_scaler(grad_scaler, self, zero_grad)
        self._run_hooks("pre")
        self._check_groups()
        batch = self._collect("descent")
        self._begin_step(scaler, perturbs=False)
        try:
            self._descend(batch)
        except BaseException:
            self.restore()
            raise
        self._after_step(zero_grad)

    @torch.no_grad()
    def restore(self) -> None:
        """Undo ``first_step``: for a loop whose second pass failed. Does nothing otherwise."""
        with uninterrupted():
            if self._backup is not None:
                self._backup.restore()
            self._end_step()

    # --- what subclasses may refine ---

    def _next_lam(self) -> float:
        """Unified SAM's weight of normalisation in the step that begins; 1 is SAM."""
        return 1.0

    @property
    def _keeps_first(self) -> bool:
        """Whether first gradients are needed after the first pass."""
        return self._mix is not None or self._records is not None

    # --- parts of the step ---

    @property
    def _has_ascent_state(self) -> bool:
        return any(self._ascent.states(group) for group in self.param_groups)

    def _check_groups(self) -> None:
        check_max_grad_norm(self.max_grad_norm)
        for group in self.param_groups:
            self._check_group(group)

    def _describe(self) -> Step:
        return Step(
            groups=self.param_groups,
            ascent=self._ascent,
            base=self._base,
            lam=self._lam,
            renormalize=self.renormalize and self._perturbs,
            mix=self._mix if self._perturbs else None,
            max_grad_norm=self.max_grad_norm,
            skip_nonfinite=self.skip_nonfinite or self._is_scaled,
            skip_first=self._is_scaled and self._perturbs,
            is_scaled=self._is_scaled,
            has_masters=self.master_weights,
            seed=self.seed if self.rounding == "stochastic" else None,
            keeps_weights=self._records == "diag",
        )

    def _begin_step(self, scaler: GradScaler | None, perturbs: bool) -> None:
        """Decide on the host what the step will be."""
        if not self._inside_step:
            context = self.ascent_context
            self._replicas = None if context is None else replicas_of(context)
            if self._replicas is None and perturbs and context is not None and is_distributed():
                self._replicas = replicas_of(entered(context))  # what it gives says more than it
        if perturbs and self._replicas is not None:
            self._check_replicas()
        lam = self._next_lam()
        self._scaler, self._is_scaled = scaler, is_scaled(self, scaler)
        if perturbs and self._replicas is None and self.ascent_context is not None:
            self._warn_of_unknown_context()
        self._perturbs, self._lam = perturbs, lam

    def _scale(self, batch: Batch, slot: Scalar, scalars: Tensor) -> Batch:
        """The batch as the backend takes it, where its gradients carry a loss scale."""
        if not self._is_scaled:
            if self._was_scaled:
                scalars[Scalar.FIRST_INVERSE_SCALE].fill_(1)
                scalars[Scalar.INVERSE_SCALE].fill_(1)
                scalars[Scalar.FOUND_INF].zero_()
                self._was_scaled = False
            return batch
        if self._records:
            raise RuntimeError("LETS does not serve gradients that carry a loss scale")
        self._was_scaled = True
        opens_step = slot == Scalar.FIRST_INVERSE_SCALE or not self._perturbs
        write_scale(self, self._scaler, slot, scalars, opens_step)
        if not batch.params:
            return batch
        if slot == Scalar.INVERSE_SCALE and self._base is None:  # a foreign base reads .grad itself
            backends.write_grads(batch, unscaled(batch, scalars[slot]).grads)
            scalars[slot].fill_(1)
            return self._collect("descent")
        if self._backend_for(batch).takes_scaled:
            return batch
        return unscaled(batch, scalars[slot])

    def _descend(self, batch: Batch) -> None:
        try:
            self._update(batch)
        except BaseException:
            # not strict: not all may have been prepared, or all have begun
            for param, fresh in zip(batch.owners, batch.fresh, strict=False):
                if fresh:  # it is still to begin
                    state = self.state.get(param, {})
                    state.pop("momentum_buffer", None)
                    if not state:
                        self.state.pop(param, None)
            raise

    def _update(self, batch: Batch) -> None:
        step = self._describe()
        scalars = self._scalars_for(batch)
        if not self._perturbs and self._ascent.name == "adagrad_norm":  # nothing is to be taken in
            scalars[Scalar.NEXT_SQUARED_NORMS] = scalars[Scalar.ASCENT_SQUARED_NORMS]
        if batch.params:
            self._check_capture(batch)
            if step.base is not None:
                self._prepare(batch, step.base)
        fresh = batch.fresh
        batch = self._scale(batch, Scalar.INVERSE_SCALE, scalars)
        if self._pending:
            without_ascent: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
            pairs = [self._pending.get(param, without_ascent) for param in batch.owners]
            batch.ascent = [local_state(old) for old, _ in pairs]
            batch.next = [local_state(new) for _, new in pairs]
        if self._firsts:
            batch.firsts = [self._firsts.get(param) for param in batch.owners]
        room = None
        if step.skip_nonfinite and (self._pending or self._scaler is not None):
            # for what is computed after the update, when nothing may fail any more
            room = scalars.new_empty((), dtype=torch.bool), scalars.new_empty((), dtype=torch.float)
        if batch.params:
            seen = batch
            if self._records and step.base is None:  # which may write to the gradients
                seen = replace(batch, grads=[grad.clone() for grad in batch.grads])
            with uninterrupted():
                with undone_if_it_fails(scalars) if step.base is None else nullcontext():
                    self._backend_for(batch).descend(batch, self._backup, step, scalars)
                    if step.base is None:
                        # it cannot skip on the device: the one branch on a device value
                        if not step.skip_nonfinite or bool(scalars[Scalar.ACCEPTED]):
                            self._step_foreign()
                self._complete(seen, step, scalars, room)
                fresh.clear()  # they have begun
        else:  # nothing to update, nor to reject
            with uninterrupted():
                if self._backup is not None:
                    self._backup.restore()
                scalars[Scalar.ACCEPTED].fill_(1)
                scalars[Scalar.PERTURBED_GRAD_NORM].zero_()
                scalars[Scalar.SHARPNESS].zero_()
                scalars[Scalar.RENORMALIZATION].fill_(1)
                scalars[Scalar.USED_LAM] = scalars[Scalar.LAM]
                scalars[Scalar.ASCENT_SQUARED_NORMS] = scalars[Scalar.NEXT_SQUARED_NORMS]
                self._complete(batch, step, scalars, room)

    def _complete(
        self, batch: Batch, step: Step, scalars: Tensor, room: tuple[Tensor, Tensor] | None
    ) -> None:
        """What the ascent computed becomes the state. Nothing here may fail: weights have changed.

        ``room`` is memory for a bool and a number, where they are needed.
        """
        if self._pending:
            updated = set(batch.owners)
            rest = [pair for param, pair in self._pending.items() if param not in updated]
            kept = Batch(
                ascent=[local_state(old) for old, _ in rest],
                next=[local_state(new) for _, new in rest],
            )
            backends.keep_rejected(kept, step, scalars, room and room[0])
            self._was_captured |= is_captured(batch)
        for param, (old, state) in self._pending.items():
            if self._was_captured:  # a replay looks for the state where it was at the capture
                for name, x in state.items():
                    old[name].copy_(x)
                self.state[param].update(old)
            elif state:
                self.state[param].update(state)
                if param.device.type == "cpu":
                    self._spare[param] = old
        if self._records and batch.params and self._backup is not None:
            # of the ascent's state and the old weights only what the approximation reads
            diag = self._records == "diag"
            seen = replace(batch, ascent=[], next=batch.next if diag else [{}] * len(batch.params))
            self._record = seen, self._backup if diag and step.adaptive else None, step
        if step.seed is not None:
            scalars[Scalar.ROUNDING_STEP].add_(1)
        if self._scaler is not None and room is not None:
            record(self, self._scaler, scalars, room[1])
        self._end_step()
        self.param_groups[0]["t"] += 1

    def _after_step(self, zero_grad: bool) -> None:
        self._opt_called = True  # what LR schedulers look at, to warn where no step came first
        if zero_grad:
            self.zero_grad()
        self._run_hooks("post")
