"""MSAM: SAM along the base's momentum, in one pass."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from torch.optim.optimizer import Optimizer, ParamsT

from fastsam.arithmetic import EPS, gives_direction, where
from fastsam.bases import find_base
from fastsam.explicit import uncompiled
from fastsam.optimizer import SharpnessAwareOptimizer
from fastsam.step.arguments import FLAG, context, shown
from fastsam.step.flight import InFlight
from fastsam.step.recording import Recording
from fastsam.step.rule import Ascent, Columns, Group
from fastsam.step.scaling import check_scaler, find_scale
from fastsam.step.spec import sign_of
from fastsam.step.takeover import TakenOver

#: What bases call their momentum.
NAMES = ("momentum_buffer", "exp_avg")
#: Settings that say something of a first pass, or of two, and what they have to be.
OF_TWO_PASSES = {
    "renormalize": (False, "rescales to the norm of a first gradient"),
    "ascent_context": (None, "is for the pass of a first gradient"),
    "descent_context": (None, "is for the second of two passes"),
    "repeat_random": (False, "repeats the random numbers of a first pass"),
}


def _columns(group: Group, lam: float) -> Columns:
    return {"AHEAD": -sign_of(group)}


def _direction(g: Tensor, state: dict[str, Tensor], h: Columns) -> Tensor:
    ahead: Tensor = h["AHEAD"] * g
    return ahead


def _radius(rho: Any, norm: Any, total: Any, h: Columns) -> Any:
    return where(gives_direction(norm), rho * (1.0 / (norm + EPS)))


#: The rule, by the name of the momentum.
ALONG = {
    name: Ascent(
        name="momentum", kernel="fastsam.kernels.ascent.momentum", direction=_direction,
        radius=_radius, columns=_columns, momentum=name,
        eager="fastsam.backends.eager.ascents:along_momentum",
    ) for name in NAMES
}  # fmt: skip


class MSAM(SharpnessAwareOptimizer):
    r"""Momentum-SAM: perturbs along the base's momentum, with one forward and backward pass a step.

    .. math:: e = -\rho\, \frac{v}{\|v\| + 10^{-12}}, \qquad w \leftarrow \mathrm{base}(w, \tilde g)

    :math:`v` is what the base has kept of the steps before: SGD's momentum buffer, the first moment
    of Adam and AdamW. So the perturbation is known before the forward pass, no gradient at
    :math:`w` is needed, and a step has half of :class:`SAM`'s forward and backward passes.
    :math:`e` points to where the momentum moves the weights. In the first step, and for a parameter
    that has no momentum yet, :math:`e = 0`. In ``adaptive`` groups, which are not in the paper,
    :math:`v` becomes :math:`T^2 v` and its norm :math:`\|T v\|`, as in :class:`SAM`. A momentum
    whose norm is 0 or not finite perturbs nothing.

    ``step(closure)`` perturbs, calls the closure once, restores the weights and updates them. A
    loop that calls ``backward`` itself says where its forward pass begins::

        optimizer.perturb()
        loss_fn(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()

    Between two steps the model holds :math:`w`, for checkpoints, averages and evaluation. (The
    authors' code leaves the weights perturbed there. Weight decay that is added to the gradient is
    taken at :math:`w` here and at :math:`w + e` there.)

    Several micro-batches may be accumulated between the two calls, or in the closure. Gradients may
    carry a loss scale (``grad_scaler=``). With DDP and FSDP2 nothing else is needed: the
    momentum is that of the reduced gradients, equal on all ranks, or each rank's shard of it.
    Settings for a first pass are refused: ``renormalize``,
    ``ascent_context``, ``descent_context``, ``repeat_random``, ``ascent_steps`` above 1; so are
    ``step_micro_batches`` and ``LETS``.

    ``metrics`` has the momentum's norm as ``momentum_norm``.

    :meth:`first_step` and ``second_step`` do what :meth:`perturb` and :meth:`step` do, for
    loops that are written for two passes. ``first_step`` reads no gradients, so the pass before it
    is unnecessary.

    Cost: one forward and backward pass. With SGD and momentum 36 bytes per element in float32
    (perturb 16, update 20), two launches; with AdamW 44. The update adds up the norm of the
    momentum that it writes, for the next step. A step that may find another momentum adds it up
    again, which is 4 bytes and a launch more: after ``load_state_dict``, after ``plain_step``
    and ``base_optimizer.step()``, where torch has counted a write to the momentum, where another
    optimizer of fastsam has written to it, and where other parameters take part. Every step adds it
    up with ``adaptive`` groups, ``norm``, ``amplify``, ``perturb_every`` above 1, several devices
    or processes, and once a step has been captured in a CUDA graph. After a write to the momentum
    that torch does not count, as to its ``.data``, one perturbation is divided by the norm of
    before.

    Args:
        params: As in :class:`SAM`.
        base_optimizer: A fused one that keeps a momentum in every group that is perturbed:
            ``torch.optim.SGD`` with ``momentum``, ``Adam``, ``AdamW``, or one of your own
            (``fastsam.rules.register_base``) with a state ``momentum_buffer`` or ``exp_avg``.
        rho: Radius, at least 0. Default 0.3. A group key. The authors take ten times the radius of
            :class:`SAM` and more. It has to be tuned: in two of three small tasks 0.3 was far from
            the best (docs/choosing.md).
        **kwargs: The other arguments of :class:`SAM`, and the base optimizer's.

    Raises:
        TypeError, ValueError, ImportError, RuntimeError: As :class:`SAM`; TypeError also for a base
            optimizer that keeps no momentum or is not fused, ValueError for a setting of a first
            pass.

    Example:
        >>> optimizer = fastsam.MSAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9)
        >>> loss = optimizer.step(closure)  # calls it once

    Reference: Becker, Altrock and Risse, "Momentum-SAM: sharpness aware minimization without
    computational overhead", arXiv 2401.12033. The equation is that of the authors' code.
    """

    def __init__(
        self,
        params: ParamsT,
        base_optimizer: type[Optimizer],
        rho: float | Tensor = 0.3,
        **kwargs: Any,
    ):
        for name in OF_TWO_PASSES:
            _check_setting(type(self), name, kwargs.get(name, OF_TWO_PASSES[name][0]))
        self.ascent = self._rule_of(base_optimizer)
        super().__init__(params, base_optimizer, rho=rho, **kwargs)

    # --- a step ---

    @uncompiled
    @torch.no_grad()
    def perturb(self) -> None:
        """Perturb the weights along the momentum, before the forward pass: ``w <- w + e``.

        :meth:`step` without a closure comes after the backward pass. Where ``perturb_every``,
        ``start`` or ``stop`` make the step one of the base alone, this does nothing.

        Raises:
            RuntimeError: If ``step`` is due.
            ValueError: If a group's hyper-parameter has been set out of range.
        """
        self._expect("first_step", "perturb")
        if self._needs_two_passes:
            self._check_settings()
            self._undone_if_it_fails(super().first_step)

    def step(
        self,
        closure: Callable[[], Any] | None = None,
        second_closure: Callable[[], Any] | None = None,
        *,
        grad_scaler: GradScaler | None = None,
    ) -> Any:
        """Take one step: perturb, call the closure once, restore the weights and update them.

        Args:
            closure: Computes the loss, calls ``backward`` and returns the loss; gradients are
                zeroed before it. Without one, :meth:`perturb` has come before the forward pass, and
                the present gradients are those at ``w + e``.
            second_closure: None: there is no second pass.
            grad_scaler: A ``torch.amp.GradScaler`` with which the loss is scaled. A gradient that
                is not finite restores the weights and skips the step; ``grad_scaler.update()`` is
                to be called after it, and ``grad_scaler.step`` and ``unscale_`` are not.

        Returns:
            What the closure returned: the loss at ``w + e``.

        Raises:
            RuntimeError: Without a closure where :meth:`perturb` has not come before, or with one
                where it has; inside a closure; for gradients that are sparse or complex. An
                exception in the closure leaves weights and state as they were before the step, and
                propagates.
            TypeError: If an argument is something else, or there is a second closure.
        """
        if second_closure is not None:
            raise TypeError(
                f"second_closure must be None with {type(self).__name__}, which has no second "
                f"pass, got {shown(second_closure)}"
            )
        if closure is not None or self.creates_state_only:
            return super().step(closure, grad_scaler=grad_scaler)
        return self._step_here(grad_scaler)

    @uncompiled
    @torch.no_grad()
    def _step_here(self, grad_scaler: GradScaler | None) -> None:
        """A step with the present gradients."""
        if self._flight is not None:
            self._undone_if_it_fails(lambda: self.second_step(grad_scaler=grad_scaler))
        elif self._needs_two_passes:
            raise RuntimeError(
                f"{type(self).__name__}.step needs a closure, or perturb() before the forward "
                "pass: the weights are updated with the gradients at w + e"
            )
        else:
            self._expect("first_step", "step")
            self._check_settings()
            self._undone_if_it_fails(lambda: self.plain_step(grad_scaler=grad_scaler))

    def first_step(self, zero_grad: bool = False, *, grad_scaler: GradScaler | None = None) -> None:
        """Perturb the weights along the momentum, whatever the present gradients are.

        :meth:`perturb` under the name that it has in other methods, for loops of two passes.

        Args:
            zero_grad: Zero the gradients afterwards.
            grad_scaler: Is checked, and given to ``second_step``.

        Raises:
            TypeError, ValueError, RuntimeError: As in every method.
        """
        check_scaler(grad_scaler, self, zero_grad)
        super().first_step(zero_grad)
        if self._flight is not None:
            self._flight.seen = []  # gradients of before say nothing of those that come

    @contextmanager
    def recording(self, hessian: str | None) -> Iterator[Recording | None]:
        """For LETS, which is refused."""
        if hessian is not None:
            raise RuntimeError(
                f"LETS does not support {type(self).__name__}, whose step has no first gradient"
            )
        yield None

    # --- parts of it ---

    @staticmethod
    def _rule_of(base_optimizer: Any) -> Ascent:
        """The rule for a base, by what that calls its momentum."""
        return ALONG[_name_in(base_optimizer)]

    def _step(self, closure: Any, second_closure: Any, scaler: GradScaler | None) -> Any:
        if not self._needs_two_passes:
            return super()._step(closure, second_closure, scaler)
        check_scaler(scaler, self)
        if self._last is None:
            self._first_look.before(self.param_groups)
        super().first_step()
        loss = self._call(closure, None)
        self._first_look.after(self._warnings, whole=True)
        self.second_step(grad_scaler=scaler)
        return loss

    def _check_scale(self, flight: InFlight, grad_scaler: Any, zero_grad: Any) -> None:
        """The one pass is the second."""
        flight.scale = find_scale(self, check_scaler(grad_scaler, self, zero_grad))

    def _check_settings(self) -> None:
        for name in OF_TWO_PASSES:
            _check_setting(type(self), name, getattr(self, name))
        super()._check_settings()
        for group in self.param_groups:
            if group.get("momentum") == 0:  # it was set since
                self._check_base_state(group, self._base_of(group))

    @property
    def _is_memoryless(self) -> bool:
        """Not for perturbations by micro-batch, which would all be the same."""
        return False

    @property
    def _needs_two_passes(self) -> bool:
        radii = (group["rho"] for group in self.param_groups if group.get("perturb", True))
        perturbs = any(isinstance(rho, Tensor) or rho != 0 for rho in radii)
        return perturbs and (not self._has_schedule or self.perturbs_next)


def _check_setting(cls: type, name: str, value: Any) -> None:
    allowed, why = OF_TWO_PASSES[name]
    if (context if allowed is None else FLAG)(name, value):
        raise ValueError(
            f"{name} must be {allowed} with {cls.__name__}, whose step has one pass: it {why}; got "
            f"{shown(value)}"
        )


def _name_in(base_optimizer: Any) -> str:
    """What the base calls its momentum; where it has none, its groups are refused."""
    taken = isinstance(base_optimizer, TakenOver)
    base = find_base(type(base_optimizer.optimizer) if taken else base_optimizer)
    starts = "" if base is None else base.starts_from_gradient
    return starts if starts in NAMES else "exp_avg"
