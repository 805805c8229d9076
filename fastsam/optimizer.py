"""The class behind every method: a step by closure, from its first pass to its last."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler

from .explicit import ExplicitPasses, uncompiled
from .micro_batches import GradientMean
from .replicas import replicas_of
from .step import hooks
from .step.arguments import Context
from .step.caches import forget_parametrizations
from .step.closures import FirstLook, check_closure, check_closures
from .step.flight import InFlight
from .step.guards import check_reduced
from .step.recording import Recording
from .step.rule import Ascent, Descent
from .step.scaling import LossScale, check_scaler, find_scale
from .step.spec import is_perturbed
from .unified import UNIFIED

Result = TypeVar("Result")


class SharpnessAwareOptimizer(ExplicitPasses):
    r"""Base class of fastsam's optimizers; use one of its subclasses, or write one.

    A step has two passes. The first computes the perturbation from the gradient ``g``:
    ``w <- w + e``. The second takes the gradient ``g~`` there, restores the weights bit for bit,
    and lets the base optimizer step with ``g~``. Either give :meth:`step` a closure, or alternate
    :meth:`first_step` and :meth:`second_step`. Between the two passes ``model.state_dict()`` holds
    perturbed weights; ``state_dict()`` of the optimizer may be called there and is complete.

    A parameter without a second gradient is only restored; one without a first gradient is updated
    but not perturbed. A first gradient whose norm is not finite perturbs nothing (LightSAM II and
    III take no norm; there the same holds for each element). New state becomes the state when the
    step is complete.

    In the equations of the subclasses :math:`g` is the gradient at :math:`w`, :math:`\tilde g` the
    one at :math:`w + e`, and :math:`\|\cdot\|` the norm over every element of every group. A step
    costs two forward and backward passes, one copy of the weights between them, and the memory
    traffic that each class states. In groups with ``maximize`` the negative objective is minimised,
    so the perturbation leads to where the objective is lower.

    Attributes:
        ascent: The rule of the perturbation; a subclass sets its own.
        descent: The rule of ``u``; a subclass sets its own. None is the second gradient.
        base_optimizer: The base optimizer. ``state`` and ``param_groups`` are the same objects as
            its own.
        kept: The optimizer's own numbers: ``t``, which counts steps from 1, and accumulators of
            norms and rules. A state dict has them in every group, as ``fastsam_t`` and so on.

    Example:
        >>> optimizer = fastsam.SAM(model.parameters(), torch.optim.SGD, lr=0.1)
        >>> loss = optimizer.step(closure)

        The same pass by pass:

        >>> loss_fn(model(inputs), labels).backward()
        >>> optimizer.first_step(zero_grad=True)
        >>> loss_fn(model(inputs), labels).backward()  # at the perturbed weights
        >>> optimizer.second_step(zero_grad=True)
    """

    ascent: Ascent = UNIFIED
    descent: Descent | None = None
    #: Whether two closures have the same gradient where nothing is perturbed.
    _closures_agree_at_w = False

    _TRANSIENT: tuple[str, ...] = (*ExplicitPasses._TRANSIENT, "_first_look", "_mode")

    def _start(self) -> None:
        super()._start()
        self._first_look = FirstLook()
        self._mode = ""  # that ``train`` or ``eval`` has set last

    # --- steps ---

    @uncompiled
    @torch.no_grad()
    def step(
        self,
        closure: Callable[[], Any] | None = None,
        second_closure: Callable[[], Any] | None = None,
        *,
        grad_scaler: GradScaler | None = None,
    ) -> Any:
        """Take one step: sharpness-aware, or of the base alone as ``perturb_every`` says.

        Args:
            closure: Computes the loss, calls ``backward`` and returns the loss (the contract of
                :class:`torch.optim.LBFGS`). It may run several micro-batches, the same in both
                calls. It is called twice. In a step of the base alone it is called once, and also
                if every ``rho`` is 0, unless the first pass has state to update. Gradients are
                zeroed before each call, as ``set_to_none`` says. With ``ascent_steps`` it is called
                once more for each above 1. There is one warning if it leaves no gradient.
            second_closure: Called in its place for the second pass, if the gradient for the update
                is that of another loss or of other samples. In a step of the base alone both are
                called, and the gradient of the second is used; if ``perturbs_next`` is False you
                may give the second one alone. Default: the same closure.
            grad_scaler: The :class:`torch.amp.GradScaler` with which the closure scales its loss.
                If a gradient of either pass is not finite, the weights are restored and the step is
                skipped. Call ``grad_scaler.update()`` after the step, and neither
                ``grad_scaler.step`` nor ``unscale_``.

        Returns:
            What the first call returned: the loss at ``w``.

        Raises:
            RuntimeError: Without a closure; between ``first_step`` and ``second_step``; inside a
                closure; for gradients that are sparse or complex. An exception in the closure
                leaves weights and state as they were before the step, and propagates.
            TypeError: If an argument is something else.
            ValueError: With a second closure and ``amplify``, which takes the difference of both
                gradients: they have to be those of one function.
        """
        if closure is None and self.creates_state_only:
            self.create_state()
            return None
        check_closure(type(self).__name__, closure)
        if second_closure is None:
            second_closure = closure
        else:
            check_closure(type(self).__name__, second_closure)
        self._expect("first_step", "step")
        self._check_settings()
        if second_closure is not closure and self.amplify and not self._closures_agree_at_w:
            raise ValueError(
                f"amplify must be False with a second closure, got {self.amplify!r}: a step would "
                "amplify the difference between the two closures' gradients"
            )
        return self._undone_if_it_fails(self._step, closure, second_closure, grad_scaler)

    @uncompiled
    @torch.no_grad()
    def step_micro_batches(
        self, closures: Iterable[Callable[[], Any]], *, grad_scaler: GradScaler | None = None
    ) -> list[Any]:
        r"""Take one step in which every micro-batch has a perturbation of its own.

        .. math:: u = \frac1m \sum_{i=1}^m \nabla L_i(w + e_i)

        with :math:`e_i` along :math:`\nabla L_i(w)`: m-sharpness. It needs the memory of one more
        gradient. (In :meth:`step` a closure that runs all micro-batches perturbs along their sum.)
        In a step of the base alone (``perturb_every``, ``start``, ``stop``) :math:`e_i = 0`.

        Args:
            closures: One for each micro-batch, at least one. Each computes the loss of its
                micro-batch, not divided by their number, calls ``backward`` and returns the loss.
                Each is called twice, or once in a step of the base alone. Afterwards ``.grad`` is
                :math:`u`.
            grad_scaler: The scaler of the closures' losses, as in :meth:`step`. If a gradient is
                not finite in any pass of any micro-batch, the whole step is skipped. Afterwards
                ``.grad`` is :math:`u` times the scale.

        Returns:
            What the first calls returned.

        Raises:
            RuntimeError: For methods whose steps are more than a perturbation and the base's
                update: with ``renormalize``, a descent rule (SAMAR), and those with state in the
                ascent. An exception in a closure leaves weights and state as they were before the
                step.
            TypeError, ValueError: If ``closures`` are not callable, or there is none; if
                ``grad_scaler`` is something else.
        """
        name = type(self).__name__
        if self.renormalize or self._mixing is not None or not self._is_memoryless:
            raise RuntimeError(f"{name} does not support perturbations by micro-batch")
        closures = check_closures(name, closures)
        self._expect("first_step", "step_micro_batches")
        scaler = check_scaler(grad_scaler, self)
        self._before_step()
        losses = self._undone_if_it_fails(self._step_micro_batches, closures, scaler)
        hooks.run_own(self, "post")
        return losses

    # --- modes ---

    def train(self) -> None:
        """Switch a schedule-free base to the weights that are trained.

        Other bases are left alone. It may be called again between the passes of a step, as Hugging
        Face's loop does.

        Raises:
            RuntimeError: If it changes the mode between ``first_step`` and ``second_step`` or
                inside a closure.
        """
        self._set_mode("train")

    def eval(self) -> None:
        """Switch a schedule-free base to the weights that are evaluated and saved.

        Raises:
            RuntimeError: Between ``first_step`` and ``second_step`` or inside a closure.
        """
        self._set_mode("eval")

    def _set_mode(self, mode: str) -> None:
        change = getattr(self.base_optimizer, mode, None)
        if mode == "train" and (change is None or self._mode == mode):
            if self._flight is not None or self._inside_closure:
                return  # nothing would change
        self._expect("first_step", mode)
        if change is not None:
            change()
        self._mode = mode

    # --- what a step measured ---

    @contextmanager
    def recording(self, hessian: str | None) -> Iterator[Recording | None]:
        """For LETS: take in what the step inside the block sees, to measure more afterwards.

        Args:
            hessian: The approximation that it is for; None takes in nothing.
        """
        if hessian is None:
            yield None
            return
        if self.ascent_steps != 1:
            raise RuntimeError(f"LETS needs ascent_steps=1, got {self.ascent_steps}")
        if hessian == "diag" and self.ascent.sees_past:
            raise RuntimeError(
                f"LETS needs hessian='difference' with {type(self).__name__}, whose perturbation "
                "follows from state that the update changes, got 'diag'"
            )
        passes, spec = self._passes, self._spec(InFlight(True))
        passes.recording = Recording(
            hessian,
            run=lambda closure: self._call(closure, self.descent_context),
            collect=lambda: passes.collect_other(spec, self.state),
            hypergradient=partial(passes.hypergradient, self.backend),
            clear=self._zero_gradients,
            cleared=self._sets_to_none,
        )
        try:
            yield passes.recording
        finally:
            passes.recording = None

    @property
    def metrics(self) -> Mapping[str, Tensor]:
        """What the last step measured, as 0-dim tensors on the parameters' device.

        ``rho`` is the radius of the first group. ``grad_norm`` is the norm of the first gradient
        over all perturbed groups (of ``T g`` in adaptive ones), if the step needs it.
        ``perturbed_grad_norm`` is the norm of the second gradient, if the step needs it. With
        ``renormalize`` there is ``renormalization`` (gamma), and both norms are of ``T g``. With
        ``skip_nonfinite`` or a loss scale there is ``skipped``, the number of steps skipped so far.
        Norms are those of unscaled gradients. ``perturbed`` is 1, or 0 after a step of the base
        alone, which has no values of a first pass. Reading a value synchronises with the device;
        ``metrics`` itself does not. Empty before the first step.
        """
        scalars = self._passes.scalars
        if scalars.vector is None:
            return {}
        return scalars.measured(self._last or self._spec(InFlight(True)))

    # --- parts of a step ---

    @property
    def _is_memoryless(self) -> bool:
        """Whether the ascent keeps nothing from step to step."""
        states = any(self.ascent.states(group) for group in self.param_groups)
        return not states and self.ascent.accumulate is None

    @property
    def _needs_two_passes(self) -> bool:
        if self._has_schedule and not self.perturbs_next:
            return False
        perturbed = [group for group in self.param_groups if is_perturbed(group)]
        for group in perturbed:
            if isinstance(group["rho"], Tensor) or group["rho"] != 0:
                return True
        return bool(perturbed) and not self._is_memoryless

    def _undone_if_it_fails(self, take: Callable[..., Result], *args: Any) -> Result:
        """What ``take`` returns; where it raises, the weights are as they were before the step."""
        self._inside_step = True
        try:
            return take(*args)
        except BaseException as error:
            try:
                self.restore()
            finally:  # handlers of further signals may have kept it from beginning
                try:
                    self.restore()
                finally:
                    self.restore()
            self._agreement.note(self, error)
            raise
        finally:
            self._inside_step = False

    def _step(
        self, closure: Callable[[], Any], second_closure: Callable[[], Any],
        scaler: GradScaler | None,
    ) -> Any:  # fmt: skip
        perturbs = self._needs_two_passes
        repeats = self.repeat_random and perturbs
        # a gradient that the base takes as it is has to be synchronised, for one
        context = self.ascent_context if perturbs else None
        if self._last is None:
            self._first_look.before(self.param_groups)
        loss = self._call(closure, context, repeats)
        self._first_look.after(self._warnings, whole=context is None)
        if not perturbs:
            if second_closure is not closure and not self._closures_agree_at_w:
                self._call(second_closure, self.descent_context)
            self.plain_step(grad_scaler=scaler)
            return loss
        self.first_step(zero_grad=True, grad_scaler=scaler)
        self._ascend_on(closure, repeats, scaler)
        self._call(second_closure, self.descent_context, repeats)
        self._first_look.after(self._warnings)
        self.second_step(grad_scaler=scaler)
        return loss

    def _step_micro_batches(
        self, closures: Sequence[Callable[[], Any]], scaler: GradScaler | None
    ) -> list[Any]:
        perturbs = self._needs_two_passes
        repeats = self.repeat_random and perturbs
        context = self.ascent_context if perturbs else None
        losses: list[Any] = []
        mean = GradientMean(self.param_groups, len(closures))
        scale: LossScale | None = None
        for closure in closures:
            losses.append(self._call(closure, context, repeats))
            scale = scale or find_scale(self, scaler)
            if perturbs:
                self.first_step(zero_grad=True, grad_scaler=scaler)
                self._ascend_on(closure, repeats, scaler)
                if scale is not None and self._passes.scalars.vector is not None:
                    scale.keep_first(self._passes.scalars.vector)
                self._call(closure, self.descent_context, repeats)
                assert self._flight is not None
                spec = self._spec(self._flight)
                check_reduced(  # by no name, which would keep the gradients
                    self._passes.collect_second(spec, self.state), self._flight, self.param_groups
                )
            mean.add(None if scale is None else scale.keep_last())
            self.restore()
        self._zero_gradients()
        mean.leave()
        self._plain(scale)
        if perturbs:  # the gradients were those of perturbed weights
            self._last = self._spec(InFlight(True, scale=scale))
        return losses

    def _ascend_on(self, closure: Any, repeats: bool, scaler: GradScaler | None) -> None:
        """The further first passes of a step that has several.

        Their gradients perturb, and are taken at perturbed weights: they have both contexts.
        """
        while self.ascents_left:
            self._call(closure, self.ascent_context, repeats, self.descent_context)
            self.first_step(zero_grad=True, grad_scaler=scaler)

    def _call(
        self, closure: Any, context: Context | None, repeats: bool = False,
        inner: Context | None = None,
    ) -> Any:  # fmt: skip
        """What the closure returns, called as one pass, in one context or two.

        ``repeats`` says whether it draws the random numbers of the step's first pass.
        """
        self._zero_gradients()
        forget_parametrizations()
        manager = None if context is None else context()
        if context is self.ascent_context:
            self._replicas = None if context is None else replicas_of(manager)
        try:
            self._inside_closure = True
            if manager is None and inner is None and not repeats:  # the usual call, in less time
                with torch.enable_grad():
                    return closure()
            random = self._repeated("repeat_random") if repeats else nullcontext()
            second = nullcontext() if inner is None else inner()
            outer = nullcontext() if manager is None else manager
            with outer, second, random, torch.enable_grad():
                return closure()
        finally:
            self._inside_closure = False
