"""Gradients of one pass that are kept while the next pass makes others."""

from collections.abc import Iterable, Mapping

from torch import Tensor
from torch.optim.optimizer import Optimizer

from .batch import Batch
from .memory import UNSHARED_GRADIENT, holders, is_alone
from .sharding import is_sharded


def take_over(batch: Batch, cleared: bool, ours: Iterable[Tensor] = ()) -> list[Tensor]:
    """A pass's gradients, such that no later backward pass writes to them.

    They are copied, unless nobody else can write to them. That is so where they are about to be
    set to None, and neither they nor their memory are known elsewhere: DDP's, for one, may be views
    of buckets that the next backward fills again, and a closure may give out the same tensors in
    every call.

    Args:
        batch: Of the pass.
        cleared: Whether the caller is about to set them to None.
        ours: Those of which the caller has another list.
    """
    kept, ids = [], set(map(id, ours))
    for k, param in enumerate(batch.owners):
        known = UNSHARED_GRADIENT + (id(batch.grads[k]) in ids)
        alone = holders(batch.grads, k) <= known  # before the next line makes another
        grad = batch.grads[k]
        # a shard is its DTensor's as well
        alone = is_sharded(param) or (alone and is_alone(grad))
        size = grad.numel() * grad.element_size()
        alone = alone and not grad._is_view() and grad.untyped_storage().nbytes() == size
        kept.append(grad if alone and cleared else grad.clone())
    return kept


def set_aside(batch: Batch, cleared: bool, ours: Iterable[Tensor]) -> dict[Tensor, Tensor]:
    """The present gradients by parameter, such that no backward pass writes to them.

    The arguments are those of :func:`take_over`.
    """
    if not cleared:
        return {p: p.grad.clone() for p in batch.owners if p.grad is not None}
    kept = zip(batch.owners, take_over(batch, cleared=True, ours=ours), strict=True)
    return {p: p.grad if is_sharded(p) and p.grad is not None else x for p, x in kept}


def put_back(grads: Mapping[Tensor, Tensor]) -> None:
    """Leave gradients in ``.grad``: in the tensors that are there, or else themselves."""
    for param, grad in grads.items():
        if param.grad is None:
            param.grad = grad
        else:  # somebody keeps it, as a part of a larger buffer perhaps
            param.grad.copy_(grad)


def zeroes_as_torch(optimizer: Optimizer) -> bool:
    """Whether ``optimizer.zero_grad`` is torch's own, and sets to None when it is told to."""
    return type(optimizer).zero_grad is Optimizer.zero_grad and "zero_grad" not in vars(optimizer)
