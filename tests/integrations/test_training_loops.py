"""What training loops do around a step, with every method: each would break a plain SAM class.

Gradients are accumulated, learning rates and radii scheduled, parameters left out of a pass;
gradients are too large or too small for their dtype, not finite, or clipped.
"""

import copy
import warnings

import numpy as np
import pytest
import torch
from torch.optim import lr_scheduler
from torch.optim.swa_utils import SWALR

import fastsam

import oracles
from comparison import EPS, adopt, check_close
from registry import (
    BACKENDS,
    BASES,
    DEVICE,
    DTYPES,
    METHODS,
    base_of,
    build,
    build_oracle,
    numpy,
    parameters,
    set_grads,
)

FP64 = DTYPES["fp64"]
SHAPES = [(4, 5), (5,), (5, 3)]
GROUPS = [{"params": [0, 2], "lr": 0.03}, {"params": [1], "rho": 0.2, "lr": 0.01}]
#: In the interpreter one for each of the kernels that differ; `test_methods` has them all.
KERNELS = ("sam", "vasso", "samar", "lightsam-1", "lightsam-2", "lightsam-3", "adasam")
ON_BACKENDS = [
    (method, backend)
    for method in METHODS
    for backend in BACKENDS
    if backend != "triton" or method in KERNELS or DEVICE != "cpu"
]
#: Some steps of some ten float64 roundings each, of weights up to about 2.
TIGHT = 1e-13


def close(params, arrays):
    for ours, exact in zip(numpy(params), arrays, strict=True):
        np.testing.assert_allclose(ours, exact, rtol=0, atol=TIGHT)


def make(method, backend, base="sgd-momentum", groups=GROUPS, shapes=SHAPES, dtypes=FP64, seed=1):
    """Parameters, an optimizer over them, the oracle for it, and the problem it starts on."""
    problem = oracles.Problem(shapes, seed=seed)
    params = parameters(problem.initial(), dtypes)
    spec = METHODS[method], base_of(method, base)
    optimizer = build(*spec, params, groups, backend)
    return params, optimizer, build_oracle(*spec, params, groups, dtypes), problem


def step(params, optimizer, problem, dtypes=FP64):
    for half in (optimizer.first_step, optimizer.second_step):
        set_grads(params, problem.grad(numpy(params)), dtypes)
        half()


# --- gradient accumulation ------------------------------------------------------------------------


class Regression:
    """A network's squared error, the mean over rows of which there are 12."""

    def __init__(self, seed=4):
        torch.manual_seed(seed)
        self.x, self.y = (torch.randn(12, n, dtype=torch.float64, device=DEVICE) for n in (4, 3))

    def loss(self, params, rows=slice(None)):
        w, b, v = params
        return ((self.x[rows] @ w + b).tanh() @ v - self.y[rows]).square().sum(1).mean()

    def grad(self, arrays):
        """Of the one big batch, for the oracle."""
        params = [torch.from_numpy(a).to(DEVICE).requires_grad_() for a in arrays]
        return numpy(torch.autograd.grad(self.loss(params), params))

    def closure(self, params, parts):
        def closure():
            total = 0.0
            for part in np.array_split(np.arange(12), parts):
                rows = torch.from_numpy(part).to(DEVICE)
                loss = self.loss(params, rows) * len(part) / 12  # loss / k, where all k are equal
                loss.backward()
                total += loss.detach()
            return total

        return closure


@pytest.mark.parametrize(
    ("method", "backend", "explicit"),
    [(*case, False) for case in ON_BACKENDS] + [(method, "torch", True) for method in METHODS],
)
def test_micro_batches_are_one_big_batch(method, backend, explicit):
    """Both norms, both perturbations and the update are those of the mean over all rows."""
    params, optimizer, oracle, _ = make(method, backend)
    problem = Regression()
    closure = problem.closure(params, parts=5)  # of 3, 3, 2, 2 and 2 rows
    for _ in range(3):
        expected = problem.loss([torch.from_numpy(w).to(DEVICE) for w in oracle.weights])
        if explicit:
            optimizer.zero_grad()
            loss = closure()
            optimizer.first_step(zero_grad=True)
            closure()
            optimizer.second_step()
        else:
            loss = optimizer.step(closure)
        oracle.step(problem.grad)
        torch.testing.assert_close(loss, expected, rtol=TIGHT, atol=0)
    close(params, oracle.weights)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("hessian", ["diag", "difference"])
