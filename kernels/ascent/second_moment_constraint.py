"""Fisher-SAM with the base's second moment: ``P^2 g``, of the length of ``P g``."""

import triton
import triton.language as tl  # noqa: F401 - Triton's interpreter looks for it

from .second_moment import Columns, radius
from .second_moment import direction as measured

__all__ = ["Columns", "direction", "measured", "radius"]


@triton.jit
def direction(g, state, h):
    return measured(measured(g, state, h), state, h)
