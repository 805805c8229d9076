"""Buckets: tensors that share one launch, and where in memory everything about them is."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import triton.language as tl
from torch import Tensor

from fastsam.arithmetic import wide_dtype
from fastsam.kernels.layout import Row
from fastsam.kernels.table import Table
from fastsam.step.batch import Batch, identical
from fastsam.step.memory import is_dense
from fastsam.step.rule import Base
from fastsam.step.sharding import Sharding
from fastsam.step.spec import StepSpec

from .flat import Copied, FlatBackup, form_of, offsets
from .scratch import Scratch

TYPES: dict[torch.dtype, Any] = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
}


#: What the places of copies follow from where there are none.
NOT_PERTURBED = object()


def like_layout(x: Tensor, model: Tensor) -> Tensor:
    """``x``, or a copy of it with ``model``'s strides, so that both are walked alike."""
    if x.stride() == model.stride() or x.numel() < 2:
        return x
    return torch.empty_like(model, dtype=x.dtype).copy_(x)


def of(tensors: Sequence[Any] | None, members: Sequence[int]) -> list[Any]:
    """The tensors of some members of a batch."""
    assert tensors is not None
    return list(tensors) if len(members) == len(tensors) else [tensors[k] for k in members]


def dense(x: Tensor) -> Tensor:
    """``x`` if it fills one block of memory, else a copy that does."""
    return x if is_dense(x) else torch.empty_like(x).copy_(x)


