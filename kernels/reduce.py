"""The reduce pass: global norms of the gradients, and the scalars that follow from them.

Deterministic, without floating-point atomics: each program writes one partial sum, and the last
one to arrive (an integer counter decides) adds the partials in a fixed order, in float64, and
writes the finished scalars. So no later pass re-reads the partials, and one launch is enough.
"""

import triton
import triton.language as tl

from .layout import Hyper, Scalar, Task
from .perturb import EPS, GRAD_NORM, element_scale
from .stream import GRAD, PARAM, hyper_row, is_finite, read_chunk, stream

PERTURBED_GRAD_NORM = tl.constexpr(int(Scalar.PERTURBED_GRAD_NORM))
RENORMALIZATION = tl.constexpr(int(Scalar.RENORMALIZATION))
COEFFICIENT = tl.constexpr(int(Scalar.COEFFICIENT))
ACCEPTED = tl.constexpr(int(Scalar.ACCEPTED))
SKIPPED = tl.constexpr(int(Scalar.SKIPPED))
MAX_GRAD_NORM = tl.constexpr(int(Hyper.MAX_GRAD_NORM))
SQUARED_NORMS = tl.constexpr(int(Scalar.SQUARED_NORMS))
SUM0 = tl.constexpr(int(Scalar.SUM0))
SUM1 = tl.constexpr(int(Scalar.SUM1))
FIRST = tl.constexpr(int(Task.FIRST))
LAST = tl.constexpr(int(Task.LAST))
DESCENT = tl.constexpr(int(Task.DESCENT))
RENORMALIZE = tl.constexpr(int(Task.RENORMALIZE))
CLIP = tl.constexpr(int(Task.CLIP))
SKIP = tl.constexpr(int(Task.SKIP))
ACCUMULATE = tl.constexpr(int(Task.ACCUMULATE))
#: Partials that the last program adds per loop turn.
WINDOW = tl.constexpr(1024)


@triton.jit
def _squares(table, columns, tensor, start, offsets, mask, row, P: tl.constexpr, G: tl.constexpr,
             ACC: tl.constexpr, ADAPTIVE: tl.constexpr, ALIGNED: tl.constexpr):  # fmt: skip
    """``(T g)^2`` and ``g^2``, element by element."""
    grad = stream(table, GRAD, columns, tensor, start, G, ALIGNED) + offsets
    g = tl.load(grad, mask=mask, other=0.0).to(ACC)
    if ADAPTIVE:
        param = stream(table, PARAM, columns, tensor, start, P, ALIGNED) + offsets
        t = element_scale(tl.load(param, mask=mask, other=0.0).to(ACC), row, ADAPTIVE)
        return (t * g) * (t * g), g * g
    else:
        return g * g, g * g


@triton.jit
def _total(partials, programs, slot, tasks):
    """Sum of one row of partials, added to what the reduction's earlier buckets gave."""
    lanes = tl.arange(0, WINDOW)
    sums = tl.zeros([WINDOW], tl.float64)
    for first in range(0, programs, WINDOW):
        # .cg: the partials come from other processors, whose writes this one's L1 has not seen
        part = tl.load(partials + first + lanes, mask=first + lanes < programs, other=0.0,
                       cache_modifier=".cg")  # fmt: skip
        sums += part.to(tl.float64)
    total = tl.sum(sums)
    if (tasks & FIRST) == 0:
        total += tl.load(slot)
    tl.store(slot, total)
    return total


