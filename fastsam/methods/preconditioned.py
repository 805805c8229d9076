"""Preconditioned SAM: perturbations along the gradient times a diagonal."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from fastsam.arithmetic import EPS, gives_direction, where
from fastsam.optimizer import SharpnessAwareOptimizer
from fastsam.step.arguments import Choice, Number, refuse
from fastsam.step.rule import Ascent, Columns, Group
from fastsam.step.spec import is_perturbed

from .functional import SECOND_MOMENT

FORMS = ("objective", "constraint")
NAMES = ("variance", "second_moment")
PAST = 0.9  # weight of the past in the average of squared norms
BETA, DAMPING = 0.9, 0.1

#: A function of the gradient and of the base's state of a parameter, to the diagonal.
Preconditioner = Callable[[Tensor, dict[str, Any]], Tensor]


def _radius(rho: Any, norm: Any, total: Any, h: Columns) -> Any:
    return where(gives_direction(norm), rho / (norm + EPS))


# --- a running variance ---


def _columns(group: Group, lam: float) -> Columns:
    """``lam`` is the number of elements."""
    beta = group["beta"]
    return {"DAMPING": group["damping"] / lam, "BETA": beta, "ONE_MINUS_BETA": 1 - beta}


def _states(group: Group) -> dict[str, float]:
    return {"ascent_variance": 0.0, "ascent_mean": float("nan")}  # NaN: it has not begun


def _advance(g: Tensor, state: dict[str, Tensor], h: Columns) -> dict[str, Tensor]:
    mean, begins = state["ascent_mean"], state["ascent_mean"].isnan()
    change = torch.where(begins, 0.0, g - mean)
    average = h["BETA"] * mean + h["ONE_MINUS_BETA"] * g
    variance = h["BETA"] * state["ascent_variance"] + h["ONE_MINUS_BETA"] * change * change
    return {"ascent_variance": variance, "ascent_mean": torch.where(begins, g, average)}


def _weight(g: Tensor, state: dict[str, Tensor], h: Columns) -> Tensor:
    """``D``, in [0, 1], from the variance and the average of before this gradient."""
    floor = (state["accumulated"] * h["DAMPING"]).to(g.dtype)
    return torch.where(floor > 0, floor / (state["ascent_variance"] + floor), 1.0)


def _direction(g: Tensor, state: dict[str, Tensor], h: Columns) -> Tensor:
    return _weight(g, state, h) * g


def _direction_twice(g: Tensor, state: dict[str, Tensor], h: Columns) -> Tensor:
    weight = _weight(g, state, h)
    return weight * (weight * g)


def _usable(state: dict[str, Tensor], norm: Tensor) -> Tensor:
    """A gradient that is not finite would stay in the averages, and so would too large a square."""
    return norm.isfinite() & state["ascent_variance"].isfinite()


def _accumulate(total: Tensor, norm: Tensor) -> Tensor:
    return torch.where(norm.isfinite(), PAST * total + (1 - PAST) * norm.square(), total)


def _start(group: Group) -> float:
    return 0.0


VARIANCE = Ascent(
    name="variance", kernel="fastsam.kernels.ascent.variance", advance=_advance,
    direction=_direction, from_old=True, direction_states=1, radius=_radius, usable=_usable,
    accumulate=_accumulate, accumulator=_start, sees_accumulator=True, columns=_columns,
    states=_states, norm="direction",
    arguments={
        "beta": Number(high=1.0, tensors=None), "damping": Number(with_low=False, tensors=None),
    },
)  # fmt: skip
VARIANCE_CONSTRAINT = replace(
    VARIANCE, kernel="fastsam.kernels.ascent.variance_constraint",
    direction=_direction_twice, measured=_direction,
)  # fmt: skip


# --- the base's second moment ---


def _second_moment_twice(g: Tensor, state: dict[str, Tensor], h: Columns) -> Tensor:
    return SECOND_MOMENT.direction(SECOND_MOMENT.direction(g, state, h), state, h)


SECOND_MOMENT_CONSTRAINT = replace(
    SECOND_MOMENT, kernel="fastsam.kernels.ascent.second_moment_constraint",
    direction=_second_moment_twice, measured=SECOND_MOMENT.direction,
)  # fmt: skip


# --- a function of the user's ---


def _by_diagonal(g: Tensor, state: dict[str, Tensor], h: Columns) -> Tensor:
    return state["preconditioner"] * g


def _by_diagonal_twice(g: Tensor, state: dict[str, Tensor], h: Columns) -> Tensor:
    return state["preconditioner"] * (state["preconditioner"] * g)


def _ones(g: Tensor, state: dict[str, Any]) -> Tensor:
    """In the place of a user's function."""
    return torch.ones_like(g)


