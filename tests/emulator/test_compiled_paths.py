"""Compiled kernels on paths that the trajectories of ``test_compiled_steps`` do not take."""

import numpy as np
import pytest
import torch

import fastsam
from fastsam.kernels import finish, reduce
from fastsam.kernels.layout import REDUCE_CHUNK, Scalar, Task

import compiled_launches
import noisy_bsam
import noisy_universal
import oracles
from registry import (
    BASES,
    DTYPES,
    METHODS,
    base_of,
    build,
    build_oracle,
    create,
    numpy,
    parameters,
    set_grads,
)

FP32 = DTYPES["fp32"]
SHAPES = [(1031,), (7,), (), (0,), (300,)]
GROUPS = [{"params": [0, 3]}, {"params": [1, 2, 4], "rho": 0.2}]


def check_near(params, exact, tolerance=2e-6):
    for ours, theirs in zip(numpy(params), exact, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance)


def take(optimizer, params, firsts, seconds):
    """A step with these gradients."""
    set_grads(params, firsts, FP32)
    optimizer.first_step()
    set_grads(params, seconds, FP32)
    optimizer.second_step()


def draws(seed, shapes=SHAPES, count=2):
    rng = np.random.default_rng(seed)
    return [[rng.standard_normal(shape) for shape in shapes] for _ in range(count)]


# --- results that depend on an order, or on how many programs there are ---


def test_any_order_of_blocks_and_warps_gives_the_same_bits(machine):
    results = []
    for seed in range(4):
        params = parameters(draws(0, count=1)[0], FP32)
        optimizer = create("samar-all", params, "triton", "adagrad_norm")
        with compiled_launches.on(machine, seed=seed, noise=False):
            for step in range(2):
                take(optimizer, params, *draws(step))
        results.append([p.detach().clone() for p in params])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("wide", [False, True])
def test_a_norm_that_the_update_leaves(machine, wide):
    """MSAM's, of the momentum, by integer atomics: equal bits in any order.

    Some of it is not perturbed, and the squares of some leave float32.
    """
    dtypes = [torch.float32, torch.float64 if wide else torch.float32, torch.float32]
    results = []
    for seed in range(2):
        random = torch.Generator().manual_seed(0)
        params = [
            torch.nn.Parameter(torch.zeros(n, dtype=dtype))
            for n, dtype in zip((1031, 2100, 5), dtypes, strict=True)
        ]
        groups = [{"params": params[:2]}, {"params": params[2:], "perturb": False}]
        optimizer = fastsam.MSAM(
            groups, torch.optim.SGD, lr=0.1, momentum=0.9, rho=0.5, backend="triton"
        )
        with compiled_launches.on(machine, seed=seed) as kernels:
            for step in range(4):
                momenta = [optimizer.state[p].get("momentum_buffer") for p in params[:2]]
                before = [p.detach().double() for p in params]
                optimizer.perturb()
                if step:
                    parts = torch.cat([v.double() for v in momenta])
                    for p, w, v in zip(params, before, momenta, strict=False):
                        exact = w - 0.5 / parts.norm() * v.double()
                        torch.testing.assert_close(p.double(), exact, rtol=2e-6, atol=2e-6)
                    assert torch.equal(params[2].double(), before[2])
                for p, scale in zip(params, (1.0, 1e-25, 1e3), strict=True):
                    grad = torch.randn(p.shape, generator=random, dtype=torch.float64)
                    p.grad = (grad * scale).to(p.dtype)
                optimizer.step()
        assert (
            kernels
            == ["update_kernel"] * (1 + wide)
            + (["perturb_kernel"] * (1 + wide) + ["update_kernel"] * (1 + wide)) * 3
        )
        saved = optimizer.state_dict()["param_groups"][0]["fastsam_momentum_squared_norm"]
        results.append(torch.cat([p.detach().double() for p in params] + [saved.reshape(1)]))
    assert torch.equal(*results)


@pytest.mark.parametrize("size", [REDUCE_CHUNK - 1, REDUCE_CHUNK, 2 * REDUCE_CHUNK + 1])
def test_reduction_edges(machine, size):
    grads = draws(size, [(size,), (5,)], 1)[0]
    params = parameters([np.zeros(size), np.zeros(5)], FP32)
    optimizer = fastsam.SAM(params, torch.optim.SGD, lr=0.1, backend="triton")
    set_grads(params, grads, FP32)
    exact = np.sqrt(sum((g**2).sum() for g in numpy([p.grad for p in params])))
    with compiled_launches.on(machine):
        optimizer.first_step()
    assert float(optimizer.metrics["grad_norm"]) == pytest.approx(exact, rel=8 * 2.0**-24)


