"""Launches of Triton kernels that are compiled and run by the emulator, instead of interpreted.

``with compiled_launches.on(machine): optimizer.step(closure)``: every launch inside, of whatever
kernel, is compiled as on a GPU (``compile_server.py``) and run on the CPU tensors that it is given.
Nothing of the library is replaced: what launches a kernel calls the interpreter's ``run`` here, and
``JITFunction.run`` on a GPU, with the same arguments.
"""

import json
import os
import struct
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from triton.language import constexpr, dtype
from triton.runtime.interpreter import InterpretedFunction

import fastsam.kernels

from ptx_emulator import Emulator, Program, compiler

#: The kernels that the library has.
KERNELS = Path(fastsam.kernels.__file__).parent
PACKAGE = fastsam.kernels.__name__
SERVER = Path(__file__).with_name("compile_server.py")
#: How scalar arguments lie in memory, by Triton's name of their type.
FORMATS = {"i1": "?", "i8": "b", "i16": "h", "i32": "i", "i64": "q", "u8": "B", "u16": "H",
           "u32": "I", "u64": "Q", "fp32": "f", "fp64": "d"}  # fmt: skip


@dataclass
class Compiled:
    """What a kernel was compiled to.

    Attributes:
        program: For the emulator.
        types: Of the arguments that are left, by position; "*fp32" is a pointer.
        shared: Bytes of shared memory.
        warps: Of a block.
    """

    program: Program
    types: dict[int, str]
    shared: int
    warps: int


@dataclass(frozen=True)
class Target:
    """What is compiled, for what, and how that is run.

    Attributes:
        architecture: 90 for sm_90.
        kernels: The folder of the kernels' sources: the library's, or a changed copy.
        edit: A change of the PTX, or None.
        seed: The orders of blocks and warps follow from it.
        noise: Whether approximate instructions are off by anything that PTX allows.
    """

    architecture: int = 90
    kernels: Path = KERNELS
    edit: Callable[[str], str] | None = None
    seed: int = 1
    noise: bool = True


