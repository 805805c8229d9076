"""The update pass: restore, descent rule and base update fused, ``w <- base(backup, u)``.

``u`` is made of the coefficients that the reduction left; the base update is a function, from its
file in ``base/``.
"""

import triton
import triton.language as tl

from .bins import ADDS, add_squares, bins_of, take_over
from .finish import (
    ACCEPTED,
    APART,
    COEFFICIENT,
    FIRST_APART,
    FIRST_COEFFICIENT,
    RATE,
    SQUARED_NORMS,
)
from .layout import Hyper
from .perturb import FIRST_INVERSE_SCALE
from .rounding import pass_key, round_weight
from .stream import (
    ASCENT0,
    ASCENT1,
    BACKUP,
    CHUNKS,
    FIRST_GRAD,
    FRESH,
    GRAD,
    MASTER,
    NEXT0,
    NEXT1,
    PARAM,
    STATE0,
    STATE1,
    STATE2,
    STEP,
    VALIDATION,
    all_loads_first,
    hyper_row,
    narrow,
    newest,
    only_if,
    read_chunk,
    stream,
    where_present,
)

BASE_COLUMNS = tl.constexpr(int(Hyper.BASE))
#: From a group's columns of the base.
LR = tl.constexpr(int(Hyper.LR) - int(Hyper.BASE))
SIGN = tl.constexpr(int(Hyper.SIGN) - int(Hyper.BASE))
COUNTED = tl.constexpr(int(Hyper.COUNTED) - int(Hyper.BASE))


