"""Some variants of the kernels, in which every two rules or dtypes meet, and every two flags.

The two 16-bit dtypes are taken in turns, and not each with everything: their code differs in
nothing but conversions. Float64, which is not there for speed, meets each kernel and not each rule.
Run as a script it is ``codegen.py`` with these alone.
"""

import sys
from collections import defaultdict
from typing import Any

import codegen
import pairs
from compiled.variants import Variant, variants

WIDTHS = {"fp16": "16 bits", "bf16": "16 bits"}
TYPES = ("P", "G", "S", "READ")
RULES = ("TERMS", "DIRECTION", "COEFFICIENTS", "ACCUMULATES", "UPDATE")
#: These follow from the rules and dtypes.
DERIVED = ("CHUNK", "LANES", "ACC", "RADIUS", "ADVANCE", "USABLE", "FINISH", "ADAPTED", "FROM_OLD")


def settings_of(variant: Variant) -> list[dict[str, Any]]:
    """Two selections of a variant's settings, each of which has to meet its like."""
    constants = dict(variant.constants)
    if constants["P"] == "fp64":
        return [{"kernel": variant.kernel, "terms": constants.get("TERMS"), "P": "fp64"}]
    found = {"kernel": variant.kernel}
    found |= {k: WIDTHS.get(x, x) for k, x in constants.items() if k not in DERIVED}
    rules = {k: x for k, x in found.items() if k in ("kernel", *TYPES, *RULES)}
    flags = {k: x for k, x in found.items() if k not in (*RULES, *TYPES)}
    return [rules, flags]


def covering_variants() -> list[Variant]:
    """A fraction of all variants, in an order of their own.

    Of the variants with the same rules one is taken whose flags are due as well, if there is one.
    """
    places: dict[int, int] = {}
    alike: dict[pairs.Case, list[Variant]] = defaultdict(list)
    flags_of: dict[Variant, pairs.Case] = {}
    for variant in sorted(variants(), key=repr):
        cases = [pairs.case_of(settings, places) for settings in settings_of(variant)]
        for case in cases:
            alike[case].append(variant)
        flags_of[variant] = cases[-1]
    flags = set(flags_of.values())
    covering = pairs.covering(alike)
    chosen = [case for case in alike if case in covering]
    due = {case for case in chosen if case in flags}
    picked = []
    for i, case in enumerate(sorted(chosen, key=lambda case: case in flags)):
        if case in flags and case not in due:
            continue
        members = alike[case]
        useful = (variant for variant in members if flags_of[variant] in due)
        variant = next(useful, members[i % len(members)])
        due.discard(flags_of[variant])
        picked.append(variant)
    return list(dict.fromkeys(picked))


if __name__ == "__main__":
    chosen = covering_variants()
    codegen.variants = lambda: chosen
    sys.exit(codegen.main(sys.argv[1:]))
