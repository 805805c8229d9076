"""``torch.optim.Adagrad``."""

from enum import IntEnum

import triton
import triton.language as tl

from ..arithmetic import decay


class Columns(IntEnum):
    LR = 0
    LR_DECAY = 1
    EPS = 2
    WEIGHT_DECAY = 3
    SIGN = 4  # -1 where it maximizes


LR = tl.constexpr(int(Columns.LR))
LR_DECAY = tl.constexpr(int(Columns.LR_DECAY))
EPS = tl.constexpr(int(Columns.EPS))
WEIGHT_DECAY = tl.constexpr(int(Columns.WEIGHT_DECAY))
SIGN = tl.constexpr(int(Columns.SIGN))


@triton.jit
def update(w, u, state, h, step, fresh, squared_norms):
    lr = tl.load(h + LR)
    lr_decay = tl.load(h + LR_DECAY)
    eps = tl.load(h + EPS)
    weight_decay = tl.load(h + WEIGHT_DECAY)
    sign = tl.load(h + SIGN)
    u = sign * u + decay(weight_decay, w)
    total = state[0] + u * u
    step_size = lr / (1 + (step - 1) * lr_decay)
    return w - step_size * (u / (tl.sqrt(total) + eps)), (total,)
