"""The two passes of a step, from the tensors that have gradients to the state that is committed."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from fastsam.kernels.layout import Scalar

from . import backends
from .bases.several import Several
from .carried import CarriedNorms
from .replicas import agree
from .step.base_state import compute_what_is_read, find_base_state_read
from .step.batch import Batch
from .step.caches import forget_weights
from .step.capture import check_capture, is_captured
from .step.collect import Collector
from .step.dtypes import Dtypes
from .step.flight import Backup, InFlight, check_unperturbed, with_all_firsts
from .step.gradients import take_over
from .step.group_arguments import named
from .step.kept import give_kept, keep, keep_last, room_for_last
from .step.precision import find_masters, find_places
from .step.recording import Recording
from .step.scalars import DeviceScalars
from .step.scaling import unscaled
from .step.segments import count_of, segments_of
from .step.spec import StepSpec, is_perturbed
from .step.state import (
    States,
    ascent_state,
    find_ascent_state,
    find_base_state,
    follow_casts,
    forget_fresh,
)
from .step.takeover import stepped_from_here


class Passes:
    """Runs passes over an optimizer's groups and state.

    Args:
        name: The optimizer's, for messages.
        scalars: Its numbers on the device.
        dtypes: Looks at the parameters' dtypes.

    Attributes:
        collector: Finds the tensors of a pass.
        scalars, dtypes: The same.
        backends: Those that have been needed so far.
        norms: Those that one step leaves for the next.
        recording: What takes in the complete step, if that was asked for.
        scratch: Whether parameters may point elsewhere between the passes, if the setting says so.
    """

    def __init__(self, name: str, scalars: DeviceScalars, dtypes: Dtypes) -> None:
        self._name = name
        self.dtypes = dtypes
        self.collector = Collector(dtypes.check)
        self.scalars = scalars
        self.backends = backends.Backends()
        self.norms = CarriedNorms(self.backends, scalars.kept)
        self.recording: Recording | None = None
        self.scratch = True
        self._was_captured = False  # in a CUDA graph
        self._squares: Tensor | None = None  # by segment

    # --- the first pass ---

    def first(
        self, spec: StepSpec, flight: InFlight, states: States, backend: str, cleared: bool
    ) -> Batch:
        """Perturb the weights along the present gradients; ``flight`` holds what that leaves.

        If it fails the weights are as they were. The caller keeps interrupts out. In a step of
        several first passes each is one call, and the others go on from where the weights are.

        Args:
            spec, flight: Of the step.
            states: The optimizer's.
            backend: That the user asked for.
            cleared: Whether the gradients are about to be set to None.
        """
        goes_on, momentum = flight.taken > 0, spec.ascent.momentum
        if spec.ascent.keeps:  # there will be another, perhaps in the same memory
            self.norms.forget_kept()
        if momentum:
            batch = self.collector.momentum(spec.groups, self._name, momentum, states)
        else:
            collect = self.collector.further if goes_on else self.collector.first
            batch = collect(spec.groups, self._name)
        check_unperturbed(self, self._name, batch)
        if spec.has_masters or spec.seed is not None:
            self._add_precision(batch, spec, states)
        if is_captured(batch):
            self._check_capture(batch, spec, states)
        scalars = self.scalars.on_device_of(batch)
        self.norms.before_first(batch, spec, scalars, backend)
        ascent = None
        if spec.ascent.advance is not None:
            ascent = find_ascent_state(spec.ascent, batch, spec.groups, states)
        if spec.ascent.base_state and not spec.ascent.is_computed:
            find_base_state_read(batch, spec, states)
        if spec.ascent.chooses:
            batch.choices = backends.find_choices(batch, spec.groups, spec.choice_seed)
        if not momentum and (flight.scale is not None or self.scalars.carries_scale):
            batch = self._scale(batch, Scalar.FIRST_INVERSE_SCALE, spec, flight, backend)
        if spec.ascent.is_computed and batch.params:
            # the backend has unscaled the gradients, or takes them as they are
            scaled = flight.scale is not None and self.backends.serving(backend, batch).takes_scaled
            inverse = scalars[Scalar.FIRST_INVERSE_SCALE] if scaled else None
            compute_what_is_read(batch, spec, states, inverse)
        if spec.descent is not None or self.recording is not None:
            self._keep_firsts(batch, spec, flight, backend, cleared, scalars)
        if flight.samples is not None:
            if goes_on:
                flight.start_again()
            scalars[Scalar.SAMPLE].fill_(flight.taken)
        if spec.norm != "global" and batch.params:
            self._add_segments(batch, spec)
            flight.squares = batch.squares
        norm = scalars[Scalar.GRAD_NORM].clone() if goes_on else None
        if batch.params:
            serving = self.backends.serving(backend, batch)
            flight.backup = serving.ascend(batch, spec, scalars, flight.backup)
            self.norms.after_first(batch, scalars)
            flight.begin(self, self._name, batch)
        elif not goes_on:
            scalars[Scalar.GRAD_NORM].zero_()
            scalars[Scalar.NEXT_ACCUMULATED] = scalars[Scalar.ACCUMULATED]
            backends.settle(scalars[Scalar.GRAD_NORM], spec, scalars)
        if flight.samples is not None and flight.samples.inverse is not None:
            scalars[Scalar.FIRST_INVERSE_SCALE].copy_(flight.samples.inverse)
        if norm is not None:  # that at w is the step's
            if spec.skip_first and batch.params:
                scalars[Scalar.FOUND_INF] += ~scalars[Scalar.ASCENT_NORM].isfinite()
            scalars[Scalar.GRAD_NORM] = norm
        flight.taken += 1
        flight.ascent = ascent
        # a parameter that has no momentum yet is not one whose gradient is kept back
        sharded = batch.shardings is not None and any(batch.shardings)
        flight.saw_shards |= sharded or bool(momentum)
        forget_weights()
        return batch

    def _keep_firsts(
        self, batch: Batch, spec: StepSpec, flight: InFlight, backend: str, cleared: bool,
        scalars: Tensor,
    ) -> None:  # fmt: skip
        """Keep the gradients of a first pass for the second, or add them to those of others."""
        everyone: Batch = batch
        ours: list[Tensor] = []
        if not all(map(is_perturbed, spec.groups)):
            everyone, ours = self._every_first(spec, flight, backend), batch.grads
        if flight.taken > 0 and flight.samples is not None:
            flight.samples.add(everyone, cleared, ours, self._scale_at_w(flight, scalars))
            return
        if flight.samples is not None and flight.scale is not None:
            if self.backends.serving(backend, everyone).takes_scaled:
                flight.samples.inverse = scalars[Scalar.FIRST_INVERSE_SCALE].clone()
        flight.keep_firsts(everyone, take_over(everyone, cleared, ours, True))

    def _scale_at_w(self, flight: InFlight, scalars: Tensor) -> Tensor | None:
        """What gives one perturbation's gradients the loss scale of those at ``w``.

        That is no 1 where the user unscales those of some passes.
        """
        assert flight.samples is not None
        inverse = flight.samples.inverse
        return None if inverse is None else scalars[Scalar.FIRST_INVERSE_SCALE] / inverse

    def put_noise(self, spec: StepSpec, states: States, backend: str, number: int) -> Backup | None:
        """Perturb the weights by noise outside of a step; what restores them, if there are any.

        Args:
            spec: With an ascent that has ``noise``.
            states, backend: As in :meth:`first`.
            number: Of the perturbation in the present step.
        """
        batch = self.collector.weights(spec.groups, self._name)
        check_unperturbed(self, self._name, batch)
        self._add_precision(batch, spec, states)
        scalars = self.scalars.on_device_of(batch)
        scalars[Scalar.SAMPLE].fill_(number)
        if not batch.params:
            return None
        if spec.ascent.base_state:
            find_base_state_read(batch, spec, states)
        backup: Backup = self.backends.serving(backend, batch).ascend(batch, spec, scalars, None)
        forget_weights()
        return backup

    def _every_first(self, spec: StepSpec, flight: InFlight, backend: str) -> Batch:
        """First gradients also of what is not perturbed, as the batch of the others has them."""
        batch = self.collector.other(spec.groups, self._name)
        if flight.scale is None or self.backends.serving(backend, batch).takes_scaled:
            return batch
        return unscaled(batch, self.scalars.on_device_of(batch)[Scalar.FIRST_INVERSE_SCALE])

    def give(self, spec: StepSpec, second: Any, first: Any) -> None:
        """Let ``u`` be ``second * g~ + first * g``: numbers, or 0-dim tensors.

        For descent rules to which such numbers are given.
        """
        scalars = self.scalars.vector
        assert scalars is not None
        slots = Scalar.COEFFICIENT, Scalar.FIRST_COEFFICIENT
        if spec.needs_descent_norm:  # from which, and from these numbers, the coefficients follow
            slots = Scalar.DESCENT0, Scalar.DESCENT1
            if not spec.needs_ascent_norm:  # nothing is known of it
                scalars[Scalar.GRAD_NORM].zero_()
        for slot, x in zip(slots, (second, first), strict=True):
            if isinstance(x, Tensor):
                scalars[slot].copy_(x)
            else:
                scalars[slot].fill_(x)

    def agree(self, spec: StepSpec, flight: InFlight) -> None:
        """Let replicas with first gradients of their own agree on what the update takes of them."""
        matters = spec.renormalize or spec.is_scaled or self.recording is not None
        if flight.replicas is not None and matters:
            assert self.scalars.vector is not None
            agree(self.scalars.vector, flight.replicas)

    # --- the second, or the only one ---

    def collect_second(self, spec: StepSpec, states: States) -> Batch:
        """The parameters that have a gradient now."""
        batch = self.collector.second(
            spec.groups, self._name, spec.perturbs, bool(spec.ascent.momentum)
        )
        check_unperturbed(self, self._name, batch)
        if spec.has_masters or spec.seed is not None:
            self._add_precision(batch, spec, states)
        return batch

    def second(
        self, batch: Batch, spec: StepSpec, flight: InFlight, states: States, backend: str,
        base: Optimizer, goes_on: bool,
    ) -> None:  # fmt: skip
        """Restore the weights, update them, and commit what both passes computed.

        The caller keeps interrupts out.

        Args:
            batch: Of :meth:`collect_second`.
            spec, flight, states, backend: As in :meth:`first`.
            base: The base optimizer, which is stepped where it is not fused.
            goes_on: Whether the schedule lets the next step perturb.
        """
        scalars = self.scalars.on_device_of(batch)
        if not flight.perturbs and spec.ascent.accumulate is not None:  # nothing to take in
            scalars[Scalar.NEXT_ACCUMULATED] = scalars[Scalar.ACCUMULATED]
        prepared, has_begun = batch, False
        try:
            if is_captured(batch):
                self._check_capture(batch, spec, states)
            if batch.params and spec.has_fused:
                find_base_state(batch, spec, states, base)
            elif batch.params:
                follow_casts(batch, spec, states, base)
            if flight.scale is not None or self.scalars.carries_scale:
                batch = self._scale(batch, Scalar.INVERSE_SCALE, spec, flight, backend, states)
            lacks_firsts = flight.give_to(batch)
            last = None
            if spec.ascent.follows_last:
                kept = batch
                if flight.scale is not None and self.backends.serving(backend, batch).takes_scaled:
                    kept = unscaled(batch, scalars[Scalar.INVERSE_SCALE])  # others have another
                last = kept, room_for_last(kept, spec, states)
            elif spec.ascent.keeps:
                give_kept(batch, spec, states, scalars)
            self.norms.before_update(batch, spec, scalars, backend, goes_on)
            if flight.loss is not None:
                scalars[Scalar.LOSS].copy_(flight.loss, non_blocking=True)
            again = spec.descent is not None or self.recording is not None
            if flight.squares is not None and again:
                self._add_segments(batch, spec)
            room = None
            if spec.skip_nonfinite and (flight.ascent is not None or flight.scale is not None):
                # for what is computed after the update, when nothing may fail any more
                flag = scalars.new_empty((), dtype=torch.bool)
                room = flag, scalars.new_empty((), dtype=torch.float)
            seen = batch
            if self.recording is not None and spec.has_unfused:  # which may write to gradients
                seen = replace(batch, grads=[grad.clone() for grad in batch.grads])
            if batch.params:
                due = batch
                if lacks_firsts and spec.descent is not None and spec.descent.fills:
                    serving = self.backends.serving(backend, batch)
                    scaled = flight.scale is not None and serving.takes_scaled
                    due = with_all_firsts(batch, scalars if scaled else None)
                self._update(due, spec, flight, states, backend, base, scalars)
            else:  # nothing to update, nor to reject
                flight.undo()
                _measure_nothing(scalars)
            has_begun = True
            self.norms.after_update(batch, spec, scalars)
            self._commit(seen, spec, flight, states, scalars, room)
            if last is not None:
                keep_last(*last, spec, scalars, states)
        finally:
            if spec.has_fused and not has_begun:
                forget_fresh(prepared, spec, states)

    def _update(
        self, batch: Batch, spec: StepSpec, flight: InFlight, states: States, backend: str,
        base: Optimizer, scalars: Tensor,
    ) -> None:  # fmt: skip
        unfused = spec.has_unfused

        def step_unfused(scalars: Tensor) -> None:
            # it cannot skip on the device: the one branch on a device value
            if not spec.skip_nonfinite or bool(scalars[Scalar.ACCEPTED]):
                with self.norms.while_base_steps():
                    _step_unfused(base, spec, states)
                for param, change in (batch.beside or {}).items():
                    param.sub_(change)

        with backends.undone_if_it_fails(scalars) if unfused else nullcontext():
            serving = self.backends.serving(backend, batch)
            if unfused and spec.has_part_apart:
                batch.beside = {}
            if unfused and spec.bases is not None:  # before the fused ones, as it may fail
                batch.step_unfused = step_unfused
            serving.descend(batch, flight.backup, spec, scalars)
            if unfused and spec.bases is None:
                step_unfused(scalars)

    def _commit(
        self, batch: Batch, spec: StepSpec, flight: InFlight, states: States, scalars: Tensor,
        room: tuple[Tensor, Tensor] | None,
    ) -> None:  # fmt: skip
        """What the ascent computed becomes the state. Nothing here may fail: weights have changed.

        ``room`` is memory for a bool and a number, where they are needed.
        """
        if flight.ascent is not None:
            others = flight.ascent.others(batch)
            backends.keep_rejected(others, spec, scalars, room and room[0])
            self._was_captured |= is_captured(batch)
        flight.commit(states, self._was_captured)
        if spec.keeps:
            keep(batch, spec, states)
        if self.recording is not None and batch.params and flight.backup is not None:
            self.recording.take(batch, flight.backup, spec, flight.replicas)
        if spec.ascent.accumulate is not None and spec.perturbs and not spec.needs_descent_norm:
            # else what finishes the second norm has done it
            scalars[Scalar.ACCUMULATED].copy_(scalars[Scalar.NEXT_ACCUMULATED])
        if spec.ascent.chooses and spec.skip_nonfinite:
            scalars[Scalar.ROUNDING_STEP].add_(scalars[Scalar.ACCEPTED])
        elif spec.ascent.chooses or spec.stochastic:
            scalars[Scalar.ROUNDING_STEP].add_(1)
        if spec.ascent.noise and flight.perturbs:
            scalars[Scalar.NOISE_STEP].add_(1)
        if flight.scale is not None and room is not None:
            flight.scale.record(scalars, room[1])

    # --- at another time ---

    def collect_other(self, spec: StepSpec, states: States) -> Batch:
        """The parameters that have a gradient, outside of a step."""
        batch = self.collector.other(spec.groups, self._name)
        if spec.has_masters or spec.seed is not None:
            self._add_precision(batch, spec, states)
        return batch

    def create_state(self, spec: StepSpec, states: States, base: Optimizer) -> None:
        """Create what a first step would, of parameters that have a gradient."""
        batch = self.collect_other(spec, states)
        if spec.has_unfused:
            with stepped_from_here(base):
                _step_of(base)()
        if spec.has_fused and batch.params:
            find_base_state(batch, spec, states, base)
        for param, i in zip(batch.owners, batch.groups, strict=True):
            held = states.get(param, {})
            if not is_perturbed(spec.groups[i]):
                continue
            if state := ascent_state(spec.ascent, held, param, spec.groups[i]):
                states[param].update(state)
        self.scalars.on_device_of(batch)

    def hypergradient(
        self, backend: str, batch: Batch, backup: Any, hessian: str, spec: StepSpec
    ) -> Tensor:
        """The device scalars, with LETS's sum among them."""
        scalars = self.scalars.on_device_of(batch)
        if not spec.rescales:
            scalars[Scalar.COEFFICIENT].fill_(1)  # an earlier step may have rescaled
        serving = self.backends.serving(backend, batch)
        serving.hypergradient(batch, backup, hessian, spec, scalars)
        return scalars

    def settle(self) -> None:
        """Let the optimizer's own numbers have all that is still on its way to them."""
        self.norms.settle(self.scalars.vector)

    def loaded(self) -> None:
        """Look at everything anew that a state dict may have brought."""
        self.collector.forget()
        self.norms.forget()
        self.norms.look_at_number()

    def forget(self) -> None:
        """Look at everything anew: a capture has failed, which was to upload what launches read."""
        self.collector.forget()
        self.norms.begin_anew()
        self.backends.forget()

    # --- parts of them ---

    def _add_precision(self, batch: Batch, spec: StepSpec, states: States) -> None:
        """Give a batch what its precision needs."""
        if spec.has_masters:
            batch.masters = find_masters(self._name, batch, states)
        if spec.seed is not None:
            batch.places = find_places(batch, spec.groups)

    def _add_segments(self, batch: Batch, spec: StepSpec) -> None:
        """Give a batch what norms that are not global need."""
        if batch.layout is not None and batch.layout.spreads:
            raise RuntimeError(
                f"norm must be 'global' where parameters lie on several devices, got {spec.norm!r}"
            )
        assert self.scalars.vector is not None
        like, count = self.scalars.vector, count_of(spec.groups, spec.norm)
        held = self._squares
        if held is None or len(held) != count or held.device != like.device:
            self._squares = like.new_zeros(count)
        batch.segments = segments_of(batch, spec.groups, spec.norm)
        batch.squares = self._squares

    def _scale(
        self, batch: Batch, slot: Scalar, spec: StepSpec, flight: InFlight, backend: str,
        states: States | None = None,
    ) -> Batch:  # fmt: skip
        """The batch as the backend takes it, where its gradients carry a loss scale."""
        if flight.scale is None:
            self.scalars.drop_loss_scale()
            return batch
        if self.recording is not None:
            raise RuntimeError("LETS does not support gradients with a loss scale")
        scalars = self.scalars.on_device_of(batch)
        self.scalars.carries_scale = True
        opens_step = slot == Scalar.FIRST_INVERSE_SCALE or not flight.perturbs
        opens_step = (opens_step and not flight.taken) or bool(spec.ascent.momentum)
        flight.scale.write(slot, scalars, opens_step)
        if not batch.params:
            return batch
        if slot == Scalar.INVERSE_SCALE and spec.has_unfused:  # which reads .grad itself
            assert states is not None
            backends.write_grads(batch, unscaled(batch, scalars[slot]).grads)
            scalars[slot].fill_(1)
            found = self.collect_second(spec, states)
            found.states, found.fresh = batch.states, batch.fresh
            return found
        if self.backends.serving(backend, batch).takes_scaled:
            return batch
        return unscaled(batch, scalars[slot])

    def _check_capture(self, batch: Batch, spec: StepSpec, states: States) -> None:
        check_capture(self._name, batch, spec, states, self.scalars.vector is not None)


