"""SAM-ON: parameter groups in which the normalization layers alone are perturbed."""

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from .step.arguments import shown

#: BatchNorm, SyncBatchNorm and InstanceNorm are the first's, lazy ones among them.
LAYERS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
#: How the names of other classes end, as models bring their own.
ENDS = ("LayerNorm", "RMSNorm")


def normalization_groups(model: nn.Module, more: Sequence[type] = ()) -> list[dict[str, Any]]:
    r"""Make two parameter groups: normalization layers, and the others, which are not perturbed.

    .. math:: e_S = \rho\, \frac{g_S}{\|g_S\|}, \qquad e = 0 \text{ elsewhere}

    where :math:`S` are the weights and biases of all normalization layers. The norm is over
    :math:`S` alone, and every parameter is updated with the gradient at :math:`w + e`. Give the
    groups to any class as ``params``. You may add further keys to both::

        groups = fastsam.normalization_groups(model)
        optimizer = fastsam.ASAM(groups, torch.optim.SGD, rho=10.0, lr=0.1, momentum=0.9)

    Normalization layers are torch's BatchNorm, SyncBatchNorm, InstanceNorm, LayerNorm, GroupNorm
    and RMSNorm, their subclasses, and classes whose own or inherited name ends in ``LayerNorm`` or
    ``RMSNorm``. The names of the modules in the model do not matter. Only a layer's own parameters
    count, not those of modules inside it. A parameter that several modules share appears once, in
    the first group if one of them is a normalization layer.

    Cost: the first pass reads and writes only :math:`S`, often a thousandth of the weights. With
    SGD and momentum a step moves about 20 bytes per element in float32, where :class:`SAM` moves
    40.

    The useful radius is larger than SAM's, as few weights are perturbed: the authors use
    :class:`ASAM`'s element-wise scale at ``rho=10``. Their other variants are
    ``ASAM(groups, ..., form="layerwise")``, with the scale :math:`\|w_l\| (1 + \eta)`, and
    ``p=float("inf")`` with either form, :math:`e = \rho\, T\, \mathrm{sign}(g)`.

    Args:
        model: The model; all of its parameters are in the groups.
        more: Further classes of modules that count as normalization layers.

    Returns:
        The groups. The second is left out if it would be empty.

    Raises:
        TypeError: If ``model`` is no module, or ``more`` holds something else than module classes.
        ValueError: If no normalization layer has a parameter.

    Example:
        >>> groups = fastsam.normalization_groups(model)
        >>> optimizer = fastsam.ASAM(groups, torch.optim.SGD, rho=10.0, lr=0.1)
        >>> loss = optimizer.step(closure)  # perturbs the BatchNorm layer, and updates all

    Reference: Müller, Vlaar, Rolnick and Hein, "Normalization layers are all that sharpness-aware
    minimization needs", NeurIPS 2023, arXiv 2306.04226.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {shown(model)}")
    for cls in more:
        if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
            raise TypeError(f"more must hold subclasses of torch.nn.Module, got {shown(cls)}")
    inside = set(_parameters_of_layers(model, (*LAYERS, *more)))
    if not inside:
        raise ValueError(
            "model must have a normalization layer with parameters, and none was found in "
            f"{type(model).__name__}; name the classes of its own in more="
        )
    everything = list(model.parameters())  # in their order, shared ones once
    groups: list[dict[str, Any]] = [{"params": [p for p in everything if p in inside]}]
    if len(everything) > len(inside):
        groups.append({"params": [p for p in everything if p not in inside], "perturb": False})
    return groups


def _parameters_of_layers(model: nn.Module, classes: tuple[type, ...]) -> Iterator[Tensor]:
    for module in model.modules():
        named = any(cls.__name__.endswith(ENDS) for cls in type(module).__mro__)
        if named or isinstance(module, classes):
            yield from module.parameters(recurse=False)
