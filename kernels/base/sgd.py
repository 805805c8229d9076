"""``torch.optim.SGD``."""

from enum import IntEnum

import triton
import triton.language as tl

from ..arithmetic import decay


class Columns(IntEnum):
    LR = 0
    MOMENTUM = 1
    ONE_MINUS_DAMPENING = 2
    WEIGHT_DECAY = 3
    NESTEROV = 4
    SIGN = 5  # -1 where it maximizes


LR = tl.constexpr(int(Columns.LR))
MOMENTUM = tl.constexpr(int(Columns.MOMENTUM))
ONE_MINUS_DAMPENING = tl.constexpr(int(Columns.ONE_MINUS_DAMPENING))
WEIGHT_DECAY = tl.constexpr(int(Columns.WEIGHT_DECAY))
NESTEROV = tl.constexpr(int(Columns.NESTEROV))
SIGN = tl.constexpr(int(Columns.SIGN))


@triton.jit
def update(w, u, state, h, step, fresh, squared_norms):
    lr = tl.load(h + LR)
    momentum = tl.load(h + MOMENTUM)
    one_minus_dampening = tl.load(h + ONE_MINUS_DAMPENING)
    weight_decay = tl.load(h + WEIGHT_DECAY)
    nesterov = tl.load(h + NESTEROV)
    sign = tl.load(h + SIGN)
    u = sign * u + decay(weight_decay, w)
    if len(state) > 0:
        # torch starts the buffer with the gradient itself, undampened
        buffer = tl.where(fresh, u, momentum * state[0] + one_minus_dampening * u)
        u = tl.where(nesterov != 0, u + momentum * buffer, buffer)
        state = (buffer,)
    return w - lr * u, state
