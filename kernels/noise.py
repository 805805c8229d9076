"""Random numbers for perturbations that follow from no gradient: made where they are used.

Nothing of them is stored. A number is a hash of where it is used: seed and tensor (the table's
key), step, perturbation of the step, element. So it is the same however tensors are grouped, and in
every backend (``fastsam/backends/noise.py`` has the same arithmetic in torch).
"""

import triton
import triton.language as tl

from .layout import Scalar
from .rounding import mix
from .stream import KEY

NOISE_STEP = tl.constexpr(int(Scalar.NOISE_STEP))
SAMPLE = tl.constexpr(int(Scalar.SAMPLE))


@triton.jit
def noise_key(table, columns, tensor, scalars):
    """What the numbers of one tensor in one perturbation depend on."""
    step = tl.load(scalars + NOISE_STEP).to(tl.int64).to(tl.uint32)
    sample = tl.load(scalars + SAMPLE).to(tl.int64).to(tl.uint32)
    key = tl.load(table + KEY * columns + tensor).to(tl.uint32)
    # another bit than stochastic rounding has, which hashes the step as well
    return mix(mix(key ^ mix(step)) ^ mix(sample ^ tl.full([], 0x80000000, tl.uint32)))


@triton.jit
def rounding_key(key):
    """What the bits depend on that round what such noise perturbs: in no two perturbations the
    same, nor those of an ascent along a gradient, which may follow in the same step."""
    return mix(key ^ tl.full([], 0x5851F42D, tl.uint32))


@triton.jit
def draw(index, key, dtype: tl.constexpr):
    """Uniform in (-1, 1): odd multiples of 2^-24; ``index`` counts elements in memory order."""
    bits = mix(index.to(tl.uint32) * tl.full([], 0x9E3779B1, tl.uint32) + key)
    return (2 * (bits >> 8).to(tl.int32) - 0xFFFFFF).to(dtype) * 5.9604644775390625e-8
