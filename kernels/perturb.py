"""The perturb pass: ``backup <- w``, ``w <- w + e``, in one sweep over all tensors.

Or ``scratch <- w + e`` alone, where a parameter will point at that memory until it is restored.

``e = radius * T^2 * direction``, where ``T`` is ASAM's scale and the rest is the ascent rule's,
from its file in ``ascent/``.
"""

import triton
import triton.language as tl

from .bins import READS, bins_of, hand_over, norm_of_bins, read_bins
from .choice import takes_part
from .layout import Hyper, Scalar
from .noise import draw, noise_key, rounding_key
from .rounding import pass_key, round_weight
from .stream import (
    ASCENT0,
    ASCENT1,
    BACKUP,
    GRAD,
    MASTER,
    NEXT0,
    NEXT1,
    NORM,
    PARAM,
    PERTURBED,
    STATE0,
    all_loads_first,
    hyper_row,
    known_base,
    newest,
    only_if,
    read_chunk,
    stream,
    where_present,
)

RHO = tl.constexpr(int(Hyper.RHO))
IS_ADAPTIVE = tl.constexpr(int(Hyper.ADAPTIVE))
ETA = tl.constexpr(int(Hyper.ETA))
SIGN = tl.constexpr(int(Hyper.SIGN))
ASCENT = tl.constexpr(int(Hyper.ASCENT))
ASCENT_NORM = tl.constexpr(int(Scalar.ASCENT_NORM))
ACCUMULATED = tl.constexpr(int(Scalar.ACCUMULATED))
NEXT_ACCUMULATED = tl.constexpr(int(Scalar.NEXT_ACCUMULATED))
FIRST_INVERSE_SCALE = tl.constexpr(int(Scalar.FIRST_INVERSE_SCALE))


@triton.jit
def element_scale(w, row, ADAPTIVE: tl.constexpr):
    """ASAM's ``T = |w| + eta`` in groups that are adaptive, else 1."""
    if ADAPTIVE:
        return tl.where(tl.load(row + IS_ADAPTIVE) != 0, tl.abs(w) + tl.load(row + ETA), 1.0)
    else:
        return 1.0


@triton.jit
def norm_of(table, columns, tensor, scalars, ACC: tl.constexpr, SEGMENTS: tl.constexpr):
    """The norm that the rule divides by: of everything, or of the tensor's segment."""
    if SEGMENTS:
        squared = tl.load(table + NORM * columns + tensor).to(tl.pointer_type(tl.float64))
        return tl.sqrt(tl.load(squared)).to(ACC)
    else:
        return tl.load(scalars + ASCENT_NORM).to(ACC)


@triton.jit
def length(row, scalars, norm, RADIUS: tl.constexpr, ACCUMULATES: tl.constexpr,
           ACC: tl.constexpr):  # fmt: skip
    """What the direction is multiplied by, in one group."""
    rho = tl.load(row + RHO)
    # a compiler would drop the load where the rule ignores it, the interpreter would not
    total = 0.0 if ACCUMULATES is None else tl.load(scalars + NEXT_ACCUMULATED)
    return RADIUS(rho, norm, total, row + ASCENT).to(ACC)


