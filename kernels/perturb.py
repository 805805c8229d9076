"""The perturb pass: ``backup <- w``, ``w <- w + e``, in one sweep over all tensors.

Also the one place that holds the mathematics of the ascent rules. A rule is four functions: how a
gradient advances its state, the direction that follows, its length, and what it cannot take:
``e = radius * T^2 * direction``.
"""

import triton
import triton.language as tl

from .layout import Hyper, Scalar
from .rounding import pass_key, round_weight
from .stream import (
    ASCENT0,
    ASCENT1,
    BACKUP,
    GRAD,
    MASTER,
    NEXT0,
    NEXT1,
    PARAM,
    hyper_row,
    is_finite,
    newest,
    read_chunk,
    stream,
)

RHO = tl.constexpr(int(Hyper.RHO))
IS_ADAPTIVE = tl.constexpr(int(Hyper.ADAPTIVE))
ETA = tl.constexpr(int(Hyper.ETA))
ASCENT = tl.constexpr(int(Hyper.ASCENT))
ASCENT_NORM = tl.constexpr(int(Scalar.ASCENT_NORM))
NEXT_SQUARED_NORMS = tl.constexpr(int(Scalar.NEXT_SQUARED_NORMS))
FIRST_INVERSE_SCALE = tl.constexpr(int(Scalar.FIRST_INVERSE_SCALE))
EPS = tl.constexpr(1e-12)
EMA_EPS = tl.constexpr(1e-7)
SMALLEST = tl.constexpr(2.0**-126)


@triton.jit
def element_scale(w, row, ADAPTIVE: tl.constexpr):
    """ASAM's ``T = |w| + eta`` in groups that are adaptive, else 1."""
    if ADAPTIVE:
        return tl.where(tl.load(row + IS_ADAPTIVE) != 0, tl.abs(w) + tl.load(row + ETA), 1.0)
    else:
        return 1.0


@triton.jit
def advance(g, old0, old1, row, RULE: tl.constexpr):
    """The ascent rule's state after this gradient; what a rule does not use passes through."""
    h = row + ASCENT
    if RULE == "ema":
        known = old0 == old0  # NaN until the first gradient, with which the average starts
        past = tl.where(known, tl.load(h) * old0, 0.0)
        return past + tl.where(known, tl.load(h + 1), 1.0) * g, old1
    elif RULE == "adagrad":
        return old0 + g * g, old1
    elif RULE == "adam":
        exp_avg = old0 + tl.load(h) * (g - old0)
        return exp_avg, tl.load(h + 1) * old1 + tl.load(h + 2) * g * g
    else:
        return old0, old1


@triton.jit
def over_root(x, second):
    """``x / sqrt(second)``, with the smallest normal float32 for what is below it.

    An average of squares gets there after some 50,000 zero gradients (at a beta of 0.999), and
    NVIDIA's fast square root takes such a number for 0: the quotient would be NaN.
    """
    return x / tl.sqrt(tl.where(second < SMALLEST, SMALLEST, second))


@triton.jit
def direction(g, state0, state1, RULE: tl.constexpr):
    """The direction of the perturbation, from the new state."""
    if RULE == "ema":
        return state0
    elif RULE == "adagrad":
        return over_root(g, state0)
    elif RULE == "adam":
        return over_root(state0, state1)
    else:
        return g


@triton.jit
def radius(row, scalars, RULE: tl.constexpr, ACC: tl.constexpr):
    """What the direction is multiplied by; 0 where a norm gives none, so that e is never NaN."""
    rho = tl.load(row + RHO)
    norm = tl.load(scalars + ASCENT_NORM).to(ACC)
    if RULE == "unified":  # SAM at lam = 1, USAM at lam = 0
        lam = tl.load(row + ASCENT)
        scale = rho * (1 - lam + lam / (norm + EPS))
        return tl.where(is_finite(norm) & (norm > 0), scale, 0.0)
    elif RULE == "ema":
        return tl.where(is_finite(norm) & (norm > 0), rho / (norm + EMA_EPS), 0.0)
    elif RULE == "adagrad_norm":
        scale = over_root(rho, tl.load(scalars + NEXT_SQUARED_NORMS).to(ACC))
        return tl.where(is_finite(norm), scale, 0.0)
    else:
        return rho


@triton.jit
def is_usable(state0, state1, scalars, RULE: tl.constexpr):
    """Whether the new state may replace the old: a gradient that is not finite would stay in it."""
    if RULE == "ema":
        return is_finite(tl.load(scalars + ASCENT_NORM))
    elif RULE == "adagrad":
        return is_finite(state0)
    else:
        return is_finite(state1)


