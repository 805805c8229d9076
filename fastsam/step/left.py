"""MSAM's norm of the momentum, which updates leave for the next perturbation (``kernels/bins.py``).

The host knows of which momenta it is, and tells no kernel more than whether to read it.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastsam.kernels.layout import (
    BIN_BITS,
    BINS,
    CHUNK,
    INTEGER_COUNT,
    INTEGERS,
    MOST_PROGRAMS,
    SET,
    UNIT,
    Integer,
    Scalar,
)

from .batch import Batch
from .capture import is_captured
from .kept import KnownNorm
from .spec import StepSpec, is_perturbed

#: As in the kernels: the bit that the highest of all is moved to.
HIGHEST = 54
#: In the place of a squared norm: it is to be measured in every step.
NEVER = -2.0


class LeftNorm:
    """Whether updates leave the norm of the momentum, and whether it is still that of the momentum.

    They do not in a step of the base alone, nor where the next one is to be such a step. Nor do
    they once a step has been captured: replays of a graph write to the momentum, and the host does
    not know when.

    A run that is resumed has to measure where the one that was saved would have. So what decides
    follows from settings and from the state dict: the number there is ``NEVER`` after a capture.
    """

    def __init__(self) -> None:
        self.norm = KnownNorm()
        self._replays = False  # graphs may write to the momentum
        self._cleared: Tensor | None = None  # scalars whose bins the next update may add to

    def is_known(self, batch: Batch, scalars: Tensor, allowed: bool) -> bool:
        """Whether the norm of these momenta, as they are now, is that which the last update left.

        Args:
            batch: Of a first pass: the momenta are in the place of the gradients.
            scalars: The optimizer's.
            allowed: What :func:`may_leave` says, and the backend.
        """
        if allowed and not self._replays and self.norm.is_of(list(batch.grads), scalars):
            return True
        if self.norm.is_some and not is_captured(batch):
            scalars[Scalar.KEPT] = squared_norm(scalars)
        self.forget()
        return False

    def note_perturbed(self, scalars: Tensor) -> None:
        """A perturbation has read it, and has cleared the bins that the next update adds to."""
        self._cleared = scalars

    def prepare(self, batch: Batch, spec: StepSpec, scalars: Tensor, allowed: bool) -> bool:
        """Whether the update that comes now is to leave it: then there are bins to add to."""
        self.forget()
        self._replays |= is_captured(batch)
        if self._replays or not (spec.perturbs and allowed):
            return False
        if self._cleared is not scalars:
            integers_of(scalars).zero_()
        self._cleared = None
        return True

    def remember(self, batch: Batch, spec: StepSpec, scalars: Tensor) -> None:
        """The update has left it."""
        name = spec.ascent.momentum
        states = zip(batch.states or (), batch.groups, strict=True)
        momenta: list[Tensor | None] = [
            x[name] for x, i in states if name in x and is_perturbed(spec.groups[i])
        ]
        self.norm.remember(momenta, scalars)

    def settle(self, scalars: Tensor | None) -> None:
        """Let the optimizer's own numbers have it for a state dict, squared, if there is one."""
        if scalars is None:
            return
        if self._replays:
            scalars[Scalar.KEPT].fill_(NEVER)
        elif self.norm.is_some:
            scalars[Scalar.KEPT] = squared_norm(scalars)

    def loaded(self, number: Any) -> None:
        """The optimizer's own numbers have been loaded, or are those of a copy."""
        self._replays |= float(number) == NEVER

    def forget(self) -> None:
        """It is no longer that of the momentum, or about to be not."""
        self.norm.forget()

    def begin_anew(self) -> None:
        """Something has failed, and nothing is known of what the bins hold."""
        self.forget()
        self._cleared = None


def may_leave(batch: Batch, spec: StepSpec) -> bool:
    """Whether an update may leave the norm that the next perturbation needs.

    A bin must not overflow, where every chunk has a program.
    """
    if not (spec.knows_momentum and batch.params) or batch.layout is None or is_captured(batch):
        return False
    sizes: Sequence[int] = batch.layout.sizes
    return bool(sum(sizes) // CHUNK + len(sizes) <= MOST_PROGRAMS)


def integers_of(scalars: Tensor) -> Tensor:
    """The integers behind the scalars: what reads and writes them are kernels."""
    return scalars[INTEGERS : INTEGERS + INTEGER_COUNT].view(torch.int64)


def squared_norm(scalars: Tensor) -> Tensor:
    """The square of what a perturbation would find, with its bits; -1 where it is not finite.

    Nothing waits for the device.
    """
    integers = integers_of(scalars)
    first, second = integers[Integer.SETS :].view(2, SET)[:, :BINS]
    found = torch.where(integers[Integer.READS] == 0, first, second)
    bins, lost = found[:-1], found[-1] != 0
    places = BIN_BITS * torch.arange(BINS - 1, device=scalars.device)
    exponents = bins.double().view(torch.int64) >> 52
    top = torch.where(bins > 0, exponents + places, 0).amax()
    up = 1023 + HIGHEST - top + places
    total = torch.where(up > 0, bins << up.clamp(0, 63), bins >> (-up).clamp(0, 63)).sum()
    exponent = torch.where(top > 0, top - (1023 + HIGHEST - UNIT), 0)
    half = exponent >> 1
    squared = total.double() * _power(half) * _power(exponent - half)
    return torch.where(lost | ~squared.isfinite(), -1.0, squared)


def _power(exponent: Tensor) -> Tensor:
    """2 to a power between -1022 and 1023."""
    return ((exponent + 1023) << 52).view(torch.float64)
