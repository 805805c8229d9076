"""The oracles of VaSSO, LightSAM and AdaSAM: paper sums, closed forms; with SAMAR, plain loops."""

import math

import numpy as np
import pytest
import torch

from oracle_checks import PAPER, SHAPES, STEPS, arrays, assert_near, flat, oracle
from oracles import Oracle, Problem, Ratio, rounding

# LightSAM I to III: the ascent rules and the bases that go with them.
LIGHT = {
    "adagrad_norm": "light_adagrad_norm",
    "adagrad": "light_adagrad",
    "adam": "uncorrected_adam",
}


def light(w, rule, **kwargs):
    return oracle(w, ascent=rule, base=LIGHT[rule], **kwargs)


def constant(*grads):
    return lambda _: arrays(*grads)


# --- VaSSO on paper -----------------------------------------------------------------------------


def test_vasso():
    o = oracle([1, 2], ascent="vasso", theta=0.25, rho=0.5)
    o.ascend(arrays(3, 4))  # the first s is g
    assert_near(o.perturbed, [1 + 1.5 / (5 + 1e-7), 2 + 2 / (5 + 1e-7)], PAPER)
    o.descend(arrays(0, 0))
    o.ascend(arrays(7, 0))  # s = 3/4 (3, 4) + 1/4 (7, 0) = (4, 3)
    assert_near(o.perturbed, [1 + 2 / (5 + 1e-7), 2 + 1.5 / (5 + 1e-7)], PAPER)
    assert o.metrics["grad_norm"] == 7  # of g, not of s
    o.descend(arrays(6, 8))
    assert_near(o.weights, [0.4, 1.2], PAPER)
    assert_near([s["ascent_ema"] for s in o.state], [4, 3], PAPER)


def test_vasso_in_groups_of_which_one_is_adaptive():
    adaptive = {"params": [1], "rho": 0.5, "adaptive": True, "eta": 1, "theta": 0.5, "lr": 0}
    o = Oracle(arrays(7, 2), [adaptive, {"params": [0], "rho": 1, "lr": 0}], "sgd", ascent="vasso")
    o.step(constant(4, 1))
    o.ascend(arrays(4, 7))  # s = (4, 4), T = (1, 3): T s = (4, 12), T^2 s = (4, 36)
    n = math.sqrt(160)
    assert o.metrics["grad_norm"] == pytest.approx(math.sqrt(4**2 + 21**2), rel=PAPER)
    assert_near(o.perturbed, [7 + 4 / (n + 1e-7), 2 + 18 / (n + 1e-7)], PAPER)


def test_vasso_averages_what_each_weight_got():
    o = oracle([0, 0], ascent="vasso", theta=0.5, rho=5, lr=0)
    o.step(constant(3, None))
    assert_near(o.perturbed, [5 * 3 / (3 + 1e-7), 0], PAPER)  # the norm of what is there
    assert o.state[1] == {}
    o.step(constant(5, 3))  # s = (4, 3): the second starts here, at its g
    assert_near(o.perturbed, [5 * 4 / (5 + 1e-7), 5 * 3 / (5 + 1e-7)], PAPER)
    o.step(constant(None, 13))  # s = (4, 8), of which only the second takes part
    assert_near(o.perturbed, [0, 5 * 8 / (8 + 1e-7)], PAPER)
    assert_near([s["ascent_ema"] for s in o.state], [4, 8], PAPER)


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_vasso_forgets_a_gradient_that_is_not_finite(bad):
    o = oracle([1, 2], ascent="vasso", theta=0.5)
    o.step(constant(bad, 1))
    assert o.state == [{}, {}]  # still to start with the first good one
    o = oracle([1, 2], ascent="vasso", theta=0.5, lr=0)
    o.step(constant(3, 4))
    o.ascend(arrays(bad, 8))
    np.testing.assert_array_equal(o.perturbed, [1, 2])
    o.descend(arrays(0, 0))
    assert o.state == [{"ascent_ema": 3}, {"ascent_ema": 4}]


def test_vasso_with_an_average_of_zero():
    o = oracle([1, 2], ascent="vasso", theta=0.5, lr=0)
    o.step(constant(3, 4))
    o.step(constant(-3, -4))
    np.testing.assert_array_equal(o.perturbed, [1, 2])
    assert o.state == [{"ascent_ema": 0}, {"ascent_ema": 0}]


