"""Keeps one pass of a step from updating networks that are averages of the trained one."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.modules.lazy import LazyModuleMixin

from .step.interrupts import uninterrupted
from .step.snapshot import Place, Snapshot


class frozen_updates:  # noqa: N801 - used like a function
    r"""Restore modules and tensors at the end of the block.

    Momentum encoders (MoCo, BYOL), averages of the weights (``AveragedModel``), queues and counters
    that a model updates inside its forward pass are updated twice in a step of two passes, the
    second time with perturbed weights:

    .. math:: \theta \leftarrow m\, \theta + (1 - m)\, w, \qquad
              \theta \leftarrow m\, \theta + (1 - m)\, (w + e)

    Around the second pass this undoes the second update::

        frozen = fastsam.frozen_updates(model.momentum_encoder, model.queue)
        optimizer = fastsam.SAM(model.parameters(), torch.optim.SGD, lr=0.1, descent_context=frozen)

    or, with explicit passes, ``with frozen:`` around the second forward and backward. The object is
    a context manager, and calling it returns itself, so a function may also return it
    (``descent_context=lambda: fastsam.frozen_updates(model.momentum_encoder)``).

    At the end of the block, also after an exception, every parameter and buffer of the modules, and
    every tensor, has the same bits as at the start. They are written in place, so this works in
    wrapped, compiled and captured models as well. Parameters and buffers of modules that are
    replaced inside are put back. Inside the block the forward pass updates and uses them as usual:
    the loss of the second pass uses a :math:`\theta` that was updated twice. The host does not wait
    for the device.

    Do not name the model itself: the optimizer restores its weights. For its running statistics use
    :class:`frozen_batch_norm`. For both write a function with two contexts::

        @contextlib.contextmanager
        def second_pass():
            with fastsam.frozen_batch_norm(model.encoder), fastsam.frozen_updates(model.target):
                yield

        optimizer = fastsam.SAM(..., descent_context=second_pass)

    Cost: a copy in each direction, and memory for one.

    Args:
        *followers: Modules, of which all parameters and buffers are restored, and tensors.

    Raises:
        TypeError: If one of them is neither, or there is none.

    Example:
        >>> average = torch.optim.swa_utils.AveragedModel(model)
        >>> def closure():
        ...     average.update_parameters(model)  # as models with a momentum encoder do
        ...     loss = loss_fn(model(inputs), labels)
        ...     loss.backward()
        ...     return loss
        >>> frozen = fastsam.frozen_updates(average)
        >>> optimizer = fastsam.SAM(
        ...     model.parameters(), torch.optim.SGD, lr=0.1, descent_context=frozen
        ... )
        >>> loss = optimizer.step(closure)
        >>> average.n_averaged  # in two passes
        tensor(1)
    """

    def __init__(self, *followers: Module | Tensor):
        for one in followers:
            if not isinstance(one, (Module, Tensor)):
                raise TypeError(f"followers must be modules or tensors, got {type(one).__name__}")
        if not followers:
            raise TypeError("followers must be at least one module or tensor, got none")
        self.followers = followers
        self._open: list[Snapshot] = []  # by the blocks that are open, the innermost last

    def __call__(self) -> "frozen_updates":
        return self

    def __enter__(self) -> "frozen_updates":
        tensors = [x for x in self.followers if isinstance(x, Tensor)]
        self._open.append(Snapshot(self._places(), tensors))
        return self

    def __exit__(self, *exception: object) -> None:
        with uninterrupted(insists=True):
            self._open.pop().put_back()

    def _places(self) -> Iterator[Place]:
        modules = [x for x in self.followers if isinstance(x, Module)]
        for module in dict.fromkeys(part for one in modules for part in one.modules()):
            if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():
                continue
            for held in (module._parameters, module._buffers):
                for name, x in held.items():
                    if x is not None:
                        yield module, held, name

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self.followers  # open blocks stay behind

    def __repr__(self) -> str:
        names = [
            f"tensor of shape {tuple(x.shape)}" if isinstance(x, torch.Tensor) else type(x).__name__
            for x in self.followers
        ]
        return f"{type(self).__name__}({', '.join(names)})"
