"""Rules whose perturbation is noise, Gaussian or uniform: both from uniform random numbers."""

from typing import Any

import torch
from torch import Tensor

from fastsam.step.arguments import Number
from fastsam.step.rule import Ascent, Columns, Group

#: Of the central part of a Gaussian's quantile and of its tails, by Giles' approximation of the
#: inverse error function (2010), times the root of 2; the highest power first.
CENTRAL = (3.97426023e-08, 4.85462660e-07, -4.98282267e-06, -6.21052811e-06, 3.09120031e-04,
           -1.77303494e-03, -5.90813403e-03, 3.48802661e-01, 2.12331355)  # fmt: skip
TAILS = (-2.83145718e-04, 1.42765648e-04, 1.90825948e-03, -5.19501232e-03, 8.11688967e-03,
         -1.07797881e-02, 1.33485786e-02, 1.41658104, 4.00643424)  # fmt: skip


def _polynomial(coefficients: tuple[float, ...], x: Tensor) -> Tensor:
    value = coefficients[0] * x + coefficients[1]
    for c in coefficients[2:]:
        value = value.mul_(x).add_(c)
    return value


def _quantile(x: Tensor, state: dict[str, Tensor], h: Columns) -> Tensor:
    w = -((1 - x) * (1 + x)).log()
    central, tails = _polynomial(CENTRAL, w - 2.5), _polynomial(TAILS, w.sqrt() - 3)
    quantile: Tensor = x * torch.where(w < 5, central, tails)
    return quantile


def _scaled(x: Tensor, state: dict[str, Tensor], h: Columns) -> Tensor:
    scaled: Tensor = h["HALF_WIDTH"] * x
    return scaled


def _radius(rho: Any, norm: Any, total: Any, h: Columns) -> Any:
    return rho


def _half_width(group: Group, lam: float) -> Columns:
    return {"HALF_WIDTH": group["half_width"]}


NORMAL = Ascent(
    name="normal", kernel="fastsam.kernels.ascent.normal", direction=_quantile, radius=_radius,
    norm=None, noise=True, scales=False,
)  # fmt: skip
UNIFORM = Ascent(
    name="uniform", kernel="fastsam.kernels.ascent.uniform", direction=_scaled, radius=_radius,
    columns=_half_width, norm=None, noise=True, scales=False,
    arguments={"half_width": Number(with_low=False, tensors=None)},
)  # fmt: skip
