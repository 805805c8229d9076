"""Compiles kernels for GPUs that need not be there, in a process of its own.

The tests' process interprets kernels, which is decided when Triton is imported. So this one
compiles. It reads requests from its standard input and answers on its standard output, a line of
JSON each, and is given what a launch is given: Triton's own ``JITFunction.warmup`` decides, as at
a launch, what the kernel is specialised for. Only the driver is not Triton's, for want of a GPU.

A request names a ``folder`` of kernels, as ``kernels/`` or a changed copy of it, a ``kernel`` there
as "module:function", the ``architecture`` as 90 for sm_90, and the launch's ``arguments`` and
``keywords``; values of these that JSON has not are lists, see ``_decoded``.
"""

import functools
import gc
import importlib
import json
import os
import sys
import traceback
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget


@dataclass
class Driver:
    """What ``JITFunction`` asks a driver where it does not launch; the device is the target."""

    architecture: int = 90

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self) -> int:
        return self.architecture

    def get_current_stream(self, device: int) -> int:
        return 0


@dataclass
class Pointer:
    """As much of a tensor as a specialisation depends on; ``dtype`` is "torch.float32" or so."""

    dtype: str
    address: int

    def data_ptr(self) -> int:
        return self.address

    def ptr_range(self) -> int:
        return 0


@functools.cache
def package(folder: str) -> str:
    """A name under which a folder of kernels is a package, without what its ``__init__`` has."""
    name = f"kernels_{len(sys.modules)}"
    sys.modules[name] = ModuleType(name)
    sys.modules[name].__path__ = [folder]
    return name


def function(folder: str, path: str) -> Any:
    """A function by "module:name", the module below the folder."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(f"{package(folder)}.{module}"), name)


def _decoded(value: Any, folder: str) -> Any:
    if not isinstance(value, list):
        return value
    kind, *rest = value
    if kind == "pointer":
        return Pointer(*rest)
    return tl.dtype(*rest) if kind == "dtype" else function(folder, *rest)


def answer(request: dict[str, Any], driver: Driver) -> dict[str, Any]:
    """Compile what a request names, if it has not been."""
    folder, driver.architecture = request["folder"], request["architecture"]
    kernel = function(folder, request["kernel"])
    arguments = [_decoded(x, folder) for x in request["arguments"]]
    keywords = {name: _decoded(x, folder) for name, x in request["keywords"].items()}
    compiled = kernel.warmup(*arguments, grid=(1,), **keywords)
    return {
        "ptx": compiled.asm["ptx"],
        "name": compiled.metadata.name,
        "shared": compiled.metadata.shared,
        "warps": compiled.metadata.num_warps,
        "signature": compiled.src.signature,  # with "constexpr" for what is no argument any more
    }


def without_assembler() -> None:
    """Stop at the PTX, as nobody reads the machine code; the cache must not be anybody else's."""
    from triton.backends.nvidia.compiler import CUDABackend

    CUDABackend.make_cubin = lambda *args, **kwargs: b""


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what anybody prints is no answer
    without_assembler()
    gc.disable()  # it would take a fifth of the time
    driver = Driver()
    triton.runtime.driver.set_active(driver)
    for line in sys.stdin:
        try:
            found = answer(json.loads(line), driver)
        except BaseException:
            found = {"error": traceback.format_exc()}
        print(json.dumps(found), file=answers, flush=True)


if __name__ == "__main__":
    main()
