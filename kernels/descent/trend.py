"""SAMAR by its other rule: the weight follows two averages of the sharpness, a fast and a slow."""

from enum import IntEnum

import triton
import triton.language as tl

from .mix import coefficients

__all__ = ["Columns", "adapt", "coefficients"]


class Columns(IntEnum):
    LAM = 0  # where both averages are equal
    RATIO = 1  # SharpnessTrend's c
    FAST = 2
    SLOW = 3


LAM = tl.constexpr(int(Columns.LAM))
RATIO = tl.constexpr(int(Columns.RATIO))
FAST = tl.constexpr(int(Columns.FAST))
SLOW = tl.constexpr(int(Columns.SLOW))


@triton.jit
def averaged(old, sharpness, decay):
    """An average with one value more; NaN before the first."""
    return tl.where(old == old, decay * old + (1 - decay) * sharpness, sharpness)


@triton.jit
def adapt(state, sharpness, h):
    """lam at first, times the clipped ratio of both averages."""
    lam, fast, slow = state
    known = slow == slow
    fast = averaged(fast, sharpness, tl.load(h + FAST).to(tl.float64))
    slow = averaged(slow, sharpness, tl.load(h + SLOW).to(tl.float64))
    ratio = tl.load(h + RATIO).to(tl.float64)
    growth = tl.where(slow > 0, fast / slow, tl.where(fast > 0, ratio, 1.0))
    growth = tl.minimum(tl.maximum(growth, 1 / ratio), ratio)
    adapted = tl.load(h + LAM).to(tl.float64) * growth
    return tl.where(known, adapted, lam), fast, slow
