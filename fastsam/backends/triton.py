"""The triton backend: one kernel launch per pass, bucket and device."""

from collections import defaultdict
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from fastsam.kernels.layout import Row, Task
from fastsam.kernels.perturb import perturb_kernel
from fastsam.kernels.reduce import finish_kernel, reduce_kernel
from fastsam.kernels.table import Table
from fastsam.kernels.update import update_kernel

from ..ratio import SharpnessRatio
from ..rules import Batch, Step, identical
from ..sharding import Sharding
from .buckets import Bucket, make_buckets, release, write_back
from .flat import FlatBackup
from .interface import DeviceBackend
from .launcher import Launched, Launcher
from .lockstep import Pass
from .measures import adapt, undone_if_it_fails
from .reductions import NOTHING, Reduction, constants_of, on
from .reference import keep_rejected, leave_final_gradient
from .rows import ascent_rows, ascent_states, grad_rows, key_rows, state_rows

FIRST, LAST = int(Task.FIRST), int(Task.LAST)


@dataclass
class Plan:
    """A kind of pass over one layout: its buckets, and its launches as they were last prepared.

    They are made again as long as ``depends`` holds the same objects. Addresses are none of them,
    nor are hyper-parameters: those are on the device, in tables that stay where they are.
    """

    prepared: object
    buckets: list[Bucket]
    depends: list[Any] = field(default_factory=list)
    reduction: Reduction | None = None
    launches: list[Launched] = field(default_factory=list)


