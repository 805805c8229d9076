"""Several ascents in a step, against float64 formulas, and what has to hold around them."""

import contextlib
import copy

import numpy as np
import pytest
import torch

import fastsam
from fastsam.backends import reference
from fastsam.backends.eager import ascents
from fastsam.backends.triton import backend as triton_backend

import oracles
from networks import bits, closure_of, model_and_data, same
from registry import BACKENDS, DEVICE, DTYPES, numpy, parameters, set_grads

SHAPES = [(5, 3), (7,), (), (17, 4)]
FP64, FP32 = DTYPES["fp64"], DTYPES["fp32"]
SGD = {"base_optimizer": torch.optim.SGD, "lr": 0.1, "momentum": 0.9}


def formula(problem, steps, ascents, rho=0.5, lam=1.0, eta=None, renormalize=False):
    """SGD with momentum on the gradient at the end of ``ascents`` steps of ``rho / ascents``.

    Returns:
        The weights, and the norms of the first gradients.
    """
    w, velocity, norms = problem.initial(), None, []
    for _ in range(steps):
        at, first = [x.copy() for x in w], 0.0
        for j in range(ascents):
            grads = problem.grad(at)
            scales = [1.0 if eta is None else np.abs(x) + eta for x in at]
            norm = np.sqrt(sum(np.sum((t * g) ** 2) for t, g in zip(scales, grads, strict=True)))
            length = rho / ascents * (1 - lam + lam / (norm + 1e-12))
            at = [x + length * t**2 * g for x, t, g in zip(at, scales, grads, strict=True)]
            first = norm if j == 0 else first
        u = problem.grad(at)
        if renormalize:
            scales = [1.0 if eta is None else np.abs(x) + eta for x in at]
            norm = np.sqrt(sum(np.sum((t * g) ** 2) for t, g in zip(scales, u, strict=True)))
            u = [first / (norm + 1e-12) * g for g in u]
        velocity = (
            u if velocity is None else [0.9 * v + g for v, g in zip(velocity, u, strict=True)]
        )
        w = [x - 0.1 * v for x, v in zip(w, velocity, strict=True)]
        norms.append(first)
    return w, norms


def giving(problem, params, dtypes=FP64, seen=None):
    """A closure that computes gradients by the problem's formula."""

    def closure():
        weights = numpy(params)
        if seen is not None:
            seen.append(weights)
        set_grads(params, problem.grad(weights), dtypes)
        return problem.loss(weights)

    return closure


METHODS = {
    "sam": (fastsam.SAM, {}, {}),
    "asam": (fastsam.ASAM, {"eta": 0.1}, {"eta": 0.1}),
    "usam": (fastsam.USAM, {}, {"lam": 0.0}),
    "unified": (fastsam.UnifiedSAM, {"lam": 0.4}, {"lam": 0.4}),
    "ssam": (fastsam.SSAM, {}, {"renormalize": True}),
    "ssam-adaptive": (
        fastsam.SSAM, {"adaptive": True, "eta": 0.1}, {"eta": 0.1, "renormalize": True},
    ),
}  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("method", METHODS)
def test_equals_its_formula(method, backend):
    cls, kwargs, exact = METHODS[method]
    problem = oracles.Problem(SHAPES, seed=0)
    params = parameters(problem.initial(), FP64)
    optimizer = cls(params, rho=0.5, ascent_steps=3, backend=backend, **SGD, **kwargs)
    weights, norms = formula(problem, 3, 3, **exact)
    other, _ = formula(problem, 3, 1, **exact)
    seen: list = []
    for norm in norms:
        loss = optimizer.step(giving(problem, params, seen=seen))
        assert loss == problem.loss(seen[-4])  # that at w
        assert float(optimizer.metrics["grad_norm"]) == pytest.approx(norm, rel=1e-12)
        assert float(optimizer.metrics["rho"]) == 0.5
    assert len(seen) == 4 * 3
    for ours, exactly, once in zip(numpy(params), weights, other, strict=True):
        np.testing.assert_allclose(ours, exactly, rtol=1e-11, atol=1e-12)
        assert np.abs(ours - once).max() > 1e-4  # the case tells them apart


