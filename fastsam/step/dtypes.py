"""Looking at the dtypes of parameters: when they are given, and when a model has been cast."""

from collections.abc import Iterable

import torch
from torch import Tensor

from .guards import warn_user
from .precision import HALF


class Dtypes:
    """Looks at the dtypes of parameters when they come, or come back as others: a model is cast.

    Args:
        rounding, master_weights: The optimizer's.
        warned: Parameters of which it has been said already that they are in 16 bits.
    """

    def __init__(self, rounding: str, master_weights: bool, warned: Iterable[Tensor] = ()) -> None:
        self._stochastic = rounding == "stochastic"
        self._warns = not (self._stochastic or master_weights or has_half(warned))

    def check(self, params: Iterable[Tensor]) -> None:
        """Refuse what cannot be served, and say once what happens to other 16-bit parameters.

        Raises:
            ValueError: For float16 parameters under stochastic rounding.
        """
        if self._stochastic and any(param.dtype == torch.float16 for param in params):
            raise ValueError(
                "rounding='stochastic' is for bfloat16 parameters, got float16; use "
                "master_weights=True for float16"
            )
        if self._warns and has_half(params):
            self._warns = False
            warn_user(
                "some parameters are float16 or bfloat16: a perturbation of norm rho is mostly "
                "below their resolution and is rounded away; use master_weights=True, or "
                "rounding='stochastic' for bfloat16, or float32 parameters with torch.autocast"
            )


def has_half(params: Iterable[Tensor]) -> bool:
    """Whether one of them is in 16 bits."""
    return any(param.dtype in HALF for param in params)
