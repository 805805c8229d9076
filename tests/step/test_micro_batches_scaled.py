"""Micro-batches whose losses a GradScaler scales: the step on unscaled ones, or none at all."""

import copy

import pytest
import torch

import fastsam
from fastsam.step.precision import MASTER

from networks import same
from registry import BACKENDS, DEVICE
from scaled import INF, NAN, assert_same, scaler_of, snapshot

BASES = {
    "sgd": {"base_optimizer": torch.optim.SGD, "lr": 0.1, "momentum": 0.9},
    "adamw": {"base_optimizer": torch.optim.AdamW, "lr": 0.01, "weight_decay": 0.1},
    "rmsprop": {"base_optimizer": torch.optim.RMSprop, "lr": 0.01, "eps": 1e-3},
}
CASES = [(cls, base, backend) for cls in (fastsam.SAM, fastsam.USAM) for base in BASES
         for backend in BACKENDS
         if backend != "triton" or (cls, base) == (fastsam.SAM, "adamw")]  # fmt: skip


class Problem:
    """Three micro-batches of a regression, of which one may be spoilt in one of its passes."""

    def __init__(self, dtype=torch.float32):
        torch.manual_seed(0)
        self.data = [(torch.randn(4, 5, device=DEVICE, dtype=dtype),
                      torch.randn(4, 3, device=DEVICE, dtype=dtype)) for _ in range(3)]  # fmt: skip
        self.params = [torch.nn.Parameter(0.5 * torch.randn(*s, device=DEVICE, dtype=dtype))
                       for s in ((5, 3), (3,))]  # fmt: skip
        self.calls = [0, 0, 0]

    def loss(self, k, params=None):
        w, b = params or self.params
        x, y = self.data[k]
        return ((x @ w + b).tanh() - y).square().sum()

    def closures(self, scaler=None, spoil=(None, None, None), factor=1.0, unscale=None):
        """``spoil``: which micro-batch, in which call, with what. ``unscale``: in which calls an
        optimizer's gradients are unscaled by the scaler itself."""
        self.calls = [0, 0, 0]

        def closure(k):
            loss = self.loss(k)
            (loss * factor if scaler is None else scaler.scale(loss)).backward()
            call, self.calls[k] = self.calls[k], self.calls[k] + 1
            if (k, call) == spoil[:2]:
                self.params[0].grad[2, 1] = spoil[2]
            if unscale is not None and call in unscale[1]:
                scaler.unscale_(unscale[0])
            return loss

        return [lambda k=k: closure(k) for k in range(3)]


@pytest.mark.parametrize(("cls", "base", "backend"), CASES)
def test_power_of_two_changes_no_bit(cls, base, backend):
    plain, scaled = Problem(), Problem()
    ours = cls(plain.params, rho=0.1, backend=backend, **BASES[base])
    optimizer = cls(scaled.params, rho=0.1, backend=backend, **BASES[base])
    scaler = scaler_of(2.0**12, growth_interval=2)  # so that it changes on the way
    for k in range(3):
        losses = ours.step_micro_batches(plain.closures())
        found = optimizer.step_micro_batches(scaled.closures(scaler), grad_scaler=scaler)
        assert same(losses, found)
        if base != "rmsprop":  # .grad carries the scale still, as after step
            scale = scaler.get_scale()
            assert same([p.grad * scale for p in plain.params], [p.grad for p in scaled.params])
        scaler.update()
        assert same(plain.params, scaled.params), f"step {k}"
        assert optimizer.metrics["grad_norm"] == ours.metrics["grad_norm"]
        assert optimizer.metrics["skipped"] == 0 and optimizer.metrics["perturbed"] == 1
    assert scaler.get_scale() == 2.0**13


