"""LightSAM II: divided by the root of a sum of squares, element by element."""

import triton
import triton.language as tl  # noqa: F401 - Triton's interpreter looks for it

from ..arithmetic import is_finite, over_root


@triton.jit
def advance(g, state, h):
    return (state[0] + g * g,)


@triton.jit
def direction(g, state, h):
    return over_root(g, state[0])


@triton.jit
def radius(rho, norm, total, h):
    return rho


@triton.jit
def usable(state, norm):
    """Element by element, as no norm is taken."""
    return is_finite(state[0])
