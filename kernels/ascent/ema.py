"""VaSSO: along an average of the gradients."""

from enum import IntEnum

import triton
import triton.language as tl

from ..arithmetic import is_finite


class Columns(IntEnum):
    ONE_MINUS_THETA = 0
    THETA = 1


ONE_MINUS_THETA = tl.constexpr(int(Columns.ONE_MINUS_THETA))
THETA = tl.constexpr(int(Columns.THETA))
EPS = tl.constexpr(1e-7)


@triton.jit
def advance(g, state, h):
    old = state[0]
    known = old == old  # NaN until the first gradient, with which the average starts
    past = tl.where(known, tl.load(h + ONE_MINUS_THETA) * old, 0.0)
    return (past + tl.where(known, tl.load(h + THETA), 1.0) * g,)


@triton.jit
def direction(g, state, h):
    return state[0]


@triton.jit
def radius(rho, norm, total, h):
    return tl.where(is_finite(norm) & (norm > 0), rho / (norm + EPS), 0.0)


@triton.jit
def usable(state, norm):
    """A gradient that is not finite would stay in the average."""
    return is_finite(norm)
