"""``fastsam.AdaGradNorm``, and LightSAM I's update, which is the same with weight decay."""

from enum import IntEnum

import triton
import triton.language as tl

from ..arithmetic import LARGEST


class Columns(IntEnum):
    LR = 0
    SIGN = 1  # -1 where it maximizes
    WEIGHT_DECAY = 2


LR = tl.constexpr(int(Columns.LR))
SIGN = tl.constexpr(int(Columns.SIGN))
WEIGHT_DECAY = tl.constexpr(int(Columns.WEIGHT_DECAY))


@triton.jit
def update(w, u, state, h, step, fresh, squared_norms):
    lr = tl.load(h + LR)
    sign = tl.load(h + SIGN)
    weight_decay = tl.load(h + WEIGHT_DECAY)
    # in the accumulator's float64; 0 where nothing has been accumulated, every gradient being zero
    scale = (lr * sign).to(tl.float64) / tl.sqrt(squared_norms)
    scale = tl.where(squared_norms == 0, 0.0, scale)
    if w.dtype == tl.float32:  # norms of 1e-38 and less: infinity times a gradient is no step
        scale = tl.where(tl.abs(scale) > LARGEST, LARGEST * sign, scale)
    scale = scale.to(w.dtype)
    return w * (1 - lr * weight_decay) - scale * u, state
