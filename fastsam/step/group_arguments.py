"""Where the hyper-parameters in parameter groups are checked: when they come, and in every step."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from decimal import Decimal
from itertools import chain
from numbers import Real
from operator import is_, itemgetter
from typing import Any

from torch import Tensor

from .arguments import FLAG, POSITIVE, Argument, Flag, Number, refuse

#: Group keys that every optimizer has, and the learning rate of whatever base there is.
COMMON: dict[str, Argument] = {
    "rho": POSITIVE, "adaptive": FLAG, "eta": POSITIVE, "perturb": FLAG,
    "lr": Number(tensors="one element", keeps_shape=True, others=True),
}  # fmt: skip
UNSCALED: dict[str, Argument] = {
    "adaptive": Flag(only=False, why=": the perturbation has no element-wise scale")
}
FUSED: dict[str, Argument] = {
    "differentiable": Flag(only=False, why=" with a fused base optimizer")
}


def settle(group: dict[str, Any], arguments: Mapping[str, Argument], look: bool = True) -> None:
    """Check the keys that a group has, and put the values into it that are kept.

    Raises:
        ValueError: If one is not allowed; nothing has changed then.
    """
    kept = {
        key: argument(key, group[key], look) for key, argument in arguments.items() if key in group
    }
    group.update((key, value) for key, value in kept.items() if value is not group[key])


#: In the place of a value that has to be looked at: a tensor on a CPU may change where it is.
UNSEEN = object()
Rule = Any


def _is_steady(value: Any) -> bool:
    """Whether the host cannot find another value in the same object."""
    if isinstance(value, Tensor):
        return value.device.type != "cpu"
    return all(map(_is_steady, value)) if type(value) is tuple else type(value) is not list


class Known:
    """What a group was found to be, so that a step looks at what has been replaced alone.

    Args:
        group: Of which this is.
        arguments: By key.
        checks: Of its rules.
    """

    def __init__(
        self,
        group: dict[str, Any],
        arguments: Mapping[str, Argument],
        checks: Sequence[Callable[[Mapping[str, Any]], None]],
    ) -> None:
        self.group, self.checks = group, checks
        self.keys = [key for key in arguments if key in group]
        self._arguments = [arguments[key] for key in self.keys]
        self.find = itemgetter(*self.keys or ("",))
        self.values = [UNSEEN] * len(self.keys)

    def check_changed(self) -> None:
        """Check the values that are not those of the last time."""
        for k, key in enumerate(self.keys):
            value = self.group[key]
            if value is not self.values[k]:
                kept = self.group[key] = self._arguments[k](key, value, look=False)
                self.values[k] = kept if _is_steady(kept) else UNSEEN


class GroupArguments:
    """The hyper-parameters of an optimizer's groups.

    Args:
        ascent, descent: The optimizer's rules, which say what theirs may be, as bases do.
    """

    def __init__(self, ascent: Rule, descent: Rule) -> None:
        self._rules = ascent, descent
        self._shared = () if descent is None else tuple(descent.arguments)
        self._of: dict[Rule, tuple[dict[str, Argument], list[Any]]] = {}  # by base
        self._known: list[Known] = []

    def of(self, base: Rule) -> tuple[dict[str, Argument], list[Any]]:
        """Arguments by key, and rules' own checks, of groups with this base; None is not fused."""
        found = self._of.get(base)
        if found is None:
            arguments = dict(COMMON)
            rules = [rule for rule in (*self._rules, base) if rule is not None]
            for rule in rules:
                arguments |= rule.arguments
            arguments |= {} if base is None else FUSED
            arguments |= {} if self._rules[0].scales else UNSCALED
            checks = [rule.check for rule in rules if rule.check is not None]
            found = self._of[base] = arguments, checks
        return found

    def check(self, group: dict[str, Any], base: Rule, complete: bool) -> None:
        """A group that is new, with the values of its tensors.

        Args:
            group: Present keys are checked; floats and bools are put in the place of their like.
            base: The declaration of its base optimizer; None of one that is not fused.
            complete: Whether it has all keys.
        """
        arguments, checks = self.of(base)
        settle(group, arguments)
        if complete:
            for check in checks:
                check(group)

    def check_again(
        self,
        groups: Sequence[dict[str, Any]],
        base_of: Callable[[dict[str, Any]], Rule],
        defaults: Mapping[str, Any],
    ) -> None:
        """All groups, in a step: what has been replaced since the last one, without any waiting.

        Args:
            groups: The optimizer's.
            base_of: Gives the base of a group, as :meth:`check` takes it.
            defaults: For groups that were given to the base alone, or assigned.
        """
        known = self._known
        changed = len(known) != len(groups)
        if changed:
            known = self._known = [Known({}, {}, [])] * len(groups)
        for k, group in enumerate(groups):
            one = known[k]
            try:
                same = one.group is group and all(map(is_, one.find(group), one.values))
            except KeyError:  # which has been deleted
                same = False
            if not same:
                if one.group is not group or not all([key in group for key in one.keys]):
                    if "adaptive" not in group:
                        for key, value in defaults.items():
                            group.setdefault(key, value)
                    one = known[k] = Known(group, *self.of(base_of(group)))
                one.check_changed()
                changed = True
            for check in one.checks:
                check(group)
        for key in self._shared if changed else ():  # u is one mixture over all groups
            for group in groups:
                if group[key] != groups[0][key]:
                    raise refuse(key, f"that of the first group, {groups[0][key]!r}", group[key])


@contextmanager
def named(base: type, *given: Mapping[str, Any]) -> Iterator[None]:
    """In the block, say which argument a base that is not fused fails for with a TypeError.

    It may take what it likes, so that nothing is refused for which it does not fail.

    Args:
        base: Its class; a default that is a number says that other values have to be numbers.
        given: Arguments, or groups.

    Raises:
        ValueError: In the place of the TypeError, where an argument is found.
    """
    try:
        yield
    except TypeError as error:
        parameters = inspect.signature(base).parameters
        for key, value in chain.from_iterable(map(dict.items, map(dict, given))):
            default = parameters[key].default if key in parameters else None
            if default is inspect.Parameter.empty and key == "lr":
                default = 0.0
            if type(default) in (float, int) and not _is_number(value):
                raise refuse(key, "a number or a tensor of one", value) from error
            if type(default) is tuple and default and all(map(_is_number, default)):
                listed = isinstance(value, (tuple, list)) and len(value) == len(default)
                if not listed or not all(map(_is_number, value)):
                    raise refuse(key, f"{len(default)} numbers", value) from error
        raise


def _is_number(value: Any) -> bool:
    return isinstance(value, (Real, Decimal, Tensor))
