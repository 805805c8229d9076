"""Odd places in memory for the elements of an array."""

import torch

from registry import DEVICE


def misaligned(array):
    """A view that starts one element into its storage."""
    flat = torch.empty(array.size + 1, device=DEVICE)
    view = flat[1:].view(array.shape)
    view.copy_(torch.from_numpy(array))
    return view


def strided(array):
    """Every second element: a view with gaps."""
    flat = torch.empty(array.shape + (2,), device=DEVICE)
    view = flat[..., 0]
    view.copy_(torch.from_numpy(array))
    return view


def transposed(array):
    return torch.from_numpy(array).float().to(DEVICE).flip(0).t().contiguous().t().flip(0)


def column_major(array):
    view = torch.empty(array.shape[::-1], device=DEVICE).permute(*reversed(range(array.ndim)))
    view.copy_(torch.from_numpy(array))
    return view


def channels_last(array):
    view = torch.empty(array.shape, device=DEVICE).to(memory_format=torch.channels_last)
    return view.copy_(torch.from_numpy(array))


LAYOUTS = {
    "misaligned": misaligned, "strided": strided, "column-major": column_major,
    "channels-last": channels_last,
}  # fmt: skip