@triton.jit
def _finish_descent(hyper, scalars, measured, plain, tasks):
    """From the second gradient's norms to the coefficient of ``u = coefficient * g~``."""
    gamma = tl.full([], 1.0, tl.float64)
    if (tasks & RENORMALIZE) != 0:
        # n = n~ gives exactly 1, so that SSAM is then SAM bit for bit; so does a non-finite n,
        # where nothing was perturbed and there is no norm to restore
        n = tl.load(scalars + GRAD_NORM)
        exact = (n == measured) | (is_finite(n) == 0)
        gamma = tl.where(exact, 1.0, n / (measured + EPS))
    coefficient = gamma
    if (tasks & CLIP) != 0:
        clip = tl.load(hyper + MAX_GRAD_NORM).to(tl.float64) / (gamma * plain + 1e-6)
        coefficient = tl.where(clip < 1, gamma * clip, gamma)
    accepted = is_finite(plain) | ((tasks & SKIP) == 0)
    tl.store(scalars + PERTURBED_GRAD_NORM, measured)
    tl.store(scalars + RENORMALIZATION, gamma)
    tl.store(scalars + COEFFICIENT, coefficient)
    tl.store(scalars + ACCEPTED, accepted.to(tl.float64))
    tl.store(scalars + SKIPPED, tl.load(scalars + SKIPPED) + tl.where(accepted, 0.0, 1.0))
    if (tasks & ACCUMULATE) != 0:
        norm = tl.where(accepted, coefficient * plain, 0.0)
        b2 = tl.load(scalars + SQUARED_NORMS)
        tl.store(scalars + SQUARED_NORMS, b2 + norm * norm)


@triton.jit(do_not_specialize=["columns", "tasks"])
def reduce_kernel(table, chunks, columns, hyper, scalars, partials, arrivals, tasks,
                  P: tl.constexpr, G: tl.constexpr, ACC: tl.constexpr,
                  ADAPTIVE: tl.constexpr, BOTH: tl.constexpr, CHUNK: tl.constexpr,
                  LANES: tl.constexpr):  # fmt: skip
    """Norms of one pass's gradients over one bucket.

    Args:
        partials: Scratch in ``ACC``, two rows of one number per program.
        arrivals: One int32, zero before and after every launch.
        tasks: Bits of ``layout.Task``: how the sums are finished.
        ADAPTIVE: Measure ``||T g||``, not ``||g||``.
        BOTH: Measure both.

    The other arguments are ``perturb_kernel``'s.
    """
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    tensor, group, index, length, vector = read_chunk(chunks, program)
    start = index * CHUNK
    row = hyper_row(hyper, group)
    sum0 = tl.zeros([1], ACC)
    sum1 = tl.zeros([1], ACC)
    if vector > 0:
        offsets = tl.arange(0, CHUNK)
        a, b = _squares(table, columns, tensor, start, offsets, offsets < vector, row, P, G, ACC,
                        ADAPTIVE, True)  # fmt: skip
        sum0 += tl.sum(a)
        if BOTH:
            sum1 += tl.sum(b)
    if vector < length:
        lanes0 = tl.zeros([LANES], ACC)
        lanes1 = tl.zeros([LANES], ACC)
        for first in range(vector, length, LANES):
            offsets = first + tl.arange(0, LANES)
            a, b = _squares(table, columns, tensor, start, offsets, offsets < length, row, P, G,
                            ACC, ADAPTIVE, False)  # fmt: skip
            lanes0 += a
            lanes1 += b
        sum0 += tl.sum(lanes0)
        if BOTH:
            sum1 += tl.sum(lanes1)
    one = tl.arange(0, 1)
    tl.store(partials + program + one, sum0)
    if BOTH:
        tl.store(partials + programs + program + one, sum1)
    tl.debug_barrier()
    if tl.atomic_add(arrivals, 1, sem="acq_rel") == programs - 1:
        tl.store(arrivals, 0)
        total0 = _total(partials, programs, scalars + SUM0, tasks)
        total1 = total0
        if BOTH:
            total1 = _total(partials + programs, programs, scalars + SUM1, tasks)
        if (tasks & LAST) != 0:
            if (tasks & DESCENT) != 0:
                _finish_descent(hyper, scalars, tl.sqrt(total0), tl.sqrt(total1), tasks)
            else:
                tl.store(scalars + GRAD_NORM, tl.sqrt(total0))
