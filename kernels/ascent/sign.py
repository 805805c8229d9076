"""ASAM with the maximum norm: every weight by a share of itself, in the gradient's direction."""

import triton
import triton.language as tl

from ..arithmetic import is_finite


@triton.jit
def direction(g, state, h):
    """0 where the gradient is, and where it is not finite."""
    sign = tl.where(g > 0, 1.0, tl.where(g < 0, -1.0, 0.0))
    return tl.where(is_finite(g), sign, 0.0)


@triton.jit
def radius(rho, norm, total, h):
    return rho
