"""Parameters that are sharded over processes: FSDP2's and tensor parallelism's ``DTensor``.

The passes run on each process's own shard, in place; only norms and dot products are global. A sum
over a sharded parameter is added up over the mesh dimensions that it is sharded along, and not over
those on which it is replicated.
"""

import sys
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

#: The process groups over which sums of a parameter's shards are added; empty where it is whole.
Sharding = tuple[Any, ...]


#: What most tensors are. To look for them first takes a third of the time.
PLAIN = frozenset((Tensor, torch.nn.Parameter))


def is_sharded(x: Any) -> bool:
    """Whether ``x`` is a ``DTensor``; where that has not been imported nothing is."""
    if type(x) in PLAIN:
        return False
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


def local(x: Any) -> Any:
    """The shard of this process; anything else as it is."""
    return x._local_tensor if is_sharded(x) else x


def placements_of(x: Any) -> tuple[Any, ...] | None:
    """How a tensor is sharded, by mesh dimension; None of one that is no ``DTensor``."""
    return tuple(x.placements) if is_sharded(x) else None


def local_grad(param: Any) -> Tensor | None:
    """The shard of the gradient that belongs to this process's shard of the parameter."""
    grad: Tensor | None = param.grad
    if grad is None or not is_sharded(param):
        return grad
    if not is_sharded(grad):
        raise RuntimeError(
            f"a sharded parameter of shape {tuple(param.shape)} has a gradient that is not: got "
            f"{type(grad).__name__} of shape {tuple(grad.shape)}"
        )
    found: Any = grad
    if placements_of(found) != placements_of(param):
        # what it comes to, once for both passes and for a base optimizer that reads it there
        grad = param.grad = found.redistribute(param.device_mesh, param.placements)
    shard: Any = local(grad)
    waited: Tensor = shard.wait() if hasattr(shard, "wait") else shard
    return waited


def check_shards(state: dict[str, Any], param: Any) -> None:
    """State tensors of a parameter's shape are sharded as it is.

    Raises:
        RuntimeError: If one is not; the passes would walk over its memory's end.
    """
    if not (is_sharded(param) or any(map(is_sharded, state.values()))):
        return
    where = placements_of(param)
    for name, x in state.items():
        if isinstance(x, Tensor) and x.dim() and x.shape == param.shape:
            found = placements_of(x)
            if found != where:
                raise RuntimeError(
                    f"state {name!r} has to be sharded as its parameter is, {where}, got {found}: "
                    "load it with torch.distributed.checkpoint"
                )


def local_state(state: dict[str, Any]) -> dict[str, Any]:
    """A parameter's state with this process's shards in it."""
    if any(map(is_sharded, state.values())):
        return {name: local(x) for name, x in state.items()}
    return state


def sharding_of(param: Any) -> Sharding:
    """Where sums of a parameter's shards are to be added up.

    Raises:
        RuntimeError: If the parameter is neither sharded nor replicated along a mesh dimension.
    """
    if not is_sharded(param):
        return ()
    mesh, groups = param.device_mesh, []
    for dim, placement in enumerate(param.placements):
        if placement.is_partial():
            raise RuntimeError(
                f"parameters must be sharded or replicated, got placements {param.placements}"
            )
        if not placement.is_replicate():
            groups.append(mesh.get_group(dim))
    return tuple(groups)


def coordinate_of(param: Any) -> int:
    """A number that tells the shards of a parameter apart, and is equal for equal shards."""
    if not is_sharded(param):
        return 0
    mesh, number = param.device_mesh, 0
    for dim, placement in enumerate(param.placements):
        if not placement.is_replicate():
            number = number * mesh.size(dim) + mesh.get_local_rank(dim)
    return number


def add_up(sums: dict[Sharding, Tensor]) -> Tensor:
    """Sums over this process's shards, by where they are to be added up, made one over everything.

    That is one all-reduce for each mesh dimension, with all the sums that need it.
    """
    for group in dict.fromkeys(group for sharding in sums for group in sharding):
        members = [sharding for sharding in sums if group in sharding]
        together = torch.stack([sums[sharding] for sharding in members])
        dist.all_reduce(together, group=group)
        sums |= dict(zip(members, together.unbind(), strict=True))
    values = list(sums.values())
    return values[0] if len(values) == 1 else torch.stack(values).sum(0)


def total(values: Sequence[Tensor], shardings: Sequence[Sharding] | None) -> Tensor:
    """The sum of tensors of one shape, one for each parameter, over all processes' shards."""
    if shardings is None or not any(shardings):
        return torch.stack(list(values)).sum(0)
    by_sharding: dict[Sharding, list[Tensor]] = defaultdict(list)
    for value, sharding in zip(values, shardings, strict=True):
        by_sharding[sharding].append(value)
    return add_up({where: torch.stack(same).sum(0) for where, same in by_sharding.items()})
