"""From finished sums to the scalars of a step: one thread's work, at the end of a reduction.

A reduction is given one of the functions whose names begin with ``finish_``, which all take the
same arguments.
"""

import triton
import triton.language as tl

from .arithmetic import EPS, is_finite
from .layout import Hyper, Scalar, Task
from .perturb import ACCUMULATED, ASCENT_NORM, FIRST_INVERSE_SCALE, NEXT_ACCUMULATED

MAX_GRAD_NORM = tl.constexpr(int(Hyper.MAX_GRAD_NORM))
DESCENT = tl.constexpr(int(Hyper.DESCENT))
GRAD_NORM = tl.constexpr(int(Scalar.GRAD_NORM))
PERTURBED_GRAD_NORM = tl.constexpr(int(Scalar.PERTURBED_GRAD_NORM))
RENORMALIZATION = tl.constexpr(int(Scalar.RENORMALIZATION))
COEFFICIENT = tl.constexpr(int(Scalar.COEFFICIENT))
FIRST_COEFFICIENT = tl.constexpr(int(Scalar.FIRST_COEFFICIENT))
ACCEPTED = tl.constexpr(int(Scalar.ACCEPTED))
SKIPPED = tl.constexpr(int(Scalar.SKIPPED))
SQUARED_NORMS = tl.constexpr(int(Scalar.SQUARED_NORMS))
DESCENT0 = tl.constexpr(int(Scalar.DESCENT0))
USED_DESCENT0 = tl.constexpr(int(Scalar.USED_DESCENT0))
SHARPNESS = tl.constexpr(int(Scalar.SHARPNESS))
DESCENT1 = tl.constexpr(int(Scalar.DESCENT1))
DESCENT2 = tl.constexpr(int(Scalar.DESCENT2))
HYPERGRADIENT = tl.constexpr(int(Scalar.HYPERGRADIENT))
INVERSE_SCALE = tl.constexpr(int(Scalar.INVERSE_SCALE))
FOUND_INF = tl.constexpr(int(Scalar.FOUND_INF))
RENORMALIZE = tl.constexpr(int(Task.RENORMALIZE))
CLIP = tl.constexpr(int(Task.CLIP))
SKIP = tl.constexpr(int(Task.SKIP))
ACCUMULATE = tl.constexpr(int(Task.ACCUMULATE))
COMMIT = tl.constexpr(int(Task.COMMIT))
ADAPT = tl.constexpr(int(Task.ADAPT))
SKIP_FIRST = tl.constexpr(int(Task.SKIP_FIRST))
APART = tl.constexpr(int(Scalar.APART))
FIRST_APART = tl.constexpr(int(Scalar.FIRST_APART))
AGREE = tl.constexpr(int(Task.AGREE))
EXACT = tl.constexpr(int(Task.EXACT))
#: How far two sums of squares may be apart that differ by their order alone, relatively: in
#: float32, of which programs add up 1,024 or 8,192 each, and in float64.
APART_BY_ORDER = tl.constexpr(2.0**-18)
APART_BY_ORDER64 = tl.constexpr(2.0**-40)
LOSS = tl.constexpr(int(Scalar.LOSS))
RATE = tl.constexpr(int(Scalar.RATE))
KEPT = tl.constexpr(int(Scalar.KEPT))


@triton.jit
def _store_apart(scalars, found, usable, gamma):
    """What a rule has beside the base, where it has something."""
    if len(found) > 3:
        scale = gamma * tl.load(scalars + INVERSE_SCALE)
        first_scale = tl.load(scalars + FIRST_INVERSE_SCALE)
        tl.store(scalars + APART, tl.where(usable, found[2] * scale, 0.0))
        tl.store(scalars + FIRST_APART, tl.where(usable, found[3] * first_scale, 0.0))


