"""What an optimizer holds: groups, checkpoints and copies, and the tensors of a pass."""

import os
import sys
import warnings
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from torch.optim import optimizer as torch_optimizer
from torch.optim.optimizer import Optimizer
from torch.utils.weak import WeakTensorKeyDictionary

from . import backends
from .bases import Base
from .checks import check_group, check_partitioned, check_theta, check_uncorrected
from .precision import MASTER, check_dtypes
from .rules import Ascent, Batch, Step
from .sweep import Sweep

Function = TypeVar("Function", bound=Callable[..., Any])

#: What LETS needs of a step: the second pass's batch, perhaps the old weights, and the step.
Record = tuple[Batch, backends.Backup | None, Step]


def uncompiled(function: Function) -> Function:
    """Make the function a graph break inside ``torch.compile``; what it calls is not traced.

    torch's own optimizers use the first of these, which imports the compiler when it is needed.
    """
    disable = getattr(torch, "_disable_dynamo", torch.compiler.disable)
    return cast(Function, disable(function))


def warn_user(message: str) -> None:
    """Warn at the caller's line, however many wrappers of torch's are in between."""
    inside = tuple(os.path.dirname(module) + os.sep for module in (__file__, torch.__file__))
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.startswith(inside):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)


class StatefulOptimizer(Optimizer):
    """An optimizer that shares its groups and its state with a base optimizer that it holds."""

    base_optimizer: Optimizer
    backend: str
    skip_nonfinite: bool
    master_weights: bool
    rounding: str
    seed: int
    _base: Base | None  # the base's rules where it is fused
    _ascent: Ascent

    #: What ``_start`` sets.
    _transient = ("_backup", "_pending", "_firsts", "_between_passes", "_inside_step", "_perturbs",
                  "_lam", "_scalars", "_backends", "_records", "_record", "_spare",
                  "_sweeps", "_served", "_was_captured", "_made", "_inside_closure", "_is_scaled",
                  "_was_scaled", "_scaler", "_seen", "_warned", "_replicas",
                  "_saw_shards")  # fmt: skip

    def _start(self) -> None:
        """Set what lives only as long as this process: nothing here is saved."""
        self._backup: backends.Backup | None = None
        # what the first pass leaves for the second, by parameter: the ascent rule's old and new
        # state, and first gradients
        self._pending: dict[Tensor, tuple[dict[str, Tensor], dict[str, Tensor]]] = {}
        self._firsts: dict[Tensor, Tensor] = {}
        # ascent state of the step before, until its memory is used again
        self._spare: Any = WeakTensorKeyDictionary()
        self._sweeps = defaultdict[str, Sweep](Sweep)  # one for each pass
        self._made = 0  # layouts of the ascent that the descent's sweep knows of
        self._between_passes = False
        self._inside_step = self._inside_closure = False
        self._was_captured = False  # in a CUDA graph
        self._scalars: Tensor | None = None
        self._perturbs = True  # whether the present step, or the last, has two passes
        self._lam = 1.0
        self._scaler: GradScaler | None = None  # of the present step
        self._is_scaled = False  # whether the present step's gradients are, or the last one's
        self._was_scaled = False  # whether the device's scalars say so
        # the process group of replicas that have first gradients of their own
        self._replicas: Any = None
        self._saw_shards = False  # whether sharded parameters had a first gradient
        # gradients that the first pass left: parameter, gradient, its version
        self._seen: list[tuple[Tensor, weakref.ref[Tensor], int]] = []
        self._warned: set[str] = set()  # of what: once
        self._backends: dict[str, backends.Backend] = {}
        # as asked for, by device; None stands for several
        self._served: dict[tuple[str, torch.device | None], backends.Backend] = {}
        # for LETS: for which approximation to keep what the last step saw, and that
        self._records: str | None = None
        self._record: Record | None = None

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group, as in ``torch.optim``; its missing keys take the defaults.

        Raises:
            ValueError: If a hyper-parameter is out of range; nothing has been added then.
            RuntimeError: If DeepSpeed has partitioned a parameter (ZeRO, stage 3); the same.
        """
        self._check_group(self.defaults | param_group)
        super().add_param_group(param_group)
        try:
            check_partitioned(self.param_groups[-1]["params"])
            check_dtypes(self.param_groups[-1]["params"], self.rounding)
        except (RuntimeError, ValueError):
            self.param_groups.pop()
            raise

    def _check_group(self, group: dict[str, Any]) -> None:
        check_group(group, self._base is not None, self._ascent.scales)
        if self._ascent.name == "ema":
            check_theta(group["theta"])
        if self._base is not None and self._base.wide:
            check_uncorrected(group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of this class, or of the ``torch.optim`` base on its own.

        State tensors keep the dtype in which they were saved, so that a resumed run goes on
        exactly; group keys that the saved groups lack keep their present values.

        Raises:
            RuntimeError: Between ``first_step`` and ``second_step``.
            ValueError: If the groups do not match.
        """
        if self._between_passes:
            raise RuntimeError("expected second_step: load_state_dict cannot come between passes")
        self._sweeps.clear()
        self._made = 0
        before = self.param_groups
        loaded = state_dict

        def note(_: Optimizer, given: dict[str, Any]) -> None:
            nonlocal loaded
            loaded = given

        def complete(_: Optimizer) -> None:
            for old, new in zip(before, self.param_groups, strict=True):
                for key, value in old.items():
                    new.setdefault(key, value)
            saved_ids = chain.from_iterable(g["params"] for g in loaded["param_groups"])
            params = chain.from_iterable(g["params"] for g in self.param_groups)
            for saved_id, param in zip(saved_ids, params, strict=True):
                for key, value in loaded["state"].get(saved_id, {}).items():
                    held = self.state[param].get(key)
                    if isinstance(value, Tensor) and held is not None and held.dtype != value.dtype:
                        self.state[param][key] = value.to(held.device, copy=True)

        # as hooks: what the user's return is what counts, and what they find is complete
        handles = [
            self.register_load_state_dict_pre_hook(note),
            self.register_load_state_dict_post_hook(complete, prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for handle in handles:
                handle.remove()

    def __getstate__(self) -> dict[str, Any]:
        if self._between_passes:
            raise RuntimeError(
                "expected second_step: an optimizer cannot be copied or pickled between passes"
            )
        # hooks stay behind as in torch, and so does the wrapper that an LR scheduler puts on step
        kept = {
            key: value
            for key, value in self.__dict__.items()
            if key not in (*self._transient, "step", "base_optimizer") and key[-6:] != "_hooks"
        }
        base = self.base_optimizer.__getstate__()
        own = {key: x for key, x in base.items() if key not in ("state", "param_groups")}
        return kept | {"_base_parts": (type(self.base_optimizer), own)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        base, parts = state.pop("_base_parts", (None, {}))
        super().__setstate__(state)
        if base is not None:  # a copy, not load_state_dict
            self._start()
            self.base_optimizer = base.__new__(base)
        # The base goes on sharing both, and completes what older versions of torch saved. It takes
        # a parameter with any state for one that it has begun with.
        not_its = {MASTER}.union(*map(self._ascent.states, self.param_groups))
        begun = {
            key: held
            for key, held in self.state.items()
            if isinstance(held, dict) and not not_its.issuperset(held)
        }
        shared = {"state": defaultdict(dict, begun), "param_groups": self.param_groups}
        self.base_optimizer.__setstate__(parts | shared)
        self.base_optimizer.state = self.state

    # --- around a step ---

    @contextmanager
    def recording(self, hessian: str | None) -> Iterator[Callable[[], Record | None]]:
        """For LETS: keep what the step inside saw, until the end of the block.

        Args:
            hessian: The approximation that it is for; None keeps nothing.

        Yields a function that gives the second pass's batch, the copy of the weights where it is
        needed, and the step; None where nothing was perturbed or updated.
        """
        self._records = hessian
        try:
            yield lambda: self._record
        finally:
            self._records, self._record = None, None

    def _step_foreign(self) -> None:
        """Step a base that is not fused; it takes a parameter with any state for initialised."""
        names = self._ascent.states(self.param_groups[0])
        own = {
            param: {name: state.pop(name) for name in names if name in state}
            for param, state in self.state.items()
            if isinstance(param, Tensor)  # hooks may keep something under other keys
        }
        try:
            self.base_optimizer.step()
        finally:
            for param, state in own.items():
                self.state[param].update(state)

    def _warn_once(self, of: str, message: str) -> None:
        if of not in self._warned:
            self._warned.add(of)
            warn_user(message)

    def _end_step(self) -> None:
        """Forget what lives from the first pass to the second."""
        torch.clear_autocast_cache()  # of the perturbed weights, in a region around the step
        self._backup = None
        self._pending = {}
        self._firsts = {}
        self._seen = []
        self._scaler = None
        self._between_passes = False
        self._inside_closure = False

    def _run_hooks(self, when: str) -> None:
        """Run torch's step hooks around explicit passes; inside ``step`` torch runs them."""
        if self._inside_step:
            return
        hooks: tuple[Any, Any]
        if when == "pre":  # in torch's order
            hooks = torch_optimizer._global_optimizer_pre_hooks, self._optimizer_step_pre_hooks
        else:
            hooks = self._optimizer_step_post_hooks, torch_optimizer._global_optimizer_post_hooks
        for some in hooks:
            for hook in some.values():
                hook(self, (), {})
