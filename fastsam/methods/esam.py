"""ESAM's selection of samples: a second pass over those whose loss the perturbation raised."""

import math

from torch import Tensor

from fastsam.step.arguments import Number, shown

_FRACTION = Number(0, 1, with_low=False, with_high=True, tensors=None)


def select_samples(before: Tensor, after: Tensor, fraction: float) -> Tensor:
    r"""The samples whose loss has risen most: ESAM's sharpness-sensitive selection.

    .. math:: S = \text{the } \lceil \gamma n \rceil \text{ samples with the largest }
              \ell_i(w + e) - \ell_i(w)

    The second gradient is that of their mean loss, so that a step costs one forward and backward
    pass, one forward pass, and a second one of both over a part of the batch::

        before = loss_fn(model(x), y)            # of each sample: reduction="none"
        before.mean().backward()
        optimizer.first_step(zero_grad=True)
        with torch.no_grad():
            after = loss_fn(model(x), y)
        chosen = fastsam.select_samples(before, after, 0.5)
        loss_fn(model(x[chosen]), y[chosen]).mean().backward()
        optimizer.second_step(zero_grad=True)

    Nothing is waited for: how many samples there will be is known on the host. Under DDP each rank
    selects among its own. A loss that is NaN counts as risen, and is not hidden. The other part of
    ESAM, parameters that take part in the perturbation at random, is not here.

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
    count = math.ceil(fraction * len(before))
    rise = after.detach() - before.detach()
    return rise.topk(count, sorted=False).indices.sort().values
