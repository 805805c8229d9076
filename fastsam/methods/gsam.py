"""GSAM: closes the gap between the loss at the perturbed weights and the loss at the weights."""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from fastsam.optimizer import SharpnessAwareOptimizer
from fastsam.step.arguments import Choice, Number
from fastsam.step.rule import Columns, Descent, Group

VARIANTS = ("perturbed", "first")


def _columns(variant: str, group: Group) -> Columns:
    return {"ALPHA": group["alpha"], "FIRST": float(variant == "first")}


def _projection(sums: dict[str, Tensor], onto: str) -> Tensor:
    """What of one gradient is along the other, in units of that; a gradient of zeros has none."""
    return torch.where(sums[onto] > 0, sums["product"] / sums[onto], 0.0)


def _coefficients(state: dict[str, Tensor], sums: dict[str, Tensor], h: Columns) -> tuple[Any, Any]:
    if h["FIRST"]:
        return h["ALPHA"], 1 - h["ALPHA"] * _projection(sums, "first")
    return 1 + h["ALPHA"] * _projection(sums, "second"), -h["ALPHA"]


def surrogate_gap(variant: str) -> Descent:
    """GSAM's descent in one of its two forms."""
    return Descent(
        name="gsam",
        kernel="fastsam.kernels.descent.gsam",
        coefficients=_coefficients,
        sums=("first", "second", "product"),
        columns=partial(_columns, variant),
        arguments={"alpha": Number(tensors=None)},
    )


RULES = {variant: surrogate_gap(variant) for variant in VARIANTS}


class GSAM(SharpnessAwareOptimizer):
    r"""Surrogate gap guided sharpness-aware minimization.

    .. math:: u = \tilde g - \alpha \left(g - \frac{\langle g, \tilde g \rangle}{\|\tilde g\|^2}\,
              \tilde g\right)

    with :class:`SAM`'s perturbation :math:`e`, :math:`g` the gradient at :math:`w` and
    :math:`\tilde g` the one at :math:`w + e`. The term in brackets is the part of :math:`g` that is
    orthogonal to :math:`\tilde g`. A step along it does not change :math:`f(w + e)` and raises
    :math:`f(w)`, so it reduces the gap between the two, which measures the sharpness. ``alpha=0``
    is :class:`SAM`. With ``variant="first"`` the first gradient is kept and the second one
    projected:

    .. math:: u = g + \alpha \left(\tilde g - \frac{\langle g, \tilde g \rangle}{\|g\|^2}\, g\right)

    A projection onto a gradient of zeros counts as 0. Norms and products are over all elements of
    all groups. The first gradient of a parameter that has none counts as zero. If the norm of the
    first gradient is not finite, :math:`u = \tilde g`. With ``renormalize`` :math:`\tilde g` is
    rescaled first; ``max_grad_norm`` bounds the norm of :math:`u`.

    The authors let the radius follow the learning rate, linearly between two bounds:
    :class:`ProportionalRho` does that.

    Cost: that of :class:`SAM`, and a second reduction over both gradients. The first gradient is
    kept until the update: in its own memory if the step sets it to None (``zero_grad=True``, as in
    ``step``), else as a copy. With SGD and momentum 52 bytes per element in float32 (reduce 4,
    perturb 16, reduce 8, update 24), four launches. No state.

    Args:
        params, base_optimizer: As in :class:`SAM`. A base optimizer with an ``alpha`` of its own,
            as RMSprop has, is refused.
        rho: Radius, at least 0. Default 0.05. The authors' of 2022: 0.6 falling to 0.1 for vision
            transformers.
        alpha: :math:`\alpha`, at least 0. Default 0.4; the authors' is 0.6 for vision transformers.
            A group key, with one value for all groups: the first group's.
        variant: ``"perturbed"`` (the default), the first equation; or ``"first"``, the second.
        **kwargs: The other arguments of :class:`SAM`, and the base optimizer's.

    Raises:
        TypeError, ValueError, ImportError, RuntimeError: As :class:`SAM`; ValueError also for an
            ``alpha`` out of range, or one of a group that is not the first group's, and for an
            unknown ``variant``.

    Example:
        >>> optimizer = fastsam.GSAM(model.parameters(), torch.optim.AdamW, alpha=0.6, lr=1e-3)
        >>> loss = optimizer.step(closure)

    Reference: Zhuang, Gong, Yuan, Cui, Adam, Dvornek, Tatikonda, Duncan and Liu, "Surrogate gap
    minimization improves sharpness-aware training", ICLR 2022, arXiv 2203.08065. The equations are
    those of the authors' code.
    """

    descent = RULES["perturbed"]

    def __init__(
        self,
        params: ParamsT,
        base_optimizer: type[Optimizer],
        rho: float | Tensor = 0.05,
        alpha: float = 0.4,
        *,
        variant: str = "perturbed",
        **kwargs: Any,
    ):
        self._variant = Choice(VARIANTS)("variant", variant)
        self.descent = RULES[self._variant]
        super().__init__(params, base_optimizer, rho=rho, own={"alpha": alpha}, **kwargs)

    @property
    def variant(self) -> str:
        """Which gradient is kept, ``"perturbed"`` or ``"first"``."""
        return self._variant