DIAGONAL = Ascent(
    name="diagonal", kernel="fastsam.kernels.ascent.diagonal", direction=_by_diagonal,
    radius=_radius, base_state="preconditioner", computes=_ones, norm="direction",
)  # fmt: skip
DIAGONAL_CONSTRAINT = replace(
    DIAGONAL, kernel="fastsam.kernels.ascent.diagonal_constraint",
    direction=_by_diagonal_twice, measured=_by_diagonal,
)  # fmt: skip

RULES = {
    ("variance", "objective"): VARIANCE,
    ("variance", "constraint"): VARIANCE_CONSTRAINT,
    ("second_moment", "objective"): SECOND_MOMENT,
    ("second_moment", "constraint"): SECOND_MOMENT_CONSTRAINT,
}


def _rule(preconditioner: Any, form: str) -> Ascent:
    if isinstance(preconditioner, str) and preconditioner in NAMES:
        return RULES[preconditioner, form]
    if not callable(preconditioner):
        allowed = "'variance', 'second_moment' or a function of (gradient, state)"
        raise refuse("preconditioner", allowed, preconditioner)
    rule = DIAGONAL if form == "objective" else DIAGONAL_CONSTRAINT
    return replace(rule, computes=preconditioner)


class PreconditionedSAM(SharpnessAwareOptimizer):
    r"""SAM with a preconditioner (preSAM); by default a reconstruction of infoSAM.

    A diagonal :math:`D` weights the gradient, in the objective of the inner maximisation
    (:math:`\max \langle D g, e \rangle` with :math:`\|e\| \le \rho`) or in its constraint
    (:math:`\max \langle g, e \rangle` with :math:`\|D^{-1} e\| \le \rho`):

    .. math:: e = \rho\, \frac{D g}{\|D g\| + 10^{-12}} \quad\text{(objective)}, \qquad
              e = \rho\, \frac{D^2 g}{\|D g\| + 10^{-12}} \quad\text{(constraint)}

    In the objective form the scale of :math:`D` does not matter and the length of :math:`e` is
    :math:`\rho`. In the constraint form the scale matters. ASAM is the constraint form with
    :math:`D = |w| + \eta`.

    - ``preconditioner="variance"``: :math:`D` is small where the gradient is noisy.

      .. math:: D = \frac{\delta\,\bar v}{s + \delta\,\bar v}, \qquad
                s \leftarrow \beta s + (1 - \beta)(g - m)^2, \quad
                m \leftarrow \beta m + (1 - \beta)\, g

      :math:`\bar v` is an average (0.9 of the past) of the mean square of the gradients' elements.
      It makes the damping :math:`\delta` relative to the scale of :math:`s`, so :math:`D` is near 1
      in the first steps. :math:`D` uses the averages of before this step, and is 1 in the first two
      steps. :math:`m` starts at a parameter's first gradient, :math:`s` and :math:`\bar v` at 0. In
      the objective form :math:`e \propto g / (s + \delta \bar v)`.
    - ``"second_moment"``: :math:`D = 1 / (\sqrt v + 10^{-8})` with the base's second moment
      :math:`v` (``exp_avg_sq`` of Adam and AdamW) after the last step, and 1 for parameters that
      have none. The constraint form is Fisher-SAM with :math:`v` as the Fisher information. There
      ``rho`` has to be smaller by about the size of :math:`\sqrt v`, and :math:`v` must not be in
      float16, where it becomes zero (``master_weights`` keeps it in float32).
    - A function: :math:`D` is the result of ``preconditioner(g, state)`` for each parameter.

    infoSAM adjusts the gradient by estimates of its noise. We could not read how. The variance, its
    damping, the objective form and all defaults are ours, and we do not claim the paper's results
    for them.

    In ``adaptive`` groups, which are not in the paper, :math:`D g` becomes :math:`T^2 D g` and its
    norm :math:`\|T D g\|`, as in :class:`SAM` (:math:`D^2 g` likewise). :math:`\bar v` is then the
    average for :math:`T g`, so :math:`\delta` has to be larger.

    A first gradient whose norm is not finite perturbs nothing and does not change :math:`m`,
    :math:`s` and :math:`\bar v`. An element whose :math:`s` would not be finite is not perturbed,
    and its :math:`m` and :math:`s` do not change.

    The function is called in torch, on every backend, once a step for each perturbed parameter.
    :math:`g` is the gradient of the minimised objective, in float32 (float64 for float64
    parameters) and without a loss scale. ``state`` is the base optimizer's state of the parameter,
    a dict that is empty before its first step. The function must not change them, and returns a
    tensor of the shape of :math:`g`, or of no dimension. Under FSDP2 and tensor parallelism it gets
    shards. To pickle or copy the optimizer it has to be a named function; state dicts do not
    contain it.

    Cost: that of :class:`SAM`, in three launches. ``"variance"``: two tensors of state per
    parameter (``ascent_variance`` and ``ascent_mean``, in float32, or in float64 for float64
    parameters), 60 bytes per element with SGD and momentum, as the norm reads :math:`s` alone; and
    one number on the device is copied. ``"second_moment"``: no state; 56 bytes with AdamW (48 are
    SAM's). A function: one tensor of memory per parameter, 48 bytes with SGD and momentum, and what
    the function and the copy of its result take.

    Args:
        params, base_optimizer: As in :class:`SAM`; with ``"second_moment"`` the base is Adam, AdamW
            or another that keeps ``exp_avg_sq``. Groups may set ``beta`` and ``damping`` for
            themselves, too.
        rho: Radius, at least 0. Default 0.05. With 0 and ``"variance"`` the first pass still runs,
            for the averages.
        preconditioner: ``"variance"`` (the default), ``"second_moment"`` or a function.
        form: ``"objective"`` (the default) or ``"constraint"``.
        beta: :math:`\beta`, in [0, 1), of ``"variance"``. Default 0.9.
        damping: :math:`\delta`, above 0, of ``"variance"``: with smaller values noisy elements are
            perturbed less. Default 0.1.
        **kwargs: The other arguments of :class:`SAM`, and the base optimizer's.

    Raises:
        TypeError, ValueError, ImportError, RuntimeError: As :class:`SAM`; TypeError also for
            ``"second_moment"`` with a base that keeps no ``exp_avg_sq``; ValueError for an unknown
            ``preconditioner`` or ``form``, and for a ``beta`` or ``damping`` out of range, or that
            is given and not used. In a step TypeError or ValueError if the function gives
            something else; nothing has changed then. :class:`LETS` needs ``hessian="difference"``.

    Example:
        >>> optimizer = fastsam.PreconditionedSAM(
        ...     model.parameters(), torch.optim.AdamW, preconditioner="second_moment", lr=1e-3
        ... )
        >>> loss = optimizer.step(closure)

    Reference: Zhang, Li and Giannakis, "Preconditioned sharpness-aware minimization: unifying
    analysis and a novel learning algorithm", ICASSP 2025, arXiv 2501.06603. Both forms follow from
    the definition; see above for the rest.
    """

    _TRANSIENT: tuple[str, ...] = (*SharpnessAwareOptimizer._TRANSIENT, "_counted")

    def __init__(
        self,
        params: ParamsT,
        base_optimizer: type[Optimizer],
        rho: float | Tensor = 0.05,
        preconditioner: str | Preconditioner = "variance",
        form: str = "objective",
        *,
        beta: float = BETA,
        damping: float = DAMPING,
        **kwargs: Any,
    ):
        self._form = Choice(FORMS)("form", form)
        self._preconditioner = preconditioner
        self.ascent = _rule(preconditioner, form)
        own = {"beta": beta, "damping": damping}
        if not self._has_variance:
            for name, default in (("beta", BETA), ("damping", DAMPING)):
                if own[name] != default:
                    raise ValueError(
                        f"{name} must be left out with preconditioner={preconditioner!r}, which "
                        f"has none, got {own[name]!r}"
                    )
            own = {}
        super().__init__(params, base_optimizer, rho=rho, own=own, **kwargs)

    def _start(self) -> None:
        super()._start()
        self._counted: tuple[Any, float] = (None, 1.0)

    @property
    def preconditioner(self) -> str | Preconditioner:
        """``"variance"``, ``"second_moment"``, or the function."""
        return self._preconditioner

    @property
    def form(self) -> str:
        """Where the preconditioner is used, ``"objective"`` or ``"constraint"``."""
        return self._form

    @property
    def _has_variance(self) -> bool:
        return self._preconditioner == "variance"

    def _next_lam(self) -> float:
        """Of ``"variance"`` the number of perturbed elements, always as the same object."""
        if not self._has_variance:
            return super()._next_lam()
        key = [(is_perturbed(group), len(group["params"])) for group in self.param_groups]
        if self._counted[0] != key:
            perturbed = [group["params"] for group in self.param_groups if is_perturbed(group)]
            size = sum(param.numel() for params in perturbed for param in params)
            self._counted = key, float(max(size, 1))
        return self._counted[1]
