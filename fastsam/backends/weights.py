"""Where the unperturbed weights are: in the parameters, in copies, or in master weights."""

from dataclasses import replace

import torch
from torch import Tensor

from ..rules import Batch
from .equations import wide


class ListBackup:
    """The unperturbed weights by parameter: copies of them, or master weights."""

    def __init__(self) -> None:
        self.copies: dict[Tensor, Tensor] = {}

    def restore(self) -> None:
        for param, copy in self.copies.items():
            param.copy_(copy)


def weight(batch: Batch, k: int) -> Tensor:
    """Parameter ``k``, or the master weights behind it."""
    master = batch.masters[k] if batch.masters else None
    return batch.params[k] if master is None else master


def at_weights(batch: Batch) -> Batch:
    """The batch with master weights in the place of their parameters."""
    if not any(master is not None for master in batch.masters):
        return batch
    return replace(batch, params=[weight(batch, k) for k in range(len(batch.params))])


def follow_parameters(batch: Batch, backup: ListBackup | None) -> None:
    """Let master weights take over what somebody has written to parameters since the last step."""
    for param, master in zip(batch.params, batch.masters, strict=False):
        if master is not None and (backup is None or param not in backup.copies):
            in_step = master.to(param.dtype) == param
            torch.where(in_step, master, wide(param), out=master)
