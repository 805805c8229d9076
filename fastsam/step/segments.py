"""Norms that are not over everything: by parameter group, or by parameter.

What a norm is over is a *segment*. The squared norms of all segments are one vector on the device.
"""

from collections.abc import Sequence
from itertools import chain
from typing import Any

from .arguments import Choice
from .batch import Batch
from .spec import Ascent, Group

NORMS = ("global", "group", "layer")


def check_norm(norm: Any, ascent: Ascent) -> None:
    """Over what the ascent's norm is.

    Raises:
        ValueError: If it is unknown, or the rule does not divide by such a norm.
    """
    Choice(NORMS)("norm", norm)
    if norm != "global" and (ascent.norm is None or ascent.accumulate is not None):
        raise ValueError(
            f"norm must be 'global' with ascent {ascent.name!r}, which does not divide by the norm "
            f"of one gradient, got {norm!r}"
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
