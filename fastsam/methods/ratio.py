"""SAMAR's own rule for the weight of its regulariser."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fastsam.step.arguments import Number

BOUND = Number(tensors=None)
ARGUMENTS = {"c": Number(low=1.0, tensors=None), "lam_min": BOUND, "lam_max": BOUND,
             "smoothing": Number(high=1.0, tensors=None)}  # fmt: skip


@dataclass(frozen=True)
class SharpnessRatio:
    r"""Adapts SAMAR's :math:`\lambda` by the ratio of successive sharpness values.

    .. math:: \bar s_k = \beta\, \bar s_{k-1} + (1 - \beta)\, s_k, \qquad
              \lambda_{k+1} = \mathrm{clip}\!\left(\lambda_k\,
              \mathrm{clip}\!\left(\frac{\bar s_k}{\bar s_{k-1}}, \frac 1c, c\right),
              \lambda_{\min}, \lambda_{\max}\right)

    Growing sharpness raises :math:`\lambda`, and so counteracts itself. Sharpness may be negative.
    Where :math:`\bar s_{k-1}` is not positive, the ratio counts as :math:`c` if :math:`\bar s_k`
    is positive and as 1 if not.

    Args:
        c: Most that :math:`\lambda` changes by in a step, at least 1. Default 1.1. With 1 it is
            constant.
        lam_min, lam_max: Bounds, at least 0. Defaults 0.1 and 2.
        smoothing: :math:`\beta`, in [0, 1). Default 0: none, the ratio of single steps.

    Raises:
        ValueError: If a value is out of range.

    The paper (see :class:`SAMAR`) adapts by this ratio; its constants could not be read. The
    clipping, its defaults and the smoothing are ours.

    Example:
        >>> rule = fastsam.SharpnessRatio(c=1.5)
        >>> lam, sharpness, previous = torch.tensor([1.0, 0.25, 0.2])
        >>> rule(lam, sharpness, previous)
        tensor(1.2500)
    """

    c: float = 1.1
    lam_min: float = 0.1
    lam_max: float = 2.0
    smoothing: float = 0.0

    def __post_init__(self) -> None:
        for name, argument in ARGUMENTS.items():
            object.__setattr__(self, name, float(argument(name, getattr(self, name))))
        if self.lam_min > self.lam_max:
            raise ValueError(
                f"lam_min must be at most lam_max={self.lam_max!r}, got {self.lam_min!r}"
            )

    def __call__(self, lam: Tensor, sharpness: Tensor, previous: Tensor) -> Tensor:
        """The next lam, from two successive values of (smoothed) sharpness; 0-dim tensors."""
        undefined = torch.where(sharpness > 0, self.c, 1.0)
        growth = torch.where(previous > 0, sharpness / previous, undefined)
        return (lam * growth.clamp(1 / self.c, self.c)).clamp(self.lam_min, self.lam_max)
