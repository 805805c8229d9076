"""What the kernels compile to, on a machine without a GPU.

``python bench/codegen.py --target cuda:90`` compiles every kernel variant that the library launches
and prints its registers, the blocks that a processor has room for, its spilled bytes and the width
in bits of every element stream's loads and stores on the vector path; ``--summary`` prints a line
per kernel. It exits with 1 where one of them is narrower than 128 bits or registers spill, and with
2 where it cannot check. ``--flight`` looks at the instructions as well, for bytes in flight and
fences (``common/machine_code.py``), and ``--table`` does so for a selection of kernels.

How an access in the machine code is known to be an element stream's on the vector path: only there
does a kernel load or store a whole chunk at once. So Triton's own IR, before any lowering, lists
what to look for, each with its place in the source (the line and column, and those of the call
that is inlined). Machine code carries the same places as debug information. What is found at a
place must move exactly the bytes that a thread has of the chunk, so that nothing is overlooked.
"""

import argparse
import contextlib
import importlib
import io
import itertools
import multiprocessing
import os
import re
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import PurePath
from typing import Any

import triton
import triton.language as tl
from tqdm import tqdm
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend

from fastsam.backends.triton.plan import (
    Sums,
    ascent_sums,
    descent_sums,
    hypergradient_sums,
    kept_sums,
    perturb_constants,
    perturb_launch,
    reduce_launch,
    update_constants,
)
from fastsam.kernels.layout import Launch, Launches
from fastsam.kernels.perturb import perturb_kernel
from fastsam.kernels.reduce import reduce_kernel
from fastsam.kernels.update import update_kernel
from fastsam.step.spec import Ascent, Base, Descent, StepSpec, declared
from fastsam.unified import UNIFIED

from common.machine_code import Flight, flight

TARGETS = {
    "cuda:80": GPUTarget("cuda", 80, 32),
    "cuda:90": GPUTarget("cuda", 90, 32),
    "cuda:100": GPUTarget("cuda", 100, 32),
    "hip:gfx942": GPUTarget("hip", "gfx942", 64),
}
LAUNCHES = Launches()
KERNELS = {k.__name__: k for k in (perturb_kernel, reduce_kernel, update_kernel)}
#: Dtypes of parameter, gradient and state.
TYPES = [
    ("fp32", "fp32", "fp32"), ("bf16", "bf16", "bf16"), ("fp16", "fp16", "fp16"),
    ("fp64", "fp64", "fp64"), ("bf16", "fp32", "fp32"), ("bf16", "fp32", "bf16"),
    ("bf16", "bf16", "fp32"), ("fp32", "bf16", "fp32"), ("fp32", "bf16", "bf16"),
    ("fp16", "fp16", "fp32"),
]  # fmt: skip
#: Hyper-parameters with which every state that a rule may have is there, and with which none is.
GROUPS = [defaultdict(int), defaultdict(lambda: 1)]
#: Streams of which a step writes next to nothing, element by element.
SPARSE = {("perturb_kernel", "master store")}
AMD_BITS = {"byte": 8, "short": 16, "dword": 32}


# --- what is compiled ---


