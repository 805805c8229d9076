"""The universal class of sharpness measures: functions of the Hessian, by the losses and gradients
at weights with noise on them. The authors' own choices are in ``hessian.py``."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from torch.optim.optimizer import Optimizer, ParamsT

from fastsam.explicit import uncompiled
from fastsam.kernels.layout import Scalar
from fastsam.losses import check_loss, groups_of, mean_loss
from fastsam.objectives import General, Objective
from fastsam.optimizer import SharpnessAwareOptimizer
from fastsam.step.arguments import FLAG, Choice, Integer, Number, shown
from fastsam.step.batch import Batch
from fastsam.step.flight import InFlight
from fastsam.step.recording import Recording
from fastsam.step.rule import Columns, Descent, Group
from fastsam.step.samples import Samples
from fastsam.step.settings import setting
from fastsam.step.spec import StepSpec, is_perturbed, sign_of

from .noise import NORMAL, UNIFORM


def _given(state: dict[str, Tensor], sums: dict[str, Tensor], h: Columns) -> tuple[Any, Any]:
    return state["last"], state["first"]


GIVEN = Descent(
    name="given", kernel="fastsam.kernels.descent.given", coefficients=_given,
    given=("last", "first"), arguments={"weight": Number(tensors=None)},
)  # fmt: skip


def _one_ascent(optimizer: Any, ascent_steps: int) -> None:
    if ascent_steps != 1:
        raise ValueError(
            f"ascent_steps must be 1 with {type(optimizer).__name__}, whose perturbations all "
            f"start from the weights: samples is their number; got {ascent_steps}"
        )


def _no_renormalization(optimizer: Any, renormalize: bool) -> None:
    if renormalize:
        raise ValueError(
            f"renormalize must be False with {type(optimizer).__name__}, whose update has no "
            "single second gradient; got True"
        )


class UniversalSAM(SharpnessAwareOptimizer):
    r"""The universal class of sharpness measures, by noise on the weights.

    The objective is :math:`f + \lambda S`, with

    .. math:: S(w) = \phi\!\left(\int \psi(x)\, d\mu(v)\right), \qquad
              x = \frac{L(w + \rho\, v) - L(w)}{\rho^2}

    At a minimum :math:`x` tends to :math:`\tfrac12 v^\top \nabla^2 L(w)\, v` for small
    :math:`\rho`. So the choice of :math:`\phi`, :math:`\psi` and :math:`\mu` selects the function
    of the Hessian that is minimised, among those that satisfy the paper's conditions.
    :class:`TraceSAM`, :class:`DetSAM` and :class:`FrobSAM` are the authors' choices. The integral
    is estimated by the mean over ``samples`` perturbations in each step. With :math:`g_i` and
    :math:`L_i`, the gradient and the loss at :math:`w + \rho v_i`, and :math:`g`, :math:`L_0` at
    :math:`w`, all on the same batch:

    .. math:: u = g + \lambda\, \phi'(\bar x)\, \frac1N \sum_{i=1}^N \psi'(x_i)\, (g_i - g),
              \qquad \bar x = \frac1N \sum_{i=1}^N \psi(x_i), \quad
              x_i = \frac{L_i - L_0}{\rho^2}

    Noise: :math:`v` is drawn for every perturbation and not normalised. It is a hash of ``seed``,
    the number of steps so far, the number of the perturbation, the parameter's place in the
    optimizer and the element's place in memory. So no noise is stored, a resumed run draws the same
    noise, and all backends and all ranks draw the same; only shards of a parameter draw numbers of
    their own.

    A step calls the closure ``samples + 1`` times: first at :math:`w`, in ``ascent_context``, then
    at every perturbed :math:`w + \rho v_i`, in ``descent_context``. With explicit passes call
    :meth:`first_step` after each pass but the last, and :meth:`second_step` after the last; each
    takes the loss of its pass. :math:`L_i` is what a closure returns: unscaled, and the mean over
    its micro-batches. It stays on the device. It is averaged over the ranks of a
    ``DistributedDataParallel`` or of ``DTensor`` parameters; in other distributed loops the closure
    has to return the average. Compute losses in float32: their rounding errors are multiplied by
    :math:`\rho^{-2}` in :math:`x`.

    A perturbation moves the parameters that had a gradient in the pass before it. A missing
    gradient counts as zero; a parameter without the last gradient is only restored. ``rho=0`` in
    all groups is the base optimizer. :math:`x` uses the radius of the first perturbed group; if its
    square becomes 0, as by a schedule on the device, :math:`u = g`. In groups with ``maximize`` the
    negative objective is minimised, and its sharpness is measured. A first gradient that is not
    finite enters :math:`u` unchanged; if the step takes norms (``max_grad_norm``, a loss scale),
    :math:`u` is then the last gradient. With ``skip_nonfinite`` a step is skipped if a gradient of
    any pass, or a coefficient of :math:`u`, is not finite.

    Cost: ``samples + 1`` forward and backward passes. No norm and no gradient is read for the
    perturbation: with SGD and momentum and one sample 36 bytes per element in float32 (perturb 12,
    update 24), in two launches, and a few operations on single numbers if losses are used. The
    first gradient is kept until the update, in its own memory if the step sets it to None. Every
    further sample takes 8 bytes and one launch for its perturbation. torch's operators restore the
    weights before it and add up its gradient, in one or two float32 tensors per parameter that
    exist only during the step. The only state is a count (``kept["noise_step"]``). On a CPU the
    noise takes longer than the update, as it is computed from integers, tensor by tensor.

    Args:
        params, base_optimizer: As in :class:`SAM`.
        phi, psi: :math:`\phi` and :math:`\psi`: functions that take and give a 0-dim tensor (in
            float64; ``torch.exp``, say). Their derivatives are autograd's.
        mu: :math:`\mu`: ``"normal"``, :math:`N(0, 1)` for each element, or ``"uniform"``, in
            :math:`(-h, h)`. Default ``"normal"``. For other measures write a rule
            (``fastsam.rules.Ascent`` with ``noise=True``) and make it the ``ascent`` of a subclass.
        rho: Radius, at least 0. Default 0.01.
        weight: :math:`\lambda`, at least 0. Default 1. A group key, with one value for all groups:
            the first group's.
        samples: :math:`N`, at least 1; it stays as it is after construction. Default 1.
        half_width: :math:`h` of the uniform measure, above 0. Default 1. A group key. None with
            another.
        **kwargs: The other arguments of :class:`SAM`, and the base optimizer's. Not
            ``ascent_steps``, ``renormalize`` and ``adaptive``.

    Raises:
        TypeError, ValueError, ImportError, RuntimeError: As :class:`SAM`; TypeError also for a
            ``phi`` or ``psi`` that is no function or gives no 0-dim tensor, and for a missing loss;
            ValueError for other arguments out of range, and where the first perturbed group's
            radius is 0 and another's is not. :class:`LETS` refuses it, as the perturbation follows
            from no gradient; ``per_replica`` and a second closure are refused, as the losses of a
            step have to be of one batch.

    Example:
        >>> optimizer = fastsam.UniversalSAM(
        ...     model.parameters(), torch.optim.SGD, phi=lambda x: x, psi=torch.tanh, lr=0.1
        ... )
        >>> loss = optimizer.step(closure)

    Reference: Tahmasebi, Soleymani, Bahri, Jegelka and Jaillet, "A universal class of
    sharpness-aware minimization algorithms", ICML 2024, arXiv 2406.03682. The equations are those
    of the paper.
    """

    _TRANSIENT: tuple[str, ...] = (
        *SharpnessAwareOptimizer._TRANSIENT,
        "_losses",
        "_loss",
        "_loss_groups",
    )

    descent = GIVEN

    samples: int = setting(Integer(1), fixed="construct another optimizer and load the state dict")
    ascent_steps: int = setting(Integer(1), then=_one_ascent)
    renormalize: bool = setting(FLAG, then=_no_renormalization)

    def __init__(
        self,
        params: ParamsT,
        base_optimizer: type[Optimizer],
        phi: Callable[[Tensor], Tensor],
        psi: Callable[[Tensor], Tensor],
        mu: str = "normal",
        rho: float | Tensor = 0.01,
        weight: float = 1.0,
        samples: int = 1,
        half_width: float | None = None,
        **kwargs: Any,
    ):
        for name, function in (("phi", phi), ("psi", psi)):
            if not callable(function):
                raise TypeError(
                    f"{name} must be a function of a 0-dim tensor, got {shown(function)}"
                )
        mu = Choice(("normal", "uniform"))("mu", mu)
        if mu == "normal" and half_width is not None:
            raise TypeError(f"half_width must be None with mu='normal', got {shown(half_width)}")
        half_width = 1.0 if half_width is None else half_width
        self._build(params, base_optimizer, General(phi, psi), mu, rho, weight, samples, half_width,
                    kwargs)  # fmt: skip

    def _build(
        self, params: ParamsT, base: type[Optimizer], objective: Objective, mu: str,
        rho: float | Tensor, weight: float, samples: int, half_width: float | None,
        kwargs: dict[str, Any],
    ) -> None:  # fmt: skip
        own: dict[str, Any] = {"weight": weight}
        if type(self).ascent is SharpnessAwareOptimizer.ascent:  # a subclass may have its own
            self.ascent = NORMAL if mu == "normal" else UNIFORM
            own |= {} if mu == "normal" else {"half_width": half_width}
        self.objective, self.samples = objective, samples
        super().__init__(params, base, rho=rho, own=own, **kwargs)

    def _start(self) -> None:
        super()._start()
        self._losses: list[Tensor] = []  # of the present step, at w and at its perturbations
        self._loss: Any = None  # of the pass that is over
        self._loss_groups: list[Any] | None = None  # over which a mean is taken, once known

    # --- the passes ---

    def step(
        self,
        closure: Callable[[], Any] | None = None,
        second_closure: Callable[[], Any] | None = None,
        *,
        grad_scaler: GradScaler | None = None,
    ) -> Any:
        """Take one step, as every method does.

        Args:
            closure: Computes the loss, calls ``backward`` and returns the loss; called
                ``samples + 1`` times, on the same batch.
            second_closure: None. There is no other.
            grad_scaler: As in ``step`` of :class:`SAM`; the loss that is returned is unscaled.

        Returns:
            What the first call returned.

        Raises:
            RuntimeError: For a second closure; else as every method does.
            TypeError: If the closure returns no loss and the update needs one. Weights and state
                are as they were before the step.
        """
        if second_closure is not None:
            raise RuntimeError(
                f"{type(self).__name__} takes one closure, whose loss it compares between passes"
            )
        return super().step(closure, grad_scaler=grad_scaler)

    @uncompiled
    def first_step(
        self, zero_grad: bool = False, *, loss: Any = None, grad_scaler: GradScaler | None = None
    ) -> None:
        """Perturb the weights by noise: ``w <- w + e``. Called ``samples`` times a step.

        Args:
            zero_grad: Zero the gradients afterwards.
            loss: The loss whose gradients these are: at :math:`w` in the first call, in the others
                at the weights of the perturbation before. Needed but for :class:`TraceSAM`.
            grad_scaler: As every method has it.

        Raises:
            TypeError: Without a loss where one is needed. Nothing has changed then.
        """
        self._expect("first_step")
        if self._flight is None:
            self._losses = []
        before = list(self._losses)
        self._take(loss)
        try:
            super().first_step(zero_grad, grad_scaler=grad_scaler)
        except BaseException:
            if self._flight is not None:  # the step goes on, and the call may be made again
                self._losses = before
            raise

    @uncompiled
    def second_step(
        self, zero_grad: bool = False, *, loss: Any = None, grad_scaler: GradScaler | None = None
    ) -> None:
        """Restore the weights and update them with the gradients of all passes.

        Args:
            zero_grad: Zero the gradients afterwards.
            loss: The loss at the weights of the last perturbation.
            grad_scaler: As every method has it.

        Raises:
            TypeError: Without a loss where one is needed. The weights have been restored then, and
                the step is over without an update.
        """
        self._expect("second_step")
        try:
            self._take(loss)
        except BaseException:
            self.restore()
            raise
        super().second_step(zero_grad, grad_scaler=grad_scaler)

    def restore(self) -> None:
        """Undo ``first_step``: for a loop whose second pass failed. Does nothing otherwise."""
        self._losses, self._loss = [], None
        super().restore()
        scalars = self._passes.scalars.vector
        if self.skip_nonfinite and scalars is not None:  # what has been found is of that step
            self._forget_overflow(scalars)

    @contextmanager
    def recording(self, hessian: str | None) -> Iterator[Recording | None]:
        """For LETS, which is refused."""
        if hessian is not None:
            raise RuntimeError(
                f"LETS does not support {type(self).__name__}, whose perturbation follows from no "
                "gradient: how the loss depends on the radius is not measured"
            )
        yield None

    # --- parts of them ---

    @property
    def _ascents(self) -> int:
        return self.samples

    def _check_settings(self) -> None:
        super()._check_settings()
        if not self.objective.needs_losses:
            return
        radii = [group["rho"] for group in self.param_groups if is_perturbed(group)]
        zero = [not isinstance(rho, Tensor) and rho == 0 for rho in radii]
        if zero and zero[0] and not all(zero):
            raise ValueError(
                f"rho must not be 0 in the first perturbed group of {type(self).__name__} where it "
                "is not in another: losses are divided by its square"
            )

    def _begin(self, *args: Any) -> InFlight:
        flight = super()._begin(*args)
        if flight.perturbs and self.samples > 1:
            flight.samples = Samples(*self.objective.sums(self.samples))
        return flight

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        self._loss = super()._call(*args, **kwargs)
        return self._loss

    def _ascend_on(self, closure: Any, repeats: bool, scaler: GradScaler | None) -> None:
        while self.ascents_left:
            self._call(closure, self.descent_context, repeats)
            self.first_step(zero_grad=True, grad_scaler=scaler)

    @torch.no_grad()
    def _take(self, loss: Any) -> None:
        """Take in the loss of the pass that ends, and what its gradients are added up with."""
        loss, self._loss = self._loss if loss is None else loss, None
        if not self.objective.needs_losses:
            return
        check_loss(type(self).__name__, loss)
        params = [p for group in self.param_groups for p in group["params"]]
        if self._loss_groups is None:
            self._loss_groups = groups_of(params)
        like = self._passes.scalars.vector
        if like is None:
            device = next((p.device for p in params), torch.device("cpu"))
            dtype = torch.float32 if device.type == "mps" else torch.float64
            like = torch.zeros(1, dtype=dtype, device=device)
        self._losses.append(mean_loss(loss, like[0], self._loss_groups))
        samples = None if self._flight is None else self._flight.samples
        if samples is not None and len(self._losses) <= self.samples:
            samples.decay, samples.weight = self.objective.running(self._rises())

    def _rises(self) -> list[Tensor]:
        """The losses' rises so far, by the radius's square; 0 where that is 0."""
        at_w, *others = self._losses
        sign, square = sign_of(self._first_perturbed), self._squared_radius(at_w)
        if isinstance(square, Tensor):
            return [torch.where(square > 0, sign * (x - at_w) / square, 0.0) for x in others]
        return [sign * (x - at_w) / square if square else torch.zeros_like(x) for x in others]

    @property
    def _first_perturbed(self) -> Group:
        group: Group = next(filter(is_perturbed, self.param_groups), self.param_groups[0])
        return group

    def _squared_radius(self, like: Tensor) -> Any:
        """A number, or a 0-dim tensor as ``like`` is."""
        rho = self._first_perturbed["rho"]
        return rho.detach().to(like) ** 2 if isinstance(rho, Tensor) else rho**2

    def _finish(self, batch: Batch, spec: StepSpec, flight: InFlight) -> None:
        if flight.perturbs:
            self._settle(spec, flight)
        super()._finish(batch, spec, flight)
        self._losses, self._loss = [], None
        scalars = self._passes.scalars.vector
        if spec.skip_first and flight.scale is None and scalars is not None:
            self._forget_overflow(scalars)

    @torch.no_grad()
    def _forget_overflow(self, scalars: Tensor) -> None:
        """What is not finite in one step rejects no other."""
        scalars[Scalar.FOUND_INF].zero_()

    def _settle(self, spec: StepSpec, flight: InFlight) -> None:
        """What the update takes of the gradients, now that all losses are there."""
        weight = self.param_groups[0]["weight"]
        xs = self._rises() if self._losses else []
        found = self.objective.mixture(xs, weight, self.samples)
        if xs:
            found = found.where(self._squared_radius(xs[0]))
        first = found.first
        if flight.samples is not None:
            firsts = flight.firsts or ([], [])
            flight.firsts = flight.samples.mix(firsts, first, found.plain, found.weighted)
            first = 1.0
        self._passes.give(spec, found.last, first)
        scalars = self._passes.scalars.vector
        if spec.skip_first and isinstance(found.last, Tensor) and scalars is not None:
            finite = (found.last + found.first + found.plain + found.weighted).isfinite()
            scalars[Scalar.FOUND_INF] += ~finite
