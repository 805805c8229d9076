"""ASAM with the maximum norm and one scale for each parameter."""

import triton
import triton.language as tl  # noqa: F401 - Triton's interpreter looks for it

from .sign import direction as sign
from .sign import radius

__all__ = ["direction", "radius"]


@triton.jit
def direction(g, state, h):
    return state[0] * sign(g, state, h)
