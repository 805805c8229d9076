"""GradScaler: a step on scaled gradients is the step on the gradients, and an overflow is none."""

import copy

import pytest
import torch

import fastsam

from networks import bits, model_and_data, same
from reads import Reads, never_waiting
from registry import BACKENDS, DEVICE, METHODS
from scaled import (
    FUSED,
    assert_same,
    cases,
    create,
    give_grads,
    own_update,
    run,
    scaler_of,
    snapshot,
    step,
)


def steps_on(backend):
    return 2 if backend == "triton" and DEVICE == "cpu" else 5


# --- the same step -------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "base", "backend"), cases((*FUSED, "rmsprop")))
def test_power_of_two_changes_no_bit(method, base, backend):
    """Such a scale only moves exponents, in the gradients and when it is divided out again."""
    params, optimizer = create(method, base, backend)
    plain = run(optimizer, params, None, steps_on(backend))
    params, optimizer = create(method, base, backend)
    scaler = scaler_of(2.0**12, growth_interval=2)  # so that it changes on the way
    scaled = run(optimizer, params, scaler, steps_on(backend))
    assert scaler.get_scale() == 2.0 ** (12 + steps_on(backend) // 2)
    assert same(scaled, plain)
    assert float(optimizer.metrics["skipped"]) == 0


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("method", METHODS)
def test_other_scales_cost_roundings(method, backend):
    """Times 1000 and back is three roundings of 2**-24; five steps keep them below 2e-6."""
    params, optimizer = create(method, "adamw", backend)
    plain = run(optimizer, params, None, steps_on(backend))
    params, optimizer = create(method, "adamw", backend)
    scaler = scaler_of(1000.0, growth_interval=2, growth_factor=3.0)
    scaled = run(optimizer, params, scaler, steps_on(backend))
    for a, b in zip(scaled, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-6)


@pytest.mark.parametrize("scale", [2.0**15, 1000.0])
@pytest.mark.parametrize("backend", BACKENDS)
def test_closure_against_a_loop_in_plain_torch(backend, scale):
    """SAM on SGD, written out in float64 without a scaler."""
    model, loss_fn = model_and_data()
    scaler, lr, rho = scaler_of(scale), 0.1, 0.05
    optimizer = fastsam.SAM(model.parameters(), torch.optim.SGD, rho, lr=lr, backend=backend)
    exact = copy.deepcopy(model).double()
    _, x, y = (cell.cell_contents for cell in loss_fn.__closure__)

    def gradients():
        loss = torch.nn.functional.cross_entropy(exact(x.double()), y)
        return loss, torch.autograd.grad(loss, list(exact.parameters()))

    def closure():
        loss = loss_fn()
        scaler.scale(loss).backward()
        return loss

    for _ in range(3):
        before = [p.detach().clone() for p in exact.parameters()]
        loss, grads = gradients()
        norm = torch.stack([g.square().sum() for g in grads]).sum().sqrt()
        with torch.no_grad():
            for p, g in zip(exact.parameters(), grads, strict=True):
                p.add_(g, alpha=float(rho / norm))
        _, grads = gradients()
        with torch.no_grad():
            for p, w, g in zip(exact.parameters(), before, grads, strict=True):
                p.copy_(w - lr * g)
        ours = optimizer.step(closure, grad_scaler=scaler)
        scaler.update()
        assert float(ours.detach()) == pytest.approx(float(loss.detach()), rel=1e-6)  # unscaled
        assert float(optimizer.metrics["grad_norm"]) == pytest.approx(float(norm), rel=1e-6)
    for p, q in zip(model.parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(p.double(), q, rtol=0, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("method", ["ssam-adaptive-clip", "samar-all"])
def test_metrics_are_of_unscaled_gradients(method, backend):
    measured = []
    for scaler in (None, scaler_of(2.0**10)):
        params, optimizer = create(method, "adagrad_norm", backend)
        step(optimizer, params, scaler)
        measured.append(dict(optimizer.metrics))
    assert measured[0].keys() == measured[1].keys() >= {"grad_norm", "perturbed_grad_norm"}
    assert_same(*measured)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_disabled_scaler_is_none(method, backend):
    results = []
    for scaler in (None, torch.amp.GradScaler(DEVICE, enabled=False)):
        params, optimizer = create(method, "adamw", backend)
        results.append((run(optimizer, params, scaler, 2), optimizer.metrics.keys()))
    assert same(results[0][0], results[1][0]) and results[0][1] == results[1][1]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("passes", [(0,), (1,), (0, 1)])
def test_gradients_that_were_unscaled_before(passes, backend):
    """``scaler.unscale_``, as for clipping by hand: that pass takes the gradients as they are."""
    params, optimizer = create("ssam", "adamw", backend)
    plain = run(optimizer, params, None, 2)
    params, optimizer = create("ssam", "adamw", backend)
    scaler = scaler_of(growth_interval=2)
    for _ in range(2):
        for i, half in enumerate((optimizer.first_step, optimizer.second_step)):
            give_grads(params, scaler)
            if i in passes:
                scaler.unscale_(optimizer)
            half(grad_scaler=scaler)
        scaler.update()
    assert same(params, plain)
    assert scaler.get_scale() == 2.0**13


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("method", ["ssam", "vasso-all"])
def test_attributes_of_torchs_fused_optimizers(method, backend):
    """``grad_scale`` divides both passes' gradients, ``found_inf`` skips the update."""
    params, optimizer = create(method, "adamw", backend)
    plain = run(optimizer, params, None, 2)
    params, optimizer = create(method, "adamw", backend)
    optimizer.grad_scale = torch.tensor(2.0**7, device=DEVICE)
    optimizer.found_inf = torch.tensor(0.0, device=DEVICE)

    def scaled_step():
        for half in (optimizer.first_step, optimizer.second_step):
            give_grads(params)
            for p in params:
                p.grad = p.grad * 2.0**7
            half()

    scaled_step()
    before = snapshot(optimizer, params)
    optimizer.found_inf.fill_(1.0)
    scaled_step()
    assert_same(snapshot(optimizer, params), before)
    optimizer.found_inf.zero_()
    scaled_step()
    assert same(params, plain)
    optimizer.grad_scale = optimizer.found_inf = None
    give_grads(params)
    grad_norm = float(sum(p.grad.double().square().sum() for p in params) ** 0.5)
    optimizer.first_step()
    if not any(group["adaptive"] for group in optimizer.param_groups):
        assert float(optimizer.metrics["grad_norm"]) == pytest.approx(grad_norm, rel=1e-6)
    optimizer.restore()


@pytest.mark.parametrize("base", FUSED)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_are_only_read(base, backend):
    """torch's own fused updates write the unscaled gradients back."""
    method = {"sgd-momentum": "samar-all", "adamw": "sam", "adagrad": "ssam-adaptive-clip"}
    params, optimizer = create(method.get(base, "vasso-all"), base, backend)
    scaler = scaler_of()
    for half in (optimizer.first_step, optimizer.second_step):
        give_grads(params, scaler)
        grads = [p.grad for p in params]
        copies = [g.clone() for g in grads]
        half(grad_scaler=scaler)
        assert all(p.grad is g for p, g in zip(params, grads, strict=True))
        assert same(grads, copies)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_scale_is_taken_out_in_the_parameters_precision(backend):
    """A third of a float32 gradient, for a float64 weight: 1e-8 of it would be lost in float32."""
    param = torch.nn.Parameter(torch.zeros(5, dtype=torch.float64, device=DEVICE))
    param.grad_dtype = torch.float32
    optimizer = fastsam.USAM([param], torch.optim.SGD, rho=1.0, lr=1.0, backend=backend)
    optimizer.grad_scale = torch.tensor(3.0, device=DEVICE)
    g = torch.tensor([0.1, 0.2, 0.7, -1.1, 1.3], device=DEVICE)
    param.grad = g
    optimizer.first_step()
    torch.testing.assert_close(param.detach(), g.double() / 3, rtol=1e-15, atol=0)
    param.grad = g.clone()
    optimizer.second_step()
    torch.testing.assert_close(param.detach(), -g.double() / 3, rtol=1e-15, atol=0)


# --- training ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_training_under_autocast(dtype):
    """A small network learns to tell signs of products; at first the scale is far too large."""
    torch.manual_seed(0)
    x = torch.randn(128, 4, device=DEVICE)
    y = (x[:, 0] * x[:, 1] > 0).long()
    results = []
    for scaler in (scaler_of(2.0**24, growth_interval=20), None):
        torch.manual_seed(1)
        layers = torch.nn.Linear(4, 32), torch.nn.Tanh(), torch.nn.Linear(32, 2)
        model = torch.nn.Sequential(*layers).to(DEVICE)
        optimizer = fastsam.SAM(model.parameters(), torch.optim.AdamW, lr=0.02)

        def closure(model=model, scaler=scaler):
            with torch.autocast(DEVICE, dtype):
                loss = torch.nn.functional.cross_entropy(model(x).float(), y)
            (loss if scaler is None else scaler.scale(loss)).backward()
            return loss

        losses = []
        for _ in range(40):
            losses.append(float(optimizer.step(closure, grad_scaler=scaler).detach()))
            if scaler is not None:
                scaler.update()
        assert losses[-1] < 0.5 * losses[0] and losses[-1] < 0.3
        results.append((bits(model), float(optimizer.metrics.get("skipped", 0)), scaler))
    skipped, scaler = results[0][1:]
    if dtype == torch.bfloat16:  # of float32's range: no overflow, and no bit lost to the scale
        assert skipped == 0 and scaler.get_scale() == 2.0**26
        assert same(results[0][0], results[1][0])
    else:
        assert 1 <= skipped < 20


# --- no waiting ----------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.gpu
def test_gpu_is_never_waited_for(method, backend):
    for base in [""] if own_update(method) else FUSED:
        params, optimizer = create(method, base, backend)
        scaler = scaler_of()
        grads = [[torch.ones_like(p) for p in params] for _ in range(2)]
        step(optimizer, params, scaler)  # compiles, creates the scale
        scaler.update()
        with never_waiting():
            for _ in range(2):
                for half, given in zip(
                    (optimizer.first_step, optimizer.second_step), grads, strict=True
                ):
                    for p, g in zip(params, given, strict=True):
                        p.grad = g
                    half(grad_scaler=scaler)
                scaler.update()


@pytest.mark.parametrize("method", ["sam", "ssam-adaptive-clip", "vasso-all"])
def test_triton_backend_reads_nothing(method):
    """Holds on any device, since the host code is the same on all."""
    params, optimizer = create(method, "adamw", "triton")
    scaler = scaler_of()
    grads = [torch.ones_like(p) for p in params]
    scaler.scale(torch.ones((), device=DEVICE))
    with Reads() as reads:
        for half in (optimizer.first_step, optimizer.second_step):
            for p, g in zip(params, grads, strict=True):
                p.grad = g.clone()
            half(grad_scaler=scaler)
    assert reads.seen == []
