"""The oracles against torch, against the Unified SAM authors' package and against paper sums."""

import math

import numpy as np
import pytest
import torch

import oracles
from oracle_checks import PAPER, SHAPES, STEPS, arrays, assert_near, flat, oracle
from oracles import Oracle, Problem, rounding

# --- The base updates, against torch.optim ------------------------------------------------------


BASES = [
    ("sgd", torch.optim.SGD, {"lr": 0.05}),
    ("sgd", torch.optim.SGD, {"lr": 0.05, "weight_decay": 0.1}),
    ("sgd", torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01}),
    ("sgd", torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1}),
    ("sgd", torch.optim.SGD, {"lr": 0.02, "momentum": 0.8, "nesterov": True}),
    ("sgd", torch.optim.SGD, {"lr": 0.005, "momentum": 0.5, "weight_decay": 0.1, "maximize": True}),
    ("adam", torch.optim.Adam, {"lr": 0.05}),
    ("adam", torch.optim.Adam, {"lr": 0.05, "weight_decay": 0.1, "eps": 1e-3}),
    ("adam", torch.optim.Adam, {"lr": 0.05, "betas": (0.5, 0.6), "amsgrad": True}),
    ("adam", torch.optim.Adam, {"lr": 0.02, "weight_decay": 0.1, "maximize": True}),
    ("adamw", torch.optim.AdamW, {"lr": 0.05}),
    ("adamw", torch.optim.AdamW, {"lr": 0.05, "weight_decay": 0.2, "betas": (0.8, 0.9)}),
    ("adamw", torch.optim.AdamW, {"lr": 0.05, "betas": (0.5, 0.6), "amsgrad": True}),
    ("adamw", torch.optim.AdamW, {"lr": 0.02, "weight_decay": 0.2, "maximize": True}),
    ("adagrad", torch.optim.Adagrad, {"lr": 0.1}),
    ("adagrad", torch.optim.Adagrad, {"lr": 0.1, "lr_decay": 0.2, "weight_decay": 0.1}),
    ("adagrad", torch.optim.Adagrad, {"initial_accumulator_value": 0.5, "eps": 1e-3}),
    ("adagrad", torch.optim.Adagrad, {"lr": 0.02, "weight_decay": 0.1, "maximize": True}),
]


def torch_gradients(problem, parameters):
    grads = problem.grad([p.detach().numpy() for p in parameters])
    for p, g in zip(parameters, grads, strict=True):
        p.grad = torch.tensor(g)


@pytest.mark.parametrize(("base", "cls", "options"), BASES)
def test_without_perturbation_every_base_is_torchs(base, cls, options):
    problem = Problem(SHAPES, seed=1)
    parameters = [torch.nn.Parameter(torch.tensor(w)) for w in problem.initial()]
    slow = options | {"lr": 0.01}
    theirs = cls([{"params": parameters[:2]}, {"params": parameters[2:], **slow}], **options)
    groups = [{"params": [0, 1], "rho": 0.0, **options}, {"params": [2, 3, 4], "rho": 0.0, **slow}]
    ours = Oracle(problem.initial(), groups, base)
    # Both are float64 and differ by the order of operations: a few times 1e-16 in each of 20
    # steps, which the problem hardly amplifies. 1e-12 is far below the effect of any term.
    for _ in range(STEPS):
        torch_gradients(problem, parameters)
        theirs.step()
        ours.step(problem.grad)
        for p, w, state in zip(parameters, ours.weights, ours.state, strict=True):
            assert w.shape == p.shape
            assert_near(w, p.detach().numpy(), 1e-12)
            expected = {k: v for k, v in theirs.state[p].items() if v is not None}
            assert state.keys() == expected.keys()
            for name, value in expected.items():
                assert_near(state[name], value, 1e-12)


# --- Sums on paper ------------------------------------------------------------------------------


def test_sam():
    o = oracle([[1, 2]], rho=0.5)
    assert_near(o.ascend(arrays([3, 4])), [[1.3, 2.4]], PAPER)  # n = 5, e = (0.3, 0.4)
    o.descend(arrays([6, 8]))
    assert_near(o.weights, [[0.4, 1.2]], PAPER)
    norms = {"grad_norm": 5, "perturbed_grad_norm": 10}
    assert o.metrics == {**norms, "renormalization": 1, "skipped": 0}


@pytest.mark.parametrize(("w", "eta"), [([3, -2], 0), ([2, 1], 1)])
def test_asam(w, eta):
    o = oracle([w], rho=0.5, adaptive=True, eta=eta)
    o.ascend(arrays([1, -2]))  # T = (3, 2): T g = (3, -4), n = 5, T^2 g = (9, -8)
    assert_near(o.perturbed, [np.add(w, [0.9, -0.8])], PAPER)


