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
    return tl.where(is_finite(norm) & (norm > 0), rho / (norm + EPS), 0.0)
