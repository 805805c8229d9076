"""Launches: their arguments on the device, and what is kept there from step to step."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastsam.kernels.layout import WIDTH, Launch, Launches
from fastsam.kernels.table import Table, Upload, is_capturing
from fastsam.step.batch import identical
from fastsam.step.spec import StepSpec

from .buckets import Bucket
from .direct import Direct
from .hyper import hyper_rows, hyper_values, is_fixed

LAUNCHES = Launches()
#: Passes that a step has at most where it is captured: each uploads the hyper-parameters anew.
PASSES = 16


@dataclass
class Launched:
    """A prepared launch: call it to run it."""

    bucket: Bucket
    run: Callable[[int], Any]

    def __call__(self) -> None:
        self.run(self.bucket.origin)


@dataclass
class HyperTable:
    """The hyper-parameters of one optimizer on one device, a row per group.

    Attributes:
        spec: The pass that they were last looked at for.
        values: What they were made of, where nothing of it can change: no tensors, no lists.
        rows: What the device holds; empty where that belongs to a graph.
        filled: Places in the rows that hold what was on the device already.
    """

    tensor: Tensor
    spec: StepSpec
    values: list[Any]
    rows: list[list[float]]
    filled: list[tuple[int, int]]


class Launcher:
    """Tables, scratch memory and hyper-parameters on the device, and launches that use them."""

    def __init__(self, launches: Launches = LAUNCHES) -> None:
        self.launches = launches
        # by pass and dtypes, so that a steady training loop finds its tables as it left them
        self._tables: dict[Any, Table] = {}
        self._scratches: dict[Any, Tensor] = {}
        self._hyper: dict[Any, HyperTable] = {}
        self._uploads: dict[Any, Upload] = {}
        self._captured: list[Tensor] = []  # what graphs use
        self._compiled: set[Any] = set()

    def _prepare(
        self, kernel: Any, bucket: Bucket, spec: StepSpec, scalars: Tensor, launch: Launch,
        *more: Any, compiles: bool = False, backwards: bool = False, **constants: Any,
    ) -> Launched:  # fmt: skip
        """Prepare a launch of one program per chunk of the bucket.

        Every kernel's first arguments are the tables, and its last is the backups' origin. With
        ``compiles`` the kernel is compiled and loaded here, if it has not been before; with
        ``backwards`` the last chunk comes first.
        """
        chunks, table = bucket.table.chunks(launch.chunk, backwards), bucket.table.pointers
        if is_capturing(scalars.device):
            bucket.table.captured(launch.chunk, backwards)
            self._captured += [x for x in more if isinstance(x, Tensor)]
        hyper = self._hyper_table(bucket, spec)
        arguments = table, chunks, bucket.table.columns, hyper, scalars, *more
        constants |= _options(scalars.device, launch.lanes)
        if compiles:
            key = scalars.device, launch.chunk, *constants.values()
            if key not in self._compiled:
                compiled = kernel.warmup(
                    *arguments, bucket.origin, grid=(1,), CHUNK=launch.chunk, **constants
                )
                getattr(compiled, "run", None)  # loads it
                self._compiled.add(key)
        grid = (chunks.size(0),)
        return Launched(bucket, Direct(kernel, grid, *arguments, CHUNK=launch.chunk, **constants))

    def _scratch(self, name: str, count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory that is zero at first. Counters of arrivals are left at zero by the kernels."""
        scratch = self._scratches.get((name, dtype, device))
        if scratch is None or scratch.numel() < count:
            scratch = torch.zeros(count, dtype=dtype, device=device)
            self._scratches[name, dtype, device] = scratch
        return scratch

    def _hyper_table(self, bucket: Bucket, spec: StepSpec) -> Tensor:
        """The hyper-parameters on the device; uploaded when one changed, to where they were.

        A graph has a table of its own.
        """
        key = bucket.arithmetic, bucket.table.device
        cached = self._hyper.get(key)
        if cached is not None and cached.spec is spec:  # another launch of the same pass
            return cached.tensor
        capturing = is_capturing(bucket.table.device)
        values = hyper_values(spec)
        if cached is not None and not capturing and identical(values, cached.values):
            cached.spec = spec
            return cached.tensor
        rows, on_device = hyper_rows(spec, bucket.table.device)
        upload = self._uploads.setdefault(key, Upload(bucket.table.device, self._captured, PASSES))
        filled = [(i, j) for i, j, _ in on_device]
        if capturing or cached is None or (cached.rows, cached.filled) != (rows, filled):
            padded = np.array([row + [0.0] * (WIDTH - len(row)) for row in rows])
            host = padded.astype(np.float64 if bucket.arithmetic == torch.float64 else np.float32)
            into = cached.tensor if cached is not None and cached.rows and not capturing else None
            uploaded: Tensor = upload(host, into)
        else:
            uploaded = cached.tensor
            upload.set_aside(uploaded)
        for i, j, x in on_device:
            uploaded[i, j].copy_(x)
        held = values if all(map(is_fixed, values)) and not capturing else []
        self._hyper[key] = HyperTable(uploaded, spec, held, [] if capturing else rows, filled)
        return uploaded


@functools.cache
def _options(device: torch.device, lanes: int) -> dict[str, Any]:
    """Launch options for one thread per lane. Triton's default for fusion is about to change."""
    warp = torch.cuda.get_device_properties(device).warp_size if device.type == "cuda" else 32
    return {"LANES": lanes, "num_warps": lanes // warp, "enable_fp_fusion": True}
