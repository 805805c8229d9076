"""Variants of the kernels in which every two settings meet: of dtypes, rules and flags.

The two 16-bit dtypes are taken in turns, and not each with everything: their code differs in
nothing but conversions. Float64, which is not there for speed, meets each kernel and not each rule.
Run as a script it is ``codegen.py`` with these alone.
"""

import sys
from collections import defaultdict
from typing import Any

import codegen
import pairs

WIDTHS = {"fp16": "16 bits", "bf16": "16 bits"}
DERIVED = ("CHUNK", "LANES", "ACC")  # from the others


def settings_of(variant: codegen.Variant) -> dict[str, Any]:
    """What has to meet in one variant or another."""
    constants = dict(variant.constants)
    if constants["P"] == "fp64":
        return {"kernel": variant.kernel, "terms": constants.get("TERMS"), "P": "fp64"}
    settings = {k: WIDTHS.get(x, x) for k, x in constants.items() if k not in DERIVED}
    return {"kernel": variant.kernel} | settings


def covering_variants() -> list[codegen.Variant]:
    """A fraction of all variants, in their order."""
    places: dict[int, int] = {}
    alike: dict[pairs.Case, list[codegen.Variant]] = defaultdict(list)
    for variant in codegen.variants():
        alike[pairs.case_of(settings_of(variant), places)].append(variant)
    chosen = pairs.covering(alike)
    picked = [members for case, members in alike.items() if case in chosen]
    return [members[i % len(members)] for i, members in enumerate(picked)]


if __name__ == "__main__":
    chosen = covering_variants()
    codegen.variants = lambda: chosen
    sys.exit(codegen.main(sys.argv[1:]))
