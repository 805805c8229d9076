"""What the kernels compile to, on a machine without a GPU.

``python bench/codegen.py --target cuda:90`` compiles every kernel variant that the library launches
and prints its registers, its spilled bytes and the width in bits of every element stream's loads
and stores on the vector path; ``--summary`` prints a line per kernel. It exits with 1 where one of
them is narrower than 128 bits or registers spill, and with 2 where it cannot check.

How an access in the machine code is known to be an element stream's on the vector path: only there
does a kernel load or store a whole chunk at once. So Triton's own IR, before any lowering, lists
what to look for, each with its place in the source (the line and column, and those of the call
that is inlined). Machine code carries the same places as debug information. What is found at a
place must move exactly the bytes that a thread has of the chunk, so that nothing is overlooked.
"""

import argparse
import contextlib
import io
import itertools
import multiprocessing
import os
import re
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import PurePath
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend

from fastsam.kernels.layout import CHUNK, LANES, REDUCE_CHUNK, REDUCE_LANES, STREAMS_CHUNK
from fastsam.kernels.perturb import perturb_kernel
from fastsam.kernels.reduce import reduce_kernel
from fastsam.kernels.update import update_kernel

TARGETS = {
    "cuda:80": GPUTarget("cuda", 80, 32),
    "cuda:90": GPUTarget("cuda", 90, 32),
    "cuda:100": GPUTarget("cuda", 100, 32),
    "hip:gfx942": GPUTarget("hip", "gfx942", 64),
}
KERNELS = {k.__name__: k for k in (perturb_kernel, reduce_kernel, update_kernel)}
#: Dtypes of parameter, gradient and state.
TYPES = [
    ("fp32", "fp32", "fp32"), ("bf16", "bf16", "bf16"), ("fp16", "fp16", "fp16"),
    ("fp64", "fp64", "fp64"), ("bf16", "fp32", "fp32"), ("bf16", "fp32", "bf16"),
    ("bf16", "bf16", "fp32"), ("fp32", "bf16", "fp32"), ("fp32", "bf16", "bf16"),
    ("fp16", "fp16", "fp32"),
]  # fmt: skip
#: Base updates and their numbers of state tensors.
BASES = [("sgd", 0), ("sgd", 1), ("adam", 2), ("adam", 3), ("adagrad", 1), ("adagrad_norm", 0)]
#: LightSAM's and AdaSAM's, with the number of state tensors of their ascent.
OWN_UPDATES = [
    ("uncorrected_adagrad", 1, 1),
    ("uncorrected_adam", 2, 2),
    ("uncorrected_adam", 3, 0),
]
#: Ascent rules: number of state tensors, and whether groups may be adaptive.
RULES = [("unified", 0, False), ("unified", 0, True), ("ema", 1, False), ("ema", 1, True),
         ("adagrad_norm", 0, False), ("adagrad", 1, False), ("adam", 2, False)]  # fmt: skip
#: Streams of which a step writes next to nothing, element by element.
SPARSE = {("perturb_kernel", "master store")}
AMD_BITS = {"byte": 8, "short": 16, "dword": 32}


# --- what is compiled ---


@dataclass(frozen=True)
class Variant:
    """All that a compiled kernel depends on, but for the target: pairs of a name and a value.

    Attributes:
        kernel: Name of the kernel.
        constants: Its ``constexpr`` arguments, dtypes by name.
        arguments: Types of its other arguments, in Triton's notation.
        options: Launch options.
    """

    kernel: str
    constants: tuple[tuple[str, Any], ...]
    arguments: tuple[tuple[str, str], ...]
    options: tuple[tuple[str, Any], ...]

    @classmethod
    def create(cls, kernel: str, *parts: Mapping[str, Any]) -> "Variant":
        """From mappings in any order: constants, which may hold dtypes, and so on."""
        constants, arguments, options = (tuple(sorted(part.items())) for part in parts)
        names = tuple((k, v.name if isinstance(v, tl.dtype) else v) for k, v in constants)
        return cls(kernel, names, arguments, options)

    def __getitem__(self, constant: str) -> Any:
        return dict(self.constants)[constant]

    @property
    def family(self) -> str:
        names = dict(self.constants)
        return " ".join([self.kernel, *(names[k] for k in ("KIND", "RULE", "BASE") if k in names)])

    def __str__(self) -> str:
        constants = dict(self.constants)
        types = "/".join(constants.pop(name) for name in "PGS" if name in constants)
        flags = (f"{k.lower()}={int(constants[k])}" for k in constants
                 if k not in ("ACC", "BASE", "KIND", "RULE", "CHUNK", "LANES"))  # fmt: skip
        return " ".join((self.family, types, *flags))