def test_vasso_renormalized_has_the_norms_of_gradients():
    o = oracle([1, 2], ascent="vasso", theta=0.25, renormalize=True, lr=0)
    o.step(constant(3, 4))
    o.groups[0]["lr"] = 1
    o.ascend(arrays(9, 12))  # ||s|| = 7.5, ||g|| = 15
    o.descend(arrays(24, 18))  # n~ = 30
    assert o.metrics["renormalization"] == pytest.approx(0.5, rel=PAPER)
    assert_near(o.weights, [-11, -7], PAPER)


@pytest.mark.parametrize("adaptive", [False, True])
def test_vasso_without_memory_is_sam(adaptive):
    problem = Problem(SHAPES, seed=4)
    options = {"rho": 0.2, "lr": 0.05, "momentum": 0.9, "adaptive": adaptive, "eta": 0.01}
    sam, vasso = (
        oracle(problem.initial(), ascent=ascent, **options | theta)
        for ascent, theta in (("unified", {}), ("vasso", {"theta": 1.0}))
    )
    for _ in range(STEPS):
        for o in (sam, vasso):
            o.step(problem.grad)
        # 1e-7 beside a norm of order 1 takes 1e-7 of a perturbation that is a tenth of the weights,
        # over 20 steps whose errors hardly grow.
        assert_near(flat(vasso.weights), flat(sam.weights), 1e-7)


# --- LightSAM on paper --------------------------------------------------------------------------


def test_lightsam_1():
    o = light([[0, 0]], "adagrad_norm", eps=12, rho=26, lr=15)
    assert (o.a2, o.b2) == (144, 144)
    assert_near(o.ascend(arrays([3, 4])), [[6, 8]], PAPER)  # a = 144 + 25 = 13^2
    assert o.metrics["grad_norm"] == 5
    o.descend(arrays([0, 9]))  # b = 144 + 81 = 15^2
    assert_near(o.weights, [[0, -9]], PAPER)
    assert_near(o.ascend(arrays([0, math.sqrt(507)])), [[0, -9 + math.sqrt(507)]], PAPER)  # 26^2
    o.descend(arrays([math.sqrt(675), 0]))  # b = 225 + 675 = 30^2
    assert_near(o.weights, [[-math.sqrt(675) / 2, -9]], PAPER)
    assert_near([o.a2, o.b2], [676, 900], PAPER)
    assert o.state == [{}]


def test_lightsam_2():
    o = light([[0, 0]], "adagrad", eps=12, rho=13, lr=39)
    assert_near(o.ascend(arrays([5, -9])), [[5, -9 * 13 / 15]], PAPER)  # roots 13 and 15
    o.descend(arrays([-5, 0]))
    assert_near(o.weights, [[15, 0]], PAPER)
    o.step(constant([math.sqrt(1352), 0]))  # a = (39^2, 15^2), b = (39^2, 12^2)
    assert_near(o.perturbed, [[15 + math.sqrt(1352) / 3, 0]], PAPER)
    assert_near(o.weights, [[15 - math.sqrt(1352), 0]], PAPER)
    assert_near(o.state[0]["ascent_sum"], [1521, 225], PAPER)
    assert_near(o.state[0]["sum"], [1521, 144], PAPER)


def test_lightsam_3():
    o = light([1.0], "adam", eps=2, betas=(0.5, 0.75), rho=0.5, lr=1)
    assert_near(o.ascend(arrays(2)), [1.25], PAPER)  # r = 1, a = 3/4 4 + 1/4 4 = 4
    o.descend(arrays(math.sqrt(52)))  # m = sqrt(13), v = 3 + 13 = 16
    assert_near(o.weights, [1 - math.sqrt(13) / 4], PAPER)
    w = o.weights[0]
    assert_near(o.ascend(arrays(-2)), [w - 1 / 8], PAPER)  # r = 1/2 - 1 = -1/2, a = 3 + 1 = 4
    o.descend(arrays(0))  # m = sqrt(13)/2, v = 12
    assert_near(o.weights, [w - math.sqrt(13 / 48)], PAPER)
    state = {"ascent_exp_avg": -0.5, "ascent_exp_avg_sq": 4, "exp_avg": math.sqrt(13) / 2}
    assert o.state[0] == pytest.approx(state | {"exp_avg_sq": 12}, rel=PAPER)


