"""Keeping signals out of the moments in which weights and state change together.

Python runs the handlers of signals in the main thread, between two instructions of whatever runs
there. One that raises, as Ctrl-C's does and a cluster's SIGTERM's may, would leave half a step.
Blocking the signals for this thread (``pthread_sigmask``) would not help: the system may give them
to another thread of the process, and Python would run the handlers here all the same. So the
handlers themselves are replaced for the time.
"""

# the module behind ``signal``, which tries to make an enum of every handler: 20 us a step
import _signal  # type: ignore[import-not-found]
import _thread
import threading
from collections import deque
from functools import partial
from itertools import compress, repeat
from types import FrameType
from typing import Any

#: Those that may have handlers: 60 on Linux, half of them on macOS, seven on Windows.
SIGNALS = tuple(
    sorted(
        {int(number) for number in _signal.valid_signals()}
        - {getattr(_signal, name, None) for name in ("SIGKILL", "SIGSTOP")}
    )
)


def _is_main_interpreter() -> bool:
    """Whether this is the interpreter that runs handlers: not a sub-interpreter."""
    try:
        return bool(_thread._is_main_interpreter())  # type: ignore[attr-defined,unused-ignore]
    except AttributeError:  # before Python 3.12
        pass
    try:
        import _xxsubinterpreters as interpreters  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        return True
    return bool(interpreters.get_current() == interpreters.get_main())


_HANDLES_SIGNALS = _is_main_interpreter()

# What follows is touched by the main thread alone. Any of its lines may be the one before which
# Python runs a handler, which may raise; what must not be torn apart is therefore one assignment,
# or one call that runs in C from end to end.

#: The block that holds signals back now. One assignment to it begins that, and one ends it.
_holder: "uninterrupted | None" = None
#: Calls of handlers that are due.
_due: deque[partial[Any]] = deque()


class uninterrupted:  # noqa: N801 - used like a function
    """Hold back every signal that Python handles until the block has ended.

    The handlers are called then, in the order in which the signals came, each as often as Python
    saw its signal. If one raises, the others are called nevertheless; the exception that propagates
    is that of the last one that raised, with the others as its ``__context__``, as if each had come
    while the one before was being handled.

    Before the block begins and after it has ended a handler is called at once, whatever else
    happens: a handler that raises while handlers are replaced or put back is no exception to that.
    One that the block itself sets stays.

    Outside the main thread, and in sub-interpreters, Python runs no handlers, and there is nothing
    to hold back. A block inside another one changes nothing.

    Two things that Python gives no way to ask for are not put back: what ``signal.siginterrupt``
    set, and a handler that is no Python function and was installed over one that is
    (``faulthandler.register``).

    Args:
        insists: Enter the block even if a handler raises while handlers are replaced: what it
            raised is raised when the block has ended. For what has to be undone in any case.
    """

    def __init__(self, insists: bool = False) -> None:
        self._handlers: dict[int, Any] = {}  # that this one stands for
        self._attempts = len(SIGNALS) if insists else 1
        self._is_over = False

    def __enter__(self) -> None:
        if not _HANDLES_SIGNALS or threading.get_ident() != threading.main_thread().ident:
            return
        if _holder is None:
            self._begin()

    def _begin(self) -> None:
        global _holder
        try:
            numbers = list(compress(SIGNALS, map(callable, map(_signal.getsignal, SIGNALS))))
            if self._handlers:  # not the first attempt
                numbers = [number for number in numbers if _signal.getsignal(number) is not self]
            # in C from end to end: no handler is replaced without being remembered
            self._handlers.update(
                zip(numbers, map(_signal.signal, numbers, repeat(self)), strict=True)
            )
            if not all(map(callable, self._handlers.values())):
                self._give_up_defaults()
            _holder = self
        except BaseException as error:
            self._attempts -= 1
            if self._attempts > 0:
                _due.append(partial(_raise, error))
                self._begin()
                return
            self._is_over = True
            self._put_back()
            raise

    def __exit__(self, *_: object) -> None:
        global _holder
        if _holder is not self:
            return
        self._is_over = True
        _holder = None
        try:
            self._put_back()
        except BaseException:  # another signal's handler, before that began
            self._put_back()
            raise
        finally:
            _deliver()

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Stand for a handler: note the call if signals are held back, else make it."""
        handler = self._handlers[number]
        if not callable(handler):
            self._give_up_defaults()
            handler = _by_default
        _due.append(partial(handler, number, frame))
        if _holder is None:
            if self._is_over:  # and was prevented from putting handlers back
                self._put_back()
            _deliver()

    def _put_back(self) -> None:
        try:
            for number, handler in self._handlers.items():
                if _signal.getsignal(number) is self:  # else other code has set another one
                    found = _signal.signal(number, handler)
                    if found is not self:  # a handler that ran in that moment has
                        _signal.signal(number, found)
        except BaseException:  # of a handler that is back
            self._put_back()
            raise

    def _give_up_defaults(self) -> None:
        """Put back what is no handler: another one, called just now, had reset it."""
        for number, handler in self._handlers.items():
            if not callable(handler) and _signal.getsignal(number) is self:
                _signal.signal(number, handler)


def _by_default(number: int, frame: FrameType | None) -> None:
    """What happens where there is no handler."""
    _signal.raise_signal(number)


def _raise(error: BaseException) -> None:
    raise error


_call: Any = partial.__call__


def _deliver() -> None:
    """Call the handlers that are due."""
    try:
        while _due:
            # in C, so that no call is taken from the queue without being made
            next(map(_call, iter(_due.popleft, None)))
    except BaseException:
        _deliver()
        raise