def test_more_programs_than_one_window_of_partials(machine):
    count = 1100
    params = [torch.nn.Parameter(torch.zeros(1)) for _ in range(count)]
    grads = torch.arange(1.0, count + 1)
    for param, grad in zip(params, grads.split(1), strict=True):
        param.grad = grad.clone()
    optimizer = fastsam.SAM(params, torch.optim.SGD, lr=0.1, rho=1.0, backend="triton")
    with compiled_launches.on(machine):
        optimizer.first_step()
    exact = grads.double().norm()
    assert float(optimizer.metrics["grad_norm"]) == pytest.approx(float(exact), rel=8 * 2.0**-24)
    torch.testing.assert_close(torch.cat(params).detach(), (grads.double() / exact).float())


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e25])
def test_squares_that_float32_does_not_hold(machine, scale):
    grad = draws(1, [(2000,)], 1)[0][0] * scale
    params = parameters([np.zeros(2000)], FP32)
    optimizer = fastsam.SAM(params, torch.optim.SGD, lr=0.0, rho=0.5, backend="triton")
    set_grads(params, [grad], FP32)
    with compiled_launches.on(machine):
        optimizer.first_step()
    expected = 0.5 * grad / (np.linalg.norm(grad) + 1e-12)
    np.testing.assert_allclose(numpy(params)[0], expected, rtol=1e-5, atol=1e-30)


@pytest.mark.filterwarnings("ignore:some parameters are float16 or bfloat16")
def test_several_buckets_have_one_norm(machine):
    dtypes = [DTYPES[name] for name in ("fp32", "bf16-fp32", "fp32", "fp32")]
    params = [parameters([np.ones(s)], d)[0] for s, d in zip(SHAPES[:4], dtypes, strict=True)]
    optimizer = fastsam.SSAM(params, torch.optim.SGD, lr=0.5, rho=8.0, backend="triton")
    with compiled_launches.on(machine) as kernels:
        for half, g in ((optimizer.first_step, 1.0), (optimizer.second_step, 2.0)):
            for p, d in zip(params, dtypes, strict=True):
                set_grads([p], [np.full(tuple(p.shape), g)], d)
            half()
    assert kernels.count("reduce_kernel") == 4
    assert float(optimizer.metrics["grad_norm"]) == pytest.approx(np.sqrt(1039), rel=1e-6)
    check_near(params, [np.full(s, 0.5) for s in SHAPES[:4]])  # gamma = 1/2, so u = 1


# --- what a step may be besides two passes ---


@pytest.mark.parametrize(
    ("method", "base"),
    [("lightsam-3-all", ""), ("vasso-all", "adamw"), ("samar-all", "adagrad_norm")],
)
def test_a_skipped_step_leaves_everything(machine, method, base):
    """The second of three has an infinite gradient: clipping and state are those of two steps."""
    params = parameters(draws(0, count=1)[0], FP32)
    spec = METHODS[method], base_of(method, base)
    optimizer = build(*spec, params, GROUPS, "triton")
    oracle = build_oracle(*spec, params, GROUPS, FP32)
    with compiled_launches.on(machine):
        for step in range(3):
            firsts, seconds = draws(step)
            if step == 1:
                seconds[0][1030] = np.inf
            before = (
                [p.clone() for p in params],
                [{k: x.clone() for k, x in optimizer.state[p].items()} for p in params],
            )
            take(optimizer, params, firsts, seconds)
            oracle.ascend(firsts)
            oracle.descend(seconds)
            if step == 1:
                for p, w, state in zip(params, *before, strict=True):
                    assert torch.equal(p, w)
                    assert all(torch.equal(optimizer.state[p][k], x) for k, x in state.items())
    assert optimizer.metrics["skipped"] == 1
    check_near(params, oracle.weights)


def test_a_step_of_the_base_alone(machine):
    params = parameters(draws(0, count=1)[0], FP32)
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    optimizer = fastsam.SAM(params, torch.optim.AdamW, lr=0.1, backend="triton", perturb_every=2)
    plain = torch.optim.AdamW(twins, lr=0.1)
    with compiled_launches.on(machine) as kernels:
        for seed in range(2):
            grads = draws(seed, count=1)[0]
            set_grads(params, grads, FP32)
            set_grads(twins, grads, FP32)
            optimizer.plain_step()
            plain.step()
    assert kernels == ["update_kernel"] * 2
    check_near(params, numpy(twins))


