"""The perturb pass: ``backup <- w``, ``w <- w + e``, in one sweep over all tensors.

Also the one place that holds the mathematics of the ascent rules.
"""

import triton
import triton.language as tl

from .layout import Hyper, Scalar
from .stream import BACKUP, GRAD, PARAM, hyper_row, is_finite, narrow, read_chunk, stream

RHO = tl.constexpr(int(Hyper.RHO))
LAM = tl.constexpr(int(Hyper.LAM))
IS_ADAPTIVE = tl.constexpr(int(Hyper.ADAPTIVE))
ETA = tl.constexpr(int(Hyper.ETA))
GRAD_NORM = tl.constexpr(int(Scalar.GRAD_NORM))
EPS = tl.constexpr(1e-12)


@triton.jit
def element_scale(w, row, ADAPTIVE: tl.constexpr):
    """ASAM's ``T = |w| + eta`` in groups that are adaptive, else 1."""
    if ADAPTIVE:
        return tl.where(tl.load(row + IS_ADAPTIVE) != 0, tl.abs(w) + tl.load(row + ETA), 1.0)
    else:
        return 1.0


@triton.jit
def radius_per_norm(row, norm):
    """``rho * (1 - lam + lam / (n + eps))``: SAM at lam = 1, USAM at lam = 0.

    0 where the norm is zero or not finite, so that the perturbation is 0 and never NaN.
    """
    rho = tl.load(row + RHO)
    lam = tl.load(row + LAM)
    scale = rho * (1 - lam + lam / (norm + EPS))
    return tl.where(is_finite(norm) & (norm > 0), scale, 0.0)


@triton.jit
def _perturb(table, columns, tensor, start, offsets, mask, row, scale, P: tl.constexpr,
             G: tl.constexpr, ACC: tl.constexpr, ADAPTIVE: tl.constexpr,
             ALIGNED: tl.constexpr):  # fmt: skip
    param = stream(table, PARAM, columns, tensor, start, P, ALIGNED) + offsets
    grad = stream(table, GRAD, columns, tensor, start, G, ALIGNED) + offsets
    backup = stream(table, BACKUP, columns, tensor, start, P, ALIGNED) + offsets
    stored = tl.load(param, mask=mask)
    g = tl.load(grad, mask=mask).to(ACC)
    tl.store(backup, stored, mask=mask)
    w = stored.to(ACC)
    t = element_scale(w, row, ADAPTIVE)
    e = tl.where(scale != 0, scale * (t * (t * g)), 0.0)
    tl.store(param, narrow(w + e, P), mask=mask)


@triton.jit(do_not_specialize=["columns"])
def perturb_kernel(table, chunks, columns, hyper, scalars, P: tl.constexpr,
                   G: tl.constexpr, ACC: tl.constexpr, ADAPTIVE: tl.constexpr,
                   CHUNK: tl.constexpr, LANES: tl.constexpr):  # fmt: skip
    """``e = rho (1 - lam + lam / (n + eps)) T^2 g``, one chunk per program.

    Args:
        table, chunks: Pointer and chunk tables (``table.py``), int64.
        columns: Number of tensors in the table.
        hyper: Hyper-parameters in ``ACC`` (``layout.Hyper``), one row per group.
        scalars: Device scalars (``layout.Scalar``), float64.
        P, G, ACC: Dtypes of parameter, gradient and arithmetic.
    """
    tensor, group, index, length, vector = read_chunk(chunks, tl.program_id(0))
    start = index * CHUNK
    row = hyper_row(hyper, group)
    scale = radius_per_norm(row, tl.load(scalars + GRAD_NORM).to(ACC))
    if vector > 0:
        offsets = tl.arange(0, CHUNK)
        _perturb(table, columns, tensor, start, offsets, offsets < vector, row, scale, P, G, ACC,
                 ADAPTIVE, True)  # fmt: skip
    for first in range(vector, length, LANES):
        offsets = first + tl.arange(0, LANES)
        _perturb(table, columns, tensor, start, offsets, offsets < length, row, scale, P, G, ACC,
                 ADAPTIVE, False)  # fmt: skip
