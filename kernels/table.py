"""From a bucket of tensors to the tables that a kernel walks.

A bucket is every tensor of one device and one set of dtypes. Its pointer table has a row per
stream (``layout.Row``) and a column per tensor; its chunk table has two int64 per program, so that
one launch serves tensors of any number, size and parameter group.
"""

import numpy as np
import torch

from .layout import STREAMS, Row


def chunk_table(
    sizes: np.ndarray, groups: np.ndarray, aligned: np.ndarray, chunk: int
) -> np.ndarray:
    """Cut every tensor into chunks of at most ``chunk`` elements.

    Args:
        sizes: Elements per tensor.
        groups: Parameter group of each tensor.
        aligned: Whether all of a tensor's streams start on 16-byte boundaries.
        chunk: Elements per chunk, below 2^16.

    Returns:
        int64 array of shape (programs, 2). The first word is ``group << 32 | tensor``; the second
        is ``chunk index << 16 | length``, negated for misaligned tensors. An empty tensor gets one
        empty chunk, so that its step count advances like every other's.
    """
    counts = np.maximum(1, -(-sizes // chunk))
    tensor = np.repeat(np.arange(len(sizes)), counts)
    index = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    length = np.minimum(chunk, sizes[tensor] - index * chunk)
    part = index << 16 | length
    return np.stack([groups[tensor] << 32 | tensor, np.where(aligned[tensor], part, -part)], 1)


def upload(host: np.ndarray, device: torch.device) -> torch.Tensor:
    """Copy to the device without stalling: torch keeps pinned sources until they are read."""
    tensor = torch.from_numpy(host)
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


class Table:
    """Device tables of one bucket for one pass, uploaded again only when an address moved."""

    def __init__(self, device: torch.device):
        self.device = device
        self.columns = 0
        self._rows = np.empty((0, 0), np.int64)
        self._sizes: list[int] = []
        self._groups: list[int] = []
        self._chunks: dict[int, torch.Tensor] = {}
        self.aligned = np.empty(0, bool)

    def set(self, rows: dict[Row, list[int]], sizes: list[int], groups: list[int]) -> None:
        """Describe the bucket: addresses (or flags) by row, and each tensor's size and group."""
        host = np.zeros((len(Row), len(sizes)), np.int64)
        for row, values in rows.items():
            host[row] = values
        same_layout = sizes == self._sizes and groups == self._groups
        if same_layout and np.array_equal(host, self._rows):
            return
        aligned = (host[list(STREAMS)] & 15 == 0).all(0)
        if not (same_layout and np.array_equal(aligned, self.aligned)):
            self.aligned = aligned
            self._chunks = {}
        self.columns, self._rows, self._sizes, self._groups = len(sizes), host, sizes, groups
        self.pointers = upload(host, self.device)

    def chunks(self, size: int) -> torch.Tensor:
        """The chunk table for chunks of ``size`` elements."""
        if size not in self._chunks:
            entries = chunk_table(np.array(self._sizes), np.array(self._groups), self.aligned, size)
            self._chunks[size] = upload(entries, self.device)
        return self._chunks[size]
