"""The same where the diagonal scales the constraint: ``D^2 g``, of the length of ``D g``."""

import triton
import triton.language as tl  # noqa: F401 - Triton's interpreter looks for it

from .diagonal import direction as measured
from .diagonal import radius

__all__ = ["direction", "measured", "radius"]


@triton.jit
def direction(g, state, h):
    return state[0] * (state[0] * g)
