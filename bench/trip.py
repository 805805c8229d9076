"""What a step goes through: calls of the library's functions, and their files, before it launches.

``python bench/trip.py`` takes steady steps of SAM on SGD with the triton backend, kernels left out,
and counts Python calls from ``step`` to the first launch, and in the whole step. It needs no GPU.
"""

import argparse
import os
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

os.environ.setdefault("TRITON_INTERPRET", "1")  # before any kernel is imported

import torch  # noqa: E402

import fastsam  # noqa: E402
from fastsam.backends.triton.launcher import Launched  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
INSIDE = tuple(f"{ROOT / folder}{os.sep}" for folder in ("fastsam", "kernels"))


class Trip:
    """Calls of the library's functions, in order, up to the first launch and after it."""

    def __init__(self) -> None:
        self.before: list[tuple[str, str]] = []
        self.after: list[tuple[str, str]] = []
        self.launched = False

    def __call__(self, frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(INSIDE):
            where = os.path.relpath(code.co_filename, ROOT), code.co_name
            (self.after if self.launched else self.before).append(where)


def follow(step: Callable[[], Any]) -> Trip:
    """Take a step, and note where it goes."""
    trip = Trip()

    def launch(self: Launched) -> None:
        trip.launched = True

    original, Launched.__call__ = Launched.__call__, launch  # type: ignore[method-assign]
    sys.setprofile(trip)
    try:
        step()
    finally:
        sys.setprofile(None)
        Launched.__call__ = original  # type: ignore[method-assign]
    return trip


def main(argv: list[str] | None = None) -> int:
    """Count and print; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="trip.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--calls", action="store_true", help="print every call before the launch")
    args = parser.parse_args(argv)
    params = [torch.nn.Parameter(torch.ones(8)) for _ in range(3)]
    optimizer = fastsam.SAM(params, torch.optim.SGD, lr=0.1, momentum=0.9, backend="triton")

    def closure() -> float:
        for param in params:
            param.grad = torch.ones_like(param)
        return 0.0

    for _ in range(3):
        optimizer.step(closure)
    trip = follow(lambda: optimizer.step(closure))
    files = {name for name, _ in trip.before}
    everything = {*trip.before, *trip.after}
    print(f"before the first launch: {len(trip.before)} calls in {len(files)} files")
    print(f"in the step: {len(everything)} functions in {len({n for n, _ in everything})} files")
    if args.calls:
        for (name, function), count in Counter(trip.before).items():
            print(f"  {count} {name} {function}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
