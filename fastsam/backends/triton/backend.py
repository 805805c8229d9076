"""The triton backend: one kernel launch per pass, bucket and device."""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton.language as tl
from torch import Tensor

from fastsam.kernels.layout import Row, Scalar, Task, counters, partials
from fastsam.kernels.perturb import perturb_kernel
from fastsam.kernels.reduce import finish_kernel, reduce_kernel, segments_kernel
from fastsam.kernels.table import Upload, is_capturing
from fastsam.kernels.update import update_kernel
from fastsam.step.batch import Batch, identical
from fastsam.step.sharding import Sharding
from fastsam.step.spec import StepSpec

from ..base import DeviceBackend, Pass, Stop
from ..reference import (
    adapts_here,
    keep_rejected,
    leave_final_gradient,
    leave_kept,
    unfused,
)
from ..sums import adapt, undone_if_it_fails
from .buckets import Bucket, of, release, write_back
from .direct import Direct
from .flat import FlatBackup
from .launcher import Launched
from .plan import (
    NOTHING,
    Reduction,
    Sums,
    ascent_sums,
    descent_sums,
    hypergradient_sums,
    kept_sums,
    on,
    perturb_constants,
    perturb_launch,
    reduce_launch,
    states_of,
    update_constants,
)
from .planner import Planner
from .rows import ascent_rows, grad_rows, key_rows, norm_rows, read_rows, state_rows

FIRST, LAST = int(Task.FIRST), int(Task.LAST)


