"""Replicas of a model that perturb their weights each along its own gradient: m-sharpness."""

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Module
from torch.nn.parallel import DistributedDataParallel

from fastsam.kernels.layout import Scalar


class per_replica:  # noqa: N801 - used like a function
    r"""Perturb every replica of a model along its own gradient: m-sharpness.

    .. math:: w^+ = w - lr\, \frac1R \sum_{r=1}^R \nabla L_r(w + e_r), \qquad
              e_r = \rho\, \frac{\nabla L_r(w)}{\|\nabla L_r(w)\|}

    with :math:`L_r` the loss on the data of replica :math:`r`. (By default all replicas have the
    same perturbation.) Give it as ``ascent_context``::

        optimizer = fastsam.SAM(..., ascent_context=fastsam.per_replica(model))

    A replica is, depending on the model:

    - ``DistributedDataParallel``, or ``replicate`` on top of FSDP2: each rank. With the former it
      is the same as ``ascent_context=model.no_sync``.
    - ``fully_shard`` on a two-dimensional mesh (HSDP): each group of ranks that holds all shards.
    - ``fully_shard`` on a one-dimensional mesh: refused, as a rank holds only a shard of the
      weights and cannot perturb all of them.

    Cost: it saves the first of a step's two all-reduces of gradients between the replicas; shards
    within a replica are gathered and reduced as before. If the update depends on the norm of the
    first gradient (``renormalize``), or on whether it is finite (a loss scale), the replicas
    exchange two numbers in one all-reduce; the common norm is
    :math:`\sqrt{\tfrac1R \sum_r \|\nabla L_r(w)\|^2}`. State of the ascent (VaSSO's, LightSAM's)
    differs from replica to replica, and a checkpoint has that of one.

    With explicit passes use ``with optimizer.ascent_context():`` around forward and backward of the
    first pass, and also give it to the optimizer as ``ascent_context``.

    Args:
        module: The model, as returned by ``DistributedDataParallel`` or ``fully_shard``.

    Raises:
        TypeError: If it is another module.
        RuntimeError: If its replicas are not whole: a module of it is sharded over all ranks.

    Example:
        >>> model = torch.nn.parallel.DistributedDataParallel(model)
        >>> own = fastsam.per_replica(model)
        >>> optimizer = fastsam.SAM(
        ...     model.parameters(), torch.optim.SGD, lr=0.1, ascent_context=own
        ... )
        >>> loss = optimizer.step(closure)

    Reference: Foret, Kleiner, Mobahi and Neyshabur, "Sharpness-aware minimization for efficiently
    improving generalization", ICLR 2021: m-sharpness, with a perturbation for each accelerator.
    """

    def __init__(self, module: Any):
        module = getattr(module, "_orig_mod", module)  # a compiled one
        self.module: Any = module
        self.group: Any
        if isinstance(module, DistributedDataParallel):
            self.group = module.process_group
            return
        sharded = _sharded_parts(module)
        if not sharded:
            raise TypeError(
                "module must be a DistributedDataParallel, or a model given to fully_shard, got "
                f"{type(module).__name__}"
            )
        groups = [getattr(part.mesh_info, "replicate_process_group", None) for part in sharded]
        if None in groups:
            raise RuntimeError(
                "module must be replicated, as fully_shard does on a mesh of two dimensions, to be "
                "perturbed by replica: on one dimension every rank holds only its shard of the "
                "weights, and there is no place for a perturbation of all of them by each"
            )
        self.group = groups[0]

    def __call__(self) -> AbstractContextManager[Any]:
        if isinstance(self.module, DistributedDataParallel):
            context: AbstractContextManager[Any] = self.module.no_sync()
            return context
        return self._reduced_within()

    @contextmanager
    def _reduced_within(self) -> Iterator[None]:
        """Take the replicated dimension from what ``fully_shard`` knows about its mesh.

        ``set_requires_all_reduce(False)`` would keep the sums for the next backward pass, which
        adds them to its own, and leave no gradients.
        """
        from torch.distributed.fsdp._fully_shard import _fsdp_common as fsdp

        changed = [
            (part, part.mesh_info, part.post_forward_mesh_info)
            for part in _sharded_parts(self.module)
        ]
        try:
            for part, whole, after in changed:
                is_sharded = isinstance(whole, fsdp.FSDPMeshInfo)
                part.mesh_info = copy.copy(whole)
                part.mesh_info.__class__ = (
                    fsdp.FSDPMeshInfo if is_sharded else fsdp.DataParallelMeshInfo
                )
                part.post_forward_mesh_info = part.mesh_info if after is whole else after
            yield
        finally:
            for part, whole, after in changed:
                part.mesh_info, part.post_forward_mesh_info = whole, after

    def __repr__(self) -> str:
        return f"{type(self).__name__}({type(self.module).__name__})"


def _sharded_parts(module: Any) -> list[Any]:
    """What ``fully_shard`` keeps for every set of parameters that it gathers together."""
    parts: list[Any] = []
    for child in module.modules() if isinstance(module, Module) else ():
        find: Any = getattr(child, "_get_fsdp_state", None)
        if find is None:
            continue
        state = find()
        # torch before 2.12 has one, later several
        several = getattr(state, "_fsdp_param_groups", None)
        for part in [state._fsdp_param_group] if several is None else several:
            if part is not None and not any(part is other for other in parts):
                parts.append(part)
    return parts


def replicas_of(context: Any) -> Any:
    """The process group of the replicas whose gradients a context leaves apart; else None.

    That is known of :class:`per_replica`, of DDP's ``no_sync`` and of what Lightning and Accelerate
    make of it: the method, or what it gives.
    """
    made_by = getattr(context, "func", context)
    keeps_apart = getattr(made_by, "__name__", "") in ("no_sync", "block_backward_sync")
    for x in (context, getattr(context, "__self__", None), *getattr(context, "args", ())):
        if isinstance(x, per_replica):
            return x.group
        # of a module that stands for another, as a compiled one; Lightning's strategy has a model
        held = (x, getattr(x, "model", None)) if keeps_apart else ()
        for module in held:
            if isinstance(module, DistributedDataParallel):
                return module.process_group
    return None


def replicas_behind(context: Any) -> Any:
    """The same of an ``ascent_context``, as it says itself or what it gives for a pass says."""
    if context is None:
        return None
    found = replicas_of(context)
    return replicas_of(context()) if found is None and is_distributed() else found


def is_distributed() -> bool:
    """Whether there are other processes."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def agree(scalars: Tensor, replicas: Any) -> None:
    """Let what the update takes from the replicas' first gradients be the same for all.

    That is the norm, of which it becomes the root of the mean square, and whether an overflow was
    found. A norm that is not finite is so for all then.
    """
    found = torch.stack([scalars[Scalar.GRAD_NORM].square(), scalars[Scalar.FOUND_INF]])
    average(found, replicas)
    scalars[Scalar.GRAD_NORM] = found[0].sqrt()
    scalars[Scalar.FOUND_INF] = found[1]


def average(x: Tensor, replicas: Any) -> None:
    """Take the mean over all replicas, in place."""
    dist.all_reduce(x, group=replicas)
    x /= replicas.size()
