"""The two-pass protocol that every method shares: groups, state, and the contract of a step."""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from fastsam.kernels.layout import Scalar

from . import backends
from .bases import BASES
from .capture import is_captured
from .checks import (
    check_base,
    check_group,
    check_keys,
    check_max_grad_norm,
)
from .interrupts import uninterrupted
from .rules import UNIFIED, Ascent, Batch, LamRule, Step
from .stateful import StatefulOptimizer


class SharpnessAwareOptimizer(StatefulOptimizer):
    r"""Base class of fastsam's optimizers; use one of its subclasses.

    A step is two passes. The first gradient ``g`` decides the perturbation: ``w <- w + e``. The
    second, ``g~``, is taken there; then the weights are restored bit for bit and the base
    optimizer takes its step with it. Either give :meth:`step` a closure, or alternate
    :meth:`first_step` and :meth:`second_step`. Between the two passes ``model.state_dict()``
    holds perturbed weights; ``state_dict()`` of the optimizer is allowed there and complete.

    Where the second gradient of a parameter is missing it is only restored; where its first is
    missing it is updated but not perturbed. A first gradient whose norm is not finite perturbs
    nothing (in LightSAM II and III, which take no norm, that goes for single elements). What a step
    adds to the state becomes the state when the step is complete.

    In the equations of the subclasses :math:`g` is the gradient at :math:`w`, :math:`\tilde g` the
    one at :math:`w + e`, and :math:`\|\cdot\|` the norm over every element of every group. A step
    costs two forward and backward passes, one copy of the weights between them, and the bytes that
    a class gives for itself.
    """

    _ascent: Ascent = UNIFIED
    _mix: LamRule | None = None  # SAMAR's

    def __init__(
        self,
        params: ParamsT,
        base_optimizer: type[Optimizer],
        *,
        rho: float | Tensor,
        adaptive: bool = False,
        eta: float = 0.0,
        renormalize: bool = False,
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = False,
        backend: str = "auto",
        own: Mapping[str, Any] | None = None,
        **base_kwargs: Any,
    ):
        """``own`` holds a subclass's further group keys and their defaults."""
        check_base(base_optimizer, not_below=SharpnessAwareOptimizer)
        check_max_grad_norm(max_grad_norm)
        own = {"rho": rho, "adaptive": adaptive, "eta": eta, **(own or {})}
        self._base = BASES.get(base_optimizer)
        check_group(own | base_kwargs, self._base is not None, self._ascent.scales)
        self.renormalize = renormalize
        self.max_grad_norm = max_grad_norm
        self.skip_nonfinite = skip_nonfinite
        self.backend = backend
        super().__init__(params, own)
        self._check_groups()
        # The base validates its own arguments and completes the groups, which it then shares.
        # A fused base is never stepped; its mathematics runs in the update pass.
        self.base_optimizer = base_optimizer(self.param_groups, **base_kwargs)
        check_keys(self.base_optimizer, (*own, "lam", "t"))
        self.defaults.update(self.base_optimizer.defaults)
        self.param_groups = self.base_optimizer.param_groups
        self.state = self.base_optimizer.state
        self._start()
        params_ = [p for group in self.param_groups for p in group["params"]]
        backends.resolve(backend, params_[0].device if params_ else torch.device("cpu"))
        if any(p.dtype in (torch.float16, torch.bfloat16) for p in params_):
            warnings.warn(
                "some parameters are float16 or bfloat16: a perturbation of norm rho is mostly "
                "below their resolution and is rounded away; keep parameters in float32 and use "
                "torch.autocast instead",
                stacklevel=3,
            )

    # --- the step ---

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one sharpness-aware step.

        Args:
            closure: Computes the loss, calls ``backward`` and returns the loss (the contract of
                ``torch.optim.LBFGS``). It is called twice; once where every ``rho`` is 0, unless
                the first pass has state to keep. Gradients are zeroed before each call.

        Returns:
            What the first call returned: the loss at ``w``.

        Raises:
            RuntimeError: Without a closure; between ``first_step`` and ``second_step``; for
                gradients that are sparse or complex. An exception in the closure leaves weights
                and state as they were before the step, and propagates.
        """
        if closure is None:
            raise RuntimeError(
                f"{type(self).__name__}.step needs a closure that computes the loss and calls "
                "backward; without one, alternate first_step and second_step"
            )
        self._expect("first_step")
        self._check_groups()
        closure = torch.enable_grad()(closure)
        self._inside_step = True
        try:
            self.zero_grad()
            loss = closure()
            if self._may_skip_ascent and all(_is_zero(g["rho"]) for g in self.param_groups):
                self._perturbs = False
                self._lam = self._next_lam()
                self._descend(self._collect("descent"))
                return loss
            self.first_step(zero_grad=True)
            closure()
            self.second_step()
        except BaseException:
            self.restore()
            raise
        finally:
            self._inside_step = False
        return loss

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> None:
        """Perturb the weights along the present gradients: ``w <- w + e``.

        Args:
            zero_grad: Zero the gradients afterwards.

        Raises:
            RuntimeError: If ``second_step`` is due; if a gradient is sparse or complex, or the
                parameters lie on several devices. Nothing has changed then.
            ValueError: If a group's hyper-parameter has been set out of range.
        """
        self._expect("first_step")
        self._run_hooks("pre")
        self._check_groups()
        batch = self._collect("ascent")
        self._check_capture(batch)
        self._perturbs = True
        self._lam = self._next_lam()
        scalars = self._scalars_for(batch)
        firsts = self._take_over(batch, cleared=zero_grad) if self._keeps_first else {}
        if self._has_ascent_state:
            for param, i in zip(batch.params, batch.groups, strict=True):
                old = self._ascent.state(self.state.get(param, {}), param, self.param_groups[i])
                batch.ascent.append(old)
                batch.next.append(self._room_for(param, old))
        else:
            batch.ascent = batch.next = [{}] * len(batch.params)
        with uninterrupted():
            if batch.params:
                self._backup = self._backend_for(batch).ascend(batch, self._describe(), scalars)
            else:
                scalars[Scalar.GRAD_NORM].zero_()
                scalars[Scalar.NEXT_SQUARED_NORMS] = scalars[Scalar.ASCENT_SQUARED_NORMS]
            self._firsts = firsts
            if self._has_ascent_state:
                pairs = zip(batch.ascent, batch.next, strict=True)
                self._pending = dict(zip(batch.params, pairs, strict=True))
            self._between_passes = True
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def second_step(self, zero_grad: bool = False) -> None:
        """Restore the weights and update them with the gradients taken at ``w + e``.

        Args:
            zero_grad: Zero the gradients afterwards.

        Raises:
            RuntimeError: If ``first_step`` is due; if a gradient is sparse or complex. The weights
                have been restored then, and the step is over without an update.
        """
        self._expect("second_step")
        try:
            self._descend(self._collect("descent"))
        except BaseException:
            self.restore()
            raise
        self._opt_called = True  # what LR schedulers look at, to warn where no step came first
        if zero_grad:
            self.zero_grad()
        self._run_hooks("post")

    @torch.no_grad()
    def restore(self) -> None:
        """Undo ``first_step``: for a loop whose second pass failed. Does nothing otherwise."""
        if self._backup is not None:
            self._backup.restore()
        self._end_step()

    @property
    def metrics(self) -> Mapping[str, Tensor]:
        """What the last step measured, as 0-dim tensors on the parameters' device.

        ``grad_norm`` is the first gradient's norm (of ``T g`` in adaptive groups), where the step
        needs it, and ``rho`` the first group's radius. ``perturbed_grad_norm``, the second
        gradient's norm, is there where the step needs it; with ``renormalize`` so is
        ``renormalization`` (gamma, and both norms are then of ``T g``), with ``skip_nonfinite``
        so is ``skipped``, the number of steps skipped so far. Reading a value synchronises with
        the device; making the mapping does not. Empty before the first step.
        """
        if self._scalars is None:
            return {}
        step = self._describe()
        names = {}
        if self._perturbs and step.needs_ascent_norm:
            names["grad_norm"] = Scalar.GRAD_NORM
        if step.needs_descent_norm:
            names["perturbed_grad_norm"] = Scalar.PERTURBED_GRAD_NORM
        if step.renormalize:
            names["renormalization"] = Scalar.RENORMALIZATION
        if self.skip_nonfinite:
            names["skipped"] = Scalar.SKIPPED
        values = {name: self._scalars[slot].clone() for name, slot in names.items()}
        rho, like = self.param_groups[0]["rho"], self._scalars[0]
        if isinstance(rho, Tensor) and rho.device == like.device:
            values["rho"] = rho.to(like, copy=True)
        else:
            values["rho"] = torch.full_like(like, float(rho))
        return values

    # --- what subclasses may refine ---

    def _next_lam(self) -> float:
        """Unified SAM's weight of normalisation in the step that begins; 1 is SAM."""
        return 1.0

    def _finish_step(self) -> None:
        """Called when a step has been completed."""

    @property
    def _keeps_first(self) -> bool:
        """Whether first gradients are needed after the first pass."""
        return self._mix is not None or self._records is not None

    @property
    def _may_skip_ascent(self) -> bool:
        """Whether a step with radius 0 needs no first pass."""
        return self._ascent.name == "unified"

    # --- parts of the step ---

    @property
    def _has_ascent_state(self) -> bool:
        return any(self._ascent.states(group) for group in self.param_groups)

    def _expect(self, call: str) -> None:
        due = "second_step" if self._between_passes else "first_step"
        if call != due:
            raise RuntimeError(
                f"expected {due}, which has to come before another {call}: first_step and "
                "second_step alternate"
            )

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
            skip_nonfinite=self.skip_nonfinite,
            keeps_weights=self._records == "diag",
        )

    def _descend(self, batch: Batch) -> None:
        step = self._describe()
        if self._pending:
            without_ascent: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
            pairs = [self._pending.get(param, without_ascent) for param in batch.params]
            batch.ascent, batch.next = [old for old, _ in pairs], [new for _, new in pairs]
        else:
            batch.ascent = batch.next = [{}] * len(batch.params)
        if self._firsts:
            batch.firsts = [self._firsts.get(param) for param in batch.params]
        else:
            batch.firsts = [None] * len(batch.params)
        scalars = self._scalars_for(batch)
        if batch.params:
            self._check_capture(batch)
            if step.base is not None:
                self._prepare(batch, step.base)
            seen = batch
            if self._records and step.base is None:  # which may write to the gradients
                seen = replace(batch, grads=[grad.clone() for grad in batch.grads])
            try:
                with uninterrupted():
                    self._backend_for(batch).descend(batch, self._backup, step, scalars)
                    if step.base is None:
                        # it cannot skip on the device: the one branch on a device value
                        if not step.skip_nonfinite or bool(scalars[Scalar.ACCEPTED]):
                            self._step_foreign()
                    self._complete(seen, step, scalars)
            except BaseException:
                for state, fresh in zip(batch.states, batch.fresh, strict=True):
                    if fresh:  # it is still to begin
                        state.pop("momentum_buffer", None)
                raise
        else:  # nothing to update, nor to reject
            with uninterrupted():
                if self._backup is not None:
                    self._backup.restore()
                scalars[Scalar.ACCEPTED].fill_(1)
                scalars[Scalar.ASCENT_SQUARED_NORMS] = scalars[Scalar.NEXT_SQUARED_NORMS]
                self._complete(batch, step, scalars)

    def _complete(self, batch: Batch, step: Step, scalars: Tensor) -> None:
        """What the ascent computed becomes the state."""
        if self._pending:
            updated = set(batch.params)
            rest = [pair for param, pair in self._pending.items() if param not in updated]
            kept = Batch(ascent=[pair[0] for pair in rest], next=[pair[1] for pair in rest])
            backends.keep_rejected(kept, step, scalars)
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
        self._end_step()
        self._finish_step()


def _is_zero(rho: float | Tensor) -> bool:
    return not isinstance(rho, Tensor) and rho == 0
