"""Loss scaling: what ``torch.amp.GradScaler`` is to an optimizer that takes two gradients a step.

The scaler's own ``unscale_`` and ``step`` count one gradient between two calls of ``update``. So
neither is used: the inverse scale is one of the device scalars by which every gradient is
multiplied as it is read, and what the step found is put down where ``update`` looks for it.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler, OptState
from torch.optim.optimizer import Optimizer

from fastsam.arithmetic import wide_dtype
from fastsam.kernels.layout import Scalar

from .arguments import is_bool, shown
from .batch import Batch


def check_scaler(
    grad_scaler: Any, optimizer: Optimizer, zero_grad: Any = False
) -> GradScaler | None:
    """The scaler if it is one that is enabled, else None.

    Raises:
        TypeError: If it is something else, or was given in the place of ``zero_grad``; if
            ``zero_grad`` is no bool.
        RuntimeError: If its ``update`` has not been called since the optimizer's last step.
    """
    if isinstance(zero_grad, GradScaler):
        raise TypeError("grad_scaler must be given by its name, as in grad_scaler=scaler")
    if zero_grad is not False and zero_grad is not True and not is_bool(zero_grad):
        raise TypeError(f"zero_grad must be True or False, got {shown(zero_grad)}")
    if grad_scaler is None:
        return None
    if not isinstance(grad_scaler, GradScaler):
        raise TypeError(f"grad_scaler must be a torch.amp.GradScaler or None, got {grad_scaler!r}")
    if not grad_scaler.is_enabled():
        return None
    if grad_scaler._per_optimizer_states[id(optimizer)]["stage"] is OptState.STEPPED:
        raise RuntimeError("grad_scaler.update() has to be called after every step")
    return grad_scaler


def check_same_scaler(
    scale: "LossScale | None", grad_scaler: Any, optimizer: Optimizer, zero_grad: Any
) -> None:
    """A later pass has the scaler of the step's first, or none is named.

    Raises:
        RuntimeError: If it has another.
    """
    given = None if scale is None else scale.scaler
    if check_scaler(grad_scaler, optimizer, zero_grad) is not given and grad_scaler:
        raise RuntimeError("grad_scaler has to be given to first_step as well")


class LossScale:
    """The loss scale of one step, given with a scaler or by torch's attributes of fused optimizers.

    Args:
        optimizer: Whose step it is.
        grad_scaler: That the user gave, or None.
    """

    def __init__(self, optimizer: Optimizer, grad_scaler: GradScaler | None) -> None:
        self._optimizer = optimizer
        self.scaler = grad_scaler
        self.found: list[Tensor] = []  # not 0 where micro-batches overflowed, whose mean comes

    def write(self, slot: Scalar, scalars: Tensor, opens_step: bool) -> None:
        """Put the inverse scale of one pass's gradients, and what was found, among the scalars.

        What others found in the first pass counts in the second, too.

        Raises:
            RuntimeError: If the scaler has not scaled a loss yet.
        """
        is_unscaled, found = self._look()
        scale = None if is_unscaled else self._scale()
        if scale is None:
            scalars[slot].fill_(1)
        else:
            scale = torch.as_tensor(scale, dtype=scalars.dtype)
            scalars[slot] = scale.to(scalars.device, non_blocking=True).reciprocal()
        if opens_step:
            scalars[Scalar.FOUND_INF].zero_()
        for x in (*found, *self.found):
            scalars[Scalar.FOUND_INF] += _like(x, scalars)

    def _scale(self) -> Any:
        if self.scaler is None:
            return getattr(self._optimizer, "grad_scale", None)
        scale = self.scaler._get_scale_async()
        if scale is None:
            raise RuntimeError(
                "grad_scaler has scaled no loss yet: call grad_scaler.scale(loss).backward()"
            )
        return scale

    def _look(self) -> tuple[bool, list[Any]]:
        """Whether the present gradients have been unscaled by the user, and what others found.

        The next pass's are scaled again.
        """
        found = [getattr(self._optimizer, "found_inf", None)]
        is_unscaled = False
        if self.scaler is not None:
            state = self.scaler._per_optimizer_states[id(self._optimizer)]
            if state["stage"] is OptState.UNSCALED:
                state["stage"], is_unscaled = OptState.READY, True
                found += state["found_inf_per_device"].values()
        return is_unscaled, [x for x in found if x is not None]

    def keep_first(self, scalars: Tensor) -> None:
        """Remember whether a micro-batch's first gradients overflowed."""
        self.found.append(scalars[Scalar.FOUND_INF] + ~scalars[Scalar.GRAD_NORM].isfinite())

    def keep_last(self) -> Any:
        """Remember what others found in the gradients that are to be part of the mean.

        Returns:
            What these are to be multiplied by to carry the scale; None if they do.
        """
        is_unscaled, found = self._look()
        self.found += [torch.as_tensor(x).clone() for x in found]  # which other code may zero
        return self._scale() if is_unscaled else None

    def record(self, scalars: Tensor, found_inf: Tensor) -> None:
        """Tell the scaler, whose ``update`` comes next, whether the step was accepted.

        ``found_inf`` is memory for a float32.
        """
        if self.scaler is None:
            return
        state = self.scaler._per_optimizer_states[id(self._optimizer)]
        torch.eq(scalars[Scalar.ACCEPTED], 0, out=found_inf)
        state["found_inf_per_device"] = {scalars.device: found_inf}
        state["stage"] = OptState.STEPPED


def _like(x: Any, scalars: Tensor) -> Tensor:
    """A number as one of the scalars; a ShardedGradScaler's has one dimension."""
    number: Tensor = torch.as_tensor(x, dtype=scalars.dtype).reshape(())
    return number.to(scalars.device, non_blocking=True)


def find_scale(optimizer: Optimizer, grad_scaler: GradScaler | None) -> LossScale | None:
    """The loss scale of a step; None if nothing is scaled, and no overflow looked for."""
    scale, found = getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None)
    if grad_scaler is None and scale is None and found is None:
        return None
    return LossScale(optimizer, grad_scaler)


def unscaled(batch: Batch, inverse: Tensor) -> Batch:
    """The batch with gradients that carry no scale, in the dtype of the arithmetic."""
    grads = []
    for param, grad in zip(batch.params, batch.grads, strict=True):
        dtype = torch.promote_types(wide_dtype(param), wide_dtype(grad))
        grads.append(grad.to(dtype) * inverse.to(grad.device, dtype, non_blocking=True))
    return replace(batch, grads=grads, layout=None)
