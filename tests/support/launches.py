"""Counting what a step launches and moves, in Triton's interpreter: exact, on any machine.

``with launches.record() as log: optimizer.first_step()`` leaves the launches in ``log.launches``
and the sums of bytes in ``log.loaded``, ``log.stored`` and ``log.copied``.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.language import constexpr
from triton.runtime import interpreter

from compiled.variants import Variant

TYPES = {
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
}


@dataclass
class Launch:
    """One launch: the compiled kernel that a GPU would run, its grid, and the bytes it moved."""

    variant: Variant
    grid: tuple[int, ...]
    loaded: int = 0
    stored: int = 0

    @property
    def kernel(self) -> str:
        return self.variant.kernel


@dataclass
class Log:
    """What happened while recording; ``copied`` counts bytes that torch's own operators moved."""

    launches: list[Launch] = field(default_factory=list)
    copied: int = 0

    @property
    def kernels(self) -> list[str]:
        return [launch.kernel for launch in self.launches]

    @property
    def variants(self) -> set[Variant]:
        return {launch.variant for launch in self.launches}

    @property
    def loaded(self) -> int:
        return sum(launch.loaded for launch in self.launches)

    @property
    def stored(self) -> int:
        return sum(launch.stored for launch in self.launches)


class _Operators(TorchDispatchMode):
    """Adds up the bytes that torch's operators read and write, outside of launches."""

    def __init__(self, log: Log):
        super().__init__()
        self.log = log
        self.launching = False

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        if not self.launching and not (operator.is_view or "empty" in operator.name()):
            tensors = [x for x in torch.utils._pytree.tree_leaves((args, kwargs, result))
                       if isinstance(x, torch.Tensor)]  # fmt: skip
            self.log.copied += sum(x.numel() * x.element_size() for x in tensors)
        return result


@contextmanager
def record(execute: bool = True) -> Iterator[Log]:
    """Record launches made under the interpreter; atomics are not counted as bytes.

    Args:
        execute: Run the kernels. False does all of a step's work on the host but no program, for
            counting launches, or for a warm-up where the values do not matter.
    """
    log = Log()
    operators = _Operators(log)
    builder, function = interpreter.InterpreterBuilder, interpreter.InterpretedFunction
    load, store, run = builder.create_masked_load, builder.create_masked_store, function.run

    def size(pointers: Any, mask: Any) -> int:
        return int(mask.data.sum()) * pointers.get_element_ty().primitive_bitwidth // 8

    def counting_load(self, pointers, mask, *args, **kwargs):
        log.launches[-1].loaded += size(pointers, mask)
        return load(self, pointers, mask, *args, **kwargs)

    def counting_store(self, pointers, value, mask, *args, **kwargs):
        log.launches[-1].stored += size(pointers, mask)
        return store(self, pointers, value, mask, *args, **kwargs)

    def recording_run(self, *args, grid, warmup, **kwargs):
        if warmup:  # compiles, and launches nothing
            return
        log.launches.append(Launch(_variant(self, args, kwargs), grid))
        if not execute:
            return
        operators.launching = True  # the interpreter copies the arguments about
        try:
            run(self, *args, grid=grid, warmup=warmup, **kwargs)
        finally:
            operators.launching = False

    builder.create_masked_load, builder.create_masked_store = counting_load, counting_store
    function.run = recording_run
    try:
        with operators:
            yield log
    finally:
        builder.create_masked_load, builder.create_masked_store = load, store
        function.run = run


def _variant(kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Variant:
    given = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    constants = {k: given[k] for k, t in kernel.fn.__annotations__.items() if t is constexpr}
    arguments = {
        k: TYPES[given[k].dtype] if isinstance(given[k], torch.Tensor)
        else "i64" if given[k] >= 1 << 31 else "i32"
        for k in kernel.arg_names if k not in constants
    }  # fmt: skip
    options = {k: value for k, value in kwargs.items() if k not in kernel.arg_names}
    return Variant.create(kernel.__name__, constants, arguments, options)
