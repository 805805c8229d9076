"""The triton backend: one kernel launch per pass, bucket and device."""

import functools
from collections import defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from fastsam.kernels.layout import (
    WIDTH,
    Launch,
    Launches,
    Row,
    Task,
)
from fastsam.kernels.perturb import perturb_kernel
from fastsam.kernels.reduce import reduce_kernel
from fastsam.kernels.table import Table, Upload, is_capturing
from fastsam.kernels.update import update_kernel

from ..ratio import SharpnessRatio
from ..rules import Batch, Step, identical
from .buckets import (
    TYPES,
    Bucket,
    FlatBackup,
    ascent_rows,
    ascent_states,
    dense,
    grad_rows,
    key_rows,
    like_layout,
    release,
    state_rows,
    write_back,
)
from .hyper import hyper_rows, hyper_values
from .reference import adapt, keep_rejected, leave_final_gradient, undone_if_it_fails

FIRST, LAST = int(Task.FIRST), int(Task.LAST)
LAUNCHES = Launches()
Launched = Callable[[], Any]


class TritonBackend:
    """See the module's docstring."""

    takes_scaled = True

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
        self._reductions: dict[Any, tuple[dict[str, Any], int, bool]] = {}
        self._compiled: set[Any] = set()

    # --- the interface ---

    def ascend(self, batch: Batch, step: Step, scalars: Tensor) -> FlatBackup:
        try:
            return self._ascend(batch, step, scalars)
        except BaseException:
            self._forget(batch)
            raise

    def descend(self, batch: Batch, backup: FlatBackup | None, step: Step, scalars: Tensor) -> None:
        try:
            self._descend(batch, backup, step, scalars)
        except BaseException:
            self._forget(batch)
            raise

    def hypergradient(
        self, batch: Batch, backup: FlatBackup | None, hessian: str, step: Step, scalars: Tensor
    ) -> None:
        try:
            self._hypergradient(batch, backup, hessian, step, scalars)
        except BaseException:
            self._forget(batch)
            raise

    # --- the passes ---

    def _ascend(self, batch: Batch, step: Step, scalars: Tensor) -> FlatBackup:
        backup = FlatBackup(batch.layout)
        buckets = self._buckets("ascent", batch, step)
        states = ascent_states(step)
        for bucket in buckets:
            bucket.reserve(batch, backup)
        for bucket in buckets:
            rows = key_rows(bucket, batch, step)
            if states:
                rows |= ascent_rows(bucket, batch, step)
            bucket.locate(batch, backup, rows)
        with _on(scalars.device):
            if step.needs_ascent_norm:
                run(self._reduce("ascent", buckets, step, scalars))
            try:
                for bucket in buckets:
                    self._prepare(
                        perturb_kernel, bucket, step, scalars, self.launches.perturb,
                        RULE=step.ascent.name, STATES=states, ADAPTIVE=step.adaptive,
                        HAS_MASTER=bucket.has_master, STOCHASTIC=_is_stochastic(bucket, step),
                        **_only(bucket.types, "P", "G", "ACC"),
                    )()  # fmt: skip
                    backup.written += 1
                    write_back(bucket, batch)
            except BaseException:
                backup.restore()
                raise
        release(buckets)
        return backup

    def _descend(
        self, batch: Batch, backup: FlatBackup | None, step: Step, scalars: Tensor
    ) -> None:
        buckets = self._buckets("descent", batch, step)
        # the update kernel looks at the ascent's state only where it may have to put it back
        states = ascent_states(step) if step.skip_nonfinite else 0
        for bucket in buckets:
            rows = key_rows(bucket, batch, step)
            if not bucket.described:
                rows |= state_rows(bucket, batch, step, self.launches.update)
            if step.mix is not None:
                rows |= grad_rows(bucket, {Row.FIRST_GRAD: batch.firsts})
            if states or step.mix is not None:
                rows |= ascent_rows(bucket, batch, step)
            bucket.locate(batch, backup, rows)
        # a user's rule runs on the host; the reduction knows SAMAR's own
        rule = None if type(step.mix) is SharpnessRatio else step.mix
        with _on(scalars.device):
            # Whatever needs memory or a compiler comes before the first launch: the reduction
            # changes scalars that are state, and no update can be undone.
            reduction: list[Launched] = []
            if step.needs_descent_norm:
                kind = "descent" if step.mix is None else "mix"
                reduction = self._reduce(kind, buckets, step, scalars)
            if step.base is None:
                with undone_if_it_fails(scalars):
                    run(reduction)
                    if rule is not None:
                        adapt(rule, scalars)
                    if backup is not None:
                        backup.restore()
                    keep_rejected(batch, step, scalars)
                    leave_final_gradient(batch, step, scalars)
                release(buckets)
                return
            updates = []
            for bucket in buckets:
                arrivals = self._scratch(
                    "updated", bucket.table.columns, torch.int32, scalars.device
                )
                updates.append(self._prepare(
                    update_kernel, bucket, step, scalars, self.launches.update, arrivals,
                    compiles=True, BASE=step.base.name, SCALE=step.rescales,
                    MIX=step.mix is not None, SKIP=step.skip_nonfinite, ASCENT_STATES=states,
                    HAS_MASTER=bucket.has_master, STOCHASTIC=_is_stochastic(bucket, step),
                    **bucket.types,
                ))  # fmt: skip
            if backup is not None:
                backup.restore(backup.left_by(batch))
            if rule is None:
                run(reduction)
            else:
                with undone_if_it_fails(scalars):
                    run(reduction)
                    adapt(rule, scalars)
            for bucket, update in zip(buckets, updates, strict=True):
                update()
                write_back(bucket, batch)
        release(buckets)

    def _hypergradient(
        self, batch: Batch, backup: FlatBackup | None, hessian: str, step: Step, scalars: Tensor
    ) -> None:
        buckets = self._buckets("hypergradient", batch, step)
        others = {Row.FIRST_GRAD: batch.firsts, Row.VALIDATION: batch.validation,
                  Row.TRAINING: batch.training}  # fmt: skip
        for bucket in buckets:
            rows = ascent_rows(bucket, batch, step) | grad_rows(bucket, others)
            bucket.locate(batch, backup, rows)
        with _on(scalars.device):
            run(self._reduce(hessian, buckets, step, scalars))
        release(buckets)

    # --- launches ---

    def _reduce(
        self, kind: str, buckets: list[Bucket], step: Step, scalars: Tensor
    ) -> list[Launched]:
        # the flags take longer than the launch: they are worked out once for every kind of step
        needs_norm = step.base is not None and step.base.needs_norm
        key = (kind, step.ascent.name, step.adaptive, step.renormalize, step.skip_nonfinite,
               step.max_grad_norm is None, needs_norm, type(step.mix),
               step.skip_first)  # fmt: skip
        if key not in self._reductions:
            self._reductions[key] = _reduction(kind, step)
        constants, tasks, streams = self._reductions[key]
        launch = self.launches.reduce_streams if streams else self.launches.reduce
        launches = []
        for i, bucket in enumerate(buckets):
            partials = constants["SUMS"] * bucket.table.chunks(launch.chunk).size(0)
            last = i == len(buckets) - 1
            launches.append(self._prepare(
                reduce_kernel, bucket, step, scalars, launch,
                self._scratch("partials", partials, bucket.arithmetic, scalars.device),
                self._scratch("reduced", 1, torch.int32, scalars.device),
                tasks | (FIRST if i == 0 else 0) | (LAST if last else 0),
                HAS_MASTER=bucket.has_master and constants["ADAPTIVE"],
                **constants, **_only(bucket.types, "P", "G", "ACC"),
            ))  # fmt: skip
        return launches

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

    def _forget(self, batch: Batch) -> None:
        """After a failure: no table is known to hold what it should."""
        if batch.layout is not None:
            for name in ("ascent", "descent"):
                batch.layout.cache.pop(name, None)
        for tables in (self._tables, self._hyper, self._hyper_of, self._hyper_values):
            tables.clear()

    # --- tables ---

    def _buckets(self, name: str, batch: Batch, step: Step) -> list[Bucket]:
        """Group a pass's tensors by what a kernel is specialised for.

        The buckets are kept with the batch's layout where they need no copies of the tensors: then
        the next pass like this one has only gradients' addresses to look at.
        """
        cache = {} if batch.layout is None else batch.layout.cache
        found: tuple[Any, list[Bucket]] | None = cache.get(name)
        if found is not None and found[0] is batch.prepared:
            return found[1]
        lasting = name == "ascent" or (name == "descent" and batch.prepared is not None)
        members = defaultdict(list)
        for k, (p, g, i) in enumerate(zip(batch.params, batch.grads, batch.groups, strict=True)):
            states: tuple[Any, ...] = ()
            if name == "descent" and step.base is not None:
                names = step.base.states(step.groups[i])
                states = tuple(batch.states[k][state].dtype for state in names)
            has_master = bool(batch.masters) and batch.masters[k] is not None
            members[p.dtype, g.dtype, states, has_master].append(k)
        buckets = []
        for key, positions in members.items():
            param_type, grad_type, states, has_master = key
            if unserved := {param_type, grad_type, *states} - TYPES.keys():
                raise RuntimeError(
                    f"backend='triton' serves {', '.join(map(str, TYPES))}, got {unserved.pop()}"
                )
            params = [dense(batch.params[k]) for k in positions]
            grads = [like_layout(batch.grads[k], w) for k, w in zip(positions, params, strict=True)]
            in_place = all(
                w is batch.params[k] and g is batch.grads[k]
                for k, w, g in zip(positions, params, grads, strict=True)
            )
            types = dict(
                P=TYPES[param_type], G=TYPES[grad_type], STATES=len(states),
                S=TYPES[states[0] if states else param_type],
                ACC=tl.float64 if param_type == torch.float64 else tl.float32,
            )  # fmt: skip
            buckets.append(Bucket(positions, params, grads, types, in_place, has_master))
        device = batch.params[0].device
        kept = lasting and all(bucket.in_place for bucket in buckets)
        for bucket, key in zip(buckets, members, strict=True):
            if kept:
                bucket.table = Table(device, self._captured)
                bucket.grads = []  # they would be kept alive
            else:  # one table for all passes like this one
                table = self._tables.get((name, device, key))
                if table is None:
                    table = self._tables[name, device, key] = Table(device, self._captured)
                bucket.table = table
        if kept:
            cache[name] = batch.prepared, buckets
        return buckets

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


