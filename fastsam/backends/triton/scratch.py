"""Scratch memory for perturbed weights, so that the weights themselves need no copy.

The perturbation writes ``w + e`` to memory that the parameter points at until it is restored, and
``w`` stays where it is: 4 bytes less per float32 element. That is right only where nobody reads the
parameter's own memory in the meantime. So it has to own that, alone, and no CUDA graph may be there
that would go on reading the address it has recorded. Everything else is copied, and perturbed where
it is.
"""

import sys
from collections.abc import Sequence
from itertools import chain
from operator import is_
from typing import Any

import torch
from torch import Tensor

from fastsam.step.batch import Batch, identical
from fastsam.step.memory import ALONE, alike, is_alone, owns_memory, still_owns_memory, uses
from fastsam.step.rule import Group
from fastsam.step.spec import StepSpec
from fastsam.step.streams import use_here


def may_move(batch: Batch, spec: StepSpec) -> bool:
    """Whether parameters of a first pass may point elsewhere until the second.

    Not on their own: what that costs on the host has not been weighed against what it saves on any
    GPU. Nor where something needs the weights and the perturbed weights at once: an update that is
    not fused and may fail, LETS, a norm of the second gradient with ASAM's scale. Parts of DTensors
    belong to these; and several devices would each need a layout of their own.
    """
    return (
        spec.scratch is True
        and not (spec.has_unfused or spec.keeps_weights)
        and not (spec.renormalize and spec.adaptive)
        and batch.part is None
        and not (batch.shardings is not None and any(batch.shardings))
        and not has_graphs(batch.params[0].device)
    )


def has_graphs(device: torch.device) -> bool:
    """Whether CUDA graphs are known to have been captured, which go on with the addresses they saw.

    Those of ``torch.cuda.make_graphed_callables``, ``torch.cuda.graph`` on its own stream, and
    ``torch.compile``.
    """
    if device.type != "cuda":
        return False
    if getattr(torch.cuda.graph, "default_capture_stream", None) is not None:
        return True
    trees = sys.modules.get("torch._inductor.cudagraph_trees")
    find: Any = getattr(trees, "get_manager", None)
    return find is not None and find(device.index, create_if_none_exists=False) is not None


class Scratch:
    """Scratch memory by parameter, kept from step to step: so its addresses stay, too."""

    def __init__(self) -> None:
        self.memory: dict[Tensor, Tensor] = {}

    def keep_to(self, groups: Sequence[Group]) -> None:
        """Keep that of these groups' parameters alone, which may be fewer than before."""
        if self.memory:
            present = set(chain.from_iterable(group["params"] for group in groups))
            use_here(x for param, x in self.memory.items() if param not in present)
            self.memory = {p: x for p, x in self.memory.items() if p in present}

    def targets(self, params: Sequence[Tensor], before: list[Tensor]) -> list[Tensor]:
        """Where the perturbed weights go: scratch memory, or the parameter itself.

        Args:
            params: The parameters.
            before: What the last step had, of the same ones where they were; else empty.

        Returns:
            ``before`` where nothing has changed.
        """
        if before and params[0].is_cuda and _are_alone(params, before):
            return before
        found = []
        for param, target in zip(params, before or params, strict=True):
            fits = target is not param and param.shape == target.shape
            if not (fits and still_owns_memory(param) and is_alone(target)):
                target = param
                if param.numel() and owns_memory(param):
                    target = self._of(param)
            found.append(target)
        return before if identical(found, before) else found

    def _of(self, param: Tensor) -> Tensor:
        """The parameter's memory from earlier steps if nobody sees it, else new."""
        target = self.memory.get(param)
        if target is None or not (alike(target, param) and is_alone(target)):
            target = self.memory[param] = torch.empty_like(param, requires_grad=False)
        return target


def have_shapes_of(xs: Sequence[Tensor], ys: Sequence[Tensor]) -> bool:
    """Whether the tensors have the shapes of others; a layout does not know of any."""
    return [x.shape for x in xs] == [y.shape for y in ys]


def _are_alone(params: Sequence[Tensor], targets: Sequence[Tensor]) -> bool:
    """Whether all move that moved before, on a GPU: nobody else sees their memory, or the scratch.

    They lie as they did, as far as a layout knows.
    """
    if any(map(is_, params, targets)) or not have_shapes_of(params, targets):
        return False
    return set(uses(list(map(Tensor.untyped_storage, chain(params, targets))))) == {ALONE}