def test_adasam():
    o = oracle([1], base="uncorrected_amsgrad", eps=2, betas=(0.5, 0.75), lr=1, rho=0.1)
    assert_near(o.ascend(arrays(-3)), [0.9], PAPER)  # the ascent is SAM's
    o.descend(arrays(math.sqrt(52)))  # m = sqrt(13), v = v^ = 16
    w = 1 - math.sqrt(13) / 4
    assert_near(o.weights, [w], PAPER)
    o.step(constant(0))  # m = sqrt(13)/2, v = 12, v^ = 16
    assert_near(o.weights, [w - math.sqrt(13) / 8], PAPER)
    state = {"exp_avg": math.sqrt(13) / 2, "exp_avg_sq": 12, "max_exp_avg_sq": 16}
    assert o.state[0] == pytest.approx(state, rel=PAPER)
    o = oracle([1], base="uncorrected_amsgrad", eps=2, betas=(0.5, 0.75), lr=1)
    o.step(constant(1))  # v = 3 + 1/4, which does not reach eps^2 = 4
    assert_near(o.weights, [1 - 1 / 4], PAPER)


def test_the_first_step_of_lightsam_3_is_3_16_times_the_sign():
    o = light([[0, 0, 0]], "adam", rho=0.1, lr=0.01)
    o.ascend(arrays([2e-2, -3, 0]))  # eps^2 = 1e-16 beside 1e-3 g^2 = 4e-7
    factor = 0.1 / math.sqrt(1e-3)
    assert_near(o.perturbed, [[0.1 * factor, -0.1 * factor, 0]], 1e-9)
    o.descend(arrays([-1, 0, 5]))
    assert_near(o.weights, [[0.01 * factor, 0, -0.01 * factor]], 1e-9)


@pytest.mark.parametrize("base", ["uncorrected_adam", "uncorrected_amsgrad", "light_adagrad"])
def test_decoupled_weight_decay(base):
    plain, decayed = (
        oracle([3], base=base, lr=0.1, weight_decay=decay, eps=1) for decay in (0, 0.5)
    )
    for o in (plain, decayed):
        o.step(constant(2))
    # w (1 - lr wd) = 2.85; the gradient, and so the step from there, is the same
    assert_near(decayed.weights[0], plain.weights[0] - 0.15, PAPER)
    assert decayed.state == plain.state


def test_decoupled_weight_decay_of_lightsam_1():
    o = light([[2, 1]], "adagrad_norm", eps=12, lr=0.5, weight_decay=0.4)
    o.step(constant([3, 4]))
    assert_near(o.weights, [[1.6 - 1.5 / 13, 0.8 - 2 / 13]], PAPER)


T = 7


@pytest.mark.parametrize("g", [3.0, -0.2])
def test_constant_gradients_give_closed_forms(g):
    options = {"eps": 0.5, "rho": 0.3, "lr": 0.1}
    one, two, three = (light([1], r, **options) for r in LIGHT)
    amsgrad = oracle([1], base="uncorrected_amsgrad", **options)
    for o in (one, two, three, amsgrad):
        for _ in range(T):
            before = o.weights[0]
            o.step(constant(g))
        o.e, o.update = o.perturbed[0] - before, before - o.weights[0]
    a = 0.25 + T * g * g
    assert_near([one.a2, one.b2, two.state[0]["ascent_sum"], two.state[0]["sum"]], 4 * [a], PAPER)
    assert_near([one.e, two.e], 2 * [0.3 * g / math.sqrt(a)], PAPER)
    assert_near([one.update, two.update], 2 * [0.1 * g / math.sqrt(a)], PAPER)
    r, a = (1 - 0.9**T) * g, 0.999**T * 0.25 + (1 - 0.999**T) * g * g
    assert_near(three.e, 0.3 * r / math.sqrt(a), PAPER)
    assert_near(three.update, 0.1 * r / math.sqrt(a), PAPER)
    averages = {"exp_avg": r, "exp_avg_sq": a}
    ascent = {"ascent_exp_avg": r, "ascent_exp_avg_sq": a}
    assert three.state[0] == pytest.approx(averages | ascent, rel=PAPER)
    # the maximum is the start where the average falls towards g^2, else the average
    assert_near(amsgrad.update, 0.1 * r / math.sqrt(max(a, 0.25)), PAPER)


