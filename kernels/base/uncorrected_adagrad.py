"""LightSAM II's: no eps, decoupled weight decay."""

from enum import IntEnum

import triton
import triton.language as tl

from ..arithmetic import over_root


class Columns(IntEnum):
    LR = 0
    WEIGHT_DECAY = 1
    SIGN = 2  # -1 where it maximizes


LR = tl.constexpr(int(Columns.LR))
WEIGHT_DECAY = tl.constexpr(int(Columns.WEIGHT_DECAY))
SIGN = tl.constexpr(int(Columns.SIGN))


@triton.jit
def update(w, u, state, h, step, fresh, squared_norms):
    lr = tl.load(h + LR)
    weight_decay = tl.load(h + WEIGHT_DECAY)
    u = tl.load(h + SIGN) * u
    total = state[0] + u * u
    return w * (1 - lr * weight_decay) - lr * over_root(u, total), (total,)
