"""WSAM and GNP: a weighted sum of both gradients."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from fastsam.optimizer import SharpnessAwareOptimizer
from fastsam.step.arguments import FLAG, Number
from fastsam.step.rule import Columns, Descent, Group

GAMMA = {"gamma": Number(high=1.0, tensors=None)}
ALPHA = {"alpha": Number(tensors=None)}


def _alpha(group: Group) -> float:
    """WSAM's weight of the sharpness, from its share."""
    gamma: float = group["gamma"]
    return gamma / (1 - gamma)


def _of_share(group: Group) -> Columns:
    return {"ALPHA": _alpha(group)}


def _of_share_coupled(group: Group) -> Columns:
    return {"ALPHA": _alpha(group), "UNIT": 0.0}


def _needs_rate(group: Mapping[str, Any]) -> None:
    if group.get("lr") is None:
        raise ValueError(
            "lr must be in every group with decouple=True, as the sharpness's gradient is "
            "multiplied by it; a base optimizer without one needs decouple=False"
        )


def _plain(group: Group) -> Columns:
    return {"ALPHA": group["alpha"], "UNIT": 0.0}


def _unit(group: Group) -> Columns:
    return {"ALPHA": group["alpha"], "UNIT": 1.0}


def _decoupled(state: dict[str, Tensor], sums: dict[str, Tensor], h: Columns) -> tuple[Any, ...]:
    return 0.0, 1.0, h["ALPHA"], -h["ALPHA"]


def _weighted(state: dict[str, Tensor], sums: dict[str, Tensor], h: Columns) -> tuple[Any, Any]:
    weight = 1 - h["ALPHA"]
    if h["UNIT"]:
        squared = sums["first"]
        weight = weight * torch.where(squared > 0, squared.rsqrt(), 0.0)
    return h["ALPHA"], weight


DECOUPLED = Descent(
    name="decoupled", kernel="fastsam.kernels.descent.decoupled", coefficients=_decoupled,
    apart=True, columns=_of_share, arguments=GAMMA, check=_needs_rate,
)  # fmt: skip
COUPLED = Descent(
    name="coupled", kernel="fastsam.kernels.descent.weighted", coefficients=_weighted,
    columns=_of_share_coupled, arguments=GAMMA,
)  # fmt: skip
PENALTY = Descent(
    name="penalty", kernel="fastsam.kernels.descent.weighted", coefficients=_weighted,
    columns=_plain, arguments=ALPHA,
)  # fmt: skip
UNIT_PENALTY = Descent(
    name="unit_penalty", kernel="fastsam.kernels.descent.weighted", coefficients=_weighted,
    sums=("first",), columns=_unit, arguments=ALPHA,
)  # fmt: skip


class WSAM(SharpnessAwareOptimizer):
    r"""Weighted sharpness as a regularisation term.

    The objective is :math:`f + \alpha R`, with the sharpness
    :math:`R = \max_{\|e\| \le \rho} f(w + e) - f(w)` and :math:`\alpha = \gamma / (1 - \gamma)`.
    Its gradient is :math:`g + \alpha\,(\tilde g - g)`, with :class:`SAM`'s perturbation :math:`e`.
    ``gamma=0`` is the base optimizer, 0.5 is :class:`SAM` (coupled), and larger values weight the
    sharpness more. By default the two parts are decoupled, as weight decay is in AdamW: the base
    gets :math:`g` for its averages, and the gradient of the sharpness is applied to the weights
    directly.

    .. math:: w \leftarrow \mathrm{base}(w, g) - lr\, \alpha\, (\tilde g - g)

    With ``decouple=False`` the base gets both:

    .. math:: w \leftarrow \mathrm{base}(w, u), \qquad u = \alpha\, \tilde g + (1 - \alpha)\, g

    :math:`lr` is the learning rate of the group. The first gradient of a parameter that has none
    counts as zero. If the norm of the first gradient is not finite, :math:`u = \tilde g` and
    nothing is applied directly. With ``renormalize`` :math:`\tilde g` is rescaled first.
    ``max_grad_norm`` bounds the norm of what the base gets, as in the authors' code: with
    ``decouple=True`` the part of the sharpness is not clipped.

    Cost: that of :class:`SAM`, and the first gradient is kept until the update: in its own memory
    if the step sets it to None (``zero_grad=True``, as in ``step``), else as a copy. The
    coefficients are known after the first pass, so there is no second reduction: with SGD and
    momentum 44 bytes per element in float32 (reduce 4, perturb 16, update 24), three launches. If
    the step needs one for something else (clipping, skipping, ``renormalize``, a loss scale, groups
    with ``perturb=False``), it is 52 bytes in four launches. No state. With ``decouple=True`` an
    unfused base optimizer needs one more tensor per parameter during the step.

    Args:
        params, base_optimizer: As in :class:`SAM`. With ``decouple=True`` the base needs an ``lr``.
        rho: Radius, at least 0. Default 0.05.
        gamma: :math:`\gamma`, in [0, 1). Default 0.9, the authors': :math:`\alpha = 9`. A group
            key, with one value for all groups: the first group's.
        decouple: Whether the gradient of the sharpness bypasses the base. Default True.
        **kwargs: The other arguments of :class:`SAM`, and the base optimizer's.

    Raises:
        TypeError, ValueError, ImportError, RuntimeError: As :class:`SAM`; ValueError also for a
            ``gamma`` out of range, or one of a group that is not the first group's, and for a
            base without ``lr``.

    Example:
        >>> optimizer = fastsam.WSAM(model.parameters(), torch.optim.SGD, gamma=0.8, lr=0.1)
        >>> loss = optimizer.step(closure)

    Reference: Yue, Jiang, Ye, Gao, Liu and Zhang, "Sharpness-aware minimization revisited: weighted
    sharpness as a regularization term", KDD 2023, arXiv 2305.15817. The equations are those of the
    authors' code.
    """

    descent = DECOUPLED

    def __init__(
        self,
        params: ParamsT,
        base_optimizer: type[Optimizer],
        rho: float | Tensor = 0.05,
        gamma: float = 0.9,
        decouple: bool = True,
        **kwargs: Any,
    ):
        self._decouple = bool(FLAG("decouple", decouple))
        self.descent = DECOUPLED if self._decouple else COUPLED
        super().__init__(params, base_optimizer, rho=rho, own={"gamma": gamma}, **kwargs)

    @property
    def decouple(self) -> bool:
        """Whether the sharpness's gradient goes past the base."""
        return self._decouple


