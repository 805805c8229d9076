"""What one kernel variant compiles to: registers, spilled bytes, and the width of its accesses.

How an access in the machine code is known to be an element stream's on the vector path: only there
does a kernel load or store a whole chunk at once. So Triton's own IR, before any lowering, lists
what to look for, each with its place in the source (the line and column, and those of the call
that is inlined). Machine code carries the same places as debug information. What is found at a
place must move exactly the bytes that a thread has of the chunk, so that nothing is overlooked.
"""

import contextlib
import io
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend

from fastsam.kernels.perturb import perturb_kernel
from fastsam.kernels.reduce import reduce_kernel
from fastsam.kernels.update import update_kernel

from .variants import Variant, value_of
from common.machine_code import Flight, flight

TARGETS = {
    "cuda:80": GPUTarget("cuda", 80, 32),
    "cuda:90": GPUTarget("cuda", 90, 32),
    "cuda:100": GPUTarget("cuda", 100, 32),
    "hip:gfx942": GPUTarget("hip", "gfx942", 64),
}
KERNELS = {k.__name__: k for k in (perturb_kernel, reduce_kernel, update_kernel)}
#: Streams of which a step writes next to nothing, element by element.
SPARSE = {("perturb_kernel", "master store")}
AMD_BITS = {"byte": 8, "short": 16, "dword": 32}


@dataclass
class Report:
    """What one variant compiles to.

    Attributes:
        registers: Per thread; vector registers on AMD.
        spilled: Bytes per thread.
        widths: Bits of the narrowest access, by stream, load and store apart.
        problems: What fails the check.
        flight: Resident blocks and bytes in flight.
    """

    variant: Variant
    registers: int
    spilled: int
    widths: dict[str, int]
    problems: list[str]
    flight: Flight

    def __str__(self) -> str:
        widths = ", ".join(f"{stream} {bits}" for stream, bits in self.widths.items())
        return (f"{self.variant}: {self.registers} registers, {self.flight}, "
                f"{self.spilled} B spilled; {widths}")  # fmt: skip


def measure(variant: Variant, target_name: str, code: bool = False) -> Report:
    """Compile one variant and read the result; with ``code`` its instructions, too."""
    target = TARGETS[target_name]
    compiled, log = _compile(variant, target)
    if target.backend == "cuda":
        text = compiled.asm["ptx"]
        registers = _number(r"Used (\d+) registers", log)
        spilled = max(_number(rf"(\d+) bytes spill {kind}", log) for kind in ("stores", "loads"))
    else:
        text = compiled.asm["amdgcn"]
        registers = _number(r"\.vgpr_count: +(\d+)", text)
        # scalar registers spill to lanes of a vector register, not to memory
        spilled = 4 * _number(r"\.vgpr_spill_count: +(\d+)", text)
        spilled = max(spilled, _number(r"\.private_segment_fixed_size: +(\d+)", text))
    accesses = defaultdict(list)
    for place, bits in _accesses(text):
        accesses[place].append(bits)
    # a reduction's second look has the places of its first
    looks = Counter(_chunk_accesses(compiled.asm["ttir"], variant["CHUNK"]))
    loaded = sum(bits for _, stream, bits in looks if stream.endswith("load"))
    report = Report(
        variant, registers, spilled, {}, [f"{spilled} B spilled"] if spilled else [],
        flight(compiled, target_name, registers, variant["LANES"],
               loaded * variant["CHUNK"] // variant["LANES"] // 8, code),
    )  # fmt: skip
    for (place, stream, bits), times in looks.items():
        found = accesses[place]
        expected = times * bits * variant["CHUNK"] // variant["LANES"]
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
    constants = {
        (kernel.arg_names.index(name),): value_of(value) for name, value in variant.constants
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
        inner, outer = frames(location)[:2]
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
