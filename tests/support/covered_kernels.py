"""Variants of the kernels in which every two settings meet: of dtypes, rules and flags.

Run as a script it is ``codegen.py`` with these alone.
"""

import sys

import codegen
import pairs


def covering_variants() -> list[codegen.Variant]:
    """A fourteenth of all variants, in their order."""
    places: dict[int, int] = {}
    cases = {
        pairs.case_of({"family": variant.family} | dict(variant.constants), places): variant
        for variant in codegen.variants()
    }
    chosen = pairs.covering(cases)
    return [variant for case, variant in cases.items() if case in chosen]


if __name__ == "__main__":
    chosen = covering_variants()
    codegen.variants = lambda: chosen
    sys.exit(codegen.main(sys.argv[1:]))
