"""A backend that perturbs the parameters of plain SAM as one long vector."""

import torch

from fastsam.backends.base import Pass
from fastsam.backends.equations import radius
from fastsam.backends.reference import ReferenceBackend
from fastsam.backends.sums import finish_ascent
from fastsam.backends.weights import ListBackup
from fastsam.step.batch import Batch
from fastsam.step.spec import StepSpec, is_perturbed, sign_of
from fastsam.unified import UNIFIED


def serves(batch: Batch, spec: StepSpec) -> bool:
    """Whether it is SAM's equation, for whole float32 parameters of one group."""
    plain = spec.ascent is UNIFIED and not spec.adaptive and spec.norm == "global"
    alike = {p.dtype for p in (*batch.params, *batch.grads)} == {torch.float32}
    group = spec.groups[batch.groups[0]]
    return plain and alike and len(set(batch.groups)) == 1 and is_perturbed(group) and not (
        batch.shardings or batch.masters or batch.choices
    )  # fmt: skip


class FlatBackend(ReferenceBackend):
    """Steps that it does not serve, and all second passes, are the reference's."""

    def ascent_pass(
        self, batch: Batch, spec: StepSpec, scalars: torch.Tensor, kept: ListBackup | None = None
    ) -> Pass[ListBackup]:
        if kept is not None or not serves(batch, spec):
            return (yield from super().ascent_pass(batch, spec, scalars, kept))
        group = spec.groups[batch.groups[0]]
        flat = torch.cat([grad.flatten() for grad in batch.grads]) * sign_of(group)
        squared = flat.to(scalars.dtype).square().sum()
        yield squared  # other devices add theirs, in place
        norm = squared.sqrt()
        finish_ascent(norm, norm, spec, scalars)
        scale = radius(spec, group, scalars)  # 0 where the norm is 0 or not finite
        e = torch.where(scale != 0, scale.to(flat) * flat, 0.0)
        backup = ListBackup()
        backup.copies = {param: param.detach().clone() for param in batch.params}
        parts = e.split([param.numel() for param in batch.params])
        try:
            for param, part in zip(batch.params, parts, strict=True):
                param.add_(part.view_as(param))
        except BaseException:
            backup.restore()
            raise
        return backup
