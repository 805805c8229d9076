"""The update pass: restore, descent rule and base update fused, ``w <- base(backup, u)``.

Also the one place that holds the mathematics of the base updates, each with the semantics of
its ``torch.optim`` namesake. A base function takes the restored weight, the gradient ``u`` and
the old state, and returns the new weight and state; unused states pass through.
"""

import triton
import triton.language as tl

from .finish import ACCEPTED, COEFFICIENT, FIRST_COEFFICIENT, SQUARED_NORMS
from .layout import Hyper
from .perturb import over_root
from .rounding import pass_key, round_weight
from .stream import (
    ASCENT0,
    ASCENT1,
    BACKUP,
    CHUNKS,
    FIRST_GRAD,
    FRESH,
    GRAD,
    MASTER,
    NEXT0,
    NEXT1,
    PARAM,
    STATE0,
    STATE1,
    STATE2,
    STEP,
    hyper_row,
    narrow,
    newest,
    only_if,
    read_chunk,
    stream,
    where_present,
)

BASE_COLUMNS = tl.constexpr(int(Hyper.BASE))


@triton.jit
def decay(weight_decay, w):
    """L2 weight decay; none at all where it is 0, though 0 times an infinite weight is NaN."""
    return tl.where(weight_decay != 0, weight_decay * w, 0.0)


@triton.jit
def sgd(w, u, momentum_buffer, h, fresh, MOMENTUM: tl.constexpr):
    lr = tl.load(h)
    momentum = tl.load(h + 1)
    one_minus_dampening = tl.load(h + 2)
    weight_decay = tl.load(h + 3)
    nesterov = tl.load(h + 4)
    sign = tl.load(h + 5)
    u = sign * u + decay(weight_decay, w)
    if MOMENTUM:
        # torch starts the buffer with the gradient itself, undampened
        momentum_buffer = tl.where(fresh, u, momentum * momentum_buffer + one_minus_dampening * u)
        u = tl.where(nesterov != 0, u + momentum * momentum_buffer, momentum_buffer)
    return w - lr * u, momentum_buffer


@triton.jit
def bias_correction(log_beta, step):
    """``1 - beta^step``, without the cancellation that costs float32 four digits at step 1.

    Near 0 it is the series of ``-expm1(x)``, whose 15 terms reach float64 precision at 1/2.
    """
    x = log_beta * step
    near = tl.maximum(x, -0.5)
    series = near * 0 + 1
    for term in tl.static_range(15, 1, -1):
        series = 1 + series * near / term
    return tl.where(x > -0.5, -near * series, 1 - tl.exp(x))


@triton.jit
def adam(w, u, exp_avg, exp_avg_sq, max_exp_avg_sq, h, step, AMSGRAD: tl.constexpr):
    lr = tl.load(h)
    one_minus_beta1 = tl.load(h + 1)
    beta2 = tl.load(h + 2)
    one_minus_beta2 = tl.load(h + 3)
    log_beta1 = tl.load(h + 4)
    log_beta2 = tl.load(h + 5)
    eps = tl.load(h + 6)
    weight_decay = tl.load(h + 7)
    decoupled_weight_decay = tl.load(h + 8)
    sign = tl.load(h + 9)
    u = sign * u + decay(weight_decay, w)
    w = w * (1 - lr * decoupled_weight_decay)
    exp_avg += one_minus_beta1 * (u - exp_avg)
    exp_avg_sq = beta2 * exp_avg_sq + one_minus_beta2 * u * u
    second = exp_avg_sq
    if AMSGRAD:
        max_exp_avg_sq = tl.maximum(max_exp_avg_sq, exp_avg_sq, propagate_nan=tl.PropagateNan.ALL)
        second = max_exp_avg_sq
    step_size = lr / bias_correction(log_beta1, step)
    denominator = tl.sqrt(second) / tl.sqrt(bias_correction(log_beta2, step)) + eps
    return w - step_size * (exp_avg / denominator), exp_avg, exp_avg_sq, max_exp_avg_sq


@triton.jit
def adagrad(w, u, total, h, step):
    lr = tl.load(h)
    lr_decay = tl.load(h + 1)
    eps = tl.load(h + 2)
    weight_decay = tl.load(h + 3)
    sign = tl.load(h + 4)
    u = sign * u + decay(weight_decay, w)
    total += u * u
    step_size = lr / (1 + (step - 1) * lr_decay)
    return w - step_size * (u / (tl.sqrt(total) + eps)), total


@triton.jit
def adagrad_norm(w, u, h, squared_norms):
    lr = tl.load(h)
    sign = tl.load(h + 1)
    weight_decay = tl.load(h + 2)
    # in the accumulator's float64; 0 where nothing has been accumulated, every gradient being zero
    scale = (lr * sign).to(tl.float64) / tl.sqrt(squared_norms)
    scale = tl.where(squared_norms == 0, 0.0, scale).to(w.dtype)
    return w * (1 - lr * weight_decay) - scale * u