@triton.jit
def _perturb(table, columns, tensor, start, offsets, mask, row, scalars, origin, bins,
             P: tl.constexpr, G: tl.constexpr, ACC: tl.constexpr, ADVANCE: tl.constexpr,
             DIRECTION: tl.constexpr, RADIUS: tl.constexpr, USABLE: tl.constexpr,
             ACCUMULATES: tl.constexpr, STATES: tl.constexpr, FROM_OLD: tl.constexpr,
             NOISE: tl.constexpr, READ: tl.constexpr, ADAPTIVE: tl.constexpr,
             SEGMENTS: tl.constexpr, BACKS_UP: tl.constexpr, MOVES: tl.constexpr,
             CHOOSES: tl.constexpr, KNOWN: tl.constexpr, HAS_MASTER: tl.constexpr,
             STOCHASTIC: tl.constexpr, ALIGNED: tl.constexpr):  # fmt: skip
    # all addresses, then all loads, then what is computed of them, then all stores: a load after a
    # store would wait for that, and one after a use for everything before it
    param = stream(table, PARAM, columns, tensor, start, P, ALIGNED) + offsets
    grad = stream(table, GRAD, columns, tensor, start, G, ALIGNED) + offsets
    perturbed, copied = param, mask
    if MOVES:
        perturbed = stream(table, PERTURBED, columns, tensor, start, P, ALIGNED) + offsets
        place = tl.load(table + PERTURBED * columns + tensor)
        copied = only_if(place == tl.load(table + PARAM * columns + tensor), mask)
    if HAS_MASTER:  # it is the backup; written to only where it has to follow the parameter
        master = stream(table, MASTER, columns, tensor, start, ACC, ALIGNED) + offsets
    elif BACKS_UP:
        backup = stream(table, BACKUP, columns, tensor, start, P, ALIGNED, origin) + offsets
    if STATES > 0:
        ascent0 = stream(table, ASCENT0, columns, tensor, start, ACC, ALIGNED) + offsets
        next0 = stream(table, NEXT0, columns, tensor, start, ACC, ALIGNED) + offsets
    if STATES > 1:
        ascent1 = stream(table, ASCENT1, columns, tensor, start, ACC, ALIGNED) + offsets
        next1 = stream(table, NEXT1, columns, tensor, start, ACC, ALIGNED) + offsets
    stored = tl.load(param, mask=mask)
    if CHOOSES:  # else it has none to go along
        chosen = only_if(takes_part(table, columns, tensor, scalars, row), mask)
        g = tl.load(grad, mask=chosen, other=0.0)
    elif not NOISE:
        g = tl.load(grad, mask=mask)
    if HAS_MASTER:
        held = tl.load(master, mask=mask)
    state = ()
    if STATES > 0:
        state = state + (tl.load(ascent0, mask=mask),)
    if STATES > 1:
        state = state + (tl.load(ascent1, mask=mask),)
    if READ is not None:
        state0 = stream(table, STATE0, columns, tensor, start, READ, ALIGNED) + offsets
        there = where_present(table, STATE0, columns, tensor, mask)
        read = tl.load(state0, mask=there, other=0.0)
    if KNOWN:
        found = read_bins(bins, KNOWN == 2)
    if ALIGNED:
        all_loads_first()
    if KNOWN:
        norm = norm_of_bins(found, KNOWN == 2).to(ACC)
    else:
        norm = norm_of(table, columns, tensor, scalars, ACC, SEGMENTS)
    scale = length(row, scalars, norm, RADIUS, ACCUMULATES, ACC)
    if NOISE:
        noise = noise_key(table, columns, tensor, scalars)
        g = draw(start + offsets, noise, ACC)
        key = rounding_key(noise) if STOCHASTIC else 0
    else:
        key = pass_key(table, columns, tensor, scalars, 0) if STOCHASTIC else 0
        g = g.to(ACC) * (tl.load(scalars + FIRST_INVERSE_SCALE).to(ACC) * tl.load(row + SIGN))
    w = newest(held, stored, P) if HAS_MASTER else stored.to(ACC)
    new = state
    if STATES > 0:
        new = ADVANCE(g, state, row + ASCENT)
    t = element_scale(w, row, ADAPTIVE)
    seen = state if FROM_OLD else new
    if READ is not None:
        seen = seen + (known_base(table, columns, tensor, read, ACC),)
    if ACCUMULATES is not None:
        seen = (tl.load(scalars + ACCUMULATED),) + seen
    d = DIRECTION(g, seen, row + ASCENT)
    scaled = t * d
    if ADAPTIVE != 2:
        scaled = t * scaled
    e = tl.where(scale != 0, scale * scaled, 0.0)
    if STATES > 0:
        usable = USABLE(new, norm)
        e = tl.where(usable, e, 0.0)
    if HAS_MASTER:
        tl.store(master, w, mask=mask & (w != held))
    elif BACKS_UP:
        tl.store(backup, stored, mask=copied)
    if STATES > 0:
        tl.store(next0, tl.where(usable, new[0], state[0]), mask=mask)
    if STATES > 1:
        tl.store(next1, tl.where(usable, new[1], state[1]), mask=mask)
    tl.store(perturbed, round_weight(w + e, start + offsets, key, P, STOCHASTIC), mask=mask)


