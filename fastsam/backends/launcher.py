"""Launches: their arguments on the device, and what is kept there from step to step."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastsam.kernels.layout import WIDTH, Launch, Launches
from fastsam.kernels.table import Table, Upload, is_capturing

from ..rules import Step, identical
from .buckets import Bucket
from .hyper import hyper_rows, hyper_values

LAUNCHES = Launches()
Launched = Callable[[], Any]


class Launcher:
    """Tables, scratch memory and hyper-parameters on the device, and launches that use them."""

    def __init__(self, launches: Launches = LAUNCHES) -> None:
        self.launches = launches
        # by pass and dtypes, so that a steady training loop finds its tables as it left them
        self._tables: dict[Any, Table] = {}
        self._scratches: dict[Any, Tensor] = {}
        self._hyper: dict[Any, tuple[list[list[float]], Tensor]] = {}
        self._hyper_of: dict[Any, Step] = {}  # the pass that they were last made for
        self._hyper_values: dict[Any, list[Any]] = {}  # what they were made of
        self._uploads: dict[Any, Upload] = {}
        self._captured: list[Tensor] = []  # what graphs use
        self._compiled: set[Any] = set()

    def _prepare(
        self, kernel: Any, bucket: Bucket, step: Step, scalars: Tensor, launch: Launch,
        *more: Any, compiles: bool = False, **constants: Any,
    ) -> Launched:  # fmt: skip
        """A launch that only has to be made: one program per chunk of the bucket.

        Every kernel's first arguments are the tables. With ``compiles`` the kernel is compiled and
        loaded here, if it has not been before.
        """
        chunks = bucket.table.chunks(launch.chunk)
        if is_capturing(scalars.device):
            bucket.table.captured(launch.chunk)
            self._captured += [x for x in more if isinstance(x, Tensor)]
        tables = (
            bucket.table.pointers, chunks, bucket.table.columns, self._hyper_table(bucket, step)
        )  # fmt: skip
        constants |= _options(scalars.device, launch.lanes)
        if compiles:
            key = scalars.device, launch.chunk, *constants.values()
            if key not in self._compiled:
                compiled = kernel.warmup(
                    *tables, scalars, *more, grid=(1,), CHUNK=launch.chunk, **constants
                )
                getattr(compiled, "run", None)  # loads it
                self._compiled.add(key)
        return functools.partial(
            kernel[(chunks.size(0),)], *tables, scalars, *more, CHUNK=launch.chunk, **constants
        )

    def _scratch(self, name: str, count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory that is zero at first. Counters of arrivals are left at zero by the kernels."""
        scratch = self._scratches.get((name, dtype, device))
        if scratch is None or scratch.numel() < count:
            scratch = torch.zeros(count, dtype=dtype, device=device)
            self._scratches[name, dtype, device] = scratch
        return scratch

    def _hyper_table(self, bucket: Bucket, step: Step) -> Tensor:
        """The hyper-parameters on the device, a row per group; uploaded when one changed."""
        dtype = bucket.arithmetic
        key = dtype, bucket.table.device
        if self._hyper_of.get(key) is step:  # another launch of the same pass
            return self._hyper[key][1]
        cached = self._hyper.get(key)
        capturing = is_capturing(bucket.table.device)  # a graph has a table of its own
        values = hyper_values(step)
        if cached and not capturing and identical(values, self._hyper_values.get(key, [])):
            self._hyper_of[key] = step
            return cached[1]
        rows, on_device = hyper_rows(step, bucket.table.device)
        # numbers cannot change, tensors can
        numbers = not any(isinstance(value, Tensor) for value in values)
        self._hyper_values[key] = values if numbers and not capturing else []
        if capturing or cached is None or cached[0] != rows:
            padded = [row + [0.0] * (WIDTH - len(row)) for row in rows]
            upload = self._uploads.setdefault(key, Upload(bucket.table.device, self._captured))
            uploaded = upload(torch.tensor(padded, dtype=dtype).numpy())
            cached = self._hyper[key] = ([] if capturing else rows), uploaded
        elif key in self._uploads:
            self._uploads[key].set_aside(cached[1])
        for i, j, x in on_device:
            cached[1][i, j].copy_(x)
        self._hyper_of[key] = step
        return cached[1]


@functools.cache
def _options(device: torch.device, lanes: int) -> dict[str, Any]:
    """Launch options for one thread per lane. Triton's default for fusion is about to change."""
    warp = torch.cuda.get_device_properties(device).warp_size if device.type == "cuda" else 32
    return {"LANES": lanes, "num_warps": lanes // warp, "enable_fp_fusion": True}
