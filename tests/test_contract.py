"""The step's contract: alternation, closures, exceptions, exact restore, bad input."""

import copy
import signal
import warnings

import pytest
import torch

import fastsam

from registry import BACKENDS, DEVICE, METHODS

BASE = {"base_optimizer": torch.optim.SGD, "lr": 0.1, "momentum": 0.9}


def model_and_data(seed: int = 0):
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(7, 33), torch.nn.Tanh(), torch.nn.Linear(33, 3)).to(
        DEVICE
    )
    x, y = torch.randn(20, 7, device=DEVICE), torch.randint(3, (20,), device=DEVICE)
    return model, lambda: torch.nn.functional.cross_entropy(model(x), y)


def bits(model) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def same(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


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
    running = optimizer._backends[backend]
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
    spec = METHODS[method]
    optimizer = spec.cls(
        model.parameters(), torch.optim.SGD, lr=0.0, backend=backend, **spec.kwargs
    )
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
@pytest.mark.parametrize("method", ["sam", "ssam-adaptive-clip", "sam-clip"])
def test_gradients_are_only_read(method, backend):
    model, loss_fn = model_and_data()
    spec = METHODS[method]
    optimizer = spec.cls(
        model.parameters(), torch.optim.AdamW, lr=0.1, backend=backend, **spec.kwargs
    )
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
@pytest.mark.parametrize("method", ["sam", "asam", "usam", "ssam", "unified-callable"])
def test_nonfinite_first_gradient_perturbs_nothing(method, bad, backend):
    model, loss_fn = model_and_data()
    spec = METHODS[method]
    optimizer = spec.cls(
        model.parameters(), torch.optim.SGD, lr=0.1, backend=backend, **spec.kwargs
    )
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
            key = "squared_norms"
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


# --- bad input -------------------------------------------------------------------------------


def make(**kwargs):
    return fastsam.SAM([torch.nn.Parameter(torch.ones(2))], **(BASE | kwargs))


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"rho": -0.1}, ValueError, "rho must be at least 0 and finite, got -0.1"),
        ({"rho": float("nan")}, ValueError, "rho must be at least 0 and finite, got nan"),
        ({"rho": float("inf")}, ValueError, "rho must be at least 0 and finite, got inf"),
        ({"rho": torch.ones(1)}, ValueError, "rho must be a number or a 0-dim tensor"),
        ({"rho": "0.1"}, ValueError, "rho must be at least 0 and finite, got '0.1'"),
        ({"max_grad_norm": "1"}, ValueError, "max_grad_norm must be None or above 0, got '1'"),
        ({"eta": -1.0}, ValueError, "eta must be at least 0 and finite, got -1.0"),
        ({"max_grad_norm": 0.0}, ValueError, "max_grad_norm must be None or above 0, got 0.0"),
        ({"backend": "cuda"}, ValueError, "backend must be one of 'auto', .* got 'cuda'"),
        ({"base_optimizer": torch.nn.Linear}, TypeError, "base_optimizer must be a subclass"),
        ({"base_optimizer": "sgd"}, TypeError, "base_optimizer must be a subclass.* got 'sgd'"),
        ({"base_optimizer": fastsam.SAM}, TypeError, "must not be sharpness-aware itself"),
        ({"base_optimizer": torch.optim.LBFGS}, TypeError, "LBFGS needs one"),
        ({"lr": -1.0}, ValueError, "Invalid learning rate: -1.0"),
        ({"typo": 1}, TypeError, "typo"),
        ({"differentiable": True}, ValueError, "differentiable must be False"),
    ],
)
def test_bad_arguments(kwargs, error, message):
    with pytest.raises(error, match=message):
        make(**kwargs)


def test_base_with_a_key_of_ours_is_refused():
    """Adadelta's own rho would be taken for the radius, and the radius for its decay."""
    with pytest.raises(TypeError, match="Adadelta has rho"):
        fastsam.SAM([torch.nn.Parameter(torch.ones(2))], torch.optim.Adadelta, lr=1.0)


@pytest.mark.parametrize("lam", [-0.1, 1.1, "t", None, float("nan")])
def test_bad_lam(lam):
    with pytest.raises(ValueError, match="lam must be"):
        fastsam.UnifiedSAM([torch.nn.Parameter(torch.ones(2))], torch.optim.SGD, lam=lam)


