"""Steps that are captured in a CUDA graph: what has to hold for them.

A replay runs what was launched, and no Python. So everything that a step creates must be there
before, nothing may be decided on the host, and what changes from step to step must be on the
device: a learning rate or radius that is to change between replays has to be a tensor there.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fastsam.kernels import table

from .batch import Batch
from .spec import StepSpec, is_perturbed


def is_captured(batch: Batch) -> bool:
    """Whether the batch's device records launches for a graph."""
    return bool(batch.params) and table.is_capturing(batch.params[0].device)


def refuse(name: str, why: str) -> RuntimeError:
    return RuntimeError(f"{name} cannot be captured in a CUDA graph: {why}")


def check_decisions(name: str, spec: StepSpec) -> None:
    """Whether the host decides nothing anew in every step.

    Raises:
        RuntimeError: If it does.
    """
    if not spec.is_static:
        raise refuse(name, "a lam that changes by schedule, perturb_every, start and stop are "
                           "decided on the host in every step")  # fmt: skip
    if spec.has_unfused and spec.skip_nonfinite:
        raise refuse(
            name, "skip_nonfinite waits for the device before it steps a base that is not fused"
        )


def check_capture(
    name: str, batch: Batch, spec: StepSpec, states: Mapping[Tensor, Mapping[str, Any]],
    has_stepped: bool,
) -> None:  # fmt: skip
    """Under capture in a CUDA graph: whether the step can be replayed.

    Args:
        name: The optimizer's.
        batch, spec: Of the pass.
        states: The optimizer's.
        has_stepped: Whether a step was taken outside.

    Raises:
        RuntimeError: If it cannot.
    """
    if batch.layout is not None and batch.layout.spreads:
        raise refuse(name, "its parameters lie on several devices")
    check_decisions(name, spec)
    if spec.scratch is True and spec.perturbs:
        raise refuse(name, "scratch=True moves parameters between the passes. Set scratch to False "
                           "before the steps outside, or use fastsam.graphed")  # fmt: skip
    if not has_stepped:
        raise refuse(name, "it has taken no step outside the capture, which creates its state")
    names = []
    reads = spec.perturbs and not spec.ascent.is_computed
    for i, group in enumerate(spec.groups):
        own = []
        if is_perturbed(group):
            own = [*spec.ascent.states(group), *[spec.ascent.base_state] * reads]
            own = [name for name in own if name]
        own += [spec.ascent.keeps] * spec.ascent.follows_last
        base = spec.base_of(i)
        if base is not None:
            own += [*base.states(group), *["step"] * base.counts_steps]
        names.append(own)
    for param, i in zip(batch.owners, batch.groups, strict=True):
        held = states.get(param, {})
        if any(held.get(key) is None for key in names[i]):
            raise RuntimeError(
                f"{name} can be captured in a CUDA graph only after its first step, which creates "
                "its state: first take a step outside, with the same parameters and gradients"
            )
