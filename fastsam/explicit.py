"""Steps in explicit passes: ``first_step``, ``second_step``, and what may come between."""

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler

from .agreement import Agreement
from .configuration import Configured
from .randomness import RepeatedRandom
from .replicas import is_distributed, replicas_behind
from .step import hooks
from .step.arguments import Policy
from .step.batch import Batch
from .step.caches import forget_weights
from .step.checks import check_perturb, check_stop
from .step.closures import asks_for_state
from .step.flight import InFlight
from .step.gradients import zero, zeroes_as_torch
from .step.guards import (
    NO_GRADIENTS,
    NO_SECOND_GRADIENTS,
    UNKNOWN_CONTEXT,
    Warnings,
    check_reduced,
    check_replicas,
    warn_of_stale_gradients,
)
from .step.interrupts import uninterrupted
from .step.rule import Descent
from .step.scaling import LossScale, check_same_scaler, check_scaler, find_scale
from .step.spec import StepSpec, share_of

Function = TypeVar("Function", bound=Callable[..., Any])


def uncompiled(function: Function) -> Function:
    """Make the function a graph break inside ``torch.compile``; what it calls is not traced.

    torch's own optimizers use the first of these, which imports the compiler when it is needed.
    """
    disable = getattr(torch, "_disable_dynamo", torch.compiler.disable)
    return cast(Function, disable(function))


def pass_of_step(function: Function) -> Function:
    """A method of the user's, or a part of ``step``: :func:`uncompiled`, and without autograd.

    Inside ``step`` it is both already, unless code of the user's has switched autograd on; and the
    wrappers would be a noticeable part of the time that a step of a small network takes.
    """
    alone = uncompiled(torch.no_grad()(function))

    @functools.wraps(function)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        is_prepared = self._inside_step and not torch.is_grad_enabled()
        return (function if is_prepared else alone)(self, *args, **kwargs)

    return cast(Function, call)


