"""LETS: its hypergradient against autograd and float64 formulas, and how the radius moves."""

import math

import numpy as np
import pytest
import torch
from torch.autograd import grad

import fastsam
from fastsam.kernels.layout import STREAMS_CHUNK

import oracles
from comparison import OPERATIONS, adopt
from layouts import LAYOUTS
from registry import (
    BACKENDS,
    DEVICE,
    DTYPES,
    LEARNING,
    METHODS,
    base_of,
    build,
    build_oracle,
    numpy,
    parameters,
)
from test_methods import GROUPS
from two_losses import LR, Fed, Network

HESSIANS = ("diag", "difference")

# --- a network, and the exact hypergradient by autograd, with none of the library's code ----------


def dot(xs, ys):
    return sum((x * y).sum() for x, y in zip(xs, ys, strict=True))


#: The ascent's direction at fixed weights, e = rho * direction, and the library's name for it.
DIRECTIONS = {
    "sam": lambda w, g, n, m: [x / n for x in g],
    "asam": lambda w, g, n, m: [(v.abs() + 0.01) ** 2 * x / m for v, x in zip(w, g, strict=True)],
    "unified": lambda w, g, n, m: [(1 - 0.3 + 0.3 / n) * x for x in g],
}
WRAPPED = {
    "sam": (fastsam.SAM, {}),
    "asam": (fastsam.ASAM, {"eta": 0.01}),
    "unified": (fastsam.UnifiedSAM, {"lam": 0.3}),
}


def direction(name, weights, g):
    n = dot(g, g).sqrt()
    scaled = [(w.abs() + 0.01) * x for w, x in zip(weights, g, strict=True)]
    return DIRECTIONS[name](weights, g, n, dot(scaled, scaled).sqrt())


class Exact:
    """The two-level function at given weights, and its derivative by the radius.

    The direction of the perturbation and ``c``, SSAM's factor, are constants.
    """

    def __init__(self, network, weights, name, rho, renormalize=False):
        self.network, self.rho = network, rho
        self.weights = [w.detach().clone() for w in weights]
        self.first = network.grad(self.weights)
        self.direction = direction(name, self.weights, self.first)
        self.second = network.grad(self.perturbed(rho))
        norms = [dot(x, x).sqrt() for x in (self.first, self.second)]
        self.c = norms[0] / norms[1] if renormalize else 1.0
        plus = [w - LR * self.c * x for w, x in zip(self.weights, self.second, strict=True)]
        self.gap = network.gap(plus)
        both = network.grad(plus, "validation"), network.grad(plus)
        self.delta = [x - y for x, y in zip(*both, strict=True)]

    def perturbed(self, rho):
        return [w + rho * x for w, x in zip(self.weights, self.direction, strict=True)]

    def upper(self, rho):
        """1/2 (validation loss - training loss)^2 after a step, differentiable in ``rho``."""
        perturbed = self.perturbed(rho)
        if not perturbed[0].requires_grad:
            perturbed = [w.requires_grad_() for w in perturbed]
        second = grad(self.network.loss(perturbed), perturbed, create_graph=True)
        plus = [w - LR * self.c * x for w, x in zip(self.weights, second, strict=True)]
        return self.network.gap(plus) ** 2 / 2

    def by_autograd(self):
        rho = torch.tensor(self.rho, dtype=torch.float64, device=DEVICE, requires_grad=True)
        return grad(self.upper(rho), rho)[0].item()

    def by_difference(self, step):
        above, below = self.upper(self.rho + step), self.upper(self.rho - step)
        return ((above - below) / (2 * step)).item()

    def closed_form(self, hessian="exact"):
        """-lr c a <delta, H e / rho>, with the Hessian-vector product or an approximation."""
        if hessian == "exact":
            at = [w.requires_grad_() for w in self.perturbed(self.rho)]
            product = grad(
                dot(grad(self.network.loss(at), at, create_graph=True), self.direction), at
            )
        elif hessian == "diag":
            product = [x * x * y for x, y in zip(self.second, self.direction, strict=True)]
        else:
            product = [(x - y) / self.rho for x, y in zip(self.second, self.first, strict=True)]
        return (-LR * self.c * self.gap * dot(self.delta, product)).item()


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("name", DIRECTIONS)
def test_closed_form_is_the_exact_derivative(name, renormalize):
    network = Network()
    exact = Exact(network, network.start, name, rho=0.2, renormalize=renormalize)
    derivative = exact.by_autograd()
    assert abs(derivative) > 1e-4
    assert exact.closed_form() == pytest.approx(derivative, rel=1e-10)
    # errors of order step^2, and of 1e-16 / step
    assert exact.by_difference(1e-4) == pytest.approx(derivative, rel=1e-6)


