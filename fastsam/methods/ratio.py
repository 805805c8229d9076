"""SAMAR's own rule for the weight of its regulariser."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


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
    """

    c: float = 1.1
    lam_min: float = 0.1
    lam_max: float = 2.0
    smoothing: float = 0.0

    def __post_init__(self) -> None:
        if not 1 <= self.c < math.inf:
            raise ValueError(f"c must be at least 1 and finite, got {self.c}")
        if not 0 <= self.lam_min <= self.lam_max < math.inf:
            raise ValueError(
                "lam_min and lam_max must be finite with 0 <= lam_min <= lam_max, got "
                f"{self.lam_min} and {self.lam_max}"
            )
        if not 0 <= self.smoothing < 1:
            raise ValueError(f"smoothing must be in [0, 1), got {self.smoothing}")

    def __call__(self, lam: Tensor, sharpness: Tensor, previous: Tensor) -> Tensor:
        """The next lam, from two successive values of (smoothed) sharpness; 0-dim tensors."""
        undefined = torch.where(sharpness > 0, self.c, 1.0)
        growth = torch.where(previous > 0, sharpness / previous, undefined)
        return (lam * growth.clamp(1 / self.c, self.c)).clamp(self.lam_min, self.lam_max)
