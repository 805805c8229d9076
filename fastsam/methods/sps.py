"""SAM-SPS: Unified SAM with a stochastic Polyak step size."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from torch.optim.optimizer import ParamsT

from fastsam.bases.polyak import PolyakSteps
from fastsam.explicit import uncompiled
from fastsam.ranks import find_wrapped
from fastsam.replicas import is_distributed, replicas_of
from fastsam.step.arguments import Number, as_float, shown
from fastsam.step.checks import check_common
from fastsam.step.flight import InFlight
from fastsam.step.recording import Recording
from fastsam.step.rule import Columns, Descent, Group
from fastsam.step.scaling import LossScale
from fastsam.step.sharding import is_sharded

from .sam import UnifiedSAM

LOSS_MIN = Number(low=-float("inf"), with_low=False, tensors=None)


def _columns(group: Group) -> Columns:
    return {"LOSS_MIN": group["loss_min"]}


def _coefficients(state: dict[str, Tensor], sums: dict[str, Tensor], h: Columns) -> tuple[Any, ...]:
    gap = sums["loss"] - h["LOSS_MIN"] - sums["rise"]
    rate = torch.where(gap < 0, 0.0, gap) / sums["second"]  # NaN stays
    return 1.0, 0.0, torch.where(rate.isnan(), 0.0, rate)


POLYAK_STEP = Descent(
    name="sps", kernel="fastsam.kernels.descent.sps", coefficients=_coefficients,
    sums=("second", "rise", "loss"), mixes=False, rate=True, columns=_columns,
    arguments={"loss_min": LOSS_MIN},
)  # fmt: skip


class SAMSPS(UnifiedSAM):
    r"""Unified SAM with a stochastic Polyak step size.

    .. math:: \gamma_t = \min\!\left(\frac{[f(w + e) - \ell^* - \langle e, \tilde g \rangle]_+}
              {\|\tilde g\|^2},\ \gamma_b\right), \qquad
              w \leftarrow w - \gamma_t\,(\tilde g + wd\, w)

    with :class:`UnifiedSAM`'s perturbation :math:`e`, the loss :math:`f(w + e)` of the second pass
    and its gradient :math:`\tilde g`. :math:`\ell^*` is the least possible loss. The term in
    brackets is the tangent at :math:`w + e`, evaluated at :math:`w`, minus :math:`\ell^*`; for a
    convex loss it is at most :math:`f(w) - \ell^*`. There is no learning rate to choose, and no
    momentum. A quotient that is NaN gives :math:`\gamma_t = 0`, which does not change the weights;
    an infinite one gives :math:`\gamma_b`.

    The loss is what the closure returns in the second call: the mean over the batch, including all
    micro-batches, without a loss scale. With explicit passes it is an argument::

        loss_fn(model(x), y).backward()
        optimizer.first_step(zero_grad=True)
        loss = loss_fn(model(x), y)
        loss.backward()
        optimizer.second_step(zero_grad=True, loss=loss)

    It stays on its device, and the host does not wait for it. Under DDP, FSDP2, HSDP and tensor
    parallelism it is averaged over the ranks by one all-reduce. If your loop averages gradients
    itself, give the averaged loss.

    In ``adaptive`` groups, which are not in the paper, :math:`e` is ASAM's and the equation is the
    same. With ``renormalize`` :math:`\tilde g` is rescaled first. ``max_grad_norm`` clips the
    gradient that is multiplied by :math:`\gamma_t`, and does not change :math:`\gamma_t`. In a step
    without a perturbation (``perturb_every``, or ``rho=0``) :math:`e = 0`, and the loss is that at
    :math:`w`.

    ``metrics`` has :math:`\gamma_t` as ``step_size`` (of the first group) and the loss as
    ``perturbed_loss``.

    Cost: 40 bytes per element in float32 (reduce 4, perturb 16, reduce 8, update 12), four
    launches, as :class:`SAM` on SGD with momentum has in three. The first gradient is kept until
    the second reduction. No state.

    Args:
        params: Parameters, named parameters or parameter groups, as in :mod:`torch.optim`.
        rho: Radius, at least 0. Default 0.1.
        lam: As in :class:`UnifiedSAM`. Default 1: SAM's ascent.
        loss_min: :math:`\ell^*`, finite. Default 0. One value for all groups.
        lr_max: :math:`\gamma_b`, the largest step size, at least 0. Default 1. Groups have it as
            ``lr``, so that LR schedulers move it.
        weight_decay: :math:`wd`, at least 0. Default 5e-4.
        backend: As in :class:`SAM`.
        **kwargs: ``renormalize`` and what follows it among the arguments of :class:`SAM`; not
            ``ascent_steps``. ``maximize`` is refused.

    Raises:
        TypeError, ValueError, ImportError, RuntimeError: As :class:`UnifiedSAM`; ValueError also
            for a ``loss_min`` or ``lr_max`` out of range. In a step TypeError without a loss, or
            for one that is no number; the weights have been restored then. :class:`LETS` refuses
            it, as its step size depends on the radius.

    Example:
        >>> optimizer = fastsam.SAMSPS(model.parameters(), rho=0.1)
        >>> loss = optimizer.step(closure)
        >>> step_size = optimizer.metrics["step_size"]

    Reference: Oikonomou and Loizou, "Adaptive sharpness-aware minimization with a Polyak-type step
    size: a theory-grounded scheduler", ICML 2026, arXiv 2606.01827. The equation is the paper's and
    that of the authors' code, which has no groups.
    """

    descent = POLYAK_STEP

    _TRANSIENT: tuple[str, ...] = (
        *UnifiedSAM._TRANSIENT, "_loss", "_ranks", "_returned"
    )  # fmt: skip

    def __init__(
        self,
        params: ParamsT,
        rho: float | Tensor = 0.1,
        lam: float | str | Callable[[int], float] = 1.0,
        loss_min: float = 0.0,
        lr_max: float | Tensor = 1.0,
        weight_decay: float = 5e-4,
        backend: str = "auto",
        **kwargs: Any,
    ):
        check_common(kwargs, type(self))
        super().__init__(
            params, PolyakSteps, rho, lam, lr=Number()("lr_max", lr_max), backend=backend,
            weight_decay=weight_decay, own={"loss_min": loss_min}, **kwargs,
        )  # fmt: skip

    def _start(self) -> None:
        super()._start()
        self._loss: Tensor | None = None  # of a step of one pass
        self._returned: Any = None  # by the closure
        self._ranks: list[Any] | None = None  # process groups over which it is averaged

    # --- the passes ---

    @uncompiled
    @torch.no_grad()
    def second_step(
        self, zero_grad: bool = False, *, grad_scaler: GradScaler | None = None, loss: Any = None
    ) -> None:
        """Restore the weights and update them with the gradients taken at ``w + e``.

        As every method does.

        Args:
            zero_grad, grad_scaler: As in ``second_step`` of :class:`SAM`.
            loss: The mean loss at ``w + e``, of which the gradients are: a number or a tensor of
                one element, without a loss scale.

        Raises:
            TypeError: Without a loss, or for another one. The weights have been restored then, and
                the step is over without an update.
        """
        self._expect("second_step")
        assert self._flight is not None
        try:
            self._flight.loss = self._take(loss, "second_step")
        except BaseException:
            self.restore()
            raise
        super().second_step(zero_grad, grad_scaler=grad_scaler)

    @uncompiled
    @torch.no_grad()
    def plain_step(
        self, zero_grad: bool = False, *, grad_scaler: GradScaler | None = None, loss: Any = None
    ) -> None:
        """A step without a perturbation, with the present gradients.

        Args:
            zero_grad, grad_scaler: As in ``plain_step`` of :class:`SAM`.
            loss: The mean loss that the gradients are of, as in :meth:`second_step`.

        Raises:
            TypeError: Without a loss, or for another one. Nothing has changed then.
        """
        self._expect("first_step", "plain_step")
        self._loss = self._take(loss, "plain_step")
        try:
            super().plain_step(zero_grad, grad_scaler=grad_scaler)
        finally:
            self._loss = None

    @contextmanager
    def recording(self, hessian: str | None) -> Iterator[Recording | None]:
        """For LETS, which is refused."""
        if hessian is not None:
            raise RuntimeError(
                f"LETS does not support {type(self).__name__}, whose step size depends on the "
                "radius"
            )
        yield None

    # --- parts of them ---

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        self._returned = super()._call(*args, **kwargs)
        return self._returned

    def _begin(self, perturbs: bool, scale: LossScale | None) -> InFlight:
        flight = super()._begin(perturbs, scale)
        if not perturbs:
            flight.loss = self._loss
        return flight

    def _descent_of(self, flight: InFlight) -> Descent | None:
        return self.descent  # without a perturbation, too

    def _take(self, loss: Any, call: str) -> Tensor:
        """The loss on the parameters' device, averaged over ranks."""
        if self._inside_step:
            loss, self._returned = self._returned, None
            call = "the closure has to return"
        else:
            call = f"{call} needs"
        number = None if isinstance(loss, Tensor) else as_float(loss)
        is_one = isinstance(loss, Tensor) and loss.numel() == 1 and not loss.is_complex()
        if number is None and not is_one:
            raise TypeError(
                f"loss must be a number or a tensor of one element, which {call} with "
                f"{type(self).__name__}, got {shown(loss)}"
            )
        params = [param for group in self.param_groups for param in group["params"]]
        device = params[0].device if params else torch.device("cpu")
        dtype = torch.float32 if device.type == "mps" else torch.float64
        if isinstance(loss, Tensor) and loss.device.type != "cpu":
            taken = loss.detach().reshape(()).to(dtype, copy=True)
        else:
            if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    "loss must be a tensor on the device in a CUDA graph, which would replay the "
                    f"number {shown(loss)}"
                )
            taken = torch.full((), float(loss), dtype=dtype, device=device)
        return self._averaged(taken, params)

    def _averaged(self, loss: Tensor, params: list[Tensor]) -> Tensor:
        if self._ranks is None:
            self._ranks = []
            meshes = [param.device_mesh for param in params if is_sharded(param)]  # type: ignore[attr-defined]
            if meshes:
                mesh = max(meshes, key=lambda mesh: mesh.size())
                self._ranks = [mesh.get_group(dim) for dim in range(mesh.ndim)]
            elif is_distributed():
                group = replicas_of(self.ascent_context)
                model = None if group is not None else find_wrapped(params)
                group = group if model is None else model.process_group
                self._ranks = [] if group is None else [group]
        for group in self._ranks:
            dist.all_reduce(loss, group=group)
            loss = loss / dist.get_world_size(group)
        return loss

    @property
    def metrics(self) -> dict[str, Tensor]:
        """As every method's, with ``step_size`` and ``perturbed_loss``."""
        values = dict(super().metrics)
        if "step_size" in values:
            lr, rate = self.param_groups[0]["lr"], values["step_size"]
            lr = lr.reshape(()).to(rate) if isinstance(lr, Tensor) else torch.full_like(rate, lr)
            values["step_size"] = torch.minimum(rate, lr)
        return values
