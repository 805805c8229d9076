"""The section on GPUs of docs/performance.md, from the records of every GPU that was timed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from .problems import CASES
from .records import DONE, Record, load_all
from common.pages import write_between
from speed.contenders import COMPILED, FUSED, METHODS, SET_LABELS
from speed.report_page import fill, seconds, table

BEGIN, END = "<!-- gpu -->", "<!-- /gpu -->"
NOTHING = """\
No GPU has been timed yet. `python bench/gpu.py` checks and times one in at most 12 minutes, and
writes its results here."""
HOW = """\
`python bench/gpu.py` checks and times a GPU in at most 12 minutes. Times are medians by the
device's events, with a cold cache. *Copy* is torch's copy of contiguous memory on the device."""

Records = Mapping[str, Record]


def rewrite(page: Path, results: Path, folder: str, rehearsal: bool = False) -> None:
    """Put the section between the marks of a page.

    Args:
        page: The file; both marks are in it, once and in order.
        results: The folder that has a folder ``gpu-...`` for each GPU.
        folder: That folder, seen from the page.
        rehearsal: Whether to take rehearsals, and nothing else.

    Raises:
        ValueError: If the marks are missing, or a file is no record.
    """
    found = {}
    for path in sorted(results.glob("gpu-*")):
        records = {k: r for k, r in load_all(path).items() if r.rehearsal == rehearsal}
        if records:
            found[f"{folder}/{path.name}"] = records
    write_between(page, BEGIN, END, section(found))


def section(found: Mapping[str, Records]) -> str:
    """The text between the marks; ``found`` has the records by their folder."""
    if not found:
        return fill(NOTHING)
    return "\n\n".join([fill(HOW), *(measured_on(*item) for item in found.items())])


def measured_on(folder: str, records: Records) -> str:
    """One GPU's results."""
    first = next(iter(records.values()))
    machine = first.machine
    title = (
        f"**{machine['gpu']}; driver {machine['driver']}; torch {machine['torch']}, triton "
        f"{machine['triton']}, {machine['platform']}; {machine['date']}**"
    )
    if first.rehearsal:
        title = f"**REHEARSAL, no measurement.** {title}"
    parts = [fill(f"{title} ([results]({folder})):"), fill(checked(records))]
    for name, write in (("kernels", kernels_table), ("peers", peers_table)):
        if name in records and (text := write(records[name])):
            parts.append(text)
    if "graphs" in records and (text := graphs_sentence(records["graphs"])):
        parts.append(fill(text))
    return "\n\n".join(parts)


def checked(records: Records) -> str:
    """What was run and what came of it."""
    sentences = []
    if "memory" in records:
        for result in records["memory"].of(ran=True):
            found = "nothing found" if result["passed"] else f"errors ({result['summary']})"
            sentences.append(f"compute-sanitizer {result['tool']}: {found}.")
    if "tests" in records:
        results = records["tests"].results
        passed, failed = sum(x["passed"] for x in results), sum(len(x["failed"]) for x in results)
        sentences.append(f"Tests: {passed:,} passed, {failed} failed.")
    for name, record in records.items():
        if record.status != DONE:
            sentences.append(f"The stage `{name}` {record.status.replace('timed', 'was timed')}.")
    return " ".join(sentences) or "Nothing was checked."


def kernels_table(record: Record) -> str:
    """Every kernel's bytes per second, in percent of the copy's."""
    sizes = [x["size"] for x in record.of(kernel="copy")]
    lines = [["copy", *(_terabytes(record, size) for size in sizes)]]
    timed = [x for x in record.results if x["kernel"] != "copy"]
    for case, kernel in dict.fromkeys((x["case"], x["kernel"]) for x in timed):
        line = [f"{CASES[case].label}: {kernel}"]
        for size in sizes:
            found = record.of(size=size, case=case, kernel=kernel)
            line.append(f"{100 * found[0]['of_copy']:.0f} %" if found else "-")
        lines.append(line)
    return table(["kernel, of the copy's bytes per second", *sizes], lines) if timed else ""


def _terabytes(record: Record, size: str) -> str:
    return f"{record.of(size=size, kernel='copy')[0]['bytes_per_second'] / 1e12:.2f} TB/s"


def peers_table(record: Record) -> str:
    """A step against the copy, the faster peer with a fused base, and the compiled step."""
    header = ["parameters", "step", "÷ copy", "best peer, fused base", "`torch.compile`"]
    lines = []
    for chosen, method in dict.fromkeys((x["set"], x["method"]) for x in record.results):
        times = {x["contender"]: x["seconds"] for x in record.of(set=chosen, method=method)
                 if "seconds" in x}  # fmt: skip
        ours = times.get("fastsam", 0.0)
        if ours <= 0:
            continue
        copies = [time for name, time in times.items() if name.startswith("copy")]
        peers = {time: name for name, time in times.items() if name.endswith(FUSED)}
        best = f"{min(peers) / ours:.2f}× ({peers[min(peers)].split(',')[0]})" if peers else "-"
        lines.append([
            f"{SET_LABELS.get(chosen, chosen)} · {METHODS[method].label}", seconds(ours),
            f"{ours / copies[0]:.2f}" if copies and copies[0] > 0 else "-", best,
            f"{times[COMPILED] / ours:.2f}×" if COMPILED in times else "-",
        ])  # fmt: skip
    return table(header, lines) if lines else ""


def graphs_sentence(record: Record) -> str:
    """What a graph makes of the time of a step."""
    parts = []
    for method in dict.fromkeys(x["method"] for x in record.results):
        ways = {x["way"]: x for x in record.of(method=method)}
        if {"eager", "graph"} <= ways.keys():
            eager, graph = (seconds(ways[way]["wall"]) for way in ("eager", "graph"))
            parts.append(f"{method} {graph} instead of {eager}")
    what = "A step of the optimizer in a CUDA graph, by the wall clock"
    return f"{what}: {'; '.join(parts)}." if parts else ""
