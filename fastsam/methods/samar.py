"""SAMAR: SAM as a regulariser, with a weight that follows the sharpness."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from fastsam.kernels import table
from fastsam.optimizer import SharpnessAwareOptimizer
from fastsam.step.arguments import Number, shown
from fastsam.step.rule import Columns, Descent, Group

from .ratio import SharpnessRatio, SharpnessTrend

#: The next lam from lam, the sharpness and the one before.
LamRule = Callable[[Tensor, Tensor, Tensor], Any]
#: What the kernel's columns hold where another rule runs on the host.
UNUSED = SharpnessRatio()


def _columns(rule: LamRule, group: Group) -> Columns:
    ratio = rule if isinstance(rule, SharpnessRatio) else UNUSED
    return {
        "RATIO": ratio.c, "LAM_MIN": ratio.lam_min, "LAM_MAX": ratio.lam_max,
        "SMOOTHING": ratio.smoothing,
    }  # fmt: skip


def _coefficients(
    state: dict[str, Tensor], sums: dict[str, Tensor], h: Columns
) -> tuple[Tensor, Tensor]:
    return state["lam"], 1 - state["lam"]


def _adapt(
    rule: LamRule, state: dict[str, Tensor], sharpness: Tensor, h: Columns
) -> dict[str, Tensor]:
    """lam stays at the first measurement, and where the rule's answer is not finite."""
    lam, old = state["lam"], state["sharpness"]
    known = ~old.isnan()  # NaN before the first measurement
    if isinstance(rule, SharpnessRatio):
        smoothed = rule.smoothing * old + (1 - rule.smoothing) * sharpness
        sharpness = torch.where(known, smoothed, sharpness)
    adapted = rule(lam, sharpness, old)
    if not isinstance(adapted, Tensor):  # filled in: a copy from the host would wait
        if table.is_capturing(lam.device):
            raise RuntimeError("rule must give a tensor to be captured in a CUDA graph")
        adapted = torch.full_like(lam, adapted)
    usable = known & adapted.isfinite()
    return {"lam": torch.where(usable, adapted.to(lam), lam), "sharpness": sharpness}


def _trend_columns(rule: SharpnessTrend, lam: float, group: Group) -> Columns:
    return {"LAM": lam, "RATIO": rule.c, "FAST": rule.fast, "SLOW": rule.slow}


def _averaged(old: Tensor, sharpness: Tensor, decay: float) -> Tensor:
    """An average with one value more; NaN before the first."""
    return torch.where(old.isnan(), sharpness, decay * old + (1 - decay) * sharpness)


def _follow(
    rule: SharpnessTrend, lam: float, state: dict[str, Tensor], sharpness: Tensor, h: Columns
) -> dict[str, Tensor]:
    """lam stays at the first measurement, which both averages start at."""
    fast = _averaged(state["sharpness"], sharpness, rule.fast)
    slow = _averaged(state["slow_sharpness"], sharpness, rule.slow)
    adapted = rule(torch.full_like(fast, lam), fast, slow)
    known = ~state["slow_sharpness"].isnan()
    adapted = torch.where(known & adapted.isfinite(), adapted, state["lam"])
    return {"lam": adapted, "sharpness": fast, "slow_sharpness": slow}


def mixture(rule: LamRule, lam: float) -> Descent:
    """SAMAR's descent with this rule, and lam at first."""
    if isinstance(rule, SharpnessTrend):
        return Descent(
            name="trend",
            kernel="fastsam.kernels.descent.trend",
            coefficients=_coefficients,
            sums=("first", "second", "product", "sharpness"),
            columns=partial(_trend_columns, rule, float(lam)),
            scalars={"lam": float(lam), "sharpness": math.nan, "slow_sharpness": math.nan},
            least={"lam": 0.0} if type(rule) is SharpnessTrend else {},
            adapt=partial(_follow, rule, float(lam)),
            adapts_on_host=type(rule) is not SharpnessTrend,
        )
    return Descent(
        name="mix",
        kernel="fastsam.kernels.descent.mix",
        coefficients=_coefficients,
        sums=("first", "second", "product", "sharpness"),
        columns=partial(_columns, rule),
        scalars={"lam": float(lam), "sharpness": math.nan},
        least={"lam": 0.0} if type(rule) is SharpnessRatio else {},
        adapt=partial(_adapt, rule),
        adapts_on_host=type(rule) is not SharpnessRatio,
    )


#: With SAMAR's own rules; the first is the default.
MIX, TREND = mixture(SharpnessRatio(), 1.0), mixture(SharpnessTrend(), 1.0)