def learner(network, name, hessian, backend, rho, renormalize=False, **kwargs):
    params = [torch.nn.Parameter(w.clone()) for w in network.start]
    cls, own = WRAPPED[name]
    wrapped = cls(params, torch.optim.SGD, rho=rho, lr=LR, renormalize=renormalize,
                  backend=backend, **own)  # fmt: skip
    return params, fastsam.LETS(wrapped, hessian=hessian, **kwargs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("hessian", HESSIANS)
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("name", ["sam", "unified"])
def test_losses_and_gradients_are_taken_at_the_right_weights(name, renormalize, hessian, backend):
    """A real network: along the trajectory the hypergradient is the closed form's."""
    network = Network()
    params, lets = learner(network, name, hessian, backend, 0.2, renormalize, rho_lr=0.1)
    for _ in range(3):
        exact = Exact(network, params, name, float(lets.param_groups[0]["rho"]), renormalize)
        lets.step(*network.closures(params))
        assert float(lets.metrics["validation_gap"]) == pytest.approx(exact.gap.item(), rel=1e-12)
        expected = exact.closed_form(hessian)
        assert float(lets.metrics["hypergradient"]) == pytest.approx(expected, rel=1e-10)


def ratio_to_exact(network, name, hessian, rho, steps):
    """The library's hypergradient over the exact one in every step."""
    params, lets = learner(network, name, hessian, "torch", rho)
    ratios = []
    for _ in range(steps):
        exact = Exact(network, params, name, float(lets.param_groups[0]["rho"]))
        lets.step(*network.closures(params))
        ratios.append(float(lets.metrics["hypergradient"]) / exact.by_autograd())
    return ratios


@pytest.mark.parametrize("name", DIRECTIONS)
def test_errors_of_both_approximations_are_reported(name, record_property):
    """Ratios to the exact hypergradient in 25 steps of 4 runs; ``-s`` prints the quantiles.

    Nothing bounds them, so nothing but their being numbers is asserted.
    """
    start = {"sam": 0.2, "asam": 0.5, "unified": 0.2}[name]
    print(f"\n{name + ',':11} rho = {start}:    5 %     25 %     50 %     75 %     95 %  same sign")
    for hessian in HESSIANS:
        runs = [ratio_to_exact(Network(seed), name, hessian, start, 25) for seed in range(4)]
        ratios = np.ravel(runs)
        assert np.isfinite(ratios).all()
        quantiles = np.quantile(ratios, [0.05, 0.25, 0.5, 0.75, 0.95])
        same_sign = (ratios > 0).mean()
        record_property(f"{hessian}_ratio", quantiles.tolist())
        record_property(f"{hessian}_same_sign", float(same_sign))
        print(f"  {hessian:15}", *(f"{x:8.3f}" for x in quantiles), f"{same_sign:8.0%}")


@pytest.mark.parametrize("name", DIRECTIONS)
def test_difference_converges_to_the_exact_product(name):
    """Linearly in the radius; the diagonal's error does not depend on it."""
    network, errors = Network(1), []
    for rho in (0.02, 0.01, 0.005, 0.0025):
        (ratio,) = ratio_to_exact(network, name, "difference", rho, 1)
        errors.append(abs(ratio - 1))
    for larger, smaller in zip(errors, errors[1:], strict=False):
        assert 0.45 < smaller / larger < 0.55


# --- given gradients: the formula, for every method, backend, size and layout ---------------------


def expected(oracle, method, passes, losses, hessian):
    """The derivative by log rho, and the sum of its terms' sizes."""
    firsts, seconds, training, validation = (
        [0.0 if x is None else x for x in grads] for grads in passes
    )
    present = [x is not None for x in passes[1]]
    lam = oracle.metrics.get("lam", 1.0)
    c = lam * oracle.metrics["renormalization"]
    if (bound := method.oracle.get("max_grad_norm")) is not None:
        us = ((1 - lam) * g + c * x for g, x in zip(firsts, seconds, strict=True))
        norm = math.sqrt(sum(np.square(u).sum() for u, p in zip(us, present, strict=True) if p))
        c *= min(1.0, bound / (norm + 1e-6))
    if "descent" in method.oracle:
        c = oracle.of_second
    total = size = 0.0
    for group in oracle.groups:
        for i in group["params"]:
            if not present[i]:
                continue
            product = np.square(seconds[i]) * oracle.e.get(i, 0.0)
            if hessian == "difference":
                product = seconds[i] - firsts[i] if passes[0][i] is not None else 0.0
            lr = -group["lr"] if group.get("maximize") else group["lr"]
            terms = lr * c * (validation[i] - training[i]) * product
            total, size = total + np.sum(terms), size + np.sum(np.abs(terms))
    gap = losses[1] - losses[0]
    return -gap * total, abs(gap) * size


def run_fed(method, hessian, backend, dtype, shapes, groups, steps, missing=0.0, layout=None):
    """Steps with random gradients, every one compared to the formula; the largest error."""
    spec, base, rng = METHODS[method], base_of(method), np.random.default_rng(5)
    rounding = oracles.rounding(DTYPES[dtype].grad)
    params = parameters([rng.standard_normal(shape) for shape in shapes], DTYPES[dtype])
    if layout is not None:
        params = [torch.nn.Parameter(LAYOUTS[layout](x)) for x in numpy(params)]
    wrapped = build(spec, base, params, groups, backend)
    lets = fastsam.LETS(wrapped, rho_lr=0.1, hessian=hessian)
    oracle = build_oracle(spec, base, params, groups, DTYPES[dtype])
    errors = []
    for step in range(steps):
        passes = [
            [None if rng.random() < missing else rounding(rng.standard_normal(s)) for s in shapes]
            for _ in range(4)
        ]
        losses = rng.standard_normal(2)
        adopt(oracle, params, wrapped, step)
        for theirs, ours in zip(oracle.groups, lets.param_groups, strict=True):
            theirs["rho"] = float(ours["rho"])
        rho = oracle.groups[0]["rho"]
        oracle.ascend(passes[0])
        oracle.descend(passes[1])
        fed = Fed(params, passes, losses, layout if step == 0 else None)
        lets.step(fed.closure, fed.val_closure)
        assert fed.calls == 4
        slope, size = expected(oracle, spec, passes, losses, hessian)
        assert size > 0
        errors.append(abs(float(lets.metrics["hypergradient"]) * rho - slope) / size)
    return np.max(errors)  # NaN if one is


#: Relative to the sum of the terms' sizes. The norm and its root, T and its square, g~ squared, the
#: products and the sum: as many roundings as a step's arithmetic. And hardly more in float64.
TOLERANCE = {"fp32": OPERATIONS * 2.0**-24, "fp64": 1e-14}
SHAPES = [(1031,), (6, 7), ()]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("hessian", HESSIANS)
@pytest.mark.parametrize("method", LEARNING)
def test_every_method(method, hessian, backend):
    """In three groups, with their own radius, learning rate and scale."""
    worst = run_fed(method, hessian, backend, "fp64", SHAPES, GROUPS, steps=2)
    assert worst < TOLERANCE["fp64"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("hessian", HESSIANS)
@pytest.mark.parametrize("method", ["asam", "vasso-all", "samar-all", "lightsam-3"])
def test_missing_gradients_count_as_zeros(method, hessian, backend):
    shapes = [(5,), (40,), (2, 3), (), (7,), (17,)]
    groups = [{"params": [0, 1, 2]}, {"params": [3, 4, 5], "rho": 0.2}]
    worst = run_fed(method, hessian, backend, "fp64", shapes, groups, 4, missing=0.4)
    assert worst < TOLERANCE["fp64"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("method", "hessian", "layout"),
    [("asam", "diag", None), ("asam", "diag", "misaligned"), ("asam", "diag", "strided"),
     ("asam", "diag", "column-major"), ("asam", "difference", "misaligned"),
     ("lightsam-3", "diag", None), ("vasso-all", "diag", "misaligned")],
)  # fmt: skip
def test_block_edges_and_layouts(method, hessian, layout, backend):
    """Of weights; their gradients lie the same way in one step and are contiguous in another."""
    edges = [0, 1, 15, 16, 17, STREAMS_CHUNK - 1, STREAMS_CHUNK, STREAMS_CHUNK + 1]
    shapes = [(size,) for size in edges] + [(5, 9), (STREAMS_CHUNK // 8, 8)]
    groups = [{"params": list(range(len(shapes)))}]
    worst = run_fed(method, hessian, backend, "fp32", shapes, groups, steps=2, layout=layout)
    assert worst < TOLERANCE["fp32"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("hessian", HESSIANS)
def test_mixed_dtypes_are_one_sum(hessian, backend):
    params = [parameters([np.ones(n)], DTYPES[d])[0] for n, d in ((40, "fp32"), (50, "fp64"))]
    lets = fastsam.LETS(
        fastsam.SAM(params, torch.optim.SGD, rho=0.2, lr=0.1, backend=backend), hessian=hessian
    )
    passes = [[np.full(40, x), np.full(50, 2 * x)] for x in (0.5, 0.75, 0.25, 1.5)]
    fed = Fed(params, passes, (1.0, 3.0))
    lets.step(fed.closure, fed.val_closure)
    first, second = (np.concatenate(grads) for grads in passes[:2])
    delta = np.concatenate(passes[3]) - np.concatenate(passes[2])
    product = second**2 * first / np.linalg.norm(first)
    if hessian == "difference":
        product = (second - first) / 0.2
    h = -0.1 * (3.0 - 1.0) * (delta @ product)
    assert float(lets.metrics["hypergradient"]) == pytest.approx(h, rel=1e-6)


# --- how the radius moves -------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", DIRECTIONS)
def test_sgd_multiplies_the_radius(name, backend):
    """rho <- rho exp(-rho_lr rho h); the next step goes as far as that."""
    network = Network()
    params, lets = learner(network, name, "difference", backend, 0.2, rho_lr=2.0,
                           rho_optimizer=torch.optim.SGD)  # fmt: skip
    rho = 0.2
    for _ in range(5):
        group = lets.param_groups[0]
        assert float(group["rho"]) == pytest.approx(rho, rel=1e-12)
        exact, seen = Exact(network, params, name, float(group["rho"])), []
        closure, val_closure = network.closures(params)

        def looking(closure=closure, seen=seen):
            seen.append([p.detach().clone() for p in params])
            return closure()

        lets.step(looking, val_closure)
        for w, at in zip(seen[1], exact.perturbed(rho), strict=True):
            torch.testing.assert_close(w, at, rtol=1e-12, atol=1e-12)
        h = float(lets.metrics["hypergradient"])
        rho *= math.exp(-2.0 * rho * h)
        assert float(lets.metrics["rho"]) == pytest.approx(rho, rel=1e-12)
    assert abs(math.log(rho / 0.2)) > 0.01


def test_adam_takes_its_arguments():
    """torch's Adam on log rho, with arguments of our own, written out."""
    beta1, beta2, eps, lr = 0.5, 0.7, 1e-3, 0.2
    network = Network()
    params, lets = learner(network, "sam", "difference", "torch", 0.2, rho_lr=lr,
                           betas=(beta1, beta2), eps=eps)  # fmt: skip
    nu, m, v = math.log(0.2), 0.0, 0.0
    for t in range(1, 6):
        lets.step(*network.closures(params))
        slope = math.exp(nu) * float(lets.metrics["hypergradient"])
        m, v = beta1 * m + (1 - beta1) * slope, beta2 * v + (1 - beta2) * slope**2
        nu -= lr * m / (1 - beta1**t) / (math.sqrt(v / (1 - beta2**t)) + eps)
        # a capturable Adam, as on a GPU, corrects its averages by powers of beta in float32
        exact = 1e-12 if DEVICE == "cpu" else 1e-6
        assert float(lets.param_groups[0]["rho"]) == pytest.approx(math.exp(nu), rel=exact)
    assert type(lets.rho_optimizer) is torch.optim.Adam


@pytest.mark.parametrize("scale", [1e3, -1e3])
def test_radius_stays_positive_and_groups_keep_their_ratios(scale):
    params = parameters([np.ones(3), np.ones(4), np.ones(5)], DTYPES["fp64"])
    groups = [{"params": [p], "rho": r} for p, r in zip(params, (0.1, 0.0, 0.4), strict=True)]
    lets = fastsam.LETS(fastsam.SAM(groups, torch.optim.SGD, lr=0.1), rho_lr=0.5)
    passes = [[x * np.ones(n) for n in (3, 4, 5)] for x in (1, 2, 3, 3 + scale)]
    before = 0.1
    for _ in range(5):
        fed = Fed(params, passes, (0.0, scale**2))
        lets.step(fed.closure, fed.val_closure)
        rhos = [float(group["rho"]) for group in lets.param_groups]
        assert (rhos[0] > before) == (scale > 0) and rhos[0] > 0
        assert rhos[1] == 0 and rhos[2] == pytest.approx(4 * rhos[0], rel=1e-12)
        assert all(group["rho"].dtype == torch.float64 for group in lets.param_groups)
        before = rhos[0]