def variants() -> list[Variant]:
    """Every variant that the library launches on tensors of the dtypes in ``TYPES``."""
    found = []
    flags = (False, True)
    for types in dict.fromkeys((param, grad) for param, grad, _ in TYPES):
        for rule, states, adaptive in RULES:
            constants = {"RULE": rule, "STATES": states, "ADAPTIVE": adaptive}
            for storage in _storages(types):
                found.append(_variant("perturb_kernel", types, **storage, **constants))
            lets = {"KIND": "diag", "SUMS": 1, "HAS_MASTER": False}
            found.append(_variant("reduce_kernel", types, **lets, **constants))
            if rule not in ("adagrad", "adam"):
                constants |= {"KIND": "ascent", "STATES": 0, "SUMS": 2 if rule == "ema" else 1}
                for master in _masters(types, adaptive):
                    found.append(_variant("reduce_kernel", types, **master, **constants))
        for kind, adaptive, sums in (
            ("descent", False, 1), ("descent", True, 1), ("descent", True, 2),
            ("mix", False, 5), ("mix", True, 5), ("scaled mix", True, 5), ("difference", False, 1),
        ):  # fmt: skip
            constants = {"KIND": kind, "RULE": "unified", "STATES": 0, "ADAPTIVE": adaptive}
            for master in _masters(types, adaptive and kind != "difference"):
                found.append(_variant("reduce_kernel", types, SUMS=sums, **master, **constants))
    for (base, states), types in itertools.product(BASES, TYPES):
        if states == 0 and types[2] != types[0]:
            continue  # without state, its dtype counts as the parameter's
        for scale, skip, storage in itertools.product(flags, flags, _storages(types)):
            rule = {"BASE": base, "STATES": states, "SCALE": scale, "SKIP": skip, **storage}
            found.append(_variant("update_kernel", types, MIX=False, ASCENT_STATES=0, **rule))
            if skip:
                found.append(_variant("update_kernel", types, MIX=False, ASCENT_STATES=1, **rule))
            if scale:
                found.append(_variant("update_kernel", types, MIX=True, ASCENT_STATES=0, **rule))
    for (base, states, ascent), types in itertools.product(OWN_UPDATES, TYPES):
        if types[2] != ("fp64" if types[0] == "fp64" else "fp32"):
            continue  # their state has the dtype of the arithmetic
        for scale, skip, storage in itertools.product(flags, flags, _storages(types)):
            rule = {"BASE": base, "STATES": states, "SCALE": scale, "SKIP": skip, "MIX": False,
                    "ASCENT_STATES": ascent if skip else 0, **storage}  # fmt: skip
            found.append(_variant("update_kernel", types, **rule))
    return found


def _masters(types: Sequence[str], matter: bool) -> list[dict[str, bool]]:
    half = types[0] in ("bf16", "fp16")
    return [{"HAS_MASTER": master} for master in (False, True)[: 1 + (half and matter)]]


def _storages(types: Sequence[str]) -> list[dict[str, bool]]:
    """How weights are stored: as they are; behind them master weights; rounded stochastically."""
    found = [{**master, "STOCHASTIC": False} for master in _masters(types, True)]
    if types[0] == "bf16":
        found.append({"HAS_MASTER": False, "STOCHASTIC": True})
    return found