@dataclass(frozen=True)
class Variant:
    """All that a compiled kernel depends on, but for the target: pairs of a name and a value.

    Attributes:
        kernel: Name of the kernel.
        constants: Its ``constexpr`` arguments, dtypes and functions by name.
        arguments: Types of its other arguments, in Triton's notation.
        options: Launch options.
    """

    kernel: str
    constants: tuple[tuple[str, Any], ...]
    arguments: tuple[tuple[str, str], ...]
    options: tuple[tuple[str, Any], ...]

    @classmethod
    def create(cls, kernel: str, *parts: Mapping[str, Any]) -> "Variant":
        """From mappings in any order: constants, which may hold dtypes and functions, and so on."""
        constants, arguments, options = (tuple(sorted(part.items())) for part in parts)
        return cls(kernel, tuple((k, _name(v)) for k, v in constants), arguments, options)

    def __getitem__(self, constant: str) -> Any:
        return dict(self.constants)[constant]

    @property
    def family(self) -> str:
        """Kernel, what a reduction adds up, and the rules."""
        constants, names = dict(self.constants), [self.kernel]
        if "TERMS" in constants:
            names.append(constants["TERMS"].partition(":")[2])
        for role in ("COEFFICIENTS", "DIRECTION", "ACCUMULATES", "UPDATE"):
            if constants.get(role) is not None:
                names.append(constants[role].partition(":")[0].rpartition(".")[2])
        return " ".join(dict.fromkeys(names))

    def __str__(self) -> str:
        constants = dict(self.constants)
        found = (constants.pop(name, None) for name in (*"PGS", "READ"))
        types = "/".join(name for name in found if name is not None)
        flags = (f"{k.lower()}={int(x)}" for k, x in constants.items()
                 if isinstance(x, int) and k not in ("CHUNK", "LANES"))  # fmt: skip
        return " ".join((self.family, types, *flags))


def _name(constant: Any) -> Any:
    """A constant's value, or what stands for a dtype or a function."""
    if isinstance(constant, tl.dtype):
        return constant.name
    function = getattr(constant, "fn", None)  # of a Triton function, compiled or interpreted
    return constant if function is None else f"{function.__module__}:{function.__name__}"


def _value(name: Any) -> Any:
    """The inverse of ``_name``."""
    if name in set(itertools.chain(*TYPES)):
        return tl.dtype(name)
    if isinstance(name, str) and ":" in name:
        module, _, function = name.partition(":")
        return getattr(importlib.import_module(module), function)
    return name


def rules() -> list[Any]:
    """The library's own rules."""
    return [rule for rule in declared() if rule.kernel.startswith("fastsam.")]


def variants() -> list[Variant]:
    """Every variant of the rules that the library declares, on tensors of dtypes in ``TYPES``."""
    ascents = [rule for rule in rules() if isinstance(rule, Ascent)]
    found: list[Variant] = []
    for ascent, adaptive in itertools.product(ascents, (False, True)):
        for param, grad, state in TYPES:
            if not adaptive or ascent.scales:
                types = param, state if ascent.momentum else grad
                found += _of_ascent(types, _spec(ascent, adaptive))
    for types in dict.fromkeys((param, grad) for param, grad, _ in TYPES):
        found += _of_descent(types)
    for base, group in itertools.product(rules(), GROUPS):
        if isinstance(base, Base):
            for types in TYPES:
                found += _of_base(types, base, group)
    return list(dict.fromkeys(found))


def _spec(ascent: Ascent, adaptive: bool, **more: Any) -> StepSpec:
    return StepSpec([GROUPS[1] | {"adaptive": adaptive}], ascent, **({"base": None} | more))


def _of_ascent(types: Sequence[str], spec: StepSpec) -> Iterator[Variant]:
    # neither noise nor what follows from the base's state, or from the accumulator, serves what
    # makes the perturbation once more
    again = not (spec.ascent.sees_past or spec.ascent.momentum or spec.ascent.noise)
    # an update may have left the norm
    known = (1 + (types[0] == "fp64")) * (bool(spec.ascent.momentum) and not spec.adaptive)
    for storage in _storages(types):
        for read in _reads(spec.ascent, types, storage):
            yield _perturbation(types, perturb_constants(spec), read, **storage)
            if known:
                constants = perturb_constants(spec, known=known)
                yield _perturbation(types, constants, read, **storage)
    if again:
        yield _reduction(types, hypergradient_sums(spec, "diag"), False)
    storage = next(iter(_storages(types)))
    for read in _reads(spec.ascent, types, storage):
        yield _perturbation(types, perturb_constants(spec, moves=True), read, **storage)
        if known:
            constants = perturb_constants(spec, moves=True, known=known)
            yield _perturbation(types, constants, read, **storage)
        if spec.ascent.divides:
            by_layer = replace(spec, norm="layer")
            yield _perturbation(types, perturb_constants(by_layer), read, **storage)
            if again:
                yield _reduction(types, hypergradient_sums(by_layer, "diag"), False)
        rule = spec.ascent
        if rule.advance is None and rule.accumulate is None and not rule.momentum:
            # it may come several times
            yield _perturbation(types, perturb_constants(spec, False), read, **storage)
    if spec.ascent.norm is not None:
        for master in _masters(types, spec.adaptive):
            for read in _reads(spec.ascent, types, master):
                along = spec.ascent.norm == "direction"
                yield _reduction(types, ascent_sums(spec), read=read if along else None, **master)


