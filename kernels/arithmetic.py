"""Small functions that the rules and the walking kernels share."""

import triton
import triton.language as tl

#: Added to a norm before it is divided by.
EPS = tl.constexpr(1e-12)
#: The smallest normal float32.
SMALLEST = tl.constexpr(2.0**-126)
#: The largest float32.
LARGEST = tl.constexpr((2 - 2.0**-23) * 2.0**127)
#: What numbers are multiplied by in a second look: where sums are small, and where they are not
#: finite. The squares' own factors, undone in float64, are 2^200 and 2^-140.
RAISE = tl.constexpr(2.0**100)
LOWER = tl.constexpr(2.0**-70)
#: A sum of squares below this may have lost more than its rounding: 8192 squares, the most that a
#: chunk has, of less than the smallest normal float32 are a part in 2^25 of it.
SMALL = tl.constexpr(2.0**-88)


@triton.jit
def is_finite(x):
    """Whether ``x`` is neither infinite nor NaN."""
    return (x == x) & (tl.abs(x) < float("inf"))


@triton.jit
def over_root(x, second):
    """``x / sqrt(second)``, with the smallest normal float32 for what is below it.

    An average of squares gets there after some 50,000 zero gradients (at a beta of 0.999), and
    NVIDIA's fast square root takes such a number for 0: the quotient would be NaN.
    """
    return x / tl.sqrt(tl.where(second < SMALLEST, SMALLEST, second))


@triton.jit
def decay(weight_decay, w):
    """L2 weight decay; none at all where it is 0, though 0 times an infinite weight is NaN."""
    return tl.where(weight_decay != 0, weight_decay * w, 0.0)


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
