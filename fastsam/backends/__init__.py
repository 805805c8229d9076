"""Three ways to run the same step: ``reference`` (to read), ``torch``, ``triton`` (to be fast).

Each gives the same results within rounding. This file alone knows all three, and which serves what.
"""

import importlib.util
import os

import torch

from fastsam.step.batch import Batch

from .base import Backend, DeviceBackend
from .choice import find_choices
from .devices import SeveralDevices
from .reference import keep_rejected, write_grads
from .sums import settle, undone_if_it_fails

__all__ = ["Backend", "Backends", "create", "find_choices", "keep_rejected", "resolve", "settle",
           "undone_if_it_fails", "write_grads"]  # fmt: skip

NAMES = ("auto", "triton", "torch", "reference")


def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _is_interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def _check_interpreter() -> None:
    """Raise where Triton's interpreter fails on every kernel, and does not say why."""
    import numpy
    import triton

    if _release(triton.__version__) < (3, 7) and _release(numpy.__version__) >= (2, 4):
        raise RuntimeError(
            f"TRITON_INTERPRET=1 needs triton 3.7 or later with numpy {numpy.__version__}, or a "
            f"numpy before 2.4: the interpreter of triton {triton.__version__} fails with it; "
            "run pip install 'triton>=3.7' or 'numpy<2.4'"
        )


def _release(version: str) -> tuple[int, ...]:
    """``(3, 6)`` for ``"3.6.0+git"``."""
    return tuple(map(int, version.split(".")[:2]))


def resolve(name: str, device: torch.device) -> str:
    """The backend that serves ``device``, given what the user asked for.

    Raises:
        ValueError: If ``name`` is unknown.
        ImportError: If ``"triton"`` is asked for and not installed.
        RuntimeError: If ``"triton"`` is asked for tensors that are not on a GPU, unless the
            environment has ``TRITON_INTERPRET=1``; or if it has, and the versions of Triton and
            numpy do not go together.
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
        if _is_interpreting():
            _check_interpreter()
    return name


def create(name: str) -> DeviceBackend:
    """A new backend by its resolved name."""
    if name == "triton":
        from .triton.backend import TritonBackend

        return TritonBackend()
    if name == "torch":
        from .eager.backend import TorchBackend

        return TorchBackend()
    from .reference import ReferenceBackend

    return ReferenceBackend()


class Backends:
    """The backends of one optimizer, with what they remember, made when they are first needed."""

    def __init__(self) -> None:
        self._made: dict[str, DeviceBackend] = {}
        # as asked for, by device; None stands for several
        self._serving: dict[tuple[str, torch.device | None], Backend] = {}

    def use(self, name: str, device: torch.device, backend: Backend) -> None:
        """Let a backend made elsewhere serve what ``name`` would on the device."""
        self._serving[name, device] = backend

    def forget(self) -> None:
        """Let no backend take anything on the device for what it was."""
        for backend in self._made.values():
            backend.forget()

    def serving(self, name: str, batch: Batch) -> Backend:
        """The backend for a batch, given what the user asked for."""
        device = batch.params[0].device
        spreads = batch.layout is not None and batch.layout.spreads
        key = name, None if spreads else device
        found = self._serving.get(key)
        if found is None:
            if spreads:
                found = SeveralDevices(name, resolve, create)
            else:
                resolved = resolve(name, device)
                if resolved not in self._made:
                    self._made[resolved] = create(resolved)
                found = self._made[resolved]
            self._serving[key] = found
        return found
