"""Where the unperturbed weights are: in the parameters, in copies, or in master weights."""

from dataclasses import replace

import torch
from torch import Tensor

from fastsam.arithmetic import wide
from fastsam.step.batch import Batch


class ListBackup:
    """The unperturbed weights by parameter: copies of them, or master weights."""

    def __init__(self) -> None:
        self.copies: dict[Tensor, Tensor] = {}

    def restore(self) -> None:
        for param, copy in self.copies.items():
            param.copy_(copy)

    def keep(self, batch: Batch) -> None:
        """Copy what an earlier ascent of the step has not: parameters without a gradient then."""
        for param in batch.params:
            if param not in self.copies:
                self.copies[param] = param.detach().clone()

    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """See ``Backup.pairs``."""
        return list(self.copies.items())


def weight(batch: Batch, k: int) -> Tensor:
    """Parameter ``k``, or the master weights behind it."""
    master = None if batch.masters is None else batch.masters[k]
    return batch.params[k] if master is None else master


def at_weights(batch: Batch) -> Batch:
    """The batch with master weights in the place of their parameters."""
    if batch.masters is None or all(master is None for master in batch.masters):
        return batch
    return replace(batch, params=[weight(batch, k) for k in range(len(batch.params))])


def follow_parameters(batch: Batch, backup: ListBackup | None) -> None:
    """Let master weights take over what was written to parameters since the last step."""
    for param, master in zip(batch.params, batch.masters or (), strict=False):
        if master is not None and (backup is None or param not in backup.copies):
            in_step = master.to(param.dtype) == param
            torch.where(in_step, master, wide(param), out=master)