@triton.jit(do_not_specialize=["columns", "origin"])
def perturb_kernel(table, chunks, columns, hyper, scalars, origin, P: tl.constexpr,
                   G: tl.constexpr, ACC: tl.constexpr, ADVANCE: tl.constexpr,
                   DIRECTION: tl.constexpr, RADIUS: tl.constexpr, USABLE: tl.constexpr,
                   ACCUMULATES: tl.constexpr, STATES: tl.constexpr,
                   FROM_OLD: tl.constexpr, NOISE: tl.constexpr, READ: tl.constexpr,
                   ADAPTIVE: tl.constexpr, SEGMENTS: tl.constexpr,
                   BACKS_UP: tl.constexpr, MOVES: tl.constexpr, CHOOSES: tl.constexpr,
                   KNOWN: tl.constexpr, HAS_MASTER: tl.constexpr, STOCHASTIC: tl.constexpr,
                   CHUNK: tl.constexpr, LANES: tl.constexpr):  # fmt: skip
    """``e = radius * T^2 * direction``, one chunk per program.

    Args:
        table, chunks: Pointer and chunk tables (``table.py``), int64.
        columns: Number of tensors in the table.
        hyper: Hyper-parameters in ``ACC`` (``layout.Hyper``), one row per group.
        scalars: Device scalars (``layout.Scalar``), float64.
        origin: Address that the table's backups count from.
        P, G, ACC: Dtypes of parameter, gradient and arithmetic.
        ADVANCE, DIRECTION, RADIUS, USABLE, ACCUMULATES: The rule's functions (``ascent/``); None
            for those that it does not have.
        STATES: Number of the rule's state tensors per parameter, which are in ``ACC``.
        FROM_OLD: Whether the direction is given the state of before this gradient.
        NOISE: Whether it is given random numbers in the place of the gradient, which is not read.
        READ: Dtype of the base's state that the rule reads; None where it reads none.
        ADAPTIVE: Whether some group has ASAM's element-wise scale; 2 where it counts once.
        SEGMENTS: Whether the norm is that of the tensor's segment.
        BACKS_UP: Whether the weights are copied; an earlier ascent of the step may have done it.
        MOVES: Whether some parameters will point at other memory, to which their perturbed weights
            go; these are not copied.
        CHOOSES: Whether tensors take part at random.
        KNOWN: Whether the norm is what an update has left (``bins.py``), 1 of float32 alone, 2 with
            float64 among it; else 0.
        HAS_MASTER: Whether the parameters have master weights, in ``ACC``.
        STOCHASTIC: Whether bfloat16 parameters are rounded stochastically.
    """
    tensor, group, index, size, vector = read_chunk(chunks, tl.program_id(0))
    start = index * CHUNK
    row = hyper_row(hyper, group)
    bins = bins_of(scalars, READS) if KNOWN else scalars
    if vector > 0:
        offsets = tl.arange(0, CHUNK)
        _perturb(table, columns, tensor, start, offsets, offsets < vector, row, scalars, origin,
                 bins, P, G, ACC, ADVANCE, DIRECTION, RADIUS, USABLE, ACCUMULATES, STATES, FROM_OLD,
                 NOISE, READ, ADAPTIVE, SEGMENTS, BACKS_UP, MOVES, CHOOSES, KNOWN, HAS_MASTER,
                 STOCHASTIC, True)  # fmt: skip
    for first in range(vector, size, LANES):
        offsets = first + tl.arange(0, LANES)
        _perturb(table, columns, tensor, start, offsets, offsets < size, row, scalars, origin,
                 bins, P, G, ACC, ADVANCE, DIRECTION, RADIUS, USABLE, ACCUMULATES, STATES, FROM_OLD,
                 NOISE, READ, ADAPTIVE, SEGMENTS, BACKS_UP, MOVES, CHOOSES, KNOWN, HAS_MASTER,
                 STOCHASTIC, False)  # fmt: skip
    if KNOWN:
        if tl.program_id(0) == 0:
            hand_over(scalars, KNOWN == 2)
