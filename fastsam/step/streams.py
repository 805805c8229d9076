"""The CUDA stream of a pass, and memory that is used on another than it was allocated on."""

from collections.abc import Iterable

import torch
from torch import Tensor

# a number, without an object around it: this is asked for in every pass
_raw = getattr(torch._C, "_cuda_getCurrentRawStream", None)


def current_stream(device: torch.device) -> int:
    """The handle of the device's current stream; 0 where devices have none."""
    if device.type != "cuda":
        return 0
    if _raw is None:
        return torch.cuda.current_stream(device).cuda_stream
    return _raw(torch.cuda.current_device() if device.index is None else device.index)  # type: ignore[no-any-return]


def use_here(tensors: Iterable[Tensor]) -> None:
    """Keep the memory of tensors that are about to be freed until their current stream is done.

    torch gives it back to the stream on which it was allocated, and that may use it at once.
    """
    for x in tensors:
        if x.is_cuda:
            x.record_stream(torch.cuda.current_stream(x.device))
