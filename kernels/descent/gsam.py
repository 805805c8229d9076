"""GSAM: one of the gradients, and of the other the part that is orthogonal to it."""

from enum import IntEnum

import triton
import triton.language as tl


class Columns(IntEnum):
    ALPHA = 0
    FIRST = 1  # not 0: what is orthogonal to the first gradient, else to the second


ALPHA = tl.constexpr(int(Columns.ALPHA))
FIRST = tl.constexpr(int(Columns.FIRST))


@triton.jit
def coefficients(state, first, second, product, h):
    """``g~ - alpha (g - (q / n~^2) g~)``, or ``g + alpha (g~ - (q / n^2) g)``; 0/0 counts as 0."""
    alpha = tl.load(h + ALPHA).to(tl.float64)
    along_first = tl.load(h + FIRST) != 0
    squared = tl.where(along_first, first, second)
    projection = alpha * tl.where(squared > 0, product / squared, 0.0)
    c = tl.where(along_first, alpha, 1 + projection)
    c1 = tl.where(along_first, 1 - projection, -alpha)
    return c, c1