@dataclass
class Bucket:
    """Tensors that share one launch, laid out for the kernels."""

    key: Any  # what they share
    members: list[int]  # positions in the batch
    params: list[Tensor]  # dense: the parameters, or copies of those with gaps
    grads: list[Tensor]
    types: dict[str, Any]  # the kernels' dtype arguments
    in_place: bool = False  # whether the kernels walk parameters and gradients, not copies
    has_master: bool = False  # whether the parameters have master weights
    sharding: Sharding = ()  # over which processes their sums are added up
    base: Base | None = None  # their fused update, in the descent
    read: Any = None  # the kernels' dtype of the base's state that the ascent reads
    table: Table = field(init=False)
    kept: list[Tensor] = field(default_factory=list)  # copies whose addresses are in the table
    ranges: dict[int, Tensor] = field(default_factory=dict)  # programs by segment, by their chunk
    described: bool = False  # whether the table holds what does not move
    #: Where the perturbed weights go, of parameters that may point elsewhere; empty: to these.
    targets: list[Tensor] = field(default_factory=list)
    moves: bool = False  # whether some will

    def __post_init__(self) -> None:
        self.grad_dtype = self.grads[0].dtype
        self.arithmetic = wide_dtype(self.params[0])
        self._grad_addresses: list[int] = []
        self._copied: Copied | None = None
        self._size = 0  # of a flat copy
        self.origin = self._home  # that the table's backups count from
        # where the copies of the weights are: which flat one, and the first byte, or -1
        self._places: tuple[np.ndarray, np.ndarray] | None = None
        self._places_of: object = None  # token of the first pass's layout
        self._masters_of: object = None  # the list of master weights that the table has
        self._flat: int | None = None  # the one that all copies are in
        self._flats: list[int] = []  # where they were
        self._strides: list[tuple[int, ...]] | None = None
        self._is_contiguous: bool | None = None  # all parameters
        self.seed: int | None = None  # of the keys in the table
        self.perturbed_row: dict[Row, Any] = {}  # of the table: the addresses of ``targets``
        self._rows: dict[Row, Any] = {}  # in the table, of those that only some passes have

    @property
    def _home(self) -> int:
        """An aligned address at the parameters; not 0, whose type would be another."""
        return next((w.data_ptr() & ~15 for w in self.params if w.numel()), 0)

    @property
    def strides(self) -> list[tuple[int, ...]]:
        """Of the parameters."""
        if self._strides is None:
            self._strides = list(map(Tensor.stride, self.params))
        return self._strides

    @property
    def is_contiguous(self) -> bool:
        """Whether all of the parameters are."""
        if self._is_contiguous is None:
            self._is_contiguous = all(map(Tensor.is_contiguous, self.params))
        return self._is_contiguous

    def keep(self, x: Tensor) -> Tensor:
        """Keep a tensor alive until the launches of this pass are made."""
        self.kept.append(x)
        return x

    def reserve(self, batch: Batch, backup: FlatBackup) -> None:
        """Allocate for the copies of this bucket's weights."""
        if self._copied is None:
            originals = of(batch.params, self.members)
            if self.moves:
                pairs = zip(originals, self.targets, strict=True)
                originals = [param for param, target in pairs if target is param]
            starts, self._size = offsets(originals)
            self._copied = Copied(originals, starts, list(map(form_of, originals)))
        if not self.has_master and self._copied.params:
            backup.reserve(self._copied, self._size)

    def aim(self, targets: list[Tensor]) -> None:
        """Take over where the perturbed weights go from now on."""
        self.targets = targets
        self.moves = bool(targets) and not identical(targets, self.params)
        self._copied = None
        self.perturbed_row = {Row.PERTURBED: list(map(Tensor.data_ptr, targets))}

    def note_perturbed(self, batch: Batch, backup: FlatBackup, scratch: Scratch) -> None:
        """There is something to restore from now on: masters follow their parameters, copies are
        made, and scratch memory is written, by the launch that perturbs."""
        if self.has_master:
            backup.follow(of(batch.params, self.members), of(batch.masters, self.members))
            return
        if self._copied is not None and self._copied.params:
            backup.written += 1
        if self.moves:
            backup.move(self.params, self.targets, scratch)

    def addresses(self, row: Row) -> Any:
        """What the table has in a row that only some passes have."""
        return self._rows[row]

    def locate(self, batch: Batch, backup: FlatBackup | None, rows: dict[Row, Any]) -> None:
        """Bring the table up to date; ``rows`` are those that only this kind of pass has."""
        rows = {row: values for row, values in rows.items() if self._rows.get(row) != values}
        self._rows |= rows
        if self.grads or batch.layout is None:
            grad_addresses = list(map(Tensor.data_ptr, self.grads))
        else:
            grad_addresses = batch.layout.seen
            if len(grad_addresses) != len(self.members):
                grad_addresses = [grad_addresses[k] for k in self.members]
        if grad_addresses is not self._grad_addresses and grad_addresses != self._grad_addresses:
            rows[Row.GRAD] = self._grad_addresses = grad_addresses
        if self.has_master:
            self._locate_masters(batch, backup, rows)
        else:
            self._locate_copies(batch, backup, rows)
        if self.described:
            if rows:
                self.table.move(rows)
            return
        rows[Row.PARAM] = list(map(Tensor.data_ptr, self.params))
        sizes = [w.numel() for w in self.params]
        self.table.set(rows, sizes, [batch.groups[k] for k in self.members])
        self.described = True

    def _locate_masters(
        self, batch: Batch, backup: FlatBackup | None, rows: dict[Row, Any]
    ) -> None:
        token = NOT_PERTURBED if backup is None else backup.token
        if token is not None and token is self._places_of and batch.masters is self._masters_of:
            return
        self._places_of, self._masters_of = token, batch.masters
        perturbed = {} if backup is None else backup.masters
        masters = list(map(Tensor.data_ptr, of(batch.masters, self.members)))
        rows[Row.MASTER] = masters
        rows[Row.BACKUP] = [
            master if param in perturbed else param.data_ptr()
            for param, master in zip(of(batch.params, self.members), masters, strict=True)
        ]

    def _locate_copies(self, batch: Batch, backup: FlatBackup | None, rows: dict[Row, Any]) -> None:
        flats = [] if backup is None else list(map(Tensor.data_ptr, backup.flats))
        token = NOT_PERTURBED if backup is None else backup.token
        moved = token is None or token is not self._places_of
        if moved:
            self._find(batch, backup)
            self._places_of = token
        if self._flat is not None:
            self.origin = flats[self._flat]
        elif moved or flats != self._flats:
            self.origin = flats[0] if flats else self._home
            self._flats = flats
            moved = True
        if moved:
            rows[Row.BACKUP] = self._backup_row(flats) - self.origin

    def _find(self, batch: Batch, backup: FlatBackup | None) -> None:
        places = {} if backup is None else backup.places
        pairs = [places.get(batch.params[k], (0, -1)) for k in self.members]
        flat, start = np.array(pairs, np.int64).reshape(-1, 2).T
        in_one = bool((start >= 0).all() and (flat == flat[0]).all())
        self._flat = int(flat[0]) if in_one else None
        size = self.params[0].element_size()
        self._places = flat, np.where(start < 0, -1, start * size)

    def _backup_row(self, flats: list[int]) -> np.ndarray:
        """Addresses of the unperturbed weights: of the copies, or the parameters' own."""
        assert self._places is not None
        flat, start = self._places
        copies: np.ndarray = np.array(flats or [0], np.int64)[flat] + start
        if self._flat is not None:
            return copies
        return np.where(start < 0, list(map(Tensor.data_ptr, self.params)), copies)


