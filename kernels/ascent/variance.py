"""Preconditioned SAM: along the gradient, less where a running variance of it is large."""

from enum import IntEnum

import triton
import triton.language as tl

from ..arithmetic import EPS, is_finite


class Columns(IntEnum):
    DAMPING = 0  # divided by the number of elements
    BETA = 1
    ONE_MINUS_BETA = 2


DAMPING = tl.constexpr(int(Columns.DAMPING))
BETA = tl.constexpr(int(Columns.BETA))
ONE_MINUS_BETA = tl.constexpr(int(Columns.ONE_MINUS_BETA))
#: Of the average of squared norms.
PAST = tl.constexpr(0.9)


@triton.jit
def advance(g, state, h):
    variance, mean = state[0], state[1]
    known = mean == mean  # NaN until the first gradient, with which the mean starts
    change = g - tl.where(known, mean, g)
    past = tl.where(known, tl.load(h + BETA) * mean, 0.0)
    new = past + tl.where(known, tl.load(h + ONE_MINUS_BETA), 1.0) * g
    return tl.load(h + BETA) * variance + tl.load(h + ONE_MINUS_BETA) * change * change, new


@triton.jit
def weight(g, state, h):
    """``D``, in [0, 1], from the variance and the average of before this gradient."""
    floor = (state[0] * tl.load(h + DAMPING).to(tl.float64)).to(g.dtype)
    return tl.where(floor > 0, floor / tl.where(floor > 0, state[1] + floor, 1.0), 1.0)


@triton.jit
def direction(g, state, h):
    return weight(g, state, h) * g


@triton.jit
def radius(rho, norm, total, h):
    return tl.where(is_finite(norm) & (norm > 0), rho / (norm + EPS), 0.0)


@triton.jit
def usable(state, norm):
    """A gradient that is not finite would stay in the averages, and so would too large a square."""
    return is_finite(tl.where(is_finite(norm), state[0], float("nan")))


@triton.jit
def accumulate(total, squared_norm):
    return tl.where(is_finite(squared_norm), PAST * total + (1 - PAST) * squared_norm, total)
