"""The step's contract: alternation, closures, exceptions, exact restore, non-finite gradients."""

import copy
import signal
import warnings

import pytest
import torch

import fastsam

from networks import bits, model_and_data, same
from registry import BACKENDS, DEVICE, METHODS, create

BASE = {"base_optimizer": torch.optim.SGD, "lr": 0.1, "momentum": 0.9}


@pytest.mark.parametrize("backend", BACKENDS)
def test_closure_equals_explicit_passes(backend):
    results = []
    for explicit in (False, True):
        model, loss_fn = model_and_data()
        optimizer = fastsam.SAM(model.parameters(), backend=backend, **BASE)
        losses = []

        def closure(loss_fn=loss_fn):
            loss = loss_fn()
            loss.backward()
            return loss

        for _ in range(5):
            if explicit:
                losses.append(closure())
                optimizer.first_step(zero_grad=True)
                closure()
                optimizer.second_step(zero_grad=True)
            else:
                before = loss_fn().detach()
                losses.append(optimizer.step(closure))
                assert losses[-1].detach() == before  # the loss at w, not at w + e
        results.append((bits(model), [loss.detach() for loss in losses]))
    assert same(*[r[0] for r in results]) and same(*[r[1] for r in results])


def test_closure_needs_no_zero_grad_and_gets_grad_mode():
    model, loss_fn = model_and_data()
    optimizer = fastsam.SAM(model.parameters(), **BASE)
    for p in model.parameters():
        p.grad = torch.full_like(p, 1e6)  # left over: must not leak into the step

    def closure():
        assert torch.is_grad_enabled()
        assert all(p.grad is None for p in model.parameters())
        loss = loss_fn()
        loss.backward()
        return loss

    with torch.no_grad():
        optimizer.step(closure)
    assert optimizer.metrics["grad_norm"] < 100


def test_halves_alternate():
    model, loss_fn = model_and_data()
    optimizer = fastsam.SAM(model.parameters(), **BASE)
    loss_fn().backward()
    with pytest.raises(RuntimeError, match="expected first_step"):
        optimizer.second_step()
    optimizer.first_step()
    perturbed = bits(model)
    with pytest.raises(RuntimeError, match="expected second_step"):
        optimizer.first_step()
    with pytest.raises(RuntimeError, match="expected second_step"):
        optimizer.step(lambda: None)
    with pytest.raises(RuntimeError, match="load_state_dict"):
        optimizer.load_state_dict(optimizer.state_dict())
    with pytest.raises(RuntimeError, match="copied or pickled"):
        copy.deepcopy(optimizer)
    assert same(bits(model), perturbed)
    optimizer.second_step()
    with pytest.raises(RuntimeError, match="step needs a closure"):
        optimizer.step()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("call", [1, 2])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_exception_in_a_pass_undoes_it(backend, call, error):
    model, loss_fn = model_and_data()
    optimizer = fastsam.SAM(model.parameters(), backend=backend, **BASE)

    def closure():
        loss = loss_fn()
        loss.backward()
        return loss

    optimizer.step(closure)
    before, state = bits(model), copy.deepcopy(optimizer.state_dict())
    calls = []

    def failing():
        calls.append(1)
        closure()
        if len(calls) == call:
            raise error("no")

    with pytest.raises(error, match="no"):
        optimizer.step(failing)
    assert same(bits(model), before)
    after = optimizer.state_dict()
    for key, entry in state["state"].items():
        assert torch.equal(entry["momentum_buffer"], after["state"][key]["momentum_buffer"])
    optimizer.step(closure)  # ready for the next
    assert not same(bits(model), before)


def test_interrupt_right_after_the_perturbation(monkeypatch):
    model, loss_fn = model_and_data()
    optimizer = fastsam.SAM(model.parameters(), **BASE)
    before = bits(model)
    zero_grad, calls = optimizer.zero_grad, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 2:  # the one that first_step makes, with the weights perturbed
            assert not same(bits(model), before)
            raise KeyboardInterrupt
        zero_grad(*args)

    monkeypatch.setattr(optimizer, "zero_grad", interrupted)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step(lambda: loss_fn().backward())
    assert same(bits(model), before)
    optimizer.step(lambda: loss_fn().backward())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("half", ["ascend", "descend"])
