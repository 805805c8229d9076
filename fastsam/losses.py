"""Losses that a step's update follows from: on the device, and the mean over all ranks."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .ranks import find_wrapped
from .replicas import is_distributed
from .step.arguments import as_float, shown
from .step.sharding import is_sharded, local


def check_loss(name: str, loss: Any) -> None:
    """What a closure has returned, or an explicit pass was given, where the update needs a loss.

    Raises:
        TypeError: If it is no number and no tensor of one.
    """
    if isinstance(loss, Tensor):
        if local(loss).numel() == 1 and not loss.is_complex():
            return
    elif as_float(loss) is not None:
        return
    raise TypeError(
        f"{name} needs the loss of every pass, as a number or a tensor of one: returned by the "
        f"closure, or given as first_step(loss=loss) and second_step(loss=loss); got {shown(loss)}"
    )


def groups_of(params: list[Tensor]) -> list[Any]:
    """The process groups over which the mean of a loss is taken: of ranks that train one model.

    Those of the largest mesh of the parameters, one after the other; else of the DDP model that
    they are in. None where nothing tells.
    """
    if not is_distributed():
        return []
    meshes = [p.device_mesh for p in params if is_sharded(p)]  # type: ignore[attr-defined]
    if meshes:
        mesh = max(meshes, key=lambda mesh: mesh.size())
        return [mesh.get_group(dim) for dim in range(mesh.ndim)]
    model = find_wrapped(params)
    return [] if model is None else [model.process_group]


def mean_loss(loss: Any, like: Tensor, groups: list[Any]) -> Tensor:
    """A loss in the dtype and on the device of ``like``, and its mean over the ranks.

    The device is not waited for.
    """
    if isinstance(loss, Tensor):
        held = local(loss.detach()).reshape(())
        found: Tensor = held.to(like.device, like.dtype, non_blocking=True)
    else:
        found = torch.full_like(like, float(loss))
    if groups:
        found = found.clone()
    for group in groups:
        dist.all_reduce(found, group=group)
        found /= group.size()
    return found
