"""LightSAM III's and AdaSAM's: no bias correction, no eps, decoupled weight decay."""

from enum import IntEnum

import triton
import triton.language as tl

from ..arithmetic import over_root


class Columns(IntEnum):
    LR = 0
    ONE_MINUS_BETA1 = 1
    BETA2 = 2
    ONE_MINUS_BETA2 = 3
    WEIGHT_DECAY = 4
    SIGN = 5  # -1 where it maximizes


LR = tl.constexpr(int(Columns.LR))
ONE_MINUS_BETA1 = tl.constexpr(int(Columns.ONE_MINUS_BETA1))
BETA2 = tl.constexpr(int(Columns.BETA2))
ONE_MINUS_BETA2 = tl.constexpr(int(Columns.ONE_MINUS_BETA2))
WEIGHT_DECAY = tl.constexpr(int(Columns.WEIGHT_DECAY))
SIGN = tl.constexpr(int(Columns.SIGN))


@triton.jit
def update(w, u, state, h, step, fresh, squared_norms):
    lr = tl.load(h + LR)
    one_minus_beta1 = tl.load(h + ONE_MINUS_BETA1)
    beta2 = tl.load(h + BETA2)
    one_minus_beta2 = tl.load(h + ONE_MINUS_BETA2)
    weight_decay = tl.load(h + WEIGHT_DECAY)
    u = tl.load(h + SIGN) * u
    exp_avg = state[0] + one_minus_beta1 * (u - state[0])
    exp_avg_sq = beta2 * state[1] + one_minus_beta2 * u * u
    new, second = (exp_avg, exp_avg_sq), exp_avg_sq
    if len(state) > 2:  # AMSGrad's
        second = tl.maximum(state[2], exp_avg_sq, propagate_nan=tl.PropagateNan.ALL)
        new = (exp_avg, exp_avg_sq, second)
    return w * (1 - lr * weight_decay) - lr * over_root(exp_avg, second), new
