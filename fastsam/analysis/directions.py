"""Directions in the space of weights: random, along the gradient or given; and their lengths."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastsam.arithmetic import wide, wide_dtype
from fastsam.backends.base import complete
from fastsam.backends.sums import dot, global_norm
from fastsam.step.scalars import new_scalars

from .flatness import Offsets, Probe, add

#: Each way of scaling a direction, and how an axis of the figure calls it.
NORMALIZATIONS = {
    "filter": "filter-normalised", "layer": "layer-normalised", "unit": "unit length", None: "",
}  # fmt: skip


def check_directions(directions: Any, ndim: Any) -> int:
    """The number of directions that are asked for."""
    if isinstance(directions, str):
        if directions not in ("random", "gradient"):
            raise ValueError(
                "directions must be 'random', 'gradient' or one or two lists of tensors, got "
                f"{directions!r}"
            )
        given = 1
        allowed: tuple[int | None, ...] = (None, 1, 2)
    else:
        lists = isinstance(directions, Sequence) and not isinstance(directions, Tensor)
        if not lists or any(isinstance(d, Tensor | str) or d is None for d in directions):
            raise TypeError(
                "directions must be 'random', 'gradient' or one or two lists with a tensor for "
                f"each parameter, got {_kinds(directions)}"
            )
        given = len(directions)
        if given not in (1, 2):
            raise ValueError(f"directions must be one or two, got {given}")
        allowed = (None, given)
    if isinstance(ndim, bool) or ndim not in allowed:
        of = "" if isinstance(directions, str) else f" with {given} given direction(s)"
        choices = ", ".join(map(repr, allowed))
        raise ValueError(f"ndim must be one of {choices}{of}, got {ndim!r}")
    return given if ndim is None else int(ndim)


def _kinds(x: Any) -> str:
    inside = sorted({type(d).__name__ for d in x}) if isinstance(x, Sequence) else []
    return f"{type(x).__name__}{' of ' if inside else ''}{', '.join(inside)}"


def draw(
    probe: Probe, directions: str, count: int, generator: torch.Generator
) -> list[list[Tensor | None]]:
    """Random directions, or the gradient and one that is orthogonal to it."""
    needed = probe.trainable
    size = sum(p.numel() for p, has in zip(probe.params, needed, strict=True) if has)
    if directions == "gradient" and count > size:
        raise ValueError(f"ndim must be 1 for {size} weight(s) that require grad, got {count}")
    axes: list[list[Tensor | None]] = []
    if directions == "gradient":
        grads = probe.gradient()[1]
        axes.append([None if g is None else wide(g).clone() for g in grads])
    while len(axes) < count:
        drawn: list[Tensor | None] = []
        for p, has in zip(probe.params, needed, strict=True):
            if has:
                x = torch.randn(p.shape, generator=generator, dtype=wide_dtype(p), device="cpu")
            drawn.append(x.to(p.device) if has else None)
        if directions == "gradient":
            drawn = _orthogonal(drawn, axes[0])
        axes.append(drawn)
    return axes


def _orthogonal(x: Offsets, to: Offsets) -> list[Tensor | None]:
    """``x`` less its component along ``to``."""
    pairs = [(a, b) for a, b in zip(x, to, strict=True) if a is not None and b is not None]
    like = new_scalars(pairs[0][0].device)
    squared = complete(dot([(b, b) for _, b in pairs], like))
    part = torch.where(squared == 0, 0.0, complete(dot(pairs, like)) / squared)
    return [a if a is None or b is None else a - part.to(a) * b for a, b in zip(x, to, strict=True)]


def fit(direction: Any, params: Sequence[Tensor], name: str) -> list[Tensor | None]:
    """A given direction, checked, in the dtype of the arithmetic."""
    given = list(direction)
    if len(given) != len(params):
        raise ValueError(
            f"{name} must have a tensor, or None, for each of {len(params)} parameter(s), got "
            f"{len(given)}"
        )
    for i, (x, p) in enumerate(zip(given, params, strict=True)):
        if not (x is None or isinstance(x, Tensor)):
            raise TypeError(f"{name}[{i}] must be a tensor or None, got {type(x).__name__}")
        if x is not None and (x.shape != p.shape or x.is_complex() or not p.is_floating_point()):
            raise ValueError(
                f"{name}[{i}] must be real and of its parameter's shape, {tuple(p.shape)} of "
                f"{p.dtype}, got {tuple(x.shape)} of {x.dtype}"
            )
    return [
        None if x is None else x.detach().to(p.device, wide_dtype(p))
        for x, p in zip(given, params, strict=True)
    ]


def normalize(
    probe: Probe, direction: Offsets, normalization: str | None, biases: bool
) -> list[Tensor | None]:
    """Scale a direction; parameters that the normalization leaves out become None."""
    if normalization is None:
        return list(direction)
    if normalization == "unit":
        parts = [d for d in direction if d is not None]
        if not parts:
            return list(direction)
        norm = complete(global_norm(parts, like=new_scalars(parts[0].device)))
        scale = torch.where(norm == 0, 0.0, 1 / norm)
        return [
            None if d is None else (d.to(scale.dtype) * scale.to(d.device)).to(d.dtype)
            for d in direction
        ]
    scaled: list[Tensor | None] = []
    for d, w in zip(direction, probe.weights(direction), strict=True):
        if d is None or w is None or (d.ndim < 2 and not biases):
            scaled.append(None)
            continue
        inside = tuple(range(normalization == "filter" and d.ndim > 1, d.ndim))
        dtype = new_scalars(d.device).dtype  # the squares of a vanishing gradient are 0 in float32
        target = torch.linalg.vector_norm(w, dim=inside, keepdim=True, dtype=dtype)
        norm = torch.linalg.vector_norm(d, dim=inside, keepdim=True, dtype=dtype)
        scaled.append((d * torch.where(norm == 0, 0.0, target / norm)).to(d.dtype))
    return scaled


def combine(axes: Sequence[Offsets], place: Sequence[float]) -> list[Tensor | None]:
    """The offsets of a point."""
    total: list[Tensor | None] = [None] * len(axes[0])
    for direction, at in zip(axes, place, strict=True):
        total = [
            add(x, None if d is None else at * d) for x, d in zip(total, direction, strict=True)
        ]
    return total


def label(name: str, normalization: str | None) -> str:
    text = NORMALIZATIONS[normalization]
    return f"{name}, {text}" if text else name