@pytest.mark.parametrize("backend", BACKENDS)
def test_against_a_loop_in_plain_torch(backend):
    """SAM on SGD by micro-batch, in float64 and without a scaler."""
    problem, scaler, rho, lr = Problem(), scaler_of(1000.0), 0.1, 0.1
    optimizer = fastsam.SAM(problem.params, torch.optim.SGD, rho, lr=lr, backend=backend)
    exact = Problem(torch.float64)
    exact.data = [(x.double(), y.double()) for x, y in problem.data]
    weights = [p.detach().double().requires_grad_() for p in problem.params]
    for _ in range(2):
        total = [torch.zeros_like(w) for w in weights]
        for k in range(3):
            grads = torch.autograd.grad(exact.loss(k, weights), weights)
            norm = sum(g.square().sum() for g in grads).sqrt()
            there = [(w + rho * g / norm).detach().requires_grad_()
                     for w, g in zip(weights, grads, strict=True)]  # fmt: skip
            for t, g in zip(total, torch.autograd.grad(exact.loss(k, there), there), strict=True):
                t += g / 3
        weights = [(w - lr * t).detach().requires_grad_()
                   for w, t in zip(weights, total, strict=True)]  # fmt: skip
        optimizer.step_micro_batches(problem.closures(scaler), grad_scaler=scaler)
        scaler.update()
    for p, w in zip(problem.params, weights, strict=True):
        torch.testing.assert_close(p.double(), w, rtol=0, atol=2e-6)


SPOILT = [(0, 0, INF), (1, 0, NAN), (2, 0, -INF), (0, 1, NAN), (2, 1, INF)]


@pytest.mark.parametrize(
    ("base", "backend", "spoil"),
    [(base, backend, spoil) for base in BASES for backend in BACKENDS if backend != "triton"
     for spoil in SPOILT] + [("adamw", "triton", SPOILT[0]), ("adamw", "triton", SPOILT[3])],
)  # fmt: skip
def test_an_overflow_anywhere_skips_the_whole_step(base, backend, spoil):
    problem, twin = Problem(), Problem()
    optimizer = fastsam.SAM(problem.params, rho=0.1, backend=backend, **BASES[base])
    other = fastsam.SAM(twin.params, rho=0.1, backend=backend, **BASES[base])
    scaler = scaler_of(2.0**12)
    optimizer.step_micro_batches(problem.closures(scaler), grad_scaler=scaler)
    scaler.update()
    before = snapshot(optimizer, problem.params)
    optimizer.step_micro_batches(problem.closures(scaler, spoil), grad_scaler=scaler)
    assert problem.calls == [2, 2, 2]
    scaler.update()
    assert_same(snapshot(optimizer, problem.params), before)
    assert scaler.get_scale() == 2.0**11 and optimizer.metrics["skipped"] == 1
    optimizer.step_micro_batches(problem.closures(scaler), grad_scaler=scaler)
    scaler.update()
    for _ in range(2):
        other.step_micro_batches(twin.closures())
    assert same(problem.params, twin.params)
    assert scaler.get_scale() == 2.0**11 and optimizer.metrics["skipped"] == 1


@pytest.mark.parametrize("spoil", [None, (1, 0, INF)])
def test_steps_of_the_base(spoil):
    """One pass, as torch's own scaler takes it after accumulating."""
    problem, twin = Problem(), Problem()
    optimizer = fastsam.SAM(problem.params, start=5, **BASES["adamw"])
    base = torch.optim.AdamW(twin.params, lr=0.01, weight_decay=0.1)
    scalers = scaler_of(2.0**12), scaler_of(2.0**12)
    for _ in range(2):
        optimizer.step_micro_batches(
            problem.closures(scalers[0], spoil or (None,) * 3), grad_scaler=scalers[0]
        )
        base.zero_grad()
        for closure in twin.closures(scalers[1], spoil or (None,) * 3):
            closure()
        for p in twin.params:
            p.grad /= 3
        scalers[1].step(base)
        for scaler in scalers:
            scaler.update()
        for p, q in zip(problem.params, twin.params, strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=1e-6)
    assert scalers[0].get_scale() == scalers[1].get_scale() == 2.0 ** (10 if spoil else 12)
    assert problem.calls == [1, 1, 1]


