"""The ascent of SAM, USAM and Unified SAM, which is every method's that has none of its own."""

from typing import Any

from fastsam.arithmetic import EPS, gives_direction, where
from fastsam.step.rule import Ascent, Columns, Group


def _columns(group: Group, lam: float) -> Columns:
    return {"LAM": lam}


def _radius(rho: Any, norm: Any, total: Any, h: Columns) -> Any:
    """SAM's at lam = 1, USAM's at lam = 0."""
    lam = h["LAM"]
    return where(gives_direction(norm), rho * (1 - lam + lam / (norm + EPS)))


UNIFIED = Ascent(
    name="unified",
    kernel="fastsam.kernels.ascent.unified",
    radius=_radius,
    columns=_columns,
    eager="fastsam.backends.eager.ascents:along_gradient",
)
