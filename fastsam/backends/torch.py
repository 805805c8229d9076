"""The torch backend: torch's own fused and foreach operators, on any device that torch serves.

Parameters go to the operators by group and dtype. What they do not serve goes through the reference
backend's equations, one tensor at a time: ascent rules with state, updates that torch has not, and
mixed dtypes, mixed layouts and 16-bit storage: the operators refuse the first of these,
assume the second away, and in the third would round ``u`` before they saw it (and torch 2.13's
``_fused_sgd_`` on a CPU leaves most or all elements of a 16-bit tensor as they were).
"""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastsam.kernels.layout import Scalar

from ..bases import Group
from ..rules import Batch, Step
from . import cpu, measures, reference
from .cpu_update import FUSED
from .lockstep import Pass
from .norms import served
from .reference import ReferenceBackend
from .scratch import Memory, ScratchBackup
from .weights import ListBackup, at_weights, follow_parameters


def global_norm(batch: Batch, like: Tensor) -> Pass[Tensor]:
    """The L2 norm of all gradients, accumulated in float32 or wider."""
    if any(batch.shardings):
        return (yield from measures.global_norm(batch.grads, like, batch.shardings))
    by_dtype: dict[torch.dtype, list[Tensor]] = defaultdict(list)
    for g in batch.grads:
        by_dtype[g.dtype].append(g)
    norms: list[Tensor] = []
    for dtype, same in by_dtype.items():
        norms += torch._foreach_norm(same, 2, dtype=torch.promote_types(dtype, torch.float32))
    squared = torch.stack([norm.to(like.dtype) for norm in norms]).square().sum()
    yield squared
    return squared.sqrt()


class TorchBackend(ReferenceBackend):
    """See the module's docstring."""

    def __init__(self) -> None:
        self._memory = Memory()

    def ascent_pass(self, batch: Batch, step: Step, scalars: Tensor) -> Pass[ListBackup]:
        if scalars.device.type == "cpu":
            return (yield from cpu.ascend(batch, step, scalars, self._memory))
        if step.ascent.name != "unified":
            return (yield from super().ascent_pass(batch, step, scalars))
        follow_parameters(batch, None)
        weights = at_weights(batch)
        if step.adaptive:
            n = yield from measures.scaled_norm(batch.grads, weights, step, like=scalars)
        else:
            n = yield from global_norm(batch, like=scalars)
        measures.finish_ascent(n, n, step, scalars)
        backup = ListBackup()
        try:
            backup.copies = dict(zip(batch.params, weights.params, strict=True))
            copied = [param for param, w in backup.copies.items() if w is param]
            copies = [torch.empty_like(w) for w in copied]
            torch._foreach_copy_(copies, copied)
            backup.copies.update(zip(copied, copies, strict=True))
            for k in range(len(batch.params)):
                reference.perturb_one(batch, k, batch.grads[k], step, scalars)
        except BaseException:
            backup.restore()
            raise
        return backup

    def descent_pass(
        self, batch: Batch, backup: ListBackup | None, step: Step, scalars: Tensor
    ) -> Pass[None]:
        if scalars.device.type == "cpu":
            assert backup is None or isinstance(backup, ScratchBackup)
            yield from cpu.descend(batch, backup, step, scalars, self._memory)
            return
        slow: reference.Values = []
        updates: list[Callable[[], None]] = []
        # what may fail comes before the first update
        with measures.undone_if_it_fails(scalars):
            if step.needs_descent_norm:
                plain = measured = yield from global_norm(batch, like=scalars)
                if step.adaptive and step.renormalize:
                    measured = yield from measures.scaled_norm(
                        batch.grads, batch, step, like=scalars
                    )
                measure = measures.measure_mixture(batch, backup, step, scalars)
                yield from measures.finish_descent(
                    plain, measured, measure, step, scalars, batch.leads
                )
            reference.keep_rejected(batch, step, scalars)
            follow_parameters(batch, backup)
            if backup is not None:
                torch._foreach_copy_(list(backup.copies), list(backup.copies.values()))
            if step.base is None:
                reference.leave_final_gradient(batch, step, scalars)
                return
            fused: dict[Any, list[int]] = defaultdict(list)
            for k, (param, i) in enumerate(zip(batch.params, batch.groups, strict=True)):
                states = [batch.states[k][name] for name in step.base.states(step.groups[i])]
                if step.base.name in FUSED and served([param, batch.grads[k], *states]):
                    fused[i, param.dtype, batch.fresh[k]].append(k)
                else:
                    slow += reference.update_one(batch, k, None, step, scalars)
            for (i, _, fresh), members in fused.items():
                group = step.groups[i]
                updates.append(self._fused_update(batch, members, group, fresh, step, scalars))
            yield None
        for update in updates:
            update()
        reference.write(slow)

    @staticmethod
    def _fused_update(
        batch: Batch, members: list[int], group: Group, fresh: bool, step: Step, scalars: Tensor
    ) -> Callable[[], None]:
        """The update of tensors that share an operator, with all that needs memory done."""
        assert step.base is not None
        base = step.base
        params = [batch.params[k] for k in members]
        grads = [batch.grads[k] for k in members]
        if step.mix is not None:
            grads = [reference.final_gradient(batch, k, step, scalars) for k in members]
        elif step.rescales:
            # a cast, because 0-dim gradients would be promoted to the coefficient's float64
            grads = list(torch._foreach_mul(grads, scalars[Scalar.COEFFICIENT].to(grads[0].dtype)))
        states = {name: [batch.states[k][name] for k in members] for name in base.states(group)}
        found_inf = (1 - scalars[Scalar.ACCEPTED]).float() if step.skip_nonfinite else None
        common: dict[str, Any] = dict(
            lr=group["lr"], weight_decay=group["weight_decay"], maximize=group["maximize"],
            found_inf=found_inf,
        )  # fmt: skip
        steps = [batch.states[k]["step"] for k in members] if base.counts_steps else []

        def sgd() -> None:
            torch._fused_sgd_(
                params, grads, states.get("momentum_buffer", []), momentum=group["momentum"],
                dampening=group["dampening"], nesterov=group["nesterov"], is_first_step=fresh,
                **common,
            )  # fmt: skip

        def adam() -> None:
            decoupled = group["decoupled_weight_decay"]
            operator = torch._fused_adamw_ if decoupled else torch._fused_adam_
            beta1, beta2 = group["betas"]
            operator(
                params, grads, states["exp_avg"], states["exp_avg_sq"],
                states.get("max_exp_avg_sq", []), steps, beta1=beta1, beta2=beta2,
                eps=group["eps"], amsgrad=group["amsgrad"], **common,
            )  # fmt: skip

        def adagrad() -> None:
            torch._fused_adagrad_(
                params, grads, states["sum"], steps, lr_decay=group["lr_decay"],
                eps=group["eps"], **common,
            )  # fmt: skip

        update = {"sgd": sgd, "adam": adam, "adagrad": adagrad}[base.name]

        def run() -> None:
            if steps:
                torch._foreach_add_(steps, 1)
            update()
            if steps and found_inf is not None:
                torch._foreach_sub_(steps, [found_inf] * len(steps))

        return run