def release(buckets: list[Bucket]) -> None:
    """Let go of what the launches of a pass needed."""
    for bucket in buckets:
        bucket.kept = []


def write_back(bucket: Bucket, batch: Batch) -> None:
    """Copy to the parameters that the kernels could not walk in place."""
    if bucket.in_place:
        return
    for k, w in zip(bucket.members, bucket.params, strict=True):
        if w is not batch.params[k]:
            batch.params[k].copy_(w)


def make_buckets(name: str, batch: Batch, spec: StepSpec) -> list[Bucket]:
    """Group a pass's tensors by what a kernel is specialised for, and by how they are sharded.

    Raises:
        RuntimeError: For dtypes that the kernels do not serve.
    """
    members = defaultdict(list)
    for k, (p, g, i) in enumerate(zip(batch.params, batch.grads, batch.groups, strict=True)):
        states: tuple[Any, ...] = ()
        base = spec.base_of(i) if name == "descent" else None
        if base is not None:
            assert batch.states is not None
            names = base.states(spec.groups[i])
            states = tuple(batch.states[k][state].dtype for state in names)
        has_master = batch.masters is not None and batch.masters[k] is not None
        sharding = () if batch.shardings is None else batch.shardings[k]
        if batch.read is not None:  # as it will be, where there is none yet
            held, kept = batch.read[k], wide_dtype(p) if has_master else p.dtype
            states = (kept if held is None else held.dtype,)
        members[p.dtype, g.dtype, states, has_master, sharding, base].append(k)
    buckets = []
    for key, positions in members.items():
        param_type, grad_type, states, has_master, sharding, base = key
        if unserved := {param_type, grad_type, *states} - TYPES.keys():
            raise RuntimeError(
                f"backend='triton' serves {', '.join(map(str, TYPES))}, got {unserved.pop()}"
            )
        params = [dense(batch.params[k]) for k in positions]
        grads = [like_layout(batch.grads[k], w) for k, w in zip(positions, params, strict=True)]
        in_place = all(
            w is batch.params[k] and g is batch.grads[k]
            for k, w, g in zip(positions, params, grads, strict=True)
        )
        types = dict(
            P=TYPES[param_type], G=TYPES[grad_type], STATES=len(states),
            S=TYPES[states[0] if states else param_type],
            ACC=tl.float64 if param_type == torch.float64 else tl.float32,
        )  # fmt: skip
        buckets.append(Bucket(
            key, positions, params, grads, types, in_place, has_master, sharding, base,
            None if batch.read is None else types["S"],
        ))  # fmt: skip
    return buckets