def _variant(kernel: str, types: Sequence[str], **constants: Any) -> Variant:
    wide = "fp64" if types[0] == "fp64" else "fp32"
    arguments = {"table": "*i64", "chunks": "*i64", "columns": "i32", "hyper": f"*{wide}",
                 "scalars": "*fp64", "origin": "i64"}  # fmt: skip
    if kernel != "perturb_kernel":
        arguments["arrivals"] = "*i32"
    chunk, lanes = CHUNK, LANES
    if kernel == "reduce_kernel":
        arguments |= {"partials": f"*{wide}", "tasks": "i32"}
        several = constants["KIND"] not in ("ascent", "descent") or constants["RULE"] == "ema"
        chunk, lanes = STREAMS_CHUNK if several else REDUCE_CHUNK, REDUCE_LANES
    constants |= dict(zip("PGS", types, strict=False), ACC=wide, CHUNK=chunk, LANES=lanes)
    options = {"num_warps": lanes // 32, "enable_fp_fusion": True}
    return Variant.create(kernel, constants, arguments, options)


# --- what it compiles to ---


@dataclass
class Report:
    """What one variant compiles to.

    Attributes:
        registers: Per thread; vector registers on AMD.
        spilled: Bytes per thread.
        widths: Bits of the narrowest access, by stream, load and store apart.
        problems: What fails the check.
    """

    variant: Variant
    registers: int
    spilled: int
    widths: dict[str, int]
    problems: list[str]

    def __str__(self) -> str:
        widths = ", ".join(f"{stream} {bits}" for stream, bits in self.widths.items())
        return f"{self.variant}: {self.registers} registers, {self.spilled} B spilled; {widths}"


def measure(variant: Variant, target_name: str) -> Report:
    """Compile one variant and read the result."""
    target = TARGETS[target_name]
    compiled, log = _compile(variant, target)
    if target.backend == "cuda":
        code = compiled.asm["ptx"]
        registers = _number(r"Used (\d+) registers", log)
        spilled = max(_number(rf"(\d+) bytes spill {kind}", log) for kind in ("stores", "loads"))
    else:
        code = compiled.asm["amdgcn"]
        registers = _number(r"\.vgpr_count: +(\d+)", code)
        # scalar registers spill to lanes of a vector register, not to memory
        spilled = 4 * _number(r"\.vgpr_spill_count: +(\d+)", code)
        spilled = max(spilled, _number(r"\.private_segment_fixed_size: +(\d+)", code))
    accesses = defaultdict(list)
    for place, bits in _accesses(code):
        accesses[place].append(bits)
    report = Report(variant, registers, spilled, {}, [f"{spilled} B spilled"] if spilled else [])
    for place, stream, bits in _chunk_accesses(compiled.asm["ttir"], variant["CHUNK"]):
        found = accesses[place]
        expected = bits * variant["CHUNK"] // variant["LANES"]
        if (variant.kernel, stream) in SPARSE:
            continue
        report.widths[stream] = min(found, default=0)
        if sum(found) != expected:
            report.problems.append(f"{stream}: found {sum(found)} of {expected} bits per thread")
        elif min(found) < 128:
            report.problems.append(f"{stream} is {min(found)}-bit")
    if not report.widths:
        report.problems.append("has no vector path")
    return report


def _compile(variant: Variant, target: GPUTarget) -> tuple[Any, str]:
    """The compiled kernel, and what ``ptxas -v`` said."""
    kernel = KERNELS[variant.kernel]
    arguments = dict(variant.arguments)
    types = {name: arguments.get(name, "constexpr") for name in kernel.arg_names}
    dtypes = set(itertools.chain(*TYPES))
    constants = {
        (kernel.arg_names.index(name),): tl.dtype(value) if value in dtypes else value
        for name, value in variant.constants
    }
    # what a launch finds out about the tables: 16-byte aligned, smaller than 2 GB
    known = make_backend(target).parse_attr("DS")
    hints = {(i,): known for i, name in enumerate(types.values()) if name.startswith("*")}
    # one thread per lane, as the backend does where a warp is not 32 threads
    options = dict(variant.options) | {"num_warps": variant["LANES"] // target.warp_size}
    log = io.StringIO()
    with contextlib.redirect_stdout(log):
        source = ASTSource(kernel, types, constants, hints)
        return triton.compile(source, target=target, options=options), log.getvalue()


def _number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    if match is None:
        raise RuntimeError(f"the compiler's output has no {pattern!r}")
    return int(match[1])


#: A place in the source: "file:line:column", and "line:column" of the call that is inlined.
Place = tuple[str, str]


def _chunk_accesses(ttir: str, chunk: int) -> Iterator[tuple[Place, str, int]]:
    """Loads and stores of ``chunk`` elements at once: place, stream, bits per element.

    A stream goes by the name of its pointer in the source, which the IR keeps.
    """
    locations = dict(re.findall(r"^(#loc\d*) = loc\((.*)\)$", ttir, re.MULTILINE))

    def frames(location: str) -> list[str]:  # innermost first
        if match := re.match(r'"(.*)":(\d+:\d+)', locations[location]):
            return [f"{PurePath(match[1]).name}:{match[2]}"]
        return [f for part in re.findall(r"#loc\d*", locations[location]) for f in frames(part)]

    access = (
        rf"tt\.(load|store) %(\w+?)(?:_\d+)?[ ,].*"
        rf" tensor<{chunk}x!tt\.ptr<[a-z]+(\d+)>> loc\((#loc\d+)\)"
    )
    for verb, stream, bits, location in re.findall(access, ttir):
        inner, outer = frames(location)
        yield (inner, outer.partition(":")[2]), f"{stream} {verb}", int(bits)


def _accesses(code: str) -> Iterator[tuple[Place, int]]:
    """Accesses to global memory in PTX or amdgcn: place and width in bits."""
    place = "", ""
    in_asm = False
    for line in code.splitlines():
        if "inline asm" in line:
            in_asm = "begin" in line
        elif ".loc" in line and not in_asm:  # inside, LLVM counts the lines of the assembly
            inner = re.search(r"\w+\.py:\d+:\d+", line)
            # "inlined_at <file> <line> <column>", or "@[ <file>:<line>:<column>" in a comment
            outer = re.search(r"(?:inlined_at \d+ |@\[ \w+\.py:)(\d+)[ :](\d+)", line)
            place = inner[0] if inner else "", f"{outer[1]}:{outer[2]}" if outer else ""
        elif match := re.search(r"\b(?:ld|st)\.global\S*?(?:\.v(\d))?\.[a-z](\d+)\s", line):
            yield place, int(match[1] or 1) * int(match[2])
        elif match := re.search(
            r"(?:global|buffer|flat)_(?:load|store)_[us]?(byte|short|dword)(?:x(\d))?", line
        ):
            yield place, int(match[2] or 1) * AMD_BITS[match[1]]


# --- the command ---


def summary(reports: Sequence[Report]) -> Iterator[str]:
    """One line per kernel and base update."""
    families = defaultdict(list)
    for report in reports:
        families[report.variant.family].append(report)
    for family, members in families.items():
        registers = max(report.registers for report in members)
        spilled = max(report.spilled for report in members)
        width = min((bits for report in members for bits in report.widths.values()), default=0)
        yield (f"{family}: {len(members)} variants, at most {registers} registers, "
               f"{spilled} B spilled, streams at least {width}-bit")  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--target", nargs="+", default=["cuda:90"], help=", ".join(TARGETS))
    parser.add_argument("--summary", action="store_true", help="print only a line per kernel")
    parser.add_argument("--sample", type=int, metavar="N", help="only N variants, evenly spaced")
    parser.add_argument("--jobs", type=int, default=2, help="processes (default 2)")
    args = parser.parse_args(argv)
    if unknown := [name for name in args.target if name not in TARGETS]:
        print(f"unknown target {unknown[0]!r}; known: {', '.join(TARGETS)}", file=sys.stderr)
        return 2
    if triton.knobs.runtime.interpret:
        print("nothing is compiled under TRITON_INTERPRET: unset it", file=sys.stderr)
        return 2
    chosen = variants()
    if args.sample is not None:
        count = min(args.sample, len(chosen))
        chosen = [chosen[i * len(chosen) // count] for i in range(count)]
    failed = False
    with tempfile.TemporaryDirectory() as cache:
        # for the workers: take nothing from an earlier run, print what ptxas -v says, keep places
        os.environ |= {"TRITON_CACHE_DIR": cache, "TRITON_ALWAYS_COMPILE": "1",
                       "TRITON_DUMP_PTXAS_LOG": "1", "TRITON_DISABLE_LINE_INFO": "0"}  # fmt: skip
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(args.jobs, mp_context=spawn) as pool:
            for target in args.target:
                reports = list(pool.map(partial(measure, target_name=target), chosen, chunksize=4))
                print(f"{target}: triton {triton.__version__}, {len(reports)} variants")
                problems = [f"FAILED {r.variant}: {p}" for r in reports for p in r.problems]
                lines = [] if args.summary else reports
                for line in (*lines, *summary(reports), *problems):
                    print(f"  {line}")
                failed = failed or bool(problems)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
