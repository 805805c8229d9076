"""Cutting lists of tensors into pieces that a chain of operators finds in the cache again."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

#: Elements per piece: a few streams of it fit into a last-level cache, and the threads of an
#: operator still have work for some hundred microseconds.
PIECE = 1 << 20
#: Elements from which a tensor is a piece of its own; smaller ones are gathered.
LARGE = 1 << 16

#: Elements per dot product, which adds up in the tensors' own precision: a millionth of random
#: numbers is lost then. Each waits for all threads, and so wants many.
DOT_SPAN = 1 << 19

#: A piece: positions in the lists, and for every stream a list of tensors.
Piece = tuple[list[int], list[list[Tensor]]]


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


def pieces(*streams: Sequence[Tensor]) -> Iterator[Piece]:
    """Walk parallel lists of dense tensors; those at one position have the same layout."""
    positions: list[int] = []
    gathered: list[list[Tensor]] = [[] for _ in streams]
    size = 0
    for i, tensors in enumerate(zip(*streams, strict=True)):
        count = tensors[0].numel()
        if LARGE <= count <= PIECE:
            yield [i], [[x] for x in tensors]
            continue
        if count > PIECE:
            for cuts in zip(*(torch.split(flat(x), PIECE) for x in tensors), strict=True):
                yield [i], [[cut] for cut in cuts]
            continue
        if size + count > PIECE:
            yield positions, gathered
            positions, gathered, size = [], [[] for _ in streams], 0
        positions.append(i)
        for stream, x in zip(gathered, tensors, strict=True):
            stream.append(x)
        size += count
    if positions:
        yield positions, gathered