def test_bad_values_set_later_change_nothing():
    model, loss_fn = model_and_data()
    optimizer = fastsam.UnifiedSAM(model.parameters(), lam=lambda t: 3.0, **BASE)
    before = bits(model)
    loss_fn().backward()
    with pytest.raises(ValueError, match="lam must be .* got 3.0"):
        optimizer.first_step()
    optimizer.lam = 0.5
    optimizer.param_groups[0]["rho"] = -1.0
    with pytest.raises(ValueError, match="rho must be"):
        optimizer.first_step()
    assert same(bits(model), before)
    optimizer.param_groups[0]["rho"] = 0.1
    optimizer.first_step()
    optimizer.second_step()
    with pytest.raises(ValueError, match="rho must be"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))], "rho": -1})
    with pytest.raises(ValueError, match="differentiable must be False"):
        extra = torch.nn.Parameter(torch.ones(1))
        optimizer.add_param_group({"params": [extra], "differentiable": True})
    assert len(optimizer.param_groups) == 1
    optimizer.max_grad_norm = -1.0
    with pytest.raises(ValueError, match="max_grad_norm must be"):
        optimizer.step(lambda: None)


@pytest.mark.parametrize("backend", BACKENDS)
def test_sparse_gradient_is_refused(backend):
    torch.manual_seed(0)
    model = torch.nn.Embedding(10, 3, sparse=True, device=DEVICE)
    dense = torch.nn.Parameter(torch.ones(3, device=DEVICE))
    optimizer = fastsam.SAM([dense, model.weight], backend=backend, **BASE)
    index = torch.tensor([1, 2], device=DEVICE)
    before = [dense.detach().clone(), model.weight.detach().clone()]
    (model(index) * dense).sum().backward()
    with pytest.raises(RuntimeError, match="sparse gradients"):
        optimizer.first_step()
    assert same([dense, model.weight], before)
    # in the second pass the weights are restored first
    model.weight.grad = model.weight.grad.to_dense()
    optimizer.first_step(zero_grad=True)
    (model(index) * dense).sum().backward()
    with pytest.raises(RuntimeError, match="sparse gradients"):
        optimizer.second_step()
    assert same([dense, model.weight], before)
    optimizer.zero_grad()
    optimizer.first_step()
    optimizer.second_step()


def test_complex_gradient_is_refused():
    param = torch.nn.Parameter(torch.ones(2, dtype=torch.complex64))
    optimizer = fastsam.SAM([param], **BASE)
    param.grad = torch.ones_like(param)
    with pytest.raises(RuntimeError, match="view_as_real"):
        optimizer.first_step()


def test_overlapping_parameter_is_refused():
    param = torch.nn.Parameter(torch.ones(1, 3, device=DEVICE).expand(4, 3))
    optimizer = fastsam.SAM([param], **BASE)
    param.grad = torch.ones_like(param)
    with pytest.raises(RuntimeError, match=r"memory of their own, got one of shape \(4, 3\)"):
        optimizer.first_step()


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_of_another_shape_is_refused(backend):
    param = torch.nn.Parameter(torch.ones(3, device=DEVICE))
    optimizer = fastsam.SAM([param], backend=backend, **BASE)
    param.grad = torch.ones_like(param)
    param.data = torch.ones(6, device=DEVICE)
    with pytest.raises(RuntimeError, match=r"gradient of shape \(3,\) .* shape \(6,\)"):
        optimizer.first_step()


def test_wrapped_parameters_are_refused():
    from torch.testing._internal.two_tensor import TwoTensor

    param = torch.nn.Parameter(TwoTensor(torch.ones(3), torch.ones(3)))
    optimizer = fastsam.SAM([param], **BASE)
    param.grad = torch.ones_like(param)
    with pytest.raises(RuntimeError, match="SAM does not support"):
        optimizer.first_step()


def test_several_devices_are_refused():
    params = [torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2, device="meta"))]
    optimizer = fastsam.SAM(params, **BASE)
    for p in params:
        p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match="one device, got cpu and meta"):
        optimizer.first_step()
    assert params[0].tolist() == [1, 1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_parameters_warn_once(dtype):
    params = [torch.nn.Parameter(torch.ones(2, dtype=dtype)) for _ in range(3)]
    with pytest.warns(UserWarning, match="rounded away") as caught:
        fastsam.SAM(params, **BASE)
    assert len(caught) == 1
