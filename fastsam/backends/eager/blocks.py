"""Cutting lists of tensors into blocks that a chain of operators finds in the cache again."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

#: Elements per block: a few streams of it fit into a last-level cache, and the threads of an
#: operator still have work for some hundred microseconds.
BLOCK = 1 << 20
#: Elements from which a tensor is a block of its own; smaller ones are gathered.
LARGE = 1 << 16

#: Elements per dot product, which adds up in the tensors' own precision: a millionth of random
#: numbers is lost then. Each waits for all threads, and so wants many.
DOT_SPAN = 1 << 19

#: A block: positions in the lists, and for every stream a list of tensors.
Block = tuple[list[int], list[list[Tensor]]]


def flat(x: Tensor) -> Tensor:
    """The elements of a dense tensor in the order of its memory."""
    return x.as_strided((x.numel(),), (1,))


def dots(x: Tensor, y: Tensor) -> list[Tensor]:
    """The dot product of two dense tensors of one layout, in parts to be added up."""
    x, y = flat(x), flat(y)
    if x.numel() <= DOT_SPAN:
        return [torch.dot(x, y)]
    parts = zip(torch.split(x, DOT_SPAN), torch.split(y, DOT_SPAN), strict=True)
    return [torch.dot(a, b) for a, b in parts]


def blocks(*streams: Sequence[Tensor]) -> Iterator[Block]:
    """Walk parallel lists of dense tensors; those at one position have the same layout."""
    positions: list[int] = []
    gathered: list[list[Tensor]] = [[] for _ in streams]
    size = 0
    for i, tensors in enumerate(zip(*streams, strict=True)):
        count = tensors[0].numel()
        if LARGE <= count <= BLOCK:
            yield [i], [[x] for x in tensors]
            continue
        if count > BLOCK:
            for cuts in zip(*(torch.split(flat(x), BLOCK) for x in tensors), strict=True):
                yield [i], [[cut] for cut in cuts]
            continue
        if size + count > BLOCK:
            yield positions, gathered
            positions, gathered, size = [], [[] for _ in streams], 0
        positions.append(i)
        for stream, x in zip(gathered, tensors, strict=True):
            stream.append(x)
        size += count
    if positions:
        yield positions, gathered
