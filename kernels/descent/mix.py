"""SAMAR: both passes' gradients, mixed by a weight that follows the sharpness."""

from enum import IntEnum

import triton
import triton.language as tl


class Columns(IntEnum):
    RATIO = 0  # SharpnessRatio's c
    LAM_MIN = 1
    LAM_MAX = 2
    SMOOTHING = 3


RATIO = tl.constexpr(int(Columns.RATIO))
LAM_MIN = tl.constexpr(int(Columns.LAM_MIN))
LAM_MAX = tl.constexpr(int(Columns.LAM_MAX))
SMOOTHING = tl.constexpr(int(Columns.SMOOTHING))


@triton.jit
def coefficients(state, first, second, product, h):
    lam = state[0]
    return lam, 1 - lam


@triton.jit
def adapt(state, sharpness, h):
    """lam, multiplied by the clipped ratio of successive (smoothed) values of the sharpness."""
    lam, old = state
    ratio = tl.load(h + RATIO).to(tl.float64)
    smoothing = tl.load(h + SMOOTHING).to(tl.float64)
    known = old == old  # NaN before the first measurement
    new = tl.where(known, smoothing * old + (1 - smoothing) * sharpness, sharpness)
    growth = tl.where(old > 0, new / old, tl.where(new > 0, ratio, 1.0))
    growth = tl.minimum(tl.maximum(growth, 1 / ratio), ratio)
    low = tl.load(h + LAM_MIN).to(tl.float64)
    high = tl.load(h + LAM_MAX).to(tl.float64)
    adapted = tl.minimum(tl.maximum(lam * growth, low), high)
    return tl.where(known, adapted, lam), new
