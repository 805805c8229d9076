"""Functional-SAM: perturbs the network, and keeps the derivative of the loss at the outputs."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from torch.nn import Module
from torch.optim.optimizer import Optimizer, ParamsT
from torch.utils.hooks import RemovableHandle

from fastsam.arithmetic import EPS, gives_direction, where
from fastsam.derivatives import Derivatives, MarksOutputs, Outputs, go_back
from fastsam.explicit import uncompiled
from fastsam.optimizer import SharpnessAwareOptimizer
from fastsam.step.arguments import FLAG, Integer, shown
from fastsam.step.recording import Recording
from fastsam.step.rule import Ascent, Columns, Group
from fastsam.step.settings import setting
from fastsam.unified import UNIFIED

Given = TypeVar("Given", bound=Outputs)
ROOT_EPS = 1e-8  # added to the root of the second moment


def _columns(group: Group, lam: float) -> Columns:
    return {"PRECONDITIONS": lam}


def _direction(g: Tensor, state: dict[str, Tensor], h: Columns) -> Tensor:
    v = state["exp_avg_sq"]
    if h["PRECONDITIONS"] == 0:
        return g
    return torch.where(v.isnan(), g, g / (v.sqrt() + ROOT_EPS))


def _radius(rho: Any, norm: Any, total: Any, h: Columns) -> Any:
    return where(gives_direction(norm), rho / (norm + EPS))


def _by_second_moment(norm: str) -> Ascent:
    return Ascent(
        name="second_moment",
        kernel="fastsam.kernels.ascent.second_moment",
        direction=_direction,
        radius=_radius,
        columns=_columns,
        base_state="exp_avg_sq",
        norm=norm,
    )


#: Along ``P g``, whose norm is that of ``P g``, or of ``g``.
SECOND_MOMENT = _by_second_moment("direction")
SECOND_MOMENT_UNNORMALIZED = _by_second_moment("gradient")


def _one_ascent(optimizer: Any, ascent_steps: int) -> None:
    if ascent_steps != 1:
        raise ValueError(
            "ascent_steps must be 1 with FunctionalSAM, which keeps the loss's derivative of one "
            f"first pass; got {ascent_steps}"
        )


class FunctionalSAM(SharpnessAwareOptimizer):
    r"""Functional SAM: perturbs the network, and keeps the derivative of the loss at the outputs.

    With the model's outputs (logits) :math:`F(w)`, their Jacobian :math:`J_F` and the loss
    :math:`L(w) = \ell(F(w))`:

    .. math:: e = \rho\, \frac{g}{\|g\| + 10^{-12}}, \qquad
              u = J_F(w + e)^\top r, \qquad r = \frac{\partial \ell}{\partial F}\Big|_{F(w)}

    :class:`SAM` takes :math:`r` at :math:`w + e` as well. ``preconditioned=True`` perturbs along

    .. math:: e = \rho\, \frac{P g}{\|P g\| + 10^{-12}}, \qquad
              P = \frac{1}{\sqrt{v} + 10^{-8}}

    with :math:`v` the base's second moment (``exp_avg_sq`` of Adam and AdamW) after the last step,
    without bias correction. :math:`P = 1` in the first ``warmup`` steps, and for parameters without
    a second moment. In ``adaptive`` groups :math:`P g` becomes :math:`T^2 P g` and its norm
    :math:`\|T P g\|`, as in :class:`SAM`.

    :math:`r` is kept from the first pass and used in the backward of the second pass. For that the
    loop marks the outputs::

        def closure():
            loss = loss_fn(optimizer.outputs(model(x)), y)
            loss.backward()
            return loss

        loss = optimizer.step(closure)

    If a framework hides the outputs, name the module that computes them once:
    ``optimizer.outputs_of(model.lm_head)``. :func:`functional_closures` makes two closures from a
    model and a loss instead; the second computes no loss. A missing mark raises an error, and so
    does a second pass over other batches.

    - Several micro-batches: each has its own :math:`r`, in the order of their forward passes.
    - A loss scale is contained in :math:`r`, once.
    - Labels that the loss masks have :math:`r = 0`. A loss that does not depend on the marked
      outputs (weight decay as a loss, router losses) is treated as by :class:`SAM`.
    - Dropout has to draw the same masks in both passes, so ``repeat_random`` is True by default;
      with explicit passes put ``repeated_random()`` around each.
    - BatchNorm: ``descent_context=fastsam.frozen_batch_norm(model)``, as for every method.

    Cost: that of :class:`SAM`, and a tensor of the size of the outputs between the passes.
    Preconditioned with AdamW 56 bytes per element in float32 (reduce 8, perturb 20, update 28),
    three launches; :math:`v` is read in place and not copied.

    Args:
        params, base_optimizer: As in :class:`SAM`; with ``preconditioned`` the base is Adam, AdamW
            or another that keeps ``exp_avg_sq``.
        rho: Radius, at least 0. Default 0.05.
        preconditioned: Whether the perturbation is along :math:`P g`. Default False.
        warmup: First steps with :math:`P = 1`, at least 0. Default 1000, from independent code; the
            value of the paper's runs is not known to us.
        normalize: For the preconditioned form: False divides by :math:`\|g\|` and not by
            :math:`\|P g\|`, as independent code does; then weights may move by up to
            :math:`10^8 \rho`. Default True.
        by_hand: Whether the loop applies :math:`r` itself: then gradients of the second pass are
            used as they are, and nothing has to be marked. Default False.
        repeat_random: As in :class:`SAM`. Default True.
        **kwargs: The other arguments of :class:`SAM`, and the base optimizer's. Not
            ``ascent_steps``.

    Raises:
        TypeError, ValueError, ImportError, RuntimeError: As :class:`SAM`; TypeError also for
            ``preconditioned`` with a base that keeps no ``exp_avg_sq``. :class:`LETS` refuses it,
            as there is no gradient of the loss at :math:`w + e`.

    Example:
        >>> optimizer = fastsam.FunctionalSAM(model.parameters(), torch.optim.AdamW, lr=1e-3)
        >>> def closure():
        ...     loss = loss_fn(optimizer.outputs(model(inputs)), labels)
        ...     loss.backward()
        ...     return loss
        >>> loss = optimizer.step(closure)

    Reference: Singh, Mobahi, Agarwala and Dauphin, "Avoiding spurious sharpness minimization
    broadens applicability of SAM", ICML 2025, arXiv 2502.02407. The definition is the paper's; the
    preconditioned form and its constants are from independent code.
    """

    _TRANSIENT: tuple[str, ...] = (
        *SharpnessAwareOptimizer._TRANSIENT,
        "_derivatives",
        "_has_outputs",
        "_has_two",
    )

    _closures_agree_at_w = True

    warmup: int = setting(Integer(0))
    by_hand: bool = setting(FLAG)
    ascent_steps: int = setting(Integer(1), then=_one_ascent)

    def __init__(
        self,
        params: ParamsT,
        base_optimizer: type[Optimizer],
        rho: float | Tensor = 0.05,
        preconditioned: bool = False,
        warmup: int = 1000,
        normalize: bool = True,
        by_hand: bool = False,
        repeat_random: bool = True,
        **kwargs: Any,
    ):
        preconditioned = FLAG("preconditioned", preconditioned)
        normalize = FLAG("normalize", normalize)
        self.warmup, self.by_hand = warmup, by_hand
        along = SECOND_MOMENT if normalize else SECOND_MOMENT_UNNORMALIZED
        self.ascent = along if preconditioned else UNIFIED
        super().__init__(params, base_optimizer, rho=rho, repeat_random=repeat_random, **kwargs)

    def _start(self) -> None:
        super()._start()
        self._derivatives = Derivatives(type(self).__name__)
        self._has_outputs = False
        self._has_two = False  # whether the present step was given two closures

    @property
    def preconditioned(self) -> bool:
        """Whether the perturbation is along the preconditioned gradient."""
        return bool(self.ascent.base_state)

    # --- the outputs ---

    @uncompiled
    def outputs(self, outputs: Given) -> Given:
        """Mark the model's outputs, where the derivative of the loss is kept or used again.

        Call it in both passes, once for each forward pass, before ``backward``.

        Args:
            outputs: The tensor that the loss is computed from; or several of them in a list or
                tuple, none of which depends on another. Tensors that need no gradient are ignored.

        Returns:
            The same.

        Raises:
            TypeError: If they are no tensors.
            RuntimeError: In the second pass, if their shapes and dtypes differ from those of the
                first pass, in their order.
        """
        # nothing is kept for a step of the base alone
        if torch.is_grad_enabled() and not (self._inside_step and not self._needs_two_passes):
            self._derivatives.mark(outputs, second=self._flight is not None)
        return outputs

    def outputs_of(self, module: Module) -> RemovableHandle:
        """Mark the outputs of a module from now on, whenever gradients are recorded.

        For loops that hide the outputs: ``optimizer.outputs_of(model.lm_head)``. The module has to
        return a tensor, or a list or tuple of tensors, as for :meth:`outputs`. Copies of the model
        mark nothing.

        Args:
            module: The module whose outputs the loss is computed from: the model itself, or its
                last layer.

        Returns:
            A handle; its ``remove()`` ends the marking.

        Raises:
            TypeError: If it is no module.
        """
        if not isinstance(module, Module):
            raise TypeError(f"module must be a torch.nn.Module, got {shown(module)}")
        self._has_outputs = True
        return module.register_forward_hook(MarksOutputs(self.outputs))

    @property
    def has_outputs(self) -> bool:
        """Whether :meth:`outputs_of` has named a module."""
        return self._has_outputs

    def backward(self, outputs: Outputs) -> None:
        r"""The second pass's backward, without a loss: :math:`J_F(w + e)^\top r`.

        Between :meth:`first_step` and :meth:`second_step`, in the place of
        ``loss_fn(optimizer.outputs(model(x)), y).backward()``.

        Args:
            outputs: The model's, as in :meth:`outputs`.

        Raises:
            TypeError, RuntimeError: As :meth:`outputs`; RuntimeError also in the first pass.
        """
        if self._flight is None:
            raise RuntimeError(
                "backward repeats the derivative that the first pass has kept: it comes between "
                "first_step and second_step"
            )
        with torch.enable_grad():
            go_back(self.outputs(outputs))

    # --- the passes ---

    def step(
        self,
        closure: Callable[[], Any] | None = None,
        second_closure: Callable[[], Any] | None = None,
        *,
        grad_scaler: GradScaler | None = None,
    ) -> Any:
        """Take one step, as every method does.

        Args:
            closure: Computes the loss of the marked outputs, calls ``backward`` and returns the
                loss; called in both passes.
            second_closure: Called in its place for the second pass; it computes :math:`u` itself,
                and nothing has to be marked. :func:`functional_closures` makes both.
            grad_scaler: As in ``step`` of :class:`SAM`.

        Returns:
            What the first call returned.

        Raises:
            RuntimeError: If no outputs were marked, or different ones in the second pass. Weights
                and state are as they were before the step.
        """
        self._has_two = second_closure is not None
        try:
            return super().step(closure, second_closure, grad_scaler=grad_scaler)
        finally:
            self._has_two = False

    def first_step(self, zero_grad: bool = False, *, grad_scaler: GradScaler | None = None) -> None:
        """Perturb the weights along the present gradients: ``w <- w + e``.

        As in every method. The derivative of the loss at the marked outputs is kept.

        Raises:
            RuntimeError: If none were, without ``by_hand``. Nothing has changed then.
        """
        if self._flight is None:
            self._derivatives.close(needed=not self._is_by_hand)
        super().first_step(zero_grad, grad_scaler=grad_scaler)

    def second_step(
        self, zero_grad: bool = False, *, grad_scaler: GradScaler | None = None
    ) -> None:
        """Restore the weights and update them with the gradients taken at ``w + e``.

        As every method does.

        Raises:
            RuntimeError: If the second pass has not gone back through the outputs of the first. The
                weights have been restored then, and the step is over without an update.
        """
        try:
            self._check_second()
        except BaseException:
            self.restore()
            raise
        super().second_step(zero_grad, grad_scaler=grad_scaler)

    def restore(self) -> None:
        """Undo ``first_step``: for a loop whose second pass failed. Does nothing otherwise."""
        self._derivatives.forget()
        super().restore()

    @contextmanager
    def recording(self, hessian: str | None) -> Iterator[Recording | None]:
        """For LETS, which is refused."""
        if hessian is not None:
            raise RuntimeError(
                f"LETS does not support {type(self).__name__}, whose second gradient is not "
                "that of the loss: the Hessian does not follow from it"
            )
        yield None

    # --- parts of them ---

    @property
    def _is_by_hand(self) -> bool:
        return self.by_hand or self._has_two

    def _check_second(self) -> None:
        if self._flight is not None and not self._is_by_hand:
            self._derivatives.check_all_used()

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        result = super()._call(*args, **kwargs)
        self._check_second()
        return result

    def _finish(self, *args: Any) -> None:
        super()._finish(*args)
        self._derivatives.forget()

    def _zero_gradients(self) -> None:
        super()._zero_gradients()
        self._derivatives.begin_again()

    def _next_lam(self) -> float:
        """Whether the gradient is preconditioned in this step, or in the plain form SAM's lam."""
        if not self.preconditioned:
            return super()._next_lam()
        # always the same two objects, by which tables are compared
        return 1.0 if self.kept["t"] > self.warmup else 0.0

    @property
    def _is_static(self) -> bool:
        warm = self.preconditioned and self.kept["t"] <= self.warmup
        return super()._is_static and not warm
