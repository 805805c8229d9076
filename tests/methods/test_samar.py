"""SAMAR: the gradient that it keeps, its lam and its rules; the rest is in the tests of all."""

import math

import numpy as np
import pytest
import torch

import fastsam

from networks import bits, closure_of, model_and_data, same
from registry import BACKENDS, DEVICE, DTYPES
from trajectories import check_trajectory

FP32 = DTYPES["fp32"]
SGD = {"base_optimizer": torch.optim.SGD, "lr": 0.1}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("how", ["closure", "explicit", "explicit, zeroed in place", "kept"])
def test_samar_keeps_the_first_gradient_safely(how, backend):
    """However the user clears gradients, and though the second backward may reuse their memory."""
    results = []
    for way in ("closure", how):
        model, loss_fn = model_and_data()
        optimizer = fastsam.SAMAR(model.parameters(), lam=0.4, rho=0.5, backend=backend, **SGD)
        for _ in range(3):
            if way == "closure":
                optimizer.step(closure_of(loss_fn))
                continue
            model.zero_grad()
            loss_fn().backward()
            optimizer.first_step(zero_grad=way == "explicit")
            if way != "explicit":
                model.zero_grad(set_to_none=way == "kept")
            loss_fn().backward()
            optimizer.second_step()
        results.append(bits(model))
    assert same(*results)


@pytest.mark.parametrize("backend", BACKENDS)
def test_samar_copies_gradients_that_are_views(backend):
    """DDP's may lie in buckets that the second backward fills again."""
    bucket = torch.zeros(8, device=DEVICE)
    param = torch.nn.Parameter(torch.ones(8, device=DEVICE))
    optimizer = fastsam.SAMAR(
        [param], lam=0.25, rho=1.0, rule=fastsam.SharpnessRatio(c=1), backend=backend, **SGD
    )
    for value, half in ((4.0, optimizer.first_step), (8.0, optimizer.second_step)):
        bucket.fill_(value)
        param.grad = bucket.view(8)
        half(zero_grad=True)
    assert (param == 1 - 0.1 * (0.75 * 4 + 0.25 * 8)).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_that_the_closure_gives_out_again(backend):
    """As where it replays a CUDA graph: the same tensors in every call, with other numbers."""
    results = []
    for again in (False, True):
        model, loss_fn = model_and_data()
        params = list(model.parameters())
        optimizer = fastsam.SAMAR(params, lam=0.5, rho=1.0, backend=backend, **SGD)
        static = [torch.zeros_like(p) for p in params]

        def closure(params=params, loss_fn=loss_fn, static=static, again=again):
            loss = loss_fn()
            for p, x, g in zip(params, static, torch.autograd.grad(loss, params), strict=True):
                p.grad = x.copy_(g) if again else g
            return loss.detach()

        for _ in range(3):
            optimizer.step(closure)
        results.append((bits(model), optimizer.metrics["sharpness"]))
    assert same(results[0][0], results[1][0]) and results[0][1] == results[1][1]


@pytest.mark.parametrize("backend", BACKENDS)
def test_samars_gradients_are_not_copied_where_the_step_clears_them(backend):
    model, loss_fn = model_and_data()
    optimizer = fastsam.SAMAR(model.parameters(), backend=backend, **SGD)
    loss_fn().backward()
    addresses = [p.grad.data_ptr() for p in model.parameters()]  # nobody else has the tensors
    optimizer.first_step(zero_grad=True)
    assert [x.data_ptr() for x in optimizer._flight.firsts[1]] == addresses
    optimizer.restore()
    assert optimizer._flight is None


@pytest.mark.parametrize("backend", BACKENDS)
def test_samars_lam_follows_the_sharpness(backend):
    """On 1/2 w^2 the trapezoid is exact: s = rho |w| + rho^2 / 2."""
    w, lam, s = 1.0, 1.0, None
    param = torch.nn.Parameter(torch.ones((), dtype=torch.float64, device=DEVICE))
    rule = fastsam.SharpnessRatio(c=1.05, lam_min=0.5)
    optimizer = fastsam.SAMAR([param], rho=0.1, rule=rule, backend=backend, **SGD)
    for _ in range(20):
        optimizer.step(lambda: (param**2 / 2).backward())
        old, s = s, 0.1 * abs(w) + 0.005
        assert float(optimizer.metrics["sharpness"]) == pytest.approx(s, rel=1e-12)
        assert float(optimizer.metrics["lam"]) == pytest.approx(lam, rel=1e-12)
        w -= 0.1 * (w + lam * 0.1 * np.sign(w))
        if old is not None:
            # the kernel reads the rule's constants in the dtype of the arithmetic
            lam = min(max(lam * min(max(s / old, 1 / 1.05), 1.05), 0.5), 2)
        assert float(param.detach()) == pytest.approx(w, rel=1e-12)
    assert lam == 0.5


