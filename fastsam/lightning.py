"""Lightning plugins for training in float16 with a loss scale; other precisions need none.

The Trainer's own plugin calls the closure itself and then the optimizer's step without it, so there
is no second pass. Fabric's plugin gives the closure to the scaler, which refuses it.
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
    """Lightning's plugin for ``"16-mixed"``, for steps of two passes.

    For automatic optimization, and for manual optimization with ``step(closure)``::

        trainer = Trainer(plugins=fastsam.lightning.MixedPrecision("16-mixed", "cuda"))

    Gradients are unscaled after each pass, before ``on_before_optimizer_step`` and clipping, which
    therefore come twice in a step. If a gradient of either pass is not finite, the weights are
    restored and the step is skipped, on the device; then the scale is lowered. Other optimizers are
    treated as by Lightning's plugin.

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
    """Fabric's plugin for ``"16-mixed"``, for steps of two passes.

    For loops that give ``step`` a closure which calls ``fabric.backward``::

        fabric = Fabric(plugins=fastsam.lightning.FabricMixedPrecision("16-mixed", "cuda"))
        model, optimizer = fabric.setup(model, optimizer)

        def closure():
            loss = loss_fn(model(x), y)
            fabric.backward(loss)
            return loss

        loss = optimizer.step(closure)

    If a gradient of either pass is not finite, the weights are restored and the step is skipped, on
    the device; then the scale is lowered. Gradients are unscaled as they are read, and ``.grad``
    stays scaled: for clipping use ``max_grad_norm`` and not ``fabric.clip_gradients``. To keep the
    scale in a checkpoint save the plugin's ``state_dict``. Other optimizers are treated as by
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
