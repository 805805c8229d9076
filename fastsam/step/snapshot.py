"""Values of tensors at one time, written back later: in place, and without autograd's knowing."""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

#: Where a module has a tensor: the module, its buffers or its parameters, and the name there.
Place = tuple[Module, dict[str, Any], str]


class Snapshot:
    """Copies of tensors, to be put back.

    Args:
        places: Of modules' tensors, which are put back where they were, too.
        tensors: Others.
    """

    @torch.no_grad()
    def __init__(self, places: Iterable[Place], tensors: Iterable[Tensor] = ()) -> None:
        self._places = [(*place, place[1][place[2]]) for place in places]
        everything = dict.fromkeys([*(x for *_, x in self._places), *tensors])
        # each with a copy, and how often it had been written to
        self._copies = {x: (torch.empty_like(x), _version(x)) for x in everything}
        _copy((copy, x) for x, (copy, _) in self._copies.items())

    @torch.no_grad()
    def put_back(self) -> None:
        """Let the tensors have the bits that they had, in the memory that they have now.

        A tensor that was replaced in its module is put back there; one that has moved to another
        device or dtype stays, with its old value; one of another shape is left alone.
        """
        # A write that autograd hears of would forbid the backward of a graph that is there. Those
        # of BatchNorm are silent, too: no graph reads what they write. Where others were heard a
        # graph may have read the result, and autograd has to object.
        pairs = [
            (x.data if _version(x) == version else x, copy)
            for x, (copy, version) in self._copies.items()
        ]
        for module, held, name, x in self._places:
            now = held[name] if name in held else x
            if now is None or (now is not x and _is_like(now, x)):
                setattr(module, name, x)
            elif now is not x:  # the model was moved, or is another one by now
                pairs.append((now, self._copies[x][0]))
        _copy(pairs)


def _version(x: Tensor) -> int:
    """How often autograd has heard of a write; it does not listen to inference tensors."""
    return -1 if x.is_inference() else x._version


def _is_like(x: Tensor, y: Tensor) -> bool:
    return (x.shape, x.dtype, x.device) == (y.shape, y.dtype, y.device)


def _copy(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Copy the second of each pair into the first, where the shapes are equal."""
    groups = defaultdict[Any, tuple[list[Tensor], list[Tensor]]](lambda: ([], []))
    plain = (Tensor, torch.nn.Parameter)
    for target, source in pairs:
        if target.shape != source.shape:
            continue
        if type(target) in plain and type(source) in plain:
            same = groups[target.dtype, source.dtype, target.device, source.device]
            same[0].append(target)
            same[1].append(source)
        else:  # a DTensor has no operator for lists
            target.copy_(source)
    for group in groups.values():
        torch._foreach_copy_(*group)
