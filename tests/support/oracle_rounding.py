"""What the storage types hold: their unit in the last place, and rounding to them."""

import math
from collections.abc import Callable

import numpy as np

Array = np.ndarray
Rounding = Callable[[np.ndarray], np.ndarray]

# Significand bits (the implicit one included) and the exponent of the smallest normal number.
SINGLE, HALF, BRAIN = (24, -126), (11, -14), (8, -126)
FORMATS = {"float64": (53, -1022), "float32": SINGLE, "float16": HALF, "bfloat16": BRAIN}


def ulp(x: Array | float, dtype: str) -> Array:
    """Return the unit in the last place of |x| in `dtype`, never below its smallest subnormal.

    Above the largest finite number the exponent simply continues; inf and NaN give NaN.
    """
    bits, smallest = FORMATS[dtype]
    x = np.asarray(x, dtype=np.float64)
    _, exponent = np.frexp(x)  # |x| = m * 2**exponent with m in [1/2, 1)
    # frexp gives zero the exponent 0, which would make it look like 1/2.
    exponent = np.where(x == 0, smallest, np.maximum(exponent - 1, smallest))
    return np.where(np.isfinite(x), np.ldexp(1.0, exponent - (bits - 1)), np.nan)


def rounding(dtype: str) -> Rounding:
    """Return a function that rounds float64 values to `dtype`, to nearest, ties to even.

    It rounds once, where torch goes from float64 to the 16-bit types through float32, which can
    make a tie of a value just off one. Infinities, NaN, signed zeros and subnormals follow IEEE.
    """
    bits, smallest = FORMATS[dtype]
    if dtype == "float64":
        return lambda x: np.array(x, dtype=np.float64)
    largest = math.ldexp(2.0 - 2.0 ** (1 - bits), 1 - smallest)

    @np.errstate(over="ignore", invalid="ignore")  # float64's largest; signalling NaN
    def round_to(x: Array) -> Array:
        x = np.asarray(x, dtype=np.float64)
        unit = np.where(np.isfinite(x), ulp(x, dtype), 1.0)
        # The unit is a power of two: rint, which breaks ties to even, is the only rounding.
        rounded = np.rint(x / unit) * unit
        # IEEE 754 gives infinity from half a unit beyond the largest number, and so does this.
        return np.where(np.abs(rounded) > largest, np.copysign(np.inf, rounded), rounded)

    return round_to