@triton.jit
def _update(table, columns, tensor, start, offsets, mask, h, scalars, origin, count,
            P: tl.constexpr, G: tl.constexpr, S: tl.constexpr, ACC: tl.constexpr,
            UPDATE: tl.constexpr, COUNTS: tl.constexpr, STARTS: tl.constexpr,
            STATES: tl.constexpr, SCALE: tl.constexpr, MIX: tl.constexpr, BESIDE: tl.constexpr,
            KEEPS: tl.constexpr, SKIP: tl.constexpr, BY_NORM: tl.constexpr, BY_RATE: tl.constexpr,
            FIRST: tl.constexpr,
            ASCENT_STATES: tl.constexpr, SQUARES: tl.constexpr, HAS_MASTER: tl.constexpr,
            STOCHASTIC: tl.constexpr, ALIGNED: tl.constexpr):  # fmt: skip
    # all addresses, then all loads, then what is computed of them, then all stores: a load after a
    # store would wait for that, and one after a use for everything before it
    param = stream(table, PARAM, columns, tensor, start, P, ALIGNED) + offsets
    grad = stream(table, GRAD, columns, tensor, start, G, ALIGNED) + offsets
    if HAS_MASTER:
        master = stream(table, MASTER, columns, tensor, start, ACC, ALIGNED) + offsets
        # what was not perturbed in this step may have been written to since the last
        source = tl.load(table + BACKUP * columns + tensor)
        unperturbed = only_if(source != tl.load(table + MASTER * columns + tensor), mask)
    else:
        backup = stream(table, BACKUP, columns, tensor, start, P, ALIGNED, origin) + offsets
    if MIX:
        with_first = where_present(table, FIRST_GRAD, columns, tensor, mask)
        first_grad = stream(table, FIRST_GRAD, columns, tensor, start, G, ALIGNED) + offsets
    if STATES > 0:
        state0 = stream(table, STATE0, columns, tensor, start, S, ALIGNED) + offsets
    if STATES > 1:
        state1 = stream(table, STATE1, columns, tensor, start, S, ALIGNED) + offsets
    if STATES > 2:
        state2 = stream(table, STATE2, columns, tensor, start, S, ALIGNED) + offsets
    w = tl.load(master if HAS_MASTER else backup, mask=mask)
    u = tl.load(grad, mask=mask)
    old = ()
    if STATES > 0:
        old = old + (tl.load(state0, mask=mask),)
    if STATES > 1:
        old = old + (tl.load(state1, mask=mask),)
    if STATES > 2:
        old = old + (tl.load(state2, mask=mask),)
    if MIX:
        g = tl.load(first_grad, mask=with_first, other=0.0)
    if HAS_MASTER:
        stored = tl.load(param, mask=unperturbed)
    if ALIGNED:
        all_loads_first()
    key = pass_key(table, columns, tensor, scalars, 1) if STOCHASTIC else 0
    step = (tl.load(count) + 1).to(ACC) if COUNTS else 0
    fresh = tl.load(table + FRESH * columns + tensor) != 0 if STARTS else False
    if HAS_MASTER:
        w = tl.where(unperturbed, newest(w, stored, P), w)
    w = w.to(ACC)
    second = u.to(ACC)
    u = second
    if SCALE:
        u = tl.load(scalars + COEFFICIENT).to(ACC) * u
    if MIX:
        coefficient = tl.load(scalars + FIRST_COEFFICIENT).to(ACC)
        u += tl.where(coefficient != 0, coefficient * g.to(ACC), 0.0)
    state = ()
    if STATES > 0:
        state = state + (old[0].to(ACC),)
    if STATES > 1:
        state = state + (old[1].to(ACC),)
    if STATES > 2:
        state = state + (old[2].to(ACC),)
    squared_norms = 0.0
    if BY_NORM:  # a compiler would drop the load where it is ignored, the interpreter would not
        squared_norms = tl.load(scalars + SQUARED_NORMS)
    if BY_RATE:
        squared_norms = tl.load(scalars + RATE)
    if FIRST:
        first = g.to(ACC) * tl.load(scalars + FIRST_INVERSE_SCALE).to(ACC)
        new, later = UPDATE(w, u, state, h, step, fresh, squared_norms, first)
    else:
        new, later = UPDATE(w, u, state, h, step, fresh, squared_norms)
    if BESIDE or KEEPS:
        apart = tl.load(scalars + APART).to(ACC)
        first_apart = tl.load(scalars + FIRST_APART).to(ACC)
        change = tl.where(apart != 0, apart * second, 0.0)
        change += tl.where(first_apart != 0, first_apart * g.to(ACC), 0.0)
        if BESIDE:
            new -= tl.load(h + LR) * tl.load(h + SIGN) * change
    new0 = later[0] if STATES > 0 else new
    new1 = later[1] if STATES > 1 else new
    new2 = later[2] if STATES > 2 else new
    if SKIP:
        accepted = tl.load(scalars + ACCEPTED) != 0
        new = tl.where(accepted, new, w)
        if KEEPS:  # what was kept before; lanes that are masked off move nothing
            rejected = only_if(tl.load(scalars + ACCEPTED) == 0, mask)
            rejected = where_present(table, VALIDATION, columns, tensor, rejected)
            kept = stream(table, VALIDATION, columns, tensor, start, G, ALIGNED) + offsets
            before = tl.load(kept, mask=rejected, other=0.0).to(ACC)
            change = tl.where(accepted, change, before)
        if STATES > 0:
            new0 = tl.where(accepted, new0, state[0])
        if STATES > 1:
            new1 = tl.where(accepted, new1, state[1])
        if STATES > 2:
            new2 = tl.where(accepted, new2, state[2])
        # Put the ascent's old state where the new one lies. A parameter that was not perturbed has
        # none, and lanes that are masked off move nothing.
        if ASCENT_STATES > 0:
            rejected = only_if(tl.load(scalars + ACCEPTED) == 0, mask)
            rejected = where_present(table, NEXT0, columns, tensor, rejected)
            ascent0 = stream(table, ASCENT0, columns, tensor, start, ACC, ALIGNED) + offsets
            next0 = stream(table, NEXT0, columns, tensor, start, ACC, ALIGNED) + offsets
            tl.store(next0, tl.load(ascent0, mask=rejected), mask=rejected)
            if ASCENT_STATES > 1:
                ascent1 = stream(table, ASCENT1, columns, tensor, start, ACC, ALIGNED) + offsets
                next1 = stream(table, NEXT1, columns, tensor, start, ACC, ALIGNED) + offsets
                tl.store(next1, tl.load(ascent1, mask=rejected), mask=rejected)
    if KEEPS:
        tl.store(first_grad, narrow(change, G), mask=with_first)
    if HAS_MASTER:
        tl.store(master, new, mask=mask)
    tl.store(param, round_weight(new, start + offsets, key, P, STOCHASTIC), mask=mask)
    if STATES > 0:
        tl.store(state0, narrow(new0, S), mask=mask)
    if STATES > 1:
        tl.store(state1, narrow(new1, S), mask=mask)
    if STATES > 2:
        tl.store(state2, narrow(new2, S), mask=mask)
    if SQUARES is not None:
        left = new0 if SQUARES == 0 else (new1 if SQUARES == 1 else new2)
        left = tl.where(mask, narrow(left, S).to(ACC), 0.0)
        return left * left
    else:
        return 0.0