def test_usam_and_unified_sam():
    assert_near(oracle([1, 2], rho=0.1, lam=0).ascend(arrays(3, 4)), [1.3, 2.4], PAPER)
    assert_near(oracle([1, 2], rho=0.1, lam=0.5).ascend(arrays(3, 4)), [1.18, 2.24], PAPER)


def test_lam_is_a_function_of_the_step_from_1():
    o = oracle([1, 2], rho=0.1, lr=0, lam=lambda t: 1 / t)
    for factor in (1 / 5, 1 / 2 + 1 / 10, 2 / 3 + 1 / 15):  # 1 - 1/t + 1/(5 t)
        o.step(lambda _: arrays(3, 4))
        assert_near(o.perturbed, [1 + 0.3 * factor, 2 + 0.4 * factor], PAPER)
    assert o.t == 3


def test_groups_share_the_norm_and_nothing_else():
    adaptive = {"params": [1], "rho": 0.5, "adaptive": True, "eta": 1, "lr": 0.1}
    o = Oracle(arrays(7, 2), [adaptive, {"params": [0], "rho": 1.0, "lr": 1}], "sgd")
    o.step(lambda _: arrays(4, 1))  # T = (1, 3): T g = (4, 3), n = 5
    assert_near(o.perturbed, [7.8, 2.9], PAPER)
    assert_near(o.weights, [3, 1.9], PAPER)


def test_ssam():
    o = oracle([1, 2], renormalize=True)
    o.ascend(arrays(3, 4))
    o.descend(arrays(8, 6))  # n = 5, n~ = 10
    assert_near(o.weights, [0.6, 1.7], PAPER)
    assert o.metrics["renormalization"] == pytest.approx(0.5, rel=PAPER)


def test_ssam_with_the_adaptive_ascent_has_t_at_the_perturbed_weights():
    o = oracle([3, 2], renormalize=True, adaptive=True, rho=5, lr=1)
    assert_near(o.ascend(arrays(1, 2)), [12, 10], PAPER)  # n = 5, e = T^2 g = (9, 8)
    o.descend(arrays(0.5, 0.8))  # T g~ = (6, 8), gamma = 1/2
    assert_near(o.weights, [2.75, 1.6], PAPER)


def test_ssam_with_equal_norms_is_sam_exactly():
    sam, ssam = oracle([1, 2]), oracle([1, 2], renormalize=True)
    for o in (sam, ssam):
        o.ascend(arrays(0.3, 0.4))
        o.descend(arrays(0.4, 0.3))
    assert ssam.metrics["renormalization"] == 1
    np.testing.assert_array_equal(ssam.weights, sam.weights)


def test_eps_is_added_to_the_norms():
    o = oracle([0, 0], rho=2, lr=1, renormalize=True)
    assert_near(o.ascend(arrays(3e-12, 4e-12)), [1, 8 / 6], PAPER)  # 2 g / (5e-12 + 1e-12)
    o.descend(arrays(0, 4e-12))  # gamma = 5e-12 / (4e-12 + 1e-12) = 1
    assert_near(o.weights, [0, -4e-12], PAPER)


def test_clipping():
    o = oracle([1, 2], max_grad_norm=1, renormalize=True, lr=1)
    o.ascend(arrays(3, 4))
    o.descend(arrays(8, 6))  # gamma = 1/2, ||u|| = 5
    assert_near(o.weights, [1 - 4 / (5 + 1e-6), 2 - 3 / (5 + 1e-6)], PAPER)
    o = oracle([1, 2], max_grad_norm=11, adaptive=True, lr=1)
    o.step(lambda _: arrays(8, 6))  # the plain norm, 10, is below 11; that with T is not
    assert_near(o.weights, [-7, -4], PAPER)


def test_missing_gradients():
    o = oracle([1, 1, 1, 1], rho=0.5, renormalize=True, momentum=0.9)
    assert_near(o.ascend(arrays(3, None, 4, None)), [1.3, 1, 1.4, 1], PAPER)
    o.descend(arrays(6, 8, None, None))  # n = 5, n~ = 10
    assert_near(o.weights, [0.7, 0.6, 1, 1], PAPER)
    assert_near([s.get("momentum_buffer", 0) for s in o.state], [3, 4, 0, 0], PAPER)
    assert o.state[2] == o.state[3] == {}


