"""SAM-SPS's update: plain steps of a size that the descent rule gives."""

from enum import IntEnum

import triton
import triton.language as tl

from ..arithmetic import decay


class Columns(IntEnum):
    LR = 0  # the largest step size
    WEIGHT_DECAY = 1


LR = tl.constexpr(int(Columns.LR))
WEIGHT_DECAY = tl.constexpr(int(Columns.WEIGHT_DECAY))


@triton.jit
def update(w, u, state, h, step, fresh, rate):
    """A step of size 0 leaves the weights alone, whatever ``u`` is."""
    lr = tl.load(h + LR)
    size = tl.where(rate < lr, rate, lr).to(w.dtype)
    return tl.where(size != 0, w - size * (u + decay(tl.load(h + WEIGHT_DECAY), w)), w), state
