"""What the kernels compile to, on a machine without a GPU.

``python bench/codegen.py --target cuda:90`` compiles every kernel variant that the library launches
and prints its registers, the blocks that a processor has room for, its spilled bytes and the width
in bits of every element stream's loads and stores on the vector path; ``--summary`` prints a line
per kernel. It exits with 1 where one of them is narrower than 128 bits or registers spill, and with
2 where it cannot check. ``--flight`` looks at the instructions as well, for bytes in flight and
fences (``common/machine_code.py``), and ``--table`` does so for a selection of kernels.

Which variants there are is in ``compiled/variants.py``, and how one is compiled and looked at in
``compiled/measure.py``.
"""

import argparse
import contextlib
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Any

import triton
from tqdm import tqdm

from compiled.measure import TARGETS, measure
from compiled.tables import selected, summary, table
from compiled.variants import variants


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--target", nargs="+", default=["cuda:90"], help=", ".join(TARGETS))
    parser.add_argument("--summary", action="store_true", help="print only a line per kernel")
    parser.add_argument(
        "--flight", action="store_true", help="look at instructions: bytes in flight"
    )
    parser.add_argument("--table", action="store_true", help="a selection, as a Markdown table")
    parser.add_argument("--sample", type=int, metavar="N", help="only N variants, evenly spaced")
    parser.add_argument("--jobs", type=int, default=2, help="processes (default 2)")
    args = parser.parse_args(argv)
    if unknown := [name for name in args.target if name not in TARGETS]:
        print(f"unknown target {unknown[0]!r}; known: {', '.join(TARGETS)}", file=sys.stderr)
        return 2
    if triton.knobs.runtime.interpret:
        print("nothing is compiled under TRITON_INTERPRET: unset it", file=sys.stderr)
        return 2
    chosen, names = variants(), []
    if args.table:
        names, chosen = map(list, zip(*selected(chosen), strict=True))
    if args.sample is not None:
        count = min(args.sample, len(chosen))
        chosen = [chosen[i * len(chosen) // count] for i in range(count)]
    failed = False
    with tempfile.TemporaryDirectory() as cache:
        # who compiles takes nothing from an earlier run, prints what ptxas -v says, keeps places
        os.environ |= {"TRITON_CACHE_DIR": cache, "TRITON_ALWAYS_COMPILE": "1",
                       "TRITON_DUMP_PTXAS_LOG": "1", "TRITON_DISABLE_LINE_INFO": "0"}  # fmt: skip
        with contextlib.ExitStack() as stack:
            in_order: Any = map
            if args.jobs > 1:
                spawn = multiprocessing.get_context("spawn")
                pool = stack.enter_context(ProcessPoolExecutor(args.jobs, mp_context=spawn))
                in_order = partial(pool.map, chunksize=4)
            for target in args.target:
                look = partial(measure, target_name=target, code=args.flight or args.table)
                progress = tqdm(
                    in_order(look, chosen), target, len(chosen), unit="variant", disable=None
                )  # on a terminal only
                reports = list(progress)
                print(f"{target}: triton {triton.__version__}, {len(reports)} variants")
                problems = [f"FAILED {r.variant}: {p}" for r in reports for p in r.problems]
                lines = [] if args.summary else reports
                if args.table:
                    print("\n", *table(names, reports), *problems, sep="\n")
                else:
                    for line in (*lines, *summary(reports), *problems):
                        print(f"  {line}")
                failed = failed or bool(problems)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