@pytest.mark.parametrize("method", ["vasso", "asam"])
def test_a_group_that_is_not_perturbed(machine, method):
    """It counts in no norm of the first pass, and has no state in the ascent."""
    params = parameters(draws(0, count=1)[0], FP32)
    spec, groups = (METHODS[method], BASES["sgd-momentum"]), [{"params": range(5)}]
    rest = [{"params": [0, 2]}, {"params": [1, 3, 4], "perturb": False}]
    optimizer = build(*spec, params, rest, "triton")
    oracle = build_oracle(*spec, params, groups, FP32)
    with compiled_launches.on(machine):
        for step in range(2):
            firsts, seconds = draws(step)
            perturbed = [g if k in (0, 2) else None for k, g in enumerate(firsts)]
            set_grads(params, firsts, FP32)
            optimizer.first_step()
            check_near(params, oracle.ascend(perturbed))
            set_grads(params, seconds, FP32)
            optimizer.second_step()
            oracle.descend(seconds)
            check_near(params, oracle.weights)


def test_several_ascents(machine):
    """The second one starts where the first led, and copies nothing; each has half the radius."""
    params = parameters(draws(0, count=1)[0], FP32)
    start = numpy(params)
    optimizer = fastsam.SAM(
        params, torch.optim.SGD, lr=0.5, rho=2.0, ascent_steps=2, backend="triton"
    )
    firsts, seconds, last = draws(1, count=3)
    expected = start
    with compiled_launches.on(machine):
        for grads in (firsts, seconds):
            set_grads(params, grads, FP32)
            optimizer.first_step()
            norm = np.sqrt(sum((g**2).sum() for g in grads))
            expected = [w + g / norm for w, g in zip(expected, grads, strict=True)]
            check_near(params, expected)
        set_grads(params, last, FP32)
        optimizer.second_step()
    check_near(params, [w - 0.5 * g for w, g in zip(start, last, strict=True)])


def test_several_samples_of_noise(machine):
    run = noisy_universal.Training("frob", "triton", FP32)
    with compiled_launches.on(machine) as kernels:
        run.step(2)
    assert kernels.count("perturb_kernel") == 4
    exact = noisy_universal.followed("frob", 2, FP32)
    np.testing.assert_allclose(run.weights, exact, rtol=0, atol=1e-5)


def test_an_update_that_takes_the_first_gradient(machine):
    run = noisy_bsam.Training("triton", FP32)
    with compiled_launches.on(machine) as kernels:
        run.step(2)
    assert kernels == ["perturb_kernel", "perturb_kernel", "update_kernel"] * 2
    np.testing.assert_allclose(run.weights, noisy_bsam.followed(2, FP32), rtol=0, atol=1e-5)


@pytest.mark.parametrize("adaptive", [False, True])
def test_norms_by_segment(machine, adaptive):
    """Under SGD, parameters with a norm each train like as many optimizers."""
    params = parameters(draws(0, count=1)[0], FP32)
    settings = {"rho": 0.5, "eta": 0.1, "adaptive": adaptive}
    optimizer = fastsam.SAM(
        params, torch.optim.SGD, lr=0.1, norm="layer", backend="triton", **settings
    )
    alone = [
        oracles.Oracle([w], [{"params": [0], "lr": 0.1, **settings}], "sgd")
        for w in numpy(params)
    ]  # fmt: skip
    with compiled_launches.on(machine) as kernels:
        for step in range(2):
            firsts, seconds = draws(step)
            take(optimizer, params, firsts, seconds)
            for k, oracle in enumerate(alone):
                oracle.ascend([firsts[k]])
                oracle.descend([seconds[k]])
    assert "segments_kernel" in kernels
    check_near(params, [oracle.weights[0] for oracle in alone])


@pytest.mark.parametrize(("method", "hessian"), [("asam", "difference"), ("vasso", "diag")])
def test_the_sum_that_lets_needs(machine, method, hessian):
    """Against the reference backend, in float64."""
    found = []
    for backend in ("reference", "triton"):
        params = parameters(draws(0, count=1)[0], DTYPES["fp64"])
        lets = fastsam.LETS(create(method, params, backend), hessian=hessian)
        seeds = iter(range(8))

        def closure(params=params, seeds=seeds):
            seed = next(seeds)
            set_grads(params, draws(seed, count=1)[0], DTYPES["fp64"])
            return torch.tensor(1.0 + seed, dtype=torch.float64)

        with compiled_launches.on(machine) as kernels:
            lets.step(closure, closure)
        found.append(float(lets.metrics["hypergradient"]))
        assert backend == "reference" or kernels[-1] == "reduce_kernel"
    assert found[0] != 0 and found[1] == pytest.approx(found[0], rel=1e-10)