def test_light_adagrad_is_torchs_from_eps_squared():
    problem = Problem(SHAPES, seed=1)
    parameters = [torch.nn.Parameter(torch.tensor(w)) for w in problem.initial()]
    theirs = torch.optim.Adagrad(parameters, lr=0.1, initial_accumulator_value=0.01, eps=0)
    ours = oracle(problem.initial(), base="light_adagrad", lr=0.1, eps=0.1, rho=0)
    for _ in range(STEPS):
        for p, g in zip(parameters, problem.grad([p.detach() for p in parameters]), strict=True):
            p.grad = torch.tensor(g)
        theirs.step()
        ours.step(problem.grad)
        for p, w, state in zip(parameters, ours.weights, ours.state, strict=True):
            assert_near(w, p.detach().numpy(), 1e-12)
            assert_near(state["sum"], theirs.state[p]["sum"].numpy(), 1e-12)


@pytest.mark.parametrize("rule", LIGHT)
def test_lightsam_groups(rule):
    """Each group has its own rho, lr, eps and betas; rule I has one accumulator for all."""
    other = {"params": [0], "rho": 0.2, "lr": 0.4, "eps": 1.5}
    other |= {"betas": (0.2, 0.3)} if rule == "adam" else {}
    groups = [{"params": [1], "lr": 0.1, "eps": 2.0}, other]
    o = Oracle(arrays(0, 0), groups, LIGHT[rule], ascent=rule)
    o.step(constant(3, 4))
    if rule == "adam":
        roots = math.sqrt(0.3 * 2.25 + 0.7 * 9), math.sqrt(0.999 * 4 + 0.001 * 16)
        directions = [0.8 * 3 / roots[0], 0.1 * 4 / roots[1]]
    elif rule == "adagrad":
        directions = [3 / math.sqrt(11.25), 4 / math.sqrt(20)]
    else:
        directions = [3 / math.sqrt(29), 4 / math.sqrt(29)]  # the first group's eps
    assert_near(o.perturbed, np.multiply([0.2, 0.05], directions), PAPER)
    assert_near(o.weights, np.multiply([-0.4, -0.1], directions), PAPER)


@pytest.mark.parametrize("rule", LIGHT)
@pytest.mark.parametrize("renormalize", [False, True])
def test_adaptive_means_nothing_to_lightsam(rule, renormalize):
    problem, results = Problem(SHAPES, seed=5), []
    for adaptive in (False, True):
        o = light(problem.initial(), rule, adaptive=adaptive, eta=0.3, renormalize=renormalize)
        for _ in range(3):
            o.step(problem.grad)
        results.append([flat(o.weights), o.metrics])
    np.testing.assert_array_equal(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]


def test_lightsam_and_missing_gradients():
    two, three = (light([0, 0], rule, eps=12, rho=1) for rule in ("adagrad", "adam"))
    for o in (two, three):
        o.ascend(arrays(5, None))
        assert o.perturbed[1] == 0
        o.descend(arrays(None, 5))  # the first is perturbed, the second updated
        assert o.weights[0] == 0
    assert two.state == [{"ascent_sum": 169}, {"sum": 169}]
    assert three.state[0].keys() == {"ascent_exp_avg", "ascent_exp_avg_sq"}
    assert three.state[1].keys() == {"exp_avg", "exp_avg_sq"}
    one = light([0, 0], "adagrad_norm", eps=12, rho=13)
    one.ascend(arrays(5, None))
    assert_near(one.perturbed, [5, 0], PAPER)
    one.descend(arrays(None, None))
    assert (one.a2, one.b2) == (169, 144)


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_lightsam_and_gradients_that_are_not_finite(bad):
    one, two, three = (light([[1, 2]], r, eps=12, rho=13, lr=0) for r in LIGHT)
    for o in (one, two, three):
        o.ascend(arrays([bad, 5]))
        o.descend(arrays([0, 0]))
    np.testing.assert_array_equal(one.perturbed, [[1, 2]])
    assert one.a2 == 144
    np.testing.assert_array_equal(two.perturbed, [[1, 7]])  # each element on its own
    np.testing.assert_array_equal(two.state[0]["ascent_sum"], [144, 169])
    root = math.sqrt(0.999 * 144 + 0.001 * 25)
    assert_near(three.perturbed, [[1, 2 + 13 * 0.5 / root]], PAPER)
    assert_near(three.state[0]["ascent_exp_avg"], [0, 0.5], PAPER)
    assert_near(three.state[0]["ascent_exp_avg_sq"], [144, root**2], PAPER)
    three.ascend(arrays([5, bad]))
    three.descend(arrays([0, 0]))
    assert_near(three.state[0]["ascent_exp_avg"], [0.5, 0.5], PAPER)
    assert_near(three.state[0]["ascent_exp_avg_sq"], [root**2, root**2], PAPER)


