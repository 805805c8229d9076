"""The first pass on a part of the batch."""

import copy
import math
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from numbers import Number
from typing import Any

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from .step import arguments
from .step.arguments import shown
from .step.closures import SplitClosure

_FRACTION = arguments.Number(0, 1, with_low=False, with_high=True, tensors=None)


def split_closures(
    closure: Callable[[Any], Any], batch: Any, ascent_fraction: float = 0.25
) -> tuple[Callable[[], Any], Callable[[], Any]]:
    r"""Two closures for a step, of which the first sees a part of the batch and the second all.

    .. math:: g = \nabla L_{B'}(w), \quad \tilde g = \nabla L_B(w + e), \quad
              B' = \text{the first } \lceil \gamma \lvert B \rvert \rceil \text{ samples of } B

    A step then costs :math:`1 + \gamma` forward and backward passes instead of 2.

    The step returns the loss at :math:`w` of the part. Steps of the base alone (``perturb_every``,
    ``start``, ``stop``) take the gradient of the whole batch, and call both closures; where
    ``optimizer.perturbs_next`` is False, ``optimizer.step(second)`` does without the first.

    - The samples have to be in random order, as loaders with ``shuffle=True`` give them.
    - The loss has to be a mean over samples, where the method does not divide by the norm of
      :math:`g`, as :class:`USAM`.
    - Use it where the update takes :math:`\tilde g` alone, as in :class:`SAM`, :class:`ASAM`,
      :class:`USAM`, :class:`VaSSO`, :class:`FriendlySAM` and :class:`LESAM`. A method that also
      uses :math:`g` or the loss at :math:`w` (:class:`GSAM`, :class:`WSAM`, :class:`GNP`,
      :class:`SAMAR`, :class:`LookSAM`, :class:`SAMSPS`, :class:`SSAM`, ``renormalize=True``) then
      compares different samples, and its result is another. ``amplify``, :class:`LETS`,
      :class:`MSAM`, :class:`DelayedSAM`, the universal class, ``step_micro_batches`` and
      :func:`graphed` raise an error.
    - BatchNorm: with ``ascent_context=fastsam.frozen_batch_norm(model)`` the running statistics
      follow the pass over the whole batch. The part then needs at least two samples.
    - DDP, FSDP2: each rank takes the same share of its own part of the batch.

    Args:
        closure: Takes a batch, computes its loss, calls ``backward`` and returns the loss.
        batch: A tensor, or a tuple, list or mapping with tensors, nested or not. Dimension 0 of
            each tensor counts samples: a list with a tensor for each sample is none of these.
            Tensors of dimension 0, numbers, strings and None are left as they are.
        ascent_fraction: :math:`\gamma`, in (0, 1]. Default 0.25.

    Returns:
        The closures. The part is a view: nothing is copied.

    Raises:
        TypeError: If ``closure`` is not callable; if ``batch`` holds no tensor with samples, a
            sequence without one, or an object of another type, which cannot be split.
        ValueError: If the tensors differ in their number of samples or have none; if
            ``ascent_fraction`` is out of range.

    Example:
        >>> optimizer = fastsam.SAM(model.parameters(), torch.optim.SGD, lr=0.1)
        >>> def closure(batch):
        ...     x, y = batch
        ...     loss = loss_fn(model(x), y)
        ...     loss.backward()
        ...     return loss
        >>> closures = fastsam.split_closures(closure, (inputs, labels), ascent_fraction=0.25)
        >>> loss = optimizer.step(*closures)

    Reference: Bahri, Mobahi and Tay, "Sharpness-aware minimization improves language model
    generalization", ACL 2022, arXiv 2110.08529, who compute the ascent on a part of the batch.
    """
    if not callable(closure):
        raise TypeError(f"closure must be callable, got {shown(closure)}")
    fraction = _FRACTION("ascent_fraction", ascent_fraction)
    counts = {len(tensor) for tensor in _tensors(batch)}
    if not counts:
        raise _no_part(batch)
    if len(counts) > 1 or 0 in counts:
        raise ValueError(
            "batch must have one number of samples, at least 1, in dimension 0 of all its tensors, "
            f"got {sorted(counts)}"
        )
    # not a sample more for the rounding of the product, as of 0.07 and 100
    count = math.ceil(round(fraction * counts.pop(), 9))
    return SplitClosure(closure, _first(batch, count)), SplitClosure(closure, batch)


def _tensors(batch: Any) -> Iterator[Tensor]:
    """The tensors of a batch that have samples; what cannot be split is refused."""
    if isinstance(batch, Tensor):
        if batch.ndim:
            yield batch
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from _tensors(value)
    elif isinstance(batch, (tuple, list)) and not isinstance(batch, PackedSequence):
        found = [tensor for value in batch for tensor in _tensors(value)]
        if batch and not found:
            raise _no_part(batch)
        yield from found
    elif not (batch is None or isinstance(batch, (Number, str, bytes))):
        raise _no_part(batch)


def _no_part(batch: Any) -> TypeError:
    return TypeError(
        "batch must be a tensor or a tuple, list or mapping of tensors with samples in dimension "
        f"0, got {shown(batch)}; for others write the two closures yourself: step(closure, "
        "second_closure)"
    )


def _first(batch: Any, count: int) -> Any:
    """The same batch with the first ``count`` samples alone."""
    if isinstance(batch, Tensor):
        return batch[:count] if batch.ndim else batch
    if isinstance(batch, Mapping):
        cut = {key: _first(value, count) for key, value in batch.items()}
        if not isinstance(batch, MutableMapping):
            return cut
        part = copy.copy(batch)
        part.update(cut)
        return part
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):  # a named tuple
        return type(batch)(*(_first(value, count) for value in batch))
    if isinstance(batch, (tuple, list)):
        return type(batch)(_first(value, count) for value in batch)
    return batch
