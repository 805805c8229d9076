"""Parameters on several devices: a backend for each, in lockstep, with norms over all of them.

Every device has the step's scalars for itself, and computes from equal sums what follows from
them. Nothing waits for a device: sums go from one to the other as copies in their streams do.
"""

from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastsam.kernels.layout import Scalar
from fastsam.step.batch import Batch, Layout
from fastsam.step.flight import Backup
from fastsam.step.rule import Group
from fastsam.step.scaling import unscaled
from fastsam.step.spec import StepSpec

from .base import DeviceBackend, nothing, together


class SplitBackup:
    """The unperturbed weights by device."""

    def __init__(self, parts: dict[torch.device, Backup]):
        self.parts = parts

    def restore(self) -> None:
        for backup in self.parts.values():
            backup.restore()

    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """See ``Backup.pairs``."""
        return [pair for backup in self.parts.values() for pair in backup.pairs()]


class SeveralDevices:
    """See the module's docstring.

    Args:
        name: The backend that was asked for.
        resolve, create: As in ``backends/__init__.py``.
    """

    takes_scaled = True
    knows_norms = False

    def __init__(
        self,
        name: str,
        resolve: Callable[[str, torch.device], str],
        create: Callable[[str], DeviceBackend],
    ) -> None:
        self._name, self._resolve, self._create = name, resolve, create
        self._backends: dict[tuple[str, torch.device], DeviceBackend] = {}

    def ascend(
        self, batch: Batch, spec: StepSpec, scalars: Tensor, kept: SplitBackup | None = None
    ) -> SplitBackup:
        """See ``Backend.ascend``."""
        found: list[Backup] = []
        before = {} if kept is None else kept.parts
        parts = self._split(batch, spec, scalars, Scalar.FIRST_INVERSE_SCALE)
        try:
            self._run(
                parts, scalars, found,
                lambda device, backend, *part: backend.ascent_pass(*part, before.get(device)),
            )  # fmt: skip
        except BaseException:
            for backup in (*found, *before.values()):
                backup.restore()
            raise
        return SplitBackup(before | dict(zip(parts, found, strict=True)))

    def descend(
        self, batch: Batch, backup: SplitBackup | None, spec: StepSpec, scalars: Tensor
    ) -> None:
        """See ``Backend.descend``."""
        perturbed = {} if backup is None else backup.parts
        parts = self._split(batch, spec, scalars, Scalar.INVERSE_SCALE)
        step = nothing
        if batch.step_unfused is not None:
            step = partial(batch.step_unfused, next(iter(parts.values()))[-1])
        self._run(
            parts, scalars, [],
            lambda device, backend, part, *rest: backend.descent_pass(
                part, perturbed.get(device), *rest
            ), step,
        )  # fmt: skip
        for device in perturbed.keys() - parts.keys():  # without a second gradient
            perturbed[device].restore()

    def hypergradient(
        self, batch: Batch, backup: SplitBackup | None, hessian: str, spec: StepSpec,
        scalars: Tensor,
    ) -> None:  # fmt: skip
        """See ``Backend.hypergradient``."""
        perturbed = {} if backup is None else backup.parts
        parts = self._split(batch, spec, scalars, Scalar.INVERSE_SCALE)
        self._run(
            parts, scalars, [],
            lambda device, backend, part, *rest: backend.hypergradient_pass(
                part, perturbed.get(device), hessian, *rest
            ),
        )  # fmt: skip

    def _run(
        self, parts: dict[torch.device, Any], scalars: Tensor, results: list[Any],
        start: Callable[..., Any], step_unfused: Callable[[], None] = nothing,
    ) -> None:  # fmt: skip
        """Start a pass on every device, and take over the scalars of the first."""
        together([start(device, *part) for device, part in parts.items()], results, step_unfused)
        first = next(iter(parts.values()))
        scalars.copy_(first[-1], non_blocking=True)

    def _split(
        self, batch: Batch, spec: StepSpec, scalars: Tensor, scale: Scalar
    ) -> dict[torch.device, tuple[DeviceBackend, Batch, StepSpec, Tensor]]:
        """What each device works with, in the order of the devices."""
        layouts = layouts_of(batch)
        names = {self._resolve(self._name, device) for device in layouts}
        name = names.pop() if len(names) == 1 else "torch"  # passes of one kind stop alike
        parts = {}
        for number, (device, layout) in enumerate(layouts.items()):
            key = name, device
            if key not in self._backends:
                self._backends[key] = self._create(name)
            part = part_of(batch, device, layout, number)
            own = scalars.to(device, non_blocking=True, copy=True)
            # what a base that is not fused will read has been unscaled where it is
            carries = scale == Scalar.FIRST_INVERSE_SCALE or not spec.has_unfused
            if spec.is_scaled and carries and not self._backends[key].takes_scaled:
                part = unscaled(part, own[scale])
            groups = [on_device(group, device) for group in spec.groups]
            parts[device] = self._backends[key], part, replace(spec, groups=groups), own
        return parts


def layouts_of(batch: Batch) -> dict[torch.device, Layout]:
    """A layout of each device's tensors, kept with that of all."""
    whole = batch.layout
    assert whole is not None
    if not whole.parts:
        whole.parts = {device: whole.of_device(device) for device in whole.members}
    return whole.parts


def part_of(batch: Batch, device: torch.device, layout: Layout, number: int) -> Batch:
    """One device's part of a batch."""
    assert batch.layout is not None
    positions = batch.layout.members[device]
    if batch.layout.seen:
        seen = [batch.layout.seen[k] for k in positions]
        if seen != layout.seen:
            layout.seen = seen
    lists = {field.name: getattr(batch, field.name) for field in fields(Batch)}
    picked: dict[str, Any] = {
        name: [xs[k] for k in positions]
        for name, xs in lists.items()
        if isinstance(xs, list) and xs
    }
    return replace(batch, **picked, layout=layout, held=None, part=number)


def on_device(group: Group, device: torch.device) -> Group:
    """A group whose hyper-parameters are numbers, or tensors that the device may read."""
    held = {
        key: x.to(device, non_blocking=True)
        for key, x in group.items()
        if isinstance(x, Tensor) and x.device.type != "cpu"
    }
    return {**group, **held} if held else group
