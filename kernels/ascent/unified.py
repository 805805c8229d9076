"""SAM, USAM, and Unified SAM between them: along the gradient, normalised in part."""

from enum import IntEnum

import triton
import triton.language as tl

from ..arithmetic import EPS, is_finite


class Columns(IntEnum):
    LAM = 0  # 1 is SAM, 0 is USAM


LAM = tl.constexpr(int(Columns.LAM))


@triton.jit
def direction(g, state, h):
    return g


@triton.jit
def radius(rho, norm, total, h):
    """0 where the norm gives none, so that e is never NaN."""
    lam = tl.load(h + LAM)
    scale = rho * (1 - lam + lam / (norm + EPS))
    return tl.where(is_finite(norm) & (norm > 0), scale, 0.0)
