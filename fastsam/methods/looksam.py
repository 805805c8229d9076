"""LookSAM: every k-th step is SAM's, and the others go on along what it found."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from fastsam.optimizer import SharpnessAwareOptimizer
from fastsam.step.arguments import Integer, Number
from fastsam.step.flight import InFlight
from fastsam.step.recording import Recording
from fastsam.step.rule import Columns, Descent, Group
from fastsam.step.spec import is_perturbed
from fastsam.unified import UNIFIED

ARGUMENTS = {"alpha": Number(tensors=None)}


def _columns(group: Group) -> Columns:
    return {"ALPHA": group["alpha"]}


def _kept(state: dict[str, Tensor], sums: dict[str, Tensor], h: Columns) -> tuple[Any, ...]:
    squared = sums["first"]
    along = torch.where(squared > 0, sums["product"] / squared, 0.0)
    return 1.0, 0.0, 1.0, -along


def _reused(state: dict[str, Tensor], sums: dict[str, Tensor], h: Columns) -> tuple[Any, Any]:
    squared = sums["first"]
    return 1.0, torch.where(squared > 0, h["ALPHA"] * (sums["second"] / squared).sqrt(), 0.0)


#: SAM's, and the state that the update leaves.
KEEPING = replace(UNIFIED, keeps="ascent_orthogonal")
KEPT = Descent(
    name="looksam", kernel="fastsam.kernels.descent.looksam", coefficients=_kept,
    sums=("first", "product"), keeps=True, arguments=ARGUMENTS,
)  # fmt: skip
REUSED = Descent(
    name="reused", kernel="fastsam.kernels.descent.reused", coefficients=_reused,
    sums=("first", "second"), reuses=True, columns=_columns, arguments=ARGUMENTS,
)  # fmt: skip


class LookSAM(SharpnessAwareOptimizer):
    r"""Looks ahead every k-th step, and reuses what it found there in the others.

    Every :math:`k`-th step is :class:`SAM`'s, and keeps the part of :math:`\tilde g` that is
    orthogonal to :math:`g`:

    .. math:: u = \tilde g, \qquad
              v = \tilde g - \frac{\langle g, \tilde g \rangle}{\|g\|^2}\, g

    The other steps take one gradient, and call the closure once:

    .. math:: u = g + \alpha\, \frac{\|g\|}{\|v\|}\, v

    The norms and the product are over all elements of all groups, also of those with
    ``perturb=False``. Where :math:`\|v\| = 0`, and before the first step that is SAM's,
    :math:`u = g`; :math:`v = \tilde g` where :math:`g = 0`. The step's number decides which it is,
    as with ``perturb_every``, which is :math:`k` here: before ``start`` and from ``stop`` on steps
    are the base's alone. The count and :math:`v` are in the state dict. A first gradient whose norm
    is not finite leaves :math:`v = 0`: the steps that follow are the base's, up to the next one
    with a perturbation. A parameter that lacks one of both gradients keeps what it had, and so do
    all where a step is skipped (``skip_nonfinite``, a loss scale).

    In explicit passes ``perturbs_next`` says which kind of step is due, as in every class:
    ``first_step`` and ``second_step``, or ``plain_step``. ``max_grad_norm`` bounds the norm of
    :math:`u` in both kinds.

    Cost: in a step with a perturbation that of :class:`GSAM`, and :math:`v` takes the place of
    :math:`g` in its memory: with SGD and momentum 56 bytes per element in float32 (reduce 4,
    perturb 16, reduce 8, update 28), four launches; in the others one pass and 28 bytes (reduce 4,
    update 24), two launches. The first step that reuses a :math:`v` measures :math:`\|v\|`, with 4
    bytes and one launch more; the norm then stays on the device. It is measured again after
    ``load_state_dict``, if :math:`v` has been replaced, and if torch has counted a write to it.
    Writes that torch does not count, as to ``.data``, are not seen. With ``max_grad_norm``, on a
    base that takes the norm of :math:`u`, in distributed training and on several devices a step
    that reuses has 32 bytes and two launches. One tensor of state per parameter
    (``ascent_orthogonal``), in the gradient's dtype: in float16 elements below 6e-8 are lost.

    Args:
        params, base_optimizer: As in :class:`SAM`. A base optimizer with an ``alpha`` of its own,
            as RMSprop has, is refused.
        rho: Radius, at least 0. Default 0.05. Where it is 0 in every group, all steps are the
            base's.
        k: :math:`k`, an integer of at least 1. Default 10. With 1 every step is SAM's.
        alpha: :math:`\alpha`, at least 0. Default 0.7. A group key, with one value for all groups:
            the first group's.
        **kwargs: The other arguments of :class:`SAM`, but for ``perturb_every``, and the base
            optimizer's.

    Raises:
        TypeError, ValueError, ImportError, RuntimeError: As :class:`SAM`; TypeError also for a
            ``perturb_every``, ValueError for a ``k`` or ``alpha`` out of range, or an ``alpha`` of
            a group that is not the first group's.

    Example:
        >>> optimizer = fastsam.LookSAM(model.parameters(), torch.optim.SGD, k=5, lr=0.1)
        >>> for _ in range(5):
        ...     loss = optimizer.step(closure)  # calls it twice in the first of these steps

    Reference: Liu, Mai, Chen, Hsieh and You, "Towards efficient and scalable sharpness-aware
    minimization", CVPR 2022, arXiv 2203.02714. The authors' code could not be read; the equations
    are the paper's, as independent code has them. There the norms may be of each parameter; here
    they are of everything.
    """

    ascent = KEEPING
    descent = KEPT

    def __init__(
        self,
        params: ParamsT,
        base_optimizer: type[Optimizer],
        rho: float | Tensor = 0.05,
        k: int = 10,
        alpha: float = 0.7,
        **kwargs: Any,
    ):
        if "perturb_every" in kwargs:
            raise TypeError("LookSAM takes no perturb_every; k is that")
        kwargs["perturb_every"] = Integer(1)("k", k)
        super().__init__(params, base_optimizer, rho=rho, own={"alpha": alpha}, **kwargs)

    @property
    def k(self) -> int:
        """Of so many steps one has a perturbation; ``perturb_every``, which can be set."""
        return self.perturb_every

    @contextmanager
    def recording(self, hessian: str | None) -> Iterator[Recording | None]:
        """For LETS, which is refused."""
        if hessian is not None:
            raise RuntimeError(
                "LETS does not support LookSAM, whose radius also affects the steps that follow"
            )
        yield None

    def _descent_of(self, flight: InFlight) -> Descent | None:
        if self.k == 1:  # nothing is ever reused
            return None
        if flight.perturbs:
            return KEPT
        reuses = self._is_scheduled and not self.perturbs_next and self._has_radius
        return REUSED if reuses else None

    @property
    def _has_radius(self) -> bool:
        radii = [group["rho"] for group in self.param_groups if is_perturbed(group)]
        return any(isinstance(rho, Tensor) or rho != 0 for rho in radii)

    @property
    def _is_scheduled(self) -> bool:
        """Whether the next step is between ``start`` and ``stop``."""
        number = self.kept["t"] - 1
        return number >= self.start and (self.stop is None or number < self.stop)
