"""The descent of steps that stand for several: ``perturb_every`` with ``amplify``."""

import functools
from typing import Any

from torch import Tensor

from .step.rule import Columns, Descent, Group


def _columns(factor: float, group: Group) -> Columns:
    return {"ALPHA": factor, "UNIT": 0.0}


def _weighted(state: dict[str, Tensor], sums: dict[str, Tensor], h: Columns) -> tuple[Any, Any]:
    return h["ALPHA"], 1 - h["ALPHA"]


@functools.lru_cache(maxsize=64)
def amplified(factor: float) -> Descent:
    """``u = g + factor * (g~ - g)``; the same object for the same factor, as plans compare it.

    Of a parameter without a first gradient no difference is known, and nothing is amplified.
    """
    return Descent(
        name="amplified", kernel="fastsam.kernels.descent.weighted", coefficients=_weighted,
        columns=functools.partial(_columns, factor), fills=True,
    )  # fmt: skip
