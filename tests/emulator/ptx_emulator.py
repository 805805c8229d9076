"""Kernels in PTX, run on this process's memory by the emulator in C. See README.md.

``load(ptx, name)`` gives a ``Program`` that ``run`` takes. The emulator is compiled when it is
first needed, with the compiler that ``CC`` names, or the system's.
"""

import ctypes
import functools
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ptx

HERE = Path(__file__).parent
SOURCES = ("execute.c", "memory.c", "run.c")
HEADERS = ("emulator.h", "numbers.h")
#: No contraction: a product and a sum are rounded as the PTX says.
FLAGS = ("-std=gnu11", "-O2", "-ffp-contract=off", "-fno-strict-aliasing", "-shared", "-fPIC")


class EmulatorError(Exception):
    """What a GPU would report, or do silently: a wrong access, a barrier that is not reached."""


def compiler() -> list[str] | None:
    """The C compiler's command, or None where there is none."""
    for command in (os.environ.get("CC", ""), "cc", "gcc", "clang"):
        words = shlex.split(command)
        if words and shutil.which(words[0]):
            return words
    return None


def build(folder: Path) -> Path:
    """The shared library in ``folder``: compiled, unless it is there from the same sources.

    Processes may build at the same time: each writes a file of its own and renames it.
    """
    command = compiler()
    if command is None:
        raise RuntimeError("there is no C compiler")
    parts = [(HERE / name).read_bytes() for name in (*SOURCES, *HEADERS)]
    parts.append(" ".join((*command, *FLAGS)).encode())
    library = folder / f"emulator-{hashlib.sha256(b''.join(parts)).hexdigest()[:16]}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as own:
            made = Path(own) / "emulator.so"
            sources = [str(HERE / name) for name in SOURCES]
            subprocess.run([*command, *FLAGS, "-o", str(made), *sources, "-lm"], check=True)
            made.rename(library)
    return library


class Range(ctypes.Structure):
    """``Range`` of ``emulator.h``."""

    _fields_ = [("start", ctypes.c_uint64), ("end", ctypes.c_uint64)]


@dataclass(frozen=True)
class Program:
    """A kernel that the emulator can run."""

    name: str
    kernel: ptx.Kernel
    handle: int

    def packed(self, arguments: Sequence[bytes]) -> bytes:
        """The block of parameters; those that Triton adds for its own use stay zero."""
        last = self.kernel.parameters[-1]
        block = bytearray(last.offset + last.size)
        for parameter, argument in zip(self.kernel.parameters, arguments, strict=False):
            if len(argument) != parameter.size:
                raise ValueError(f"{parameter.name} has {parameter.size} bytes")
            block[parameter.offset : parameter.offset + parameter.size] = argument
        return bytes(block)


class Emulator:
    """The library, and what has been loaded into it.

    Args:
        folder: Where the library is built, or was.
        seed: The orders of blocks and warps follow from it.
        resident: Blocks that are under way at the same time.
        noise: Whether approximate instructions are off by anything that PTX allows.
    """

    def __init__(self, folder: Path, seed: int = 1, resident: int = 3, noise: bool = False):
        self.lib = lib = ctypes.CDLL(str(build(folder)))
        lib.ptx_operation.restype = lib.ptx_type.restype = ctypes.c_char_p
        lib.ptx_create.restype = ctypes.c_void_p
        self._operations, self._types = _names(lib.ptx_operation), _names(lib.ptx_type)
        self.load = functools.cache(self._load)
        self._ranges: Any = None
        self.configure(seed, resident, noise)

    def configure(self, seed: int, resident: int = 3, noise: bool = False) -> None:
        self.lib.ptx_config(ctypes.c_uint64(seed), resident, noise)

    def _load(self, text: str, name: str) -> Program:
        """The kernel of this name in a PTX module."""
        kernel = ptx.Parser(self._operations, self._types).parse(text, name)
        size, constants = len(kernel.code), kernel.constants
        handle = self.lib.ptx_create(
            (ptx.Instruction * size)(*kernel.code), size, kernel.n_registers, len(constants),
            (ctypes.c_int32 * len(constants))(*constants),
            (ctypes.c_uint64 * len(constants))(*constants.values()),
        )  # fmt: skip
        return Program(name, kernel, handle)

    def allow(self, ranges: Sequence[tuple[int, int]]) -> None:
        """The memory that programs may touch, as starts and ends; they must not overlap."""
        self._ranges = (Range * len(ranges))(*sorted(ranges))
        self.lib.ptx_memory(self._ranges, len(ranges))

    def run(
        self, program: Program, grid: Sequence[int], threads: int, shared: int,
        arguments: Sequence[bytes],
    ) -> None:  # fmt: skip
        """Run a launch to its end.

        Args:
            program: What to run.
            grid: One to three numbers of blocks.
            threads: Of a block.
            shared: Bytes of shared memory of a block.
            arguments: The kernel's arguments, as they lie in memory.

        Raises:
            EmulatorError: If it did something that it must not.
        """
        dimensions = (*grid, 1, 1)[:3]
        failed = self.lib.ptx_run(
            ctypes.c_void_p(program.handle), (ctypes.c_uint * 3)(*dimensions),
            (ctypes.c_uint * 3)(threads, 1, 1), shared, program.packed(arguments),
        )  # fmt: skip
        if failed:
            text = ctypes.create_string_buffer(1024)
            self.lib.ptx_errors(text, len(text))
            raise EmulatorError(f"{program.name}: {_placed(program, text.value.decode())}")


def _names(function: Any) -> dict[str, int]:
    """The names that the library gives one by one, until there are no more."""
    found: dict[str, int] = {}
    while (name := function(len(found))) is not None:
        found[name.decode()] = len(found)
    return found


def _placed(program: Program, message: str) -> str:
    """The message with the line of the kernel's source before that of the PTX."""
    head, _, rest = message.partition(": ")
    if head.startswith("line ") and head[5:].isdigit():
        return f"{program.kernel.places.get(int(head[5:]), '')}, PTX {head}: {rest}"
    return message