def test_no_step_where_the_squares_have_been_forgotten():
    o = light([[1, 2]], "adam", betas=(0.5, 0), rho=0.1, lr=0.1)
    o.step(constant([2, 2]))
    w = o.weights[0][0]
    o.step(constant([0, 2]))  # a = v = (0, 4), r = m = (1/2, 3/2)
    assert_near([o.perturbed[0][0], o.weights[0][0]], [w, w], PAPER)
    assert_near(o.perturbed[0][1], 1.95 + 0.1 * 0.75, PAPER)


def test_finite_means_finite_as_stored():
    """1e25 is a float32, and a thousandth of its square is not."""
    for rule in LIGHT:
        o = light([[1, 2]], rule, ascent_storage=rounding("float32"), lr=0)
        o.step(constant([1e25, 0]))
        np.testing.assert_array_equal(o.perturbed, [[1, 2]])
        o = light([[1, 2]], rule, lr=0)
        o.step(constant([1e25, 0]))
        assert o.perturbed[0][0] > 1


# --- What may become of a step ------------------------------------------------------------------


ASCENTS = [
    ("vasso", "sgd", {"momentum": 0.9, "theta": 0.4}),
    ("vasso", "uncorrected_amsgrad", {"theta": 0.4}),
    *((rule, base, {}) for rule, base in LIGHT.items()),
]


@pytest.mark.parametrize(("ascent", "base", "options"), ASCENTS)
def test_a_step_that_is_skipped_leaves_no_trace(ascent, base, options):
    problem = Problem(SHAPES, seed=2)
    options = options | {"ascent": ascent, "base": base, "mix": Ratio()}
    skipping = oracle(problem.initial(), skip_nonfinite=True, **options)
    plain = oracle(problem.initial(), **options)
    for bad in (np.nan, np.inf):
        for o in (skipping, plain):
            o.step(problem.grad)
        grads = problem.grad(skipping.weights)
        skipping.ascend([2 * g for g in grads])
        grads[0][0, 0] = bad
        skipping.descend(grads)
        np.testing.assert_equal(skipping.state, plain.state)
        np.testing.assert_array_equal(flat(skipping.weights), flat(plain.weights))
        for name in ("a2", "b2", "lam", "sharpness"):
            assert getattr(skipping, name) == getattr(plain, name)
    assert skipping.metrics["skipped"] == 2


@pytest.mark.parametrize(("ascent", "base", "options"), ASCENTS)
def test_the_ascent_changes_its_state_when_the_step_is_complete(ascent, base, options):
    problem = Problem(SHAPES, seed=2)
    one, other = (oracle(problem.initial(), ascent=ascent, base=base, **options) for _ in range(2))
    for o in (one, other):
        o.step(problem.grad)
    one.ascend(problem.grad(one.weights))
    np.testing.assert_equal(one.state, other.state)
    assert one.a2 == other.a2
    one.ascend(problem.grad(one.weights))  # the second pass never came: begin again
    one.descend(problem.grad(one.perturbed))
    other.step(problem.grad)
    np.testing.assert_equal(one.state, other.state)
    np.testing.assert_array_equal(flat(one.weights), flat(other.weights))
    assert one.a2 == other.a2


