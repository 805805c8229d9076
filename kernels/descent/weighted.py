"""WSAM coupled, and GNP: both gradients with weights that add up to 1."""

from enum import IntEnum

import triton
import triton.language as tl


class Columns(IntEnum):
    ALPHA = 0
    UNIT = 1  # not 0: the first gradient counts by its direction


ALPHA = tl.constexpr(int(Columns.ALPHA))
UNIT = tl.constexpr(int(Columns.UNIT))


@triton.jit
def coefficients(state, first, second, product, h):
    """``alpha g~ + (1 - alpha) g``, or with ``g / n`` for ``g``; 0 / 0 counts as 0."""
    alpha = tl.load(h + ALPHA).to(tl.float64)
    squared = tl.full([], 0.0, tl.float64) + first
    unit = tl.where(squared > 0, 1 / tl.sqrt(squared), 0.0)
    return alpha, (1 - alpha) * tl.where(tl.load(h + UNIT) != 0, unit, 1.0)
