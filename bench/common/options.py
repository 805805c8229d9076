"""Options of the command line: what is wrong with one is said in a single line."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import Any, NoReturn


class OneLineParser(argparse.ArgumentParser):
    """A parser that reports a bad option in a single line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def number(kind: type, allowed: str, accept: Callable[[Any], bool]) -> Callable[[str], Any]:
    """Return a converter for argparse that names the value and what is allowed."""

    def convert(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan  # which no range accepts
        if not accept(value):
            raise argparse.ArgumentTypeError(f"must be {allowed}, got {text!r}")
        return value

    return convert
