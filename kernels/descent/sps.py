"""SAM-SPS: the second gradient, and a step size from the loss and its slope."""

from enum import IntEnum

import triton
import triton.language as tl


class Columns(IntEnum):
    LOSS_MIN = 0


LOSS_MIN = tl.constexpr(int(Columns.LOSS_MIN))


@triton.jit
def coefficients(state, first, second, product, h):
    """``c = 1``, ``c1 = 0`` and ``[loss - loss_min - <g~, e>]+ / n~^2``, 0 where that is NaN."""
    gap = state[2] - tl.load(h + LOSS_MIN).to(tl.float64) - product
    rate = tl.where(gap < 0, 0.0, gap) / second  # NaN stays
    rate = tl.where(rate == rate, rate, 0.0)
    zero = tl.full([], 0.0, tl.float64)
    return zero + 1, zero, rate
