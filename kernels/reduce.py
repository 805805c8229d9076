"""The reduce pass: sums over all gradients, and the scalars that follow from them.

Deterministic, without floating-point atomics: each program writes one partial per sum. Of every
``WINDOW`` programs the last one to arrive (an integer counter decides) adds their partials, and the
last of those adds what came of that, in a fixed order, in float64; it writes the finished scalars
(``finish.py``). So no later pass re-reads the partials, and one launch is enough.

A program adds up in float32, which squares leave where gradients are below 1e-19 or above 1e19. One
that finds its sums to be that small, or not finite, looks at its chunk again with the gradients
multiplied by a power of two; so norms are right over all of float32, and float64, of which most
GPUs do little, is kept to a few operations per program.
"""

import triton
import triton.language as tl

from .arithmetic import LOWER, RAISE, SMALL, is_finite
from .choice import takes_part
from .finish import APART, COEFFICIENT, INVERSE_SCALE
from .layout import WINDOW as PARTIALS
from .layout import Hyper, Scalar, Task
from .perturb import (
    ACCUMULATED,
    ASCENT,
    FIRST_INVERSE_SCALE,
    SIGN,
    element_scale,
    length,
    norm_of,
)
from .stream import (
    ASCENT0,
    ASCENT1,
    BACKUP,
    FIRST_GRAD,
    GRAD,
    MASTER,
    NEXT0,
    NEXT1,
    PARAM,
    STATE0,
    TRAINING,
    VALIDATION,
    all_loads_first,
    hyper_row,
    known_base,
    newest,
    only_if,
    read_chunk,
    stream,
    where_present,
)

LR = tl.constexpr(int(Hyper.LR))
SUM0 = tl.constexpr(int(Scalar.SUM0))
FIRST = tl.constexpr(int(Task.FIRST))
LAST = tl.constexpr(int(Task.LAST))
WINDOW = tl.constexpr(PARTIALS)


