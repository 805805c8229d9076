"""LE-SAM: as far as the loss rises by a given amount, to first order."""

from enum import IntEnum

import triton
import triton.language as tl

from ..arithmetic import EPS, is_finite


class Columns(IntEnum):
    SIGMA = 0


SIGMA = tl.constexpr(int(Columns.SIGMA))


@triton.jit
def direction(g, state, h):
    return g


@triton.jit
def radius(rho, norm, total, h):
    """``rho`` is the largest."""
    length = tl.minimum(tl.load(h + SIGMA) / (norm + EPS), rho)
    return tl.where(is_finite(norm) & (norm > 0), length / (norm + EPS), 0.0)
