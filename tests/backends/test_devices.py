"""Parameters on several devices: one step over all of them, whichever device each is on.

With two GPUs the parameters are on them. Without a GPU the parameters of a CPU are said to be on
several, which is all that the code goes by: each gets a backend and scalars of its own, and sums go
from one to the other.
"""

import copy

import numpy as np
import pytest
import torch

import fastsam
from fastsam.backends import devices
from fastsam.backends.base import add_up
from fastsam.step import collect

import oracles
from faults import difference
from registry import (
    BACKENDS,
    COMBINATIONS,
    DEVICE,
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

COUNT = torch.cuda.device_count()
pytestmark = pytest.mark.skipif(COUNT == 1, reason="needs two GPUs, or none")
SHAPES = [(5, 3), (7,), (), (64, 17), (0,), (1025,)]
FP64 = DTYPES["fp64"]
GROUPS = [{"params": [0, 1, 2]}, {"params": [3, 4, 5], "lr": 0.03, "rho": 0.1}]


@pytest.fixture
def spread(monkeypatch):
    """Put parameters on three devices, or two where they are real, in turn."""
    places = {}
    monkeypatch.setattr(collect, "device_of", lambda p: places.get(id(p), p.device))

    def put(params, count=3):
        for k, p in enumerate(params):
            if COUNT > 1:
                p.data = p.data.to(f"cuda:{k % 2}")
            else:
                places[id(p)] = torch.device("cpu", k % count) if k % count else p.device
        return params

    return put


def problem_of(seed=0, dtypes=FP64, shapes=SHAPES):
    problem = oracles.Problem(shapes, seed=seed)
    return problem, parameters(problem.initial(), dtypes)


def step(optimizer, params, problem, dtypes=FP64, missing=((), ())):
    """One step by halves; ``missing`` gives those without a gradient in each."""
    for half, left_out in zip((optimizer.first_step, optimizer.second_step), missing, strict=True):
        grads = problem.grad(numpy(params))
        set_grads(params, [None if k in left_out else g for k, g in enumerate(grads)], dtypes)
        half()


def is_spread(optimizer):
    return any(
        isinstance(x, devices.SeveralDevices) for x in optimizer._passes.backends._serving.values()
    )


def close(xs, ys, tolerance=1e-12):
    for x, y in zip(xs, ys, strict=True):
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("method", "base"), COMBINATIONS)
def test_every_method_equals_its_formula(method, base, backend, spread):
    problem, params = problem_of()
    spread(params)
    optimizer = build(METHODS[method], base_of(method, base), params, GROUPS, backend)
    oracle = build_oracle(METHODS[method], base_of(method, base), params, GROUPS, FP64)
    for _ in range(3):
        step(optimizer, params, problem)
        oracle.step(problem.grad)
    close(numpy(params), oracle.weights)
    assert is_spread(optimizer)
    if "grad_norm" in optimizer.metrics:
        exact = float(oracle.metrics["grad_norm"])
        assert float(optimizer.metrics["grad_norm"]) == pytest.approx(exact, rel=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("method", ["sam", "vasso-all", "samar-all", "lightsam-3-all", "adasam"])
@pytest.mark.parametrize(
    "missing",
    [
        ((), (1, 4)),  # a whole device has no second gradient
        ((1, 4), ()),  # no first one
        ((0, 3), (2, 5)),  # another device each
        ((0, 1, 3, 4), ()),  # one device left
    ],
)
def test_devices_without_gradients(missing, method, backend, spread):
    results = []
    for spreads in (False, True):
        problem, params = problem_of()
        optimizer = create(method, spread(params) if spreads else params, backend)
        step(optimizer, params, problem)
        step(optimizer, params, problem, missing=missing)
        step(optimizer, params, problem)
        results.append(numpy(params))
    close(*results)


@pytest.mark.parametrize("backend", BACKENDS)
def test_several_ascents(backend, spread):
    """Also where a device has no gradients in one of them."""
    ends = []
    for spreads in (True, False):
        problem, params = problem_of()
        optimizer = fastsam.SSAM(spread(params) if spreads else params, torch.optim.SGD, lr=0.1,
                                 rho=0.3, ascent_steps=2, backend=backend)  # fmt: skip
        for missing in ((), (1, 4), ()):
            halves = optimizer.first_step, optimizer.first_step, optimizer.second_step
            for k, half in enumerate(halves):
                set_grads(params, problem.grad(numpy(params)), FP64)
                for i in missing if k == 0 else ():
                    params[i].grad = None
                half()
        ends.append(numpy(params))
        assert is_spread(optimizer) is spreads
    close(*ends)


@pytest.mark.parametrize("backend", BACKENDS)
def test_unperturbed_weights_on_every_device(backend, spread):
    ends = []
    for looks in (True, False):
        problem, params = problem_of()
        optimizer = create("sam", spread(params), backend)
        before = numpy(params)
        set_grads(params, problem.grad(before), FP64)
        optimizer.first_step()
        perturbed = numpy(params)
        if looks:
            with optimizer.unperturbed():
                close(numpy(params), before, 0)
            close(numpy(params), perturbed, 0)
        set_grads(params, problem.grad(perturbed), FP64)
        optimizer.second_step()
        ends.append(numpy(params))
    assert is_spread(optimizer)
    close(*ends, 0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("method", ["sam", "ssam-adaptive-clip", "vasso", "lightsam-1", "samar"])
def test_an_overflow_on_one_device_skips_the_step_on_all(method, backend, spread):
    problem, params = problem_of()
    optimizer = create(method, spread(params), backend, skip_nonfinite=True)
    step(optimizer, params, problem)
    before, state = numpy(params), copy.deepcopy(optimizer.state_dict()["state"])
    set_grads(params, problem.grad(numpy(params)), FP64)
    optimizer.first_step()
    set_grads(params, problem.grad(numpy(params)), FP64)
    params[-1].grad[-1] = float("inf")
    optimizer.second_step()
    close(numpy(params), before, 0)
    for key, held in optimizer.state_dict()["state"].items():
        for name, x in held.items():
            assert torch.equal(torch.as_tensor(x), torch.as_tensor(state[key][name])), name
    assert optimizer.metrics["skipped"] == 1
    step(optimizer, params, problem)
    assert optimizer.metrics["skipped"] == 1
    assert all((x != y).any() for x, y in zip(numpy(params), before, strict=True) if x.size)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("base", [torch.optim.AdamW, torch.optim.RMSprop])
@pytest.mark.parametrize("bad", [None, 0, 1])
def test_grad_scaler(bad, base, backend, spread):
    """A power of two scales exactly; an overflow in either pass, on one device, halves it."""
    results = []
    for scaled in (False, True):
        problem, params = problem_of()
        optimizer = fastsam.SAM(spread(params), base, lr=0.1, max_grad_norm=0.5, backend=backend)
        scaler = torch.amp.GradScaler(DEVICE, init_scale=1024.0, enabled=scaled)
        passes = []

        def closure(problem=problem, params=params, scaler=scaler, passes=passes):
            set_grads(params, problem.grad(numpy(params)), FP64)
            scaler.scale(torch.zeros((), device=DEVICE))
            for p in params:
                p.grad *= scaler.get_scale()
            if scaler.is_enabled() and len(passes) == bad:
                params[1].grad[0] = float("inf")
            passes.append(1)

        for k in range(3):
            if bad is None or scaled or k:  # the run without leaves out the one that is skipped
                optimizer.step(closure, grad_scaler=scaler)
                scaler.update()
        assert scaler.get_scale() == (1024.0 if bad is None else 512.0) or not scaled
        results.append(numpy(params))
    close(*results)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kwargs", [{"master_weights": True}, {"rounding": "stochastic"}, {}])
@pytest.mark.filterwarnings("ignore:some parameters are float16 or bfloat16")
def test_16_bit_weights(kwargs, backend, spread):
    dtypes, results = DTYPES["bf16"], []
    for spreads in (False, True):
        problem, params = problem_of(dtypes=dtypes)
        optimizer = create("sam", spread(params) if spreads else params, backend, **kwargs)
        for _ in range(3):
            step(optimizer, params, problem, dtypes)
        results.append(params)
    for x, y in zip(*results, strict=True):  # the norm may differ in its last bits
        torch.testing.assert_close(x.cpu(), y.cpu(), rtol=2.0**-7, atol=2.0**-9)
        assert (x.cpu() == y.cpu()).float().mean() > 0.98 or not x.numel()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("hessian", ["diag", "difference"])
def test_learned_radius(hessian, backend, spread):
    radii = []
    for spreads in (False, True):
        problem, params = problem_of()
        inner = create("asam", spread(params) if spreads else params, backend, "sgd")
        optimizer = fastsam.LETS(inner, hessian=hessian, rho_lr=0.1)

        def closure(problem=problem, params=params, scale=1.0):
            grads = problem.grad(numpy(params))
            set_grads(params, [scale * g for g in grads], FP64)
            return torch.tensor(scale, device=DEVICE)

        for _ in range(3):
            optimizer.step(closure, lambda closure=closure: closure(scale=1.5))
        radii.append(float(optimizer.metrics["hypergradient"]))
        radii.append(float(optimizer.metrics["rho"]))
    assert radii[0] != 0
    assert radii[:2] == pytest.approx(radii[2:], rel=1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_rule_is_asked_once_a_step(backend, spread):
    asked = []

    def rule(lam, sharpness, previous):
        asked.append(1)
        return lam

    problem, params = problem_of()
    optimizer = fastsam.SAMAR(spread(params), torch.optim.SGD, lr=0.1, rule=rule, backend=backend)
    for _ in range(3):
        step(optimizer, params, problem)
    assert len(asked) == 3


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pass_", ["ascent_pass", "descent_pass"])
@pytest.mark.parametrize("when", ["at its start", "before the sums", "after them"])
@pytest.mark.parametrize("device", [0, 1])
def test_a_failure_on_one_device_undoes_all(device, when, pass_, backend, spread, monkeypatch):
    problem, params = problem_of()
    # twins: every sum stops the passes, and so does what follows
    optimizer = create("lightsam-1", spread(params, 2), backend, max_grad_norm=1.0)
    step(optimizer, params, problem)
    before = numpy(params)
    saved = copy.deepcopy(optimizer.state_dict())
    cls = type(next(iter(optimizer._passes.backends._serving[backend, None]._backends.values())))
    original = getattr(cls, pass_)

    def failing(self, batch, *args):
        inner = original(self, batch, *args)
        if batch.part == device and when == "at its start":
            raise MemoryError
        stop = next(inner)
        if batch.part == device and when == "before the sums":
            inner.close()
            raise MemoryError
        yield stop
        if batch.part == device:
            inner.close()
            raise MemoryError
        return (yield from inner)

    with monkeypatch.context() as patch:
        patch.setattr(cls, pass_, failing)
        with pytest.raises(MemoryError):
            step(optimizer, params, problem)
    close(numpy(params), before, 0)
    assert difference(optimizer.state_dict(), saved) is None
    step(optimizer, params, problem)  # and the next step is as if nothing had been
    after = numpy(params)

    _, others = problem_of()
    twin = create("lightsam-1", spread(others, 2), backend, max_grad_norm=1.0)
    for _ in range(2):
        step(twin, others, problem)
    close(after, numpy(others), 0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_resume_bit_for_bit(backend, spread):
    problem, params = problem_of()
    optimizer = create("samar-all", spread(params), backend)
    for _ in range(2):
        step(optimizer, params, problem)
    weights, state = numpy(params), copy.deepcopy(optimizer.state_dict())
    for _ in range(2):
        step(optimizer, params, problem)
    others = spread(parameters(weights, FP64))
    resumed = create("samar-all", others, backend)
    resumed.load_state_dict(state)
    for _ in range(2):
        step(resumed, others, problem)
    close(numpy(others), numpy(params), 0)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_what_was_worked_out_is_kept(backend, spread):
    problem, params = problem_of()
    optimizer = create("sam", spread(params), backend)
    layouts = []
    for _ in range(3):
        step(optimizer, params, problem)
        whole = next(optimizer._passes.collector.layouts())
        layouts.append(list(devices.layouts_of(type("", (), {"layout": whole})).values()))
    assert all(x is y for x, y in zip(layouts[0], layouts[-1], strict=True))
    assert len(layouts[0]) == (2 if COUNT > 1 else 3)


def test_learning_rates_and_radii_on_a_device(spread):
    results = []
    for number in (float, lambda x: torch.tensor(x, device=DEVICE, dtype=torch.float64)):
        problem, params = problem_of()
        optimizer = fastsam.SAM(
            spread(params), torch.optim.SGD, lr=number(0.05), rho=number(0.1), backend="torch"
        )
        for _ in range(3):
            step(optimizer, params, problem)
        results.append(numpy(params))
    close(*results)


@pytest.mark.skipif(COUNT < 2, reason="needs two GPUs")
def test_flatness(spread):
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3, device=DEVICE, dtype=torch.float64)
    x = torch.randn(8, 4, device=DEVICE, dtype=torch.float64)

    def closure():
        y = torch.nn.functional.linear(x, model.weight, model.bias.to(x.device))
        return y.square().mean()

    one = fastsam.sharpness(model, closure, rho=0.1)
    line = fastsam.loss_landscape(model, closure, directions="gradient", points=5)
    spread([model.weight, model.bias])
    assert float(fastsam.sharpness(model, closure, rho=0.1)) == pytest.approx(float(one), rel=1e-12)
    other = fastsam.loss_landscape(model, closure, directions="gradient", points=5)
    np.testing.assert_allclose(other.losses, line.losses, rtol=1e-12)


def test_sums_are_added_in_order_and_equal_for_all():
    rng = np.random.default_rng(0)
    values = rng.standard_normal((7, 5)).astype(np.float32) * 10.0 ** rng.integers(-4, 5, (7, 5))
    sums = [torch.tensor(x, dtype=torch.float32) for x in values]
    expected = values[0].astype(np.float32)
    for x in values[1:]:
        expected = (expected + x.astype(np.float32)).astype(np.float32)
    add_up(sums)
    assert all(np.array_equal(x.numpy(), expected) for x in sums)
    assert len({x.data_ptr() for x in sums}) == len(sums)


def test_devices_of_two_types_are_refused():
    params = [torch.nn.Parameter(torch.ones(2, device=device)) for device in ("cpu", "meta")]
    optimizer = fastsam.SAM(params, torch.optim.SGD, lr=0.1)
    for p in params:
        p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match="devices of one type, got cpu and meta"):
        optimizer.first_step()
