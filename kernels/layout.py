"""Where each number lives in the device tables that the kernels read.

Plain integers, shared by the host code that fills the tables and the kernels that index them.
"""

from dataclasses import dataclass
from enum import IntEnum, IntFlag
from typing import NamedTuple

#: Elements per program. Perturb and update keep up to eight streams in registers, so they take
#: small chunks. A reduction of one stream amortises its final atomic over a large chunk; the more
#: streams it has, the smaller its chunks, or they take registers that keep other programs out.
#: Perturb, and a reduction of gradients and weights, take twice as many where all have 16 bits.
CHUNK = 1024
REDUCE_CHUNK = 8192
SCALED_CHUNK = 4096
STREAMS_CHUNK = 2048
#: Partial sums that one program of a reduction adds up at once: those of as many programs are
#: added by the last of them to finish, and their sums by the last of all.
WINDOW = 512
#: Threads per program, and elements per step of the scalar path: one per thread. In warps that is
#: 4 and 8 on NVIDIA, 2 and 4 on AMD's GPUs with 64 threads a warp.
LANES = 128
REDUCE_LANES = 256


class Launch(NamedTuple):
    """How one kernel is launched: elements per program, and threads.

    ``half_chunk`` is the number of elements where every stream has 16 bits; 0 is ``chunk``.
    """

    chunk: int
    lanes: int
    half_chunk: int = 0

    def on(self, halves: bool) -> "Launch":
        """What it is where every stream has 16 bits, or where not."""
        return Launch(self.half_chunk if halves and self.half_chunk else self.chunk, self.lanes)


@dataclass(frozen=True)
class Launches:
    """Launch configurations by kind of pass. Fixed: none is tuned while weights change.

    ``bench/sweep.py`` compares others, on tensors that nobody needs.
    """

    perturb: Launch = Launch(CHUNK, LANES, 2 * CHUNK)
    update: Launch = Launch(CHUNK, LANES)
    reduce: Launch = Launch(REDUCE_CHUNK, REDUCE_LANES)  # gradients alone
    reduce_scaled: Launch = Launch(SCALED_CHUNK, REDUCE_LANES, 2 * SCALED_CHUNK)  # and weights
    reduce_streams: Launch = Launch(STREAMS_CHUNK, REDUCE_LANES)  # more
    #: Whether what follows a reduction walks the other way: what that read last, the L2 still has.
    backwards: bool = True