@pytest.mark.parametrize("backend", BACKENDS)
def test_bases_that_are_not_fused(backend):
    """Here with the mathematics of a fused one."""

    class Own(torch.optim.SGD):
        pass

    problem = oracles.Problem(SHAPES, seed=0)
    params = parameters(problem.initial(), FP64)
    optimizer = fastsam.SAM(params, Own, rho=0.5, ascent_steps=2, backend=backend,
                            lr=0.1, momentum=0.9)  # fmt: skip
    for _ in range(2):
        optimizer.step(giving(problem, params))
    for ours, exact in zip(numpy(params), formula(problem, 2, 2)[0], strict=True):
        np.testing.assert_allclose(ours, exact, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("place", ["cpu", DEVICE])
def test_explicit_halves_and_radii_in_tensors(backend, place):
    problem = oracles.Problem(SHAPES, seed=1)
    ends = []
    for explicit in (False, True):
        params = parameters(problem.initial(), FP32)
        rho = torch.tensor(0.5, device=place)
        optimizer = fastsam.SAM(params, rho=rho, ascent_steps=2, backend=backend, **SGD)
        closure = giving(problem, params, FP32)
        for _ in range(2):
            if not explicit:
                optimizer.step(closure)
                continue
            due = []
            while optimizer.ascents_left:
                due.append((optimizer.ascents_left, optimizer.between_passes))
                closure()
                optimizer.first_step(zero_grad=True)
                if optimizer.ascents_left:
                    break
            closure()
            optimizer.first_step(zero_grad=True)
            assert due == [(2, False)] and optimizer.ascents_left == 0
            closure()
            optimizer.second_step(zero_grad=True)
            assert optimizer.ascents_left == 2 and not optimizer.between_passes
        ends.append(bits(torch.nn.ParameterList(params)))
    assert same(*ends)
    exact, _ = formula(problem, 2, 2)
    for ours, exactly in zip(ends[0], exact, strict=True):
        np.testing.assert_allclose(ours.cpu().numpy(), exactly, rtol=2e-5, atol=2e-6)


def test_order():
    model, loss_fn = model_and_data()
    optimizer = fastsam.SAM(model.parameters(), ascent_steps=2, **SGD)
    closure = closure_of(loss_fn)
    before = bits(model)
    closure()
    optimizer.first_step(zero_grad=True)
    for name in ("second_step", "plain_step"):
        with pytest.raises(RuntimeError, match=f"expected first_step, .* another {name}.* 1 more"):
            getattr(optimizer, name)()
    with pytest.raises(RuntimeError, match="expected first_step, .* another step: .* 1 more"):
        optimizer.step(closure)
    closure()
    optimizer.first_step(zero_grad=True)
    with pytest.raises(RuntimeError, match="expected second_step, .* another first_step"):
        optimizer.first_step()
    optimizer.restore()
    assert same(bits(model), before) and optimizer.ascents_left == 2


LARGE = [(130, 130), (33,), ()]  # the first goes to scratch memory on a CPU


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("call", [1, 2, 3])
def test_failures_in_any_pass_change_nothing(call, backend):
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(s, device=DEVICE)) for s in LARGE]
    optimizer = fastsam.SAM(params, rho=0.5, ascent_steps=2, backend=backend, **SGD)
    calls: list = []

    def closure(fails=False):
        calls.append(1)
        sum((p.square() * (p + 1)).sum() for p in params).backward()
        if fails and len(calls) == call:
            raise KeyError

    def step(optimizer):
        optimizer.step(closure)
        return bits(torch.nn.ParameterList(params))

    step(optimizer)
    calls.clear()
    before, state = bits(torch.nn.ParameterList(params)), copy.deepcopy(optimizer.state_dict())
    with pytest.raises(KeyError):
        optimizer.step(lambda: closure(True))
    assert same(bits(torch.nn.ParameterList(params)), before)
    assert str(optimizer.state_dict()) == str(state)
    after = step(optimizer)
    with torch.no_grad():
        for p, w in zip(params, before, strict=True):
            p.copy_(w)
    optimizer.load_state_dict(state)
    assert same(step(optimizer), after)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_ascent_that_fails_half_way_restores_the_weights(backend, monkeypatch):
    """After others have moved them, and with some of the weights moved on."""
    problem = oracles.Problem(SHAPES, seed=2)
    params = parameters(problem.initial(), FP64)
    optimizer = fastsam.SAM(params, rho=0.5, ascent_steps=3, backend=backend, **SGD)
    before, failing = numpy(params), []
    on_device = reference, "perturb_one"
    owner, name = {
        "reference": on_device,
        "torch": (ascents.AlongGradient, "perturb") if DEVICE == "cpu" else on_device,
        "triton": (triton_backend, "write_back"),
    }[backend]
    perturb = getattr(owner, name)

    def fails_after(*args):
        perturb(*args)
        if failing:
            raise MemoryError

    monkeypatch.setattr(owner, name, fails_after)
    closure = giving(problem, params)
    for _ in range(2):
        closure()
        optimizer.first_step(zero_grad=True)
    closure()
    failing.append(1)
    with pytest.raises(MemoryError):
        optimizer.first_step()
    failing.clear()
    assert not optimizer.between_passes
    for ours, exact in zip(numpy(params), before, strict=True):
        np.testing.assert_array_equal(ours, exact)
    for _ in range(2):  # and it goes on as if nothing had been
        optimizer.step(closure)
    for ours, exact in zip(numpy(params), formula(problem, 2, 3)[0], strict=True):
        np.testing.assert_allclose(ours, exact, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_parameters_with_gradients_in_some_passes(backend):
    """Each ascent moves those that have one; all come back, with one copy of each."""
    missing = [{0}, {1, 3}, {0, 2}, {2}]  # by pass
    problem = oracles.Problem(SHAPES, seed=3)
    params = parameters(problem.initial(), FP64)
    optimizer = fastsam.SAM(params, torch.optim.SGD, rho=0.5, lr=0.1, ascent_steps=3,
                            backend=backend)  # fmt: skip
    w = problem.initial()
    for _ in range(2):
        at = [x.copy() for x in w]
        for number, left in enumerate(missing):
            grads = [None if k in left else g for k, g in enumerate(problem.grad(at))]
            set_grads(params, problem.grad(numpy(params)), FP64)
            for k in left:
                params[k].grad = None
            if number == 3:
                optimizer.second_step()
                w = [x if g is None else x - 0.1 * g for x, g in zip(w, grads, strict=True)]
                continue
            optimizer.first_step()
            norm = np.sqrt(sum(np.sum(g**2) for g in grads if g is not None))
            at = [x if g is None else x + 0.5 / 3 * g / norm
                  for x, g in zip(at, grads, strict=True)]  # fmt: skip
            for ours, exact in zip(numpy(params), at, strict=True):
                np.testing.assert_allclose(ours, exact, rtol=1e-11, atol=1e-12)
        for ours, exact in zip(numpy(params), w, strict=True):
            np.testing.assert_allclose(ours, exact, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_norms_of_layers(backend):
    problem = oracles.Problem(SHAPES, seed=8)
    params = parameters(problem.initial(), FP64)
    optimizer = fastsam.SAM(params, torch.optim.SGD, rho=0.5, lr=0.1, ascent_steps=2, norm="layer",
                            backend=backend)  # fmt: skip
    w = problem.initial()
    for _ in range(2):
        at = w
        for _ in range(2):
            pairs = zip(at, problem.grad(at), strict=True)
            at = [x + 0.25 * g / np.sqrt(np.sum(g**2)) for x, g in pairs]
        w = [x - 0.1 * g for x, g in zip(w, problem.grad(at), strict=True)]
        optimizer.step(giving(problem, params))
    for ours, exact in zip(numpy(params), w, strict=True):
        np.testing.assert_allclose(ours, exact, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_groups_that_are_not_perturbed(backend):
    """No ascent moves them, nor has their gradient in its norm."""
    problem = oracles.Problem(SHAPES, seed=8)
    params = parameters(problem.initial(), FP64)
    groups = [{"params": params[:2]}, {"params": params[2:], "perturb": False}]
    optimizer = fastsam.SAM(groups, torch.optim.SGD, rho=0.5, lr=0.1, ascent_steps=2,
                            backend=backend)  # fmt: skip
    at = w = problem.initial()
    for _ in range(2):
        grads = problem.grad(at)
        norm = np.sqrt(sum(np.sum(g**2) for g in grads[:2]))
        at = [x + 0.25 * g / norm for x, g in zip(at[:2], grads[:2], strict=True)] + w[2:]
    optimizer.step(giving(problem, params))
    for ours, x, g in zip(numpy(params), w, problem.grad(at), strict=True):
        np.testing.assert_allclose(ours, x - 0.1 * g, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_copy_of_the_weights(backend):
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(s, device=DEVICE)) for s in LARGE]
    optimizer = fastsam.SAM(params, rho=0.5, ascent_steps=3, backend=backend, **SGD)
    before, held = bits(torch.nn.ParameterList(params)), []
    for _ in range(3):
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.first_step(zero_grad=True)
        pairs = optimizer._flight.backup.pairs()
        assert len(pairs) == len(params)
        held.append([w.data_ptr() for _, w in pairs])
        assert same([w for _, w in sorted(pairs, key=lambda x: -x[0].numel())], before)
    assert held[0] == held[1] == held[2]
    with optimizer.unperturbed():
        assert same(bits(torch.nn.ParameterList(params)), before)
    optimizer.restore()
    assert same(bits(torch.nn.ParameterList(params)), before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_loss_scales(backend):
    """A power of two scales exactly; an overflow in any of the passes skips the step."""
    problem, ends = oracles.Problem(SHAPES, seed=4), []
    for bad in (None, 0, 1, 2):
        params = parameters(problem.initial(), FP32)
        optimizer = fastsam.SAM(params, rho=0.5, ascent_steps=2, backend=backend, **SGD)
        scaler = torch.amp.GradScaler(DEVICE, init_scale=1024.0)
        calls: list = []

        def closure(params=params, scaler=scaler, calls=calls, bad=bad):
            set_grads(params, problem.grad(numpy(params)), FP32)
            scaler.scale(torch.zeros((), device=DEVICE))
            for p in params:
                p.grad *= scaler.get_scale()
            if len(calls) == bad:
                params[1].grad[0] = float("inf")
            calls.append(0)

        optimizer.step(closure, grad_scaler=scaler)
        scaler.update()
        assert scaler.get_scale() == (1024.0 if bad is None else 512.0)
        ends.append(numpy(params))
    exact, _ = formula(problem, 1, 2)
    for k, start in enumerate(numpy(parameters(problem.initial(), FP32))):
        np.testing.assert_allclose(ends[0][k], exact[k], rtol=2e-5, atol=2e-6)
        for skipped in ends[1:]:
            np.testing.assert_array_equal(skipped[k], start)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gradient_in_between_that_is_not_finite_moves_nothing(backend):
    problem = oracles.Problem(SHAPES, seed=5)
    params = parameters(problem.initial(), FP64)
    optimizer = fastsam.SAM(params, rho=0.5, ascent_steps=2, backend=backend, **SGD)
    closure = giving(problem, params)
    closure()
    optimizer.first_step()
    norm, there = float(optimizer.metrics["grad_norm"]), numpy(params)
    closure()
    params[0].grad[0, 0] = float("nan")
    optimizer.first_step()
    for ours, exact in zip(numpy(params), there, strict=True):
        np.testing.assert_array_equal(ours, exact)
    assert float(optimizer.metrics["grad_norm"]) == norm
    closure()
    optimizer.second_step()
    assert all(np.isfinite(x).all() for x in numpy(params))


def test_contexts_and_random_numbers():
    log: list = []

    def noted(name):
        @contextlib.contextmanager
        def context():
            log.append(f"+{name}")
            yield
            log.append(f"-{name}")

        return context

    model, loss_fn = model_and_data()
    optimizer = fastsam.SAM(
        model.parameters(), ascent_steps=2, repeat_random=True, ascent_context=noted("a"),
        descent_context=noted("d"), **SGD,
    )  # fmt: skip
    drawn = []

    def closure():
        drawn.append(float(torch.rand(())))
        loss_fn().backward()
        log.append("pass")

    optimizer.step(closure)
    between = ["+a", "+d", "pass", "-d", "-a"]
    assert log == ["+a", "pass", "-a", *between, "+d", "pass", "-d"]
    assert len(set(drawn)) == 1 and len(drawn) == 3
    log.clear()
    for number in range(3):
        with optimizer.repeated_random():
            closure()
        (optimizer.second_step if number == 2 else optimizer.first_step)(zero_grad=True)
    assert len(set(drawn[3:])) == 1 and drawn[3] != drawn[0]


def test_micro_batches():
    problems = [oracles.Problem(SHAPES, seed=seed) for seed in (6, 7)]
    params = parameters(problems[0].initial(), FP64)
    optimizer = fastsam.SAM(params, torch.optim.SGD, rho=0.5, lr=0.1, ascent_steps=2)
    w = problems[0].initial()
    optimizer.step_micro_batches([giving(problem, params) for problem in problems])
    total = [np.zeros_like(x) for x in w]
    for problem in problems:
        at = w
        for _ in range(2):
            grads = problem.grad(at)
            norm = np.sqrt(sum(np.sum(g**2) for g in grads))
            at = [x + 0.25 * g / norm for x, g in zip(at, grads, strict=True)]
        total = [x + g / 2 for x, g in zip(total, problem.grad(at), strict=True)]
    for ours, x, u in zip(numpy(params), w, total, strict=True):
        np.testing.assert_allclose(ours, x - 0.1 * u, rtol=1e-11, atol=1e-12)


def test_stale_gradients_of_an_ascent_are_warned_of():
    model, loss_fn = model_and_data()
    optimizer = fastsam.SAM(model.parameters(), ascent_steps=2, **SGD)
    loss_fn().backward()
    optimizer.first_step()
    with pytest.warns(UserWarning, match=r"first_step\(\) seems to find gradients"):
        optimizer.first_step()
    optimizer.restore()


def refused():
    weights = [torch.nn.Parameter(torch.ones(3, device=DEVICE))]
    half = [torch.nn.Parameter(torch.ones(3, device=DEVICE, dtype=torch.bfloat16))]
    light = {"lr": 0.1, "rho": 0.1}
    yield "VaSSO, whose ascent", lambda: fastsam.VaSSO(weights, ascent_steps=2, **SGD)
    for rule in ("adagrad_norm", "adam"):
        yield (
            "LightSAM, whose ascent",
            lambda rule=rule: fastsam.LightSAM(weights, rule=rule, ascent_steps=2, **light),
        )
    yield "SAMAR, whose update", lambda: fastsam.SAMAR(weights, ascent_steps=2, **SGD)
    yield "master_weights", lambda: fastsam.SAM(half, ascent_steps=2, master_weights=True, **SGD)
    yield (
        "rounding='stochastic'",
        lambda: fastsam.SAM(half, ascent_steps=2, rounding="stochastic", **SGD),
    )
    yield (
        "ascent_steps=1 to learn",
        lambda: fastsam.LETS(fastsam.SAM(weights, ascent_steps=2, **SGD)),
    )
    for value in (0, -1, 1.0, 2.5, True, "2", None):
        yield (
            "ascent_steps must be an integer of at least 1",
            lambda value=value: fastsam.SAM(weights, ascent_steps=value, **SGD),
        )


@pytest.mark.parametrize(("match", "make"), list(refused()))
def test_refusals(match, make):
    with pytest.raises(ValueError, match=match):
        make()


def test_changed_later():
    """It counts from the next step on, and is checked as at construction."""
    model, loss_fn = model_and_data()
    optimizer = fastsam.SAM(model.parameters(), **SGD)
    calls = []

    def closure():
        calls.append(loss_fn().backward())

    optimizer.ascent_steps = 3
    optimizer.step(closure)
    assert len(calls) == 4
    before = bits(model)
    with pytest.raises(ValueError, match="ascent_steps must be an integer of at least 1, got 0"):
        optimizer.ascent_steps = 0
    assert optimizer.ascent_steps == 3
    lets = fastsam.LETS(fastsam.SAM(model.parameters(), **SGD))
    lets.optimizer.ascent_steps = 2
    with pytest.raises(RuntimeError, match="ascent_steps=1"):
        lets.step(closure, closure)
    assert same(bits(model), before)


def test_adasam_has_an_ascent_without_state():
    model, loss_fn = model_and_data()
    optimizer = fastsam.AdaSAM(model.parameters(), lr=0.1, rho=0.1, ascent_steps=2)
    calls = []
    optimizer.step(lambda: calls.append(loss_fn().backward()))
    assert len(calls) == 3