@pytest.mark.parametrize("backend", BACKENDS)
def test_samar_takes_any_rule(backend):
    seen = []

    def rule(lam, sharpness, previous):
        seen.append((sharpness, previous))
        assert all(x.ndim == 0 and x.device == lam.device for x in (lam, sharpness, previous))
        return 0.5 * lam

    model, loss_fn = model_and_data()
    optimizer = fastsam.SAMAR(model.parameters(), rule=rule, backend=backend, **SGD)
    for _ in range(4):
        optimizer.step(closure_of(loss_fn))
    assert optimizer.rule is rule
    assert optimizer.metrics["lam"] == 0.25  # 1, 1, 1/2, 1/4: the first ratio needs two values
    assert seen[0][1].isnan() and seen[3][1] == seen[2][0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("answer", [math.nan, math.inf, 0.5])
def test_a_rule_may_answer_with_a_number_but_only_a_finite_one_counts(answer, backend):
    model, loss_fn = model_and_data()
    optimizer = fastsam.SAMAR(model.parameters(), rule=lambda *_: answer, backend=backend, **SGD)
    for _ in range(3):
        optimizer.step(closure_of(loss_fn))
    assert optimizer.metrics["lam"] == (0.5 if answer == 0.5 else 1)
    assert all(w.isfinite().all() for w in bits(model))


@pytest.mark.parametrize("backend", BACKENDS)
def test_radius_zero_leaves_lam_however_it_is_stepped(backend):
    for explicit in (False, True):
        model, loss_fn = model_and_data()
        optimizer = fastsam.SAMAR(model.parameters(), rho=0.3, backend=backend, **SGD)
        for _ in range(3):
            optimizer.step(closure_of(loss_fn))
        group = optimizer.param_groups[0]
        kept = optimizer.kept
        before = kept["lam"].clone(), kept["sharpness"].clone()
        group["rho"] = 0.0
        if explicit:
            for half in (optimizer.first_step, optimizer.second_step):
                optimizer.zero_grad()
                loss_fn().backward()
                half()
        else:
            optimizer.step(closure_of(loss_fn))
        assert (kept["lam"], kept["sharpness"]) == before


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["zero", "nan", "skipped"])
def test_a_step_that_measures_nothing_leaves_lam(kind, backend):
    param = torch.nn.Parameter(torch.ones(20, device=DEVICE))
    optimizer = fastsam.SAMAR(
        [param], rho=0.5, lam=0.7, skip_nonfinite=True, backend=backend, **SGD
    )

    def step(first, second):
        for value, half in ((first, optimizer.first_step), (second, optimizer.second_step)):
            param.grad = torch.full_like(param, value)
            half()

    step(1.0, 2.0)
    step(1.5, 2.0)
    kept = optimizer.kept
    before = kept["lam"].clone(), kept["sharpness"].clone()
    assert before[0] > 0.7 and before[1] > 0
    step(*{"zero": (0.0, 1.0), "nan": (math.nan, 1.0), "skipped": (1.0, math.nan)}[kind])
    assert (kept["lam"], kept["sharpness"]) == before
    assert param.isfinite().all()


def test_samar_is_the_gradient_of_the_regularised_loss():
    """u = grad of (1 - lam) f(w) + lam f(w + e) with e held fixed."""
    model, loss_fn = model_and_data()
    params = list(model.parameters())
    before = bits(model)
    optimizer = fastsam.SAMAR(params, lam=1.7, rho=0.3, backend="reference", **SGD)
    optimizer.step(closure_of(loss_fn))
    after = bits(model)
    with torch.no_grad():
        for p, w in zip(params, before, strict=True):
            p.copy_(w)
    g = torch.autograd.grad(loss_fn(), params)
    n = torch.stack([x.norm() for x in g]).norm()
    with torch.no_grad():
        for p, x in zip(params, g, strict=True):
            p.add_(0.3 * x / n)
    second = torch.autograd.grad(loss_fn(), params)
    for w, x, y, new in zip(before, g, second, after, strict=True):
        torch.testing.assert_close(new, w - 0.1 * (-0.7 * x + 1.7 * y), rtol=1e-5, atol=1e-7)


# --- the rule by two averages ---------------------------------------------------------------------