@triton.jit
def _terms(table, columns, tensor, start, offsets, mask, row, scalars, origin, factor,
           P: tl.constexpr, G: tl.constexpr, ACC: tl.constexpr, TERMS: tl.constexpr,
           ASCENDS: tl.constexpr, BOTH: tl.constexpr, LETS: tl.constexpr, ADVANCE: tl.constexpr,
           DIRECTION: tl.constexpr, RADIUS: tl.constexpr, ACCUMULATES: tl.constexpr,
           STATES: tl.constexpr, FROM_OLD: tl.constexpr, READ: tl.constexpr, ADAPTIVE: tl.constexpr,
           SEGMENTS: tl.constexpr, SCALED: tl.constexpr, CHOOSES: tl.constexpr,
           HAS_MASTER: tl.constexpr, ALIGNED: tl.constexpr):  # fmt: skip
    """What is summed, element by element: the streams that ``TERMS`` combines.

    What has the gradients' size is multiplied by ``factor``, if there is one.
    """
    if CHOOSES:
        mask = only_if(takes_part(table, columns, tensor, scalars, row), mask)
    # all addresses and loads, then what is computed of them (see update.py)
    grad = stream(table, GRAD, columns, tensor, start, G, ALIGNED) + offsets
    present = tl.load(grad, mask=mask, other=0.0)
    if SCALED:
        param = stream(table, PARAM, columns, tensor, start, P, ALIGNED) + offsets
        w = tl.load(param, mask=mask, other=0.0)
        if HAS_MASTER and ASCENDS:
            master = stream(table, MASTER, columns, tensor, start, ACC, ALIGNED) + offsets
            held = tl.load(master, mask=mask, other=0.0)
    state = ()
    if ASCENDS and DIRECTION is not None:
        if STATES > 0:
            ascent0 = stream(table, ASCENT0, columns, tensor, start, ACC, ALIGNED) + offsets
            state = state + (tl.load(ascent0, mask=mask, other=0.0),)
        if STATES > 1:
            ascent1 = stream(table, ASCENT1, columns, tensor, start, ACC, ALIGNED) + offsets
            state = state + (tl.load(ascent1, mask=mask, other=0.0),)
        if READ is not None:
            state0 = stream(table, STATE0, columns, tensor, start, READ, ALIGNED) + offsets
            there = where_present(table, STATE0, columns, tensor, mask)
            read = tl.load(state0, mask=there, other=0.0)
    perturbed = mask
    later = ()
    if BOTH:
        perturbed = where_present(table, FIRST_GRAD, columns, tensor, mask)
        first_grad = stream(table, FIRST_GRAD, columns, tensor, start, G, ALIGNED) + offsets
        g = tl.load(first_grad, mask=perturbed, other=0.0)
        if RADIUS is not None:
            if STATES > 0:
                ROW0: tl.constexpr = ASCENT0 if FROM_OLD else NEXT0
                next0 = stream(table, ROW0, columns, tensor, start, ACC, ALIGNED) + offsets
                # a gradient without state is one of a group that is not perturbed
                stateful = where_present(table, ROW0, columns, tensor, perturbed)
                later = later + (tl.load(next0, mask=stateful, other=0.0),)
            if STATES > 1:
                ROW1: tl.constexpr = ASCENT1 if FROM_OLD else NEXT1
                next1 = stream(table, ROW1, columns, tensor, start, ACC, ALIGNED) + offsets
                later = later + (tl.load(next1, mask=stateful, other=0.0),)
            if ADAPTIVE:
                if HAS_MASTER:
                    backup = stream(table, MASTER, columns, tensor, start, ACC, ALIGNED) + offsets
                else:
                    backup = stream(table, BACKUP, columns, tensor, start, P, ALIGNED,
                                    origin) + offsets  # fmt: skip
                before = tl.load(backup, mask=perturbed, other=0.0)
    if LETS:
        validated = where_present(table, VALIDATION, columns, tensor, mask)
        validation = stream(table, VALIDATION, columns, tensor, start, G, ALIGNED) + offsets
        delta = tl.load(validation, mask=validated, other=0.0)
        trained = where_present(table, TRAINING, columns, tensor, mask)
        training = stream(table, TRAINING, columns, tensor, start, G, ALIGNED) + offsets
        without = tl.load(training, mask=trained, other=0.0)
    if ALIGNED and (STATES > 0 or BOTH or READ is not None):
        all_loads_first()
    SCALE: tl.constexpr = FIRST_INVERSE_SCALE if ASCENDS else INVERSE_SCALE
    sign = 1.0
    if DIRECTION is not None or BOTH:  # else squares alone
        sign = tl.load(row + SIGN)
    present = present.to(ACC) * (tl.load(scalars + SCALE).to(ACC) * sign)
    here = 1.0
    if SCALED:
        if HAS_MASTER and ASCENDS:
            w = newest(held, w, P)
        here = element_scale(w.to(ACC), row, SCALED)
    d = present
    if ASCENDS and DIRECTION is not None:
        if STATES > 0 and not FROM_OLD:
            state = ADVANCE(present, state, row + ASCENT)
        if READ is not None:
            state = state + (known_base(table, columns, tensor, read, ACC),)
        if ACCUMULATES is not None:
            state = (tl.load(scalars + ACCUMULATED),) + state
        d = DIRECTION(present, state, row + ASCENT)
    e = present
    if BOTH:
        g = g.to(ACC) * (tl.load(scalars + FIRST_INVERSE_SCALE).to(ACC) * sign)
        if RADIUS is not None:
            t = element_scale(before.to(ACC), row, ADAPTIVE) if ADAPTIVE else 1.0
            norm = norm_of(table, columns, tensor, scalars, ACC, SEGMENTS)
            scale = length(row, scalars, norm, RADIUS, ACCUMULATES, ACC)
            if ACCUMULATES is not None:
                later = (tl.load(scalars + ACCUMULATED),) + later
            e = DIRECTION(g, later, row + ASCENT)
            e = t * e
            if ADAPTIVE != 2:
                e = t * e
            e = tl.where(scale != 0, scale * e, 0.0)
    else:
        g = present
    if LETS:
        delta = delta.to(ACC) - without.to(ACC)
        coefficient = tl.load(scalars + COEFFICIENT) + tl.load(scalars + APART)
        delta = tl.load(row + LR) * coefficient.to(ACC) * delta
    else:
        delta = present
    if factor is not None:
        present, d, g = factor * present, factor * d, factor * g
    return TERMS(here, present, d, g, e, perturbed, delta)


