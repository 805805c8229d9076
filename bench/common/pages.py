"""docs/performance.md: the scripts write their tables into it, each between marks of its own."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "performance.md"


def link(target: Path, page: Path) -> str:
    """Return the relative link from a page to a file or folder."""
    return Path(os.path.relpath(target.resolve(), page.resolve().parent)).as_posix()


def write_between(page: Path, begin: str, end: str, text: str) -> None:
    """Put text between two marks of a page.

    Raises:
        ValueError: If the page does not have both marks, once and in order.
    """
    old = page.read_text(encoding="utf-8")
    before, found, rest = old.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed or begin in rest or end in after:
        raise ValueError(f"{page.name} must have {begin} and {end} in it, once and in order")
    page.write_text(f"{before}{begin}\n{text}\n{end}{after}", encoding="utf-8")
