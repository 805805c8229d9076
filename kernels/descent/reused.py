"""LookSAM's other steps: the gradient, and along what was kept."""

from enum import IntEnum

import triton
import triton.language as tl


class Columns(IntEnum):
    ALPHA = 0


ALPHA = tl.constexpr(int(Columns.ALPHA))


@triton.jit
def coefficients(state, first, second, product, h):
    """``first`` is the squared norm of what was kept."""
    alpha = tl.load(h + ALPHA).to(tl.float64)
    scale = tl.where(first > 0, alpha * tl.sqrt(second / first), 0.0)
    return 1 + 0 * scale, scale
