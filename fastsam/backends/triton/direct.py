"""Launching a kernel again without having Triton look it up again.

``kernel[grid](...)`` binds the arguments, works out what they specialise the kernel for, finds what
was compiled for that, and compares every global that the kernel reads with what it was. That is
most of what a launch costs on the host. A prepared launch differs from the one before by a single
number, so it does this once, and launches what it was given from then on: ``compiled[grid](...)``,
which is the same on all kinds of GPU. That asks for the current stream and calls launch hooks.
"""

import inspect
from collections.abc import Callable
from typing import Any

import triton
import triton.compiler

# a Triton that has not both is served by ``kernel[grid]`` alone
FUNCTION = getattr(triton, "JITFunction", ())
COMPILED = getattr(triton.compiler, "CompiledKernel", ())


class Direct:
    """A launch that can be made again and again, on the device that is current.

    The first is Triton's own. So is every other where that gives no compiled kernel, as in its
    interpreter, where it wants the arguments otherwise than they are known to be, where the kernel
    has a hook of other code, and where the number that varies has become one of another type.
    Triton's settings for compilation count as they were at the first.

    Args:
        kernel: A ``@triton.jit`` function.
        grid: Numbers of programs.
        *arguments: The first arguments. They are the same objects in every launch, and stay where
            they are. One number may follow on them that is given with each launch, and that Triton
            does not specialise on.
        **constants: The other arguments by name, and options of the launch.
    """

    def __init__(
        self, kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any
    ) -> None:
        self._kernel, self._grid = kernel, grid
        self.arguments, self._constants = arguments, constants
        self._look_up = kernel[grid]
        self._hooks: Any = getattr(kernel, "pre_run_hooks", ())
        self._launch: Callable[..., Any] | None = None
        self._type = ""  # of the number that varies
        self._after: tuple[Any, ...] = ()  # the arguments that follow it

    def __call__(self, *number: int) -> None:
        """Launch; ``number`` is the one that varies, if there is one."""
        if self._launch is not None and type_of(*number) == self._type and not self._hooks:
            self._launch(*self.arguments, *number, *self._after)
            return
        compiled = self._look_up(*self.arguments, *number, **self._constants)
        self._launch = self._directly(compiled, number)

    def _directly(self, compiled: Any, number: tuple[int, ...]) -> Callable[..., Any] | None:
        """How to launch what Triton has just launched; None where that is not known."""
        if not (isinstance(self._kernel, FUNCTION) and isinstance(compiled, COMPILED)):
            return None
        try:
            parameters = inspect.signature(self._kernel.fn)
            given = {k: x for k, x in self._constants.items() if k in parameters.parameters}
            bound = parameters.bind(*self.arguments, *number, **given)
            bound.apply_defaults()
            if list(compiled.src.signature) != list(bound.arguments):
                return None  # it is launched with other arguments than the function's
            self._after = bound.args[len(self.arguments) + len(number) :]
            self._type = type_of(*number)
            launch: Callable[..., Any] = compiled[(*self._grid, 1, 1)[:3]]
        except (AttributeError, TypeError):
            return None
        return launch


def type_of(number: int | None = None) -> str:
    """What Triton takes an integer for that it does not specialise on; empty where there is none.

    That follows from its size.
    """
    if number is None:
        return ""
    if -(1 << 31) <= number < 1 << 31:
        return "i32"
    return "i64" if -(1 << 63) <= number < 1 << 63 else "u64"
