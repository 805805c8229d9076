"""The torch backend: torch's own fused and foreach operators, on any device that torch serves.

Parameters go to the operators by group and dtype. What they do not serve goes through the reference
backend's equations, one tensor at a time: ascent rules with state, updates that torch has not, and
mixed dtypes, mixed layouts and 16-bit storage: the operators refuse the first of these,
assume the second away, and in the third would round ``u`` before they saw it (and torch 2.13's
``_fused_sgd_`` on a CPU leaves most or all elements of a 16-bit tensor as they were).
"""

from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastsam.kernels.layout import Scalar
from fastsam.step.batch import Batch
from fastsam.step.rule import Base
from fastsam.step.spec import StepSpec

from .. import reference, sums
from ..base import Pass, Stop
from ..choice import chosen
from ..equations import signed
from ..weights import ListBackup, at_weights, follow_parameters
from . import cpu
from .ascents import along_gradient, path_of
from .fused import update_of
from .norms import served
from .scratch import Memory, ScratchBackup


def global_norm(batch: Batch, like: Tensor) -> Pass[Tensor]:
    """The L2 norm of all gradients, accumulated in the dtype of ``like``."""
    if batch.shardings is not None and any(batch.shardings):
        return (yield from sums.global_norm(batch.grads, like, batch.shardings))
    by_dtype: dict[torch.dtype, list[Tensor]] = defaultdict(list)
    for g in batch.grads:
        by_dtype[g.dtype].append(g)
    norms: list[Tensor] = []
    for same in by_dtype.values():
        norms += torch._foreach_norm(same, 2, dtype=like.dtype)
    squared = torch.stack(norms).square().sum()
    yield squared
    return squared.sqrt()


class TorchBackend(reference.ReferenceBackend):
    """See the module's docstring."""

    def __init__(self) -> None:
        self._memory = Memory()

    def ascent_pass(
        self, batch: Batch, spec: StepSpec, scalars: Tensor, kept: ListBackup | None = None
    ) -> Pass[ListBackup]:
        if scalars.device.type == "cpu":
            assert kept is None or isinstance(kept, ScratchBackup)
            return (yield from cpu.ascend(batch, spec, scalars, self._memory, kept))
        plain = path_of(spec.ascent) is along_gradient and batch.squares is None
        if kept is not None or not plain:
            return (yield from super().ascent_pass(batch, spec, scalars, kept))
        batch = chosen(batch, spec, scalars)
        follow_parameters(batch, None)
        weights = at_weights(batch)
        if spec.adaptive:
            n = yield from sums.scaled_norm(batch.grads, weights, spec, like=scalars)
        else:
            n = yield from global_norm(batch, like=scalars)
        sums.finish_ascent(n, n, spec, scalars)
        backup = ListBackup()
        try:
            backup.copies = dict(zip(batch.params, weights.params, strict=True))
            copied = [param for param, w in backup.copies.items() if w is param]
            copies = [torch.empty_like(w) for w in copied]
            if copied:  # not where every parameter has a master weight
                torch._foreach_copy_(copies, copied)
            backup.copies.update(zip(copied, copies, strict=True))
            for k in range(len(batch.params)):
                d = signed(batch.grads[k], spec.groups[batch.groups[k]])
                reference.perturb_one(batch, k, d, spec, scalars)
        except BaseException:
            backup.restore()
            raise
        return backup

    def descent_pass(
        self, batch: Batch, backup: ListBackup | None, spec: StepSpec, scalars: Tensor
    ) -> Pass[None]:
        if scalars.device.type == "cpu":
            assert backup is None or isinstance(backup, ScratchBackup)
            yield from cpu.descend(batch, backup, spec, scalars, self._memory)
            return
        slow: reference.Values = []
        updates: list[Callable[[], None]] = []
        # what may fail comes before the first update
        with sums.undone_if_it_fails(scalars):
            if spec.needs_descent_norm:
                plain = measured = yield from global_norm(batch, like=scalars)
                if spec.adaptive and spec.renormalize:
                    measured = yield from sums.scaled_norm(batch.grads, batch, spec, like=scalars)
                found = yield from sums.descent_sums(batch, backup, spec, scalars)
                adapts = reference.adapts_here(batch, spec)
                sums.finish_descent(plain, measured, found, spec, scalars, adapts)
            reference.keep_rejected(batch, spec, scalars)
            reference.leave_kept(batch, spec, scalars)
            follow_parameters(batch, backup)
            if backup is not None:
                torch._foreach_copy_(list(backup.copies), list(backup.copies.values()))
            if spec.base is None and spec.bases is None:
                reference.leave_final_gradient(batch, spec, scalars)
                return
            fused: dict[Any, list[int]] = defaultdict(list)
            operators = [operator_of(spec.base_of(i)) for i in range(len(spec.groups))]
            for k, (param, i) in enumerate(zip(batch.params, batch.groups, strict=True)):
                base, operator = spec.base_of(i), operators[i]
                if base is None:
                    continue
                assert batch.states is not None
                states = [batch.states[k][name] for name in base.states(spec.groups[i])]
                if operator is not None and served([param, batch.grads[k], *states]):
                    fused[i, param.dtype, batch.fresh is not None and batch.fresh[k]].append(k)
                else:
                    slow += reference.update_one(batch, k, None, spec, scalars)
            for (i, _, fresh), members in fused.items():
                operator = operators[i]
                assert operator is not None
                updates.append(_prepared(operator, batch, members, i, fresh, spec, scalars))
            yield None
        if spec.bases is not None and spec.has_unfused:
            reference.leave_final_gradient(batch, spec, scalars)
            yield Stop.UNFUSED
        for run in updates:
            run()
        reference.write(slow)