def test_sigint_waits_for_the_end_of_a_pass(half, backend, monkeypatch):
    """Ctrl-C inside a pass over the parameters is delivered when the pass is complete."""
    model, loss_fn = model_and_data()
    optimizer = fastsam.SAM(model.parameters(), backend=backend, **BASE)
    optimizer.step(lambda: loss_fn().backward())
    before = bits(model)
    running = optimizer._passes.backends._made[backend]
    run = getattr(running, half)

    def interrupted(*args):
        signal.raise_signal(signal.SIGINT)
        return run(*args)

    monkeypatch.setattr(running, half, interrupted)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step(lambda: loss_fn().backward())
    # the ascent is undone; the update has happened, all of it
    assert same(bits(model), before) == (half == "ascend")
    monkeypatch.undo()
    optimizer.step(lambda: loss_fn().backward())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("method", ["unified-1/t", "vasso"])
def test_sigint_leaves_no_half_of_an_update(method, backend, monkeypatch):
    """Weights, the base's state, the ascent's and the count of steps change together."""
    spec = METHODS[method]
    results = []
    for interrupt in (False, True):
        model, loss_fn = model_and_data()
        optimizer = spec.cls(
            model.parameters(), torch.optim.RMSprop, lr=0.01, backend=backend, **spec.kwargs
        )
        optimizer.step(lambda f=loss_fn: f().backward())
        running = optimizer._passes.backends._made[backend]
        run = running.descend
        if interrupt:

            def interrupted(*args, run=run):
                signal.raise_signal(signal.SIGINT)
                return run(*args)

            monkeypatch.setattr(running, "descend", interrupted)
            with pytest.raises(KeyboardInterrupt):
                optimizer.step(lambda f=loss_fn: f().backward())
            monkeypatch.undo()
        else:
            optimizer.step(lambda f=loss_fn: f().backward())
        optimizer.step(lambda f=loss_fn: f().backward())
        results.append(bits(model))
    assert same(*results)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_parameters_that_share_memory_are_restored(backend):
    memory = torch.arange(1.0, 6.0, device=DEVICE)
    params = [torch.nn.Parameter(memory[:3]), torch.nn.Parameter(memory[1:])]
    optimizer = fastsam.SAM(params, torch.optim.SGD, lr=0.0, rho=1.0, backend=backend)
    for half in (optimizer.first_step, optimizer.second_step):
        for p in params:
            p.grad = torch.ones_like(p)
        half()
    assert memory.tolist() == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("method", METHODS)
def test_restore_is_exact(method, backend):
    """At lr = 0 a step leaves every weight with its bits, though it was perturbed in between."""
    model, loss_fn = model_and_data()
    optimizer = create(method, model.parameters(), backend, "sgd", lr=0.0)
    before = bits(model)
    for _ in range(2):
        loss_fn().backward()
        optimizer.first_step(zero_grad=True)
        assert not same(bits(model), before)
        loss_fn().backward()
        optimizer.second_step(zero_grad=True)
        assert same(bits(model), before)
    loss_fn().backward()
    optimizer.first_step()
    optimizer.restore()
    assert same(bits(model), before)
    optimizer.restore()  # nothing to undo: does nothing
    optimizer.first_step()
    optimizer.second_step()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("method", METHODS)
def test_gradients_are_only_read(method, backend):
    model, loss_fn = model_and_data()
    optimizer = create(method, model.parameters(), backend, "adamw")
    for half in (optimizer.first_step, optimizer.second_step):
        optimizer.zero_grad()
        loss_fn().backward()
        grads = [p.grad for p in model.parameters()]
        copies = [g.clone() for g in grads]
        half()
        assert all(p.grad is g for p, g in zip(model.parameters(), grads, strict=True))
        assert same(grads, copies)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "method", ["sam", "asam", "usam", "ssam", "unified-callable", "vasso", "samar"]
)
def test_nonfinite_first_gradient_perturbs_nothing(method, bad, backend):
    model, loss_fn = model_and_data()
    optimizer = create(method, model.parameters(), backend, "sgd", lr=0.1)
    before = bits(model)
    loss_fn().backward()
    next(model.parameters()).grad.view(-1)[3] = bad
    optimizer.first_step(zero_grad=True)
    assert same(bits(model), before)
    loss_fn().backward()
    grads = [p.grad.clone() for p in model.parameters()]
    optimizer.second_step()
    # a plain SGD step: the gradient was taken at w, and SSAM has no norm to restore
    for p, w, g in zip(model.parameters(), before, grads, strict=True):
        torch.testing.assert_close(p, w - 0.1 * g, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Adagrad,
                                  fastsam.AdaGradNorm])  # fmt: skip