class SAMAR(SharpnessAwareOptimizer):
    r"""SAM with adaptive regularisation: both passes' gradients, mixed.

    .. math:: u = (1 - \lambda_k)\, g + \lambda_k\, \tilde g, \qquad
              \lambda_{k+1} = \mathrm{rule}(\lambda_k, s_k, s_{k-1}), \qquad
              s_k = \tfrac12 \langle g + \tilde g, e \rangle

    with :math:`g` the gradient at :math:`w`, :math:`\tilde g` the one at :math:`w + e` and
    :class:`SAM`'s perturbation :math:`e`. That is the gradient of
    :math:`f + \lambda R, R = \max_{\|e\| \le \rho} f(w + e) - f(w)`; :math:`\lambda = 0` is the
    base optimizer, 1 is SAM, more than 1 goes beyond it. :math:`s_k` is the sharpness
    :math:`f(w + e) - f(w)` by the trapezoid rule: equal to it to second order, at no extra pass.

    What is the paper's and what is ours: the objective, and that :math:`\lambda` adapts by the
    ratio of successive sharpness values, are from the paper's published description. Its formulas
    and constants could not be read, so the measurement of :math:`s_k`, :class:`SharpnessRatio` and
    :class:`SharpnessTrend` are our readings, and every constant is open. ``rule`` may be replaced.

    A parameter without a first gradient counts as having a zero one. Where the first gradient's
    norm is not finite, :math:`u = \tilde g`. A step in which no sharpness could be measured, or in
    which nothing was perturbed, leaves :math:`\lambda` as it is. With ``renormalize``
    :math:`\tilde g` is rescaled before it is mixed; ``max_grad_norm`` bounds the norm of :math:`u`.

    Cost: that of :class:`SAM`, and a second reduction over both gradients; the first is kept until
    the update, in its own memory where the step sets it to None (``zero_grad=True``, as in
    ``step``) and no other code holds it, else as a copy, whose memory is kept from step to step.
    With SGD and momentum 52 bytes per element in float32 (reduce 4, perturb 16, reduce 8, update
    24), four launches, with either rule. :math:`\lambda` and :math:`s_{k-1}` stay on the device;
    they are saved with the state, and are in ``kept["lam"]`` and ``kept["sharpness"]``. With
    :class:`SharpnessTrend` the latter is the fast average and ``kept["slow_sharpness"]`` the slow
    one; a state dict of another rule has none, and loading that leaves it as it is. ``metrics`` has
    the lam of the last step and the sharpness that it measured.

    Args:
        params, base_optimizer: As in :class:`SAM`.
        rho: Radius, at least 0. Default 0.05.
        lam: :math:`\lambda_0`, at least 0. Default 1.
        rule: A :class:`SharpnessRatio` or :class:`SharpnessTrend`, whose equations run inside the
            reduction, or any callable that takes :math:`\lambda_k`, :math:`s_k` and
            :math:`s_{k-1}` as 0-dim tensors on the device and gives the next :math:`\lambda`. At
            the first measurement :math:`s_{k-1}` is NaN. :math:`\lambda` then stays as it is, and
            so it does if the result is not finite. State of a callable's own is not saved. Default
            ``SharpnessRatio()``.
        **kwargs: The other arguments of :class:`SAM`, and the base optimizer's.

    Raises:
        TypeError, ValueError, ImportError, RuntimeError: As :class:`SAM`; TypeError also for a
            ``rule`` that cannot be called, ValueError for a ``lam`` out of range.

    Example:
        >>> rule = fastsam.SharpnessRatio(c=1.2, smoothing=0.9)
        >>> optimizer = fastsam.SAMAR(model.parameters(), torch.optim.SGD, rule=rule, lr=0.1)
        >>> loss = optimizer.step(closure)

    Reference: Zou, Deng and Sun, "Sharpness-aware minimization with adaptive regularization for
    training deep neural networks", 2024, arXiv 2412.16854.
    """

    def __init__(
        self,
        params: ParamsT,
        base_optimizer: type[Optimizer],
        rho: float | Tensor = 0.05,
        lam: float = 1.0,
        rule: LamRule | None = None,
        **kwargs: Any,
    ):
        lam = Number(tensors=None)("lam", lam)
        if not (rule is None or callable(rule)):
            raise TypeError(
                "rule must be a SharpnessRatio, a SharpnessTrend or another callable, got "
                f"{shown(rule)}"
            )
        self._rule = SharpnessRatio() if rule is None else rule
        self.descent = mixture(self._rule, lam)
        super().__init__(params, base_optimizer, rho=rho, **kwargs)

    @property
    def rule(self) -> LamRule:
        """What adapts lam."""
        return self._rule
