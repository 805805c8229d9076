"""Steps that are captured in a CUDA graph: what has to hold for them.

A replay runs what was launched, and no Python. So everything that a step creates must be there
before, nothing may be decided on the host, and what changes from step to step must be on the
device: a learning rate or radius that is to change between replays has to be a tensor there.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from fastsam.kernels import table

from .bases import Base, Group
from .rules import Ascent, Batch


def is_captured(batch: Batch) -> bool:
    """Whether the batch's device records launches for a graph."""
    return bool(batch.params) and table.is_capturing(batch.params[0].device)


def check_state(
    name: str,
    batch: Batch,
    base: Base | None,
    ascent: Ascent,
    groups: Sequence[Group],
    state: Mapping[Tensor, Mapping[str, Any]],
) -> None:
    """Everything that a first step creates has been created.

    Raises:
        RuntimeError: If something is missing.
    """
    names = []
    for group in groups:
        own = [*ascent.states(group)]
        own += [] if base is None else [*base.states(group), *["step"] * base.counts_steps]
        names.append(own)
    for param, i in zip(batch.owners, batch.groups, strict=True):
        held = state.get(param, {})
        if any(held.get(key) is None for key in names[i]):
            raise RuntimeError(
                f"{name} can be captured in a CUDA graph only after its first step, which creates "
                "its state: take a step outside, with the same parameters and gradients"
            )


def refuse(name: str, why: str) -> RuntimeError:
    return RuntimeError(f"{name} cannot be captured in a CUDA graph: {why}")
