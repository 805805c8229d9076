"""Norms on a CPU, from foreach operators."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from operator import itemgetter

import torch
from torch import Tensor

from ..bases import Group
from ..rules import Batch, Step
from ..sharding import Sharding, add_up
from . import equations
from .lockstep import Pass
from .pieces import SPAN, pieces, spans
from .scratch import Memory, alike, is_dense

#: Dtypes of parameters that the operators serve.
SERVED = (torch.float32, torch.float64)


def served(tensors: Sequence[Tensor]) -> bool:
    """Whether the operators may walk the memory of the tensors, the first a parameter, alike."""
    first = tensors[0]
    same = all(alike(first, other) for other in tensors[1:])
    return same and first.dtype in SERVED and is_dense(first)


def element_scales(weights: list[Tensor], group: Group, memory: Memory) -> list[Tensor]:
    """ASAM's ``T = |w| + eta`` of one piece."""
    if len(weights) == 1:
        t = [torch.abs(weights[0], out=memory.buffer(weights[0]))]
    else:
        t = list(torch._foreach_abs(weights))
    if (eta := float(group["eta"])) != 0:
        torch._foreach_add_(t, eta)
    return t


def norm(
    vectors: Sequence[Tensor], batch: Batch, step: Step, like: Tensor, memory: Memory | None = None
) -> Pass[Tensor]:
    """``||x||`` over all groups; with memory for it ``||T x||`` at the parameters' present values.

    How a tensor's norm is taken, and the order in which they are added, depend on the tensors
    alone: equal gradients have equal norms in both passes, and in any groups.
    """
    adaptive = memory is not None and step.adaptive
    members: dict[Sharding, list[int]] = {(): list(range(len(vectors)))}
    if any(batch.shardings):
        members = defaultdict(list)
        for k, sharding in enumerate(batch.shardings):
            members[sharding].append(k)
    elif not adaptive and vectors is batch.grads and (found := _by_size(batch)) is not None:
        small, large = found
        xs = [vectors[k] for k in small]
        for k in large:
            xs += spans(vectors[k])
        squared = total(torch._foreach_norm(xs) if xs else (), like, squares=True)
        yield squared
        return squared.sqrt()
    squared = add_up({
        sharding: _square(same, vectors, batch, step, like, memory)
        for sharding, same in members.items()
    })  # fmt: skip
    yield squared
    return squared.sqrt()


def _by_size(batch: Batch) -> tuple[list[int], list[int]] | None:
    """Gradients of one span and of several by position, if all lie in order, in dtypes served."""
    layout = batch.layout
    if layout is None or not layout.contiguous:
        return None
    if "by size" not in layout.cache:
        sizes = layout.sizes
        found = ([k for k, size in enumerate(sizes) if size <= SPAN],
                 [k for k, size in enumerate(sizes) if size > SPAN])  # fmt: skip
        served = all(dtype in SERVED for dtype in layout.dtypes)
        layout.cache["by size"] = found if served else None
    by_size: tuple[list[int], list[int]] | None = layout.cache["by size"]
    return by_size


def _square(
    members: list[int], vectors: Sequence[Tensor], batch: Batch, step: Step, like: Tensor,
    memory: Memory | None,
) -> Tensor:  # fmt: skip
    """The squared norm of some of the vectors."""
    norms: list[tuple[bool, int, Tensor]] = []  # large ones last, by position
    plain: list[int] = []
    scaled: dict[int, list[int]] = defaultdict(list)  # by group
    adaptive = [memory is not None and group["adaptive"] for group in step.groups]
    for k in members:
        x, i = vectors[k], batch.groups[k]
        serves = x.dtype in SERVED and (not adaptive[i] or served([batch.params[k], x]))
        # elsewhere than in the order of the memory the operators lose precision
        if not (serves and (x.is_contiguous() or is_dense(x))):
            x = equations.wide(x)
            x = equations.element_scale(batch.params[k], step.groups[i]) * x if adaptive[i] else x
            norms.append((x.numel() > SPAN, k, torch.linalg.vector_norm(x, dtype=like.dtype)))
        elif adaptive[i]:
            scaled[i].append(k)
        else:
            plain.append(k)

    def measure(which: list[int], xs: list[Tensor]) -> None:
        parts = [(k, span) for k, x in zip(which, xs, strict=True) for span in spans(x)]
        if parts:
            found = torch._foreach_norm([span for _, span in parts])
            for (k, _), value in zip(parts, found, strict=True):
                norms.append((vectors[k].numel() > SPAN, k, value))

    measure(plain, [vectors[k] for k in plain])
    for i, same in scaled.items():
        assert memory is not None
        streams = [batch.params[k] for k in same], [vectors[k] for k in same]
        for positions, (ws, xs) in pieces(*streams):
            t = element_scales(ws, step.groups[i], memory)
            torch._foreach_mul_(t, xs)
            measure([same[j] for j in positions], t)
    norms.sort(key=itemgetter(0, 1))
    return total([value for *_, value in norms], like, squares=True)


def total(values: Iterable[Tensor], like: Tensor, squares: bool = False) -> Tensor:
    """The sum of 0-dim tensors, or of their squares, in the dtype of ``like``."""
    by_dtype: dict[torch.dtype, list[Tensor]] = defaultdict(list)
    for value in values:
        by_dtype[value.dtype].append(value)
    sums = []
    for same in by_dtype.values():
        xs = torch.stack(same).to(like.dtype)
        sums.append((xs.square() if squares else xs).sum())
    return sum(sums[1:], sums[0]) if sums else torch.zeros_like(like)