@triton.jit(do_not_specialize=["columns", "origin"])
def update_kernel(table, chunks, columns, hyper, scalars, arrivals, origin, P: tl.constexpr,
                  G: tl.constexpr, S: tl.constexpr, ACC: tl.constexpr,
                  UPDATE: tl.constexpr, COUNTS: tl.constexpr, STARTS: tl.constexpr,
                  STATES: tl.constexpr, SCALE: tl.constexpr, MIX: tl.constexpr,
                  BESIDE: tl.constexpr, KEEPS: tl.constexpr, SKIP: tl.constexpr,
                  BY_NORM: tl.constexpr, BY_RATE: tl.constexpr, FIRST: tl.constexpr,
                  ASCENT_STATES: tl.constexpr, SQUARES: tl.constexpr,
                  HAS_MASTER: tl.constexpr, STOCHASTIC: tl.constexpr,
                  CHUNK: tl.constexpr, LANES: tl.constexpr):  # fmt: skip
    """Restore, ``u = coefficient * g~ + first coefficient * g``, base update: a chunk per program.

    Args:
        arrivals: One int32 per tensor, zero before and after every launch.
        S: Dtype of the state tensors.
        UPDATE: The base update (``base/``).
        COUNTS: Whether it takes the step count, which is advanced here.
        STARTS: Whether it takes note of state that begins with this gradient.
        STATES: Number of state tensors per parameter.
        SCALE: Whether ``u`` differs from ``g~`` (renormalisation, clipping, a descent rule, a loss
            scale).
        MIX: Whether ``u`` has a part along the first gradient.
        BESIDE: With MIX, whether a part of the update goes past the base.
        KEEPS: With MIX, whether such a part takes the first gradient's place instead.
        SKIP: Whether a step may be rejected on the device.
        BY_NORM: Whether the base update takes the sum of squared norms.
        BY_RATE: Whether it takes the descent rule's step size, in the place of that.
        FIRST: With MIX, whether it takes the first gradient.
        ASCENT_STATES: With SKIP, number of the ascent rule's state tensors, to be rejected too.
        SQUARES: Which of the base's state tensors the next perturbation follows, and needs the norm
            of (``bins.py``); None where it will measure that itself.

    The other arguments are ``perturb_kernel``'s.
    """
    tensor, group, index, size, vector = read_chunk(chunks, tl.program_id(0))
    start = index * CHUNK
    h = hyper_row(hyper, group) + BASE_COLUMNS
    count = table
    if COUNTS:
        count = tl.load(table + STEP * columns + tensor).to(tl.pointer_type(tl.float32))
    if SQUARES is not None:
        bins = bins_of(scalars, ADDS)
        sum = tl.full([], 0.0, ACC)
        lanes = tl.zeros([LANES], ACC)
    if vector > 0:
        offsets = tl.arange(0, CHUNK)
        squares = _update(
            table, columns, tensor, start, offsets, offsets < vector, h, scalars, origin, count,
            P, G, S, ACC, UPDATE, COUNTS, STARTS, STATES, SCALE, MIX, BESIDE, KEEPS, SKIP, BY_NORM,
            BY_RATE, FIRST, ASCENT_STATES, SQUARES, HAS_MASTER, STOCHASTIC, True)  # fmt: skip
        if SQUARES is not None:
            sum += tl.sum(squares)
    for first in range(vector, size, LANES):
        offsets = first + tl.arange(0, LANES)
        squares = _update(
            table, columns, tensor, start, offsets, offsets < size, h, scalars, origin, count,
            P, G, S, ACC, UPDATE, COUNTS, STARTS, STATES, SCALE, MIX, BESIDE, KEEPS, SKIP, BY_NORM,
            BY_RATE, FIRST, ASCENT_STATES, SQUARES, HAS_MASTER, STOCHASTIC, False)  # fmt: skip
        if SQUARES is not None:
            lanes += squares
    if SQUARES is not None:
        if vector < size:
            sum += tl.sum(lanes)
        if tl.load(h + COUNTED) != 0:
            add_squares(bins, sum, table, columns, tensor, start, size, S, ACC, SQUARES, LANES)
        if tl.program_id(0) == 0:
            take_over(scalars)
    if COUNTS:
        # Every chunk of a tensor reads its step count, so only the last to finish may write it. The
        # arrivals order nothing else, and need no fence: a program's stores are computed from the
        # count, so it has been read where they are issued, and the barrier lets the program arrive
        # after all of them. To wait until they are seen by others would cost each a microsecond.
        tl.debug_barrier()
        last = tl.load(table + CHUNKS * columns + tensor) - 1
        if tl.atomic_add(arrivals + tensor, 1, sem="relaxed") == last:
            tl.store(arrivals + tensor, 0)
            before = tl.load(count)
            if SKIP:
                before += tl.where(tl.load(scalars + ACCEPTED) != 0, 1.0, 0.0).to(tl.float32)
            else:
                before += 1
            tl.store(count, before)