def _reduction(kind: str, step: Step) -> tuple[dict[str, Any], int, bool]:
    """A reduction's constants and tasks, and whether it reads more than two streams.

    The constants are equal wherever the kernel is the same.
    """
    rule, adaptive, tasks, streams = step.ascent.name, step.adaptive, Task(0), True
    states, sums = 0, 1
    if kind in ("mix", "diag"):  # what makes the perturbation once more
        states = len(step.ascent.states(step.groups[0]))
    if kind == "ascent":
        if rule == "ema":
            sums = 2
        else:
            streams = False
            rule = rule if rule == "adagrad_norm" else "unified"
    elif kind in ("descent", "mix"):
        scaled = adaptive and step.renormalize  # whether the norm is that of T g~
        tasks = (
            Task.RENORMALIZE * step.renormalize
            | Task.CLIP * (step.max_grad_norm is not None)
            | Task.SKIP * step.skip_nonfinite
            | Task.SKIP_FIRST * step.skip_first
            | Task.ACCUMULATE * (step.base is not None and step.base.needs_norm)
            | Task.COMMIT * (rule == "adagrad_norm")
            | Task.ADAPT * (type(step.mix) is SharpnessRatio)
        )
        sums = 5
        if kind == "descent":
            rule, streams, adaptive = "unified", False, scaled
            # the plain norm is a sum of its own only where T makes the other one different
            needs_plain = Task.CLIP | Task.SKIP | Task.ACCUMULATE
            sums = 2 if scaled and tasks & needs_plain else 1
        elif scaled:
            kind = "scaled mix"
    elif kind == "difference":
        rule, adaptive = "unified", False
    constants = {"KIND": kind, "RULE": rule, "STATES": states, "ADAPTIVE": adaptive, "SUMS": sums}
    return constants, int(tasks), streams


def run(launches: list[Launched]) -> None:
    for launch in launches:
        launch()


@functools.cache
def _options(device: torch.device, lanes: int) -> dict[str, Any]:
    """Launch options for one thread per lane. Triton's default for fusion is about to change."""
    warp = torch.cuda.get_device_properties(device).warp_size if device.type == "cuda" else 32
    return {"LANES": lanes, "num_warps": lanes // warp, "enable_fp_fusion": True}


def _is_stochastic(bucket: Bucket, step: Step) -> bool:
    return step.seed is not None and bucket.types["P"] == tl.bfloat16


def _only(types: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: types[name] for name in names}


def _on(device: torch.device) -> AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
