"""Triton's interpreter at about twice its speed, with the same results.

Most of its time goes to what it works out anew in every operation of every program: NumPy's name
for a dtype, the type of a block, the shape of a tensor. Here that is kept.
``tests/kernels/test_quick_interpreter.py`` compares the bits with those of the interpreter as it
comes.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import triton.language as tl
from triton.language import core
from triton.runtime import interpreter


class _Patched:
    def restore(self) -> None:
        """Leave the language patched: a test process compiles nothing."""


@contextmanager
def quick() -> Iterator[None]:
    """Patch the interpreter inside the block."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", _patching_once())
        patch.setattr(interpreter, "_get_np_dtype", _numpy_dtypes())
        patch.setattr(core.block_type, "__init__", _block_types())
        patch.setattr(core.tensor, "__init__", _tensors())
        patch.setattr(core, "_unwrap_if_constexpr", _unwrapping())
        # a quarter of the time: it works out whether integers overflow, and then asserts it only
        # with debug=True
        builder = interpreter.interpreter_builder
        patch.setattr(builder, "options", replace(builder.options, sanitize_overflow=False))
        yield


def _patching_once():
    """Patch the language once, not again in every nested call: the repeats do nothing."""
    patch_language = interpreter._patch_lang
    seen: dict[int, dict] = {}  # held, so that no other gets its id
    done: set[int] = set()

    def patch_once(fn):
        names = fn.__globals__
        if id(names) not in seen:
            seen[id(names)] = names
            modules = {id(x) for x in names.values() if x is tl or x is core}
            if not modules <= done:
                patch_language(fn)
                done.update(modules)
        return _Patched()

    return patch_once


def _numpy_dtypes():
    look_up = interpreter._get_np_dtype  # makes a dictionary of all dtypes first
    known: dict[str, np.dtype] = {}

    def numpy_dtype(dtype):
        found = known.get(dtype.name)
        if found is None:
            found = known[dtype.name] = look_up(dtype)
        return found

    return numpy_dtype


def _block_types():
    plain = core.block_type.__init__
    known: dict[tuple, tuple] = {}

    def init(self, element_ty, shape):
        sizes = [s.value if isinstance(s, core.constexpr) else s for s in shape]
        key = (element_ty.name, *sizes)
        if key not in known:
            plain(self, element_ty, shape)
            known[key] = self.shape, self.numel, self.name
        self.element_ty = element_ty
        self.shape, self.numel, self.name = known[key]

    return init


def _tensors():
    known: dict[str, tuple] = {}

    def init(self, handle, type):
        self.handle, self.type, self.dtype = handle, type, type.scalar
        shape = known.get(type.name)
        if shape is None:
            sizes = type.shape if type.is_block() else ()
            shape = core.tuple([core.constexpr(s) for s in sizes]), core.constexpr(math.prod(sizes))
            known[type.name] = shape
        self.shape, self.numel = shape

    return init


def _unwrapping():
    plain = core._unwrap_if_constexpr
    bare = {int, bool, float, str, type(None), core.dtype, core.tensor}

    def unwrap(x):
        kind = type(x)
        if kind is core.constexpr:
            return x.value
        return x if kind in bare else plain(x)

    return unwrap