def _step_unfused(base: Optimizer, spec: StepSpec, states: States) -> None:
    """Step a base that is not fused; it takes a parameter with any state for initialised."""
    names = spec.ascent.state_names(spec.groups[0])
    own = {
        param: {name: state.pop(name) for name in names if name in state}
        for param, state in states.items()
        if isinstance(param, Tensor)  # hooks may keep something under other keys
    }
    try:
        with stepped_from_here(base), named(type(base), *spec.groups):
            _step_of(base)()
    finally:
        for param, state in own.items():
            states[param].update(state)


def _step_of(base: Optimizer) -> Callable[[], Any]:
    """The step of a base that is not fused; of several, of those that are not."""
    return base.step_unfused if isinstance(base, Several) else base.step


def _measure_nothing(scalars: Tensor) -> None:
    """What the scalars say after a step in which no parameter had a second gradient."""
    scalars[Scalar.ACCEPTED].fill_(1)
    scalars[Scalar.PERTURBED_GRAD_NORM].zero_()
    scalars[Scalar.SHARPNESS].zero_()
    scalars[Scalar.RENORMALIZATION].fill_(1)
    scalars[Scalar.USED_DESCENT0] = scalars[Scalar.DESCENT0]
    scalars[Scalar.ACCUMULATED] = scalars[Scalar.NEXT_ACCUMULATED]
