"""The fused base optimizers: whose update runs inside fastsam's own, and how it is declared."""

import torch
from torch.optim.optimizer import Optimizer

from fastsam.step.rule import Base

from .adagrad_norm import ADAGRAD_NORM, AdaGradNorm
from .polyak import POLYAK, PolyakSteps
from .torch_optim import ADAGRAD, ADAM, SGD
from .uncorrected import (
    UNCORRECTED_ADAGRAD,
    UNCORRECTED_ADAM,
    UncorrectedAdagrad,
    UncorrectedAdaGradNorm,
    UncorrectedAdam,
)
from .variational import VARIATIONAL, Variational

#: By exact class: a subclass may change the update.
BASES: dict[type, Base] = {
    torch.optim.SGD: SGD,
    torch.optim.Adam: ADAM,
    torch.optim.AdamW: ADAM,
    torch.optim.Adagrad: ADAGRAD,
    AdaGradNorm: ADAGRAD_NORM,
    UncorrectedAdam: UNCORRECTED_ADAM,
    UncorrectedAdagrad: UNCORRECTED_ADAGRAD,
    UncorrectedAdaGradNorm: ADAGRAD_NORM,
    Variational: VARIATIONAL,
    PolyakSteps: POLYAK,
}


def find_base(cls: type[Optimizer]) -> Base | None:
    """The declaration of an optimizer class whose update is fused, else None."""
    return BASES.get(cls)


def register_base(cls: type[Optimizer], base: Base) -> None:
    """Let fastsam's optimizers fuse the update of an optimizer class.

    The class makes the groups, with their hyper-parameters and checks; its ``step`` is not called.

    Args:
        cls: The optimizer class, as it will be given for ``base_optimizer``; not its subclasses.
        base: The declaration of its update.

    Raises:
        TypeError: If ``cls`` is not a subclass of :class:`torch.optim.Optimizer`, or ``base`` not a
            :class:`Base`.
        ValueError: If the class has been registered with another declaration.
    """
    if not (isinstance(cls, type) and issubclass(cls, Optimizer)):
        raise TypeError(f"cls must be a subclass of torch.optim.Optimizer, got {cls!r}")
    if not isinstance(base, Base):
        raise TypeError(f"base must be a fastsam.rules.Base, got {base!r}")
    if BASES.setdefault(cls, base) is not base:
        raise ValueError(f"cls {cls.__name__} has been registered with another declaration")