@triton.jit
def _sums(table, chunks, columns, hyper, scalars, origin, factor, P: tl.constexpr, G: tl.constexpr,
          ACC: tl.constexpr, TERMS: tl.constexpr, ASCENDS: tl.constexpr, BOTH: tl.constexpr,
          LETS: tl.constexpr, ADVANCE: tl.constexpr, DIRECTION: tl.constexpr, RADIUS: tl.constexpr,
          ACCUMULATES: tl.constexpr, STATES: tl.constexpr, FROM_OLD: tl.constexpr,
          READ: tl.constexpr, ADAPTIVE: tl.constexpr, SEGMENTS: tl.constexpr, SCALED: tl.constexpr,
          CHOOSES: tl.constexpr, HAS_MASTER: tl.constexpr, SUMS: tl.constexpr, CHUNK: tl.constexpr,
          LANES: tl.constexpr):  # fmt: skip
    """The sums over this program's chunk."""
    tensor, group, index, size, vector = read_chunk(chunks, tl.program_id(0))
    start = index * CHUNK
    row = hyper_row(hyper, group)
    sum0 = tl.zeros([1], ACC)
    sum1 = tl.zeros([1], ACC)
    sum2 = tl.zeros([1], ACC)
    sum3 = tl.zeros([1], ACC)
    sum4 = tl.zeros([1], ACC)
    if vector > 0:
        offsets = tl.arange(0, CHUNK)
        a, b, c, d, f = _terms(table, columns, tensor, start, offsets, offsets < vector, row,
                               scalars, origin, factor, P, G, ACC, TERMS, ASCENDS, BOTH, LETS,
                               ADVANCE, DIRECTION, RADIUS, ACCUMULATES, STATES, FROM_OLD, READ,
                               ADAPTIVE, SEGMENTS, SCALED, CHOOSES, HAS_MASTER, True)  # fmt: skip
        sum0 += tl.sum(a)
        if SUMS > 1:
            sum1 += tl.sum(b)
        if SUMS > 2:
            sum2 += tl.sum(c)
            sum3 += tl.sum(d)
            sum4 += tl.sum(f)
    if vector < size:
        lanes0 = tl.zeros([LANES], ACC)
        lanes1 = tl.zeros([LANES], ACC)
        lanes2 = tl.zeros([LANES], ACC)
        lanes3 = tl.zeros([LANES], ACC)
        lanes4 = tl.zeros([LANES], ACC)
        for first in range(vector, size, LANES):
            offsets = first + tl.arange(0, LANES)
            a, b, c, d, f = _terms(table, columns, tensor, start, offsets, offsets < size, row,
                                   scalars, origin, factor, P, G, ACC, TERMS, ASCENDS, BOTH, LETS,
                                   ADVANCE, DIRECTION, RADIUS, ACCUMULATES, STATES, FROM_OLD, READ,
                                   ADAPTIVE, SEGMENTS, SCALED, CHOOSES, HAS_MASTER,
                                   False)  # fmt: skip
            lanes0 += a
            lanes1 += b
            lanes2 += c
            lanes3 += d
            lanes4 += f
        sum0 += tl.sum(lanes0)
        if SUMS > 1:
            sum1 += tl.sum(lanes1)
        if SUMS > 2:
            sum2 += tl.sum(lanes2)
            sum3 += tl.sum(lanes3)
            sum4 += tl.sum(lanes4)
    return sum0, sum1, sum2, sum3, sum4


