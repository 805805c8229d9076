"""What replays of a captured step take for granted, compared before each of them.

A graph holds addresses and numbers, and decisions that Python took once. A replay would leave out
in silence whatever has changed since.
"""

from collections.abc import Mapping, Sequence
from itertools import chain
from operator import attrgetter, itemgetter
from typing import Any

from torch import Tensor, nn
from torch.optim import optimizer as torch_optimizer

from .batch import identical
from .capture import refuse
from .checkpoint import is_own
from .hooks import Notice, Observer
from .settings import Setting
from .takeover import Guard

#: Keys of groups that no step reads.
NOT_READ = frozenset(("params", "param_names", "initial_lr"))
AGAIN = "Call fastsam.graphed again, which captures the step as it is now"
_needs_grad = attrgetter("requires_grad")
_is_training = attrgetter("training")
#: What has changed, and what is to be done about it.
Change = tuple[str, str]


class Assumptions:
    """What holds of an optimizer and its surroundings when its step is captured.

    It keeps the tensors alive, as the graph writes to their memory.

    Args:
        optimizer: One of fastsam's, with all of its state.
        modules: Those that the closure runs, as far as is known.

    Raises:
        RuntimeError: If its base keeps numbers on the host.
    """

    def __init__(self, optimizer: Any, modules: Sequence[nn.Module]) -> None:
        groups = optimizer.param_groups
        self._lists = [list(group["params"]) for group in groups]
        self._params = list(chain.from_iterable(self._lists))
        self._device = self._params[0].device
        self._state = _state_values(optimizer)
        if hosted := [x for x in self._state if not isinstance(x, Tensor)]:
            base = type(optimizer.base_optimizer).__name__
            raise refuse(
                type(optimizer).__name__,
                f"{base} keeps {hosted[0]!r} in its state, which is on the host",
            )
        self._before = {param: dict(state) for param, state in optimizer.state.items()}
        self._kept = dict(optimizer.kept)
        # State's memory is replaced, if ever, along with everyone's, as by a cast: of each kind two
        # are looked at in every step.
        watched: dict[str, list[Tensor]] = {}
        for state in self._before.values():
            for key, x in state.items():
                watched[key] = [*watched.get(key, [])[:1], x]
        self._watched = [*self._params, *chain.from_iterable(watched.values())]
        self._addresses = list(map(Tensor.data_ptr, self._watched))
        self._state_addresses = list(map(Tensor.data_ptr, self._state))
        self._needs_grad = list(map(_needs_grad, self._params))
        self._options = [_Options(group, self._device) for group in groups]
        names = {k for cls in type(optimizer).__mro__ for k, x in vars(cls).items()
                 if isinstance(x, Setting)}  # fmt: skip
        self._settings = {name: vars(optimizer).get(name) for name in sorted(names)}
        self._mode = optimizer._mode
        self._modules = list(modules)
        self._training = list(map(_is_training, self._modules))

    def check(self, optimizer: Any) -> None:
        """Before a replay.

        Raises:
            RuntimeError: If something has changed since the capture, which it names.
        """
        if (change := self.changed(optimizer)) is not None:
            what, advice = change
            raise RuntimeError(
                f"{type(optimizer).__name__}: {what} since its step was captured in a CUDA graph, "
                f"and a replay would repeat the old step. {advice}"
            )

    def changed(self, optimizer: Any) -> Change | None:
        """What has changed; None where nothing has."""
        return (
            self._of_parameters(optimizer)
            or self._of_settings(optimizer)
            or self._of_calls(optimizer)
        )

    def _of_parameters(self, optimizer: Any) -> Change | None:
        """Parameters and state: the same tensors, where they were."""
        lists = [group["params"] for group in optimizer.param_groups]
        if len(lists) != len(self._lists) or not all(map(identical, lists, self._lists)):
            return "param_groups have got other parameters or groups", AGAIN
        state = _state_values(optimizer)
        if not identical(state, self._state):  # other tensors in the same memory would do
            addresses = [x.data_ptr() if isinstance(x, Tensor) else None for x in state]
            if addresses != self._state_addresses:
                return "the state has got other tensors, as by load_state_dict,", AGAIN
        if list(map(Tensor.data_ptr, self._watched)) != self._addresses:
            return "a parameter or its state has moved in memory", AGAIN
        if list(map(_needs_grad, self._params)) != self._needs_grad:
            return "requires_grad of a parameter has changed", AGAIN
        return None

    def _of_settings(self, optimizer: Any) -> Change | None:
        """Hyper-parameters and settings."""
        for i, (options, group) in enumerate(
            zip(self._options, optimizer.param_groups, strict=True)
        ):
            if (change := options.changed(group)) is not None:
                what, advice = change
                return what.format(group=f"group {i}"), advice
        held = vars(optimizer)
        for name, value in self._settings.items():
            now = held.get(name)
            if now is not value and now != value:
                return f"{name} was {value!r} and has become {now!r}", AGAIN
        return None

    def _of_calls(self, optimizer: Any) -> Change | None:
        """What a call has switched."""
        if optimizer._mode != self._mode:
            advice = "Call train() before a step" if self._mode == "train" else AGAIN
            return f"{optimizer._mode}() of the optimizer was called", advice
        if list(map(_is_training, self._modules)) != self._training:
            return "train() or eval() of a module was called", "Put it into the mode that it had"
        if has_loss_scale(optimizer):
            return "grad_scale or found_inf was set", "A graphed step serves no loss scale"
        if has_hooks(optimizer):
            return "a step hook was registered", "Remove it: a replay runs no Python"
        return None

    def put_back(self, optimizer: Any) -> None:
        """After a capture that failed: what it has changed on the host."""
        for options, group in zip(self._options, optimizer.param_groups, strict=True):
            group.update(zip(options.names, options.values, strict=True))
        for param in optimizer.state.keys() - self._before.keys():
            del optimizer.state[param]
        for param, state in self._before.items():
            held = optimizer.state[param]
            held.clear()
            held.update(state)
        optimizer.kept.update(self._kept)


