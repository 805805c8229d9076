"""From finished sums to the scalars of a step: one thread's work, at the end of a reduction."""

import triton
import triton.language as tl

from .layout import Hyper, Scalar, Task
from .perturb import ASCENT_NORM, EPS, FIRST_INVERSE_SCALE, NEXT_SQUARED_NORMS
from .stream import is_finite

MAX_GRAD_NORM = tl.constexpr(int(Hyper.MAX_GRAD_NORM))
RATIO = tl.constexpr(int(Hyper.RATIO))
LAM_MIN = tl.constexpr(int(Hyper.LAM_MIN))
LAM_MAX = tl.constexpr(int(Hyper.LAM_MAX))
SMOOTHING = tl.constexpr(int(Hyper.SMOOTHING))
GRAD_NORM = tl.constexpr(int(Scalar.GRAD_NORM))
PERTURBED_GRAD_NORM = tl.constexpr(int(Scalar.PERTURBED_GRAD_NORM))
RENORMALIZATION = tl.constexpr(int(Scalar.RENORMALIZATION))
COEFFICIENT = tl.constexpr(int(Scalar.COEFFICIENT))
FIRST_COEFFICIENT = tl.constexpr(int(Scalar.FIRST_COEFFICIENT))
ACCEPTED = tl.constexpr(int(Scalar.ACCEPTED))
SKIPPED = tl.constexpr(int(Scalar.SKIPPED))
SQUARED_NORMS = tl.constexpr(int(Scalar.SQUARED_NORMS))
ASCENT_SQUARED_NORMS = tl.constexpr(int(Scalar.ASCENT_SQUARED_NORMS))
LAM = tl.constexpr(int(Scalar.LAM))
USED_LAM = tl.constexpr(int(Scalar.USED_LAM))
SHARPNESS = tl.constexpr(int(Scalar.SHARPNESS))
SMOOTHED_SHARPNESS = tl.constexpr(int(Scalar.SMOOTHED_SHARPNESS))
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


@triton.jit
def finish_ascent(scalars, direction_squared, grad_squared, RULE: tl.constexpr):
    """The norms that the perturbation needs."""
    tl.store(scalars + ASCENT_NORM, tl.sqrt(direction_squared))
    tl.store(scalars + GRAD_NORM, tl.sqrt(grad_squared))
    if RULE == "adagrad_norm":
        a = tl.load(scalars + ASCENT_SQUARED_NORMS)
        tl.store(scalars + NEXT_SQUARED_NORMS,
                 tl.where(is_finite(grad_squared), a + grad_squared, a))  # fmt: skip


@triton.jit
def finish_descent(hyper, scalars, measured_squared, plain_squared, sharpness, product,
                   first_squared, tasks, MIX: tl.constexpr):  # fmt: skip
    """From the second gradient's norms, and SAMAR's products, to the coefficients of ``u``."""
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
    if MIX:
        lam = tl.load(scalars + LAM)
        tl.store(scalars + USED_LAM, lam)
        # a first gradient that is not finite stays out of u, as it stayed out of the perturbation
        first = tl.where(is_finite(n), 1 - lam, 0.0)
        coefficient = tl.where(is_finite(n), lam * gamma, gamma)
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
        a = tl.load(scalars + ASCENT_SQUARED_NORMS)
        new = tl.load(scalars + NEXT_SQUARED_NORMS)
        tl.store(scalars + ASCENT_SQUARED_NORMS, tl.where(accepted, new, a))
    if MIX:
        sharpness = sharpness / 2
        tl.store(scalars + SHARPNESS, sharpness)
        if (tasks & ADAPT) != 0:
            # 0 says that nothing was perturbed
            measured_any = accepted & is_finite(sharpness) & is_finite(n) & (sharpness != 0)
            _adapt(hyper, scalars, sharpness, measured_any)


@triton.jit
def _adapt(hyper, scalars, sharpness, valid):
    """SAMAR's lam: multiplied by the clipped ratio of successive sharpness values."""
    ratio = tl.load(hyper + RATIO).to(tl.float64)
    smoothing = tl.load(hyper + SMOOTHING).to(tl.float64)
    lam = tl.load(scalars + LAM)
    old = tl.load(scalars + SMOOTHED_SHARPNESS)
    known = old == old  # NaN before the first measurement
    new = tl.where(known, smoothing * old + (1 - smoothing) * sharpness, sharpness)
    growth = tl.where(old > 0, new / old, tl.where(new > 0, ratio, 1.0))
    growth = tl.minimum(tl.maximum(growth, 1 / ratio), ratio)
    low = tl.load(hyper + LAM_MIN).to(tl.float64)
    high = tl.load(hyper + LAM_MAX).to(tl.float64)
    adapted = tl.minimum(tl.maximum(lam * growth, low), high)
    tl.store(scalars + LAM, tl.where(valid & known, adapted, lam))
    tl.store(scalars + SMOOTHED_SHARPNESS, tl.where(valid, new, old))


@triton.jit
def finish_hypergradient(scalars, total):
    """LETS: the sum is the answer, up to the loss gap that the host's tensors hold."""
    tl.store(scalars + HYPERGRADIENT, total)
