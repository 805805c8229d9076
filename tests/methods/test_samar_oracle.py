"""The oracle of SAMAR: paper sums, special cases, and the sequence of its lam."""

import numpy as np
import pytest

from oracle_checks import PAPER, SHAPES, STEPS, arrays, assert_near, flat, oracle
from oracles import Problem, Ratio


def fixed(lam):
    """A rule that never changes lam."""
    return Ratio(lam=lam, c=1, lam_min=0)


def test_samar():
    o = oracle([1, 2], rho=0.5, mix=Ratio(lam=0.5))
    o.ascend(arrays(3, 4))  # e = (0.3, 0.4)
    o.descend(arrays(6, 8))  # u = (4.5, 6), s = (9 * 0.3 + 12 * 0.4) / 2
    assert_near(o.weights, [0.55, 1.4], PAPER)
    assert_near([o.sharpness, o.metrics["sharpness"]], [3.75, 3.75], PAPER)
    assert (o.metrics["lam"], o.lam) == (0.5, 0.5)
    o.ascend(arrays(3, 4))
    o.descend(arrays(3, 4))  # s = 2.5: q = 2/3 is cut to 1/1.1
    assert o.metrics["lam"] == 0.5
    assert_near([o.lam, o.sharpness], [0.5 / 1.1, 2.5], PAPER)
    o.ascend(arrays(3, 4))
    o.descend(arrays(0, 1))  # u = 6/11 (3, 4) + 5/11 (0, 1)
    assert_near(o.weights, [0.25 - 1.8 / 11, 1 - 2.9 / 11], PAPER)


def test_samar_with_the_adaptive_ascent():
    o = oracle([3, 2], mix=fixed(0.25), adaptive=True, rho=5, lr=1)
    assert_near(o.ascend(arrays(1, 2)), [12, 10], PAPER)  # n = 5, e = T^2 g = (9, 8)
    o.descend(arrays(3, 4))  # s = (4 * 9 + 6 * 8) / 2, u = (3/4 + 3/4, 6/4 + 4/4)
    assert_near(o.sharpness, 42, PAPER)
    assert_near(o.weights, [1.5, -0.5], PAPER)


def test_samar_renormalized():
    o = oracle([1, 2], mix=fixed(0.5), renormalize=True, lr=1, rho=0.5)
    o.ascend(arrays(3, 4))
    o.descend(arrays(8, 6))  # gamma = 1/2: u = (1.5, 2) + (2, 1.5); s is of g~ as it came
    assert_near(o.weights, [-2.5, -1.5], PAPER)
    assert_near(o.sharpness, (11 * 0.3 + 10 * 0.4) / 2, PAPER)


def test_samar_clips_the_mixture():
    o = oracle([0, 0], mix=fixed(0.5), max_grad_norm=5, lr=1)
    o.ascend(arrays(3, 4))
    o.descend(arrays(6, 8))  # ||u|| = 7.5
    assert_near(o.weights, [-4.5 * 5 / (7.5 + 1e-6), -6 * 5 / (7.5 + 1e-6)], PAPER)


def test_samar_and_missing_gradients():
    o = oracle([1, 1, 1, 1], mix=fixed(0.25), rho=0.5, momentum=0.9)
    assert_near(o.ascend(arrays(3, 4, None, None)), [1.3, 1.4, 1, 1], PAPER)
    o.descend(arrays(5, None, 8, None))
    assert_near(o.weights, [0.65, 1, 0.8, 1], PAPER)  # u = (3.5, -, 2, -)
    assert_near(o.sharpness, 8 * 0.3 / 2, PAPER)
    assert o.state[1] == o.state[3] == {}


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("renormalize", [False, True])
def test_samar_leaves_out_a_first_gradient_that_is_not_finite(bad, renormalize):
    o = oracle([1, 2], mix=fixed(0.5), renormalize=renormalize)
    np.testing.assert_array_equal(o.ascend(arrays(3, bad)), [1, 2])
    o.descend(arrays(8, 6))
    assert_near(o.weights, [0.2, 1.4], PAPER)  # as SAM, which knows only g~


@pytest.mark.parametrize("sign", [1, -1])
def test_samar_maximizes_the_mixture(sign):
    o = oracle([0, 0], mix=fixed(0.5), lr=0.1, maximize=sign < 0)
    o.ascend(arrays(3, 4))
    o.descend(arrays(6, 8))
    assert_near(o.weights, [-0.45 * sign, -0.6 * sign], PAPER)


@pytest.mark.parametrize("base", ["sgd", "adamw", "adagrad_norm", "uncorrected_adam"])
@pytest.mark.parametrize("adaptive", [False, True])
def test_samar_with_lam_fixed_at_one_is_sam_and_at_zero_the_base(base, adaptive):
    problem = Problem(SHAPES, seed=6)
    options = {"base": base, "lr": 0.05, "adaptive": adaptive}
    sam = oracle(problem.initial(), rho=0.2, **options)
    plain = oracle(problem.initial(), rho=0.0, **options)
    one, zero = (oracle(problem.initial(), rho=0.2, mix=fixed(x), **options) for x in (1, 0))
    for _ in range(STEPS):
        for o in (sam, plain, one, zero):
            o.step(problem.grad)
        np.testing.assert_array_equal(flat(one.weights), flat(sam.weights))
        np.testing.assert_array_equal(flat(zero.weights), flat(plain.weights))
    assert np.max(np.abs(flat(sam.weights) - flat(plain.weights))) > 1e-3