@triton.jit
def _seen_again(sum, again, distrusted, back):
    """A sum in float64, and without the factor, from the second look where that is needed."""
    return tl.where(distrusted, again.to(tl.float64) * back, sum.to(tl.float64))


@triton.jit
def _padded(count):
    """The length of a row of partials: a product, so that it is provably a multiple."""
    return tl.cdiv(count, WINDOW) * WINDOW


@triton.jit
def _window(row, first, count):
    """A window of a row of ``count`` partials, and zeros after its end."""
    offsets = first + tl.arange(0, WINDOW)
    # In pairs, which are vectors of 128 bits: what an odd row is read beyond its end is dropped.
    # .cg: the partials come from other processors, whose writes this one's L1 has not seen
    found = tl.load(row + offsets, mask=offsets < (count + 1) // 2 * 2, other=0.0,
                    cache_modifier=".cg")  # fmt: skip
    return tl.where(offsets < count, found, 0.0)


@triton.jit
def _windows(rows, first, count, SUMS: tl.constexpr):
    """The sums of one window of every row. All are loaded before one is added up."""
    length = _padded(count)
    part0 = _window(rows, first, count)
    if SUMS > 1:
        part1 = _window(rows + length, first, count)
    if SUMS > 2:
        part2 = _window(rows + 2 * length, first, count)
        part3 = _window(rows + 3 * length, first, count)
        part4 = _window(rows + 4 * length, first, count)
    sum0 = tl.sum(part0)
    sum1 = tl.sum(part1) if SUMS > 1 else sum0
    sum2 = tl.sum(part2) if SUMS > 2 else sum0
    sum3 = tl.sum(part3) if SUMS > 2 else sum0
    sum4 = tl.sum(part4) if SUMS > 2 else sum0
    return sum0, sum1, sum2, sum3, sum4


@triton.jit
def _write(place, length, sum0, sum1, sum2, sum3, sum4, SUMS: tl.constexpr):
    """One number to each row, in float64."""
    tl.store(place, sum0.to(tl.float64))
    if SUMS > 1:
        tl.store(place + length, sum1.to(tl.float64))
    if SUMS > 2:
        tl.store(place + 2 * length, sum2.to(tl.float64))
        tl.store(place + 3 * length, sum3.to(tl.float64))
        tl.store(place + 4 * length, sum4.to(tl.float64))


@triton.jit
def _total(total, slot, tasks):
    """A sum, added to what the reduction's earlier buckets gave."""
    if (tasks & FIRST) == 0:
        total += tl.load(slot)
    tl.store(slot, total)
    return total


