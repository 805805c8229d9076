"""Keeps one pass of a step from updating the running statistics of batch normalisation."""

from collections.abc import Iterable
from typing import Any

from torch.nn import Module
from torch.nn.modules.lazy import LazyModuleMixin

from .step.interrupts import uninterrupted
from .step.snapshot import Place, Snapshot

#: The buffers of torch's own classes, and of most that were written after them.
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


class frozen_batch_norm:  # noqa: N801 - used like a function
    r"""Restore a model's running statistics at the end of the block.

    A step of sharpness-aware training has two forward passes, and batch normalisation in training
    mode counts both:

    .. math:: m \leftarrow (1 - \beta)\, m + \beta\, \mu(w), \qquad
              m \leftarrow (1 - \beta)\, m + \beta\, \mu(w + e)

    The second update uses perturbed weights, which the model never has when it is evaluated. Around
    the second pass this undoes it::

        frozen = fastsam.frozen_batch_norm(model)
        optimizer = fastsam.SAM(model.parameters(), torch.optim.SGD, lr=0.1, descent_context=frozen)

    or, with explicit passes, ``with frozen:`` around the second forward and backward. The object is
    a context manager, and calling it returns itself, so a function may also return it
    (``descent_context=lambda: fastsam.frozen_batch_norm(model)``). As ``ascent_context`` it undoes
    the update of the first pass instead.

    Inside the block layers in training mode still normalise with the batch's own statistics. At its
    end, also after an exception, ``running_mean``, ``running_var`` and ``num_batches_tracked`` of
    every module have the same bits as at its start, in the same tensors. The values are copied and
    written back in place, and the layers are not changed. So this works for ``BatchNorm``,
    ``SyncBatchNorm``, ``InstanceNorm`` and other classes, with any ``momentum`` and in any mode, in
    compiled, wrapped (``DistributedDataParallel``) and captured (CUDA graphs) models, and causes no
    compilation. The host does not wait for the device.

    Blocks of one object or of several nest. Only modules that the model has at the start of the
    block are restored. A buffer that is replaced inside is put back. One that is moved to another
    device or dtype stays there, with its old value. One whose shape changes is not restored, nor
    are lazy modules that are initialised inside.

    Put the backward pass inside, too. With torch's own layers it may also come after the block.
    With a class that multiplies by a buffer which it has just written, torch would raise its error
    about a variable "modified by an inplace operation", as the gradient would be wrong.

    Cost: a copy of the statistics in each direction (0.2 MB in ResNet-50), and memory for one.

    Args:
        model: The model; it may be wrapped or compiled.
        buffers: Names of further buffers to restore: those of your own classes, or ``"_u"`` and
            ``"_v"`` of ``parametrizations.spectral_norm``, which changes them in every forward.
            Default: none.

    Raises:
        TypeError: If ``model`` is not a :class:`torch.nn.Module`, or ``buffers`` are not names.
        ValueError: If no module of the model has a buffer of a name in ``buffers``.

    Example:
        >>> frozen = fastsam.frozen_batch_norm(model)
        >>> optimizer = fastsam.SAM(
        ...     model.parameters(), torch.optim.SGD, lr=0.1, descent_context=frozen
        ... )
        >>> loss = optimizer.step(closure)
        >>> model[1].num_batches_tracked  # in two passes
        tensor(1)
    """

    def __init__(self, model: Module, buffers: Iterable[str] = ()):
        if not isinstance(model, Module):
            raise TypeError(f"model must be a torch.nn.Module, got {model!r}")
        buffers = buffers if isinstance(buffers, str) else tuple(buffers)
        if isinstance(buffers, str) or not all(isinstance(name, str) for name in buffers):
            raise TypeError(f"buffers must be a sequence of names, got {buffers!r}")
        for name in buffers:
            if not any(name in module._buffers for module in model.modules()):
                raise ValueError(
                    f"buffers must name buffers of the model's modules, and none has {name!r}"
                )
        self.model = model
        self.buffers = buffers
        self._open: list[Snapshot] = []  # by the blocks that are open, the innermost last

    def __call__(self) -> "frozen_batch_norm":
        return self

    def __enter__(self) -> "frozen_batch_norm":
        names = tuple(dict.fromkeys((*STATISTICS, *self.buffers)))
        places: list[Place] = []
        for module in self.model.modules():
            if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():
                continue
            held = module._buffers
            places += [(module, held, x) for x in names if x in held and held[x] is not None]
        self._open.append(Snapshot(places))
        return self

    def __exit__(self, *exception: object) -> None:
        with uninterrupted(insists=True):
            self._open.pop().put_back()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.model, self.buffers)  # open blocks stay behind

    def __repr__(self) -> str:
        also = f", buffers={self.buffers!r}" if self.buffers else ""
        return f"{type(self).__name__}({type(self.model).__name__}{also})"