class TritonBackend(Launcher, DeviceBackend):
    """See the module's docstring."""

    takes_scaled = True

    # --- the interface ---

    def ascent_pass(self, batch: Batch, step: Step, scalars: Tensor) -> Pass[FlatBackup]:
        try:
            return (yield from self._ascend(batch, step, scalars))
        except BaseException:
            self._forget(batch)
            raise

    def descent_pass(
        self, batch: Batch, backup: FlatBackup | None, step: Step, scalars: Tensor
    ) -> Pass[None]:
        try:
            yield from self._descend(batch, backup, step, scalars)
        except BaseException:
            self._forget(batch)
            raise

    def hypergradient_pass(
        self, batch: Batch, backup: FlatBackup | None, hessian: str, step: Step, scalars: Tensor
    ) -> Pass[None]:
        try:
            yield from self._hypergradient(batch, backup, hessian, step, scalars)
        except BaseException:
            self._forget(batch)
            raise

    # --- the passes ---

    def _ascend(self, batch: Batch, step: Step, scalars: Tensor) -> Pass[FlatBackup]:
        backup = FlatBackup(batch.layout)
        plan = self._plan("ascent", batch, step)
        states = ascent_states(step)
        for bucket in plan.buckets:
            bucket.reserve(batch, backup)
        for bucket in plan.buckets:
            rows = key_rows(bucket, batch, step)
            if states:
                rows |= ascent_rows(bucket, batch, step)
            bucket.locate(batch, backup, rows)
        depends = self._dependencies(plan, batch, step, scalars)
        if not identical(depends, plan.depends):
            plan.reduction = None
            with on(scalars.device):
                if step.needs_ascent_norm:
                    plan.reduction = self._reduce("ascent", plan.buckets, batch, step, scalars)
                plan.launches = [self._prepare(
                    perturb_kernel, bucket, step, scalars, self.launches.perturb,
                    RULE=step.ascent.name, STATES=states, ADAPTIVE=step.adaptive,
                    HAS_MASTER=bucket.has_master, STOCHASTIC=_is_stochastic(bucket, step),
                    **_only(bucket.types, "P", "G", "ACC"),
                ) for bucket in plan.buckets]  # fmt: skip
            plan.depends = depends
        if plan.reduction is not None:
            yield from plan.reduction.run()
        try:
            with on(scalars.device):
                for perturb in plan.launches:
                    perturb()
                    perturb.bucket.note_perturbed(batch, backup)
                    write_back(perturb.bucket, batch)
        except BaseException:
            backup.restore()
            raise
        release(plan.buckets)
        return backup

    def _descend(
        self, batch: Batch, backup: FlatBackup | None, step: Step, scalars: Tensor
    ) -> Pass[None]:
        plan = self._plan("descent", batch, step)
        # the update kernel looks at the ascent's state only where it may have to put it back
        states = ascent_states(step) if step.skip_nonfinite else 0
        for bucket in plan.buckets:
            rows = key_rows(bucket, batch, step)
            if not bucket.described:
                rows |= state_rows(bucket, batch, step, self.launches.update)
            if step.mix is not None:
                rows |= grad_rows(bucket, {Row.FIRST_GRAD: batch.firsts})
            if states or step.mix is not None:
                rows |= ascent_rows(bucket, batch, step)
            bucket.locate(batch, backup, rows)
        # a user's rule runs on the host; the reduction knows SAMAR's own
        rule = None if type(step.mix) is SharpnessRatio or not batch.leads else step.mix
        # Whatever needs memory or a compiler comes before the first launch: the reduction changes
        # scalars that are state, and no update can be undone.
        depends = self._dependencies(plan, batch, step, scalars)
        if not identical(depends, plan.depends):
            plan.reduction, plan.launches = None, []
            with on(scalars.device):
                if step.needs_descent_norm:
                    kind = "descent" if step.mix is None else "mix"
                    plan.reduction = self._reduce(kind, plan.buckets, batch, step, scalars)
                if step.base is not None:
                    plan.launches = self._updates(plan.buckets, step, scalars, states)
            plan.depends = depends
        yield None
        if step.base is not None and backup is not None:
            backup.restore(backup.left_by(batch))
        undoing = step.base is None or rule is not None
        with undone_if_it_fails(scalars) if undoing else NOTHING:
            if plan.reduction is not None:
                yield from plan.reduction.run()
            if rule is not None:
                adapt(rule, scalars)
            if step.base is None:
                if backup is not None:
                    backup.restore()
                keep_rejected(batch, step, scalars)
                leave_final_gradient(batch, step, scalars)
        with on(scalars.device):
            for update in plan.launches:
                update()
                write_back(update.bucket, batch)
        release(plan.buckets)

    def _hypergradient(
        self, batch: Batch, backup: FlatBackup | None, hessian: str, step: Step, scalars: Tensor
    ) -> Pass[None]:
        buckets = self._plan("hypergradient", batch, step).buckets
        others = {Row.FIRST_GRAD: batch.firsts, Row.VALIDATION: batch.validation,
                  Row.TRAINING: batch.training}  # fmt: skip
        for bucket in buckets:
            rows = ascent_rows(bucket, batch, step) | grad_rows(bucket, others)
            bucket.locate(batch, backup, rows)
        with on(scalars.device):
            reduction = self._reduce(hessian, buckets, batch, step, scalars)
        yield from reduction.run()
        release(buckets)

    # --- launches ---

    def _updates(
        self, buckets: list[Bucket], step: Step, scalars: Tensor, states: int
    ) -> list[Launched]:
        assert step.base is not None
        updates = []
        for bucket in buckets:
            arrivals = self._scratch("updated", bucket.table.columns, torch.int32, scalars.device)
            updates.append(self._prepare(
                update_kernel, bucket, step, scalars, self.launches.update, arrivals,
                compiles=True, BASE=step.base.name, SCALE=step.rescales,
                MIX=step.mix is not None, SKIP=step.skip_nonfinite, ASCENT_STATES=states,
                HAS_MASTER=bucket.has_master, STOCHASTIC=_is_stochastic(bucket, step),
                **bucket.types,
            ))  # fmt: skip
        return updates

    def _reduce(
        self, kind: str, buckets: list[Bucket], batch: Batch, step: Step, scalars: Tensor
    ) -> Reduction:
        constants, tasks, streams = constants_of(kind, step)
        launch = self.launches.reduce_streams if streams else self.launches.reduce
        members: dict[Sharding, list[Bucket]] = defaultdict(list)
        for bucket in buckets:
            members[bucket.sharding].append(bucket)
        # else the sums over everything are known only after all launches
        is_whole = len(members) == 1 and () in members and batch.part is None
        reduction = Reduction(scalars)
        for sharding, same in members.items():
            reduction.parts[sharding] = []
            for i, bucket in enumerate(same):
                partials = constants["SUMS"] * bucket.table.chunks(launch.chunk).size(0)
                last = is_whole and i == len(same) - 1
                reduction.parts[sharding].append(self._prepare(
                    reduce_kernel, bucket, step, scalars, launch,
                    self._scratch("partials", partials, bucket.arithmetic, scalars.device),
                    self._scratch("reduced", 1, torch.int32, scalars.device),
                    tasks | (FIRST if i == 0 else 0) | (LAST if last else 0),
                    HAS_MASTER=bucket.has_master and constants["ADAPTIVE"],
                    **constants, **_only(bucket.types, "P", "G", "ACC"),
                ))  # fmt: skip
        if not is_whole:
            names = _only(constants, "KIND", "RULE", "SUMS")
            names |= {"num_warps": 1, "enable_fp_fusion": True}
            hyper = self._hyper_table(buckets[0], step)
            reduction.finish = partial(finish_kernel[(1,)], hyper, scalars, tasks, **names)
        return reduction

    def _forget(self, batch: Batch) -> None:
        """After a failure: no table is known to hold what it should."""
        if batch.layout is not None:
            for name in ("ascent", "descent"):
                batch.layout.cache.pop(name, None)
        self._tables.clear()
        self._hyper.clear()

    # --- tables ---

    def _plan(self, name: str, batch: Batch, step: Step) -> Plan:
        """Group a pass's tensors by what a kernel is specialised for.

        The plan is kept with the batch's layout where it needs no copies of the tensors: then the
        next pass like this one has only gradients' addresses to look at, and finds its launches.
        """
        cache = {} if batch.layout is None else batch.layout.cache
        found: Plan | None = cache.get(name)
        if found is not None and found.prepared is batch.prepared:
            return found
        lasting = name == "ascent" or (name == "descent" and batch.prepared is not None)
        buckets = make_buckets(name, batch, step)
        device = batch.params[0].device
        kept = lasting and all(bucket.in_place for bucket in buckets)
        for bucket in buckets:
            if kept:
                bucket.table = Table(device, self._captured)
                bucket.grads = []  # they would be kept alive
            else:  # one table for all passes like this one
                table = self._tables.get((name, device, bucket.key))
                if table is None:
                    table = self._tables[name, device, bucket.key] = Table(device, self._captured)
                bucket.table = table
        plan = Plan(batch.prepared, buckets)
        if kept:
            cache[name] = plan
        return plan

    def _dependencies(self, plan: Plan, batch: Batch, step: Step, scalars: Tensor) -> list[Any]:
        """What launches are made of, but for what stays where it is and is written to.

        They are not the same for any two graphs: those have tables of hyper-parameters of their
        own. Nor are they with several devices, which get new copies of the scalars.
        """
        depends = [
            scalars, self.launches, batch.part, step.ascent, step.base, step.mix, step.adaptive,
            step.renormalize, step.skip_nonfinite, step.skip_first, step.is_scaled,
            step.max_grad_norm is None, step.seed is None,
        ]  # fmt: skip
        for bucket in plan.buckets:
            depends += bucket.table.revision, self._hyper_table(bucket, step)
        return depends


def _is_stochastic(bucket: Bucket, step: Step) -> bool:
    return step.seed is not None and bucket.types["P"] == tl.bfloat16


def _only(types: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: types[name] for name in names}