def test_a_missing_gradient_does_not_advance_the_step():
    o = oracle([1, 1], base="adam")
    for grads in (arrays(1, None), arrays(1, 1)):
        o.step(lambda _, grads=grads: grads)
    assert [s["step"] for s in o.state] == [2, 1]
    # The first step of Adam is lr times the sign; eps takes 1e-8 of it.
    assert o.weights[1] == pytest.approx(0.9, rel=1e-8)


@pytest.mark.parametrize(("sign", "maximize"), [(1, False), (-1, True)])
def test_adagrad_norm(sign, maximize):
    groups = [{"params": [i], "lr": lr, "maximize": maximize} for i, lr in ((0, 1), (1, 10))]
    o = Oracle(arrays(0, 0), groups, "adagrad_norm")
    o.step(lambda _: arrays(0, 0))
    assert (o.b2, *o.weights) == (0, 0, 0)
    o.step(lambda _: arrays(3, 4))  # b2 = 25
    assert_near(o.weights, [-0.6 * sign, -8 * sign], PAPER)
    o.step(lambda _: arrays(0, 12))  # b2 = 169
    assert_near(o.weights, [-0.6 * sign, (-8 - 120 / 13) * sign], PAPER)
    assert o.b2 == pytest.approx(169, rel=PAPER)
    assert o.state == [{}, {}]


def test_adagrad_norm_from_an_initial_value_and_clipped():
    o = oracle([0], base="adagrad_norm", initial_accumulator_value=9, max_grad_norm=4, lr=1)
    o.step(lambda _: arrays(10))  # b2 = 9 + 16, but for the 1e-6 that clipping adds to 10
    assert o.weights[0] == pytest.approx(-0.8, rel=1e-6)


@pytest.mark.parametrize("n", [0.0, np.inf, np.nan])
@pytest.mark.parametrize("lam", [0, 0.5, 1])
def test_a_norm_that_gives_no_direction_leaves_the_weights(n, lam):
    w = arrays([1, 2], -3)
    perturbed = oracle(w, lam=lam, adaptive=True).ascend(arrays([n, 0], 0))
    np.testing.assert_array_equal(flat(perturbed), flat(w))


@pytest.mark.parametrize("base", oracles.BASES)
def test_skipping_a_nonfinite_step_changes_nothing(base):
    options = {"momentum": 0.9} if base == "sgd" else {}
    skipping = oracle([1, 2], base=base, skip_nonfinite=True, **options)
    plain = oracle([1, 2], base=base, **options)
    for bad in (np.nan, np.inf, -np.inf):
        for o in (skipping, plain):
            o.step(lambda w: [x + 1 for x in w])
        skipping.ascend(arrays(1, 1))
        skipping.descend(arrays(bad, 1))
        np.testing.assert_array_equal(skipping.weights, plain.weights)
        assert (skipping.state, skipping.b2) == (plain.state, plain.b2)
    assert (skipping.metrics["skipped"], plain.metrics["skipped"]) == (3, 0)
    plain.descend(arrays(np.nan, 1))  # unless asked to skip it, it reaches the weights
    assert np.isnan(plain.weights[0])


def test_groups_can_change_between_steps_and_unknown_keys_are_refused():
    o = oracle([1, 2], lr=1)
    o.groups[0]["lr"] = 0.1
    o.step(lambda _: arrays(1, 1))
    assert_near(o.weights, [0.9, 1.9], PAPER)
    with pytest.raises(ValueError, match="betas"):
        oracle([1], betas=(0.9, 0.999))


# --- Storage ------------------------------------------------------------------------------------


def test_what_is_stored_is_rounded_and_nothing_else():
    o = Oracle(
        arrays(1.001, 8),
        [{"params": [0, 1], "rho": 0.1, "lr": 2.0**-12, "momentum": 0.5}],
        "sgd",
        storage=rounding("bfloat16"),
        grad_storage=rounding("float16"),
        state_storage=rounding("float32"),
    )
    np.testing.assert_array_equal(o.weights, [1, 8])
    o.ascend(arrays(3, 4))  # e = (0.06, 0.08) in units of 1/128 and 1/16
    np.testing.assert_array_equal(o.perturbed, [1 + 8 / 128, 8 + 1 / 16])
    o.descend(arrays(1 / 3, 4096))
    third = float(np.float16(1 / 3))
    np.testing.assert_array_equal([s["momentum_buffer"] for s in o.state], [third, 4096])
    np.testing.assert_array_equal(o.weights, [1, 7])  # 1 - third / 4096 rounds to 1


