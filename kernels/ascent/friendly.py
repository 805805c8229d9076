"""FriendlySAM: along what of the gradient is new, beside an average of those before it."""

from enum import IntEnum

import triton
import triton.language as tl

from ..arithmetic import EPS, is_finite


class Columns(IntEnum):
    SIGMA = 0
    LMBDA = 1
    ONE_MINUS_LMBDA = 2


SIGMA = tl.constexpr(int(Columns.SIGMA))
LMBDA = tl.constexpr(int(Columns.LMBDA))
ONE_MINUS_LMBDA = tl.constexpr(int(Columns.ONE_MINUS_LMBDA))


@triton.jit
def advance(g, state, h):
    old = state[0]
    known = old == old  # NaN until the first gradient, with which the average starts
    past = tl.where(known, tl.load(h + LMBDA) * old, 0.0)
    return (past + tl.where(known, tl.load(h + ONE_MINUS_LMBDA), 1.0) * g,)


@triton.jit
def direction(g, state, h):
    """From the average before this gradient."""
    old = state[0]
    return g - tl.where(old == old, tl.load(h + SIGMA) * old, 0.0)


@triton.jit
def radius(rho, norm, total, h):
    return tl.where(is_finite(norm) & (norm > 0), rho / (norm + EPS), 0.0)


@triton.jit
def usable(state, norm):
    """A gradient that is not finite would stay in the average."""
    return is_finite(norm)