@triton.jit(do_not_specialize=["columns", "tasks", "origin"])
def reduce_kernel(table, chunks, columns, hyper, scalars, partials, arrivals, tasks, origin,
                  P: tl.constexpr, G: tl.constexpr, ACC: tl.constexpr, TERMS: tl.constexpr,
                  FINISH: tl.constexpr, ASCENDS: tl.constexpr, BOTH: tl.constexpr,
                  LETS: tl.constexpr, ADVANCE: tl.constexpr, DIRECTION: tl.constexpr,
                  RADIUS: tl.constexpr, ACCUMULATES: tl.constexpr, COEFFICIENTS: tl.constexpr,
                  ADAPTED: tl.constexpr, STATES: tl.constexpr, FROM_OLD: tl.constexpr,
                  READ: tl.constexpr, ADAPTIVE: tl.constexpr, SEGMENTS: tl.constexpr,
                  SCALED: tl.constexpr, CHOOSES: tl.constexpr, HAS_MASTER: tl.constexpr,
                  SUMS: tl.constexpr, CHUNK: tl.constexpr, LANES: tl.constexpr):  # fmt: skip
    """Sums over one bucket.

    Args:
        partials: Scratch in float64: a row of one number per program for every sum, and a row of
            one per window of programs (``layout.partials``).
        arrivals: int32, of windows and of programs by window (``layout.counters``); zero before
            and after every launch.
        tasks: Bits of ``layout.Task``: how the sums are finished.
        TERMS: What is added up, a function of ``sums.py``.
        FINISH: What follows from it, a function of ``finish.py``.
        ASCENDS: Whether this is the first pass.
        BOTH: Whether the first pass's gradient is read in the second, and with a ``RADIUS`` what
            makes the perturbation once more.
        LETS: Whether LETS's gradients are read.
        ADVANCE, DIRECTION, RADIUS, ACCUMULATES: The ascent rule's functions (``ascent/``), where
            the sums, or what follows from them, depend on it; else None.
        COEFFICIENTS, ADAPTED: The descent rule's (``descent/``); the same.
        STATES: Number of the ascent rule's state tensors, where the sums depend on them.
        FROM_OLD: Whether its direction is given the state of before the step.
        READ: Dtype of the base's state that the direction depends on; None where it does on none.
        ADAPTIVE: Whether the perturbation that is made once more has ``T``; 2: once.
        SEGMENTS: Whether its norm is that of the tensor's segment.
        SCALED: Whether the norm of this pass has ``T``.
        CHOOSES: Whether tensors take part in it at random.
        HAS_MASTER: Whether ``T`` is that of master weights.
        SUMS: How many are taken: 1, 2 or 5.

    The other arguments are ``perturb_kernel``'s.
    """
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    sum0, sum1, sum2, sum3, sum4 = _sums(
        table, chunks, columns, hyper, scalars, origin, None, P, G, ACC, TERMS, ASCENDS, BOTH,
        LETS, ADVANCE, DIRECTION, RADIUS, ACCUMULATES, STATES, FROM_OLD, READ, ADAPTIVE,
        SEGMENTS, SCALED, CHOOSES, HAS_MASTER, SUMS, CHUNK, LANES)  # fmt: skip
    length = _padded(programs)
    mine = partials + program + tl.arange(0, 1)
    _write(mine, length, sum0, sum1, sum2, sum3, sum4, SUMS)
    if ACC == tl.float32 and not LETS:  # whose sum is no norm; float64 has room for squares
        low = sum0 < SMALL
        lost = is_finite(sum0) == 0
        if SUMS > 1:
            low = low | (sum1 < SMALL)
            lost = lost | (is_finite(sum1) == 0)
        if SUMS > 2:
            low = low | (sum4 < SMALL)
            lost = lost | (is_finite(sum3) == 0) | (is_finite(sum4) == 0)
        low = tl.max(low.to(tl.int32), 0)
        lost = tl.max(lost.to(tl.int32), 0)
        if low + lost > 0:
            # of both kinds at once, those that are not finite matter
            factor = tl.where(lost != 0, LOWER, RAISE).to(ACC)
            back = tl.where(lost != 0, 2.0**140, 2.0**-200).to(tl.float64)
            again0, again1, again2, again3, again4 = _sums(
                table, chunks, columns, hyper, scalars, origin, factor, P, G, ACC, TERMS, ASCENDS,
                BOTH, LETS, ADVANCE, DIRECTION, RADIUS, ACCUMULATES, STATES, FROM_OLD, READ,
                ADAPTIVE, SEGMENTS, SCALED, CHOOSES, HAS_MASTER, SUMS, CHUNK, LANES)  # fmt: skip
            a = tl.where(lost != 0, is_finite(sum0) == 0, sum0 < SMALL)
            tl.store(mine, _seen_again(sum0, again0, a, back))
            if SUMS > 1:
                b = tl.where(lost != 0, is_finite(sum1) == 0, sum1 < SMALL)
                tl.store(mine + length, _seen_again(sum1, again1, b, back))
            if SUMS > 2:  # the third has a perturbation in it, whose size is another
                f = tl.where(lost != 0, is_finite(sum4) == 0, sum4 < SMALL)
                d = tl.where(lost != 0, is_finite(sum3) == 0, b & f)
                tl.store(mine + 3 * length, _seen_again(sum3, again3, d, back))
                tl.store(mine + 4 * length, _seen_again(sum4, again4, f, back))
    tl.debug_barrier()
    window = program // WINDOW
    first = window * WINDOW
    if (
        tl.atomic_add(arrivals + 1 + window, 1, sem="acq_rel")
        == tl.minimum(WINDOW, programs - first) - 1
    ):
        tl.store(arrivals + 1 + window, 0)
        total0, total1, total2, total3, total4 = _windows(partials, first, programs, SUMS)
        windows = tl.cdiv(programs, WINDOW)
        last = 1
        if windows > 1:
            last = 0
            rows = partials + SUMS * length
            _write(rows + window, _padded(windows), total0, total1, total2, total3, total4, SUMS)
            tl.debug_barrier()
            if tl.atomic_add(arrivals, 1, sem="acq_rel") == windows - 1:
                tl.store(arrivals, 0)
                last = 1
                total0, total1, total2, total3, total4 = _windows(rows, 0, windows, SUMS)
                for others in range(WINDOW, windows, WINDOW):
                    more0, more1, more2, more3, more4 = _windows(rows, others, windows, SUMS)
                    total0 += more0
                    total1 += more1
                    total2 += more2
                    total3 += more3
                    total4 += more4
        if last == 1:
            slots = scalars + SUM0
            total0 = _total(total0, slots, tasks)
            if SUMS > 1:
                total1 = _total(total1, slots + 1, tasks)
            else:
                total1 = total0
            if SUMS > 2:
                total2 = _total(total2, slots + 2, tasks)
                total3 = _total(total3, slots + 3, tasks)
                total4 = _total(total4, slots + 4, tasks)
            else:
                total2 = total0
                total3 = total0
                total4 = total0
            if (tasks & LAST) != 0:
                FINISH(hyper, scalars, total0, total1, total2, total3, total4, tasks, ACCUMULATES,
                       COEFFICIENTS, ADAPTED)  # fmt: skip


