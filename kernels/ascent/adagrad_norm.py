"""LightSAM I: divided by the root of a sum of squared norms."""

import triton
import triton.language as tl

from ..arithmetic import is_finite, over_root


@triton.jit
def direction(g, state, h):
    return g


@triton.jit
def radius(rho, norm, total, h):
    scale = over_root(rho, total)
    return tl.where(is_finite(norm), scale, 0.0)


@triton.jit
def accumulate(total, squared_norm):
    return tl.where(is_finite(squared_norm), total + squared_norm, total)
