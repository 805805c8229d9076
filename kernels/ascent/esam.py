"""ESAM: along the gradient of what takes part at random, and the farther the less that is."""

from enum import IntEnum

import triton
import triton.language as tl

from ..arithmetic import EPS, is_finite


class Columns(IntEnum):
    BETA = 0  # the probability: ``choice.py`` reads it


BETA = tl.constexpr(int(Columns.BETA))


@triton.jit
def direction(g, state, h):
    return g


@triton.jit
def radius(rho, norm, total, h):
    scale = rho / (tl.load(h + BETA) * (norm + EPS))
    return tl.where(is_finite(norm) & (norm > 0), scale, 0.0)
