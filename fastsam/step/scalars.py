"""The numbers of a step that live on the device, and which of them are the optimizer's state."""

from typing import Any

import torch
from torch import Tensor

from fastsam.kernels.layout import INTEGER_COUNT, INTEGERS, Scalar

from .batch import Batch
from .spec import StepSpec

#: What a state dict has the optimizer's own numbers under, in every group.
PREFIX = "fastsam_"


def new_scalars(device: torch.device) -> Tensor:
    """A vector indexed by :class:`Scalar`, as it is before the first step; integers follow."""
    # float64 costs nothing for so few numbers; Apple's GPUs have none
    dtype = torch.float32 if device.type == "mps" else torch.float64
    scalars = torch.zeros(INTEGERS + INTEGER_COUNT, dtype=dtype, device=device)
    for slot in (Scalar.RENORMALIZATION, Scalar.COEFFICIENT, Scalar.ACCEPTED,
                 Scalar.FIRST_INVERSE_SCALE, Scalar.INVERSE_SCALE):  # fmt: skip
        scalars[slot].fill_(1)
    return scalars


class DeviceScalars:
    """The vector of scalars that passes read and write, on the parameters' device.

    Some slots are state: sums of norms, SAMAR's lam, the count of roundings. These are entries of
    ``kept``, a dict of the optimizer's own numbers, and become views of the vector there.

    Args:
        kept: The optimizer's own numbers by name, shared with the code that saves them.
        slots: Which of them live in which slot.
    """

    def __init__(self, kept: dict[str, Any], slots: dict[str, Scalar]) -> None:
        self.kept, self.slots = kept, slots
        self.vector: Tensor | None = None  # None before the first step
        self.carries_scale = False  # whether the slots of loss scales hold one

    def on_device_of(self, batch: Batch) -> Tensor:
        """The vector, moved to a device of the batch's parameters if it is on none of them."""
        devices = {} if batch.layout is None else batch.layout.members
        if self.vector is None or (devices and self.vector.device not in devices):
            self.vector = new_scalars(next(iter(devices), torch.device("cpu")))
        for name, scalar in self.slots.items():
            slot, held = self.vector[scalar], self.kept[name]
            if not devices and scalar == Scalar.KEPT:
                # This vector may be on the CPU, and the next pass's on another device. To move the
                # number there would take a read on the host. A pass without parameters uses none.
                continue
            if not (isinstance(held, Tensor) and held.data_ptr() == slot.data_ptr()):
                if isinstance(held, Tensor) and held.device.type != "cpu":
                    slot.copy_(held)
                else:  # filled in: a copy from the host would wait for the device
                    slot.fill_(float(held))
                self.kept[name] = slot
        return self.vector

    def drop_loss_scale(self) -> None:
        """Gradients carry none from now on."""
        if self.carries_scale:
            assert self.vector is not None
            self.vector[Scalar.FIRST_INVERSE_SCALE].fill_(1)
            self.vector[Scalar.INVERSE_SCALE].fill_(1)
            self.vector[Scalar.FOUND_INF].zero_()
            self.carries_scale = False

    def measured(self, spec: StepSpec) -> dict[str, Tensor]:
        """What a step has measured, by name, as copies."""
        assert self.vector is not None
        names = {}
        if spec.perturbs and spec.needs_ascent_norm:
            names[
                "grad_norm"
                if not spec.ascent.momentum or spec.ascent.follows_last
                else "momentum_norm"
            ] = Scalar.GRAD_NORM
        if spec.needs_descent_norm:
            names["perturbed_grad_norm"] = Scalar.PERTURBED_GRAD_NORM
        if spec.renormalize:
            names["renormalization"] = Scalar.RENORMALIZATION
        if spec.skip_nonfinite:
            names["skipped"] = Scalar.SKIPPED
        if spec.descent is not None:
            names |= dict.fromkeys(list(spec.descent.scalars)[:1], Scalar.USED_DESCENT0)
            if spec.descent.rate:
                names["step_size"] = Scalar.RATE
            if "loss" in spec.descent.sums:
                names["perturbed_loss"] = Scalar.LOSS
            if "sharpness" in spec.descent.sums:
                names["sharpness"] = Scalar.SHARPNESS
        copy = self.vector.clone()  # of all: one launch
        values = {name: copy[slot] for name, slot in names.items()}
        rho, like = spec.groups[0]["rho"], self.vector[0]
        if isinstance(rho, Tensor) and rho.device == like.device:
            values["rho"] = rho.to(like, copy=True)
        else:
            values["rho"] = torch.full_like(like, float(rho))
        values["perturbed"] = torch.full_like(like, float(spec.perturbs))
        return values