class GNP(SharpnessAwareOptimizer):
    r"""Penalises the norm of the gradient.

    .. math:: u = (1 - \alpha)\, g + \alpha\, \tilde g

    with :class:`SAM`'s perturbation :math:`e`. To first order that is the gradient of
    :math:`f + \lambda \|\nabla f\|`, with :math:`\lambda = \alpha \rho`. ``alpha=0`` is the base
    optimizer, 1 is :class:`SAM`. With ``unit=True``, the default of the authors' code, only the
    direction of the first gradient is used:

    .. math:: u = (1 - \alpha)\, \frac{g}{\|g\|} + \alpha\, \tilde g

    A gradient of zeros has no direction and adds nothing. The first gradient of a parameter that
    has none counts as zero. If the norm of the first gradient is not finite, :math:`u = \tilde g`.
    With ``renormalize`` :math:`\tilde g` is rescaled first; ``max_grad_norm`` bounds the norm of
    :math:`u`.

    Cost: that of :class:`WSAM`: with SGD and momentum 44 bytes per element in float32, three
    launches. ``unit=True`` needs a second reduction: 52 bytes, four launches. No state.

    Args:
        params, base_optimizer: As in :class:`SAM`. A base optimizer with an ``alpha`` of its own,
            as RMSprop has, is refused.
        rho: Radius, at least 0. Default 0.05.
        alpha: :math:`\alpha`, at least 0. Default 0.8. A group key, with one value for all groups:
            the first group's.
        unit: Whether the first gradient is divided by its norm. Default False: the paper's
            equation.
        **kwargs: The other arguments of :class:`SAM`, and the base optimizer's.

    Raises:
        TypeError, ValueError, ImportError, RuntimeError: As :class:`SAM`; ValueError also for an
            ``alpha`` out of range, or one of a group that is not the first group's.

    Example:
        >>> optimizer = fastsam.GNP(model.parameters(), torch.optim.SGD, alpha=0.8, lr=0.1)
        >>> loss = optimizer.step(closure)

    Reference: Zhao, Zhang and Hu, "Penalizing gradient norm for efficiently improving
    generalization in deep learning", ICML 2022, arXiv 2202.03599. The second equation is that of
    the authors' code.
    """

    descent = PENALTY

    def __init__(
        self,
        params: ParamsT,
        base_optimizer: type[Optimizer],
        rho: float | Tensor = 0.05,
        alpha: float = 0.8,
        *,
        unit: bool = False,
        **kwargs: Any,
    ):
        self._unit = bool(FLAG("unit", unit))
        self.descent = UNIT_PENALTY if self._unit else PENALTY
        super().__init__(params, base_optimizer, rho=rho, own={"alpha": alpha}, **kwargs)

    @property
    def unit(self) -> bool:
        """Whether the first gradient is divided by its norm."""
        return self._unit