TREND = fastsam.SharpnessTrend(c=1.2, fast=0.5, slow=0.9)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", ["fp32", "fp64"])
def test_the_trends_trajectory(dtype, backend):
    shapes, groups = [(1031,), (6, 7)], [{"params": [0]}, {"params": [1], "rho": 0.1}]
    check_trajectory("samar-trend", "adagrad_norm", DTYPES[dtype], backend, shapes, groups, 5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_lam_follows_the_trend_and_comes_back(backend):
    """On 1/2 w^2, where s = rho |w| + rho^2 / 2; the sharpness falls, and then stays."""
    param = torch.nn.Parameter(torch.ones((), dtype=torch.float64, device=DEVICE))
    rule = fastsam.SharpnessTrend(c=1.1, fast=0.25, slow=0.75)
    optimizer = fastsam.SAMAR([param], rho=0.1, lam=0.5, rule=rule, backend=backend, **SGD)
    w, lam, a, b = 1.0, 0.5, None, None
    for step in range(24):
        if step == 8:
            optimizer.param_groups[0]["lr"] = 0.0
        optimizer.step(lambda: (param**2 / 2).backward())
        assert float(optimizer.metrics["lam"]) == pytest.approx(lam, rel=1e-10)
        s = 0.1 * abs(w) + 0.005
        a, b = (s, s) if a is None else (0.25 * a + 0.75 * s, 0.75 * b + 0.25 * s)
        w -= (0.1 if step < 8 else 0.0) * (w + lam * 0.1)
        lam = 0.5 * min(max(a / b, 1 / 1.1), 1.1)
        kept = [float(optimizer.kept[name]) for name in ("lam", "sharpness", "slow_sharpness")]
        assert kept == pytest.approx([lam, a, b], rel=1e-10)
        if step == 7:
            assert lam == 0.5 / 1.1
    assert lam == pytest.approx(0.5, rel=0.02)


@pytest.mark.parametrize("backend", BACKENDS)
def test_averages_that_are_not_positive(backend):
    """Of what falls along its gradient: -rho w^2 / 2 at first, then rising through 0."""
    param = torch.nn.Parameter(torch.ones((), dtype=torch.float64, device=DEVICE))
    optimizer = fastsam.SAMAR([param], rho=1.0, rule=TREND, backend=backend, **SGD | {"lr": 0.0})
    found = []
    for s in (-4.0, -3.0, 4.0, 1.0):  # a: -4, -3.5, 0.25, 0.625; b: -4, -3.9, -3.11, -2.699
        for value, half in ((1.0, optimizer.first_step), (2 * s - 1, optimizer.second_step)):
            param.grad = torch.full_like(param, value)
            half()
        found.append(float(optimizer.kept["lam"]))
    assert found == pytest.approx([1.0, 1.0, 1.2, 1.2], rel=1e-12)
    assert float(optimizer.kept["slow_sharpness"]) == pytest.approx(-2.699, rel=1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["zero", "nan", "skipped"])
def test_a_step_that_measures_nothing_leaves_both_averages(kind, backend):
    param = torch.nn.Parameter(torch.ones(20, device=DEVICE))
    optimizer = fastsam.SAMAR(
        [param], rho=0.5, lam=0.7, rule=TREND, skip_nonfinite=True, backend=backend, **SGD
    )
    bad = {"zero": (0.0, 1.0), "nan": (math.nan, 1.0), "skipped": (1.0, math.nan)}[kind]
    kept = []
    for pair in ((1.0, 2.0), (1.5, 2.0), bad):
        for value, half in zip(pair, (optimizer.first_step, optimizer.second_step), strict=True):
            param.grad = torch.full_like(param, value)
            half()
        kept.append([float(optimizer.kept[k]) for k in ("lam", "sharpness", "slow_sharpness")])
    assert kept[0] != kept[1] == kept[2] and param.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_the_trend_is_resumed_and_another_rule_is_taken_over(backend):
    def trained(optimizer, loss_fn, steps):
        for _ in range(steps):
            optimizer.step(closure_of(loss_fn))
        return optimizer

    def make(rule, start):
        model, loss_fn = model_and_data()
        model.load_state_dict(start)
        optimizer = fastsam.SAMAR(model.parameters(), rho=0.3, rule=rule, backend=backend, **SGD)
        return model, optimizer, loss_fn

    start = model_and_data()[0].state_dict()
    model, whole, loss_fn = make(TREND, start)
    trained(whole, loss_fn, 2)
    middle, state = {k: x.clone() for k, x in model.state_dict().items()}, whole.state_dict()
    trained(whole, loss_fn, 2)
    again, resumed, again_loss = make(TREND, middle)
    resumed.load_state_dict(state)
    trained(resumed, again_loss, 2)
    assert same(bits(model), bits(again))
    _, other, other_loss = make(None, start)
    state = trained(other, other_loss, 2).state_dict()
    assert not any("slow" in key for key in state["param_groups"][0])
    _, taker, taker_loss = make(TREND, middle)
    taker.load_state_dict(state)
    assert math.isnan(taker.kept["slow_sharpness"])
    assert float(taker.kept["sharpness"]) == float(other.kept["sharpness"])
    assert float(trained(taker, taker_loss, 1).kept["slow_sharpness"]) > 0
    other.load_state_dict(taker.state_dict())
    trained(other, other_loss, 1)


class Halved(fastsam.SharpnessTrend):
    def __call__(self, lam, fast, slow):
        return super().__call__(lam, fast, slow) / 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_rule_made_of_the_trend_runs_on_the_host(backend):
    model, loss_fn = model_and_data()
    optimizer = fastsam.SAMAR(model.parameters(), rule=Halved(c=1), backend=backend, **SGD)
    for _ in range(3):
        optimizer.step(closure_of(loss_fn))
    assert float(optimizer.metrics["lam"]) == 0.5
    assert float(optimizer.kept["slow_sharpness"]) > 0


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"c": 0.5}, "c must be at least 1"),
        ({"fast": 1.0}, r"fast must be in \[0, 1\), got 1.0"),
        ({"slow": 0.5}, "slow must be at least fast=0.9, got 0.5"),
    ],
)
def test_a_trend_out_of_range(kwargs, match):
    with pytest.raises(ValueError, match=match):
        fastsam.SharpnessTrend(**kwargs)
