"""A squared norm that one launch leaves for a later one: MSAM's, of the momentum it updates.

Every program adds the sum of squares of what it has stored, as an integer, by a relaxed atomic.
Sums of integers do not depend on their order. So the result is deterministic, and no program has to
find out whether it is the last one, which would take a fence.

There are bins for ``BIN_BITS`` bits of exponent each. A number is added to the bin of its lowest
bit: 24 bits, and up to ``BIN_BITS`` - 1 zeros below them.

There are two sets of bins. An update adds to one of them; the other one holds the norm of before,
and the next perturbation clears it. Which is which is on the device: perturbations read ``READS``
and write ``ADDS``, updates read ``ADDS`` and write ``READS``. So no launch reads what it writes,
and all launches of a pass agree.
"""

import triton
import triton.language as tl

from .arithmetic import LOWER, RAISE, SMALL, is_finite
from .layout import BIN_BITS, BINS_OF_FLOAT32, INTEGERS, UNIT, Integer, Scalar
from .layout import BINS as COUNT
from .layout import SET as LENGTH
from .stream import STATE0, stream

PLACE = tl.constexpr(INTEGERS)
READS = tl.constexpr(int(Integer.READS))
ADDS = tl.constexpr(int(Integer.ADDS))
SETS = tl.constexpr(int(Integer.SETS))
SET = tl.constexpr(LENGTH)
BITS = tl.constexpr(BIN_BITS)
LAST = tl.constexpr(COUNT - 1)
FIRST32, END32 = map(tl.constexpr, BINS_OF_FLOAT32)
#: From a float64's exponent, as it is stored, to the place of the lowest of its first 24 bits.
TO_PLACE = tl.constexpr(-1023 - 23 - UNIT)
#: Where the highest bit of a sum over bins is put, of 63: there is room for 256 of them.
HIGHEST = tl.constexpr(54)
#: From that bit's place to the exponent of the sum.
TO_EXPONENT = tl.constexpr(1023 + HIGHEST.value - UNIT)
GRAD_NORM = tl.constexpr(int(Scalar.GRAD_NORM))
ASCENT_NORM = tl.constexpr(int(Scalar.ASCENT_NORM))


@triton.jit
def bins_of(scalars, WHICH: tl.constexpr):
    """The set that is read, or added to."""
    integers = (scalars + PLACE).to(tl.pointer_type(tl.int64))
    return integers + SETS + SET * tl.load(integers + WHICH)


# --- adding ---


@triton.jit
def _add(bins, x):
    """Add the first 24 bits of ``x``, which is not negative; if it is not finite, to the last bin.

    What is below the normal numbers of float64 counts as 0.
    """
    bits = x.to(tl.int64, bitcast=True)
    exponent = (bits >> 52) & 0x7FF
    mantissa = ((bits >> 29) & 0x7FFFFF) | 0x800000
    place = exponent + TO_PLACE
    tl.atomic_add(bins + place // BITS, mantissa << (place % BITS), mask=exponent != 0,
                  sem="relaxed")  # fmt: skip


@triton.jit
def _squares_again(table, columns, tensor, start, size, factor, S: tl.constexpr, ACC: tl.constexpr,
                   SQUARES: tl.constexpr, LANES: tl.constexpr):  # fmt: skip
    """The sum over a chunk of what has been stored, multiplied by ``factor``."""
    ROW: tl.constexpr = STATE0 + SQUARES
    lanes = tl.zeros([LANES], ACC)
    for first in range(0, size, LANES):
        offsets = first + tl.arange(0, LANES)
        state = stream(table, ROW, columns, tensor, start, S, False) + offsets
        x = tl.load(state, mask=offsets < size, other=0.0).to(ACC) * factor
        lanes += x * x
    return tl.sum(lanes)


