"""Which ranks train the model of an optimizer."""

import gc
import weakref
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from .replicas import replicas_of
from .step.sharding import is_sharded

_wrapped: "weakref.WeakSet[DistributedDataParallel]" = weakref.WeakSet()  # that have been found


def ranks_of(optimizer: Any) -> Sequence[int] | None:
    """The ranks that train the optimizer's model, this one among them; None where nothing tells.

    Those of the largest mesh of its parameters; else of the DDP model that they are in.
    """
    params = [p for group in optimizer.param_groups for p in group["params"]]
    meshes = [p.device_mesh for p in params if is_sharded(p)]
    if meshes:
        ranks: list[int] = max(meshes, key=lambda mesh: mesh.size()).mesh.flatten().tolist()
        return ranks
    group = replicas_of(optimizer.ascent_context)
    if group is None and (model := find_wrapped(params)) is not None:
        group = model.process_group
    return None if group is None else dist.get_process_group_ranks(group)


def find_wrapped(params: Sequence[Tensor]) -> Any:
    """The ``DistributedDataParallel`` that has one of the parameters, which do not say so; or None.

    Once for an optimizer all objects are looked at, which takes some tens of milliseconds.
    """
    ours = set(map(id, params))

    def among(models: Any) -> Any:
        for model in models:
            if not ours.isdisjoint(map(id, model.parameters())):
                return model
        return None

    known = among(list(_wrapped))
    if known is not None:
        return known
    # by type(): isinstance would ask objects that stand for others for their __class__
    objects = gc.get_objects()
    kinds = {kind for kind in set(map(type, objects)) if issubclass(kind, DistributedDataParallel)}
    if kinds:
        _wrapped.update(x for x in objects if type(x) in kinds and hasattr(x, "reducer"))
    return among(list(_wrapped))