class ExplicitPasses(Configured):
    """The two passes of a step as separate calls, for loops that call ``backward`` themselves."""

    _TRANSIENT: tuple[str, ...] = (
        *Configured._TRANSIENT, "_last", "_warnings", "_agreement", "_random", "_replicas",
        "_inside_step", "_inside_closure", "_unperturbed", "_asked",
    )  # fmt: skip

    def _start(self) -> None:
        super()._start()
        self._last: StepSpec | None = None  # of the present step, or the last
        self._warnings = Warnings()
        self._agreement = Agreement()
        self._random = RepeatedRandom(type(self).__name__)
        # the replicas whose gradients ``step`` has found to be apart in the pass that comes
        self._replicas: Any = None
        self._inside_step = self._inside_closure = False
        self._unperturbed = 0  # blocks of ``unperturbed`` that are open
        # of the last question to ``perturb_when``: step, function, what it saw, and the answer
        self._asked: tuple[int, Policy | None, dict[str, Any], bool] = 0, None, {}, False

    # --- a step ---

    @pass_of_step
    def first_step(self, zero_grad: bool = False, *, grad_scaler: GradScaler | None = None) -> None:
        """Perturb the weights along the present gradients: ``w <- w + e``.

        With ``ascent_steps`` it is called that many times, each time with new gradients;
        ``ascents_left`` says how many calls are left.

        Args:
            zero_grad: Zero the gradients afterwards.
            grad_scaler: The scaler of the loss, of this pass and the second.

        Raises:
            RuntimeError: If ``second_step`` is due; if a gradient is sparse or complex, or the
                parameters lie on several types of device. Nothing has changed then.
            ValueError: If a group's hyper-parameter has been set out of range.
            TypeError: If ``grad_scaler`` is something else, or not given by its name.
        """
        self._expect("first_step")
        scaler = check_scaler(grad_scaler, self, zero_grad)
        if self._flight is not None:  # one of several
            check_same_scaler(self._flight.scale, grad_scaler, self, zero_grad)
            warn_of_stale_gradients(self._flight, self._warnings, "first_step")
        elif not self._inside_step:  # step has, before it called the closure
            self._before_step()
        flight = self._flight or self._begin(True, find_scale(self, scaler))
        spec = self._last = self._spec(flight)
        try:
            with uninterrupted():  # nothing may come between perturbing and remembering it
                batch = self._passes.first(
                    spec, flight, self.state, self.backend, zero_grad and self._sets_to_none
                )
                self._flight = flight
            if flight.replicas is not None and not flight.ascents_left:
                self._passes.agree(spec, flight)
            if not batch.params and self._inside_step and not self.ascent.momentum:
                self._warnings.once("no gradients", NO_GRADIENTS)
            if zero_grad:
                self._zero_gradients()
            elif not self._inside_step and "stale gradients" not in self._warnings.given:
                flight.note_gradients(batch)
        except BaseException:
            self.restore()
            raise

    @pass_of_step
    def second_step(
        self, zero_grad: bool = False, *, grad_scaler: GradScaler | None = None
    ) -> None:
        """Restore the weights and update them with the gradients taken at ``w + e``.

        Warns once if there are no gradients, or if they are still those of the first pass, or the
        sum of both.

        Args:
            zero_grad: Zero the gradients afterwards.
            grad_scaler: The same as in :meth:`first_step`. Call ``grad_scaler.update()`` after
                this. If a gradient of either pass is not finite, the step is skipped.

        Raises:
            RuntimeError: If ``first_step`` is due; if a gradient is sparse or complex; if
                ``grad_scaler`` is another than in the first pass. The weights have been restored
                then, and the step is over without an update.
        """
        self._expect("second_step")
        flight = self._flight
        assert flight is not None
        try:
            self._check_scale(flight, grad_scaler, zero_grad)
            warn_of_stale_gradients(flight, self._warnings)
            self._run_base_hooks("pre")
            spec = self._last = self._spec(flight)
            batch = self._passes.collect_second(spec, self.state)
            if not batch.params and self.ascent.momentum:
                self._warnings.once("no gradients", NO_GRADIENTS)
            elif not batch.params and flight.backup is not None:
                self._warnings.once("no second gradients", NO_SECOND_GRADIENTS)
            check_reduced(batch, flight, self.param_groups)
            self._finish(batch, spec, flight)
        except BaseException:
            self.restore()
            raise
        self._after_step(zero_grad)

    @pass_of_step
    def plain_step(self, zero_grad: bool = False, *, grad_scaler: GradScaler | None = None) -> None:
        """The base optimizer's step with the present gradients: one pass, nothing perturbed.

        For loops that alternate between the two kinds of step; ``perturbs_next`` says which one is
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
        if not self._inside_step:  # the same
            self._before_step()
        self._plain(find_scale(self, scaler))
        self._after_step(zero_grad)

    def restore(self) -> None:
        """Undo ``first_step``: for a loop whose second pass failed. Does nothing otherwise."""
        with uninterrupted(insists=True), torch.no_grad():
            flight, self._flight = self._flight, None
            self._inside_closure = False
            if flight is not None:
                flight.undo()
            else:
                forget_weights()

    # --- between two steps ---

    @property
    def perturbs_next(self) -> bool:
        """Whether the next step is sharpness-aware.

        As ``perturb_every``, ``start``, ``stop`` and ``perturb_when`` say.
        """
        if not self._has_schedule:
            return True
        if not self._may_perturb_in(self.kept["t"] - 1):
            return False
        return self.perturb_when is None or self._ask(self.perturb_when)

    def _may_perturb_in(self, t: int) -> bool:
        """Whether ``perturb_every``, ``start`` and ``stop`` let step ``t``, from 0, perturb."""
        ended = self.stop is not None and t >= self.stop
        return t >= self.start and not ended and (t - self.start) % self.perturb_every == 0

    def _ask(self, perturb_when: Policy) -> bool:
        """What the user's policy says of the next step; asked once for what it is shown."""
        t, group = self.kept["t"], self.param_groups[0]
        known = {name: group.get(name) for name in ("lr", "rho")}
        metrics = {k: x for k, x in known.items() if not isinstance(x, Tensor)}
        if self._asked[:3] != (t, perturb_when, metrics):
            answer = perturb_when(t - 1, dict(metrics))
            if isinstance(answer, Tensor):
                raise TypeError(
                    "perturb_when must give a bool, got a tensor, which the host would wait for"
                )
            self._asked = t, perturb_when, metrics, bool(answer)
        return self._asked[3]

    @property
    def creates_state_only(self) -> bool:
        """Whether a call of ``step`` without a closure asks for the state that a step creates.

        ``torch.distributed.checkpoint`` does, before any step, with every learning rate 0 and a
        gradient of zeros in every parameter.
        """
        return asks_for_state(self.param_groups, self.state)

    def create_state(self) -> None:
        """Create what a first step would."""
        spec = self._spec(InFlight(False))
        with uninterrupted():
            self._passes.create_state(spec, self.state, self.base_optimizer)

    # --- between two passes ---

    @property
    def between_passes(self) -> bool:
        """Whether ``second_step`` is due: the model holds perturbed weights."""
        return self._flight is not None

    @property
    def ascents_left(self) -> int:
        """How many calls of ``first_step`` are due before ``second_step``: at first, all.

        That is ``ascent_steps``, or ``samples`` of the methods that have it: 1 by default.
        """
        return self._ascents if self._flight is None else self._flight.ascents_left

    @contextmanager
    def unperturbed(self) -> Iterator[None]:
        """Put the weights ``w`` into the model inside the block, between the passes of a step.

        For saving or evaluating in the middle of a step, as in the second call of a closure. At the
        end of the block, also after an exception, the perturbed weights are put back, bit for bit;
        changes of the weights inside the block are lost. Outside of a step the block does nothing.
        Blocks nest.

        Do not run a backward pass inside: it would add to the gradients. Do not put the block
        between a forward pass and its backward pass: autograd would raise an error.
        ``between_passes`` does not change. If :meth:`restore` is called inside, the block ends with
        ``w``.

        Cost: one more copy of the weights for as long as it lasts, and two copies back and forth.
        The device is not waited for.

        Raises:
            RuntimeError: By ``step``, ``first_step`` and the others, if they are called inside.
        """
        flight = self._flight
        swaps = flight is not None and self._unperturbed == 0
        self._unperturbed += 1
        try:
            if flight is not None and swaps:
                with uninterrupted(), torch.no_grad():
                    flight.suspend()
            yield
        finally:
            with uninterrupted(insists=True), torch.no_grad():
                self._unperturbed -= 1
                if flight is not None and swaps and self._flight is flight:
                    flight.resume()

    def repeated_random(self) -> AbstractContextManager[None]:
        """The same random numbers in all passes of a step, for loops that call ``backward``.

        Put it around forward and backward of each pass, with all its micro-batches::

            with optimizer.repeated_random():
                loss_fn(model(x), y).backward()
            optimizer.first_step(zero_grad=True)
            with optimizer.repeated_random():
                loss_fn(model(x), y).backward()
            optimizer.second_step(zero_grad=True)

        The first pass records the states of the generators. The others start from these, and at the
        end, also after an exception, the states of before are put back. See ``repeat_random`` of
        ``SAM``, which does this in ``step``, for the generators.

        Raises:
            RuntimeError: On entry, if it was not around the first pass of this step, or has been
                around this pass already; under capture in a CUDA graph.
        """
        return self._repeated("repeated_random()")

    # --- parts of a step ---

    def _expect(self, due: str, call: str = "") -> None:
        """Calls come in order.

        Raises:
            RuntimeError: If ``due`` is not what comes next, or inside a closure.
        """
        call = call or due
        if self._inside_closure:
            raise RuntimeError(f"{call} cannot be called from inside a closure given to step")
        if self._unperturbed:
            raise RuntimeError(
                f"{call} cannot be called inside unperturbed(): end that block first"
            )
        left = 0 if self._flight is None else self._flight.ascents_left
        if left and call == "first_step":
            return
        if left:
            several = "samples" if self.ascent.noise else "ascent_steps"
            raise RuntimeError(
                f"expected first_step, not another {call}: with {several} first_step comes several "
                f"times before second_step, {left} more in this step"
            )
        if (due == "second_step") != (self._flight is not None):
            due, undo = "first_step", ""
            if self._flight is not None:
                due, undo = "second_step", "; if the second pass failed, call restore() first"
            raise RuntimeError(
                f"expected {due}, not another {call}: first_step and second_step alternate{undo}"
            )

    def _before_step(self) -> None:
        """What comes before the first pass; around ``step`` torch runs the hooks."""
        hooks.run_own(self, "pre")
        self._check_settings()

    def _check_settings(self) -> None:
        """What has been set since the last step, here and on the ranks that train the same model.

        Raises:
            ValueError: If it is out of range.
            RuntimeError: If ranks disagree.
        """
        if self.stop is not None:
            check_stop(self.start, self.stop)
        if self.renormalize:
            check_perturb(self.param_groups)
        self._arguments.check_again(self.param_groups, self._base_of, self.defaults)
        if self._agreement.needed:
            self._agreement.check(self)

    def _after_step(self, zero_grad: bool) -> None:
        """What comes after the last pass."""
        if zero_grad:
            self._zero_gradients()
        if not self._inside_step:  # where torch runs them
            hooks.run_own(self, "post")

    def _begin(self, perturbs: bool, scale: LossScale | None) -> InFlight:
        """Decide on the host what the step will be."""
        replicas = None
        if perturbs:
            replicas = self._replicas if self._inside_step else replicas_behind(self.ascent_context)
        if replicas is not None:
            name = type(self).__name__
            check_replicas(name, self._mixing, self.renormalize, self.param_groups)
        flight = InFlight(perturbs, self._next_lam(), self._ascents, scale=scale, replicas=replicas)
        if perturbs and replicas is None and self.ascent_context is not None:
            # replicas would drift apart if this context is one that keeps gradients apart
            matters = self.renormalize or self._mixing is not None or flight.scale is not None
            if matters and is_distributed():
                self._warnings.once("unknown context", UNKNOWN_CONTEXT)
        return flight

    def _check_scale(self, flight: InFlight, grad_scaler: Any, zero_grad: Any) -> None:
        """The second pass has the scaler of the first."""
        check_same_scaler(flight.scale, grad_scaler, self, zero_grad)

    def _plain(self, scale: LossScale | None) -> None:
        """A step of the base alone."""
        self._run_base_hooks("pre")
        flight = self._begin(False, scale)
        spec = self._last = self._spec(flight)
        try:
            batch = self._passes.collect_second(spec, self.state)
            if not batch.params and self._inside_step:
                self._warnings.once("no gradients", NO_GRADIENTS)
            self._finish(batch, spec, flight)
        except BaseException:
            self.restore()
            raise

    def _finish(self, batch: Batch, spec: StepSpec, flight: InFlight) -> None:
        """The second half of a step, or all of a plain one."""
        with uninterrupted():
            goes_on = self._may_perturb_in(self.kept["t"])
            self._passes.second(
                batch, spec, flight, self.state, self.backend, self.base_optimizer, goes_on
            )
            self._flight = None
            self._inside_closure = False
            self.kept["t"] += 1
        # what LR schedulers look at, to warn where no step came first
        self._opt_called = self.base_optimizer._opt_called = True  # type: ignore[attr-defined]
        self._run_base_hooks("post")

    def _run_base_hooks(self, when: str) -> None:
        """Run a fused base's around its part of the step; others run their own."""
        if self._base is not None or self._several is not None:
            hooks.run_of_base(self.base_optimizer, when)

    @property
    def _ascents(self) -> int:
        """How many first passes a step has."""
        return self.ascent_steps

    def _next_lam(self) -> float:
        """Unified SAM's weight of normalisation in the step that begins; 1 is SAM."""
        return 1.0

    @property
    def _is_static(self) -> bool:
        """Whether the host decides nothing anew in every step."""
        return not self._has_schedule

    @property
    def _has_schedule(self) -> bool:
        steps = self.perturb_every, self.start, self.stop
        return steps != (1, 0, None) or self.perturb_when is not None

    def _spec(self, flight: InFlight) -> StepSpec:
        perturbs, is_scaled = flight.perturbs, flight.scale is not None
        recording, stochastic = self._passes.recording, self.rounding == "stochastic"
        noise = self.ascent.noise and perturbs
        checks_first = is_scaled and perturbs and not self.ascent.momentum
        takes_first = perturbs and self._base is not None and self._base.takes_first
        # what is in u, or in the update, as it is
        checks_first = checks_first or ((noise or takes_first) and self.skip_nonfinite)
        return StepSpec(
            groups=self.param_groups,
            ascent=self.ascent,
            base=self._base,
            descent=self._descent_of(flight),
            perturbs=perturbs,
            lam=flight.lam,
            share=share_of(1 if self.ascent.noise else flight.ascents),
            renormalize=self.renormalize and perturbs,
            max_grad_norm=self.max_grad_norm,
            skip_nonfinite=self.skip_nonfinite or is_scaled,
            skip_first=checks_first,
            is_scaled=is_scaled,
            has_masters=self.master_weights,
            is_static=self._is_static,
            seed=self.seed if stochastic or noise else None,
            stochastic=stochastic,
            choice_seed=self.seed,
            norm=self.norm,
            keeps_weights=recording is not None and recording.hessian == "diag",
            scratch=self._passes.scratch and self.scratch,
            bases=None if self._several is None else self._several.bases,
        )

    def _descent_of(self, flight: InFlight) -> Descent | None:
        """The descent rule of a step."""
        return self._mixing if flight.perturbs else None

    def _repeated(self, call: str) -> AbstractContextManager[None]:
        number = 0 if self._flight is None else self._flight.taken
        return self._random.around(self.param_groups, self.kept["t"], number, call)

    def _zero_gradients(self) -> None:
        """Zero the gradients as a part of the step."""
        if zeroes_as_torch(self):
            zero(self.param_groups, self.set_to_none)
        elif self.set_to_none:
            self.zero_grad()  # a subclass's may do otherwise, and take no argument
        else:
            self.zero_grad(set_to_none=False)

    @property
    def _sets_to_none(self) -> bool:
        """Whether what zeroes the gradients leaves them to other code that holds them."""
        return self.set_to_none and zeroes_as_torch(self)
