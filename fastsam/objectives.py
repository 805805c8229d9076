"""What Trace-, Det- and Frob-SAM take of the gradients at perturbed weights.

With ``x_i = (L_i - L_0) / rho^2`` from the loss ``L_i`` at the ``i``-th of ``N`` perturbations and
``L_0`` at the weights themselves, the update takes ``u = c_0 g + sum_i c_i g_i``. An objective says
what the ``c_i`` are. As long as some losses are to come, gradients are added up with weights that
differ from the ``c_i`` by a factor, or just added up (``step/samples.py``).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Scalars = Sequence[Tensor]


@dataclass(frozen=True)
class Mixture:
    """``u = last g_N + first g + plain sum_i g_i + weighted S``, the sums being of ``i < N``.

    ``S`` is the sum with an objective's own weights. Numbers, or 0-dim tensors.
    """

    last: Any
    first: Any
    plain: Any = 0.0
    weighted: Any = 0.0

    def where(self, square: Any) -> "Mixture":
        """This where the radius's square is above 0, and else ``g`` alone; a number or a tensor."""
        if not isinstance(square, Tensor):
            return self if square else Mixture(0.0, 1.0)
        some = square > 0
        plain, weighted = (
            torch.where(some, x, 0.0) if isinstance(x, Tensor) else x
            for x in (self.plain, self.weighted)
        )
        last, first = torch.where(some, self.last, 0.0), torch.where(some, self.first, 1.0)
        return Mixture(last, first, plain, weighted)


class Objective(ABC):
    """How a step's gradients are mixed."""

    #: Whether the losses have a part in it.
    needs_losses = True

    @abstractmethod
    def sums(self, samples: int) -> tuple[bool, bool]:
        """Whether a plain sum of gradients is needed, and one with weights."""

    def running(self, xs: Scalars) -> tuple[Any, Any]:
        """What the weighted sum so far and the gradient of the last of ``xs`` are multiplied by."""
        return 1.0, 1.0

    @abstractmethod
    def mixture(self, xs: Scalars, weight: float, samples: int) -> Mixture:
        """The coefficients; ``xs`` is empty without losses."""


class Trace(Objective):
    """``u = g + weight (mean of g_i - g)``."""

    needs_losses = False

    def sums(self, samples: int) -> tuple[bool, bool]:
        return samples > 1, False

    def mixture(self, xs: Scalars, weight: float, samples: int) -> Mixture:
        each = weight / samples
        return Mixture(each, 1 - weight, plain=each)


class Frobenius(Objective):
    """``u = g + weight / rho^2 * (covariance of L_i and g_i)``, with ``N - 1``.

    ``L_i - L_0`` is ``rho^2 x_i``, and the mean may be taken of those.
    """

    def sums(self, samples: int) -> tuple[bool, bool]:
        return True, samples > 2

    def running(self, xs: Scalars) -> tuple[Any, Any]:
        return 1.0, xs[-1]

    def mixture(self, xs: Scalars, weight: float, samples: int) -> Mixture:
        scale = weight / (samples - 1)
        mean = sum(xs[1:], start=xs[0]) / samples
        last = scale * (xs[-1] - mean)
        if samples == 2:  # one gradient is the whole plain sum, with nothing to cancel
            return Mixture(last, 1.0, plain=-last)
        return Mixture(last, 1.0, plain=-scale * mean, weighted=scale)


class Determinant(Objective):
    """``u = g + weight * m^-3 * (mean of exp(-x_i / 2) (g_i - g))``, ``m = mean of exp(-x_i / 2)``.

    Exponentials are taken relative to the largest.
    """

    def sums(self, samples: int) -> tuple[bool, bool]:
        return False, samples > 1

    def running(self, xs: Scalars) -> tuple[Any, Any]:
        if len(xs) == 1:
            return 0.0, 1.0
        before, now = _largest(xs[:-1]), _largest(xs)
        return (before - now).exp(), (-xs[-1] / 2 - now).exp()

    def mixture(self, xs: Scalars, weight: float, samples: int) -> Mixture:
        top = _largest(xs)
        parts = [(-x / 2 - top).exp() for x in xs]
        total = sum(parts[1:], start=parts[0])
        scale = weight * samples**2 * (-2 * top - 3 * total.log()).exp()
        weighted = 0.0 if samples == 1 else scale * (_largest(xs[:-1]) - top).exp()
        return Mixture(scale * parts[-1], 1 - scale * total, weighted=weighted)


@dataclass(frozen=True)
class General(Objective):
    """``u = g + weight * phi'(m) * (mean of psi'(x_i) (g_i - g))``, ``m = mean of psi(x_i)``."""

    phi: Callable[[Tensor], Tensor]
    psi: Callable[[Tensor], Tensor]

    def sums(self, samples: int) -> tuple[bool, bool]:
        return False, samples > 1

    def running(self, xs: Scalars) -> tuple[Any, Any]:
        return 1.0, slope("psi", self.psi, xs[-1])[1]

    def mixture(self, xs: Scalars, weight: float, samples: int) -> Mixture:
        found = [slope("psi", self.psi, x) for x in xs]
        mean = sum((value for value, _ in found[1:]), start=found[0][0]) / samples
        scale = weight / samples * slope("phi", self.phi, mean)[1]
        total = sum((d for _, d in found[1:]), start=found[0][1])
        weighted = 0.0 if samples == 1 else scale
        return Mixture(scale * found[-1][1], 1 - scale * total, weighted=weighted)


def _largest(xs: Scalars) -> Tensor:
    """The largest exponent, ``-x / 2``."""
    return torch.stack([-x / 2 for x in xs]).max()


def slope(name: str, function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """A function's value and derivative at a 0-dim tensor.

    Raises:
        TypeError: If it gives something else than a 0-dim tensor.
    """
    with torch.enable_grad():
        at = x.detach().clone().requires_grad_()
        value = function(at)
        if not isinstance(value, Tensor) or value.ndim:
            raise TypeError(f"{name} must give a 0-dim tensor for one, got {type(value).__name__}")
        if not value.requires_grad:  # constant
            return value, torch.zeros_like(x)
        (derivative,) = torch.autograd.grad(value, at)
    return value.detach(), derivative
