"""bSAM: SAM as an optimal relaxation of Bayes, with a mean and a precision for every weight."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from torch.optim.optimizer import ParamsT

from fastsam.bases.variational import Variational
from fastsam.explicit import uncompiled
from fastsam.kernels.layout import Scalar
from fastsam.optimizer import SharpnessAwareOptimizer
from fastsam.step.arguments import FLAG, Integer, Policy, policy
from fastsam.step.batch import Batch
from fastsam.step.caches import forget_weights
from fastsam.step.checks import check_common
from fastsam.step.flight import InFlight, write
from fastsam.step.interrupts import uninterrupted
from fastsam.step.recording import Recording
from fastsam.step.rule import Ascent, Columns, Descent, Group
from fastsam.step.settings import setting
from fastsam.step.spec import StepSpec

from .noise import NORMAL


def _along(g: Tensor, state: dict[str, Tensor], h: Columns) -> Tensor:
    s = state["precision"]
    d = g / torch.where(s.isnan(), 1.0, s)
    return torch.where(d.isfinite(), d, 0.0)


def _radius(rho: Any, norm: Any, total: Any, h: Columns) -> Any:
    return rho


def _given(state: dict[str, Tensor], sums: dict[str, Tensor], h: Columns) -> tuple[Any, Any]:
    return state["last"], state["first"]


def _sampled(x: Tensor, state: dict[str, Tensor], h: Columns) -> Tensor:
    s = state["precision"]
    z = NORMAL.direction(x, {}, {})
    scale: Tensor = h["N"] * torch.where(s.isnan(), 1.0, s)
    return z / scale.sqrt()


def _unit(rho: Any, norm: Any, total: Any, h: Columns) -> Any:
    return 1.0


def _examples(group: Group, lam: float) -> Columns:
    return {"N": group["n"]}


BY_PRECISION = Ascent(
    name="precision", kernel="fastsam.kernels.ascent.precision", direction=_along, radius=_radius,
    base_state="precision", norm=None, scales=False,
)  # fmt: skip
SAMPLE = Ascent(
    name="gaussian", kernel="fastsam.kernels.ascent.gaussian", direction=_sampled, radius=_unit,
    columns=_examples, base_state="precision", norm=None, noise=True, scales=False,
)  # fmt: skip
#: ``u = g~``; the first gradient is kept for the precision.
SECOND = Descent(
    name="second", kernel="fastsam.kernels.descent.given", coefficients=_given,
    given=("last", "first"),
)  # fmt: skip


#: What a step's specification has otherwise where noise is put on the weights.
OF_NOISE: dict[str, Any] = {
    "ascent": SAMPLE, "descent": None, "scratch": False, "skip_first": False, "renormalize": False,
}  # fmt: skip


def _every_step(optimizer: Any, value: Any) -> None:
    if value not in (1, 0, None):
        raise ValueError(
            "perturb_every, start, stop and perturb_when must stay 1, 0, None and None with BSAM, "
            f"whose update needs the gradients of both passes; got {value}"
        )


class BSAM(SharpnessAwareOptimizer):
    r"""Bayesian SAM: learns a Gaussian over the weights, its mean and its precision.

    With :math:`N` the number of training examples, :math:`\delta = \text{prior precision} / N`, the
    gradient :math:`g` at a sample of the Gaussian, and :math:`\tilde g` at the perturbed mean:

    .. math:: g = \nabla L\Big(w + \frac{z}{\sqrt{N s}}\Big), \quad z \sim N(0, I), \qquad
              \tilde g = \nabla L(w + e), \quad e = \rho\, \frac{g}{s}

    .. math:: m \leftarrow \beta_1 m + (1 - \beta_1)(\tilde g + \delta w), \qquad
              w \leftarrow w - lr\, \frac{m}{s}, \qquad
              s \leftarrow \beta_2 s + (1 - \beta_2)(\sqrt{s}\, |g| + \gamma + \delta)

    The update of :math:`w` uses the old :math:`s`. :math:`s` starts at 1 and :math:`m` at 0.
    Products, roots and quotients are element-wise. The weights are the mean of the Gaussian. For
    predictions average over samples of it::

        outputs = 0
        for number in range(32):
            with optimizer.sampled(number):
                outputs = outputs + model(x).softmax(-1) / 32

    ``step(closure)`` adds the noise to the weights for the first call of the closure and removes it
    afterwards; it returns the loss at the noisy weights. With explicit passes put the first forward
    and backward inside :meth:`noise`::

        with optimizer.noise():
            loss_fn(model(x), y).backward()
        optimizer.first_step(zero_grad=True)
        loss_fn(model(x), y).backward()
        optimizer.second_step(zero_grad=True)

    :math:`z` is a hash of ``seed``, the count of steps (``kept["noise_step"]``), the parameter's
    place in the optimizer and the element's place in memory. So it is not stored, a resumed run
    draws the same noise, and all ranks draw the same; only shards draw numbers of their own. Groups
    with ``perturb=False`` get no noise and no perturbation, but the same update.

    A missing first gradient counts as zero in :math:`s`. An element whose first gradient is not
    finite is not perturbed, and its :math:`s` does not change.

    Cost: two forward and backward passes. In float32, as counted, 68 bytes per element in three
    launches (noise 16, perturb 20, update 32), and 8 by torch's operators, which remove the noise.
    The first gradient is kept until the update, in its own memory if the step sets it to None. Two
    states, ``exp_avg`` and ``precision``, in float32 (float64 for float64 parameters). On a CPU the
    noise takes longer than the update, as it is computed from integers, tensor by tensor.

    Args:
        params: Parameters, named parameters or parameter groups, as in :mod:`torch.optim`.
        lr: Learning rate, at least 0. Default 0.5.
        n: :math:`N`, the number of training examples, at least 1. Needed.
        rho: :math:`\rho`, at least 0. Default 0.01.
        betas: :math:`\beta_1` and :math:`\beta_2`, each in [0, 1). Default (0.9, 0.999).
        prior_precision: Precision of the prior, at least 0. Default 40.
        damping: :math:`\gamma`, at least 0. Default 0.1.
        backend: As in :class:`SAM`; of the perturbation.
        maximize: Maximize the objective, as in :mod:`torch.optim`. Default False.
        **kwargs: ``renormalize`` and what follows it among the arguments of :class:`SAM`, but for
            ``perturb_every``, ``start``, ``stop``, ``perturb_when`` and ``ascent_steps``.
            ``max_grad_norm`` bounds the norm of :math:`\tilde g`, and ``skip_nonfinite`` looks at
            both gradients.

    Raises:
        TypeError, ValueError, ImportError, RuntimeError: As :class:`SAM`; TypeError also without
            ``n``; RuntimeError by :meth:`first_step` where :meth:`noise` was not around the pass
            before it. :class:`LETS`, ``plain_step``, ``step_micro_batches`` and ``per_replica``
            are refused.

    Example:
        >>> optimizer = fastsam.BSAM(model.parameters(), lr=0.1, n=len(inputs))
        >>> loss = optimizer.step(closure)
        >>> with torch.no_grad(), optimizer.sampled(0):  # a sample of the Gaussian
        ...     probabilities = model(inputs).softmax(-1)

    Reference: Möllenhoff and Khan, "SAM as an optimal relaxation of Bayes", ICLR 2023, arXiv
    2210.01620. The equations and defaults are those of the authors' code.
    """

    _TRANSIENT: tuple[str, ...] = (*SharpnessAwareOptimizer._TRANSIENT, "_is_noisy", "_had_noise")

    ascent = BY_PRECISION
    descent = SECOND

    perturb_every: int = setting(Integer(1), then=_every_step)
    start: int = setting(Integer(0), then=_every_step)
    stop: int | None = setting(Integer(1, optional=True), then=_every_step)
    perturb_when: Policy | None = setting(policy, then=_every_step)

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.5,
        *,
        n: float,
        rho: float | Tensor = 0.01,
        betas: tuple[float, float] = (0.9, 0.999),
        prior_precision: float = 40.0,
        damping: float = 0.1,
        backend: str = "auto",
        maximize: bool = False,
        **kwargs: Any,
    ):
        check_common(kwargs, type(self))
        super().__init__(
            params, Variational, rho=rho, backend=backend, lr=lr, n=n, betas=betas,
            prior_precision=prior_precision, damping=damping,
            maximize=FLAG("maximize", maximize), **kwargs,
        )  # fmt: skip

    def _start(self) -> None:
        super()._start()
        self._is_noisy = False  # whether a sample is in the parameters
        self._had_noise = False  # whether the present gradients are those at one

    # --- samples ---

    @contextmanager
    def noise(self) -> Iterator[None]:
        """Put the step's sample of the Gaussian into the model, for the first pass.

        For loops that call ``backward``; ``step`` does this itself. At the end of the block, also
        after an exception, the weights are restored bit for bit; changes of the weights inside the
        block are lost.

        Raises:
            RuntimeError: Between ``first_step`` and ``second_step``, and inside another such block.
        """
        self._expect("first_step", "noise")
        with self._sample(0):
            yield
        self._had_noise = True

    @contextmanager
    def sampled(self, number: int) -> Iterator[None]:
        """Put a sample of the Gaussian into the model, for predictions.

        Until the next step the same number gives the same sample, and different numbers give
        independent ones. They differ from the sample of the step. Afterwards the weights are
        restored, as in :meth:`noise`.

        Args:
            number: At least 0 and below 2^31.

        Raises:
            ValueError: If it is out of range.
            RuntimeError: As by :meth:`noise`.
        """
        Integer(0, 2**31)("number", number)
        self._expect("first_step", "sampled")
        with self._sample(int(number) + 1):
            yield

    @contextmanager
    def _sample(self, number: int) -> Iterator[None]:
        if self._is_noisy:
            raise RuntimeError("a sample is in the model already: end that block first")
        backup, spec = None, replace(self._spec(InFlight(True)), **OF_NOISE, seed=self.seed)
        try:
            with uninterrupted(), torch.no_grad():
                self._is_noisy = True
                backup = self._passes.put_noise(spec, self.state, self.backend, number)
            yield
        finally:
            with uninterrupted(insists=True), torch.no_grad():
                if backup is not None:
                    write(backup.pairs())
                forget_weights()
                self._is_noisy = False

    # --- the passes ---

    @uncompiled
    def first_step(self, zero_grad: bool = False, *, grad_scaler: GradScaler | None = None) -> None:
        """Perturb the weights along the present gradients, which are those at the step's sample.

        Args:
            zero_grad: Zero the gradients afterwards.
            grad_scaler: As every method has it.

        Raises:
            RuntimeError: If :meth:`noise` was not around the pass that they are of. Nothing has
                changed then.
        """
        self._expect("first_step")
        if not self._had_noise:
            raise RuntimeError(
                "BSAM's first gradients are those at a sample of its Gaussian: put "
                "optimizer.noise() around forward and backward of the first pass"
            )
        super().first_step(zero_grad, grad_scaler=grad_scaler)
        self._had_noise = False

    def plain_step(self, zero_grad: bool = False, *, grad_scaler: GradScaler | None = None) -> None:
        """There is none: the update needs the gradients of both passes.

        Raises:
            RuntimeError: Always.
        """
        raise RuntimeError("BSAM has no step of its base alone, as it needs two gradients")

    def restore(self) -> None:
        """Undo ``first_step``: for a loop whose second pass failed. Does nothing otherwise."""
        super().restore()
        self._had_noise = False

    @contextmanager
    def recording(self, hessian: str | None) -> Iterator[Recording | None]:
        """For LETS, which is refused."""
        if hessian is not None:
            raise RuntimeError("LETS does not support BSAM, whose first gradient is not taken at w")
        yield None

    # --- parts of them ---

    def _find_slots(self) -> dict[str, Scalar]:
        self.kept["noise_step"] = 0.0
        return {**super()._find_slots(), "noise_step": Scalar.NOISE_STEP}

    @property
    def _needs_two_passes(self) -> bool:
        return True

    def _expect(self, due: str, call: str = "") -> None:
        if self._is_noisy and not self._inside_closure:
            raise RuntimeError(
                f"{call or due} cannot be called while a sample is in the model: end the block of "
                "noise() or sampled() first"
            )
        super()._expect(due, call)

    def _call(self, closure: Callable[[], Any], *args: Any, **kwargs: Any) -> Any:
        if self._flight is not None:
            return super()._call(closure, *args, **kwargs)
        with self.noise():
            return super()._call(closure, *args, **kwargs)

    def _finish(self, batch: Batch, spec: StepSpec, flight: InFlight) -> None:
        self._passes.give(spec, 1.0, 0.0)
        scalars = self._passes.scalars.vector
        assert scalars is not None
        super()._finish(batch, spec, flight)
        scalars[Scalar.NOISE_STEP].add_(1)
