"""LightSAM III: an average of gradients over the root of an average of squares."""

from enum import IntEnum

import triton
import triton.language as tl

from ..arithmetic import is_finite, over_root


class Columns(IntEnum):
    ONE_MINUS_BETA1 = 0
    BETA2 = 1
    ONE_MINUS_BETA2 = 2


ONE_MINUS_BETA1 = tl.constexpr(int(Columns.ONE_MINUS_BETA1))
BETA2 = tl.constexpr(int(Columns.BETA2))
ONE_MINUS_BETA2 = tl.constexpr(int(Columns.ONE_MINUS_BETA2))


@triton.jit
def advance(g, state, h):
    exp_avg = state[0] + tl.load(h + ONE_MINUS_BETA1) * (g - state[0])
    exp_avg_sq = tl.load(h + BETA2) * state[1] + tl.load(h + ONE_MINUS_BETA2) * g * g
    return exp_avg, exp_avg_sq


@triton.jit
def direction(g, state, h):
    return over_root(state[0], state[1])


@triton.jit
def radius(rho, norm, total, h):
    return rho


@triton.jit
def usable(state, norm):
    """Element by element, as no norm is taken."""
    return is_finite(state[1])
