"""What a pass works on: tensors with gradients, their state, and the device's scalars."""

import sys
from collections.abc import Iterable

import torch
from torch import Tensor

from fastsam.kernels.layout import Scalar

from . import backends
from .bases import Base
from .capture import check_state, is_captured, refuse
from .precision import find_masters, find_places
from .rules import Batch
from .sharding import check_shards, is_sharded, local_state
from .stateful import StatefulOptimizer
from .sweep import Prepared


def _holders(tensors: dict[str, Tensor], name: str) -> int:
    """How often a tensor is referred to, up to a constant of the interpreter's."""
    return sys.getrefcount(tensors[name])


ALONE = _holders({"": torch.empty(0, device="cpu")}, "")


def _of_one(tensors: list[Tensor], k: int) -> int:
    return sys.getrefcount(tensors[k])


def _of_a_gradient() -> int:
    param = torch.empty(0, requires_grad=True, device="cpu")
    param.grad = torch.empty_like(param)
    return _of_one([param.grad], 0)


#: How often a gradient is referred to that is a parameter's, and in one list.
UNSHARED = _of_a_gradient()


#: An ascent rule's state of one parameter: before the step, and room for the next.
AscentState = tuple[dict[str, Tensor], dict[str, Tensor]]


class GatheringOptimizer(StatefulOptimizer):
    """Finds, checks and creates the tensors of a pass."""

    @property
    def _is_static(self) -> bool:
        """Whether the host decides nothing anew in every step."""
        return True

    @property
    def _kept_scalars(self) -> dict[str, Scalar]:
        """Device scalars that are state, by their keys in the first group."""
        kept: dict[str, Scalar] = {}
        if self._base is not None and self._base.needs_norm:
            kept["squared_norms"] = Scalar.SQUARED_NORMS
        if self.rounding == "stochastic":
            kept["rounding_step"] = Scalar.ROUNDING_STEP
        return kept

    def _collect(self, which: str = "other") -> Batch:
        """The parameters that have a gradient in this pass, each once, checked."""
        before = None
        if which == "descent" and self._between_passes:
            before = self._sweeps["ascent"]
        batch = self._sweeps[which].collect(self.param_groups, type(self).__name__, before)
        if which == "ascent" and self._sweeps[which].made != self._made:
            self._sweeps.pop("descent", None)  # which does not look at everything again
            self._made = self._sweeps[which].made
        if self.master_weights:
            batch.masters = find_masters(type(self).__name__, batch, self.state)
        elif self.rounding == "stochastic":
            batch.places = find_places(batch, self.param_groups)
        return batch

    def _ascent_state_of(self, batch: Batch) -> dict[Tensor, AscentState]:
        """The ascent rule's state and room for the next, by parameter; the batch gets its part."""
        found: dict[Tensor, AscentState] = {}
        for param, i in zip(batch.owners, batch.groups, strict=True):
            old = self._ascent.state(self.state.get(param, {}), param, self.param_groups[i])
            check_shards(old, param)
            found[param] = old, self._room_for(param, old)
        batch.ascent = [local_state(old) for old, _ in found.values()]
        batch.next = [local_state(new) for _, new in found.values()]
        return found

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
        for param, i in zip(batch.owners, batch.groups, strict=True):
            ascent = self._ascent.state(self.state.get(param, {}), param, self.param_groups[i])
            if ascent:
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
        if batch.layout is not None and batch.layout.spreads:
            raise refuse(name, "its parameters lie on several devices")
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
        for param, grad, i in zip(batch.owners, batch.grads, batch.groups, strict=True):
            state = self.state.get(param, {})
            wide = bool(batch.masters) and batch.masters[len(batch.fresh)] is not None
            batch.fresh.append(state.get("momentum_buffer") is None)  # should the next line fail
            batch.fresh[-1] = base.prepare(state, param, grad, self.param_groups[i], wide)
            if state:  # as in torch, a parameter without state has no entry
                self.state[param] = state
            check_shards(state, param)
            batch.states.append(local_state(state))
        if not any(batch.fresh) and not any(map(is_sharded, batch.owners)):
            batch.prepared = Prepared(batch, base, self.param_groups, everything)
            batch.layout.cache["prepared"] = batch.prepared

    def _room_for(self, param: Tensor, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Memory for the ascent rule's next state.

        On a CPU the state before last gives its own, where nobody else holds it: fresh pages cost
        as much as writing to them. GPUs have torch's allocator for that.
        """
        spare = {} if is_sharded(param) else self._spare.pop(param, {})
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
        spreads = batch.layout is not None and batch.layout.spreads
        key = self.backend, None if spreads else device
        served = self._served.get(key)
        if served is None:
            if spreads:
                served = backends.SeveralDevices(self.backend)
            else:
                name = backends.resolve(self.backend, device)
                served = self._backends.setdefault(name, backends.create(name))
            self._served[key] = served
        return served

    def _scalars_for(self, batch: Batch) -> Tensor:
        """The device scalars. Those that are state are views of them in the first group."""
        devices = {} if batch.layout is None else batch.layout.members
        if self._scalars is None or (devices and self._scalars.device not in devices):
            self._scalars = backends.new_scalars(next(iter(devices), torch.device("cpu")))
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

    def _set_aside(self, ours: Iterable[Tensor]) -> dict[Tensor, Tensor]:
        """The gradients themselves, by parameter, such that no backward pass writes to them."""
        kept = self._take_over(self._collect(), cleared=True, ours=ours)
        return {p: p.grad if is_sharded(p) and p.grad is not None else x for p, x in kept.items()}

    def _take_over(
        self, batch: Batch, cleared: bool, ours: Iterable[Tensor] = ()
    ) -> dict[Tensor, Tensor]:
        """The gradients, kept for later; copied, unless nobody else can write to them.

        ``ours`` are those of which the caller has another list.

        That is so where they are about to be set to None, and neither they nor their memory are
        known elsewhere: DDP's, for one, may be views of buckets that the next backward fills again,
        and a closure may give out the same tensors in every call.
        """
        kept, ids = {}, set(map(id, ours))
        for k, param in enumerate(batch.owners):
            known = UNSHARED + (id(batch.grads[k]) in ids)
            alone = _of_one(batch.grads, k) <= known  # before the next line makes another
            grad = batch.grads[k]
            # a shard is its DTensor's as well
            alone = is_sharded(param) or (alone and backends.is_alone(grad))
            size = grad.numel() * grad.element_size()
            alone = alone and not grad._is_view() and grad.untyped_storage().nbytes() == size
            kept[param] = grad if alone and cleared else grad.clone()
        return kept
