"""SAM along the gradient divided by the root of the base's second moment."""

from enum import IntEnum

import triton
import triton.language as tl

from ..arithmetic import EPS, is_finite


class Columns(IntEnum):
    PRECONDITIONS = 0  # 0 while warming up: along the gradient


PRECONDITIONS = tl.constexpr(int(Columns.PRECONDITIONS))
#: Added to the root of the second moment.
ROOT_EPS = tl.constexpr(1e-8)


@triton.jit
def direction(g, state, h):
    v = tl.where(tl.load(h + PRECONDITIONS) != 0, state[0], float("nan"))
    known = v == v  # NaN where there is none yet
    return tl.where(known, g / (tl.sqrt(tl.where(known, v, 1.0)) + ROOT_EPS), g)


@triton.jit
def radius(rho, norm, total, h):
    return tl.where(is_finite(norm) & (norm > 0), rho / (norm + EPS), 0.0)
