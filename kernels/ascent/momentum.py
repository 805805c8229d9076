"""MSAM: along the base's momentum, which comes in the place of the gradient."""

from enum import IntEnum

import triton
import triton.language as tl

from ..arithmetic import EPS, is_finite


class Columns(IntEnum):
    AHEAD = 0  # -1, and 1 where the group maximizes: what comes then has its sign changed


AHEAD = tl.constexpr(int(Columns.AHEAD))


@triton.jit
def direction(g, state, h):
    return tl.load(h + AHEAD) * g


@triton.jit
def radius(rho, norm, total, h):
    # a reciprocal, as SAM has: with the quotient itself float64 spills registers
    return tl.where(is_finite(norm) & (norm > 0), rho * (1.0 / (norm + EPS)), 0.0)