def operator_of(base: Base | None) -> Callable[..., None] | None:
    """The fused operator of an update, where torch has one."""
    update = None if base is None else update_of(base)
    return None if update is None else update.operator


def _prepared(
    operator: Callable[..., None], batch: Batch, members: list[int], i: int, fresh: bool,
    spec: StepSpec, scalars: Tensor,
) -> Callable[[], None]:  # fmt: skip
    """The update of tensors that share an operator, with all that needs memory done."""
    base, group, held = spec.base_of(i), spec.groups[i], batch.states
    assert base is not None and held is not None
    params = [batch.params[k] for k in members]
    grads = [batch.grads[k] for k in members]
    if spec.descent is not None:
        grads = [reference.final_gradient(batch, k, spec, scalars) for k in members]
    elif spec.rescales:
        # a cast, because 0-dim gradients would be promoted to the coefficient's float64
        grads = list(torch._foreach_mul(grads, scalars[Scalar.COEFFICIENT].to(grads[0].dtype)))
    changes = []
    if spec.has_part_apart:
        changes = [reference.beside(batch, k, spec, scalars) for k in members]
        if spec.skip_nonfinite:
            changes = [torch.where(scalars[Scalar.ACCEPTED] != 0, x, 0.0) for x in changes]
    states = {name: [held[k][name] for k in members] for name in base.states(group)}
    found_inf = (1 - scalars[Scalar.ACCEPTED]).float() if spec.skip_nonfinite else None
    common: dict[str, Any] = dict(
        lr=group["lr"], weight_decay=group["weight_decay"], maximize=group["maximize"],
        found_inf=found_inf,
    )  # fmt: skip
    steps = [held[k]["step"] for k in members] if base.counts_steps else []
    update = partial(operator, params, grads, states, steps, group, fresh, common)

    def run() -> None:
        if steps:
            torch._foreach_add_(steps, 1)
        update()
        if changes:
            torch._foreach_sub_(params, changes)
        if steps and found_inf is not None:
            torch._foreach_sub_(steps, [found_inf] * len(steps))

    return run
