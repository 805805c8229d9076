"""ESAM: which tensors take part in a step's perturbation, at random.

A tensor's choice is a hash of the seed and its place (the table's), and of the step. So it is the
same on every rank and in every backend (``fastsam/backends/choice.py``), whatever the tensors are
grouped with.
"""

import triton
import triton.language as tl

from .layout import Hyper
from .rounding import ROUNDING_STEP, mix
from .stream import CHOICE

#: The probability, first of the columns of a rule that chooses.
PROBABILITY = tl.constexpr(int(Hyper.ASCENT))


@triton.jit
def takes_part(table, columns, tensor, scalars, row):
    """Whether the tensor takes part: the upper 24 bits, as a share of all, are below it."""
    count = tl.load(scalars + ROUNDING_STEP).to(tl.int64).to(tl.uint32)
    key = tl.load(table + CHOICE * columns + tensor).to(tl.uint32)
    share = (mix(key ^ mix(count)) >> 8).to(tl.float32) * 5.9604644775390625e-08  # 2^-24
    return share < tl.load(row + PROBABILITY).to(tl.float32)