@triton.jit
def uncorrected_adam(w, u, exp_avg, exp_avg_sq, max_exp_avg_sq, h, AMSGRAD: tl.constexpr):
    """LightSAM's and AdaSAM's: no bias correction, no eps, decoupled weight decay."""
    lr = tl.load(h)
    one_minus_beta1 = tl.load(h + 1)
    beta2 = tl.load(h + 2)
    one_minus_beta2 = tl.load(h + 3)
    weight_decay = tl.load(h + 4)
    exp_avg += one_minus_beta1 * (u - exp_avg)
    exp_avg_sq = beta2 * exp_avg_sq + one_minus_beta2 * u * u
    second = exp_avg_sq
    if AMSGRAD:
        max_exp_avg_sq = tl.maximum(max_exp_avg_sq, exp_avg_sq, propagate_nan=tl.PropagateNan.ALL)
        second = max_exp_avg_sq
    w = w * (1 - lr * weight_decay) - lr * over_root(exp_avg, second)
    return w, exp_avg, exp_avg_sq, max_exp_avg_sq


@triton.jit
def uncorrected_adagrad(w, u, total, h):
    lr = tl.load(h)
    weight_decay = tl.load(h + 1)
    total += u * u
    return w * (1 - lr * weight_decay) - lr * over_root(u, total), total


@triton.jit
def _update(table, columns, tensor, start, offsets, mask, h, scalars, origin, counter, key,
            P: tl.constexpr, G: tl.constexpr, S: tl.constexpr, ACC: tl.constexpr,
            BASE: tl.constexpr, STATES: tl.constexpr, SCALE: tl.constexpr, MIX: tl.constexpr,
            SKIP: tl.constexpr, ASCENT_STATES: tl.constexpr, HAS_MASTER: tl.constexpr,
            STOCHASTIC: tl.constexpr, ALIGNED: tl.constexpr):  # fmt: skip
    param = stream(table, PARAM, columns, tensor, start, P, ALIGNED) + offsets
    grad = stream(table, GRAD, columns, tensor, start, G, ALIGNED) + offsets
    if HAS_MASTER:
        master = stream(table, MASTER, columns, tensor, start, ACC, ALIGNED) + offsets
        w = tl.load(master, mask=mask)
        # what was not perturbed in this step may have been written to since the last
        backup = tl.load(table + BACKUP * columns + tensor)
        unperturbed = only_if(backup != tl.load(table + MASTER * columns + tensor), mask)
        stored = tl.load(param, mask=unperturbed)
        w = tl.where(unperturbed, newest(w, stored, P), w)
    else:
        backup = stream(table, BACKUP, columns, tensor, start, P, ALIGNED, origin) + offsets
        w = tl.load(backup, mask=mask).to(ACC)
    u = tl.load(grad, mask=mask).to(ACC)
    if SCALE:
        u = tl.load(scalars + COEFFICIENT).to(ACC) * u
    if MIX:
        coefficient = tl.load(scalars + FIRST_COEFFICIENT).to(ACC)
        with_first = where_present(table, FIRST_GRAD, columns, tensor, mask)
        first_grad = stream(table, FIRST_GRAD, columns, tensor, start, G, ALIGNED) + offsets
        g = tl.load(first_grad, mask=with_first, other=0.0).to(ACC)
        u += tl.where(coefficient != 0, coefficient * g, 0.0)
    s0 = u
    s1 = u
    s2 = u
    if STATES > 0:
        state0 = stream(table, STATE0, columns, tensor, start, S, ALIGNED) + offsets
        s0 = tl.load(state0, mask=mask).to(ACC)
    if STATES > 1:
        state1 = stream(table, STATE1, columns, tensor, start, S, ALIGNED) + offsets
        s1 = tl.load(state1, mask=mask).to(ACC)
    if STATES > 2:
        state2 = stream(table, STATE2, columns, tensor, start, S, ALIGNED) + offsets
        s2 = tl.load(state2, mask=mask).to(ACC)
    new0 = s0
    new1 = s1
    new2 = s2
    if BASE == "sgd":
        new, new0 = sgd(w, u, s0, h, counter, STATES > 0)
    elif BASE == "adam":
        new, new0, new1, new2 = adam(w, u, s0, s1, s2, h, counter, STATES > 2)
    elif BASE == "adagrad":
        new, new0 = adagrad(w, u, s0, h, counter)
    elif BASE == "uncorrected_adam":
        new, new0, new1, new2 = uncorrected_adam(w, u, s0, s1, s2, h, STATES > 2)
    elif BASE == "uncorrected_adagrad":
        new, new0 = uncorrected_adagrad(w, u, s0, h)
    else:
        tl.static_assert(BASE == "adagrad_norm")
        new = adagrad_norm(w, u, h, tl.load(scalars + SQUARED_NORMS))
    if SKIP:
        accepted = tl.load(scalars + ACCEPTED) != 0
        new = tl.where(accepted, new, w)
        new0 = tl.where(accepted, new0, s0)
        new1 = tl.where(accepted, new1, s1)
        new2 = tl.where(accepted, new2, s2)
        # Put the ascent's old state where the new one lies. A parameter that was not perturbed has
        # none, and lanes that are masked off move nothing.
        if ASCENT_STATES > 0:
            rejected = only_if(tl.load(scalars + ACCEPTED) == 0, mask)
            rejected = where_present(table, NEXT0, columns, tensor, rejected)
            ascent0 = stream(table, ASCENT0, columns, tensor, start, ACC, ALIGNED) + offsets
            next0 = stream(table, NEXT0, columns, tensor, start, ACC, ALIGNED) + offsets
            tl.store(next0, tl.load(ascent0, mask=rejected), mask=rejected)
            if ASCENT_STATES > 1:
                ascent1 = stream(table, ASCENT1, columns, tensor, start, ACC, ALIGNED) + offsets
                next1 = stream(table, NEXT1, columns, tensor, start, ACC, ALIGNED) + offsets
                tl.store(next1, tl.load(ascent1, mask=rejected), mask=rejected)
    if HAS_MASTER:
        tl.store(master, new, mask=mask)
    tl.store(param, round_weight(new, start + offsets, key, P, STOCHASTIC), mask=mask)
    if STATES > 0:
        tl.store(state0, narrow(new0, S), mask=mask)
    if STATES > 1:
        tl.store(state1, narrow(new1, S), mask=mask)
    if STATES > 2:
        tl.store(state2, narrow(new2, S), mask=mask)


