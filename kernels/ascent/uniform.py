"""Uniform noise: each element in (-h, h)."""

from enum import IntEnum

import triton
import triton.language as tl


class Columns(IntEnum):
    HALF_WIDTH = 0


HALF_WIDTH = tl.constexpr(int(Columns.HALF_WIDTH))


@triton.jit
def direction(x, state, h):
    return tl.load(h + HALF_WIDTH) * x


@triton.jit
def radius(rho, norm, total, h):
    return rho
