"""Steps in which every micro-batch has a perturbation of its own: m-sharpness."""

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from .arithmetic import wide_dtype
from .step.gradients import put_back


class GradientMean:
    """The mean of the gradients that several backward passes leave, one after the other.

    Args:
        groups: Of the optimizer.
        count: How many backward passes there are.
    """

    def __init__(self, groups: Sequence[dict[str, Any]], count: int) -> None:
        self._groups, self._count = groups, count
        self._total: dict[Tensor, Tensor] = {}
        self._dtypes: dict[Tensor, torch.dtype] = {}

    def add(self, factor: Any = None) -> None:
        """Add the present gradients, times a factor."""
        for param in chain.from_iterable(group["params"] for group in self._groups):
            if param.grad is not None:
                share = param.grad.to(wide_dtype(param.grad)) / self._count
                if factor is not None:
                    share *= factor.to(share.device, share.dtype, non_blocking=True)
                total = self._total.get(param)
                self._total[param] = share if total is None else total + share
                self._dtypes[param] = param.grad.dtype

    def leave(self) -> None:
        """Put the mean into ``.grad``, which is None or zero."""
        put_back({p: grad.to(self._dtypes[p]) for p, grad in self._total.items()})