def test_micro_batches_of_lets(hessian, backend):
    train, validation, results = Regression(), Regression(seed=5), []
    for parts in (1, 4):
        params, optimizer, _, _ = make("sam", backend)
        lets = fastsam.LETS(optimizer, rho_lr=0.1, hessian=hessian)
        for _ in range(3):
            lets.step(train.closure(params, parts), validation.closure(params, 2 * parts))
        results.append([*numpy(params), float(lets.param_groups[0]["rho"])])
    for one, several in zip(*results, strict=True):
        np.testing.assert_allclose(several, one, rtol=1e-11, atol=TIGHT)
    assert results[0][-1] != pytest.approx(0.05, rel=1e-2)  # the radius has moved


# --- schedules ------------------------------------------------------------------------------------

L = lr_scheduler
HALF, SLOW = (lambda t: 0.5**t), (lambda t: 1 / (1 + t))
SCHEDULERS = {
    "LambdaLR": lambda o: L.LambdaLR(o, [HALF, SLOW]),
    "MultiplicativeLR": lambda o: L.MultiplicativeLR(o, SLOW),
    "StepLR": lambda o: L.StepLR(o, 2, gamma=0.3),
    "MultiStepLR": lambda o: L.MultiStepLR(o, [1, 4], gamma=0.3),
    "ConstantLR": lambda o: L.ConstantLR(o, 0.25, total_iters=3),
    "LinearLR": lambda o: L.LinearLR(o, 0.1, total_iters=5),
    "ExponentialLR": lambda o: L.ExponentialLR(o, 0.7),
    "SequentialLR": lambda o: L.SequentialLR(
        o, [L.LinearLR(o, 0.1, total_iters=3), L.CosineAnnealingLR(o, 4)], milestones=[3]
    ),
    "CosineAnnealingLR": lambda o: L.CosineAnnealingLR(o, 5, eta_min=1e-3),
    "ChainedScheduler": lambda o: L.ChainedScheduler(
        [L.ConstantLR(o, 0.25, total_iters=3), L.ExponentialLR(o, 0.9)]
    ),
    "ReduceLROnPlateau": lambda o: L.ReduceLROnPlateau(o, factor=0.3, patience=1),
    "CyclicLR": lambda o: L.CyclicLR(o, [0.01, 0.02], [0.1, 0.05], step_size_up=3),
    "CyclicLR, momentum alone": lambda o: L.CyclicLR(o, 0.01, 0.1, 3, cycle_momentum=False),
    "CosineAnnealingWarmRestarts": lambda o: L.CosineAnnealingWarmRestarts(o, 3),
    "OneCycleLR": lambda o: L.OneCycleLR(o, [0.1, 0.05], total_steps=8),
    "PolynomialLR": lambda o: L.PolynomialLR(o, total_iters=6, power=2.0),
    "SWALR": lambda o: SWALR(o, swa_lr=0.002, anneal_epochs=4),
}
STEPS, MIDDLE = 7, 3


def test_every_scheduler_of_torch_is_there():
    assert set(L.__all__) - {"LRScheduler"} <= SCHEDULERS.keys()


def advance(scheduler, t):
    metric = [max(3 - t, 1)] if isinstance(scheduler, L.ReduceLROnPlateau) else []
    scheduler.step(*metric)


def scheduled(method, backend, base, name, how):
    """Steps under a scheduler, the oracle's under the same one on torch's own base alone."""
    params, optimizer, oracle, problem = make(method, backend, base)
    groups = [group | {"params": [torch.zeros(1)]} for group in copy.deepcopy(GROUPS)]
    spec = base_of(method, base)
    if spec.cls is None:
        defaults = {"lr": 0.1, "betas": (0.9, 0.999)} | spec.kwargs
        plain = torch.optim.Adam(groups, lr=defaults["lr"], betas=defaults["betas"])
    else:
        plain = spec.cls(groups, **spec.kwargs)
    scheduler, expected = SCHEDULERS[name](optimizer), SCHEDULERS[name](plain)
    seen = set()
    for t in range(STEPS if backend == "torch" else MIDDLE):
        for group, ours, theirs in zip(
            oracle.groups, optimizer.param_groups, plain.param_groups, strict=True
        ):
            for key in {"lr", "momentum", "betas"} & ours.keys():
                assert ours[key] == theirs[key]
                group[key] = theirs[key]
            seen.add((group["lr"], group.get("momentum", group.get("betas"))))
        step(params, optimizer, problem)
        oracle.step(problem.grad)
        plain.step()
        advance(scheduler, t)
        advance(expected, t)
        if t == MIDDLE and how == "copied":
            params, optimizer, scheduler = copy.deepcopy((params, optimizer, scheduler))
        elif t == MIDDLE and how == "loaded":
            saved = copy.deepcopy((optimizer.state_dict(), scheduler.state_dict()))
            params = [torch.nn.Parameter(p.detach().clone()) for p in params]
            groups = [group | {"lr": 9.0} for group in GROUPS]
            optimizer = build(METHODS[method], spec, params, groups, backend)
            scheduler = SCHEDULERS[name](optimizer)
            optimizer.load_state_dict(saved[0])
            scheduler.load_state_dict(saved[1])
    close(params, oracle.weights)
    assert len(seen) > 2  # something was scheduled
    assert scheduler.get_last_lr() == [group["lr"] for group in optimizer.param_groups]
    assert optimizer.base_optimizer.param_groups is optimizer.param_groups


