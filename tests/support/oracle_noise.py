"""The noise of Trace-, Det- and Frob-SAM once more, from what it is documented to depend on.

numpy's integers and float64, with none of the library's code.
"""

import numpy as np

#: Giles' single-precision approximation of the inverse error function (2010), times sqrt(2), to
#: nine digits; the highest power first. How near it is to the quantile is in test_universal.py.
CENTRAL = [3.97426023e-08, 4.85462660e-07, -4.98282267e-06, -6.21052811e-06, 3.09120031e-04,
           -1.77303494e-03, -5.90813403e-03, 3.48802661e-01, 2.12331355]  # fmt: skip
TAILS = [-2.83145718e-04, 1.42765648e-04, 1.90825948e-03, -5.19501232e-03, 8.11688967e-03,
         -1.07797881e-02, 1.33485786e-02, 1.41658104, 4.00643424]  # fmt: skip
GOLDEN = 0x9E3779B1  # 2^32 divided by the golden ratio


def scrambled(x):
    """Murmur3's finalizer, of 32-bit numbers."""
    x = np.asarray(x, dtype=np.uint64)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor) % np.uint64(2**32)
    return x


def uniform(seed: int, place: int, step: int, sample: int, shape: tuple[int, ...]) -> np.ndarray:
    """In (-1, 1), of the parameter at ``place``, in the ``sample``-th perturbation of a step."""
    of_tensor = scrambled(int(scrambled(seed)) ^ place * GOLDEN % 2**32)
    of_step = scrambled(int(of_tensor) ^ int(scrambled(step)))
    key = scrambled(int(of_step) ^ int(scrambled(sample ^ 1 << 31)))
    index = np.arange(int(np.prod(shape)), dtype=np.uint64)
    bits = scrambled((index * np.uint64(GOLDEN) + key) % np.uint64(2**32)) >> np.uint64(8)
    return ((2 * bits.astype(np.float64) + 1) / 2**24 - 1).reshape(shape)


def normal(seed: int, place: int, step: int, sample: int, shape: tuple[int, ...]) -> np.ndarray:
    """The same as N(0, 1)."""
    x = uniform(seed, place, step, sample, shape)
    w = -np.log((1 - x) * (1 + x))
    return x * np.where(w < 5, np.polyval(CENTRAL, w - 2.5), np.polyval(TAILS, np.sqrt(w) - 3))
