"""Lightning: nothing is needed from here but for training in float16 with a loss scale.

The Trainer's own plugin for it calls the closure before the optimizer's step and the step without
one, so that there is no second pass. Fabric's gives the closure to the scaler, which refuses it.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from .optimizer import SharpnessAwareOptimizer

try:
    from lightning.fabric import plugins as fabric
    from lightning.pytorch import plugins
except ImportError:  # the same under their older names
    from lightning_fabric import plugins as fabric
    from pytorch_lightning import plugins


class MixedPrecision(plugins.MixedPrecision):  # type: ignore[misc,unused-ignore]
    """Lightning's plugin for ``"16-mixed"``, whose scaler it gives to a step of two passes.

    In automatic optimization, and in manual optimization where ``step`` is given a closure::

        trainer = Trainer(plugins=fastsam.lightning.MixedPrecision("16-mixed", "cuda"))

    Gradients are unscaled after each pass, before ``on_before_optimizer_step`` and clipping, which
    therefore come twice in a step. One that is not finite, in either pass, restores the weights and
    skips the step, on the device; then the scale is lowered. Optimizers that are not fastsam's are
    stepped as by Lightning's plugin.

    Args:
        precision: ``"16-mixed"`` or ``"bf16-mixed"``, which needs no scaler and no plugin.
        device: The device type for :class:`torch.autocast` and the scaler: ``"cuda"`` or ``"cpu"``.
        scaler: A :class:`torch.amp.GradScaler` to use. Default: a new one.
    """

    def optimizer_step(
        self, optimizer: Any, model: Any, closure: Callable[[], Any], **kwargs: Any
    ) -> Any:
        """Take a step, called by the trainer."""
        if self.scaler is None or not isinstance(optimizer, SharpnessAwareOptimizer):
            return super().optimizer_step(optimizer, model=model, closure=closure, **kwargs)
        unscaled = partial(self._call_unscaled, model, optimizer, closure)
        result = optimizer.step(unscaled, grad_scaler=self.scaler, **kwargs)
        self.scaler.update()
        return result

    def _call_unscaled(self, model: Any, optimizer: Any, closure: Callable[[], Any]) -> Any:
        """One pass, and what Lightning does before a step."""
        result = closure()
        if result is not None or not model.automatic_optimization:  # else there was no backward
            self.scaler.unscale_(optimizer)
        self._after_closure(model, optimizer)
        return result


class FabricMixedPrecision(fabric.MixedPrecision):  # type: ignore[misc,unused-ignore]
    """Fabric's plugin for ``"16-mixed"``, whose scaler it gives to a step of two passes.

    For loops that give a closure to ``step``, which calls ``fabric.backward``::

        fabric = Fabric(plugins=fastsam.lightning.FabricMixedPrecision("16-mixed", "cuda"))
        model, optimizer = fabric.setup(model, optimizer)

        def closure():
            loss = loss_fn(model(x), y)
            fabric.backward(loss)
            return loss

        loss = optimizer.step(closure)

    A gradient that is not finite, in either pass, restores the weights and skips the step, on the
    device; then the scale is lowered. Gradients are unscaled as they are read, and ``.grad`` stays
    scaled; for clipping use ``max_grad_norm`` and not ``fabric.clip_gradients``. The scale is in a
    checkpoint with the plugin's ``state_dict``. Optimizers that are not fastsam's are stepped as by
    Fabric's plugin.

    Args:
        precision: ``"16-mixed"`` or ``"bf16-mixed"``, which needs no scaler and no plugin.
        device: The device type for :class:`torch.autocast` and the scaler: ``"cuda"`` or ``"cpu"``.
        scaler: A :class:`torch.amp.GradScaler` to use. Default: a new one.
    """

    def optimizer_step(self, optimizer: Any, **kwargs: Any) -> Any:
        """Take a step, called by Fabric's wrapper of the optimizer."""
        if self.scaler is None or not isinstance(optimizer, SharpnessAwareOptimizer):
            return super().optimizer_step(optimizer, **kwargs)
        result = optimizer.step(**kwargs, grad_scaler=self.scaler)
        self.scaler.update()
        return result
