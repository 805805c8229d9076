"""LookSAM's steps with a perturbation: SAM's, which keep what the others add."""

import triton
import triton.language as tl


@triton.jit
def coefficients(state, first, second, product, h):
    """``u = g~``, and kept is the part of it that is orthogonal to ``g``."""
    along = tl.where(first > 0, product / first, 0.0)
    return 1 + 0 * along, 0 * along, 1 + 0 * along, -along
