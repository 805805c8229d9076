"""LightSAM: adaptive step sizes in the ascent and in the descent, in three variants."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from fastsam.arithmetic import over_root, where
from fastsam.bases.uncorrected import (
    UncorrectedAdagrad,
    UncorrectedAdaGradNorm,
    UncorrectedAdam,
)
from fastsam.optimizer import SharpnessAwareOptimizer
from fastsam.step.arguments import Choice
from fastsam.step.checks import check_common
from fastsam.step.rule import Ascent, Columns, Group

# --- I: a sum of squared norms ---


def _norm_radius(rho: Any, norm: Any, total: Any, h: Columns) -> Any:
    return where((abs(norm) < math.inf) & (total > 0), rho / (total + (total == 0)) ** 0.5)


def _norm_accumulate(total: Tensor, norm: Tensor) -> Tensor:
    return total + torch.where(norm.isfinite(), norm.square(), 0.0)


def _norm_start(group: Group) -> float:
    start: float = group["eps"] ** 2
    return start


# --- II: a sum of squares, element by element ---


def _constant_radius(rho: Any, norm: Any, total: Any, h: Columns) -> Any:
    return torch.ones_like(norm) * rho if isinstance(norm, Tensor) else rho


def _sum_states(group: Group) -> dict[str, float]:
    return {"ascent_sum": group["eps"] ** 2}


def _sum_advance(g: Tensor, state: dict[str, Tensor], h: Columns) -> dict[str, Tensor]:
    return {"ascent_sum": state["ascent_sum"] + g * g}


def _sum_direction(g: Tensor, state: dict[str, Tensor], h: Columns) -> Tensor:
    return over_root(g, state["ascent_sum"])


def _sum_usable(state: dict[str, Tensor], norm: Tensor) -> Tensor:
    return state["ascent_sum"].isfinite()


# --- III: averages of gradients and of squares ---


def _adam_columns(group: Group, lam: float) -> Columns:
    beta1, beta2 = group["betas"]
    return {"ONE_MINUS_BETA1": 1 - beta1, "BETA2": beta2, "ONE_MINUS_BETA2": 1 - beta2}


def _adam_states(group: Group) -> dict[str, float]:
    return {"ascent_exp_avg": 0.0, "ascent_exp_avg_sq": group["eps"] ** 2}


def _adam_advance(g: Tensor, state: dict[str, Tensor], h: Columns) -> dict[str, Tensor]:
    old, old_sq = state["ascent_exp_avg"], state["ascent_exp_avg_sq"]
    exp_avg = old + h["ONE_MINUS_BETA1"] * (g - old)
    exp_avg_sq = h["BETA2"] * old_sq + h["ONE_MINUS_BETA2"] * g * g
    return {"ascent_exp_avg": exp_avg, "ascent_exp_avg_sq": exp_avg_sq}


def _adam_direction(g: Tensor, state: dict[str, Tensor], h: Columns) -> Tensor:
    return over_root(state["ascent_exp_avg"], state["ascent_exp_avg_sq"])


def _adam_usable(state: dict[str, Tensor], norm: Tensor) -> Tensor:
    return state["ascent_exp_avg_sq"].isfinite()


LIGHT_NORM = Ascent(
    name="adagrad_norm",
    kernel="fastsam.kernels.ascent.adagrad_norm",
    radius=_norm_radius,
    accumulate=_norm_accumulate,
    accumulator=_norm_start,
    scales=False,
    eager="fastsam.backends.eager.ascents:along_gradient",
)
LIGHT_ADAGRAD = Ascent(
    name="adagrad",
    kernel="fastsam.kernels.ascent.adagrad",
    advance=_sum_advance,
    direction=_sum_direction,
    radius=_constant_radius,
    usable=_sum_usable,
    states=_sum_states,
    norm=None,
    scales=False,
    eager="fastsam.backends.eager.ascents:by_adagrad",
)
LIGHT_ADAM = Ascent(
    name="adam",
    kernel="fastsam.kernels.ascent.adam",
    advance=_adam_advance,
    direction=_adam_direction,
    radius=_constant_radius,
    usable=_adam_usable,
    columns=_adam_columns,
    states=_adam_states,
    norm=None,
    scales=False,
    eager="fastsam.backends.eager.ascents:by_adam",
)
RULES: dict[str, tuple[Ascent, type]] = {
    "adagrad_norm": (LIGHT_NORM, UncorrectedAdaGradNorm),
    "adagrad": (LIGHT_ADAGRAD, UncorrectedAdagrad),
    "adam": (LIGHT_ADAM, UncorrectedAdam),
}


class LightSAM(SharpnessAwareOptimizer):
    r"""Parameter-agnostic SAM: adaptive step sizes in the ascent and in the descent.

    :math:`g` is the gradient at :math:`w`, :math:`\tilde g` the one at :math:`w + e`; squares,
    roots and quotients of tensors are element-wise.

    ``rule="adagrad_norm"`` (LightSAM I; two scalars of state for the whole model):

    .. math:: a \leftarrow a + \|g\|^2, \quad e = \rho\, \frac{g}{\sqrt a}, \qquad
              b \leftarrow b + \|\tilde g\|^2, \quad w \leftarrow w - lr\, \frac{\tilde g}{\sqrt b}

    ``rule="adagrad"`` (II; two tensors per parameter), element-wise:

    .. math:: a \leftarrow a + g^2, \quad e = \rho\, \frac{g}{\sqrt a}, \qquad
              b \leftarrow b + \tilde g^2, \quad w \leftarrow w - lr\, \frac{\tilde g}{\sqrt b}

    ``rule="adam"`` (III, the default; four tensors), element-wise:

    .. math:: r \leftarrow \beta_1 r + (1 - \beta_1)\, g, \quad
              a \leftarrow \beta_2 a + (1 - \beta_2)\, g^2, \quad e = \rho\, \frac{r}{\sqrt a}

    .. math:: m \leftarrow \beta_1 m + (1 - \beta_1)\, \tilde g, \quad
              v \leftarrow \beta_2 v + (1 - \beta_2)\, \tilde g^2, \quad
              w \leftarrow w - lr\, \frac{m}{\sqrt v}

    There is no bias correction and no eps is added: accumulators start at ``eps ** 2`` and moments
    at 0. In II and III ``rho`` acts on each coordinate, so :math:`\|e\|` is about
    :math:`\rho \sqrt d` for :math:`d` weights and cannot be compared with SAM's. The first step of
    III is :math:`(1-\beta_1)/\sqrt{1-\beta_2} \approx 3.16` times the sign of the gradient.

    An element whose accumulator would not be finite is not perturbed, and its ascent state does not
    change (in I the same holds for all elements together). Averages are at least the smallest
    normal float32, so a weight that gets no gradient does not move.

    Cost: no norm is taken in II and III, so a step is two launches. Bytes per element in float32,
    each number read and written once: I 36 (reduce 4, perturb 16, reduce 4, update 12), II 44
    (perturb 24, update 20), III 60 (perturb 32, update 28). State is in float32 whatever the
    parameter's dtype (float64 for float64): ``eps ** 2`` is 0 in float16. Between the passes both
    the old and the new ascent state are held, so that a failed step changes nothing; the memory for
    that is kept from step to step.

    Args:
        params: Parameters, named parameters or parameter groups, as in :mod:`torch.optim`. Groups
            may set ``lr``, ``rho``, ``betas``, ``eps`` and ``weight_decay`` for themselves.
        lr: Learning rate, at least 0.
        rho: Radius, at least 0; keep it constant, as the scaling adapts it. With 0 the first pass
            still runs, for the accumulators.
        rule: ``"adam"``, ``"adagrad"`` or ``"adagrad_norm"``. Default ``"adam"``.
        betas: Of III, in [0, 1). Default (0.9, 0.999).
        eps: Square root of where the accumulators start, at least 1e-18. Default 1e-8.
        weight_decay: Decoupled weight decay, at least 0; not in the paper. Default 0.
        backend: As in :class:`SAM`.
        maximize: Maximize the objective, as in :mod:`torch.optim`. Default False.
        **kwargs: ``renormalize`` and what follows it among the arguments of :class:`SAM`.

    Raises:
        ValueError: If a hyper-parameter is out of range, or ``rule`` or ``backend`` unknown.
        ImportError, RuntimeError: As :class:`SAM`.

    Example:
        >>> optimizer = fastsam.LightSAM(model.parameters(), lr=1e-3, rho=1e-3, rule="adam")
        >>> loss = optimizer.step(closure)

    Reference: Cheng, Shen, Sun, Yin, Cao and Chen, "LightSAM: parameter-agnostic sharpness-aware
    minimization", arXiv 2505.24399. The equations of I and II are the paper's; III is from a
    re-implementation by the authors of Unified SAM.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor,
        rho: float | Tensor,
        rule: str = "adam",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        backend: str = "auto",
        maximize: bool = False,
        **kwargs: Any,
    ):
        self._rule = Choice(tuple(RULES))("rule", rule)
        check_common(kwargs, type(self))
        self.ascent, base = RULES[rule]
        super().__init__(
            params, base, rho=rho, backend=backend,
            lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, maximize=maximize,
            **kwargs,
        )  # fmt: skip

    @property
    def rule(self) -> str:
        """Which of the three it is."""
        return self._rule