@triton.jit
def finish_ascent(hyper, scalars, direction_squared, grad_squared, sum2, sum3, sum4, tasks,
                  ACCUMULATES: tl.constexpr, COEFFICIENTS: tl.constexpr,
                  ADAPTED: tl.constexpr):  # fmt: skip
    """The norms that the perturbation needs, the rule's accumulator, and what is known of ``u``."""
    if (tasks & AGREE) != 0:
        # so a run that is resumed goes on with the bits of the one that was saved; the number may
        # be of a momentum of before, too, where that differs no more than rounding does
        known = tl.load(scalars + KEPT)
        apart = tl.where((tasks & EXACT) != 0, APART_BY_ORDER64, APART_BY_ORDER)
        agrees = tl.abs(known - direction_squared) < apart * direction_squared
        direction_squared = tl.where(agrees, known, direction_squared)
        grad_squared = direction_squared
    tl.store(scalars + ASCENT_NORM, tl.sqrt(direction_squared))
    tl.store(scalars + GRAD_NORM, tl.sqrt(grad_squared))
    if ACCUMULATES is not None:
        total = tl.load(scalars + ACCUMULATED)
        tl.store(scalars + NEXT_ACCUMULATED, ACCUMULATES(total, grad_squared))
    if COEFFICIENTS is not None:  # which depend on no sums
        state = tl.load(scalars + DESCENT0), tl.load(scalars + DESCENT1), tl.load(scalars + LOSS)
        found = COEFFICIENTS(state, 0.0, 0.0, 0.0, hyper + DESCENT)
        usable = is_finite(grad_squared)
        tl.store(scalars + COEFFICIENT, tl.where(usable, found[0], 1.0))
        tl.store(scalars + FIRST_COEFFICIENT, tl.where(usable, found[1], 0.0))
        _store_apart(scalars, found, usable, 1.0)


@triton.jit
def finish_descent(hyper, scalars, measured_squared, plain_squared, sharpness, product,
                   first_squared, tasks, ACCUMULATES: tl.constexpr, COEFFICIENTS: tl.constexpr,
                   ADAPTED: tl.constexpr, THREE: tl.constexpr = False):  # fmt: skip
    """From the second gradient's norms, and a rule's products, to the coefficients of ``u``.

    ``THREE`` says whether the rule has three scalars, and not two at most.
    """
    measured = tl.sqrt(measured_squared)
    plain = tl.sqrt(plain_squared)
    n = tl.load(scalars + GRAD_NORM)
    gamma = tl.full([], 1.0, tl.float64)
    if (tasks & RENORMALIZE) != 0:
        # n = n~ gives exactly 1, so that SSAM is then SAM bit for bit; so does a non-finite n,
        # where nothing was perturbed and there is no norm to restore
        exact = (n == measured) | (is_finite(n) == 0)
        gamma = tl.where(exact, 1.0, n / (measured + EPS))
    first = tl.full([], 0.0, tl.float64)
    coefficient = gamma
    norm = gamma * plain  # of u
    if COEFFICIENTS is not None:
        used = tl.load(scalars + DESCENT0)
        tl.store(scalars + USED_DESCENT0, used)
        if THREE:
            old = used, tl.load(scalars + DESCENT1), tl.load(scalars + DESCENT2)
        else:
            old = used, tl.load(scalars + DESCENT1)
        state = old + (tl.load(scalars + LOSS),)
        found = COEFFICIENTS(state, first_squared, gamma * gamma * plain_squared, gamma * product,
                             hyper + DESCENT)  # fmt: skip
        if len(found) == 3:
            tl.store(scalars + RATE, found[2])
        # a first gradient that is not finite stays out of u, as it stayed out of the perturbation
        usable = is_finite(n) & is_finite(first_squared)  # n is that of what is perturbed
        coefficient = tl.where(usable, found[0] * gamma, gamma)
        first = tl.where(usable, found[1], 0.0)
        _store_apart(scalars, found, usable, gamma)
        cross = 2 * first * coefficient * product
        squared = coefficient * coefficient * plain_squared + cross
        squared += tl.where(first != 0, first * first * first_squared, 0.0)
        # with g alone or g~ alone there is nothing to cancel, nor NaN from what is left out
        norm = tl.where(first == 0, coefficient * plain, tl.sqrt(tl.maximum(squared, 0.0)))
    clip = tl.full([], 1.0, tl.float64)
    if (tasks & CLIP) != 0:
        clip = tl.load(hyper + MAX_GRAD_NORM).to(tl.float64) / (norm + 1e-6)
        clip = tl.where(clip >= 1, 1.0, clip)  # NaN stays, as in torch
    accepted = is_finite(plain) & (tl.load(scalars + FOUND_INF) == 0)
    accepted = (accepted & (is_finite(n) | ((tasks & SKIP_FIRST) == 0))) | ((tasks & SKIP) == 0)
    tl.store(scalars + PERTURBED_GRAD_NORM, measured)
    tl.store(scalars + RENORMALIZATION, gamma)
    # the gradients that these will multiply carry their loss scales
    clip_scaled = clip * tl.load(scalars + INVERSE_SCALE)
    first_scaled = clip * tl.load(scalars + FIRST_INVERSE_SCALE)
    tl.store(scalars + COEFFICIENT, coefficient * clip_scaled)
    tl.store(scalars + FIRST_COEFFICIENT, first * first_scaled)
    tl.store(scalars + ACCEPTED, accepted.to(tl.float64))
    tl.store(scalars + SKIPPED, tl.load(scalars + SKIPPED) + tl.where(accepted, 0.0, 1.0))
    if (tasks & ACCUMULATE) != 0:
        norm = tl.where(accepted, norm * clip, 0.0)
        b2 = tl.load(scalars + SQUARED_NORMS)
        tl.store(scalars + SQUARED_NORMS, b2 + norm * norm)
    if (tasks & COMMIT) != 0:
        a = tl.load(scalars + ACCUMULATED)
        new = tl.load(scalars + NEXT_ACCUMULATED)
        tl.store(scalars + ACCUMULATED, tl.where(accepted, new, a))
    if COEFFICIENTS is not None:
        sharpness = sharpness / 2
        tl.store(scalars + SHARPNESS, sharpness)
        if ADAPTED is not None:
            if (tasks & ADAPT) != 0:
                # 0 says that nothing was perturbed
                valid = accepted & is_finite(sharpness) & is_finite(n) & (sharpness != 0)
                new = ADAPTED(old, sharpness, hyper + DESCENT)
                tl.store(scalars + DESCENT0, tl.where(valid, new[0], old[0]))
                tl.store(scalars + DESCENT1, tl.where(valid, new[1], old[1]))
                if THREE:
                    tl.store(scalars + DESCENT2, tl.where(valid, new[2], old[2]))


