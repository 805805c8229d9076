"""Fewer cases of a large product: some in which every pair of two parameters' values occurs.

A fault mostly shows where one value is, or where two of them meet: a base with a backend, a method
with a dtype. ``covering`` picks cases for that, greedily: always the one with most pairs that have
not occurred. What it picks depends on nothing but the cases' parameters, so that every process of a
parallel run picks the same.
"""

import heapq
from collections import defaultdict
from collections.abc import Iterable, Mapping
from itertools import combinations
from typing import Any

import pytest

#: Values that say what they are; others are objects, and go by their place among those of a test.
NAMED = (str, int, float, bool, type(None))
#: A parameter and its value.
Setting = tuple[str, str]
Case = tuple[Setting, ...]


def case_of(params: Mapping[str, Any], places: dict[int, int]) -> Case:
    """What a test is called with; ``places`` has the objects that came before, by identity."""
    return tuple(
        (name, repr(x) if isinstance(x, NAMED) else f"#{places.setdefault(id(x), len(places))}")
        for name, x in sorted(params.items())
    )


def pairs_of(case: Case) -> set[tuple[Setting, ...]]:
    """All pairs of settings; of a case of one parameter that one."""
    return set(combinations(case, min(len(case), 2)))


def covering(cases: Iterable[Case]) -> set[Case]:
    """Some of the cases, with every pair that occurs in one of them all."""
    missing = {case: pairs_of(case) for case in cases}
    # a case's number of new pairs only falls: one that is still right is the largest
    heap = [(-len(pairs), case) for case, pairs in missing.items()]
    heapq.heapify(heap)
    found: set[tuple[Setting, ...]] = set()
    chosen = set()
    while heap:
        size, case = heapq.heappop(heap)
        missing[case] -= found
        new = len(missing[case])
        if new == -size:
            chosen.add(case)
            found |= missing[case]
        elif new:
            heapq.heappush(heap, (-new, case))
    return chosen


def left_out(items: Iterable[pytest.Item]) -> set[pytest.Item]:
    """Of each test's cases those that a covering set does without."""
    tests: dict[Any, list[pytest.Function]] = defaultdict(list)
    for item in items:
        if isinstance(item, pytest.Function) and hasattr(item, "callspec"):
            tests[item.parent, item.originalname].append(item)
    out: set[pytest.Item] = set()
    for members in tests.values():
        places: dict[int, int] = {}
        cases = {
            item: case_of(item.callspec.params, places)
            for item in sorted(members, key=lambda item: item.nodeid)
        }
        chosen = covering(cases.values())
        out |= {item for item, case in cases.items() if case not in chosen}
    return out