def _reads(
    ascent: Ascent, types: Sequence[str], storage: Mapping[str, bool]
) -> Sequence[str | None]:
    """Dtypes of the base's state that the rule reads, with these of parameter and gradient."""
    if not ascent.base_state:
        return [None]
    if ascent.is_computed:
        return ["fp64" if types[0] == "fp64" else "fp32"]
    if storage["HAS_MASTER"]:
        return ["fp32"]
    return [state for *others, state in TYPES if tuple(others) == tuple(types)]


def _of_descent(types: Sequence[str]) -> Iterator[Variant]:
    descents = [rule for rule in rules() if isinstance(rule, Descent)]
    flags = (False, True)
    for rule, adaptive, scaled, clips in itertools.product((None, *descents), flags, flags, flags):
        spec = _spec(
            UNIFIED, adaptive, descent=rule, renormalize=scaled,
            max_grad_norm=1.0 if clips else None,
        )  # fmt: skip
        sums = descent_sums(spec)
        for master in _masters(types, sums.constants["ADAPTIVE"]):
            yield _reduction(types, sums, **master)
        if spec.reuses_by_norm and not scaled:
            yield _reduction(types, descent_sums(spec, kept_is_known=True), False)
            yield _reduction(types, kept_sums(), False)
        if rule is not None and not rule.sums and not scaled and not clips:  # known at once
            for master in _masters(types, adaptive):
                yield _reduction(types, ascent_sums(spec), **master)
    yield _reduction(types, hypergradient_sums(_spec(UNIFIED, False), "difference"), False)


def _of_base(types: Sequence[str], base: Base, group: dict[str, Any]) -> Iterator[Variant]:
    states = len(base.states(group))
    wide = "fp64" if types[0] == "fp64" else "fp32"
    if states == 0 and types[2] != types[0]:
        return  # without state, its dtype counts as the parameter's
    if base.wide and states and types[2] != wide:
        return  # their state has the dtype of the arithmetic
    starts = bool(base.starts_from_gradient) and states > 0
    flags = (False, True)
    for scale, skip, storage in itertools.product(flags, flags, _storages(types)):
        spec = _spec(
            UNIFIED, False, base=base, max_grad_norm=1.0 if scale else None, skip_nonfinite=skip
        )
        for of_ascent in range(1 + skip * 2):
            rule = update_constants(spec, of_ascent, starts) | storage
            if base.takes_first:
                rule |= {"SCALE": True, "MIX": True}  # as a descent rule has it
                yield _variant("update_kernel", types, LAUNCHES.update, STATES=states, **rule)
                continue
            yield _variant("update_kernel", types, LAUNCHES.update, STATES=states, **rule)
            names = list(base.states(group))[:1]
            if names in (["momentum_buffer"], ["exp_avg"]) and of_ascent == 0:  # MSAM's
                leaves = rule | {"SQUARES": 0}
                yield _variant("update_kernel", types, LAUNCHES.update, STATES=states, **leaves)
            if scale and not base.wide and of_ascent == 0:
                for beside, keeps in ((False, False), (True, False), (False, True)):
                    mixed = rule | {"MIX": True, "BESIDE": beside, "KEEPS": keeps}
                    yield _variant("update_kernel", types, LAUNCHES.update, STATES=states, **mixed)


