"""What is printed of all variants: a line per kernel, or a Markdown table of a selection."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .measure import Report
from .variants import Variant

#: Rows of the table: a name, and the constants by which its variant is found, functions by the end
#: of their module's name.
PLAIN = {"BACKS_UP": True} | dict.fromkeys(
    ("HAS_MASTER", "STOCHASTIC", "SEGMENTS", "SKIP", "SCALE", "MIX", "ADAPTIVE", "SCALED", "MOVES"),
    False,
)
SELECTION: list[tuple[str, str, dict[str, Any]]] = [
    (name, f"{kernel}_kernel", PLAIN | dict(zip("PGS", types.split("/"), strict=False)) | constants)
    for name, kernel, types, constants in (
        ("norm", "reduce", "fp32/fp32", {"TERMS": "of_ascent", "SUMS": 1, "ACCUMULATES": None}),
        ("norm", "reduce", "bf16/bf16", {"TERMS": "of_ascent", "SUMS": 1, "ACCUMULATES": None}),
        ("norm, ASAM", "reduce", "fp32/fp32", {"TERMS": "of_ascent", "SCALED": True, "SUMS": 1}),
        ("norm, ASAM", "reduce", "bf16/bf16", {"TERMS": "of_ascent", "SCALED": True, "SUMS": 1}),
        ("norm, ASAM, master", "reduce", "bf16/bf16",
         {"TERMS": "of_ascent", "SCALED": True, "SUMS": 1, "HAS_MASTER": True}),
        ("norms, ASAM, clipped", "reduce", "fp32/fp32",
         {"TERMS": "of_descent", "SCALED": True, "SUMS": 2}),
        ("norm, VaSSO", "reduce", "fp32/fp32", {"TERMS": "of_ascent", "DIRECTION": "ema"}),
        ("sums, SAMAR", "reduce", "fp32/fp32", {"TERMS": "of_both"}),
        ("sums, SAMAR, ASAM", "reduce", "fp32/fp32",
         {"TERMS": "of_both", "SCALED": True, "ADAPTIVE": True}),
        ("SAM", "perturb", "fp32/fp32", {"DIRECTION": "unified"}),
        ("SAM", "perturb", "bf16/bf16", {"DIRECTION": "unified"}),
        ("SAM, scratch", "perturb", "fp32/fp32", {"DIRECTION": "unified", "MOVES": True}),
        ("SAM, master", "perturb", "bf16/bf16", {"DIRECTION": "unified", "HAS_MASTER": True}),
        ("ASAM", "perturb", "fp32/fp32", {"DIRECTION": "unified", "ADAPTIVE": True}),
        ("VaSSO", "perturb", "fp32/fp32", {"DIRECTION": "ema"}),
        ("LightSAM III", "perturb", "fp32/fp32", {"DIRECTION": "adam"}),
        ("SGD", "update", "fp32/fp32/fp32", {"UPDATE": "sgd", "STATES": 1}),
        ("SGD", "update", "bf16/bf16/bf16", {"UPDATE": "sgd", "STATES": 1}),
        ("SGD, SAMAR", "update", "fp32/fp32/fp32",
         {"UPDATE": "sgd", "STATES": 1, "SCALE": True, "MIX": True}),
        ("AdamW", "update", "fp32/fp32/fp32", {"UPDATE": "adam", "STATES": 2}),
        ("AdamW", "update", "bf16/bf16/bf16", {"UPDATE": "adam", "STATES": 2}),
        ("AdamW, master", "update", "bf16/bf16/fp32",
         {"UPDATE": "adam", "STATES": 2, "HAS_MASTER": True}),
        ("AdamW, skipping", "update", "fp32/fp32/fp32",
         {"UPDATE": "adam", "STATES": 2, "SCALE": True, "SKIP": True, "ASCENT_STATES": 0}),
        ("LightSAM III", "update", "fp32/fp32/fp32", {"UPDATE": "uncorrected_adam", "STATES": 2}),
    )
]  # fmt: skip


def summary(reports: Sequence[Report]) -> Iterator[str]:
    """One line per kernel and base update."""
    families = defaultdict(list)
    for report in reports:
        families[report.variant.family].append(report)
    for family, members in families.items():
        registers = max(report.registers for report in members)
        spilled = max(report.spilled for report in members)
        width = min((bits for report in members for bits in report.widths.values()), default=0)
        occupancy = min(report.flight.occupancy for report in members)
        yield (f"{family}: {len(members)} variants, at most {registers} registers, "
               f"occupancy at least {occupancy:.0%}, {spilled} B spilled, "
               f"streams at least {width}-bit")  # fmt: skip


def selected(known: Sequence[Variant]) -> list[tuple[str, Variant]]:
    """The variants of ``SELECTION``, by name."""
    found = []
    for name, kernel, constants in SELECTION:
        fits = (v for v in known if v.kernel == kernel and _has(dict(v.constants), constants))
        found.append((f"{kernel.partition('_')[0]} {name}", next(fits)))
    return found


def _has(constants: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    for name in constants.keys() & wanted.keys():
        value = constants[name]
        if isinstance(value, str) and ":" in value:
            module, _, function = value.partition(":")
            value = function if name == "TERMS" else module.rpartition(".")[2]
        if value != wanted[name]:
            return False
    return True


def table(names: Sequence[str], reports: Sequence[Report]) -> Iterator[str]:
    """Markdown, with a row per report."""
    yield ("| kernel | types | elements | registers | blocks | occupancy | spilled | narrowest | "
           "B in flight per thread | times what memory needs | fences |")  # fmt: skip
    yield "| --- |" + " --- |" * 10
    for name, report in zip(names, reports, strict=True):
        v, f = report.variant, report.flight
        types = "/".join(dict(v.constants)[x] for x in "PGS" if x in dict(v.constants))
        yield (f"| {name} | {types} | {v['CHUNK']:,} | {report.registers} | {f.blocks} | "
               f"{f.occupancy:.0%} | {report.spilled} B | {min(report.widths.values())} bit | "
               f"{f.bytes:.0f} | {f.headroom:.1f} | {f.fences} |")  # fmt: skip
