"""Small functions that the rules' torch equations share: ``kernels/arithmetic.py`` in torch."""

import math
from typing import Any

import torch
from torch import Tensor

#: Added to a norm before it is divided by.
EPS = 1e-12
#: The smallest normal float32.
SMALLEST = 2.0**-126


def wide_dtype(x: Tensor) -> torch.dtype:
    """The dtype of the arithmetic, and of the state of the ascent rules."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def wide(x: Tensor) -> Tensor:
    """``x`` in the dtype of the arithmetic."""
    return x if x.dtype == torch.float64 else x.float()


def bounded(scale: Any, like: Tensor) -> Any:
    """A factor that may be too large for a tensor's dtype, as the largest that it has."""
    most = torch.finfo(like.dtype).max
    return scale.clamp(max=most) if isinstance(scale, Tensor) else min(scale, most)


def where(condition: Any, x: Any, other: Any = 0.0) -> Any:
    """``x`` where the condition holds, else ``other``; of numbers or of tensors."""
    if isinstance(condition, Tensor):
        return torch.where(condition, x, other)
    return x if condition else other


def is_finite(x: Any) -> Any:
    """Whether a number or a tensor is neither infinite nor NaN."""
    return x.isfinite() if isinstance(x, Tensor) else math.isfinite(x)


def root(x: Any) -> Any:
    """The square root of a number or a tensor; 0 of what rounding has made negative."""
    if isinstance(x, Tensor):
        return x.clamp(min=0).sqrt()
    return 0.0 if x < 0 else math.sqrt(x)


def gives_direction(norm: Any) -> Any:
    """Whether a norm, a number or a 0-dim tensor, is above 0 and finite."""
    return (norm > 0) & (norm < math.inf)


def over_root(x: Tensor, second: Tensor) -> Tensor:
    """``x / sqrt(second)``, with ``SMALLEST`` for what is below it.

    An average of squares gets there after some 50,000 zero gradients (at a beta of 0.999).
    """
    return x / second.clamp(min=SMALLEST).sqrt()


def narrowed(x: Any, like: Tensor) -> Any:
    """A tensor of one element as one of no dimension, in the dtype of the arithmetic.

    Else two 0-dim tensors would be promoted, and shape (1, 1) would spread to the weights.
    """
    return x.reshape(()).to(like.dtype) if isinstance(x, Tensor) else x
