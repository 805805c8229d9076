"""The class behind every method: constructor, steps by closure, and what a step measured."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from torch.optim.optimizer import Optimizer, ParamsT

from fastsam.kernels.layout import Scalar

from . import backends
from .bases import BASES
from .checks import (
    check_base,
    check_closure,
    check_group,
    check_keys,
    check_max_grad_norm,
    check_schedule,
    entered,
)
from .passes import TwoPassOptimizer
from .precision import check_precision, warn_of_rounding
from .replicas import replicas_of
from .rules import UNIFIED, Ascent, wide_dtype
from .stateful import uncompiled

#: Gives a context manager, for one pass.
Context = Callable[[], AbstractContextManager[Any]]


class SharpnessAwareOptimizer(TwoPassOptimizer):
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
        perturb_every: int = 1,
        start: int = 0,
        stop: int | None = None,
        master_weights: bool = False,
        rounding: str = "nearest",
        seed: int = 0,
        ascent_context: Context | None = None,
        descent_context: Context | None = None,
        backend: str = "auto",
        own: Mapping[str, Any] | None = None,
        **base_kwargs: Any,
    ):
        """``own`` holds a subclass's further group keys and their defaults."""
        check_base(base_optimizer, not_below=SharpnessAwareOptimizer)
        check_max_grad_norm(max_grad_norm)
        own = {"rho": rho, "adaptive": adaptive, "eta": eta, **(own or {})}
        self._base = BASES.get(base_optimizer)
        check_precision(master_weights, rounding, seed, self._base is not None)
        check_group(own | base_kwargs, self._base is not None, self._ascent.scales)
        self.renormalize = renormalize
        self.max_grad_norm = max_grad_norm
        self.skip_nonfinite = skip_nonfinite
        self.perturb_every, self.start, self.stop = perturb_every, start, stop
        self.master_weights = master_weights
        self.rounding, self.seed = rounding, seed
        self.ascent_context, self.descent_context = ascent_context, descent_context
        self.backend = backend
        super().__init__(params, own)
        self._check_groups()
        # The base validates its own arguments and completes the groups, which it then shares.
        # A fused base is never stepped; its mathematics runs in the update pass.
        self.base_optimizer = base_optimizer(self.param_groups, **base_kwargs)
        check_keys(self.base_optimizer, (*own, "lam", "t", "rounding_step"))
        self.defaults.update(self.base_optimizer.defaults)
        self.param_groups = self.base_optimizer.param_groups
        self.state = self.base_optimizer.state
        if self._base is not None:  # Adagrad's begins here; ours where it is needed, all at once
            self.state.clear()
        self._start()
        params_ = [p for group in self.param_groups for p in group["params"]]
        backends.resolve(backend, params_[0].device if params_ else torch.device("cpu"))
        self.param_groups[0].setdefault("t", 1)
        if rounding == "stochastic":
            self.param_groups[0].setdefault("rounding_step", 0.0)
        elif not master_weights:
            warn_of_rounding(params_)

    # --- steps by closure ---

    @uncompiled
    @torch.no_grad()
    def step(
        self,
        closure: Callable[[], Any] | None = None,
        *,
        grad_scaler: GradScaler | None = None,
    ) -> Any:
        """Take one step: sharpness-aware, or the base's where ``perturb_every`` says so.

        Args:
            closure: Computes the loss, calls ``backward`` and returns the loss (the contract of
                ``torch.optim.LBFGS``). It may run several micro-batches, if it runs the same in
                both calls. It is called twice; once in a step of the base, and where every ``rho``
                is 0, unless the first pass has state to keep. Gradients are zeroed before each
                call. One that leaves no gradient is warned of, once.
            grad_scaler: A ``torch.amp.GradScaler`` with which the closure scales the loss that it
                calls ``backward`` on. A gradient that is not finite in either pass restores the
                weights and skips the step; ``grad_scaler.update()`` is to be called after it, and
                ``grad_scaler.step`` and ``unscale_`` are not.

        Returns:
            What the first call returned: the loss at ``w``.

        Raises:
            RuntimeError: Without a closure; between ``first_step`` and ``second_step``; inside a
                closure; for gradients that are sparse or complex. An exception in the closure
                leaves weights and state as they were before the step, and propagates.
            TypeError: If an argument is something else.
        """
        if closure is None and self._is_bare:
            self._create_state()
            return None
        check_closure(type(self).__name__, closure)
        self._expect("first_step", "step")
        self._check_groups()
        self._inside_step = True
        try:
            perturbs = self._needs_two_passes
            # a gradient that the base takes as it is has to be synchronised, for one
            loss = self._call(closure, self.ascent_context if perturbs else None)
            self._warn_of_no_gradients()
            if not perturbs:
                self.plain_step(grad_scaler=grad_scaler)
                return loss
            self.first_step(zero_grad=True, grad_scaler=grad_scaler)
            self._call(closure, self.descent_context)
            self.second_step(grad_scaler=grad_scaler)
        except BaseException:
            self.restore()
            raise
        finally:
            self._inside_step = False
        return loss

    @uncompiled
    @torch.no_grad()
    def step_micro_batches(self, closures: Iterable[Callable[[], Any]]) -> list[Any]:
        r"""Take one step in which every micro-batch has a perturbation of its own.

        .. math:: u = \frac1m \sum_{i=1}^m \nabla L_i(w + e_i)

        with :math:`e_i` along :math:`\nabla L_i(w)`: m-sharpness, with the memory of one more
        gradient. In :meth:`step` a closure that runs all micro-batches perturbs along their sum.
        Where the step is the base's (``perturb_every``, ``start``, ``stop``) :math:`e_i = 0`.

        Args:
            closures: One for each micro-batch, at least one. Each computes the loss of its own,
                not divided by their number, calls ``backward`` and returns the loss; each is
                called twice, or once in a step of the base. ``.grad`` is :math:`u` afterwards.

        Returns:
            What the first calls returned.

        Raises:
            RuntimeError: For methods whose steps are more than a perturbation and the base's
                update: with ``renormalize``, SAMAR, and those with state in the ascent. An
                exception in a closure leaves weights and state as they were before the step.
            TypeError, ValueError: If ``closures`` are not callable, or there is none.
        """
        name = type(self).__name__
        if self.renormalize or self._mix is not None or self._ascent is not UNIFIED:
            raise RuntimeError(f"{name} does not serve perturbations by micro-batch")
        if callable(closures):
            raise TypeError("closures must be a sequence of functions, got a function")
        closures = list(closures)
        if not closures:
            raise ValueError("closures must be at least one, got none")
        for closure in closures:
            check_closure(name, closure)
        self._expect("first_step", "step_micro_batches")
        self._check_groups()
        self._run_hooks("pre")
        perturbs = self._needs_two_passes
        self._inside_step = True
        losses: list[Any] = []
        total: dict[Tensor, Tensor] = {}
        dtypes: dict[Tensor, torch.dtype] = {}
        try:
            for closure in closures:
                losses.append(self._call(closure, self.ascent_context if perturbs else None))
                if perturbs:
                    self.first_step(zero_grad=True)
                    self._call(closure, self.descent_context)
                    self._check_reduced(self._collect("descent"))
                for param in chain.from_iterable(group["params"] for group in self.param_groups):
                    if param.grad is not None:
                        share = param.grad.to(wide_dtype(param.grad)) / len(closures)
                        total[param] = total[param] + share if param in total else share
                        dtypes[param] = param.grad.dtype
                self.restore()
            self.zero_grad()
            for param, grad in total.items():
                param.grad = grad.to(dtypes[param])
            self.plain_step()
            self._perturbs = perturbs
        except BaseException:
            self.restore()
            raise
        finally:
            self._inside_step = False
        self._run_hooks("post")
        return losses

    @property
    def perturbs_next(self) -> bool:
        """Whether ``perturb_every``, ``start`` and ``stop`` make the next step sharpness-aware."""
        if not self._has_schedule:
            return True
        since = self.param_groups[0]["t"] - 1 - self.start
        ended = self.stop is not None and since >= self.stop - self.start
        return since >= 0 and not ended and bool(since % self.perturb_every == 0)

    @property
    def _has_schedule(self) -> bool:
        return (self.perturb_every, self.start, self.stop) != (1, 0, None)

    @property
    def _is_static(self) -> bool:
        return not self._has_schedule

    @property
    def _needs_two_passes(self) -> bool:
        zero_radius = all(_is_zero(group["rho"]) for group in self.param_groups)
        return self.perturbs_next and not (self._may_skip_ascent and zero_radius)

    @property
    def _may_skip_ascent(self) -> bool:
        """Whether a step with radius 0 needs no first pass."""
        return self._ascent.name == "unified"

    def _call(self, closure: Any, context: Context | None) -> Any:
        """What the closure returns, called as one pass."""
        self.zero_grad()
        manager = nullcontext() if context is None else entered(context)
        if context is self.ascent_context:
            self._replicas = replicas_of(manager)
        with self._in_closure(), manager, torch.enable_grad():
            return closure()

    def _check_groups(self) -> None:
        check_schedule(self.perturb_every, self.start, self.stop)
        super()._check_groups()

    @contextmanager
    def _in_closure(self) -> Iterator[None]:
        try:
            self._inside_closure = True
            yield
        finally:
            self._inside_closure = False

    def _warn_of_no_gradients(self) -> None:
        params = chain.from_iterable(group["params"] for group in self.param_groups)
        if all(param.grad is None for param in params):
            self._warn_once(
                "no gradients",
                "the closure left no gradient in any parameter: it has to call backward() on the "
                "loss of the model whose parameters are optimized",
            )

    # --- what a step measured ---

    @property
    def metrics(self) -> Mapping[str, Tensor]:
        """What the last step measured, as 0-dim tensors on the parameters' device.

        ``grad_norm`` is the first gradient's norm (of ``T g`` in adaptive groups), where the step
        needs it, and ``rho`` the first group's radius. ``perturbed_grad_norm``, the second
        gradient's norm, is there where the step needs it; with ``renormalize`` so is
        ``renormalization`` (gamma, and both norms are then of ``T g``), with ``skip_nonfinite``
        so is ``skipped``, the number of steps skipped so far (under a loss scale, too, without
        which all norms are given). ``perturbed`` is 1, or 0 after a step of the base alone, which
        measures nothing of a first pass. Reading a value synchronises with the device; making the
        mapping does not. Empty before the first step.
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
        if step.skip_nonfinite:
            names["skipped"] = Scalar.SKIPPED
        values = {name: self._scalars[slot].clone() for name, slot in names.items()}
        rho, like = self.param_groups[0]["rho"], self._scalars[0]
        if isinstance(rho, Tensor) and rho.device == like.device:
            values["rho"] = rho.to(like, copy=True)
        else:
            values["rho"] = torch.full_like(like, float(rho))
        values["perturbed"] = torch.full_like(like, float(self._perturbs))
        return values


def _is_zero(rho: float | Tensor) -> bool:
    return not isinstance(rho, Tensor) and rho == 0