def test_nonfinite_second_gradient_is_skipped(base, backend):
    model, loss_fn = model_and_data()
    kwargs = {"lr": 0.1, "momentum": 0.9} if base is torch.optim.SGD else {"lr": 0.1}
    optimizer = fastsam.SAM(
        model.parameters(), base, skip_nonfinite=True, backend=backend, **kwargs
    )

    def step(bad: float | None) -> None:
        for half in (optimizer.first_step, optimizer.second_step):
            optimizer.zero_grad()
            loss_fn().backward()
            if bad is not None and half == optimizer.second_step:
                list(model.parameters())[2].grad.view(-1)[1] = bad
            half()

    step(None)
    before, state = bits(model), copy.deepcopy(optimizer.state_dict())
    for k, bad in enumerate([float("nan"), float("inf")], start=1):
        step(bad)
        assert same(bits(model), before)
        after = optimizer.state_dict()
        for key, entry in state["state"].items():
            for name, value in entry.items():
                assert torch.equal(value, after["state"][key][name]), name
        if base is fastsam.AdaGradNorm:
            key = "fastsam_squared_norms"
            assert state["param_groups"][0][key] == after["param_groups"][0][key]
        assert optimizer.metrics["skipped"] == k
    step(None)
    assert not same(bits(model), before)
    assert optimizer.metrics["skipped"] == 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_skipping_nonfinite_gradients_reach_the_weights(backend):
    param = torch.nn.Parameter(torch.ones(4, device=DEVICE))
    optimizer = fastsam.SAM([param], torch.optim.SGD, lr=0.1, backend=backend)
    param.grad = torch.ones_like(param)
    optimizer.first_step()
    param.grad = torch.tensor([1, float("nan"), 1, 1], device=DEVICE)
    optimizer.second_step()
    assert param.isnan().tolist() == [False, True, False, False]


@pytest.mark.parametrize("backend", BACKENDS)
def test_clipping_equals_torch(backend):
    model, loss_fn = model_and_data()
    expected, _ = model_and_data()
    optimizer = fastsam.SAM(
        model.parameters(), torch.optim.SGD, lr=1.0, max_grad_norm=0.01, backend=backend
    )
    loss_fn().backward()
    optimizer.first_step(zero_grad=True)
    loss_fn().backward()
    for p, q in zip(model.parameters(), expected.parameters(), strict=True):
        q.grad = p.grad.clone()
    optimizer.second_step()
    norm = torch.nn.utils.clip_grad_norm_(expected.parameters(), 0.01)
    assert norm > 0.01
    torch.optim.SGD(expected.parameters(), lr=1.0).step()
    for p, q in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=2e-7)  # one rounding of weights below 1


def test_schedulers_do_not_warn():
    model, loss_fn = model_and_data()
    optimizer = fastsam.SAM(model.parameters(), **BASE)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.4, total_steps=10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            loss_fn().backward()
            optimizer.first_step(zero_grad=True)
            loss_fn().backward()
            optimizer.second_step(zero_grad=True)
            scheduler.step()
    assert optimizer.param_groups[0]["lr"] == optimizer.base_optimizer.param_groups[0]["lr"]
    assert optimizer.param_groups[0]["lr"] == scheduler.get_last_lr()[0]


def test_hooks_run_once_a_step():
    model, loss_fn = model_and_data()
    optimizer = fastsam.SAM(model.parameters(), **BASE)
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("pre"))
    optimizer.register_step_post_hook(lambda *_: seen.append("post"))
    loss_fn().backward()
    optimizer.first_step()
    assert seen == ["pre"]
    optimizer.second_step()
    assert seen == ["pre", "post"]

    def closure():
        loss_fn().backward()

    optimizer.step(closure)
    assert seen == ["pre", "post"] * 2
