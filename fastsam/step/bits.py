"""Random bits as a hash of where they are used: the same on every backend, and never stored.

The arithmetic of ``kernels/rounding.py`` and ``kernels/noise.py``, bit for bit. In int64, because
torch has few operators for unsigned integers.
"""

from typing import TypeVar

import torch
from torch import Tensor

from fastsam.arithmetic import wide_dtype

LOW = 0xFFFFFFFF
#: Elements at a time: the integers in between take ten times the memory.
SLICE = 1 << 20
Bits = TypeVar("Bits", int, Tensor)


def mix(x: Bits) -> Bits:
    """A bijection of 32 bits in which every bit depends on all of them (murmur3's finalizer)."""
    x = x ^ (x >> 16)
    x = (x * 0x85EBCA6B) & LOW
    x = x ^ (x >> 13)
    x = (x * 0xC2B2AE35) & LOW
    return x ^ (x >> 16)


def tensor_key(seed: int, place: int) -> int:
    """What one tensor's random bits depend on, in every step; 32 bits."""
    return mix(mix(seed) ^ (place * 0x9E3779B1 & LOW))


def noise_key(tensor: int, step: Bits, sample: Bits) -> Bits:
    """What the noise on one tensor depends on, in one perturbation of one step."""
    of_step = mix(mix(step) ^ tensor)
    return mix(of_step ^ mix(sample ^ 0x80000000))


def rounding_key(noise: Bits) -> Bits:
    """What the bits depend on that round what such noise perturbs; from :func:`noise_key`."""
    return mix(noise ^ 0x5851F42D)


def uniform(like: Tensor, key: int | Tensor) -> Tensor:
    """A number in (-1, 1) for every element of ``like``, in the dtype of the arithmetic.

    Elements are counted in the order in which they lie in memory.
    """
    result = torch.empty_like(like, dtype=wide_dtype(like), requires_grad=False)
    if isinstance(key, Tensor):
        key = key.to(like.device)
    start = 0
    for part in torch.split(result.as_strided((result.numel(),), (1,)), SLICE):
        index = torch.arange(start, start + part.numel(), device=like.device)
        bits = mix((index * 0x9E3779B1 + key) & LOW)
        part.copy_(2 * (bits >> 8) - 0xFFFFFF).mul_(2.0**-24)
        start += part.numel()
    return result