@triton.jit(do_not_specialize=["tasks"])
def segments_kernel(partials, ranges, squares, tasks):
    """The first sum, segment by segment: one program adds the partials of one segment.

    Args:
        partials: What ``reduce_kernel`` has left, of one bucket, in float64.
        ranges: Two int64 per segment: the first of its programs, and the one after the last.
        squares: One float64 per segment.
        tasks: Bits of ``layout.Task``: without FIRST the sums are added to.
    """
    segment = tl.program_id(0)
    start = tl.load(ranges + 2 * segment)
    end = tl.load(ranges + 2 * segment + 1)
    part = tl.zeros([WINDOW], tl.float64)
    for first in range(start, end, WINDOW):
        offsets = first + tl.arange(0, WINDOW)
        part += tl.load(partials + offsets, mask=offsets < end, other=0.0)
    total = tl.sum(part)
    if (tasks & FIRST) == 0:
        total += tl.load(squares + segment)
    tl.store(squares + segment, total)


@triton.jit(do_not_specialize=["tasks"])
def finish_kernel(hyper, scalars, tasks, FINISH: tl.constexpr, ACCUMULATES: tl.constexpr,
                  COEFFICIENTS: tl.constexpr, ADAPTED: tl.constexpr,
                  SUMS: tl.constexpr):  # fmt: skip
    """The scalars that follow from sums which were added up over processes; one program."""
    slots = scalars + SUM0
    total0 = tl.load(slots)
    total1 = tl.load(slots + 1) if SUMS > 1 else total0
    total2 = tl.load(slots + 2)
    total3 = tl.load(slots + 3)
    total4 = tl.load(slots + 4)
    FINISH(hyper, scalars, total0, total1, total2, total3, total4, tasks, ACCUMULATES, COEFFICIENTS,
           ADAPTED)  # fmt: skip