@pytest.mark.parametrize("calls", [(0,), (1,), (0, 1)])
def test_gradients_that_were_unscaled_before(calls):
    """By ``scaler.unscale_`` in the closures, as for clipping by hand."""
    plain, problem = Problem(), Problem()
    ours = fastsam.SAM(plain.params, rho=0.1, **BASES["adamw"])
    optimizer = fastsam.SAM(problem.params, rho=0.1, **BASES["adamw"])
    scaler = scaler_of(2.0**12)
    for _ in range(2):
        ours.step_micro_batches(plain.closures())
        closures = problem.closures(scaler, unscale=(optimizer, calls))
        optimizer.step_micro_batches(closures, grad_scaler=scaler)
        scaler.update()
    assert same(plain.params, problem.params)
    before = snapshot(optimizer, problem.params)
    closures = problem.closures(scaler, (1, calls[0], INF), unscale=(optimizer, calls))
    optimizer.step_micro_batches(closures, grad_scaler=scaler)
    scaler.update()  # it is told of what unscale_ found
    assert_same(snapshot(optimizer, problem.params), before)
    assert scaler.get_scale() == 2.0**11


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_attributes_of_torchs_fused_optimizers(backend):
    plain, problem = Problem(), Problem()
    ours = fastsam.SAM(plain.params, rho=0.1, backend=backend, **BASES["adamw"])
    optimizer = fastsam.SAM(problem.params, rho=0.1, backend=backend, **BASES["adamw"])
    optimizer.grad_scale = torch.tensor(2.0**7, device=DEVICE)
    optimizer.found_inf = torch.tensor(0.0, device=DEVICE)
    ours.step_micro_batches(plain.closures())
    optimizer.step_micro_batches(problem.closures(factor=2.0**7))
    assert same(plain.params, problem.params)
    before = snapshot(optimizer, problem.params)
    optimizer.step_micro_batches(problem.closures(None, (0, 0, INF), factor=2.0**7))
    assert_same(snapshot(optimizer, problem.params), before)  # in a first pass
    closures = problem.closures(factor=2.0**7)

    def noticed():  # in one micro-batch alone
        optimizer.found_inf.fill_(1.0)
        return closures[1]()

    def gone():
        optimizer.found_inf.zero_()
        return closures[2]()

    optimizer.step_micro_batches([closures[0], noticed, gone])
    assert_same(snapshot(optimizer, problem.params), before)
    optimizer.step_micro_batches(problem.closures(factor=2.0**7))
    ours.step_micro_batches(plain.closures())
    assert same(plain.params, problem.params)


def test_small_gradients_in_half_precision():
    """The mean stays scaled in .grad: in float16 it would be 0 without."""
    param = torch.nn.Parameter(torch.zeros(4, device=DEVICE, dtype=torch.float16))
    optimizer = fastsam.SAM([param], torch.optim.SGD, lr=1.0, rho=0.0, master_weights=True)
    scaler = scaler_of(2.0**16)

    def closure():
        scaler.scale(torch.zeros((), device=DEVICE))
        param.grad = torch.full_like(param, 2.0**-10)  # 2**-26 times the scale

    optimizer.step_micro_batches([closure] * 4, grad_scaler=scaler)
    scaler.update()
    assert optimizer.state[param][MASTER].tolist() == [-(2.0**-26)] * 4


def test_misuse():
    problem = Problem()
    optimizer = fastsam.SAM(problem.params, **BASES["sgd"])
    scaler = scaler_of()
    before = copy.deepcopy(problem.params)
    with pytest.raises(TypeError, match="grad_scaler must be a torch.amp.GradScaler or None"):
        optimizer.step_micro_batches(problem.closures(), grad_scaler=1.0)
    with pytest.raises(RuntimeError, match="grad_scaler has scaled no loss yet"):
        optimizer.step_micro_batches(problem.closures(), grad_scaler=scaler)
    assert same(problem.params, before)
    optimizer.step_micro_batches(problem.closures(scaler), grad_scaler=scaler)
    before = copy.deepcopy(problem.params)
    with pytest.raises(RuntimeError, match="update.. has to be called after every step"):
        optimizer.step_micro_batches(problem.closures(scaler), grad_scaler=scaler)
    assert same(problem.params, before) and problem.calls == [0, 0, 0]
    disabled = torch.amp.GradScaler(DEVICE, enabled=False)
    optimizer.step_micro_batches(problem.closures(), grad_scaler=disabled)
    assert "skipped" not in optimizer.metrics