@pytest.mark.parametrize("adaptive", [False, True])
def test_samars_sharpness_of_a_quadratic_is_the_loss_gap(adaptive):
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((6, 6)), rng.standard_normal(6)
    a = a + a.T

    def loss(w):
        return flat(w) @ a @ flat(w) / 2 + b @ flat(w)

    def grad(w):
        g = a @ flat(w) + b
        return [g[:4].reshape(2, 2), g[4:]]

    w = rng.standard_normal(6)
    start = [w[:4].reshape(2, 2), w[4:]]
    o = oracle(start, mix=Ratio(), rho=0.7, adaptive=adaptive, eta=0.2, lr=0.01)
    for _ in range(5):
        before = list(o.weights)
        o.ascend(grad(before))
        o.descend(grad(o.perturbed))
        gap = loss(o.perturbed) - loss(before)
        # the terms of the losses are of order 10
        assert o.metrics["sharpness"] == pytest.approx(gap, abs=1e-13)
        assert abs(gap) > 0.1


# --- SAMAR's lam --------------------------------------------------------------------------------


def lams(sharpness, rule):
    """lam and S after steps whose s_k are the given ones.

    With one weight, rho = 1 and g = 1, e is 1 but for the 1e-12 beside the norm.
    """
    o = oracle([0], mix=rule, rho=1, lr=0)
    found = []
    for s in sharpness:
        lam = o.lam
        o.ascend(arrays(1))
        o.descend(arrays(2 * s - 1))
        assert o.metrics["lam"] == lam
        found.append((o.lam, o.sharpness))
    return np.transpose(found)


def test_lam_follows_the_ratio_within_its_bounds():
    rule = Ratio(lam=1, c=1.25, lam_min=0.7, lam_max=1.4)
    s = [4, 4.4, 8, 40, 36, 18, 9, 9]
    expected = [1, 1.1, 1.375, 1.4, 1.26, 1.008, 0.8064, 0.8064]
    found = lams(s, rule)
    assert_near(found[0], expected, PAPER)
    assert_near(found[1], s, PAPER)
    assert_near(lams([1, 0.5, 0.25, 0.125], rule)[0], [1, 0.8, 0.7, 0.7], PAPER)
    assert_near(lams([1, 1.1, 1.21], Ratio())[0], [1, 1.1, 1.21], PAPER)


def test_the_first_sharpness_changes_nothing():
    assert lams([5], Ratio(lam=7))[0] == 7  # not even to bring lam within its bounds
    assert_near(lams([5, 5], Ratio(lam=7))[0], [7, 2], PAPER)


def test_smoothing():
    rule = Ratio(c=2, smoothing=0.75)
    found = lams([4, 8, 1], rule)  # S = 4, 3/4 4 + 1/4 8 = 5, 3/4 5 + 1/4 1 = 4
    assert_near(found[1], [4, 5, 4], PAPER)
    assert_near(found[0], [1, 1.25, 1], PAPER)


def test_sharpness_that_is_not_positive():
    rule = Ratio(c=1.25)
    assert_near(lams([-3, 1], rule)[0], [1, 1.25], PAPER)  # up from below zero
    assert_near(lams([-3, -6, 0, -1], rule)[0], [1, 1, 1, 1], PAPER)
    assert_near(lams([1, -1, 1], rule)[0], [1, 0.8, 1], PAPER)  # down, as far as c goes
    # exactly zero says that nothing was perturbed: it is not a measurement
    assert_near(lams([1, 0, 1.2], rule)[0], [1, 1, 1.2], PAPER)


def test_a_rule_may_be_any_function():
    calls = []

    def rule(lam, sharpness, previous):
        calls.append((lam, sharpness, previous))
        return lam / 2

    assert_near(lams([4, 8, 1], rule)[0], [1, 0.5, 0.25], PAPER)
    assert_near(calls, [(1, 8, 4), (0.5, 1, 8)], PAPER)


@pytest.mark.parametrize(
    ("first", "second"),
    [((0, 0), (1, 1)), ((np.inf, 1), (1, 1)), ((np.nan, 1), (1, 1)), ((np.inf, 1), (None, 1))]
    + [((3, 4), (np.nan, 1)), ((3, 4), (np.inf, 1)), ((3, 4), (None, None))],
    ids=["zero", "inf", "nan", "inf-alone", "nan-second", "inf-second", "no-second"],
)
@pytest.mark.parametrize("steps", [0, 2])
def test_a_step_that_measures_nothing_leaves_lam_and_sharpness(first, second, steps):
    problem = Problem([(), ()], seed=0)
    o, other = (oracle(problem.initial(), mix=Ratio(c=1.5, smoothing=0.2)) for _ in range(2))
    for x in (o, other):
        for _ in range(steps):
            x.step(problem.grad)
    o.ascend(arrays(*first))
    o.descend(arrays(*second))
    assert (o.lam, o.sharpness) == (other.lam, other.sharpness)
    o.weights = list(other.weights)
    for x in (o, other):
        x.step(problem.grad)
    assert (o.lam, o.sharpness) == (other.lam, other.sharpness)