@pytest.mark.parametrize("how", ["straight", "copied", "loaded"])
@pytest.mark.parametrize("base", ["sgd-nesterov", "adamw"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers(name, base, how):
    """They neither warn nor miss the groups that the update reads, momentum and betas included."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduled("sam", "torch", base, name, how)


#: Those with a momentum, which the scheduler moves, too.
CYCLED = [method for method in METHODS if not method.startswith("sps")]


@pytest.mark.parametrize(
    ("method", "backend", "how"),
    [(*case, "straight") for case in ON_BACKENDS if case[0] in CYCLED]
    + [(method, "torch", how) for method in CYCLED for how in ("copied", "loaded")],
)
def test_one_cycle_for_every_method(method, backend, how):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduled(method, backend, "sgd-momentum", "OneCycleLR", how)


@pytest.mark.parametrize("backend", BACKENDS)
def test_schedulers_write_into_tensors(backend):
    """A learning rate that is a tensor stays the same tensor, and the update reads its value."""
    rates = [torch.tensor(g["lr"], dtype=torch.float64, device=DEVICE) for g in GROUPS]
    groups = [group | {"lr": rate} for group, rate in zip(GROUPS, rates, strict=True)]
    params, optimizer, _, problem = make("sam", backend, groups=groups)
    oracle = make("sam", backend)[2]
    scheduler = L.ExponentialLR(optimizer, 0.5)
    for t in range(4):
        for group, start in zip(oracle.groups, GROUPS, strict=True):
            group["lr"] = start["lr"] * 0.5**t
        step(params, optimizer, problem)
        oracle.step(problem.grad)
        scheduler.step()
    close(params, oracle.weights)
    assert all(g["lr"] is r for g, r in zip(optimizer.param_groups, rates, strict=True))


@pytest.mark.parametrize(("method", "backend"), ON_BACKENDS)
def test_radii_by_group_and_step(method, backend):
    """Written to the groups between steps, 0 among them; a checkpoint has those of its step."""
    params, optimizer, oracle, problem = make(method, backend)
    start = [group["rho"] for group in oracle.groups]
    for t, factors in enumerate([(1, 1), (0, 2), (0, 0), (3, 0.1)]):
        for groups in (oracle.groups, optimizer.param_groups):
            for group, rho, factor in zip(groups, start, factors, strict=True):
                group["rho"] = rho * factor
        if t == 3:
            saved = copy.deepcopy(optimizer.state_dict())
            for group in optimizer.param_groups:
                group["rho"] = 7.0
            optimizer.load_state_dict(saved)
        step(params, optimizer, problem)
        oracle.step(problem.grad)
        assert float(optimizer.metrics["rho"]) == pytest.approx(start[0] * factors[0], rel=1e-15)
    close(params, oracle.weights)


# --- gradients that come and go -------------------------------------------------------------------

#: Whether there is a gradient in pass 1 or 2 of step 0, 1, ...
PRESENT = {
    "always": lambda t, k: True,
    "first pass": lambda t, k: k == 1,
    "second pass": lambda t, k: k == 2,
    "odd steps": lambda t, k: t % 2 == 1,
    "never": lambda t, k: False,  # in a group of its own
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("method", METHODS)
def test_gradients_that_come_and_go(method, backend):
    """Each in a way of its own; weight decay touches none that has no second gradient."""
    shapes = [(7,), (3, 4), (5,), (2, 3), ()]
    groups = [{"params": [0, 1]}, {"params": [2, 3], "rho": 0.1}, {"params": [4]}]
    params, optimizer, oracle, problem = make(method, backend, "sgd-dampening", groups, shapes)
    start = numpy(params)

    def drop(grads, t, k):
        return [g if f(t, k) else None for f, g in zip(PRESENT.values(), grads, strict=True)]

    for t in range(6):
        set_grads(params, drop(problem.grad(numpy(params)), t, 1), FP64)
        optimizer.first_step()
        oracle.ascend(drop(problem.grad(oracle.weights), t, 1))
        close(params, oracle.perturbed)
        set_grads(params, drop(problem.grad(numpy(params)), t, 2), FP64)
        optimizer.second_step()
        oracle.descend(drop(problem.grad(oracle.perturbed), t, 2))
        close(params, oracle.weights)
        for p, name, before, state in zip(params, PRESENT, start, oracle.state, strict=True):
            if name in ("never", "first pass"):
                assert np.array_equal(numpy([p])[0], before)
            assert optimizer.state.get(p, {}).keys() == state.keys()


# --- numbers at the ends of a dtype ---------------------------------------------------------------


ROUNDS = pytest.mark.filterwarnings("ignore:some parameters are float16 or bfloat16")


@ROUNDS
@pytest.mark.parametrize(("method", "backend"), ON_BACKENDS)
def test_norms_that_float16_cannot_hold(method, backend):
    """One of elements whose squares it rounds to 0; one of 1e5, above its largest number."""
    groups = [{"params": [0, 1], "rho": 2.0}, {"params": [2], "rho": 1.0}]  # large, to be seen
    params, optimizer, oracle, _ = make(
        method, backend, groups=groups, shapes=[(1030,), (7,), ()], dtypes=DTYPES["fp16"]
    )
    rng, half, eps = np.random.default_rng(0), oracles.rounding("float16"), EPS["float32"]
    for t, scale in enumerate((3e-5, 3000.0)):
        adopt(oracle, params, optimizer, t)
        before = numpy(params)
        for pass_, go, check in (
            (optimizer.first_step, oracle.ascend, lambda: oracle.perturbed),
            (optimizer.second_step, oracle.descend, lambda: oracle.weights),
        ):
            grads = [half(scale * rng.standard_normal(w.shape)) for w in before]
            with np.errstate(over="ignore"):
                squares = np.concatenate([g.ravel() ** 2 for g in grads])
                assert np.isin(half(squares), [0, np.inf]).mean() > 0.9
            set_grads(params, grads, DTYPES["fp16"])
            pass_()
            go(grads)
            for k, (ours, exact, w) in enumerate(zip(numpy(params), check(), before, strict=True)):
                check_close("weight", ours, exact, w, "float16", eps, oracle.terms.get(k, 0.0))
            oracle.perturbed = numpy(params)
        metrics = optimizer.metrics
        names = {"grad_norm"} | ({"perturbed_grad_norm"} if optimizer.renormalize else set())
        for name in names & metrics.keys():
            assert float(metrics[name]) == pytest.approx(oracle.metrics[name], rel=16 * eps)


@ROUNDS
@pytest.mark.parametrize(("method", "backend"), ON_BACKENDS)
@pytest.mark.parametrize(
    ("dtype", "bad"), [("fp16", float("inf")), ("fp16", float("nan")), ("fp32", -float("inf"))]
)
def test_nonfinite_first_gradients(method, dtype, bad, backend):
    """Nothing is perturbed (by LightSAM II and III, that element), and nothing remembers it."""
    dtypes, eps = DTYPES[dtype], EPS["float32"]
    params, optimizer, oracle, problem = make(method, backend, dtypes=dtypes)
    step(params, optimizer, problem, dtypes)
    adopt(oracle, params, optimizer, 1)
    before = numpy(params)

    grads = problem.grad(before)
    grads[1][2] = bad
    set_grads(params, grads, dtypes)
    optimizer.first_step()
    by_element = method.startswith(("lightsam-2", "lightsam-3"))
    assert numpy(params)[1][2] == before[1][2]
    for ours, exact, w in zip(numpy(params), oracle.ascend(grads), before, strict=True):
        check_close("w + e", ours, exact, w, dtypes.param, eps)
        assert by_element != np.array_equal(ours, w)
    oracle.perturbed = numpy(params)

    grads = problem.grad(oracle.perturbed)
    set_grads(params, grads, dtypes)
    optimizer.second_step()
    oracle.descend(grads)
    for p, exact, w in zip(params, oracle.weights, before, strict=True):
        check_close("w", *numpy([p]), exact, w, dtypes.param, eps)
        assert p.isfinite().all()
        assert all(x.isfinite().all() for x in optimizer.state[p].values())


# --- clipping -------------------------------------------------------------------------------------


def plain_sam(params, base, problem, radii, max_norm):
    """A step of SAM as it is commonly written, clipped by torch; the norm that was clipped."""
    set_grads(params, problem.grad(numpy(params)), FP64)
    norm = torch.stack([p.grad.norm() for p in params]).norm()
    sign = -1.0 if base.param_groups[0].get("maximize") else 1.0
    before = [p.detach().clone() for p in params]
    with torch.no_grad():
        for p, rho in zip(params, radii, strict=True):
            p += rho * sign * p.grad / (norm + 1e-12)
    set_grads(params, problem.grad(numpy(params)), FP64)
    with torch.no_grad():
        for p, w in zip(params, before, strict=True):
            p.copy_(w)
    norm = torch.nn.utils.clip_grad_norm_(params, max_norm)
    base.step()
    return float(norm)


CLIPPED = [BASES[name] for name in ("sgd-dampening", "adamw", "adagrad", "adagrad_norm")]
CLIPPED = [(base.cls, base.kwargs) for base in CLIPPED]
CLIPPED.append((torch.optim.RMSprop, {"lr": 0.01, "momentum": 0.5, "eps": 1e-3}))  # not fused


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("base", "kwargs"), CLIPPED)
def test_clipping_is_torchs(base, kwargs, backend):
    """The one norm of all groups, in steps that clip and in steps that do not."""
    problem = oracles.Problem(SHAPES, seed=2)
    ours, theirs = (parameters(problem.initial(), FP64) for _ in range(2))
    first, second = ([ps[0], ps[2]] for ps in (ours, theirs))
    groups = [{"params": first}, {"params": [ours[1]], "rho": 0.3, "lr": 0.02}]
    optimizer = fastsam.SAM(groups, base, backend=backend, **kwargs)
    plain = base([{"params": second}, {"params": [theirs[1]], "lr": 0.02}], **kwargs)
    clipped = []
    for bound in (2.0, 9.0, 0.1, 9.0, 2.0, 0.1):
        optimizer.max_grad_norm = bound
        step(ours, optimizer, problem)
        clipped.append(plain_sam(theirs, plain, problem, (0.05, 0.3, 0.05), bound) > bound)
        for p, q in zip(ours, theirs, strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=TIGHT)
    assert clipped == [True, False, True, False, True, True]


@pytest.mark.parametrize(("method", "backend"), ON_BACKENDS)
def test_no_clipping_below_the_bound(method, backend):
    """A factor of exactly 1: the same bits as without a bound."""
    results = []
    for bound in (1e6, None):
        problem = oracles.Problem(SHAPES, seed=1)
        params = parameters(problem.initial(), DTYPES["fp32"])
        spec = METHODS[method], base_of(method)
        optimizer = spec[0].cls(
            params, *([spec[1].cls] if spec[1].cls else []), backend=backend,
            **(spec[0].kwargs | spec[1].kwargs | {"max_grad_norm": bound}),
        )  # fmt: skip
        for _ in range(2):
            step(params, optimizer, problem, DTYPES["fp32"])
        results.append(numpy(params))
    assert all(np.array_equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("skip", "bad"),
    [
        (True, float("nan")),
        (True, float("inf")),
        (False, float("inf")),
        (False, float("nan")),
    ],
)
def test_clipping_to_a_norm_that_is_not_finite(skip, bad, backend):
    """Without ``skip_nonfinite`` as in torch: a NaN reaches every weight, an infinity its own."""
    problem = oracles.Problem(SHAPES, seed=2)
    ours, theirs = (parameters(problem.initial(), FP64) for _ in range(2))
    optimizer = fastsam.SAM(
        ours, torch.optim.SGD, lr=0.1, max_grad_norm=0.5, skip_nonfinite=skip, backend=backend
    )
    set_grads(ours, problem.grad(numpy(ours)), FP64)
    optimizer.first_step()
    grads = problem.grad(numpy(ours))
    grads[0][1, 2] = bad
    for params in (ours, theirs):
        set_grads(params, grads, FP64)
    optimizer.second_step()
    if not skip:
        torch.nn.utils.clip_grad_norm_(theirs, 0.5)
        torch.optim.SGD(theirs, lr=0.1).step()
        counts = [int(p.isnan().sum()) for p in theirs]
        assert counts == ([1, 0, 0] if bad == float("inf") else [20, 5, 15])
    for p, q in zip(ours, theirs, strict=True):
        assert torch.equal(p.isnan(), q.isnan())
        assert torch.equal(p.nan_to_num(), q.nan_to_num())
