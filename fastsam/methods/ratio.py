"""SAMAR's two rules for the weight of its regulariser."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fastsam.step.arguments import Number

BOUND = Number(tensors=None)
FACTOR, DECAY = Number(low=1.0, tensors=None), Number(high=1.0, tensors=None)
ARGUMENTS = {"c": FACTOR, "lam_min": BOUND, "lam_max": BOUND, "smoothing": DECAY}
TREND_ARGUMENTS = {"c": FACTOR, "fast": DECAY, "slow": DECAY}


def clipped_ratio(new: Tensor, old: Tensor, c: float) -> Tensor:
    """``new / old`` within ``1 / c`` and ``c``; by ``new``'s sign if ``old`` is not positive."""
    undefined = torch.where(new > 0, c, 1.0)
    return torch.where(old > 0, new / old, undefined).clamp(1 / c, c)


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
        c: Largest factor by which :math:`\lambda` rises or falls in a step, at least 1. Default
            1.1. With 1 it is constant.
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
        growth = clipped_ratio(sharpness, previous, self.c)
        return (lam * growth).clamp(self.lam_min, self.lam_max)


@dataclass(frozen=True)
class SharpnessTrend:
    r"""Sets SAMAR's :math:`\lambda` by the ratio of a fast and a slow average of the sharpness.

    .. math:: a_k = \beta_a\, a_{k-1} + (1 - \beta_a)\, s_k, \qquad
              b_k = \beta_b\, b_{k-1} + (1 - \beta_b)\, s_k, \qquad
              \lambda_{k+1} = \lambda_0\, \mathrm{clip}\!\left(\frac{a_k}{b_k}, \frac 1c, c\right)

    with :math:`\lambda_0` the ``lam`` that :class:`SAMAR` is given. Sharpness that has been growing
    raises :math:`\lambda`, as with :class:`SharpnessRatio`. That multiplies its ratios, and so the
    noise of single batches adds up in :math:`\lambda` to a random walk between its bounds; here
    :math:`\lambda` returns to :math:`\lambda_0` where the sharpness stays as it is. Both averages
    start at the first measurement, which leaves :math:`\lambda` as it is. Where :math:`b_k` is not
    positive, the ratio counts as :math:`c` if :math:`a_k` is positive and as 1 if not.

    Args:
        c: Largest factor between :math:`\lambda` and :math:`\lambda_0`, in either direction, at
            least 1. Default 2. With 1 it is constant.
        fast, slow: :math:`\beta_a` and :math:`\beta_b`, each in [0, 1), ``slow`` at least ``fast``.
            Defaults 0.9 and 0.99: averages over some 10 and 100 steps.

    Raises:
        ValueError: If a value is out of range.

    The paper (see :class:`SAMAR`) adapts by the ratio of successive sharpness values. That these
    are averages, and that their ratio is taken of :math:`\lambda_0`, is ours, as is every constant.
    On three small data sets it was better than :class:`SharpnessRatio` on one and equal on two
    (docs/choosing.md), and :math:`\lambda` depended far less on the seed.

    Example:
        >>> rule = fastsam.SharpnessTrend(c=1.5)
        >>> lam, fast, slow = torch.tensor([1.0, 0.25, 0.2])
        >>> rule(lam, fast, slow)
        tensor(1.2500)
    """

    c: float = 2.0
    fast: float = 0.9
    slow: float = 0.99

    def __post_init__(self) -> None:
        for name, argument in TREND_ARGUMENTS.items():
            object.__setattr__(self, name, float(argument(name, getattr(self, name))))
        if self.slow < self.fast:
            raise ValueError(f"slow must be at least fast={self.fast!r}, got {self.slow!r}")

    def __call__(self, lam: Tensor, fast: Tensor, slow: Tensor) -> Tensor:
        """The next lam, from the one at first and both averages; 0-dim tensors."""
        return lam * clipped_ratio(fast, slow, self.c)