def test_sums_that_others_add_up(machine):
    """What finishes sums over processes: equal to the interpreter's, as both are in float64."""
    tasks = int(Task.RENORMALIZE | Task.CLIP | Task.SKIP)
    hyper = torch.linspace(0.5, 2.0, 32).repeat(2, 1)
    scalars = torch.linspace(0.25, 3.0, len(Scalar) + 1, dtype=torch.float64)[: len(Scalar)]
    found = []
    for run in ("interpreted", "compiled"):
        mine = scalars.clone()
        launch = reduce.finish_kernel[(1,)]
        constants = dict(
            FINISH=finish.finish_descent, ACCUMULATES=None, COEFFICIENTS=None, ADAPTED=None,
            SUMS=2, num_warps=1, enable_fp_fusion=True,
        )  # fmt: skip
        if run == "compiled":
            with compiled_launches.on(machine) as kernels:
                launch(hyper, mine, tasks, **constants)
            assert kernels == ["finish_kernel"]
        else:
            launch(hyper, mine, tasks, **constants)
        found.append(mine)
    torch.testing.assert_close(*found, rtol=1e-15, atol=0.0)
    assert not torch.equal(found[0], scalars)


# --- stochastic rounding ---


def neighbours(x):
    """The bfloat16 numbers below and above, as float64; equal where x is one."""
    unit = oracles.ulp(x, "bfloat16")
    return np.floor(x / unit) * unit, np.ceil(x / unit) * unit


@pytest.mark.parametrize("misaligned", [False, True])
def test_stochastic_rounding(machine, misaligned):
    """To a neighbour, and the one that the reference backend takes: bits depend on the place."""
    rng = np.random.default_rng(5)
    values = [rng.standard_normal(n) * 2.0 ** rng.integers(-20, 10, n) for n in (1031, 7, 0)]
    grads = [torch.from_numpy(x).float() for x in values]
    found = {}
    for backend in ("reference", "triton"):
        params = [torch.nn.Parameter(torch.zeros(len(x) + 1).bfloat16()[misaligned:][: len(x)])
                  for x in values]  # fmt: skip
        for p in params:
            p.grad_dtype = torch.float32
        optimizer = fastsam.USAM(
            params, torch.optim.SGD, rho=1.0, lr=1.0, rounding="stochastic", seed=3,
            backend=backend,
        )  # fmt: skip
        halves = []
        with compiled_launches.on(machine):
            for sign, half in ((1, optimizer.first_step), (-1, optimizer.second_step)):
                for p, g in zip(params, grads, strict=True):
                    p.grad = sign * g
                half()
                halves.append([p.detach().clone() for p in params])
        found[backend] = halves
    for half in range(2):
        for k, g in enumerate(grads):
            ours = found["triton"][half][k]
            low, high = neighbours(g.double().numpy())
            rounded = ours.double().numpy()
            assert ((rounded == low) | (rounded == high)).all()
            assert torch.equal(ours, found["reference"][half][k])
    first = found["triton"][0][0].double().numpy()
    assert 0.4 < (first > grads[0].double().numpy()).mean() < 0.6


def test_stochastic_rounding_of_a_method_with_state(machine):
    """A whole step: within a unit of bfloat16 of the oracle's."""
    names = DTYPES["bf16-fp32"]
    params = parameters(draws(0, count=1)[0], names)
    spec = METHODS["vasso"], BASES["adamw"]
    optimizer = build(*spec, params, GROUPS, "triton", rounding="stochastic", seed=1)
    oracle = build_oracle(*spec, params, GROUPS, FP32)
    firsts, seconds = draws(1)
    with compiled_launches.on(machine):
        for grads, half in ((firsts, optimizer.first_step), (seconds, optimizer.second_step)):
            set_grads(params, grads, names)
            half()
    oracle.ascend(firsts)
    oracle.descend(seconds)
    for ours, exact in zip(numpy(params), oracle.weights, strict=True):
        assert (np.abs(ours - exact) <= 1.01 * oracles.ulp(exact, "bfloat16")).all()
