r"""The theory of Unified SAM: step sizes and radii with a guarantee, and a sampler to go with them.

They are for :class:`fastsam.UnifiedSAM` with plain :class:`torch.optim.SGD` (no momentum, no weight
decay) on a mean :math:`f` of :math:`n` losses :math:`f_i`, each :math:`L_i`-smooth, where
:math:`f` satisfies the Polyak-Lojasiewicz (PL) inequality
:math:`\|\nabla f\|^2 \ge 2\mu (f - f^*)`, as every :math:`\mu`-strongly convex :math:`f` does::

    sizes = step_sizes(Sampling.single(largest_smoothness), pl=mu, lam=0.5)
    optimizer = UnifiedSAM(params, torch.optim.SGD, lam=0.5, **sizes._asdict())

Reference: Oikonomou and Loizou, "Sharpness-aware minimization: general analysis and improved
rates", ICLR 2025, arXiv 2503.02225.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import WeightedRandomSampler


@dataclass(frozen=True)
class Sampling:
    r"""How far a sampled gradient can be from the full one.

    .. math:: \mathrm{E}\,g = \nabla f, \qquad
              \mathrm{E}\|g\|^2 \le 2A\,(f - f^*) + B\,\|\nabla f\|^2 + C

    for samples drawn independently at every step (unlike the shuffling of epochs). For the three
    samplings below :math:`C = 2A\,(f^* - \frac1n \sum_i \inf f_i)`: it is 0 if one point minimizes
    every loss. The sizes do not depend on :math:`C`, but how close they lead to the minimum does.

    Args:
        A: Finite, at least 0.
        B: Finite, at least 0; ``A`` and ``B`` are not both 0.
        smoothness: The :math:`L` for which :math:`f` and every loss that a step may draw are
            :math:`L`-smooth, finite and above 0.

    Raises:
        ValueError: If a constant, or an argument of the methods below, is out of range.

    ``A`` and ``B`` are as in the authors' experiment script (confidence: high; not compared with
    the statement in the paper). :math:`C` is our own derivation. The tests check the inequality.

    Example:
        >>> fastsam.theory.Sampling.minibatch(n=100, size=10, largest_smoothness=11.0)
        Sampling(A=1.0, B=0.9090909090909091, smoothness=11.0)
    """

    A: float
    B: float
    smoothness: float

    def __post_init__(self) -> None:
        for name in ("A", "B"):
            value = getattr(self, name)
            _require(_finite(value) and value >= 0, name, "a number, finite and at least 0", value)
        _require(self.A + self.B > 0, "A or B", "above 0", 0)
        _check_positive("smoothness", self.smoothness)

    @classmethod
    def minibatch(cls, n: int, size: int, largest_smoothness: float) -> "Sampling":
        r"""The mean of ``size`` losses, drawn uniformly without replacement.

        .. math:: A = \frac{(n - \tau) L_{\max}}{\tau (n - 1)}, \qquad
                  B = \frac{n (\tau - 1)}{\tau (n - 1)}

        Args:
            n: Number of losses, at least 1.
            size: :math:`\tau`, from 1 (the same as :meth:`single`) to ``n`` (the full gradient:
                ``A = 0, B = 1``).
            largest_smoothness: The largest :math:`L_i`. Where ``size`` is ``n`` the smoothness of
                :math:`f` will do, and may be much smaller.
        """
        _require(_integer(n) and n >= 1, "n", "an integer of at least 1", n)
        _require(_integer(size) and 1 <= size <= n, "size", f"an integer in 1..n = {n}", size)
        _check_positive("largest_smoothness", largest_smoothness)
        if size == n:
            return cls(0.0, 1.0, largest_smoothness)
        A = (n - size) * largest_smoothness / (size * (n - 1))
        return cls(A, n * (size - 1) / (size * (n - 1)), largest_smoothness)

    @classmethod
    def single(cls, largest_smoothness: float) -> "Sampling":
        r"""One loss, drawn uniformly: :math:`A = L_{\max}, B = 0`.

        Args:
            largest_smoothness: The largest :math:`L_i`.
        """
        _check_positive("largest_smoothness", largest_smoothness)
        return cls(largest_smoothness, 0.0, largest_smoothness)

    @classmethod
    def importance(cls, smoothness: Sequence[float] | Tensor, size: int = 1) -> "Sampling":
        r"""The mean of ``size`` losses from :class:`ImportanceSampler`, each with its weight.

        .. math:: A = \frac{\bar L}{\tau}, \qquad B = 1 - \frac1\tau, \qquad
                  \bar L = \frac1n \sum_i L_i

        A weighted loss :math:`f_i \bar L / L_i` is :math:`\bar L`-smooth whatever :math:`i`, so
        :math:`\bar L` is the sampling's smoothness, too. The authors' script has the largest
        :math:`L_i` there, for smaller sizes: ``dataclasses.replace(sampling, smoothness=...)``
        gives those. It draws one loss; the constants for more are our own derivation.

        Args:
            smoothness: Every :math:`L_i`, shape ``(n,)``, finite and above 0.
            size: :math:`\tau`, at least 1. Default 1.
        """
        mean = float(_each_smoothness(smoothness).mean())
        _require(_integer(size) and size >= 1, "size", "an integer of at least 1", size)
        return cls(mean / size, 1 - 1 / size, mean)


class StepSizes(NamedTuple):
    """The radius and learning rate, under their names in parameter groups.

    Attributes:
        rho: Radius of the perturbation, above 0.
        lr: Learning rate, above 0.

    Example:
        >>> fastsam.theory.StepSizes(rho=0.1, lr=0.01)._asdict()
        {'rho': 0.1, 'lr': 0.01}
    """

    rho: float
    lr: float


def step_sizes(sampling: Sampling, pl: float, lam: float = 0.5, k: int | None = None) -> StepSizes:
    r"""The radius and the learning rate for a smooth PL objective, constant or decreasing.

    .. math:: \rho &= \frac{1}{4L}
              \min\left\{1, \frac{\mu}{2 (B\mu + A)(1 - \lambda)^2}\right\},
              \qquad \gamma = \frac1L \min\left\{2, \frac{\mu}{8 (B\mu + A)}\right\} \\
              \rho_k &= \min\left\{\rho, \frac{1}{2k + 1}\right\}, \qquad
              \gamma_k = \min\left\{\gamma, \frac{2k + 1}{(k + 1)^2 \mu}\right\}

    With the constant sizes :math:`\mathrm{E} f(w_k) - f^*` is at most

    .. math:: (1 - \gamma\mu)^k (f(w_0) - f^*) + \frac{L}{\mu} \Bigl[
              C \bigl(\rho (1 - \lambda)^2 + \gamma (1 + 2 L^2 \rho^2 (1 - \lambda)^2)\bigr)
              + \lambda^2 \rho (1 + 2 L^2 \rho \gamma)\Bigr]

    so they converge linearly to a neighbourhood of the minimum. It is a point only if :math:`C = 0`
    and :math:`\lambda = 0`, as the normalised part of the perturbation does not shrink with the
    gradient. The decreasing sizes converge to the minimum, as :math:`1/k`. Set them before every
    step::

        for k, batch in enumerate(batches):
            for group in optimizer.param_groups:
                group.update(step_sizes(sampling, mu, lam, k)._asdict())
            optimizer.step(closure)

    Args:
        sampling: The sampling's constants; its ``smoothness`` is :math:`L`.
        pl: The PL constant :math:`\mu`, above 0 and at most the sampling's smoothness.
        lam: :math:`\lambda` in [0, 1], as given to the optimizer. Default 0.5, as there.
        k: Number of steps taken, at least 0, for the decreasing sizes; in a resumed run
            ``optimizer.kept["t"] - 1``. Default None: the constant sizes.

    Returns:
        ``(rho, lr)``, where ``lr`` is the paper's :math:`\gamma`.

    Raises:
        ValueError: If ``pl``, ``lam`` or ``k`` is out of range.

    The sizes are as in the authors' experiment script (confidence: high; not compared with the
    theorem in the paper). The bound is our own derivation, which leads to the same sizes.

    Example:
        >>> sampling = fastsam.theory.Sampling.single(largest_smoothness=2.0)
        >>> sizes = fastsam.theory.step_sizes(sampling, pl=0.5)
        >>> optimizer = fastsam.UnifiedSAM(
        ...     model.parameters(), torch.optim.SGD, lam=0.5, **sizes._asdict()
        ... )
    """
    L = sampling.smoothness
    allowed = f"a number above 0 and at most the sampling's smoothness {L!r}"
    # where the two are equal, estimates of them may differ by roundings
    _require(_finite(pl) and 0 < pl <= L * (1 + 1e-6), "pl", allowed, pl)
    _require(_finite(lam) and 0 <= lam <= 1, "lam", "a number in [0, 1]", lam)
    _require(k is None or (_integer(k) and k >= 0), "k", "None or an integer of at least 0", k)
    noise = sampling.B * pl + sampling.A
    plain = 2 * noise * (1 - lam) ** 2  # 0 for SAM, whose perturbation has a bounded length
    rho = (min(1.0, pl / plain) if plain > 0 else 1.0) / (4 * L)
    lr = min(2.0, pl / (8 * noise)) / L
    if k is not None:
        rho, lr = min(rho, 1 / (2 * k + 1)), min(lr, (2 * k + 1) / ((k + 1) ** 2 * pl))
    return StepSizes(rho, lr)


class ImportanceSampler(WeightedRandomSampler):
    r"""Draws sample ``i`` in proportion to the smoothness of its loss, with replacement.

    .. math:: p_i = \frac{L_i}{\sum_j L_j}, \qquad
              \mathrm{E}\Bigl[\frac{1}{n p_i} \nabla f_i\Bigr] = \frac1n \sum_i \nabla f_i

    Without the factors :math:`1/(n p_i)`, which are in ``loss_weights``, the gradient would be that
    of another objective. The data set has to return the indices of its samples::

        sampler = ImportanceSampler(smoothness)
        loader = DataLoader(TensorDataset(x, y, torch.arange(n)), batch_size, sampler=sampler)
        for x, y, index in loader:
            losses = loss_fn(model(x), y)  # one per sample: reduction="none"
            loss = (sampler.loss_weights[index].to(losses) * losses).mean()

    Args:
        smoothness: Every :math:`L_i`, shape ``(n,)``, finite and above 0; ``n`` is at most
            :math:`2^{24}`, as :func:`torch.multinomial` has it.
        num_samples: Number of samples in one pass, at least 1. Default None: ``n``.
        generator: Source of randomness. Default None: torch's own.

    Attributes:
        loss_weights: :math:`1/(n p_i)`, shape ``(n,)``, float64, on the CPU.
        weights: :math:`p_i`, the attribute of ``WeightedRandomSampler``.

    Raises:
        ValueError: If ``smoothness`` or ``num_samples`` is out of range.

    The probabilities are as in the authors' experiment script (confidence: high), which leaves the
    factors out.

    Example:
        >>> sampler = fastsam.theory.ImportanceSampler([1.0, 1.0, 2.0], num_samples=8)
        >>> sampler.weights.tolist()
        [0.25, 0.25, 0.5]
        >>> chosen = list(sampler)  # eight indices, half of them 2 on average

    Reference: As for the module.
    """

    def __init__(
        self,
        smoothness: Sequence[float] | Tensor,
        num_samples: int | None = None,
        generator: torch.Generator | None = None,
    ):
        each = _each_smoothness(smoothness)
        num_samples = len(each) if num_samples is None else num_samples
        valid = _integer(num_samples) and num_samples >= 1
        _require(valid, "num_samples", "None or an integer of at least 1", num_samples)
        probabilities: Any = each / each.sum()  # a sequence by declaration, a tensor in use
        super().__init__(probabilities, num_samples, replacement=True, generator=generator)
        self.loss_weights = each.mean() / each


def _require(valid: bool, name: str, allowed: str, value: object) -> None:
    if not valid:
        raise ValueError(f"{name} must be {allowed}, got {value!r}")


def _finite(value: Any) -> bool:
    return isinstance(value, Real) and math.isfinite(value)


def _integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_positive(name: str, value: Any) -> None:
    _require(_finite(value) and value > 0, name, "a number, finite and above 0", value)


def _each_smoothness(values: Sequence[float] | Tensor) -> Tensor:
    each = torch.as_tensor(values, dtype=torch.float64, device="cpu").detach()
    allowed = "one number per sample, finite and above 0"
    _require(each.ndim == 1 and len(each) > 0, "smoothness", allowed, each.shape)
    wrong = each[~(each.isfinite() & (each > 0))].tolist()
    _require(not wrong, "smoothness", allowed, wrong[:1])
    return each
