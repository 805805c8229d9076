"""The first pass on a part of the batch."""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor

from .step.arguments import Number, shown

_FRACTION = Number(0, 1, with_low=False, with_high=True, tensors=None)


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
    - Methods whose update takes :math:`g` or the loss at :math:`w` as well (:class:`SAMAR`,
      :class:`GSAM`, :class:`WSAM`, :class:`GNP`, :class:`LookSAM`, :class:`SAMSPS`,
      ``renormalize=True``) get those of the part, which are noisier.
    - BatchNorm: with ``ascent_context=fastsam.frozen_batch_norm(model)`` the running statistics
      follow the pass over the whole batch.
    - DDP, FSDP2: each rank takes the same share of its own part of the batch.

    Args:
        closure: Takes a batch, computes its loss, calls ``backward`` and returns the loss.
        batch: A tensor, or a tuple, list or mapping of them, nested or not. Dimension 0 of each
            tensor counts samples. Tensors of dimension 0 and what is no tensor are left alone.
        ascent_fraction: :math:`\gamma`, in (0, 1]. Default 0.25.

    Returns:
        The closures. The part is a view: nothing is copied.

    Raises:
        TypeError: If ``closure`` is not callable, or no tensor with samples is in ``batch``.
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
        raise TypeError(
            "batch must be a tensor or a tuple, list or mapping of tensors with samples in "
            f"dimension 0, got {shown(batch)}; for others write the two closures yourself: "
            "step(closure, second_closure)"
        )
    if len(counts) > 1 or 0 in counts:
        raise ValueError(
            "batch must have one number of samples, at least 1, in dimension 0 of all its tensors, "
            f"got {sorted(counts)}"
        )
    part = _first(batch, math.ceil(fraction * counts.pop()))
    return lambda: closure(part), lambda: closure(batch)


def _tensors(batch: Any) -> Iterator[Tensor]:
    """The tensors of a batch that have samples."""
    if isinstance(batch, Tensor):
        if batch.ndim:
            yield batch
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from _tensors(value)
    elif isinstance(batch, (tuple, list)):
        for value in batch:
            yield from _tensors(value)


def _first(batch: Any, count: int) -> Any:
    """The same batch with the first ``count`` samples alone."""
    if isinstance(batch, Tensor):
        return batch[:count] if batch.ndim else batch
    if isinstance(batch, Mapping):
        cut = {key: _first(value, count) for key, value in batch.items()}
        return cut if type(batch) is dict else type(batch)(cut)  # type: ignore[call-arg]
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):  # a named tuple
        return type(batch)(*(_first(value, count) for value in batch))
    if isinstance(batch, (tuple, list)):
        return type(batch)(_first(value, count) for value in batch)
    return batch
