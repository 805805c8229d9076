"""``torch.optim.Adam`` and ``AdamW``; a third state tensor is AMSGrad's."""

from enum import IntEnum

import triton
import triton.language as tl

from ..arithmetic import bias_correction, decay


class Columns(IntEnum):
    LR = 0
    ONE_MINUS_BETA1 = 1
    BETA2 = 2
    ONE_MINUS_BETA2 = 3
    LOG_BETA1 = 4
    LOG_BETA2 = 5
    EPS = 6
    WEIGHT_DECAY = 7
    DECOUPLED_WEIGHT_DECAY = 8
    SIGN = 9  # -1 where it maximizes


LR = tl.constexpr(int(Columns.LR))
ONE_MINUS_BETA1 = tl.constexpr(int(Columns.ONE_MINUS_BETA1))
BETA2 = tl.constexpr(int(Columns.BETA2))
ONE_MINUS_BETA2 = tl.constexpr(int(Columns.ONE_MINUS_BETA2))
LOG_BETA1 = tl.constexpr(int(Columns.LOG_BETA1))
LOG_BETA2 = tl.constexpr(int(Columns.LOG_BETA2))
EPS = tl.constexpr(int(Columns.EPS))
WEIGHT_DECAY = tl.constexpr(int(Columns.WEIGHT_DECAY))
DECOUPLED_WEIGHT_DECAY = tl.constexpr(int(Columns.DECOUPLED_WEIGHT_DECAY))
SIGN = tl.constexpr(int(Columns.SIGN))


@triton.jit
def update(w, u, state, h, step, fresh, squared_norms):
    lr = tl.load(h + LR)
    one_minus_beta1 = tl.load(h + ONE_MINUS_BETA1)
    beta2 = tl.load(h + BETA2)
    one_minus_beta2 = tl.load(h + ONE_MINUS_BETA2)
    log_beta1 = tl.load(h + LOG_BETA1)
    log_beta2 = tl.load(h + LOG_BETA2)
    eps = tl.load(h + EPS)
    weight_decay = tl.load(h + WEIGHT_DECAY)
    decoupled_weight_decay = tl.load(h + DECOUPLED_WEIGHT_DECAY)
    sign = tl.load(h + SIGN)
    u = sign * u + decay(weight_decay, w)
    w = w * (1 - lr * decoupled_weight_decay)
    exp_avg = state[0] + one_minus_beta1 * (u - state[0])
    exp_avg_sq = beta2 * state[1] + one_minus_beta2 * u * u
    new, second = (exp_avg, exp_avg_sq), exp_avg_sq
    if len(state) > 2:
        second = tl.maximum(state[2], exp_avg_sq, propagate_nan=tl.PropagateNan.ALL)
        new = (exp_avg, exp_avg_sq, second)
    step_size = lr / bias_correction(log_beta1, step)
    denominator = tl.sqrt(second) / tl.sqrt(bias_correction(log_beta2, step)) + eps
    return w - step_size * (exp_avg / denominator), new
