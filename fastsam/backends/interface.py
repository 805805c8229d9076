"""What a backend is, and which one serves given tensors."""

import importlib.util
import os
from abc import ABC, abstractmethod
from typing import Any, Protocol

import torch
from torch import Tensor

from fastsam.kernels.layout import Scalar

from ..rules import Batch, Step
from .lockstep import Pass, complete

NAMES = ("auto", "triton", "torch", "reference")


class Backup(Protocol):
    """The unperturbed weights, from ``ascend`` to ``descend``."""

    def restore(self) -> None:
        """Copy every weight back, bit for bit."""


class Backend(Protocol):
    """What a backend does for the optimizer, with at least one parameter in the batch.

    Nothing here synchronises with the host on a GPU. ``takes_scaled`` says whether gradients may
    carry a loss scale, whose inverse is then among the scalars.
    """

    takes_scaled: bool

    def ascend(self, batch: Batch, step: Step, scalars: Tensor) -> Backup:
        """Set ``w <- w + e`` and keep ``w``. If it fails, the weights are as they were.

        ``batch.ascent`` is the ascent rule's state, which stays; the new one goes to
        ``batch.next``.
        """

    def descend(self, batch: Batch, backup: Any, step: Step, scalars: Tensor) -> None:
        """Restore the weights and apply the base update to ``u``.

        ``backup`` is what this backend's ``ascend`` gave, or None where nothing was perturbed.
        A foreign base (``step.base`` is None) gets ``u`` in ``.grad`` and updates by itself. Where
        the device rejects the step, ``batch.next`` becomes ``batch.ascent`` again.
        """

    def hypergradient(
        self, batch: Batch, backup: Any, hessian: str, step: Step, scalars: Tensor
    ) -> None:
        """LETS: the sum of ``lr * coefficient * (validation - training) * H e``, to its scalar.

        ``batch``, ``backup`` and the other scalars are those of the step, which is complete;
        ``hessian`` says how ``H e`` is approximated: ``"diag"`` or ``"difference"``.
        """


class DeviceBackend(ABC):
    """A :class:`Backend` for one device, whose passes may also run in lockstep with others."""

    takes_scaled = False

    def ascend(self, batch: Batch, step: Step, scalars: Tensor) -> Any:
        return complete(self.ascent_pass(batch, step, scalars))

    def descend(self, batch: Batch, backup: Any, step: Step, scalars: Tensor) -> None:
        complete(self.descent_pass(batch, backup, step, scalars))

    def hypergradient(
        self, batch: Batch, backup: Any, hessian: str, step: Step, scalars: Tensor
    ) -> None:
        complete(self.hypergradient_pass(batch, backup, hessian, step, scalars))

    @abstractmethod
    def ascent_pass(self, batch: Batch, step: Step, scalars: Tensor) -> Pass[Any]: ...

    @abstractmethod
    def descent_pass(
        self, batch: Batch, backup: Any, step: Step, scalars: Tensor
    ) -> Pass[None]: ...

    @abstractmethod
    def hypergradient_pass(
        self, batch: Batch, backup: Any, hessian: str, step: Step, scalars: Tensor
    ) -> Pass[None]: ...


def new_scalars(device: torch.device) -> Tensor:
    """The device scalars of one optimizer: a vector indexed by :class:`Scalar`."""
    # float64 costs nothing for two dozen numbers; Apple's GPUs have none
    dtype = torch.float32 if device.type == "mps" else torch.float64
    scalars = torch.zeros(len(Scalar), dtype=dtype, device=device)
    for slot in (Scalar.RENORMALIZATION, Scalar.COEFFICIENT, Scalar.ACCEPTED,
                 Scalar.FIRST_INVERSE_SCALE, Scalar.INVERSE_SCALE):  # fmt: skip
        scalars[slot].fill_(1)
    return scalars


def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _is_interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def resolve(name: str, device: torch.device) -> str:
    """The backend that serves ``device``, given what the user asked for.

    Raises:
        ValueError: If ``name`` is unknown.
        ImportError: If ``"triton"`` is asked for and not installed.
        RuntimeError: If ``"triton"`` is asked for tensors that are not on a GPU, unless the
            environment has ``TRITON_INTERPRET=1``.
    """
    if name not in NAMES:
        raise ValueError(f"backend must be one of {', '.join(map(repr, NAMES))}, got {name!r}")
    if name == "auto":
        served = device.type == "cuda" and has_triton() and not _is_interpreting()
        if served and torch.version.hip is None:
            served = torch.cuda.get_device_capability(device) >= (7, 0)
        return "triton" if served else "torch"
    if name == "triton":
        if not has_triton():
            raise ImportError(
                "backend='triton' needs the package triton, which is not installed; "
                "use backend='torch', or 'auto' to choose by what is there"
            )
        if device.type != "cpu" and _is_interpreting():
            raise RuntimeError(
                "backend='triton' under TRITON_INTERPRET=1 needs parameters on the CPU, got "
                f"{device}"
            )
        if device.type != "cuda" and not _is_interpreting():
            raise RuntimeError(
                f"backend='triton' needs parameters on a GPU, got {device}; use backend='torch', "
                "or set TRITON_INTERPRET=1 to run the kernels in Triton's interpreter"
            )
    return name


def create(name: str) -> DeviceBackend:
    """A new backend by its resolved name."""
    if name == "triton":
        from .triton import TritonBackend

        return TritonBackend()
    if name == "torch":
        from .torch import TorchBackend

        return TorchBackend()
    from .reference import ReferenceBackend

    return ReferenceBackend()
