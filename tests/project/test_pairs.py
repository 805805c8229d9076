"""The choice of cases from large products: no pair of values is lost."""

import itertools
import random

import pairs

pytest_plugins = "pytester"

SIZES = {"method": 20, "base": 9, "dtype": 5, "backend": 3}


def product():
    """All cases but those that a rule forbids, as methods with bases of their own do."""
    values = itertools.product(*(range(size) for size in SIZES.values()))
    settings = [dict(zip(SIZES, x, strict=True)) for x in values]
    return [
        pairs.case_of(case, {}) for case in settings if case["method"] < 15 or case["base"] == 0
    ]


def all_pairs(cases):
    return set().union(*map(pairs.pairs_of, cases))


def test_every_pair_occurs():
    cases = product()
    chosen = pairs.covering(cases)
    assert chosen <= set(cases)
    assert all_pairs(chosen) == all_pairs(cases)
    # there are 15 * 9 + 5 pairs of a method and a base, each of which needs a case of its own
    assert 140 <= len(chosen) <= 165 < len(cases) / 12


def test_the_choice_does_not_depend_on_the_order():
    cases = product()
    chosen = pairs.covering(cases)
    random.Random(0).shuffle(cases)
    assert pairs.covering(cases) == chosen


def test_two_parameters_leave_nothing_out():
    cases = [pairs.case_of({"a": a, "b": b}, {}) for a in range(4) for b in range(5)]
    assert pairs.covering(cases) == set(cases)
    assert len(pairs.covering([pairs.case_of({"a": a}, {}) for a in range(4)])) == 4


def test_values_that_only_look_alike():
    """True and 1, 0.0 and -0.0 are values of their own; NaN is one."""
    values = [1, True, "1", 1.0, 0.0, -0.0, None, float("nan")]
    assert len({pairs.case_of({"x": x}, {}) for x in values}) == len(values)
    nans = [pairs.case_of({"x": float("nan")}, {}) for _ in range(2)]
    assert nans[0] == nans[1]


def test_of_collected_tests(pytester):
    """Each test is a product of its own; what takes no parameters stays; objects go by place."""
    items = pytester.getitems(
        """
        import pytest

        @pytest.mark.parametrize("c", [object(), object(), [], {}])
        @pytest.mark.parametrize(("a", "b"), [(1, "x"), (1, "y"), (2, "x"), (2, "y")])
        @pytest.mark.parametrize("d", [1, 2, 3, 4])
        def test_product(a, b, c, d): ...

        @pytest.mark.parametrize("c", [1, 2, 3])
        def test_list(c): ...

        def test_alone(): ...
        """
    )
    out = pairs.left_out(items)
    kept = [item for item in items if item not in out]
    assert {item.originalname for item in out} == {"test_product"}
    places: dict[int, int] = {}
    cases = {
        name: [pairs.case_of(item.callspec.params, places) for item in those
               if item.originalname == "test_product"]
        for name, those in {"all": items, "kept": kept}.items()
    }  # fmt: skip
    assert len(cases["all"]) == 64 and 16 <= len(cases["kept"]) <= 20
    assert all_pairs(cases["kept"]) == all_pairs(cases["all"])
    assert pairs.left_out(reversed(items)) == out
