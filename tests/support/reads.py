"""Noticing what the host reads from the device, and that it waits for it."""

import warnings
from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Reads(TorchDispatchMode):
    """Collects the operators through which a value leaves a tensor for Python."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator.name() in ("aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal"):
            self.seen.append(operator.name())
        return operator(*args, **(kwargs or {}))


@contextmanager
def never_waiting():
    """Whatever waits for the GPU inside the block raises, as far as torch notices it."""
    try:
        with warnings.catch_warnings():  # torch says once that this mode is a prototype
            warnings.simplefilter("ignore")
            torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