def _reduction(
    types: Sequence[str], sums: Sums, HAS_MASTER: bool, read: str | None = None  # noqa: N803
) -> Variant:  # fmt: skip
    launch = reduce_launch(LAUNCHES, sums, HAS_MASTER, *types[:2])
    more = {"HAS_MASTER": HAS_MASTER, "READ": read}
    return _variant("reduce_kernel", types, launch, **more, **sums.constants)


def _perturbation(
    types: Sequence[str], constants: Mapping[str, Any], read: str | None, **storage: bool
) -> Variant:
    master = storage["HAS_MASTER"]
    launch = perturb_launch(LAUNCHES, constants["STATES"], master, *types[:2], read)
    return _variant("perturb_kernel", types, launch, READ=read, **storage, **constants)


def _masters(types: Sequence[str], matter: bool) -> list[dict[str, bool]]:
    half = types[0] in ("bf16", "fp16")
    return [{"HAS_MASTER": master} for master in (False, True)[: 1 + (half and matter)]]


def _storages(types: Sequence[str]) -> list[dict[str, bool]]:
    """How weights are stored: as they are; behind them master weights; rounded stochastically."""
    found = [{**master, "STOCHASTIC": False} for master in _masters(types, True)]
    if types[0] == "bf16":
        found.append({"HAS_MASTER": False, "STOCHASTIC": True})
    return found


