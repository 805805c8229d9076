"""Norms on a CPU: of large tensors by spans, which torch shares out among its threads."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from operator import itemgetter

import torch
from torch import Tensor

from fastsam.arithmetic import wide
from fastsam.step.batch import Batch
from fastsam.step.memory import alike, is_dense
from fastsam.step.rule import Group
from fastsam.step.sharding import Sharding, add_up
from fastsam.step.spec import StepSpec

from ..base import Pass
from ..equations import element_scale
from .blocks import blocks, flat
from .scratch import Memory, Room

#: Elements per norm in a tensor of at least twice as many. They add up in its own precision: a
#: sum of some 250,000 random squares in float32 loses a millionth.
SPAN = 1 << 15

#: Numbers that Python adds up sooner than an operator does.
FEW = 32

#: Dtypes of parameters that the operators serve.
SERVED = (torch.float32, torch.float64)


def served(tensors: Sequence[Tensor]) -> bool:
    """Whether the operators may walk the memory of the tensors, the first a parameter, alike."""
    first = tensors[0]
    same = all(alike(first, other) for other in tensors[1:])
    return same and first.dtype in SERVED and is_dense(first)


def element_scales(weights: list[Tensor], group: Group, memory: Memory) -> Room:
    """ASAM's ``T = |w| + eta`` of one block."""
    t = memory.room(weights)
    torch.abs(t.gather(weights), out=t.whole)
    if (eta := float(group["eta"])) != 0:
        t.whole.add_(eta)
    return t


def span_norms(tensors: Sequence[Tensor]) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """The norms of dense tensors, of large ones ``SPAN`` elements at a time, by position.

    Returns:
        Of small tensors, and of what is left of others after the last whole span, a number; of the
        spans a vector.
    """
    ends, spans = {}, {}
    for k, x in enumerate(tensors):
        size = x.numel()
        if size < 2 * SPAN:
            ends[k] = x
            continue
        count, rest = divmod(size, SPAN)
        spans[k] = torch.linalg.vector_norm(x.as_strided((count, SPAN), (SPAN, 1)), dim=1)
        if rest:
            ends[k] = flat(x)[-rest:]
    norms = torch._foreach_norm(list(ends.values())) if ends else ()
    return dict(zip(ends, norms, strict=True)), spans


def norm(
    vectors: Sequence[Tensor], batch: Batch, spec: StepSpec, like: Tensor,
    memory: Memory | None = None,
) -> Pass[Tensor]:  # fmt: skip
    """``||x||`` over all groups; with memory for it ``||T x||`` at the parameters' present values.

    How a tensor's norm is taken, and the order in which they are added, depend on the tensors
    alone: equal gradients have equal norms in both passes, and in any groups. Where squares leave
    float32, below 1e-19 and above 1e19, the norm is taken again in float64.
    """
    adaptive = memory is not None and spec.adaptive
    everything = list(range(len(vectors)))
    members: dict[Sharding, list[int]] = {(): everything}
    if batch.shardings is not None and any(batch.shardings):
        members = defaultdict(list)
        for k, sharding in enumerate(batch.shardings):
            members[sharding].append(k)
    elif not adaptive and vectors is batch.grads and _in_order(batch):
        ends, spans = span_norms(vectors)
        squared = total((*ends.values(), *spans.values()), like, squares=True)
        if leaves_float32(squared):
            squared = _square_again(everything, vectors, batch, spec, False)
        yield squared
        return squared.sqrt()
    squared = add_up({
        sharding: _square(same, vectors, batch, spec, like, memory)
        for sharding, same in members.items()
    })  # fmt: skip
    yield squared
    return squared.sqrt()


def _in_order(batch: Batch) -> bool:
    """Whether it is known of all gradients that they lie in order, in dtypes served."""
    layout = batch.layout
    if layout is None or not layout.contiguous:
        return False
    known = layout.operators
    if "in order" not in known:
        known["in order"] = all(dtype in SERVED for dtype in layout.dtypes)
    return bool(known["in order"])


