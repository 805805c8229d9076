"""The same where the preconditioner scales the constraint: ``D^2 g``, of the length of ``D g``."""

import triton
import triton.language as tl  # noqa: F401 - Triton's interpreter looks for it

from .variance import Columns, accumulate, advance, radius, usable, weight
from .variance import direction as measured

__all__ = ["Columns", "accumulate", "advance", "direction", "measured", "radius", "usable"]


@triton.jit
def direction(g, state, h):
    d = weight(g, state, h)
    return d * (d * g)