def partials(programs: int, sums: int) -> int:
    """How many numbers a reduction writes on its way: each program's, and each window's.

    Rows are padded, so that each starts where vectors do.
    """
    windows = -(-programs // WINDOW)
    return sums * WINDOW * (windows + -(-windows // WINDOW))


def counters(programs: int) -> int:
    """How many counters of arrivals it needs: of windows, and of programs by window."""
    return 1 + -(-programs // WINDOW)


#: Columns of the hyper-parameter table: one width, so that no kernel depends on the base.
WIDTH = 26
#: State tensors per parameter that the tables have rows for, scalars that a descent rule keeps, and
#: numbers that one is given.
BASE_STATES = 3
ASCENT_STATES = 2
DESCENT_SCALARS = 3
DESCENT_GIVEN = 2


class Row(IntEnum):
    """Rows of the int64 pointer table; one column per tensor of the bucket."""

    GRAD = 0
    PARAM = 1
    # what update restores from: the copy, or the parameter itself if unperturbed, as bytes from the
    # kernels' argument ``origin``; with master weights the address of these, or of the parameter
    BACKUP = 2
    STEP = 3  # 0-dim float32 step count
    STATE0 = 4  # the base's state; in the first pass what the ascent rule reads of it
    STATE1 = 5
    STATE2 = 6
    FRESH = 7  # not an address: 1 where the momentum buffer is new
    CHUNKS = 8  # not an address: number of chunks of the tensor
    FIRST_GRAD = 9  # the first pass's gradient, where the second pass needs it
    ASCENT0 = 10  # state of the ascent rule
    ASCENT1 = 11
    NEXT0 = 12  # the same after this step: its own memory, so that a failed step costs nothing
    NEXT1 = 13
    # LETS: gradients at the updated weights; else what a rejected step keeps in the first's place
    VALIDATION = 14
    TRAINING = 15
    MASTER = 16  # float32 weights behind 16-bit ones
    KEY = 17  # not an address: what the tensor's random bits depend on, rounding or noise
    NORM = 18  # the squared norm of the tensor's segment, where the ascent's norm is not global
    CHOICE = 20  # not an address: what decides at random whether the tensor is perturbed
    PERTURBED = 19  # where w + e goes: scratch memory, or the parameter; only where some is scratch


#: Rows that say where element streams are: these decide whether a tensor is aligned. An address of
#: 0 stands for zeros in the last pass's optional streams (first, validation and training).
STREAMS = tuple(set(Row) - {Row.STEP, Row.FRESH, Row.CHUNKS, Row.KEY, Row.NORM, Row.CHOICE})


class Hyper(IntEnum):
    """Columns of the hyper-parameter table (one row per parameter group).

    A rule's own columns, which its kernel file numbers from 0, start at its name here.
    """

    RHO = 0
    ADAPTIVE = 1
    ETA = 2
    MAX_GRAD_NORM = 3  # the same in every row
    DESCENT = 4  # four columns, the same in every row
    ASCENT = 8  # three columns
    LR = 11  # for LETS
    SIGN = 12  # -1 where the base maximizes: rules are given the gradient of what is minimised
    # where the ascent follows the base's momentum: 1 in groups whose momentum counts in the norm
    # that it is divided by, else 0
    COUNTED = 13
    BASE = 14  # twelve columns


class Scalar(IntEnum):
    """Slots of the float64 vector of scalars that live on the device from pass to pass."""

    ASCENT_NORM = 0  # the norm that the ascent rule divides by
    GRAD_NORM = 1  # n: the norm of the first gradient
    PERTURBED_GRAD_NORM = 2  # n~: its counterpart at w + e
    RENORMALIZATION = 3  # gamma
    COEFFICIENT = 4  # u = coefficient * g~ + first coefficient * g
    FIRST_COEFFICIENT = 5
    ACCEPTED = 6  # 1, or 0 where a non-finite second gradient is skipped
    SKIPPED = 7  # steps skipped so far
    SQUARED_NORMS = 8  # the base's accumulator: AdaGradNorm's b2
    ACCUMULATED = 9  # the ascent's accumulator: of completed steps, and with the present one
    NEXT_ACCUMULATED = 10
    DESCENT0 = 11  # the descent rule's scalars: the first, and as the last descent used it
    USED_DESCENT0 = 12
    SHARPNESS = 13  # measured in the last step: <g + g~, e> / 2
    DESCENT1 = 14  # the second of the descent rule's scalars
    HYPERGRADIENT = 15  # LETS: sum of lr * coefficient * <validation - training, H e>
    SUM0 = 16  # running sums over the buckets of one reduction
    SUM1 = 17
    SUM2 = 18
    SUM3 = 19
    SUM4 = 20
    FIRST_INVERSE_SCALE = 21  # 1 / loss scale of the first pass's gradients, and the second's
    INVERSE_SCALE = 22
    FOUND_INF = 23  # not 0 where somebody else found the gradients to overflow
    ROUNDING_STEP = 24  # steps with random bits so far: of stochastic rounding, or of ESAM's choice
    APART = 25  # w <- base(w, u) - lr (apart * g~ + first apart * g)
    FIRST_APART = 26
    NOISE_STEP = 27  # steps perturbed by noise so far
    SAMPLE = 28  # the number of the present perturbation in its step, where there are several
    LOSS = 29  # at w + e, where the descent rule takes it
    RATE = 30  # the step size that such a rule gives to the base
    DESCENT2 = 31  # the third of the descent rule's scalars
    # the squared norm of what a descent rule has kept, where it is known from before; or of the
    # momentum that the ascent follows, as state dicts have it: -1 where it is not finite, -2 where
    # it is to be measured in every step
    KEPT = 32


#: Behind the scalars lie integers: a squared norm that one launch adds up and a later one reads
#: (``bins.py``). Where they begin, in numbers of 64 bits: at a line of the cache.
INTEGERS = -(-len(Scalar) // 16) * 16
#: Bits of exponent per bin, bins of a set (the last is for what is not finite), and what the bins
#: count in: the first in 2^UNIT, each in 2^BIN_BITS times the unit of the one before.
BIN_BITS = 18
BINS = 115
UNIT = -1051
#: Squares of float32, which are 2^-298 to 2^266 in a program, are in the bins from here to there.
BINS_OF_FLOAT32 = 40, 72

#: How many programs may add to them: each adds less than 2^(24 + BIN_BITS - 1) to a bin of 63 bits.
MOST_PROGRAMS = 1 << (63 - (24 + BIN_BITS - 1))


class Integer(IntEnum):
    """Slots of the integers."""

    READS = 0  # which of two sets the next perturbation reads
    ADDS = 1  # which one the next update adds to
    SETS = 16  # the sets; each begins at a line of the cache, and has room for vectors of 32


SET = -(-BINS // 32) * 32
INTEGER_COUNT = Integer.SETS + 2 * SET


class Task(IntFlag):
    """What a reduction's last program does with the sums. A runtime argument: no recompiling."""

    FIRST = 1  # opens the reduction: earlier sums do not count
    LAST = 2  # closes it: write the scalars
    RENORMALIZE = 4
    CLIP = 8
    SKIP = 16  # reject the step if the second gradient is not finite
    ACCUMULATE = 32  # add the squared norm of u to the base's accumulator
    COMMIT = 64  # make the ascent's new accumulator the old
    ADAPT = 128  # let the descent rule's scalars follow the sharpness
    SKIP_FIRST = 256  # reject it as well if the first one is not
    AGREE = 512  # take the norm of a state dict, if that differs by rounding alone
    EXACT = 1024  # which is that of float64: nothing was added up in float32