@triton.jit
def finish_three(hyper, scalars, measured_squared, plain_squared, sharpness, product,
                 first_squared, tasks, ACCUMULATES: tl.constexpr, COEFFICIENTS: tl.constexpr,
                 ADAPTED: tl.constexpr):  # fmt: skip
    """The same for a rule with three scalars."""
    finish_descent(hyper, scalars, measured_squared, plain_squared, sharpness, product,
                   first_squared, tasks, ACCUMULATES, COEFFICIENTS, ADAPTED, True)  # fmt: skip


@triton.jit
def finish_rise(hyper, scalars, measured_squared, plain_squared, rise, product, first_squared,
                tasks, ACCUMULATES: tl.constexpr, COEFFICIENTS: tl.constexpr,
                ADAPTED: tl.constexpr):  # fmt: skip
    """The same for a rule that asks for ``<g~, e>``, which takes the place of the product."""
    finish_descent(hyper, scalars, measured_squared, plain_squared, rise, rise, first_squared,
                   tasks, ACCUMULATES, COEFFICIENTS, ADAPTED)  # fmt: skip


@triton.jit
def finish_kept(hyper, scalars, squared, sum1, sum2, sum3, sum4, tasks,
                ACCUMULATES: tl.constexpr, COEFFICIENTS: tl.constexpr,
                ADAPTED: tl.constexpr):  # fmt: skip
    """The squared norm of what a descent rule has kept, for the steps that reuse it."""
    tl.store(scalars + KEPT, squared)


@triton.jit
def finish_reused(hyper, scalars, squared, sum1, sum2, sum3, sum4, tasks,
                  ACCUMULATES: tl.constexpr, COEFFICIENTS: tl.constexpr,
                  ADAPTED: tl.constexpr):  # fmt: skip
    """The coefficients of ``u`` in such a step, where its gradient alone is added up."""
    unknown = tl.full([], 0.0, tl.float64)  # products, which the rule does not ask for
    finish_descent(hyper, scalars, squared, squared, unknown, unknown, tl.load(scalars + KEPT),
                   tasks, ACCUMULATES, COEFFICIENTS, ADAPTED)  # fmt: skip


@triton.jit
def finish_hypergradient(hyper, scalars, total, sum1, sum2, sum3, sum4, tasks,
                         ACCUMULATES: tl.constexpr, COEFFICIENTS: tl.constexpr,
                         ADAPTED: tl.constexpr):  # fmt: skip
    """LETS: the sum is the answer, up to the loss gap that the host's tensors hold."""
    tl.store(scalars + HYPERGRADIENT, total)
