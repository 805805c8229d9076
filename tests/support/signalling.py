"""Signals sent at a chosen moment, and handlers that raise."""

import _signal
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fastsam

#: Where the library's files are.
PACKAGE = str(Path(fastsam.__file__).parent)

#: What a cluster sends, and what people use timers and notices for; all have raising handlers here.
NUMBERS = [getattr(signal, name) for name in ("SIGUSR1", "SIGALRM", "SIGTERM")
           if hasattr(signal, name)]  # fmt: skip


class Preempted(Exception):
    """What the handlers raise, with the signal's number."""


class Handlers:
    """Handlers inside the block that note their signals; those of ``raising`` raise as well.

    They do so where they interrupt the package, or what it has called; what a test does in between
    is spared. (Or other files whose names begin with ``where``.)
    """

    def __init__(
        self, numbers: list[int] = NUMBERS, raising: list[int] | None = None, where: str = PACKAGE
    ):
        self.numbers = numbers
        self.raising = numbers if raising is None else raising
        self.where = where
        self.seen: list[int] = []
        self.handler = self._note  # one object, to be known again

    def _note(self, number: int, frame: Any) -> None:
        self.seen.append(number)
        while frame is not None and number in self.raising:
            if frame.f_code.co_filename.startswith(self.where):
                raise Preempted(number)
            frame = frame.f_back

    def __enter__(self) -> "Handlers":
        self._before = [signal.signal(number, self.handler) for number in self.numbers]
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in zip(self.numbers, self._before, strict=True):
            signal.signal(number, handler)

    @property
    def are_back(self) -> bool:
        return all(signal.getsignal(number) is self.handler for number in self.numbers)


def send(*numbers: int) -> None:
    """Send signals to this thread, all at the same moment. The first handler runs at once; if it
    raises the others run as soon as Python looks again, which may be a call or a line later."""
    # not by the module on top of it, in whose lines the other handlers would raise
    _signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    for number in numbers:
        _signal.pthread_kill(threading.get_ident(), number)
    _signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)


class At:
    """Call ``action`` before the n-th line, or instruction, that runs inside the block in files
    whose names begin with one of ``where``; None counts them.

    An exception of the action is raised there, and is the last thing that is looked at.
    """

    def __init__(
        self,
        at: int | None,
        where: tuple[str, ...],
        action: Callable[[], None] = lambda: None,
        event: str = "line",
    ):
        self.at, self.where, self.action, self.event = at, where, action, event
        self.count = 0

    def __enter__(self) -> "At":
        self._before = sys.gettrace()
        sys.settrace(self._trace)
        return self

    def __exit__(self, *_: Any) -> None:
        sys.settrace(self._before)

    def _trace(self, frame: Any, event: str, arg: Any) -> Any:
        name = frame.f_code.co_filename
        if not name.startswith(self.where) or "kernels" in name:  # which the interpreter runs
            return None
        frame.f_trace_opcodes = self.event == "opcode"
        if event == self.event:
            self.count += 1
            if self.at is not None and self.count == self.at + 1:
                self.action()
        return self._trace
