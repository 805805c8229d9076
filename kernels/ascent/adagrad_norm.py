"""LightSAM I: divided by the root of a sum of squared norms."""

import triton
import triton.language as tl

from ..arithmetic import is_finite


@triton.jit
def direction(g, state, h):
    return g


@triton.jit
def radius(rho, norm, total, h):
    # in the accumulator's float64: squares of norms above 1.8e19 leave float32
    scale = (rho.to(tl.float64) / tl.sqrt(total)).to(rho.dtype)
    return tl.where(is_finite(norm) & (total > 0), scale, 0.0)


@triton.jit
def accumulate(total, squared_norm):
    return tl.where(is_finite(squared_norm), total + squared_norm, total)
