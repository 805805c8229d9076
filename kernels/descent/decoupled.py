"""WSAM decoupled: the base takes the first gradient, and the sharpness's goes past it."""

from enum import IntEnum

import triton
import triton.language as tl


class Columns(IntEnum):
    ALPHA = 0


ALPHA = tl.constexpr(int(Columns.ALPHA))


@triton.jit
def coefficients(state, first, second, product, h):
    """``u = g``, and past the base ``alpha (g~ - g)``."""
    alpha = tl.load(h + ALPHA).to(tl.float64)
    return 0 * alpha, 1 + 0 * alpha, alpha, -alpha
