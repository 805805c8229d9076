"""Passes that stop where they need to know of each other: those of several devices.

A pass is a generator. It yields every sum over its own tensors, which is to be made that over all
tensors, in place, before it goes on; and it yields None before it changes what cannot be changed
back. On one device there is nothing to be added, and it runs to its end.
"""

from collections.abc import Generator, Sequence
from typing import Any, TypeAlias, TypeVar

from torch import Tensor

Result = TypeVar("Result")
Pass: TypeAlias = Generator[Tensor | None, None, Result]


def complete(one: Pass[Result]) -> Result:
    """Run a pass over all the tensors that there are."""
    while True:
        try:
            next(one)
        except StopIteration as end:
            result: Result = end.value
            return result


def together(passes: Sequence[Pass[Any]], results: list[Any]) -> None:
    """Run passes over parts of the tensors, and append what each gives to ``results``.

    If one fails, the others are ended where they stopped. Those that had come to their end, as
    ``results`` shows, are the caller's to undo.
    """
    try:
        while len(results) < len(passes):
            sums = []
            for one in passes:
                try:
                    sums.append(next(one))
                except StopIteration as end:
                    results.append(end.value)
            add_up([x for x in sums if x is not None])
    except BaseException:
        for one in passes:
            one.close()
        raise


def add_up(sums: Sequence[Tensor]) -> None:
    """Let all become their sum, added in their order, without waiting for a device.

    Each gets the same bits.
    """
    if len(sums) > 1:
        total = sums[0].clone()
        for x in sums[1:]:
            total += x.to(total.device, non_blocking=True)
        for x in sums:
            x.copy_(total, non_blocking=True)
