"""Plans: which tensors a launch handles, from which tables, and where it writes them."""

from typing import Any

from torch import Tensor

from fastsam.kernels.layout import Launches
from fastsam.kernels.table import Table
from fastsam.step.batch import Batch, identical
from fastsam.step.spec import StepSpec

from .buckets import make_buckets
from .launcher import LAUNCHES, Launcher
from .plan import Plan
from .scratch import Scratch, may_move


class Planner(Launcher):
    """Makes the plans of the passes, finds those that still hold, and drops them."""

    def __init__(self, launches: Launches = LAUNCHES) -> None:
        super().__init__(launches)
        self._moving = Scratch()

    def _plan(self, name: str, batch: Batch, spec: StepSpec) -> Plan:
        """Group a pass's tensors by what a kernel is specialised for.

        The plan is kept with the batch's layout where it needs no copies of the tensors: then the
        next pass like this one has only gradients' addresses to look at, and finds its launches.
        An ascent with state has two, as that takes turns between two memories: so the tables of
        both stay as they are, and any two steps have made both.
        """
        plans: dict[Any, Plan] = {} if batch.layout is None else batch.layout.plans
        turn = batch.held.turn if name == "ascent" and batch.held is not None else 0
        key = name, turn
        found = plans.get(key)
        if found is not None and found.prepared is batch.prepared:
            return found
        lasting = name in ("ascent", "further") or (
            name == "descent" and batch.prepared is not None
        )
        buckets = make_buckets(name, batch, spec)
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
            plans[key] = plan
        return plan

    def _aim(self, plan: Plan, batch: Batch, spec: StepSpec) -> None:
        """Decide where the perturbed weights go."""
        allowed = may_move(batch, spec)
        for bucket in plan.buckets:
            targets: list[Tensor] = []
            if allowed and bucket.in_place and not bucket.has_master:
                if not bucket.targets:
                    self._moving.keep_to(spec.groups)
                targets = self._moving.targets(bucket.params, bucket.targets)
            if targets is not bucket.targets and (targets or bucket.targets):
                bucket.aim(targets)
        if not allowed:
            self._moving.keep_to(())
        layout = batch.layout
        targets = [x for bucket in plan.buckets if bucket.moves for x in bucket.targets]
        # the step before may have had another plan: of the other turn of the ascent's state
        if layout is not None and not identical(targets, layout.targets):
            layout.targets = targets
            layout.token = object()  # what follows from it has to be looked at again

    def _dependencies(self, plan: Plan, batch: Batch, spec: StepSpec, scalars: Tensor) -> list[Any]:
        """What launches are made of, but for what stays where it is and is written to.

        They are not the same for any two graphs: those have tables of hyper-parameters of their
        own. Nor are they with several devices, which get new copies of the scalars.
        """
        depends = [*spec.key, self.launches, batch.part, scalars, batch.squares,
                   batch.kept_is_known is None, batch.norm_is_known, batch.leaves_norm]  # fmt: skip
        for bucket in plan.buckets:
            depends += bucket.table.revision, self._hyper_table(bucket, spec), bucket.moves
        return depends

    def _forget(self, batch: Batch) -> None:
        """After a failure: no table is known to hold what it should."""
        if batch.layout is not None:
            batch.layout.plans.clear()
        self.forget()

    def forget(self) -> None:
        """Take nothing on the device for what it was."""
        self._tables.clear()
        self._hyper.clear()
