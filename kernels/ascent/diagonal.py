"""Preconditioned SAM with a diagonal that a function of the user's has computed."""

import triton
import triton.language as tl

from ..arithmetic import EPS, is_finite


@triton.jit
def direction(g, state, h):
    return state[0] * g


@triton.jit
def radius(rho, norm, total, h):
    return tl.where(is_finite(norm) & (norm > 0), rho / (norm + EPS), 0.0)
