"""LightSAM and AdaSAM: methods with an update of their own, in which nothing is bias-corrected."""

from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from fastsam.kernels.layout import Scalar

from .bases import UncorrectedAdagrad, UncorrectedAdaGradNorm, UncorrectedAdam
from .checks import check_common, check_rule
from .optimizer import SharpnessAwareOptimizer
from .rules import LIGHT_ADAGRAD, LIGHT_ADAM, LIGHT_NORM, Ascent

RULES: dict[str, tuple[Ascent, type]] = {
    "adagrad_norm": (LIGHT_NORM, UncorrectedAdaGradNorm),
    "adagrad": (LIGHT_ADAGRAD, UncorrectedAdagrad),
    "adam": (LIGHT_ADAM, UncorrectedAdam),
}


class LightSAM(SharpnessAwareOptimizer):
    r"""Parameter-agnostic SAM: adaptive in the ascent as in the descent.

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

    Nothing is bias-corrected and no eps is added: accumulators start at ``eps ** 2`` and moments at
    0. So ``rho`` acts per coordinate in II and III, :math:`\|e\|` is about
    :math:`\rho \sqrt d` for :math:`d` weights, and is not to be compared with SAM's; and the first
    step of III is :math:`(1-\beta_1)/\sqrt{1-\beta_2} \approx 3.16` times the sign of the gradient.

    An element whose accumulator would not be finite is not perturbed, and its ascent state stays
    (in I that holds for all elements together). An average below the smallest normal float32
    counts as that: a weight that gets no gradient stays where it is.

    Cost: no norm is taken in II and III, so a step is two launches. Bytes per element in float32,
    each number read and written once: I 36 (reduce 4, perturb 16, reduce 4, update 12), II 44
    (perturb 24, update 20), III 60 (perturb 32, update 28). State is in float32 whatever the
    parameter's dtype (float64 for float64): ``eps ** 2`` is 0 in float16. Between the passes both
    the old and the new ascent state are held, so that a failed step changes nothing.

    Args:
        params: Parameters, named parameters or parameter groups, as in ``torch.optim``. Groups may
            set ``lr``, ``rho``, ``betas``, ``eps`` and ``weight_decay`` for themselves.
        lr: Learning rate, at least 0.
        rho: Radius, at least 0; constant, as the scaling adapts it. Where it is 0 the first pass
            still takes place, for the accumulators.
        rule: ``"adam"``, ``"adagrad"`` or ``"adagrad_norm"``. Default ``"adam"``.
        betas: Of III, in [0, 1). Default (0.9, 0.999).
        eps: Square root of where the accumulators start, at least 1e-18. Default 1e-8.
        weight_decay: Decoupled weight decay, at least 0; not in the paper. Default 0.
        backend: As in :class:`SAM`.
        **kwargs: ``renormalize`` and what follows it among the arguments of :class:`SAM`.

    Raises:
        ValueError: If a hyper-parameter is out of range, or ``rule`` or ``backend`` unknown.
        ImportError, RuntimeError: As :class:`SAM`.

    Reference: Cheng, Shen, Sun, Yin, Cao and Chen, "LightSAM: parameter-agnostic sharpness-aware
    minimization", arXiv 2505.24399. The equations of I and II are sure; III was read in a
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
        **kwargs: Any,
    ):
        check_rule(rule, RULES)
        check_common(kwargs, type(self))
        self.rule = rule
        self._ascent, base = RULES[rule]
        super().__init__(
            params, base, rho=rho, backend=backend,
            lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, **kwargs,
        )  # fmt: skip
        if rule == "adagrad_norm":
            self.param_groups[0].setdefault(
                "ascent_squared_norms", self.param_groups[0]["eps"] ** 2
            )

    @property
    def _kept_scalars(self) -> dict[str, Scalar]:
        kept = super()._kept_scalars
        if self.rule == "adagrad_norm":
            kept["ascent_squared_norms"] = Scalar.ASCENT_SQUARED_NORMS
        return kept


class AdaSAM(SharpnessAwareOptimizer):
    r"""SAM's ascent with an AMSGrad update that has no bias correction.

    .. math:: e = \rho\, \frac{g}{\|g\| + 10^{-12}}

    .. math:: m \leftarrow \beta_1 m + (1 - \beta_1)\, \tilde g, \quad
              v \leftarrow \beta_2 v + (1 - \beta_2)\, \tilde g^2, \quad
              \hat v \leftarrow \max(\hat v, v), \quad
              w \leftarrow w - lr\, \frac{m}{\sqrt{\hat v}}

    :math:`g` is the gradient at :math:`w`, :math:`\tilde g` the one at :math:`w + e`.
    :math:`v` and :math:`\hat v` start at ``eps ** 2``, :math:`m` at 0; no eps is added. For SAM on
    ``torch.optim.Adam`` itself, use :class:`SAM` with that base.

    Cost: that of ``SAM`` on ``torch.optim.AdamW(amsgrad=True)``: 56 bytes per element in float32
    (reduce 4, perturb 16, update 36), three launches. The state is in float32 whatever the
    parameter's dtype (float64 for float64).

    Args:
        params: Parameters, named parameters or parameter groups, as in ``torch.optim``.
        lr: Learning rate, at least 0.
        rho: Radius, at least 0.
        betas: Each in [0, 1). Default (0.9, 0.999).
        eps: Square root of where the accumulators start, at least 1e-18. Default 1e-8.
        weight_decay: Decoupled weight decay, at least 0; not in the paper. Default 0.
        backend: As in :class:`SAM`.
        **kwargs: ``renormalize`` and what follows it among the arguments of :class:`SAM`.

    Raises:
        ValueError: If a hyper-parameter is out of range, or ``backend`` unknown.
        ImportError, RuntimeError: As :class:`SAM`.

    Reference: Sun, Shen, Zhong, Ding, Chen, Sun, Li, Sun and Tao, "AdaSAM: boosting sharpness-aware
    minimization with adaptive learning rate and momentum for training deep neural networks", 2023.
    The equations are sure.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor,
        rho: float | Tensor,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        backend: str = "auto",
        **kwargs: Any,
    ):
        check_common(kwargs, type(self))
        super().__init__(
            params, UncorrectedAdam, rho=rho, backend=backend, lr=lr, betas=betas, eps=eps,
            weight_decay=weight_decay, amsgrad=True, **kwargs,
        )  # fmt: skip
