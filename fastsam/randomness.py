"""Equal random numbers in the passes of a step: dropout's masks, augmentation on the device."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch

from fastsam.kernels import table

from .step.capture import refuse

#: Types of devices whose generators have a state that can be read and set.
GENERATING = ("cuda", "xpu", "mps")


def devices_of(groups: Iterable[dict[str, Any]]) -> list[torch.device]:
    """The devices of an optimizer's parameters that have generators, besides the CPU."""
    params = chain.from_iterable(group["params"] for group in groups)
    found = dict.fromkeys(param.device for param in params)
    return [device for device in found if device.type in GENERATING]


class Generators:
    """Where torch's default generators stand: the CPU's, and those of some devices.

    A device's state is on the host, so nothing is waited for; and only devices that hold
    parameters are asked, so none is initialised.

    Args:
        devices: Besides the CPU.
    """

    def __init__(self, devices: Sequence[torch.device]) -> None:
        self._devices = devices
        self._on_cpu = torch.get_rng_state()
        self._states = [
            torch.get_device_module(device).get_rng_state(*_index(device)) for device in devices
        ]

    def put_back(self) -> None:
        """Set them to where they stood."""
        torch.set_rng_state(self._on_cpu)
        for device, state in zip(self._devices, self._states, strict=True):
            torch.get_device_module(device).set_rng_state(state, *_index(device))


def _index(device: torch.device) -> tuple[torch.device, ...]:
    """What functions of a device's module take; Apple's GPU is the only one of its kind."""
    return () if device.type == "mps" else (device,)


class RepeatedRandom:
    """What passes need to see the random numbers of their step's first one.

    Args:
        name: The optimizer's, for messages.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._start: Generators | None = None  # where the first pass began
        self._last = (-1, 0)  # step and pass in which it was asked for

    @contextmanager
    def around(
        self, groups: Iterable[dict[str, Any]], step: int, number: int, call: str
    ) -> Iterator[None]:
        """Around one pass: the first, where generators are noted, or one that repeats it.

        Args:
            groups: The optimizer's.
            step: Its count of steps.
            number: Of the pass in it, from 0.
            call: What the user asked for it by, for messages.

        Raises:
            RuntimeError: If there is nothing to repeat, or it has been repeated in this pass; under
                capture in a CUDA graph.
        """
        devices = devices_of(groups)
        if any(map(table.is_capturing, devices)):
            raise refuse(self._name, f"{call} reads and sets the states of generators on the host")
        if number == 0:
            self._start, self._last = Generators(devices), (step, 0)
            yield
            return
        if self._start is None or self._last[0] != step:
            raise RuntimeError(
                f"{call} has to be around the first pass of the step as well: it notes there "
                "which random numbers the others repeat"
            )
        if self._last[1] >= number:
            raise RuntimeError(
                f"{call} comes once in every pass, around all of its micro-batches, and has been "
                "around this one already"
            )
        after = Generators(devices)
        self._last = step, number
        try:
            self._start.put_back()
            yield
        finally:  # as if there had been one pass, also where this one failed or drew less
            after.put_back()
