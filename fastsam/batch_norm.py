"""Running statistics of batch normalisation, kept out of one of a step's two passes."""

from collections.abc import Iterable
from typing import Any

from torch.nn import Module
from torch.nn.modules.lazy import LazyModuleMixin

from .step.interrupts import uninterrupted
from .step.snapshot import Place, Snapshot

#: The buffers of torch's own classes, and of most that were written after them.
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


class frozen_batch_norm:  # noqa: N801 - used like a function
    r"""Leave a model's running statistics as they are, whatever happens in the block.

    A step of sharpness-aware training has two forward passes, and batch normalisation in training
    mode counts both:

    .. math:: m \leftarrow (1 - \beta)\, m + \beta\, \mu(w), \qquad
              m \leftarrow (1 - \beta)\, m + \beta\, \mu(w + e)

    The second is a statistic of weights that the model never has when it is evaluated. Around the
    second pass this keeps it out::

        frozen = fastsam.frozen_batch_norm(model)
        optimizer = fastsam.SAM(model.parameters(), torch.optim.SGD, lr=0.1, descent_context=frozen)

    or, with explicit passes, ``with frozen:`` around the second forward and backward. The object is
    a context manager, and calling it gives itself, so that it can also be what a function returns
    (``descent_context=lambda: fastsam.frozen_batch_norm(model)``). As ``ascent_context`` it keeps
    the first pass out instead.

    Inside, layers in training mode still normalise with the batch's own statistics. At the end of
    the block, also where an exception ends it, ``running_mean``, ``running_var`` and
    ``num_batches_tracked`` of every module have the bits that they had at its start, and are the
    same tensors in the same memory. The values are copied and written back in place, rather than
    the layers changed, so that this holds for ``BatchNorm``, ``SyncBatchNorm``, ``InstanceNorm``
    and other classes alike, whatever their ``momentum`` and mode, in compiled, wrapped
    (``DistributedDataParallel``) and captured (CUDA graphs) models, and nothing is compiled again.
    The device is not waited for.

    Blocks nest, of one object or of several. Modules may come and go inside: those that the model
    had at the start are taken care of. A buffer that was replaced inside is put back; one that
    moved to another device or dtype stays there, with its old value; one that has another shape
    is left alone, and so are lazy modules that begin inside.

    Put the backward pass inside, too. With torch's own layers it may also come after the block.
    With a class that multiplies by a buffer which it has just written to, torch then raises its
    error about a variable "modified by an inplace operation", as the gradient would be wrong.

    Cost: a copy of the statistics in each direction (0.2 MB in ResNet-50), and memory for one.

    Args:
        model: The model, wrapped or compiled as it may be.
        buffers: Names of further buffers to keep, which some module of the model has: those of a
            class of your own, or ``"_u"`` and ``"_v"`` of ``parametrizations.spectral_norm``,
            which changes them in every forward. Default: none.

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