def _square(
    members: list[int], vectors: Sequence[Tensor], batch: Batch, spec: StepSpec, like: Tensor,
    memory: Memory | None,
) -> Tensor:  # fmt: skip
    """The squared norm of some of the vectors."""
    found: tuple[list[tuple[int, Tensor]], ...] = ([], [])  # ends and spans, by position
    plain: list[int] = []
    scaled: dict[tuple[int, torch.dtype], list[int]] = defaultdict(list)  # by group, dtype
    adaptive = [memory is not None and group["adaptive"] for group in spec.groups]
    for k in members:
        x, i = vectors[k], batch.groups[k]
        serves = x.dtype in SERVED and (not adaptive[i] or served([batch.params[k], x]))
        # elsewhere than in the order of the memory the operators lose precision
        if not (serves and (x.is_contiguous() or is_dense(x))):
            x = wide(x)
            x = element_scale(batch.params[k], spec.groups[i]) * x if adaptive[i] else x
            found[0].append((k, torch.linalg.vector_norm(x, dtype=like.dtype)))
        elif adaptive[i]:
            scaled[i, x.dtype].append(k)
        else:
            plain.append(k)

    def measure(which: list[int], xs: list[Tensor]) -> None:
        for values, new in zip(found, span_norms(xs), strict=True):
            values.extend((which[j], value) for j, value in new.items())

    measure(plain, [vectors[k] for k in plain])
    for (i, _), same in scaled.items():
        assert memory is not None
        streams = [batch.params[k] for k in same], [vectors[k] for k in same]
        for positions, (ws, xs) in blocks(*streams):
            t = element_scales(ws, spec.groups[i], memory).parts
            torch._foreach_mul_(t, xs)
            measure([same[j] for j in positions], t)
    for values in found:
        values.sort(key=itemgetter(0))
    squared = total((value for values in found for _, value in values), like, squares=True)
    if leaves_float32(squared):
        squared = _square_again(members, vectors, batch, spec, memory is not None)
    return squared


def leaves_float32(squared: Tensor) -> bool:
    """Whether squares that make up a sum may have left float32, so that it is not to be trusted.

    Of a sum above this bound, 2^40 squares below the smallest normal float32 are a part in 2^26.
    """
    return not 2.0**-60 <= float(squared) < 2.0**120


def _square_again(
    members: list[int], vectors: Sequence[Tensor], batch: Batch, spec: StepSpec, scaled: bool
) -> Tensor:
    """As ``_square``, from squares in float64: slower, and seldom needed."""
    norms = []
    for k in members:
        x, group = vectors[k], spec.groups[batch.groups[k]]
        if scaled and group["adaptive"]:
            x = element_scale(batch.params[k], group) * x.double()
        norms.append(torch.linalg.vector_norm(x, dtype=torch.float64))
    return torch.stack(norms).square().sum()


def total(values: Iterable[Tensor], like: Tensor, squares: bool = False) -> Tensor:
    """The sum of numbers and of vectors' elements, or of squares, in the dtype of ``like``."""
    values = list(values)
    if len(values) <= FEW and not any(map(Tensor.dim, values)):
        xs = [value.item() for value in values]
        return like.new_full((), sum([x * x for x in xs] if squares else xs))
    by_dtype: dict[torch.dtype, tuple[list[Tensor], ...]] = defaultdict(lambda: ([], []))
    for value in values:
        by_dtype[value.dtype][value.dim()].append(value)
    sums = []
    for numbers, vectors in by_dtype.values():
        stacked = [torch.stack(numbers)] if numbers else []
        every = torch.cat(stacked + vectors).to(like.dtype)
        sums.append((every.square() if squares else every).sum())
    return sum(sums[1:], sums[0]) if sums else torch.zeros_like(like)
