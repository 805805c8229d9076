"""Methods that minimise a function of the Hessian: its trace, its determinant, its Frobenius norm.

They are the choices that the authors of the universal class of sharpness measures make.
"""

from typing import Any

from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from fastsam.objectives import Determinant, Frobenius, Trace
from fastsam.step.arguments import Integer
from fastsam.step.settings import setting

from .universal import UniversalSAM


class TraceSAM(UniversalSAM):
    r"""Minimises the trace of the Hessian with the loss, by Gaussian noise.

    .. math:: u = g + \lambda \left(\frac1N \sum_{i=1}^N g_i - g\right), \qquad
              g_i = \nabla L(w + \rho\, v_i), \quad v_i \sim N(0, I)

    :class:`UniversalSAM` with :math:`\phi(t) = t` and :math:`\psi(t) = t`. It does not use the
    losses. With :math:`\lambda = 1`, the default, :math:`u` is the mean of the :math:`g_i`, and the
    first gradient is not used.

    Cost, noise and failures: as :class:`UniversalSAM`.

    Args:
        params, base_optimizer: As in :class:`SAM`.
        rho: Standard deviation of the noise, at least 0. Default 0.01.
        weight: :math:`\lambda`, at least 0. Default 1.
        samples: :math:`N`, at least 1. Default 1.
        **kwargs: The other arguments of :class:`SAM` but ``ascent_steps``, ``renormalize`` and
            ``adaptive``, and the base optimizer's.

    Raises:
        TypeError, ValueError, ImportError, RuntimeError: As :class:`UniversalSAM`.

    Example:
        >>> optimizer = fastsam.TraceSAM(model.parameters(), torch.optim.SGD, rho=0.01, lr=0.1)
        >>> loss = optimizer.step(closure)

    Reference: Tahmasebi, Soleymani, Bahri, Jegelka and Jaillet, "A universal class of
    sharpness-aware minimization algorithms", ICML 2024, arXiv 2406.03682. The equation and the
    defaults are the authors'.
    """

    def __init__(
        self,
        params: ParamsT,
        base_optimizer: type[Optimizer],
        rho: float | Tensor = 0.01,
        weight: float = 1.0,
        samples: int = 1,
        **kwargs: Any,
    ):
        self._build(params, base_optimizer, Trace(), "normal", rho, weight, samples, None, kwargs)


class DetSAM(UniversalSAM):
    r"""Minimises the determinant of the Hessian with the loss, by uniform noise.

    .. math:: u = g + \lambda\, \bar x^{-3}\, \frac1N \sum_{i=1}^N e^{-x_i / 2}\, (g_i - g),
              \qquad \bar x = \frac1N \sum_{i=1}^N e^{-x_i / 2}, \quad
              x_i = \frac{L_i - L_0}{\rho^2}

    where :math:`g_i` and :math:`L_i` are the gradient and the loss at :math:`w + \rho v_i`, and the
    elements of :math:`v_i` are uniform in :math:`(-h, h)`. :class:`UniversalSAM` with
    :math:`\phi(t) = t^{-2}` and :math:`\psi(t) = e^{-t/2}`. With one sample
    :math:`u = g + \lambda\, e^{x_1} (g_1 - g)`. Exponentials are taken relative to the largest, in
    float64. If a loss rises by more than about :math:`80 \rho^2`, their product may leave the range
    of float32. Then :math:`u` is not finite, and ``skip_nonfinite`` skips the step.

    Cost, noise and failures: as :class:`UniversalSAM`.

    Args:
        params, base_optimizer: As in :class:`SAM`.
        rho: :math:`\rho`, at least 0. Default 1.
        weight: :math:`\lambda`, at least 0. Default 1.
        samples: :math:`N`, at least 1. Default 1.
        half_width: :math:`h`, above 0. Default 0.01. A group key.
        **kwargs: The other arguments of :class:`SAM` but ``ascent_steps``, ``renormalize`` and
            ``adaptive``, and the base optimizer's.

    Raises:
        TypeError, ValueError, ImportError, RuntimeError: As :class:`UniversalSAM`.

    Example:
        >>> optimizer = fastsam.DetSAM(model.parameters(), torch.optim.SGD, weight=0.1, lr=0.1)
        >>> loss = optimizer.step(closure)

    Reference: Tahmasebi, Soleymani, Bahri, Jegelka and Jaillet, "A universal class of
    sharpness-aware minimization algorithms", ICML 2024, arXiv 2406.03682. The equation and the
    defaults are the authors'.
    """

    def __init__(
        self,
        params: ParamsT,
        base_optimizer: type[Optimizer],
        rho: float | Tensor = 1.0,
        weight: float = 1.0,
        samples: int = 1,
        half_width: float = 0.01,
        **kwargs: Any,
    ):
        self._build(params, base_optimizer, Determinant(), "uniform", rho, weight, samples,
                    half_width, kwargs)  # fmt: skip


class FrobSAM(UniversalSAM):
    r"""Minimises the Frobenius norm of the Hessian with the loss, by Gaussian noise.

    .. math:: u = g + \frac{\lambda}{\rho^2}\, \frac{1}{N - 1}
                  \sum_{i=1}^N \Big(L_i - \frac1N \sum_{j=1}^N L_j\Big)\, g_i

    where :math:`g_i` and :math:`L_i` are the gradient and the loss at :math:`w + \rho v_i`,
    :math:`v_i \sim N(0, I)`. The sum is a covariance: the gradient of half the variance of the
    loss. With two samples :math:`u = g + \lambda\, (L_1 - L_2)(g_1 - g_2) / (2 \rho^2)`. The
    computation uses the rises of the losses, :math:`L_i - L_0`.

    Cost: that of :class:`UniversalSAM` with several samples: three forward and backward passes with
    two, and with SGD and momentum 44 bytes per element in three launches (perturb 12 and 8, update
    24). torch's operators put the weights back between the perturbations, 8 bytes, and mix the
    gradients, 20.

    Args:
        params, base_optimizer: As in :class:`SAM`.
        rho: Standard deviation of the noise, at least 0. Default 0.005.
        weight: :math:`\lambda`, at least 0. Default 0.005.
        samples: :math:`N`, at least 2. Default 2.
        **kwargs: The other arguments of :class:`SAM` but ``ascent_steps``, ``renormalize`` and
            ``adaptive``, and the base optimizer's.

    Raises:
        TypeError, ValueError, ImportError, RuntimeError: As :class:`UniversalSAM`.

    Example:
        >>> optimizer = fastsam.FrobSAM(model.parameters(), torch.optim.SGD, samples=2, lr=0.1)
        >>> loss = optimizer.step(closure)

    Reference: Tahmasebi, Soleymani, Bahri, Jegelka and Jaillet, "A universal class of
    sharpness-aware minimization algorithms", ICML 2024, arXiv 2406.03682. The equation and the
    defaults are the authors'.
    """

    samples: int = setting(Integer(2), fixed="construct another optimizer and load the state dict")

    def __init__(
        self,
        params: ParamsT,
        base_optimizer: type[Optimizer],
        rho: float | Tensor = 0.005,
        weight: float = 0.005,
        samples: int = 2,
        **kwargs: Any,
    ):
        self._build(params, base_optimizer, Frobenius(), "normal", rho, weight, samples, None,
                    kwargs)  # fmt: skip
