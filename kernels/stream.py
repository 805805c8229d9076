"""Reading the tables: chunks, typed pointers, rounding. Used by all three kernels.

A chunk is handled in two parts. The *vector part* covers the largest multiple of 16 elements, if
every stream of the tensor is 16-byte aligned: there pointers carry an alignment hint and the mask
has a bound divisible by 16, which is what lets the compiler emit 128-bit accesses. The *scalar
part* loops over what is left, one element per thread: the last 15 elements of a ragged chunk, or
all of a misaligned one. The hint must sit in the vector branch, on the pointer after its cast:
anywhere else it is lost, or leaks into the scalar branch and faults on misaligned tensors.
"""

import triton
import triton.language as tl

from .layout import WIDTH, Row

GRAD = tl.constexpr(int(Row.GRAD))
PARAM = tl.constexpr(int(Row.PARAM))
BACKUP = tl.constexpr(int(Row.BACKUP))
STEP = tl.constexpr(int(Row.STEP))
STATE0 = tl.constexpr(int(Row.STATE0))
STATE1 = tl.constexpr(int(Row.STATE1))
STATE2 = tl.constexpr(int(Row.STATE2))
FRESH = tl.constexpr(int(Row.FRESH))
NORM = tl.constexpr(int(Row.NORM))
CHUNKS = tl.constexpr(int(Row.CHUNKS))
FIRST_GRAD = tl.constexpr(int(Row.FIRST_GRAD))
ASCENT0 = tl.constexpr(int(Row.ASCENT0))
ASCENT1 = tl.constexpr(int(Row.ASCENT1))
NEXT0 = tl.constexpr(int(Row.NEXT0))
NEXT1 = tl.constexpr(int(Row.NEXT1))
VALIDATION = tl.constexpr(int(Row.VALIDATION))
TRAINING = tl.constexpr(int(Row.TRAINING))
MASTER = tl.constexpr(int(Row.MASTER))
KEY = tl.constexpr(int(Row.KEY))
CHOICE = tl.constexpr(int(Row.CHOICE))
PERTURBED = tl.constexpr(int(Row.PERTURBED))
COLUMNS = tl.constexpr(WIDTH)

#: The interpreter's own conversion of float32 to bfloat16 truncates and loses subnormals; every GPU
#: rounds to nearest even.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def read_chunk(chunks, program):
    """Unpack this program's entry of the chunk table (see ``table.chunk_table``).

    Returns the tensor's column, its group, the chunk's index in the tensor, its length, and the
    length of its vector part.
    """
    where = tl.load(chunks + 2 * program)
    part = tl.load(chunks + 2 * program + 1)
    aligned = part >= 0
    part = tl.abs(part)
    length = (part & 0xFFFF).to(tl.int32)
    vector = tl.where(aligned, length // 16, 0) * 16  # a product, so that it is provably 16k
    tensor = (where & 0xFFFFFFFF).to(tl.int32)
    group = (where >> 32).to(tl.int32)
    return tensor, group, part >> 16, length, vector


@triton.jit
def hyper_row(hyper, group):
    """The hyper-parameters of one group."""
    return hyper + group * COLUMNS


@triton.jit
def stream(table, row: tl.constexpr, columns, tensor, start, dtype: tl.constexpr,
           ALIGNED: tl.constexpr, origin=0):  # fmt: skip
    """Pointer to element ``start`` of one stream of one tensor.

    Its row holds addresses, or what has to be added to ``origin``, a multiple of 16.
    """
    pointer = (tl.load(table + row * columns + tensor) + origin).to(tl.pointer_type(dtype))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer + start


@triton.jit
def all_loads_first():
    """Have every load that comes before this issued before anything after it waits for one.

    To save registers ptxas would rather load the first half of a chunk, use it, and then load the
    second: half of the bytes in flight. It moves no access over a barrier, which keeps no warp
    waiting for data.
    """
    tl.debug_barrier()


@triton.jit
def only_if(condition, mask):
    """The mask where a scalar condition holds, else none of it.

    Not ``mask & condition``: the interpreter gives that the type of what the condition compared.
    """
    return tl.where(condition, mask, tl.zeros_like(mask))


@triton.jit
def where_present(table, row: tl.constexpr, columns, tensor, mask):
    """The mask if the tensor has this stream, else none of it: what is absent counts as zeros."""
    return only_if(tl.load(table + row * columns + tensor) != 0, mask)


@triton.jit
def known_base(table, columns, tensor, x, ACC: tl.constexpr):
    """The base's state ``x``, as an ascent rule is given it: NaN of a tensor that has none."""
    return tl.where(tl.load(table + STATE0 * columns + tensor) != 0, x.to(ACC), float("nan"))


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """Round to the storage dtype, to nearest even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.float32).to(tl.uint32, bitcast=True)
        rounded = tl.where(x == x, bits + 0x7FFF + ((bits >> 16) & 1), bits | 0x400000)
        return (rounded >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(dtype)


@triton.jit
def newest(master, stored, P: tl.constexpr):
    """The master weight; what is stored where somebody has written to the parameter since."""
    return tl.where(narrow(master, P) == stored, master, stored.to(master.dtype))
