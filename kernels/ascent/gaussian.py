"""bSAM's samples: Gaussian noise by the precision, element by element."""

from enum import IntEnum

import triton
import triton.language as tl

from .normal import direction as quantile


class Columns(IntEnum):
    N = 0


N = tl.constexpr(int(Columns.N))


@triton.jit
def direction(x, state, h):
    """The precision is 1 before the first step."""
    s = tl.where(state[0] == state[0], state[0], 1.0)
    return quantile(x, state, h) / tl.sqrt(tl.load(h + N) * s)


@triton.jit
def radius(rho, norm, total, h):
    return tl.full([], 1.0, tl.float32)
