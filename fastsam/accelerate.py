"""Accelerate's wrapper of optimizers, for steps of two passes and in every precision."""

from collections.abc import Callable
from typing import Any

from accelerate import Accelerator, DistributedType
from accelerate.optimizer import AcceleratedOptimizer

from .optimizer import SharpnessAwareOptimizer
from .step.checks import ZERO


class AcceleratedSAM(AcceleratedOptimizer):  # type: ignore[misc,unused-ignore]
    """Takes the place of Accelerate's own wrapper for optimizers.

    ``Accelerator.prepare`` does not wrap it again, and uses it for checkpoints and schedulers::

        optimizer = AcceleratedSAM(optimizer, accelerator)
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    :meth:`step` takes a closure that calls ``accelerator.backward``. The closure runs every
    micro-batch of the step, as both passes need all of them::

        batches = []
        for batch in loader:
            batches.append(batch)
            with accelerator.accumulate(model):
                def closure():
                    for batch in batches:
                        last = batch is batches[-1]
                        with nullcontext() if last else accelerator.no_sync(model):
                            loss = loss_of(model, batch)
                            accelerator.backward(loss)
                    return loss
                optimizer.step(closure)  # calls it when the last micro-batch is there
                if accelerator.sync_gradients:
                    batches = []

    Clip with the optimizer's ``max_grad_norm``. Under a loss scale (``"fp16"``) a step that
    overflows in either pass is skipped; to find that out the host waits for the device, as in
    Accelerate.

    Args:
        optimizer: One of fastsam's, except ``LETS``, which needs a second closure.
        accelerator: The ``Accelerator`` of the loop.

    Raises:
        TypeError: If ``optimizer`` is something else.
        RuntimeError: If the accelerator is set up for DeepSpeed.
    """

    def __init__(self, optimizer: SharpnessAwareOptimizer, accelerator: Accelerator):
        if not isinstance(optimizer, SharpnessAwareOptimizer):
            raise TypeError(
                f"optimizer must be one of fastsam's with two passes, such as fastsam.SAM, got "
                f"{type(optimizer).__name__}"
            )
        if accelerator.distributed_type == DistributedType.DEEPSPEED:
            raise RuntimeError(ZERO)
        super().__init__(optimizer, accelerator.device_placement, accelerator.scaler)
        self._is_accelerate_prepared = True

    def step(
        self,
        closure: Callable[[], Any] | None = None,
        second_closure: Callable[[], Any] | None = None,
    ) -> Any:
        """Take a step if gradients are synchronised, else do nothing.

        Args:
            closure: As in :meth:`fastsam.SAM.step`. May be None after ``first_step`` of
                ``.optimizer``, for the second pass, and in a step of the base alone.
            second_closure: As there.

        Returns:
            What the closure's first call returned.

        Raises:
            RuntimeError: Without a closure where a first pass is due.
        """
        if not self.gradient_state.sync_gradients:
            return None
        sam, scaler = self.optimizer, self.scaler
        skipped = 0.0 if scaler is None else _skipped(sam)
        loss = None
        if closure is None and sam.between_passes:
            sam.second_step(grad_scaler=scaler)
        elif closure is None and not sam.perturbs_next:
            sam.plain_step(grad_scaler=scaler)
        else:
            loss = sam.step(closure, second_closure, grad_scaler=scaler)
        if scaler is not None:
            scaler.update()
            self._is_overflow = _skipped(sam) > skipped
        return loss


def _skipped(sam: SharpnessAwareOptimizer) -> float:
    return float(sam.metrics.get("skipped", 0.0))
