"""ESAM: parameters take part in the perturbation at random, and samples in the second pass."""

import math
from typing import Any

from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from fastsam.arithmetic import EPS, gives_direction, where
from fastsam.optimizer import SharpnessAwareOptimizer
from fastsam.step.arguments import FLAG, Number, shown
from fastsam.step.rule import Ascent, Columns, Group
from fastsam.step.settings import setting


def _columns(group: Group, lam: float) -> Columns:
    return {"BETA": group["beta"]}


def _radius(rho: Any, norm: Any, total: Any, h: Columns) -> Any:
    return where(gives_direction(norm), rho / (h["BETA"] * (norm + EPS)))


AT_RANDOM = Ascent(
    name="esam", kernel="fastsam.kernels.ascent.esam", radius=_radius, columns=_columns,
    chooses=True,
    arguments={"beta": Number(high=1.0, with_low=False, with_high=True, tensors=None)},
    eager="fastsam.backends.eager.ascents:along_gradient",
)  # fmt: skip


def _whole_norms(optimizer: Any, renormalize: bool) -> None:
    if renormalize:
        raise ValueError(
            "renormalize must be False with ESAM, whose first norm covers only chosen parameters, "
            "got True"
        )


class ESAM(SharpnessAwareOptimizer):
    r"""Efficient SAM: in every step a part of the parameters is perturbed, chosen at random.

    .. math:: e_l = z_l\, \frac{\rho}{\beta}\, \frac{g_l}{\|z g\| + 10^{-12}}, \qquad
              z_l = \begin{cases} 1 & \text{with probability } \beta \\ 0 & \text{else}
              \end{cases}

    with one :math:`z_l` for each parameter :math:`l` and step (the paper's stochastic weight
    perturbation). The norm is over the chosen parameters; if none is chosen, nothing is perturbed.
    ``beta=1`` is :class:`SAM`. All parameters are updated. The other part of the paper's method is
    :func:`select_samples`: a second pass over the samples whose loss has risen most.

    The choice depends only on ``seed``, the parameter's place in the optimizer and the number of
    steps so far. So all ranks, all shards of a parameter, all backends and a resumed run choose
    alike. The number of steps is ``kept["rounding_step"]``, on the device, and saved with the
    state; skipped steps, as by ``skip_nonfinite``, do not count. With ``ascent_steps`` all ascents
    of a step have the same choice.

    In ``adaptive`` groups, which are not in the paper, :math:`g` becomes :math:`T^2 g` and its norm
    :math:`\|T g\|`, as in :class:`SAM`. ``metrics["grad_norm"]`` is the norm over the chosen
    parameters.

    Cost: the passes of :class:`SAM` and fewer bytes, as first gradients of parameters that are not
    chosen are not read: with SGD and momentum :math:`32 + 8 \beta` bytes per element in float32 on
    average, in three launches. Both passes compute all gradients; :func:`select_samples` saves time
    there. The only state is the number of steps.

    Args:
        params, base_optimizer: As in :class:`SAM`. Groups may set ``beta`` for themselves, too.
        rho: Radius, at least 0. Default 0.05.
        beta: :math:`\beta`, in (0, 1]. Default 0.6.
        **kwargs: The other arguments of :class:`SAM`, and the base optimizer's. Not
            ``renormalize``.

    Raises:
        TypeError, ValueError, ImportError, RuntimeError: As :class:`SAM`; ValueError also for a
            ``beta`` out of range, or ``renormalize=True``. :class:`LETS` needs
            ``hessian="difference"``.

    Example:
        >>> optimizer = fastsam.ESAM(model.parameters(), torch.optim.SGD, beta=0.5, lr=0.1)
        >>> loss = optimizer.step(closure)

    Reference: Du, Yan, Feng, Zhou, Zhen, Goh and Tan, "Efficient sharpness-aware minimization for
    improved training of neural networks", ICLR 2022, arXiv 2110.03141.
    """

    ascent = AT_RANDOM

    renormalize: bool = setting(FLAG, then=_whole_norms)

    def __init__(
        self,
        params: ParamsT,
        base_optimizer: type[Optimizer],
        rho: float | Tensor = 0.05,
        beta: float = 0.6,
        **kwargs: Any,
    ):
        super().__init__(params, base_optimizer, rho=rho, own={"beta": beta}, **kwargs)


_FRACTION = Number(0, 1, with_low=False, with_high=True, tensors=None)


def select_samples(before: Tensor, after: Tensor, fraction: float) -> Tensor:
    r"""The samples whose loss has risen most: ESAM's sharpness-sensitive selection.

    .. math:: S = \text{the } \lceil \gamma n \rceil \text{ samples with the largest }
              \ell_i(w + e) - \ell_i(w)

    The second gradient is that of their mean loss. A step then costs one forward and backward pass,
    one further forward pass, and one forward and backward pass over a part of the batch::

        before = loss_fn(model(x), y)            # of each sample: reduction="none"
        before.mean().backward()
        optimizer.first_step(zero_grad=True)
        with torch.no_grad():
            after = loss_fn(model(x), y)
        chosen = fastsam.select_samples(before, after, 0.5)
        loss_fn(model(x[chosen]), y[chosen]).mean().backward()
        optimizer.second_step(zero_grad=True)

    The host knows the number of samples and waits for nothing. Under DDP each rank selects among
    its own samples. A loss that is NaN counts as risen. The other part of the paper's method is
    :class:`ESAM`.

    Args:
        before: Losses of the samples at :math:`w`, of one dimension.
        after: The same at :math:`w + e`.
        fraction: :math:`\gamma`, in (0, 1].

    Returns:
        The indices of the samples, in ascending order.

    Raises:
        TypeError: If the losses are no tensors.
        ValueError: If they are not of one dimension and one length, or there are none; if
            ``fraction`` is out of range.

    Example:
        >>> before, after = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.4, 0.2, 0.9])
        >>> fastsam.select_samples(before, after, 0.5)
        tensor([0, 2])

    Reference: Du, Yan, Feng, Zhou, Zhen, Goh and Tan, "Efficient sharpness-aware minimization for
    improved training of neural networks", ICLR 2022, arXiv 2110.03141.
    """
    fraction = _FRACTION("fraction", fraction)
    for name, losses in (("before", before), ("after", after)):
        if not isinstance(losses, Tensor):
            raise TypeError(f"{name} must be a tensor, got {shown(losses)}")
        if losses.ndim != 1 or not len(losses):
            raise ValueError(
                f"{name} must hold a loss for each sample, in one dimension, got shape "
                f"{tuple(losses.shape)}"
            )
    if len(before) != len(after):
        raise ValueError(
            f"after must hold as many losses as before, {len(before)}, got {len(after)}"
        )
    # not a sample more for the rounding of the product, as of 0.07 and 100
    count = math.ceil(round(fraction * len(before), 9))
    rise = after.detach() - before.detach()
    return rise.topk(count, sorted=False).indices.sort().values
