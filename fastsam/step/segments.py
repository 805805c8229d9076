"""Norms that are not over everything: by parameter group, or by parameter.

What a norm is over is a *segment*. The squared norms of all segments are one vector on the device.
"""

from collections.abc import Sequence
from itertools import chain
from typing import Any

from .batch import Batch
from .rule import Ascent, Group

NORMS = ("global", "group", "layer")


def check_norm(norm: str, name: str, ascent: Ascent, lam: Any) -> None:
    """Whether the perturbation is divided by a norm of its own for every segment.

    Args:
        norm: One of ``NORMS``.
        name: The optimizer's, for messages.
        ascent: Its rule.
        lam: Unified SAM's weight of normalisation, where it has one.

    Raises:
        ValueError: If not.
    """
    if norm != "global" and not (ascent.divides and lam != 0):
        raise ValueError(
            f"norm must be 'global' with {name}, whose perturbation is not divided by the norm of "
            f"one gradient, got {norm!r}"
        )


def count_of(groups: Sequence[Group], norm: str) -> int:
    """How many segments there are."""
    return len(groups) if norm == "group" else len(_parameters(groups))


def segments_of(batch: Batch, groups: Sequence[Group], norm: str) -> list[int]:
    """The segment of each of the batch's parameters."""
    if norm == "group":
        return batch.groups
    layout = batch.layout
    if layout is not None and layout.segments is not None:
        return layout.segments
    number = {param: i for i, param in enumerate(_parameters(groups))}
    segments = [number[param] for param in batch.owners]
    if layout is not None:
        layout.segments = segments
    return segments


def _parameters(groups: Sequence[Group]) -> dict[Any, None]:
    return dict.fromkeys(chain.from_iterable(group["params"] for group in groups))
