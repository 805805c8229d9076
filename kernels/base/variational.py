"""bSAM's: a mean and a precision for every weight; it takes the first gradient, too."""

from enum import IntEnum

import triton
import triton.language as tl


class Columns(IntEnum):
    LR = 0
    ONE_MINUS_BETA1 = 1
    BETA2 = 2
    ONE_MINUS_BETA2 = 3
    PRIOR = 4  # its precision by the number of examples
    FLOOR = 5  # that, and the damping
    SIGN = 6  # -1 where it maximizes


LR = tl.constexpr(int(Columns.LR))
ONE_MINUS_BETA1 = tl.constexpr(int(Columns.ONE_MINUS_BETA1))
BETA2 = tl.constexpr(int(Columns.BETA2))
ONE_MINUS_BETA2 = tl.constexpr(int(Columns.ONE_MINUS_BETA2))
PRIOR = tl.constexpr(int(Columns.PRIOR))
FLOOR = tl.constexpr(int(Columns.FLOOR))
SIGN = tl.constexpr(int(Columns.SIGN))


@triton.jit
def update(w, u, state, h, step, fresh, squared_norms, first):
    """The weight moves by the old precision, which stays where the new one is not finite."""
    m, s = state[0], state[1]
    u = tl.load(h + SIGN) * u + tl.load(h + PRIOR) * w
    m += tl.load(h + ONE_MINUS_BETA1) * (u - m)
    size = tl.sqrt(s) * tl.abs(first) + tl.load(h + FLOOR)
    later = tl.load(h + BETA2) * s + tl.load(h + ONE_MINUS_BETA2) * size
    later = tl.where(tl.abs(later) < float("inf"), later, s)
    return w - tl.load(h + LR) * m / s, (m, later)
