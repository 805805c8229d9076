"""The section on speed of docs/performance.md, written from what ``report.py`` has measured."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path

from .contenders import COMPILED, METHODS, PEERS, SET_LABELS
from .measure import Timing
from .report_figures import title
from .report_sections import COMPARED, HOST_TENSORS, LARGE, rounds_for
from .report_verdicts import Medians, Report, label, millions
from common.pages import write_between
from host_time import FRESH, STEP, SWEEP

BEGIN, END = "<!-- performance -->", "<!-- /performance -->"

HOW = """\
`python bench/report.py` times the optimizer's part of a step in float32: both passes, without the
network's forward and backward passes. The contenders take turns in one process, and each time is
the median of its turns. SGD has momentum. *Copy* is one plain copy of contiguous memory that moves
the least bytes of the method: each number read once, each result written once. The peers are SAM of
{peers}, with their defaults and with torch's fused SGD or AdamW as their base (`fused=True`).
"2× (name)" means that the faster peer, which is named, takes twice fastsam's time."""

ON_GPU = """\
On a GPU a turn is the median of Triton's `do_bench`, by the device's own events and with a cleared
cache, which leaves out host work that the clearing of the cache hides."""


def seconds(value: float) -> str:
    return f"{1e3 * value:.1f} ms" if value >= 1e-3 else f"{1e6 * value:.0f} µs"


def table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def ours(report: Report, section: str) -> list[Timing]:
    return [t for t in report.timings if t.section == section and t.contender == "fastsam"]


def sam_table(report: Report) -> str:
    """SAM on every set and base, against the copy and against the peers."""
    medians = Medians(report.timings)
    header = ["parameters", "step", "÷ copy", "best peer", "best peer, fused base"]
    compiled = [t for t in report.timings if t.section == "sam" and t.contender == COMPILED]
    lines = []
    for t in ours(report, "sam"):
        line = [
            f"{label(t.set, t.method)} ({t.tensors} tensors, {millions(t.parameters)})",
            seconds(t.times.median), f"{medians.over_copy(t):.2f}",
        ]  # fmt: skip
        for fused in (False, True):
            peer = medians.best_peer("sam", t.set, t.method, fused)
            line.append(f"{peer[1] / t.times.median:.2f}× ({short(peer[0])})" if peer else "-")
        if compiled:
            other = medians.of("sam", t.set, t.method, COMPILED)
            line.append(f"{other / t.times.median:.2f}×" if other else "-")
        lines.append(line)
    return table(header + ["`torch.compile` of a foreach SAM"] * bool(compiled), lines)


def short(contender: str) -> str:
    return contender.split(",")[0]


def methods_table(report: Report) -> str:
    """The methods with more work, against the copy of their own bytes."""
    medians = Medians(report.timings)
    lines = [
        [METHODS[t.method].label, str(t.bytes_per_parameter), seconds(t.times.median),
         f"{medians.over_copy(t):.2f}"]
        for t in ours(report, "methods")
    ]  # fmt: skip
    name = SET_LABELS.get(ours(report, "methods")[0].set, ours(report, "methods")[0].set)
    return table([f"method, on {name}", "bytes per parameter", "step", "÷ copy"], lines)


def host_table(report: Report) -> str | None:
    """Steps over bare sweeps, by number of tensors; None where that was not measured."""
    medians = Medians(report.timings)
    lines = []
    for tensors in HOST_TENSORS:
        name = f"{tensors} tensors"
        sweep = medians.of("host", name, "", SWEEP)
        for method in COMPARED:
            step, fresh = (medians.of("host", name, method, who) for who in (STEP, FRESH))
            if sweep and step and fresh:
                lines.append([
                    f"{METHODS[method].label}, {tensors:,} tensors", seconds(step),
                    f"{step / sweep:.1f}", f"{fresh / sweep:.1f}",
                ])  # fmt: skip
    header = ["host", "step", "÷ sweep", "÷ sweep, where every gradient has moved"]
    return table(header, lines) if lines else None


HOST = """\
The triton backend's work on the host for a whole step, without the launches. *Sweep* is one bare
loop over the gradients' addresses, `[p.grad.data_ptr() for p in params]`:"""


def growth_sentence(report: Report) -> str | None:
    grown = sorted(ours(report, "growth"), key=lambda t: t.parameters)
    if not grown:
        return None
    each = [t.times.median / t.parameters for t in grown]
    return (
        f"From {millions(grown[0].parameters)} to {millions(grown[-1].parameters)} parameters the "
        f"time per parameter of SAM + SGD varies by {100 * (max(each) / min(each) - 1):.0f} %."
    )


def fill(text: str) -> str:
    return textwrap.fill(text, 100, break_long_words=False, break_on_hyphens=False)


def measured_on(report: Report, folder: str) -> str:
    """One machine's tables; ``folder`` is where its figures are, seen from the page."""
    packages = ", ".join(f"{name} {version}" for name, version in report.versions.items()
                         if name not in ("torch", "fastsam"))  # fmt: skip
    turns = f"{report.rounds} turns, {rounds_for(LARGE + 1, report.rounds)} on sets above "
    turns += f"{millions(LARGE)} parameters"
    parts = [fill(f"**{title(report)}** ({packages}; {turns}):")]
    if ours(report, "sam"):
        parts.append(sam_table(report))
    if ours(report, "methods"):
        parts.append(methods_table(report))
    if host := host_table(report):
        parts += [HOST, host]
    figures = f"Figures: [step times]({folder}/{report.name}-bars.png), "
    figures += f"[growth]({folder}/{report.name}-growth.png)."
    parts.append(fill(" ".join(filter(None, [growth_sentence(report), figures]))))
    return "\n\n".join(parts)


def section(reports: Sequence[Report], folder: str) -> str:
    """The text between the marks: what is compared and how, then CPUs, then GPUs.

    Raises:
        ValueError: If there is nothing to tell.
    """
    reports = sorted((r for r in reports if not r.quick), key=lambda r: (r.on_gpu, r.name))
    if not reports:
        raise ValueError("no results of a full run: run bench/report.py without --quick first")
    found = {name: r.versions[name] for r in reports for name in PEERS if name in r.versions}
    peers = " and ".join(f"{name} {version}" for name, version in found.items())
    how = HOW.format(peers=peers or "published packages")
    if any(report.on_gpu for report in reports):
        how = f"{how} {ON_GPU}"
    return "\n\n".join([fill(how), *(measured_on(r, folder) for r in reports)])


def rewrite(page: Path, results: Path, folder: str) -> None:
    """Put the section between the marks of a page.

    Args:
        page: The file; both marks are in it, once and in order.
        results: Folder of the JSON files.
        folder: That folder, seen from the page.

    Raises:
        ValueError: If the marks or the results are missing.
    """
    reports = [Report.load(path) for path in sorted(results.glob("*.json"))]
    write_between(page, BEGIN, END, section(reports, folder))
