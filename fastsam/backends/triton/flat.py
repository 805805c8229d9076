"""The unperturbed weights of the triton backend: copies, and parameters that need none."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from fastsam.kernels.table import is_capturing
from fastsam.step.batch import Batch, Layout
from fastsam.step.memory import ALONE, references, uses

from .scratch import Scratch, has_graphs, have_shapes_of

#: Elements to which every tensor's place in a flat backup is rounded up: keeps it aligned.
ALIGNMENT = 64


class Form(NamedTuple):
    """How a parameter lay in memory when it was copied, without gaps."""

    dtype: torch.dtype
    shape: torch.Size
    strides: tuple[int, ...]


def form_of(param: Tensor) -> Form:
    """A gap-free copy's; on "meta", because an undo must not need memory."""
    return Form(param.dtype, param.shape, torch.empty_like(param, device="meta").stride())


class Copied(NamedTuple):
    """The parameters of one flat copy: their first elements in it, and their forms."""

    params: list[Tensor]
    starts: list[int]
    forms: list[Form]


class FlatBackup:
    """One flat copy of the weights per bucket, and where each parameter lies in it.

    Attributes:
        token: Of the first pass's layout; None where there is none.
        flats: The copies.
        written: How many of them hold their weights.
        moved: The parameters that point at scratch memory; that; and their own.
    """

    def __init__(self, layout: Layout | None) -> None:
        self.token = None if layout is None else layout.token
        self.flats: list[Tensor] = []
        self._copied: list[Copied] = []
        self.written = 0
        self.moved: list[tuple[Tensor, Tensor, Tensor]] = []
        self._scratch: Scratch | None = None
        self._spent = False
        self._places: dict[Tensor, tuple[int, int]] | None = None
        self._forms: dict[Tensor, Form] = {}
        self._masters: dict[Tensor, Tensor] = {}
        self._followed: list[tuple[list[Tensor], list[Tensor]]] = []  # not yet among them

    def reserve(self, copied: Copied, size: int) -> None:
        """Allocate for one bucket, by :func:`offsets`."""
        like = copied.params[0]
        self.flats.append(torch.empty(size, dtype=like.dtype, device=like.device))
        self._copied.append(copied)

    def keep(self, batch: Batch) -> None:
        """Copy what an earlier ascent of the step has not: parameters without a gradient then."""
        layout = batch.layout
        if self.token is not None and layout is not None and layout.after is self.token:
            return
        known = self.places.keys() | {param for param, *_ in self.moved}
        new = [param for param in batch.params if param not in known]
        for param in new:
            form = form_of(param)
            flat = torch.empty(param.numel(), dtype=param.dtype, device=param.device)
            flat.as_strided(form.shape, form.strides).copy_(param)
            self.flats.append(flat)
            self._copied.append(Copied([param], [0], [form]))
            self.written += 1
        if new:
            self._places = self.token = None
        elif layout is not None:
            layout.after = self.token

    def follow(self, params: list[Tensor], masters: list[Tensor]) -> None:
        """These parameters have been perturbed, and need no copy: their master weights are one."""
        self._followed.append((params, masters))

    @property
    def masters(self) -> dict[Tensor, Tensor]:
        """The master weights of perturbed parameters that need no copy."""
        while self._followed:
            self._masters.update(zip(*self._followed.pop(), strict=True))
        return self._masters

    @property
    def places(self) -> dict[Tensor, tuple[int, int]]:
        """Which flat copy, and where in it, by parameter."""
        if self._places is None:
            self._places = {}
            for i, (params, starts, forms) in enumerate(self._copied):
                self._places.update(
                    (p, (i, start)) for p, start in zip(params, starts, strict=True)
                )
                self._forms.update(zip(params, forms, strict=True))
        return self._places

    def left_by(self, batch: Batch) -> list[Tensor]:
        """The parameters that a second pass over ``batch`` does not update.

        Those that it does, but which have been cast or laid out otherwise since the first pass,
        are restored here, and count as unperturbed from then on.
        """
        layout = batch.layout
        if self.token is not None and layout is not None and layout.after is self.token:
            return []
        updated = {param: k for k, param in enumerate(batch.params)}
        left = [param for param in (*self.places, *self.masters) if param not in updated]
        changed = []
        for param, k in updated.items():
            if param in self.masters:
                if batch.masters is None or batch.masters[k] is not self.masters[param]:
                    changed.append(param)
            elif param in self.places:
                now, then = form_of(param), self._forms[param]
                if now.dtype != then.dtype or (now.shape == then.shape and now != then):
                    changed.append(param)
        if changed:
            self.restore(changed)
            for param in changed:
                self.places.pop(param, None)
                self.masters.pop(param, None)
            self.token = None
        elif not left and layout is not None:
            layout.after = self.token
        return left

    def move(self, params: list[Tensor], targets: list[Tensor], scratch: Scratch) -> None:
        """Point parameters at scratch memory, to which their perturbed weights have been written.

        Args:
            params: The parameters.
            targets: The memory of each, or itself where it stays.
            scratch: What is kept of that.
        """
        self._scratch = scratch
        for param, target in zip(params, targets, strict=True):
            if target is not param:
                self.moved.append((param, target, param.data))
                param.data = target

    def bring_home(self) -> bool:
        """Point parameters at their own memory again, with the weights; whether all are there.

        A parameter that somebody has pointed elsewhere stays there and gets the weights. So does
        one at scratch memory that somebody has taken a view of since, or a graph may have recorded:
        these have to go on following it.
        """
        if not self.moved:
            return True
        moved, self.moved = self.moved, []
        assert self._scratch is not None
        memory, device = self._scratch.memory, moved[0][0].device
        capturing = is_capturing(device)
        stays = has_graphs(device) and not capturing
        if not stays and _are_there(moved):
            for param, _, home in moved:
                param.data = home
            return True
        all_there = True
        for param, target, home in moved:
            if param.data_ptr() == target.data_ptr() and param.shape == home.shape:
                if capturing or (references(target) == ALONE + 1 and not stays):
                    param.data = home
                    continue
                target.copy_(home)
                memory[param] = home
            else:
                param.copy_(home if param.shape == home.shape else home.reshape(param.shape))
                memory.pop(param, None)
            all_there = False
        return all_there

    def begin_update(self) -> None:
        """The update begins: parameters that had moved cannot be restored any more.

        So none is, if a launch fails: all weights are left as far as it got.
        """
        self._spent = self._scratch is not None

    def among(self, params: Iterable[Tensor]) -> list[Tensor]:
        """Those of some parameters that have been perturbed."""
        return [param for param in params if param in self.masters or param in self.places]

    def restore(self, params: Iterable[Tensor] | None = None) -> None:
        """Put weights back: those of ``params``, or all."""
        if self._spent:
            return
        if params is None:
            self.bring_home()
        for param, w in self.pairs(params):
            # shapes differ where somebody has reshaped the parameter
            param.copy_(w if param.shape == w.shape else w.reshape(param.shape))

    def pairs(self, params: Iterable[Tensor] | None = None) -> list[tuple[Tensor, Tensor]]:
        """See ``Backup.pairs``; of ``params``, or of all."""
        found = [(param, home) for param, _, home in self.moved] if params is None else []
        for param in [*self.places, *self.masters] if params is None else params:
            if param in self.masters:
                found.append((param, self.masters[param]))
                continue
            i, start = self.places[param]
            if i < self.written:
                form = self._forms[param]
                part = self.flats[i][start : start + form.shape.numel()]
                found.append((param, part.as_strided(form.shape, form.strides)))
        return found


def offsets(params: list[Tensor]) -> tuple[list[int], int]:
    """Where each parameter starts in a flat copy, and the size of that, in elements."""
    starts, end = [], 0
    for param in params:
        starts.append(end)
        end += -(-param.numel() // ALIGNMENT) * ALIGNMENT
    return starts, end


def _are_there(moved: list[tuple[Tensor, Tensor, Tensor]]) -> bool:
    """Whether parameters are where they were moved to, and nobody else sees that memory."""
    params, targets, _ = zip(*moved, strict=True)
    return (
        list(map(Tensor.data_ptr, params)) == list(map(Tensor.data_ptr, targets))
        and have_shapes_of(params, targets)
        and set(uses(list(map(Tensor.untyped_storage, targets)))) == {ALONE + 1}
    )