class TritonBackend(Planner, DeviceBackend):
    """See the module's docstring."""

    takes_scaled = True
    knows_norms = True

    # --- the interface ---

    def ascent_pass(
        self, batch: Batch, spec: StepSpec, scalars: Tensor, kept: FlatBackup | None = None
    ) -> Pass[FlatBackup]:
        try:
            return (yield from self._ascend(batch, spec, scalars, kept))
        except BaseException:
            self._forget(batch)
            raise

    def descent_pass(
        self, batch: Batch, backup: FlatBackup | None, spec: StepSpec, scalars: Tensor
    ) -> Pass[None]:
        try:
            yield from self._descend(batch, backup, spec, scalars)
        except BaseException:
            self._forget(batch)
            raise

    def hypergradient_pass(
        self, batch: Batch, backup: FlatBackup | None, hessian: str, spec: StepSpec, scalars: Tensor
    ) -> Pass[None]:
        try:
            yield from self._hypergradient(batch, backup, hessian, spec, scalars)
        except BaseException:
            self._forget(batch)
            raise

    # --- the passes ---

    def _ascend(
        self, batch: Batch, spec: StepSpec, scalars: Tensor, kept: FlatBackup | None
    ) -> Pass[FlatBackup]:
        plan = self._plan("ascent" if kept is None else "further", batch, spec)
        if kept is None:
            self._aim(plan, batch, spec)
        else:
            kept.keep(batch)
        backup = FlatBackup(batch.layout) if kept is None else kept
        for bucket in plan.buckets if kept is None else ():
            bucket.reserve(batch, backup)
        for bucket in plan.buckets:
            rows = {} if spec.seed is None else key_rows(bucket, batch, spec)
            if batch.ascent is not None:
                rows |= ascent_rows(bucket, batch, spec)
            if batch.read is not None:
                rows |= read_rows(bucket, batch)
            if batch.squares is not None and not bucket.described:
                rows |= norm_rows(bucket, batch)
            if batch.choices is not None:
                rows[Row.CHOICE] = of(batch.choices, bucket.members)
            if bucket.moves:
                rows |= bucket.perturbed_row
            bucket.locate(batch, backup if kept is None else None, rows)
        depends = self._dependencies(plan, batch, spec, scalars)
        if not identical(depends, plan.depends):
            plan.reduction = None
            with on(scalars.device):
                if spec.needs_ascent_norm and not batch.norm_is_known:
                    plan.reduction = self._reduce(
                        ascent_sums(spec), plan.buckets, batch, spec, scalars
                    )
                known = int(batch.norm_is_known)
                if known and any(bucket.types["ACC"] == tl.float64 for bucket in plan.buckets):
                    known = 2
                rules = [
                    perturb_constants(spec, kept is None, bucket.moves, known)
                    for bucket in plan.buckets
                ]
                backwards = self.launches.backwards and plan.reduction is not None
                plan.launches = [self._prepare(
                    perturb_kernel, bucket, spec, scalars,
                    perturb_launch(self.launches, rule["STATES"], bucket.has_master,
                                   **_only(bucket.types, "P", "G"), read=bucket.read),
                    backwards=backwards, HAS_MASTER=bucket.has_master,
                    STOCHASTIC=_is_stochastic(bucket, spec), READ=bucket.read, **rule,
                    **_only(bucket.types, "P", "G", "ACC"),
                ) for bucket, rule in zip(plan.buckets, rules, strict=True)]  # fmt: skip
            plan.depends = depends
        if plan.reduction is not None:
            yield from plan.reduction.run()
        try:
            with on(scalars.device):
                for perturb in plan.launches:
                    perturb()
                    if kept is None:
                        perturb.bucket.note_perturbed(batch, backup, self._moving)
                    write_back(perturb.bucket, batch)
        except BaseException:
            backup.restore()
            raise
        release(plan.buckets)
        return backup

    def _descend(
        self, batch: Batch, backup: FlatBackup | None, spec: StepSpec, scalars: Tensor
    ) -> Pass[None]:
        if backup is not None and not backup.bring_home() and batch.layout is not None:
            batch.layout.plans.clear()  # which are of parameters that are elsewhere now
        left = [] if backup is None else backup.left_by(batch)
        plan = self._plan("descent", batch, spec)
        # the update kernel looks at the ascent's state only where it may have to put it back
        states = states_of(spec) if spec.skip_nonfinite else 0
        for bucket in plan.buckets:
            rows = {} if spec.seed is None else key_rows(bucket, batch, spec)
            if not bucket.described:
                rows |= state_rows(bucket, batch, spec, self.launches.update)
            if spec.descent is not None:
                rows |= grad_rows(bucket, {Row.FIRST_GRAD: batch.firsts})
            if batch.kept is not None:
                rows |= grad_rows(bucket, {Row.VALIDATION: batch.kept})
            if states or spec.descent is not None:
                rows |= ascent_rows(bucket, batch, spec)
            if batch.squares is not None:
                rows |= norm_rows(bucket, batch)
            bucket.locate(batch, backup, rows)
        # a user's function runs on the host; the reduction runs the others
        rule = spec.descent
        if rule is None or not (rule.adapts_on_host and adapts_here(batch, spec)):
            rule = None
        # Whatever needs memory or a compiler comes before the first launch: the reduction changes
        # scalars that are state, and no update can be undone.
        depends = self._dependencies(plan, batch, spec, scalars)
        if not identical(depends, plan.depends):
            plan.reduction, plan.launches = None, []
            with on(scalars.device):
                if spec.needs_descent_norm:
                    plan.reduction = self._reduce(
                        descent_sums(spec, batch.kept_is_known is not None), plan.buckets, batch,
                        spec, scalars,
                    )  # fmt: skip
                if spec.has_fused:
                    plan.launches = self._updates(plan.buckets, batch, spec, scalars, states)
            plan.depends = depends
        if batch.kept_is_known is False:
            yield from self._measure_kept(batch, spec, scalars)
        yield None
        if spec.has_fused and backup is not None:
            backup.restore(left)
        has_unfused = spec.has_unfused
        undoing = has_unfused or rule is not None
        with undone_if_it_fails(scalars) if undoing else NOTHING:
            if plan.reduction is not None:
                yield from plan.reduction.run()
            if rule is not None:
                adapt(rule, spec, scalars)
            if spec.keeps:  # the update leaves the others'
                leave_kept(batch, spec, scalars, _out_of_place(batch, plan.buckets))
            if has_unfused:
                some = batch if spec.bases is None else _unfused_part(batch, spec)
                if backup is not None:
                    backup.restore(None if some is batch else backup.among(some.params))
                keep_rejected(some, spec, scalars)
                leave_final_gradient(batch, spec, scalars)
                if some is not batch:
                    yield Stop.UNFUSED
        if plan.launches and backup is not None:
            backup.begin_update()
        with on(scalars.device):
            for update in plan.launches:
                update()
                write_back(update.bucket, batch)
        release(plan.buckets)

    def _measure_kept(self, batch: Batch, spec: StepSpec, scalars: Tensor) -> Pass[None]:
        """Leave the squared norm of what an earlier step has kept among the scalars.

        By launches of its own, and that of this step's gradient by the same as where this is known:
        so a run that is resumed, which has to measure it again, has the same bits.
        """
        assert batch.firsts is not None
        there = [(k, x) for k, x in enumerate(batch.firsts) if x is not None]
        if not there:
            scalars[Scalar.KEPT].zero_()
            return
        members = [k for k, _ in there]
        part = Batch(
            params=of(batch.params, members), groups=of(batch.groups, members),
            grads=[x for _, x in there],
        )  # fmt: skip
        buckets = self._plan("kept", part, spec).buckets
        for bucket in buckets:
            bucket.locate(part, None, {})
        with on(scalars.device):
            reduction = self._reduce(kept_sums(), buckets, part, spec, scalars)
        yield from reduction.run()
        release(buckets)

    def _hypergradient(
        self, batch: Batch, backup: FlatBackup | None, hessian: str, spec: StepSpec, scalars: Tensor
    ) -> Pass[None]:
        buckets = self._plan("hypergradient", batch, spec).buckets
        others = {Row.FIRST_GRAD: batch.firsts, Row.VALIDATION: batch.validation,
                  Row.TRAINING: batch.training}  # fmt: skip
        for bucket in buckets:
            rows = ascent_rows(bucket, batch, spec) | grad_rows(bucket, others)
            if batch.squares is not None:
                rows |= norm_rows(bucket, batch)
            bucket.locate(batch, backup, rows)
        with on(scalars.device):
            found = hypergradient_sums(spec, hessian)
            reduction = self._reduce(found, buckets, batch, spec, scalars)
        yield from reduction.run()
        release(buckets)

    # --- launches ---

    def _updates(
        self, buckets: list[Bucket], batch: Batch, spec: StepSpec, scalars: Tensor, states: int
    ) -> list[Launched]:
        updates = []
        for bucket in buckets:
            base = bucket.base
            if base is None:
                continue
            starts = base.starts_from_gradient
            arrivals = self._scratch("updated", bucket.table.columns, torch.int32, scalars.device)
            backwards = self.launches.backwards and spec.needs_descent_norm
            has_start = bool(starts) and bucket.types["STATES"] > 0
            squares = None
            if batch.leaves_norm:
                names = list(base.states(spec.groups[batch.groups[bucket.members[0]]]))
                if spec.ascent.momentum in names:
                    squares = names.index(spec.ascent.momentum)
            updates.append(self._prepare(
                update_kernel, bucket, spec, scalars, self.launches.update, arrivals,
                compiles=True, backwards=backwards, HAS_MASTER=bucket.has_master,
                STOCHASTIC=_is_stochastic(bucket, spec),
                **update_constants(spec, states, has_start, base, squares), **bucket.types,
            ))  # fmt: skip
        return updates

    def _reduce(
        self, found: Sums, buckets: list[Bucket], batch: Batch, spec: StepSpec, scalars: Tensor
    ) -> Reduction:
        constants, tasks = found.constants, found.tasks
        reads = constants["ASCENDS"] and constants["DIRECTION"] is not None
        has_scale = constants["ADAPTIVE"] or (constants["SCALED"] and constants["ASCENDS"])
        members: dict[Sharding, list[Bucket]] = defaultdict(list)
        for bucket in buckets:
            members[bucket.sharding].append(bucket)
        if tasks & Task.AGREE and all(bucket.types["ACC"] == tl.float64 for bucket in buckets):
            tasks |= int(Task.EXACT)
        # else the sums over everything are known only after all launches
        is_whole = len(members) == 1 and () in members and batch.part is None
        reduction = Reduction(scalars)
        if constants["ASCENDS"]:
            reduction.squares = batch.squares
        for sharding, same in members.items():
            reduction.parts[sharding] = []
            for i, bucket in enumerate(same):
                has_master = bucket.has_master and has_scale
                launch = reduce_launch(
                    self.launches, found, has_master, **_only(bucket.types, "P", "G")
                )
                programs, device = bucket.table.chunks(launch.chunk).size(0), scalars.device
                last = is_whole and i == len(same) - 1
                reduction.parts[sharding].append(self._prepare(
                    reduce_kernel, bucket, spec, scalars, launch,
                    self._scratch(
                        "partials", partials(programs, constants["SUMS"]), torch.float64, device
                    ),
                    self._scratch("reduced", counters(programs), torch.int32, device),
                    tasks | (FIRST if i == 0 else 0) | (LAST if last else 0),
                    HAS_MASTER=has_master, READ=bucket.read if reads else None,
                    **constants, **_only(bucket.types, "P", "G", "ACC"),
                ))  # fmt: skip
                if constants["ASCENDS"] and batch.squares is not None:
                    launches = reduction.parts[sharding]
                    launches.append(self._segments(bucket, batch, launch.chunk, i == 0))
        if not is_whole:
            names = _only(constants, "FINISH", "ACCUMULATES", "COEFFICIENTS", "ADAPTED", "SUMS")
            names |= {"num_warps": 1, "enable_fp_fusion": True}
            hyper = self._hyper_table(buckets[0], spec)
            reduction.finish = Direct(finish_kernel, (1,), hyper, scalars, tasks, **names)
        return reduction

    def _segments(self, bucket: Bucket, batch: Batch, chunk: int, opens: bool) -> Callable[[], Any]:
        """The launch that adds up a reduction's partials by segment."""
        assert batch.squares is not None and batch.segments is not None
        device, count = batch.squares.device, len(batch.squares)
        if chunk not in bucket.ranges:
            sizes = [max(1, -(-w.numel() // chunk)) for w in bucket.params]
            ends = np.cumsum(sizes)
            ranges = np.zeros((count, 2), np.int64)
            for k, start, end in zip(bucket.members, ends - sizes, ends, strict=True):
                held = ranges[batch.segments[k]]  # its tensors are neighbours
                held[:] = held[0] if held[1] else start, end
            bucket.ranges[chunk] = Upload(device, self._captured)(ranges)
        ranges_here = bucket.ranges[chunk]
        if is_capturing(device):
            self._captured += [ranges_here, batch.squares]
        sums = self._scratch("partials", 1, torch.float64, device)
        arguments = sums, ranges_here, batch.squares, FIRST if opens else 0
        return Direct(segments_kernel, (count,), *arguments, num_warps=4)


def _unfused_part(batch: Batch, spec: StepSpec) -> Batch:
    """The parameters whose base is not fused, and their ascent state."""
    members = unfused(batch, spec)
    old, new = (xs and [xs[k] for k in members] for xs in (batch.ascent, batch.next))
    return Batch(params=[batch.params[k] for k in members], ascent=old, next=new)


def _out_of_place(batch: Batch, buckets: list[Bucket]) -> list[int]:
    """Parameters whose first gradients no update walks where they are."""
    found: list[int] = []
    if batch.firsts is None:
        return found
    for bucket in buckets:
        firsts = of(batch.firsts, bucket.members)
        for k, first, seen in zip(
            bucket.members, firsts, bucket.addresses(Row.FIRST_GRAD), strict=True
        ):
            if bucket.base is None or (first is not None and first.data_ptr() != seen):
                found.append(k)
    return found


def _is_stochastic(bucket: Bucket, spec: StepSpec) -> bool:
    return spec.stochastic and bucket.types["P"] == tl.bfloat16


def _only(types: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: types[name] for name in names}