@triton.jit(do_not_specialize=["columns", "origin"])
def update_kernel(table, chunks, columns, hyper, scalars, arrivals, origin, P: tl.constexpr,
                  G: tl.constexpr, S: tl.constexpr, ACC: tl.constexpr,
                  BASE: tl.constexpr, STATES: tl.constexpr, SCALE: tl.constexpr,
                  MIX: tl.constexpr, SKIP: tl.constexpr, ASCENT_STATES: tl.constexpr,
                  HAS_MASTER: tl.constexpr, STOCHASTIC: tl.constexpr,
                  CHUNK: tl.constexpr, LANES: tl.constexpr):  # fmt: skip
    """Restore, ``u = coefficient * g~ + first coefficient * g``, base update: a chunk per program.

    Args:
        arrivals: One int32 per tensor, zero before and after every launch.
        S: Dtype of the state tensors.
        BASE: ``"sgd"``, ``"adam"``, ``"adagrad"``, ``"adagrad_norm"``, ``"uncorrected_adam"`` or
            ``"uncorrected_adagrad"``.
        STATES: Number of state tensors per parameter.
        SCALE: Whether ``u`` differs from ``g~`` (renormalisation, clipping, SAMAR, a loss scale).
        MIX: Whether ``u`` has a part along the first gradient (SAMAR).
        SKIP: Whether a step may be rejected on the device.
        ASCENT_STATES: With SKIP, number of the ascent rule's state tensors, to be rejected too.

    The other arguments are ``perturb_kernel``'s.
    """
    tensor, group, index, length, vector = read_chunk(chunks, tl.program_id(0))
    start = index * CHUNK
    h = hyper_row(hyper, group) + BASE_COLUMNS
    counter = 0
    COUNTS: tl.constexpr = BASE == "adam" or BASE == "adagrad"
    if COUNTS:
        count = tl.load(table + STEP * columns + tensor).to(tl.pointer_type(tl.float32))
        step = tl.load(count)
        counter = (step + 1).to(ACC)
    if BASE == "sgd" and STATES > 0:
        counter = tl.load(table + FRESH * columns + tensor) != 0
    key = 0
    if STOCHASTIC:
        key = pass_key(table, columns, tensor, scalars, 1)
    if vector > 0:
        offsets = tl.arange(0, CHUNK)
        _update(table, columns, tensor, start, offsets, offsets < vector, h, scalars, origin,
                counter, key, P, G, S, ACC, BASE, STATES, SCALE, MIX, SKIP, ASCENT_STATES,
                HAS_MASTER, STOCHASTIC, True)  # fmt: skip
    for first in range(vector, length, LANES):
        offsets = first + tl.arange(0, LANES)
        _update(table, columns, tensor, start, offsets, offsets < length, h, scalars, origin,
                counter, key, P, G, S, ACC, BASE, STATES, SCALE, MIX, SKIP, ASCENT_STATES,
                HAS_MASTER, STOCHASTIC, False)  # fmt: skip
    if COUNTS:
        # Every chunk of a tensor reads its step count, so only the last to finish may write it;
        # the barrier keeps this program's own reads ahead of its arrival.
        tl.debug_barrier()
        last = tl.load(table + CHUNKS * columns + tensor) - 1
        if tl.atomic_add(arrivals + tensor, 1, sem="acq_rel") == last:
            tl.store(arrivals + tensor, 0)
            if SKIP:
                step += tl.where(tl.load(scalars + ACCEPTED) != 0, 1.0, 0.0).to(tl.float32)
            else:
                step += 1
            tl.store(count, step)
