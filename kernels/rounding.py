"""Stochastic rounding to bfloat16: up or down at random, and right on average.

A perturbation or an update far below a weight's resolution is lost when it is rounded to nearest.
Rounded up with the probability of the distance, it is kept in the mean over the weights.

The random bits are a hash of where they are used: seed and tensor (the table's key), step and pass,
element. Of what noise perturbs they are a hash of what the noise depends on (``noise.py``). So they
are the same however tensors are grouped, and in every backend (``fastsam/backends/rounding.py`` has
the same arithmetic in torch).
"""

import triton
import triton.language as tl

from .arithmetic import is_finite
from .layout import Scalar
from .stream import KEY, narrow

ROUNDING_STEP = tl.constexpr(int(Scalar.ROUNDING_STEP))


@triton.jit
def mix(x):
    """A bijection of 32 bits in which every bit depends on all of them (murmur3's finalizer)."""
    x ^= x >> 16
    x *= tl.full([], 0x85EBCA6B, tl.uint32)
    x ^= x >> 13
    x *= tl.full([], 0xC2B2AE35, tl.uint32)
    return x ^ (x >> 16)


@triton.jit
def pass_key(table, columns, tensor, scalars, PASS: tl.constexpr):
    """What the bits of one tensor in one pass of one step depend on; ``PASS`` is 0 or 1."""
    count = 2 * tl.load(scalars + ROUNDING_STEP) + PASS
    key = tl.load(table + KEY * columns + tensor).to(tl.uint32)
    return mix(key ^ mix(count.to(tl.int64).to(tl.uint32)))


@triton.jit
def round_weight(x, index, key, dtype: tl.constexpr, STOCHASTIC: tl.constexpr):
    """Round to the storage dtype; ``index`` counts the tensor's elements in memory order.

    bfloat16 is the upper half of float32: 16 random bits, added to the lower half before that is
    cut off, carry into the upper one with the right probability.
    """
    if STOCHASTIC and dtype == tl.bfloat16:
        x = x.to(tl.float32)  # from float64 where a gradient is
        bits = x.to(tl.uint32, bitcast=True)
        noise = mix(index.to(tl.uint32) * tl.full([], 0x9E3779B1, tl.uint32) + key) & 0xFFFF
        rounded = ((bits + noise) & 0xFFFF0000).to(tl.float32, bitcast=True)
        x = tl.where(is_finite(x), rounded, x)
    return narrow(x, dtype)
