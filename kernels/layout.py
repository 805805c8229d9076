"""Where each number lives in the device tables that the kernels read.

Plain integers, shared by the host code that fills the tables and the kernels that index them.
"""

from enum import IntEnum, IntFlag

#: Elements per program. Perturb and update keep up to seven streams in registers, so they take
#: small chunks; a reduction keeps one or two and amortises its final atomic over a large one.
CHUNK = 1024
REDUCE_CHUNK = 8192
#: Threads per program, and elements per step of the scalar path: one per thread. In warps that is
#: 4 and 8 on NVIDIA, 2 and 4 on AMD's GPUs with 64 threads a warp.
LANES = 128
REDUCE_LANES = 256
#: Columns of the hyper-parameter table: one width, so that no kernel depends on the base.
WIDTH = 16


class Row(IntEnum):
    """Rows of the int64 pointer table; one column per tensor of the bucket."""

    GRAD = 0
    PARAM = 1
    BACKUP = 2  # what update restores from: the copy, or the parameter itself if unperturbed
    STEP = 3  # 0-dim float32 step count
    STATE0 = 4
    STATE1 = 5
    STATE2 = 6
    FRESH = 7  # not an address: 1 where the momentum buffer is new
    CHUNKS = 8  # not an address: number of chunks of the tensor


#: Rows that hold addresses of element streams: these decide whether a tensor is aligned.
STREAMS = (Row.GRAD, Row.PARAM, Row.BACKUP, Row.STATE0, Row.STATE1, Row.STATE2)


class Hyper(IntEnum):
    """Columns of the hyper-parameter table (one row per parameter group).

    The base update's own columns start at ``BASE``, in the order of its rule.
    """

    RHO = 0
    LAM = 1
    ADAPTIVE = 2
    ETA = 3
    MAX_GRAD_NORM = 4  # the same in every row
    BASE = 5


class Scalar(IntEnum):
    """Slots of the float64 vector of scalars that live on the device from pass to pass."""

    GRAD_NORM = 0  # n: the norm that the ascent rule divides by
    PERTURBED_GRAD_NORM = 1  # n~: its counterpart at w + e
    RENORMALIZATION = 2  # gamma
    COEFFICIENT = 3  # u = coefficient * g~
    ACCEPTED = 4  # 1, or 0 where a non-finite second gradient is skipped
    SKIPPED = 5  # steps skipped so far
    SQUARED_NORMS = 6  # AdaGradNorm's b2
    SUM0 = 7  # running sums over the buckets of one reduction
    SUM1 = 8


class Task(IntFlag):
    """What a reduction's last program does with the sums. A runtime argument: no recompiling."""

    FIRST = 1  # opens the reduction: earlier sums do not count
    LAST = 2  # closes it: write the scalars
    DESCENT = 4  # of the second gradient, not the first
    RENORMALIZE = 8
    CLIP = 16
    SKIP = 32
    ACCUMULATE = 64  # add the squared norm of u to AdaGradNorm's b2