@triton.jit
def _perturb(table, columns, tensor, start, offsets, mask, row, scalars, origin, scale, key,
             P: tl.constexpr, G: tl.constexpr, ACC: tl.constexpr, RULE: tl.constexpr,
             STATES: tl.constexpr, ADAPTIVE: tl.constexpr, HAS_MASTER: tl.constexpr,
             STOCHASTIC: tl.constexpr, ALIGNED: tl.constexpr):  # fmt: skip
    param = stream(table, PARAM, columns, tensor, start, P, ALIGNED) + offsets
    grad = stream(table, GRAD, columns, tensor, start, G, ALIGNED) + offsets
    stored = tl.load(param, mask=mask)
    g = tl.load(grad, mask=mask).to(ACC) * tl.load(scalars + FIRST_INVERSE_SCALE).to(ACC)
    if HAS_MASTER:  # it is the backup; written to only where it has to follow the parameter
        master = stream(table, MASTER, columns, tensor, start, ACC, ALIGNED) + offsets
        held = tl.load(master, mask=mask)
        w = newest(held, stored, P)
        tl.store(master, w, mask=mask & (w != held))
    else:
        backup = stream(table, BACKUP, columns, tensor, start, P, ALIGNED, origin) + offsets
        tl.store(backup, stored, mask=mask)
        w = stored.to(ACC)
    old0 = g
    old1 = g
    if STATES > 0:
        ascent0 = stream(table, ASCENT0, columns, tensor, start, ACC, ALIGNED) + offsets
        old0 = tl.load(ascent0, mask=mask)
    if STATES > 1:
        ascent1 = stream(table, ASCENT1, columns, tensor, start, ACC, ALIGNED) + offsets
        old1 = tl.load(ascent1, mask=mask)
    new0, new1 = advance(g, old0, old1, row, RULE)
    t = element_scale(w, row, ADAPTIVE)
    e = tl.where(scale != 0, scale * (t * (t * direction(g, new0, new1, RULE))), 0.0)
    if STATES > 0:
        usable = is_usable(new0, new1, scalars, RULE)
        e = tl.where(usable, e, 0.0)
        next0 = stream(table, NEXT0, columns, tensor, start, ACC, ALIGNED) + offsets
        tl.store(next0, tl.where(usable, new0, old0), mask=mask)
        if STATES > 1:
            next1 = stream(table, NEXT1, columns, tensor, start, ACC, ALIGNED) + offsets
            tl.store(next1, tl.where(usable, new1, old1), mask=mask)
    tl.store(param, round_weight(w + e, start + offsets, key, P, STOCHASTIC), mask=mask)


@triton.jit(do_not_specialize=["columns", "origin"])
def perturb_kernel(table, chunks, columns, hyper, scalars, origin, P: tl.constexpr,
                   G: tl.constexpr, ACC: tl.constexpr, RULE: tl.constexpr,
                   STATES: tl.constexpr, ADAPTIVE: tl.constexpr,
                   HAS_MASTER: tl.constexpr, STOCHASTIC: tl.constexpr,
                   CHUNK: tl.constexpr, LANES: tl.constexpr):  # fmt: skip
    """``e = radius * T^2 * direction``, one chunk per program.

    Args:
        table, chunks: Pointer and chunk tables (``table.py``), int64.
        columns: Number of tensors in the table.
        hyper: Hyper-parameters in ``ACC`` (``layout.Hyper``), one row per group.
        scalars: Device scalars (``layout.Scalar``), float64.
        origin: Address that the table's backups count from.
        P, G, ACC: Dtypes of parameter, gradient and arithmetic.
        RULE: ``"unified"``, ``"ema"``, ``"adagrad_norm"``, ``"adagrad"`` or ``"adam"``.
        STATES: Number of the rule's state tensors per parameter, which are in ``ACC``.
        ADAPTIVE: Whether some group has ASAM's element-wise scale.
        HAS_MASTER: Whether the parameters have master weights, in ``ACC``.
        STOCHASTIC: Whether bfloat16 parameters are rounded stochastically.
    """
    tensor, group, index, length, vector = read_chunk(chunks, tl.program_id(0))
    start = index * CHUNK
    row = hyper_row(hyper, group)
    scale = radius(row, scalars, RULE, ACC)
    key = 0
    if STOCHASTIC:
        key = pass_key(table, columns, tensor, scalars, 0)
    if vector > 0:
        offsets = tl.arange(0, CHUNK)
        _perturb(table, columns, tensor, start, offsets, offsets < vector, row, scalars,
                 origin, scale, key, P, G, ACC, RULE, STATES, ADAPTIVE, HAS_MASTER, STOCHASTIC,
                 True)  # fmt: skip
    for first in range(vector, length, LANES):
        offsets = first + tl.arange(0, LANES)
        _perturb(table, columns, tensor, start, offsets, offsets < length, row, scalars,
                 origin, scale, key, P, G, ACC, RULE, STATES, ADAPTIVE, HAS_MASTER, STOCHASTIC,
                 False)  # fmt: skip
