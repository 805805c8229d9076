"""The stand-in driver from Python: its counters, and Triton's kernels handed to the emulator."""

import ctypes
import os
import time
from pathlib import Path

import triton
from triton.compiler import compiler
from triton.compiler.compiler import CompiledKernel
from triton.runtime import jit

from ptx_emulator import Emulator

lib = ctypes.CDLL("libcuda.so.1")
lib.fake_host_node.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]

#: Name and seconds of every kernel that was compiled, or found in the cache on disk.
compiled: list[tuple[str, float]] = []
#: Executes kernels. The environment decides on the order of blocks and warps, and whether
#: approximate instructions err as far as they may.
emulator = Emulator(
    Path(os.environ["GPU_STANDIN"]),
    seed=int(os.environ.get("PTX_SEED", "1")),
    noise=os.environ.get("PTX_NOISE", "0") != "0",
)


def counter(name: str) -> int:
    """One of the driver's counters: ``counter("launches")`` is ``fake_launches``."""
    return ctypes.c_size_t.in_dll(lib, "fake_" + name).value


def last_torch_kernel() -> str:
    """The name of the last kernel of torch's that was to run on the GPU, and did not."""
    return (ctypes.c_char * 512).in_dll(lib, "fake_torch_kernel").value.decode()


def execute(kernels: bool = True) -> None:
    """Execute compiled kernels from now on, or only count their launches."""
    emulator.lib.ptx_bounds(lib.fake_block)
    lib.fake_set_hook(emulator.lib.ptx_run if kernels else None)


def synchronize() -> None:
    """Let all that waits be done, on both devices."""
    lib.cudaDeviceSynchronize()


def faults() -> str:
    """What compiled kernels did that they must not, since the last call; empty if nothing."""
    text = ctypes.create_string_buffer(1024)
    number = emulator.lib.ptx_errors(text, len(text))
    return f"{number} faults, the first: {text.value.decode()}" if number else ""


def _register(kernel: CompiledKernel) -> None:
    program = emulator.load(kernel.asm["ptx"], kernel.name)
    sizes = [parameter.size for parameter in program.kernel.parameters]
    lib.fake_register(
        ctypes.c_void_p(kernel.function), len(sizes), (ctypes.c_int * len(sizes))(*sizes),
        ctypes.c_void_p(program.handle),
    )  # fmt: skip


def _watch() -> None:
    """From now on every kernel that is loaded is registered, and what is compiled is noted."""
    load, compile = CompiledKernel._init_handles, compiler.compile

    def loading(self, *args, **kwargs):
        fresh = self.module is None
        result = load(self, *args, **kwargs)
        if fresh and self.function:
            _register(self)
        return result

    def compiling(*args, **kwargs):
        start = time.perf_counter()
        kernel = compile(*args, **kwargs)
        compiled.append((kernel.name, time.perf_counter() - start))
        return kernel

    CompiledKernel._init_handles = loading
    for module in (compiler, triton.compiler, jit):
        if hasattr(module, "compile"):
            module.compile = compiling


_watch()