class Machine:
    """A GPU that is not there: a compiler, in a process of its own, and the emulator.

    ``folder`` is for what is built and compiled; other processes may use it, too.
    """

    def __init__(self, folder: Path):
        self.emulator = Emulator(folder)
        self._found: dict[str, dict[str, Any]] = {}
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        environment["TRITON_CACHE_DIR"] = str(folder / "triton")
        self._server = subprocess.Popen(
            [sys.executable, str(SERVER)], env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def close(self) -> None:
        """End the compiler."""
        self._server.communicate()

    def compile(
        self, target: Target, kernel: InterpretedFunction, arguments: Sequence[Any],
        keywords: dict[str, Any],
    ) -> Compiled:  # fmt: skip
        """The kernel for these arguments, as a launch would specialise it."""
        request: dict[str, Any] = {
            "folder": str(target.kernels), "architecture": target.architecture,
            "kernel": _path(kernel),
            "keywords": {name: _encoded(x) for name, x in keywords.items()},
        }  # fmt: skip
        # one answer serves all arguments that are specialised alike
        key = json.dumps([request, list(map(_kind, arguments))])
        if key not in self._found:
            self._found[key] = self._ask(request | {"arguments": list(map(_encoded, arguments))})
        answer = self._found[key]
        text = answer["ptx"] if target.edit is None else target.edit(answer["ptx"])
        types = {i: x for i, x in enumerate(answer["signature"].values()) if x != "constexpr"}
        program = self.emulator.load(text, answer["name"])
        return Compiled(program, types, answer["shared"], answer["warps"])

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._server.stdin is not None and self._server.stdout is not None
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        line = self._server.stdout.readline()
        answer: dict[str, Any] = json.loads(line) if line else {"error": "the compiler has ended"}
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer

    def launch(self, compiled: Compiled, grid: Sequence[int], arguments: Sequence[Any]) -> None:
        """Run a launch; ``arguments`` are all of the kernel's, in order, constants among them."""
        packed = [_packed(kind, arguments[i]) for i, kind in compiled.types.items()]
        threads = 32 * compiled.warps
        self.emulator.run(compiled.program, grid, threads, compiled.shared, packed)


def _path(function: InterpretedFunction) -> str:
    """Where a function of the kernels is, below their folder."""
    module = function.fn.__module__
    assert module.startswith(f"{PACKAGE}."), module
    return f"{module.removeprefix(f'{PACKAGE}.')}:{function.fn.__name__}"


def _encoded(value: Any) -> Any:
    """For a request: see ``compile_server``."""
    if isinstance(value, constexpr):
        value = value.value
    if isinstance(value, torch.Tensor):
        return ["pointer", str(value.dtype), value.data_ptr()]
    if isinstance(value, dtype):
        return ["dtype", value.name]
    if isinstance(value, InterpretedFunction):
        return ["function", _path(value)]
    assert value is None or isinstance(value, (bool, int, float, str)), value
    return value


def _kind(value: Any) -> Any:
    """At least what Triton distinguishes: alignment; of integers also 1, 16k and the width."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), value.data_ptr() % 16 == 0
    if isinstance(value, int) and not isinstance(value, bool):
        return "int", value == 1, value % 16 == 0, -(2**31) <= value < 2**31, value >= 2**63
    return _encoded(value)


def _packed(kind: str, value: Any) -> bytes:
    if kind.startswith("*"):
        return struct.pack("Q", value.data_ptr())
    return struct.pack(FORMATS[kind], value)


class Memory(TorchDispatchMode):
    """Keeps an account of the memory of tensors: of all which torch's operators come across.

    Tensors on numpy's memory are made by no operator. They are arguments of launches, which are to
    be added, or the gradients of a parameter, which is asked for them.
    """

    def __init__(self) -> None:
        super().__init__()
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self._params: weakref.WeakValueDictionary[int, torch.Tensor] = weakref.WeakValueDictionary()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        self.add(*torch.utils._pytree.tree_leaves((args, kwargs, result)))
        return result

    def add(self, *found: Any) -> None:
        """Account for the tensors among some objects."""
        for x in found:
            if not isinstance(x, torch.Tensor) or x.device.type != "cpu":
                continue
            if isinstance(x, torch.nn.Parameter):
                self._params[id(x)] = x
            storage = x.untyped_storage()
            self._storages[storage.data_ptr()] = StorageWeakRef(storage), storage.nbytes()

    def ranges(self) -> list[tuple[int, int]]:
        """Where the memory is of tensors that are still there: starts and ends."""
        self.add(*(param.grad for param in list(self._params.values())))
        self._storages = {at: x for at, x in self._storages.items() if not x[0].expired()}
        return [(at, at + size) for at, (_, size) in self._storages.items() if size]


@contextmanager
def on(machine: Machine, **settings: Any) -> Iterator[list[str]]:
    """Run launches on the machine. They may touch the memory of tensors that are alive.

    ``settings`` are those of ``Target``. Yields a list that gets the names of the kernels that are
    launched.
    """
    target = Target(**settings)
    machine.emulator.configure(target.seed, noise=target.noise)
    kernels: list[str] = []
    memory = Memory()
    interpreted = InterpretedFunction.run

    def run(self, *args, grid, warmup, **kwargs):
        compiled = machine.compile(target, self, args, kwargs)
        if warmup:
            return
        memory.add(*args)
        machine.emulator.allow(memory.ranges())
        rest = [kwargs[name] for name in self.arg_names[len(args) :]]
        machine.launch(compiled, grid, [*args, *rest])
        kernels.append(self.fn.__name__)

    InterpretedFunction.run = run
    try:
        with memory:
            yield kernels
    finally:
        InterpretedFunction.run = interpreted


def missing() -> str | None:
    """What there is not on this machine that it takes, or None."""
    if not triton.knobs.runtime.interpret:
        return "kernels are compiled for the GPU that is there"
    if compiler() is None:
        return "needs a C compiler"
    if "nvidia" not in triton.backends.backends:
        return "needs Triton's backend for NVIDIA GPUs"
    return None
