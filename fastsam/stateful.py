"""What an optimizer holds: groups, checkpoints and copies, and the tensors of a pass."""

import sys
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

from fastsam.kernels.layout import Scalar

from . import backends
from .bases import Base
from .capture import check_state, is_captured, refuse
from .checks import check_group, check_theta, check_uncorrected
from .precision import check_dtypes, find_masters, find_places
from .rules import Ascent, Batch, Step
from .sweep import Prepared, Sweep

Function = TypeVar("Function", bound=Callable[..., Any])

#: What LETS needs of a step: the second pass's batch, perhaps the old weights, and the step.
Record = tuple[Batch, backends.Backup | None, Step]


def _holders(tensors: dict[str, Tensor], name: str) -> int:
    """How often a tensor is referred to, up to a constant of the interpreter's."""
    return sys.getrefcount(tensors[name])


ALONE = _holders({"": torch.empty(0)}, "")


def uncompiled(function: Function) -> Function:
    """Make the function a graph break inside ``torch.compile``; what it calls is not traced.

    torch's own optimizers use the first of these, which imports the compiler when it is needed.
    """
    disable = getattr(torch, "_disable_dynamo", torch.compiler.disable)
    return cast(Function, disable(function))


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
                  "_was_scaled", "_scaler", "_seen", "_warned")  # fmt: skip

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
        # gradients that the first pass left: parameter, gradient, its version
        self._seen: list[tuple[Tensor, weakref.ref[Tensor], int]] = []
        self._warned = False  # of a misuse: once
        self._backends: dict[str, backends.Backend] = {}
        self._served: dict[tuple[str, torch.device], backends.Backend] = {}  # as asked for
        # for LETS: for which approximation to keep what the last step saw, and that
        self._records: str | None = None
        self._record: Record | None = None

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group, as in ``torch.optim``; its missing keys take the defaults.

        Raises:
            ValueError: If a hyper-parameter is out of range; nothing has been added then.
        """
        self._check_group(self.defaults | param_group)
        super().add_param_group(param_group)
        try:
            check_dtypes(self.param_groups[-1]["params"], self.rounding)
        except ValueError:
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
        super().load_state_dict(state_dict)
        for old, new in zip(before, self.param_groups, strict=True):
            for key, value in old.items():
                new.setdefault(key, value)
        saved_ids = chain.from_iterable(g["params"] for g in state_dict["param_groups"])
        params = chain.from_iterable(g["params"] for g in self.param_groups)
        for saved_id, param in zip(saved_ids, params, strict=True):
            for key, value in state_dict["state"].get(saved_id, {}).items():
                held = self.state[param].get(key)
                if isinstance(value, Tensor) and held is not None and held.dtype != value.dtype:
                    self.state[param][key] = value.to(held.device, copy=True)

    def __getstate__(self) -> dict[str, Any]:
        if self._between_passes:
            raise RuntimeError(
                "expected second_step: an optimizer cannot be copied or pickled between passes"
            )
        # hooks stay behind as in torch, and so does the wrapper that an LR scheduler puts on step
        return {
            key: value
            for key, value in self.__dict__.items()
            if key not in (*self._transient, "step") and not key.endswith("_hooks")
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_backends" not in self.__dict__:  # a copy, not load_state_dict
            self._start()
        # the base goes on sharing both, and completes groups that older versions of torch saved
        self.base_optimizer.__setstate__({"state": self.state, "param_groups": self.param_groups})

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
        }
        try:
            self.base_optimizer.step()
        finally:
            for param, state in own.items():
                self.state[param].update(state)

    def _end_step(self) -> None:
        """Forget what lives from the first pass to the second."""
        self._backup = None
        self._pending = {}
        self._firsts = {}
        self._seen = []
        self._scaler = None
        self._between_passes = False

    def _run_hooks(self, when: str) -> None:
        """Run torch's step hooks around explicit passes; inside ``step`` torch runs them."""
        if self._inside_step:
            return
        own = getattr(self, f"_optimizer_step_{when}_hooks")
        everyone = getattr(torch_optimizer, f"_global_optimizer_{when}_hooks")
        for hook in chain(own.values(), everyone.values()):
            hook(self, (), {})

    # --- the tensors of a pass ---

    @property
    def _is_static(self) -> bool:
        """Whether the host decides nothing anew in every step."""
        return True

    @property
    def _kept_scalars(self) -> dict[str, Scalar]:
        """Device scalars that are state, by their keys in the first group."""
        kept = {}
        if self._base is not None and self._base.needs_norm:
            kept["squared_norms"] = Scalar.SQUARED_NORMS
        if self.rounding == "stochastic":
            kept["rounding_step"] = Scalar.ROUNDING_STEP
        return kept

    def _collect(self, which: str = "other") -> Batch:
        """The parameters that have a gradient in this pass, each once, checked."""
        again = which == "descent" and self._between_passes
        batch = self._sweeps[which].collect(self.param_groups, type(self).__name__, again)
        if which == "ascent" and self._sweeps[which].made != self._made:
            self._made = self._sweeps[which].made
            self._sweeps.pop("descent", None)  # which does not look at everything again
        if self.master_weights:
            batch.masters = find_masters(type(self).__name__, batch, self.state)
        elif self.rounding == "stochastic":
            batch.places = find_places(batch, self.param_groups)
        return batch

    @property
    def _is_bare(self) -> bool:
        """Whether no step has been taken, and every learning rate is 0."""
        rates = [group.get("lr") for group in self.param_groups]
        return not self.state and all(lr is not None and float(lr) == 0 for lr in rates)

    def _create_state(self) -> None:
        """What a first step would create: ``torch.distributed.checkpoint`` asks for it so."""
        batch = self._collect()
        if self._base is None:
            self.base_optimizer.step()
        elif batch.params:
            self._prepare(batch, self._base)
        for param, i in zip(batch.params, batch.groups, strict=True):
            ascent = self._ascent.state(self.state[param], param, self.param_groups[i])
            self.state[param].update(ascent)
        self._scalars_for(batch)

    def _check_capture(self, batch: Batch) -> None:
        """Under capture in a CUDA graph: whether the step can be replayed.

        Raises:
            RuntimeError: If it cannot.
        """
        if not is_captured(batch):
            return
        name = type(self).__name__
        if not self._is_static:
            raise refuse(name, "a lam that changes by schedule, perturb_every, start and stop are "
                               "decided on the host in every step")  # fmt: skip
        if self._base is None and self.skip_nonfinite:
            raise refuse(name, "skip_nonfinite has to ask the device whether its base may step")
        if self._scalars is None:
            raise refuse(name, "it has taken no step outside, which creates its state")
        check_state(name, batch, self._base, self._ascent, self.param_groups, self.state)

    def _prepare(self, batch: Batch, base: Base) -> None:
        """Find the base's state of every parameter, and create what is missing."""
        assert batch.layout is not None
        held = batch.layout.cache.get("prepared")
        everything = self.state.values()
        if held is not None and held.is_current(base, self.param_groups, everything):
            batch.states, batch.prepared = held.states, held
            batch.fresh = [False] * len(batch.params)
            return
        batch.layout.cache.pop("prepared", None)
        for param, grad, i in zip(batch.params, batch.grads, batch.groups, strict=True):
            state = self.state[param]
            batch.states.append(state)
            wide = bool(batch.masters) and batch.masters[len(batch.fresh)] is not None
            batch.fresh.append(base.prepare(state, param, grad, self.param_groups[i], wide))
        if not any(batch.fresh):
            batch.prepared = Prepared(batch, base, self.param_groups, everything)
            batch.layout.cache["prepared"] = batch.prepared

    def _room_for(self, param: Tensor, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Memory for the ascent rule's next state.

        On a CPU the state before last gives its own, where nobody else holds it: fresh pages cost
        as much as writing to them. GPUs have torch's allocator for that.
        """
        spare = self._spare.pop(param, {})
        room = {}
        for name, x in state.items():
            y = spare.get(name)
            layout = param.shape, param.stride(), x.dtype
            fits = y is not None and (y.shape, y.stride(), y.dtype) == layout
            del y
            if fits and _holders(spare, name) == ALONE and backends.is_alone(spare[name]):
                room[name] = spare[name]
            else:
                room[name] = torch.empty_like(param, dtype=x.dtype)
        return room

    def _backend_for(self, batch: Batch) -> backends.Backend:
        device = batch.params[0].device
        served = self._served.get((self.backend, device))
        if served is None:
            name = backends.resolve(self.backend, device)
            if name not in self._backends:
                self._backends[name] = backends.create(name)
            served = self._served[self.backend, device] = self._backends[name]
        return served

    def _scalars_for(self, batch: Batch) -> Tensor:
        """The device scalars. Those that are state are views of them in the first group."""
        if batch.params:
            device = batch.params[0].device
        else:
            device = torch.device("cpu") if self._scalars is None else self._scalars.device
        if self._scalars is None or self._scalars.device != device:
            self._scalars = backends.new_scalars(device)
        group = self.param_groups[0]
        for key, scalar in self._kept_scalars.items():
            slot, held = self._scalars[scalar], group[key]
            if not (isinstance(held, Tensor) and held.data_ptr() == slot.data_ptr()):
                if isinstance(held, Tensor) and held.device.type != "cpu":
                    slot.copy_(held)
                else:  # filled in: a copy from the host would wait for the device
                    slot.fill_(float(held))
                group[key] = slot
        return self._scalars

    def _take_over(self, batch: Batch, cleared: bool) -> dict[Tensor, Tensor]:
        """The gradients, kept for later; copied, unless nobody else can write to them.

        That is so where they are about to be set to None and own their memory: DDP's, for one, may
        be views of buckets that the next backward fills again.
        """
        kept = {}
        for param, grad in zip(batch.params, batch.grads, strict=True):
            size = grad.numel() * grad.element_size()
            alone = not grad._is_view() and grad.untyped_storage().nbytes() == size
            kept[param] = grad if cleared and alone else grad.clone()
        return kept
