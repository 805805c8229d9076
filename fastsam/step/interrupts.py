"""Keeping Ctrl-C out of the moments in which weights and state change together."""

# the module behind ``signal``, which tries to make an enum of every handler: 20 us a step
import _signal  # type: ignore[import-not-found]
import threading
from types import FrameType
from typing import Any


class uninterrupted:  # noqa: N801 - used like a function
    """Hold back SIGINT until the block has ended: half a step must not be left behind.

    Python delivers it to the main thread alone, so elsewhere there is nothing to hold back.
    """

    def __enter__(self) -> None:
        self._received: list[tuple[int, FrameType | None]] = []
        self._handler: Any = _signal.getsignal(_signal.SIGINT)
        on_main_thread = threading.get_ident() == threading.main_thread().ident
        self._holds = on_main_thread and callable(self._handler)
        if self._holds:
            _signal.signal(_signal.SIGINT, lambda *received: self._received.append(received))

    def __exit__(self, *_: object) -> None:
        if self._holds:
            _signal.signal(_signal.SIGINT, self._handler)
            if self._received:
                self._handler(*self._received[0])