class _Options:
    """The hyper-parameters of one group, as a graph has them.

    Those that are tensors on the device are read in every replay. All others are numbers in it.
    """

    def __init__(self, group: Mapping[str, Any], device: Any) -> None:
        self.names = [key for key in group if key not in NOT_READ and not is_own(key)]
        self._device = device
        self._read = itemgetter(*self.names, "params")  # a tuple in any case
        self.values = self._read(group)[:-1]
        self._fixed = list(map(self._fix, self.values))
        # else equal objects may hold other numbers
        self._is_plain = not any(isinstance(x, (Tensor, list, tuple)) for x in self.values)

    def changed(self, group: Mapping[str, Any]) -> Change | None:
        """What has changed, with ``{group}`` for the group's name."""
        try:
            values = self._read(group)[:-1]
        except KeyError as error:
            return f"{error.args[0]} of {{group}} was removed", AGAIN
        if self._is_plain and identical(values, self.values):
            return None
        for name, value, fixed in zip(self.names, values, self._fixed, strict=True):
            if self._fix(value) == fixed:
                continue
            if isinstance(fixed, _Place):
                advice = f"Write to the tensor that {name} was, as by fill_"
                return f"{name} of {{group}} has become another object", advice
            return (
                f"{name} of {{group}} was {fixed!r} and has become {value!r}",
                f"Let {name} be a tensor on the device from the start, and write to it, if the "
                "optimizer takes one. Else call fastsam.graphed again",
            )
        return None

    def _fix(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            here = value.device == self._device
            return _Place(value.data_ptr()) if here else value.tolist()
        if isinstance(value, (list, tuple)):
            return tuple(map(self._fix, value))
        return value


class _Place(int):
    """An address on the device."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Place) and int(self) == int(other)

    __hash__ = int.__hash__


def _state_values(optimizer: Any) -> list[Any]:
    """State by parameter, and the optimizer's own numbers that are on the device."""
    values = list(chain.from_iterable(map(dict.values, optimizer.state.values())))
    return values + [x for x in optimizer.kept.values() if isinstance(x, Tensor)]


def has_loss_scale(optimizer: Any) -> bool:
    """Whether the optimizer was given a loss scale, or a reason to skip its step."""
    return any(getattr(optimizer, name, None) is not None for name in ("grad_scale", "found_inf"))


def has_hooks(optimizer: Any) -> bool:
    """Whether hooks run around a step, which a replay would leave out."""
    base = optimizer.base_optimizer
    hooks = chain(
        torch_optimizer._global_optimizer_pre_hooks.values(),
        torch_optimizer._global_optimizer_post_hooks.values(),
        optimizer._optimizer_step_pre_hooks.values(),
        optimizer._optimizer_step_post_hooks.values(),
        *(member._optimizer_step_pre_hooks.values() for member in _members(base)),
        *(member._optimizer_step_post_hooks.values() for member in _members(base)),
    )
    return not all(isinstance(hook, (Guard, Notice, Observer)) for hook in hooks)


def _members(base: Any) -> list[Any]:
    return [base, *getattr(base, "fused_members", ())]


# --- what a closure returns ------------------------------------------------------------------


def is_served(x: Any) -> bool:
    """Whether a replay renews it: tensors, also in tuples, lists and dicts."""
    if isinstance(x, dict):
        return all(map(is_served, x.values()))
    if isinstance(x, (list, tuple)):
        return all(map(is_served, x))
    return x is None or isinstance(x, Tensor)


def detached(x: Any) -> Any:
    """The same without autograd's graph, whose memory it would keep."""
    if isinstance(x, Tensor):
        return x.detach()
    if isinstance(x, dict):
        return {key: detached(value) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        parts = map(detached, x)
        return type(x)(*parts) if hasattr(x, "_fields") else type(x)(parts)
    return x
