"""From a bucket of tensors to the tables that a kernel walks.

A bucket is every tensor of one device and one set of dtypes. Its pointer table has a row per
stream (``layout.Row``) and a column per tensor; its chunk table has two int64 per program, so that
one launch serves tensors of any number, size and parameter group.
"""

from collections.abc import Sequence

import numpy as np
import torch

from .layout import STREAMS, Row

Addresses = Sequence[int] | np.ndarray
STREAM_ROWS = list(STREAMS)


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


def is_capturing(device: torch.device) -> bool:
    """Whether what is launched on the device goes into a CUDA graph, to be run later."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class Upload:
    """Host arrays of one purpose on their way to the device.

    Each is copied to pinned memory, so that the host does not wait for the copy; torch's pool of
    such memory takes care not to reuse any that is still being read. A graph reads its own again at
    every replay: under capture it comes from memory set aside before, which is never used again.
    """

    def __init__(self, device: torch.device, captured: list[torch.Tensor], spare: int = 2):
        """
        Args:
            device: Where to.
            captured: Takes what graphs read, which has to outlive this object.
            spare: How many arrays a capture may upload.
        """
        self.device = device
        self._aside: list[torch.Tensor] = []
        self._captured = captured
        self._spare = spare

    def set_aside(self, like: torch.Tensor) -> None:
        """Have pinned memory ready for a capture."""
        if self.device.type != "cuda" or is_capturing(self.device):
            return
        self._aside = [x for x in self._aside if x.shape == like.shape]
        while len(self._aside) < self._spare:
            aside = torch.empty(like.shape, dtype=like.dtype, device="cpu", pin_memory=True)
            self._aside.append(aside)

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        """Keep for good what a graph reads."""
        self._captured.append(tensor)
        return tensor

    def __call__(self, host: np.ndarray, into: torch.Tensor | None = None) -> torch.Tensor:
        """The array's copy on the device: ``into`` what an earlier call gave, where that fits.

        Launches that were prepared with it then need no other. No graph may read it.

        Raises:
            RuntimeError: Under capture, where nothing of this size was uploaded before it.
        """
        tensor = torch.from_numpy(host)
        fits = into is not None and into.shape == tensor.shape and into.dtype == tensor.dtype
        if self.device.type == "cpu":
            if into is None or not fits:
                return tensor
            np.copyto(into.numpy(), host)
            return into
        if not is_capturing(self.device):
            self.set_aside(tensor)
            pinned = tensor.pin_memory()
            if into is not None and fits:
                return into.copy_(pinned, non_blocking=True)
            return pinned.to(self.device, non_blocking=True)
        if not (self._aside and self._aside[-1].shape == tensor.shape):
            raise RuntimeError(
                "a step can be captured in a CUDA graph, alone, after two like it were taken "
                "outside: with the same parameters, gradients and groups"
            )
        source = self._aside.pop().copy_(tensor)
        return self.keep(self.keep(source).to(self.device, non_blocking=True))


class Table:
    """Device tables of one bucket for one pass, uploaded again only when an address moved.

    The pointers go to where they were, unless a graph reads those.

    Attributes:
        pointers: The pointer table on the device.
        revision: Another object whenever a tensor of the tables is another.
    """

    pointers: torch.Tensor | None = None

    def __init__(self, device: torch.device, captured: list[torch.Tensor] | None = None):
        """``captured`` takes what graphs read, which has to outlive this object."""
        self.device = device
        self.revision = object()
        self.columns = 0
        self._rows = np.empty((0, 0), np.int64)
        self._sizes: list[int] = []
        self._groups: list[int] = []
        self._chunks: dict[tuple[int, bool], torch.Tensor] = {}
        captured = [] if captured is None else captured
        self._upload = Upload(device, captured)
        self._upload_chunks = Upload(device, captured)
        self._is_captured = False  # whether a graph reads the pointers
        self.aligned = np.empty(0, bool)

    def set(self, rows: dict[Row, Addresses], sizes: list[int], groups: list[int]) -> None:
        """Describe the bucket: addresses (or flags) by row, and each tensor's size and group."""
        host = np.zeros((len(Row), len(sizes)), np.int64)
        for row, values in rows.items():
            host[row] = values
        same_layout = sizes == self._sizes and groups == self._groups
        if same_layout and np.array_equal(host, self._rows):
            return
        if not same_layout:
            self._chunks, self.revision = {}, object()
        self.columns, self._sizes, self._groups = len(sizes), sizes, groups
        self._replace(host)

    def move(self, rows: dict[Row, Addresses]) -> None:
        """Change some rows of the bucket that was set; they are taken to have moved."""
        if self._is_captured:
            self._rows = self._rows.copy()
        realigned = False
        for row, values in rows.items():
            new = np.asarray(values, np.int64)
            realigned |= bool(((new ^ self._rows[row]) & 15).any())
            self._rows[row] = new
        self._replace(self._rows, realigned)

    def _replace(self, host: np.ndarray, realigned: bool = True) -> None:
        if realigned:
            aligned = (host[STREAM_ROWS] & 15 == 0).all(0)
            if not np.array_equal(aligned, self.aligned):
                self.aligned = aligned
                self._chunks, self.revision = {}, object()
        self._rows = host
        capturing = self.device.type == "cuda" and is_capturing(self.device)
        pointers = self._upload(host, None if self._is_captured or capturing else self.pointers)
        if pointers is not self.pointers:
            self.pointers, self.revision, self._is_captured = pointers, object(), capturing

    def captured(self, size: int, backwards: bool = False) -> None:
        """Keep for good the tables that a graph reads."""
        assert self.pointers is not None
        self._upload.keep(self.pointers)
        self._upload_chunks.keep(self.chunks(size, backwards))
        self._is_captured = True

    def chunks(self, size: int, backwards: bool = False) -> torch.Tensor:
        """The chunk table for chunks of ``size`` elements, from the first or from the last on."""
        key = size, backwards
        if key not in self._chunks:
            entries = chunk_table(np.array(self._sizes), np.array(self._groups), self.aligned, size)
            entries = entries[::-1].copy() if backwards else entries
            self._chunks[key] = self._upload_chunks(entries)
        return self._chunks[key]
