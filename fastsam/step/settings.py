"""Attributes of an optimizer that are checked whenever they are set."""

import inspect
from collections.abc import Callable
from typing import Any

from .arguments import Argument

#: Of settings that decide what state there is.
OF_STATE = "state depends on it; construct another optimizer and load the state dict"
#: Of those that decide how the tables on the device are made.
OF_TABLES = "construct another optimizer and load the state dict"


class Setting:
    """An attribute that is checked whenever it is set.

    It has no ``__get__``, so that reading costs what it costs of any other attribute.

    Args:
        argument: What it may be.
        fixed: Why it cannot change after construction. Default: it can.
        then: Called with the owner and the value before that is taken over; may raise.
    """

    def __init__(
        self,
        argument: Argument,
        fixed: str = "",
        then: Callable[[Any, Any], None] | None = None,
    ) -> None:
        self._argument, self._fixed, self._then = argument, fixed, then

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __set__(self, owner: Any, value: Any) -> None:
        name, held = self._name, owner.__dict__
        value = self._argument(name, value)
        if self._fixed and name in held and value != held[name]:
            raise AttributeError(
                f"{name} must stay {held[name]!r} after construction, got {value!r}: {self._fixed}"
            )
        if self._then is not None:
            self._then(owner, value)
        held[name] = value


def setting(
    argument: Argument, fixed: str = "", then: Callable[[Any, Any], None] | None = None
) -> Any:
    """A :class:`Setting`, for type checkers of the attribute's own type."""
    return Setting(argument, fixed, then)


def complete_settings(owner: Any) -> None:
    """Give settings that are not there, as in a pickle of an older version, their defaults.

    These are the constructors': each is an argument of the class that has it, or of a parent.
    """
    held, classes = vars(owner), type(owner).__mro__
    settings = {k for cls in classes for k, x in vars(cls).items() if isinstance(x, Setting)}
    if not (missing := settings - held.keys()):
        return
    for cls in classes:
        if "__init__" in vars(cls):
            parameters = inspect.signature(cls.__init__).parameters  # type: ignore[misc]
            for name in missing & parameters.keys() - held.keys():
                if parameters[name].default is not inspect.Parameter.empty:
                    held[name] = parameters[name].default
