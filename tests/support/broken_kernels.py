"""``bench/codegen.py`` on kernels broken on purpose: its checks have to fail.

``python tests/support/broken_kernels.py hint`` compiles them without the alignment hint on
pointers, ``registers`` with too few registers; further arguments go to ``codegen.py``.
"""

import sys
from dataclasses import replace

import triton
import triton.language as tl

from fastsam.kernels import perturb, reduce, update

import codegen
from compiled.variants import variants


@triton.jit
def stream(table, row: tl.constexpr, columns, tensor, start, dtype: tl.constexpr,
           ALIGNED: tl.constexpr, origin=0):  # fmt: skip
    return (tl.load(table + row * columns + tensor) + origin).to(tl.pointer_type(dtype)) + start


# at import, because the processes that compile import this module anew
if sys.argv[1] == "hint":
    for module in (perturb, reduce, update):
        module.stream = stream

if __name__ == "__main__":
    if sys.argv[1] == "registers":
        starved = [replace(v, options=(*v.options, ("maxnreg", 24))) for v in variants()]
        codegen.variants = lambda: starved
    sys.exit(codegen.main(sys.argv[2:]))