@triton.jit
def add_squares(bins, sum, table, columns, tensor, start, size, S: tl.constexpr, ACC: tl.constexpr,
                SQUARES: tl.constexpr, LANES: tl.constexpr):  # fmt: skip
    """Add a program's sum of squares, in ``ACC``, of the state tensor number ``SQUARES``.

    As a reduction does, it looks at its chunk again where squares may have left float32.
    """
    x = sum.to(tl.float64)
    if ACC == tl.float32:
        lost = is_finite(sum) == 0
        if lost | (sum < SMALL):
            tl.debug_barrier()  # other threads have stored what this one reads
            factor = tl.where(lost, LOWER, RAISE).to(ACC)
            back = tl.where(lost, 2.0**140, 2.0**-200).to(tl.float64)
            again = _squares_again(table, columns, tensor, start, size, factor, S, ACC, SQUARES,
                                   LANES)  # fmt: skip
            x = again.to(tl.float64) * back
        _add(bins, x)
    else:
        for _ in tl.static_range(3):  # 53 bits
            part = (x.to(tl.int64, bitcast=True) & -(1 << 29)).to(tl.float64, bitcast=True)
            _add(bins, part)
            x -= part


# --- reading ---


@triton.jit
def read_bins(bins, ALL: tl.constexpr):
    """All bins that may hold something: those of float64, or of float32."""
    START: tl.constexpr = 0 if ALL else FIRST32
    END: tl.constexpr = LAST if ALL else END32
    found = (tl.load(bins + LAST),)
    for first in tl.static_range(START, END, 32):
        i = first + tl.arange(0, 32)
        found = found + (tl.load(bins + i, mask=i < END, other=0),)
    return found


@triton.jit
def _power(exponent):
    """2 to a power between -1022 and 1023."""
    return ((exponent + 1023).to(tl.int64) << 52).to(tl.float64, bitcast=True)


@triton.jit
def norm_of_bins(found, ALL: tl.constexpr):
    """The norm, of what ``read_bins`` has found: with the same bits as in ``fastsam/step/left.py``.

    Bins are moved to where the highest bit of all is bit ``HIGHEST``, and what is far below it
    drops out.
    """
    START: tl.constexpr = 0 if ALL else FIRST32
    tops = tl.zeros([32], tl.int32)
    for k in tl.static_range(1, len(found)):
        i = START + 32 * (k - 1) + tl.arange(0, 32)
        exponent = (found[k].to(tl.float64).to(tl.int64, bitcast=True) >> 52).to(tl.int32)
        tops = tl.maximum(tops, tl.where(found[k] > 0, exponent + BITS * i, 0))
    top = tl.max(tops)
    moved = tl.zeros([32], tl.int64)
    for k in tl.static_range(1, len(found)):
        i = START + 32 * (k - 1) + tl.arange(0, 32)
        up = 1023 + HIGHEST - top + BITS * i
        raised = found[k] << tl.minimum(tl.maximum(up, 0), 63).to(tl.int64)
        lowered = found[k] >> tl.minimum(tl.maximum(-up, 0), 63).to(tl.int64)
        moved += tl.where(up > 0, raised, lowered)
    total = tl.sum(moved)
    exponent = tl.where(top > 0, top - TO_EXPONENT, 0)
    half = exponent >> 1
    squared = total.to(tl.float64) * _power(half) * _power(exponent - half)
    return tl.sqrt(tl.where(found[0] != 0, float("inf"), squared))


@triton.jit
def hand_over(scalars, ALL: tl.constexpr):
    """One program's work: clear the other set for the update, and store the norm for the step."""
    integers = (scalars + PLACE).to(tl.pointer_type(tl.int64))
    adds = 1 - tl.load(integers + READS)
    for first in tl.static_range(0, SET, 32):
        i = first + tl.arange(0, 32)
        tl.store(integers + SETS + SET * adds + i, tl.zeros([32], tl.int64))
    tl.store(integers + ADDS, adds)
    norm = norm_of_bins(read_bins(bins_of(scalars, READS), ALL), ALL)
    tl.store(scalars + ASCENT_NORM, norm)
    tl.store(scalars + GRAD_NORM, norm)


@triton.jit
def take_over(scalars):
    """One program's work: let the next perturbation read what this launch adds to."""
    integers = (scalars + PLACE).to(tl.pointer_type(tl.int64))
    tl.store(integers + READS, tl.load(integers + ADDS))