def _variant(kernel: str, types: Sequence[str], launch: Launch, **constants: Any) -> Variant:
    wide = "fp64" if types[0] == "fp64" else "fp32"
    arguments = {"table": "*i64", "chunks": "*i64", "columns": "i32", "hyper": f"*{wide}",
                 "scalars": "*fp64", "origin": "i64"}  # fmt: skip
    if kernel != "perturb_kernel":
        arguments["arrivals"] = "*i32"
    if kernel == "reduce_kernel":
        arguments |= {"partials": "*fp64", "tasks": "i32"}
    constants |= dict(zip("PGS", types, strict=False), ACC=wide)
    constants |= {"CHUNK": launch.chunk, "LANES": launch.lanes}
    options = {"num_warps": launch.lanes // 32, "enable_fp_fusion": True}
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
        (kernel.arg_names.index(name),): _value(value) for name, value in variant.constants
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
        occupancy = min(report.flight.occupancy for report in members)
        yield (f"{family}: {len(members)} variants, at most {registers} registers, "
               f"occupancy at least {occupancy:.0%}, {spilled} B spilled, "
               f"streams at least {width}-bit")  # fmt: skip


#: Rows of the table: a name, and the constants by which its variant is found, functions by the end
#: of their module's name.
PLAIN = {"BACKS_UP": True} | dict.fromkeys(
    ("HAS_MASTER", "STOCHASTIC", "SEGMENTS", "SKIP", "SCALE", "MIX", "ADAPTIVE", "SCALED", "MOVES"),
    False,
)
SELECTION: list[tuple[str, str, dict[str, Any]]] = [
    (name, f"{kernel}_kernel", PLAIN | dict(zip("PGS", types.split("/"), strict=False)) | constants)
    for name, kernel, types, constants in (
        ("norm", "reduce", "fp32/fp32", {"TERMS": "of_ascent", "SUMS": 1, "ACCUMULATES": None}),
        ("norm", "reduce", "bf16/bf16", {"TERMS": "of_ascent", "SUMS": 1, "ACCUMULATES": None}),
        ("norm, ASAM", "reduce", "fp32/fp32", {"TERMS": "of_ascent", "SCALED": True, "SUMS": 1}),
        ("norm, ASAM", "reduce", "bf16/bf16", {"TERMS": "of_ascent", "SCALED": True, "SUMS": 1}),
        ("norm, ASAM, master", "reduce", "bf16/bf16",
         {"TERMS": "of_ascent", "SCALED": True, "SUMS": 1, "HAS_MASTER": True}),
        ("norms, ASAM, clipped", "reduce", "fp32/fp32",
         {"TERMS": "of_descent", "SCALED": True, "SUMS": 2}),
        ("norm, VaSSO", "reduce", "fp32/fp32", {"TERMS": "of_ascent", "DIRECTION": "ema"}),
        ("sums, SAMAR", "reduce", "fp32/fp32", {"TERMS": "of_both"}),
        ("sums, SAMAR, ASAM", "reduce", "fp32/fp32",
         {"TERMS": "of_both", "SCALED": True, "ADAPTIVE": True}),
        ("SAM", "perturb", "fp32/fp32", {"DIRECTION": "unified"}),
        ("SAM", "perturb", "bf16/bf16", {"DIRECTION": "unified"}),
        ("SAM, scratch", "perturb", "fp32/fp32", {"DIRECTION": "unified", "MOVES": True}),
        ("SAM, master", "perturb", "bf16/bf16", {"DIRECTION": "unified", "HAS_MASTER": True}),
        ("ASAM", "perturb", "fp32/fp32", {"DIRECTION": "unified", "ADAPTIVE": True}),
        ("VaSSO", "perturb", "fp32/fp32", {"DIRECTION": "ema"}),
        ("LightSAM III", "perturb", "fp32/fp32", {"DIRECTION": "adam"}),
        ("SGD", "update", "fp32/fp32/fp32", {"UPDATE": "sgd", "STATES": 1}),
        ("SGD", "update", "bf16/bf16/bf16", {"UPDATE": "sgd", "STATES": 1}),
        ("SGD, SAMAR", "update", "fp32/fp32/fp32",
         {"UPDATE": "sgd", "STATES": 1, "SCALE": True, "MIX": True}),
        ("AdamW", "update", "fp32/fp32/fp32", {"UPDATE": "adam", "STATES": 2}),
        ("AdamW", "update", "bf16/bf16/bf16", {"UPDATE": "adam", "STATES": 2}),
        ("AdamW, master", "update", "bf16/bf16/fp32",
         {"UPDATE": "adam", "STATES": 2, "HAS_MASTER": True}),
        ("AdamW, skipping", "update", "fp32/fp32/fp32",
         {"UPDATE": "adam", "STATES": 2, "SCALE": True, "SKIP": True, "ASCENT_STATES": 0}),
        ("LightSAM III", "update", "fp32/fp32/fp32", {"UPDATE": "uncorrected_adam", "STATES": 2}),
    )
]  # fmt: skip


def selected(known: Sequence[Variant]) -> list[tuple[str, Variant]]:
    """The variants of ``SELECTION``, by name."""
    found = []
    for name, kernel, constants in SELECTION:
        fits = (v for v in known if v.kernel == kernel and _has(dict(v.constants), constants))
        found.append((f"{kernel.partition('_')[0]} {name}", next(fits)))
    return found


def _has(constants: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    for name in constants.keys() & wanted.keys():
        value = constants[name]
        if isinstance(value, str) and ":" in value:
            module, _, function = value.partition(":")
            value = function if name == "TERMS" else module.rpartition(".")[2]
        if value != wanted[name]:
            return False
    return True


def table(names: Sequence[str], reports: Sequence[Report]) -> Iterator[str]:
    """Markdown, with a row per report."""
    yield ("| kernel | types | elements | registers | blocks | occupancy | spilled | narrowest | "
           "B in flight per thread | times what memory needs | fences |")  # fmt: skip
    yield "| --- |" + " --- |" * 10
    for name, report in zip(names, reports, strict=True):
        v, f = report.variant, report.flight
        types = "/".join(dict(v.constants)[x] for x in "PGS" if x in dict(v.constants))
        yield (f"| {name} | {types} | {v['CHUNK']:,} | {report.registers} | {f.blocks} | "
               f"{f.occupancy:.0%} | {report.spilled} B | {min(report.widths.values())} bit | "
               f"{f.bytes:.0f} | {f.headroom:.1f} | {f.fences} |")  # fmt: skip


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