@pytest.mark.parametrize(("ascent", "base", "options"), ASCENTS)
def test_the_ascent_has_its_own_storage(ascent, base, options):
    problem, single = Problem(SHAPES, seed=2), rounding("float32")
    stores = {"storage": rounding("bfloat16"), "grad_storage": rounding("float16")}
    stores |= {"state_storage": single, "ascent_storage": single}
    o = oracle(problem.initial(), ascent=ascent, base=base, **options | stores)
    for _ in range(3):
        o.step(problem.grad)
    for state in o.state:
        for name, x in state.items():
            if name != "step":
                np.testing.assert_array_equal(x, single(x))
    held = np.concatenate([flat(s.values()) for s in o.state]) if o.state[0] else np.array([o.a2])
    assert np.any(held != stores["storage"](held))
    np.testing.assert_array_equal(flat(o.weights), stores["storage"](flat(o.weights)))


def test_what_an_ascent_does_not_know_is_refused():
    with pytest.raises(ValueError, match="theta"):
        oracle([1], theta=0.9)
    with pytest.raises(KeyError):
        oracle([1], ascent="sam")


# --- Whole runs against plain loops over one vector ---------------------------------------------


def run(steps, **kwargs):
    problem = Problem(SHAPES, seed=7)
    o = oracle(problem.initial(), **kwargs)
    for _ in range(steps):
        o.step(problem.grad)
    return flat(o.weights)


class Vector:
    """The problem's start and gradient as vectors, for loops that know no tensors."""

    def __init__(self):
        self._problem = Problem(SHAPES, seed=7)
        self.start = flat(self._problem.initial())

    def grad(self, x):
        ends = np.cumsum([math.prod(shape) for shape in SHAPES])[:-1]
        parts = [p.reshape(s) for p, s in zip(np.split(x, ends), SHAPES, strict=True)]
        return flat(self._problem.grad(parts))


def test_vasso_run():
    v = Vector()
    w, s, buf = v.start, None, 0
    for _ in range(STEPS):
        g = v.grad(w)
        s = g if s is None else 0.1 * s + 0.9 * g
        buf = 0.5 * buf + v.grad(w + 0.3 * s / (np.linalg.norm(s) + 1e-7))
        w = w - 0.05 * buf
    assert_near(run(STEPS, ascent="vasso", rho=0.3, lr=0.05, momentum=0.5), w, 1e-12)


def test_adasam_run():
    v = Vector()
    w, m, s, largest = v.start, 0, 1e-16, 1e-16
    for _ in range(STEPS):
        g = v.grad(w)
        g = v.grad(w + 0.3 * g / np.linalg.norm(g))
        m, s = 0.9 * m + 0.1 * g, 0.999 * s + 0.001 * g**2
        largest = np.maximum(s, largest)
        w = 0.998 * w - 0.02 * m / largest**0.5
    options = {"rho": 0.3, "lr": 0.02, "weight_decay": 0.1}
    # the loop has nothing beside the norm: 1e-12 of a perturbation
    assert_near(run(STEPS, base="uncorrected_amsgrad", **options), w, 1e-11)


def test_lightsam_1_run():
    v = Vector()
    w, a, b = v.start, 0.01, 0.01
    for _ in range(STEPS):
        g = v.grad(w)
        a += g @ g
        g = v.grad(w + 0.5 * g / a**0.5)
        b += g @ g
        w = w - 0.7 * g / b**0.5
    options = {"ascent": "adagrad_norm", "base": "light_adagrad_norm", "eps": 0.1}
    assert_near(run(STEPS, rho=0.5, lr=0.7, **options), w, 1e-12)


def test_samar_run():
    v = Vector()
    w, lam, previous, seen = v.start, 0.8, None, []
    for _ in range(STEPS):
        g = v.grad(w)
        e = 0.5 * g / np.linalg.norm(g)
        h = v.grad(w + e)
        w = w - 0.1 * ((1 - lam) * g + lam * h)
        s = (g + h) @ e / 2
        if previous is not None:
            lam = np.clip(lam * np.clip(s / previous, 1 / 1.05, 1.05), 0.6, 1.0)
        previous = s
        seen.append(lam)
    assert len(set(seen)) > 3  # it does move, and not only from one bound to the other
    rule = Ratio(lam=0.8, c=1.05, lam_min=0.6, lam_max=1.0)
    assert_near(run(STEPS, rho=0.5, lr=0.1, mix=rule), w, 1e-11)