@pytest.mark.parametrize("base", oracles.BASES)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_storage_holds_every_weight_and_state(base, dtype):
    problem, store = Problem(SHAPES, seed=2), rounding(dtype)
    options = {"momentum": 0.9} if base == "sgd" else {}
    group = {"params": range(len(SHAPES)), "lr": 0.05, **options}
    o = Oracle(problem.initial(), [group], base, storage=store, renormalize=True)
    for _ in range(5):
        o.step(problem.grad)
    tensors = [x for s in o.state for name, x in s.items() if name != "step"]
    for x in [*o.weights, *o.perturbed, *tensors]:
        np.testing.assert_array_equal(x, store(x))


# --- The authors' Unified SAM -------------------------------------------------------------------


LAMBDAS = [
    (0, 0),
    (0.5, 0.5),
    (1, 1),
    ("1/t", lambda t: 1 / t),
    ("1-1/t", lambda t: 1 - 1 / t),
]


@pytest.mark.parametrize(("name", "lam"), LAMBDAS, ids=[str(name) for name, _ in LAMBDAS])
def test_the_authors_unified_sam(name, lam):
    package = pytest.importorskip("unifiedsam")
    problem = Problem(SHAPES, seed=3)
    parameters = [torch.nn.Parameter(torch.tensor(w)) for w in problem.initial()]
    options = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01}
    theirs = package.unifiedSAM(parameters, torch.optim.SGD, rho=0.2, lambd=name, **options)
    ours = Oracle(problem.initial(), [{"params": range(5), "rho": 0.2, **options}], "sgd", lam=lam)
    for _ in range(STEPS):
        torch_gradients(problem, parameters)
        theirs.step(lambda: torch_gradients(problem, parameters))
        ours.step(problem.grad)
    # As for torch's optimizers above: float64, and another order of operations.
    for p, w in zip(parameters, ours.weights, strict=True):
        assert_near(w, p.detach().numpy(), 1e-12)


# --- The problem --------------------------------------------------------------------------------


def derivatives(function, weights, h=1e-5):
    """Central differences by every element, one row each."""
    rows = []
    for i, w in enumerate(weights):
        for j in np.ndindex(w.shape):
            ahead, behind = [x.copy() for x in weights], [x.copy() for x in weights]
            ahead[i][j] += h
            behind[i][j] -= h
            rows.append((function(ahead) - function(behind)) / (2 * h))
    return np.array(rows)


@pytest.mark.parametrize("seed", range(3))
def test_problem_gradient(seed):
    problem = Problem(SHAPES, seed)
    w = problem.initial()
    # h = 1e-5: the remainder is h^2 f'''/6, about 1e-10, and the rounding of the loss 1e-15/h.
    assert_near(flat(problem.grad(w)), derivatives(problem.loss, w), 1e-8)


def test_problem_is_coupled_and_not_convex():
    problem = Problem(SHAPES, seed=0)
    hessian = derivatives(lambda w: flat(problem.grad(w)), problem.initial())
    assert np.all(hessian != 0)
    assert np.linalg.eigvalsh((hessian + hessian.T) / 2)[0] < -0.1


def test_problem_is_the_same_every_time():
    first, second = Problem(SHAPES, seed=0), Problem(SHAPES, seed=0)
    w = first.initial()
    for x in w:
        x[...] = 0
    np.testing.assert_array_equal(flat(first.initial()), flat(second.initial()))
    assert [x.shape for x in first.grad(w)] == SHAPES


@pytest.mark.parametrize("shapes", [SHAPES, [(129, 65), (1000,), (17,)]])
@pytest.mark.parametrize("lam", [0, 1])
def test_problem_keeps_gradients_and_errors_moderate(shapes, lam):
    problem = Problem(shapes, seed=0)
    group = {"params": range(len(shapes)), "rho": 0.05, "lr": 0.05, "momentum": 0.9}
    rng = np.random.default_rng(0)
    shifted = [w + 1e-9 * rng.standard_normal(w.shape) for w in problem.initial()]
    one, other = (Oracle(w, [group], "sgd", lam=lam) for w in (problem.initial(), shifted))
    for _ in range(STEPS):
        gradient = flat(problem.grad(one.weights))
        assert 0.1 < math.sqrt(np.mean(gradient**2)) < 10
        one.step(problem.grad)
        other.step(problem.grad)
    # 1e-9 is one standard deviation of the shift; the largest of 10^4 is 4 of them, so this allows
    # a growth of 5, little enough for the tolerances above and for comparisons in float32.
    assert np.max(np.abs(flat(one.weights) - flat(other.weights))) < 2e-8
