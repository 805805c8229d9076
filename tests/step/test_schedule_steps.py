"""What happens in a step of the base alone, besides its update; and loops that take turns."""

import copy
import warnings

import pytest
import torch
from torch.optim import lr_scheduler

import fastsam

from graphs import batches, cpu_only, problem, refused
from networks import bits, closure_of, loss_of, model_and_data, same
from registry import BACKENDS, DEVICE, create
from test_schedule import SGD, due


def counted(closure):
    calls = []
    return lambda: (calls.append(1), closure())[1], calls


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("method", ["ssam-adaptive-clip", "samar", "lightsam-3"])
def test_explicit_loops(method, backend):
    results = []
    for explicit in (False, True):
        model, loss_fn = model_and_data()
        optimizer = create(method, model.parameters(), backend, perturb_every=2, start=1)
        for _ in range(4):
            if not explicit:
                optimizer.step(closure_of(loss_fn))
                continue
            optimizer.zero_grad()
            loss_fn().backward()
            if optimizer.perturbs_next:
                optimizer.first_step(zero_grad=True)
                with pytest.raises(RuntimeError, match="expected second_step"):
                    optimizer.plain_step()
                loss_fn().backward()
                optimizer.second_step()
            else:
                optimizer.plain_step()
                with pytest.raises(RuntimeError, match="expected first_step"):
                    optimizer.second_step()
        results.append((bits(model), [p.grad for p in model.parameters()]))
        assert optimizer.kept["t"] == 5
    assert same(results[0][0], results[1][0]) and same(results[0][1], results[1][1])


def test_what_is_asked_for_explicitly_is_done():
    """Whichever kind is due; both count."""
    model, loss_fn = model_and_data()
    optimizer = fastsam.SAM(model.parameters(), start=5, **SGD)
    before = bits(model)
    loss_fn().backward()
    optimizer.first_step(zero_grad=True)
    assert not same(bits(model), before)
    loss_fn().backward()
    optimizer.second_step(zero_grad=True)
    assert optimizer.metrics["perturbed"] == 1 and optimizer.kept["t"] == 2
    sam = fastsam.SAM(model.parameters(), **SGD)
    loss_fn().backward()
    sam.plain_step(zero_grad=True)
    assert sam.metrics["perturbed"] == 0 and all(p.grad is None for p in model.parameters())
    before = bits(model)
    sam.plain_step()  # no gradients: nothing moves, not even by momentum
    assert same(bits(model), before)


def test_no_radius_is_a_plain_step():
    """But for a method whose first pass has state to keep."""
    for cls, calls_due in ((fastsam.SAM, 1), (fastsam.VaSSO, 2)):
        model, loss_fn = model_and_data()
        optimizer = cls(model.parameters(), rho=0.0, perturb_every=2, **SGD)
        closure, calls = counted(closure_of(loss_fn))
        optimizer.step(closure)
        assert len(calls) == calls_due and optimizer.metrics["perturbed"] == calls_due - 1
        assert not optimizer.perturbs_next  # it counts as the step that was due


@pytest.mark.parametrize("explicit", [False, True])
def test_hooks_run_once_a_step(explicit):
    model, loss_fn = model_and_data()
    optimizer, seen = fastsam.SAM(model.parameters(), perturb_every=2, **SGD), []
    optimizer.register_step_pre_hook(lambda *_: seen.append(("pre", bits(model))))
    optimizer.register_step_post_hook(lambda *_: seen.append(("post", bits(model))))
    for _ in range(4):
        seen.clear()
        before = bits(model)
        if explicit and not optimizer.perturbs_next:
            loss_fn().backward()
            optimizer.plain_step(zero_grad=True)
        else:
            optimizer.step(closure_of(loss_fn))
        assert [name for name, _ in seen] == ["pre", "post"]
        assert same(seen[0][1], before) and same(seen[1][1], bits(model))


@pytest.mark.parametrize("backend", BACKENDS)
def test_plain_steps_clip_as_torch_does(backend):
    model, loss_fn = model_and_data()
    twin = copy.deepcopy(model)
    optimizer = fastsam.SSAM(model.parameters(), start=9, max_grad_norm=0.01, backend=backend,
                             **SGD | {"lr": 1.0})  # fmt: skip
    other, twin_loss = torch.optim.SGD(twin.parameters(), lr=1.0, momentum=0.9), loss_of(twin)
    for _ in range(3):
        optimizer.step(closure_of(loss_fn))
        other.zero_grad()
        twin_loss().backward()
        assert torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.01) > 0.02
        other.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=5e-7)  # a few roundings of weights below 1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("base", [torch.optim.AdamW, torch.optim.RMSprop])
def test_plain_steps_skip_what_is_not_finite(base, backend):
    model, loss_fn = model_and_data()
    optimizer = fastsam.SAM(model.parameters(), base, lr=0.01, start=9, skip_nonfinite=True,
                            backend=backend)  # fmt: skip
    optimizer.step(closure_of(loss_fn))
    before, state = bits(model), copy.deepcopy(optimizer.state_dict()["state"])
    for k, bad in enumerate((float("nan"), float("inf")), start=1):
        optimizer.step(closure_of(lambda bad=bad: loss_fn() * bad))
        assert same(bits(model), before) and optimizer.metrics["skipped"] == k
        for key, entry in optimizer.state_dict()["state"].items():
            assert all(torch.equal(x, state[key][name]) for name, x in entry.items())
    assert optimizer.kept["t"] == 4  # it counts steps, skipped or not
    optimizer.step(closure_of(loss_fn))
    assert not same(bits(model), before)


@pytest.mark.parametrize("step", [0, 1])
def test_failing_closure_is_no_step(step):
    model, loss_fn = model_and_data()
    optimizer = fastsam.SAM(model.parameters(), perturb_every=2, start=1, **SGD)
    for _ in range(step):
        optimizer.step(closure_of(loss_fn))
    before, state = bits(model), copy.deepcopy(optimizer.state_dict())

    def failing():
        loss_fn().backward()
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        optimizer.step(failing)
    assert same(bits(model), before) and str(optimizer.state_dict()) == str(state)
    assert optimizer.perturbs_next is bool(step)
    optimizer.step(closure_of(loss_fn))


@pytest.mark.parametrize("explicit", [False, True])
def test_schedulers(explicit):
    """They see every step, of either kind, and do not warn that none came first."""
    model, loss_fn = model_and_data()
    optimizer = fastsam.SAM(model.parameters(), start=2, **SGD)
    scheduler = lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.1)
    rates = []
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for _ in range(5):
            before = bits(model)
            if explicit and not optimizer.perturbs_next:
                optimizer.zero_grad()
                loss_fn().backward()
                optimizer.plain_step()
            else:
                optimizer.step(closure_of(loss_fn))
            rates.append(optimizer.param_groups[0]["lr"])
            scheduler.step()
            assert not same(bits(model), before)
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001])


BAD = [({"perturb_every": value}, "perturb_every") for value in (0, -1, 1.5, "2", None, True)]
BAD += [({"start": value}, "start") for value in (-1, 0.5, None, False)]
BAD += [({"start": 3, "stop": value}, "stop") for value in (3, 0, -1, 4.0, True)]


@pytest.mark.parametrize("method", ["sam", "unified-1/t", "samar", "lightsam-1", "adasam"])
def test_bad_values(method):
    param = torch.nn.Parameter(torch.ones(2, device=DEVICE))
    for kwargs, name in BAD:
        with pytest.raises(ValueError, match=f"^{name} must be .* got {kwargs[name]!r}"):
            create(method, [param], "torch", **kwargs)


@cpu_only
@pytest.mark.parametrize("schedule", [{"perturb_every": 2}, {"start": 1}, {"stop": 4}])
@pytest.mark.parametrize("steps", [1, 2])
def test_graphs_are_refused(schedule, steps, monkeypatch):
    """A replay would repeat the kind of step that was captured, whichever is due."""
    model, _, x, closure = problem("SAM + SGD")
    x.copy_(batches(1)[0])
    optimizer = fastsam.SAM(model.parameters(), torch.optim.SGD, lr=0.1, backend="triton",
                            **schedule)  # fmt: skip
    for _ in range(steps):
        optimizer.step(closure)
    refused(monkeypatch, optimizer, closure, "perturb_every, start and stop are decided")
    optimizer.step(closure)


# --- LETS -----------------------------------------------------------------------------------------


def learned(**kwargs):
    """What LETS did in eight steps: calls of both closures, and whether the radius moved."""
    model, loss_fn = model_and_data()
    _, val_fn = model_and_data(seed=1)
    x, y = (cell.cell_contents for cell in val_fn.__closure__[1:])
    every = {key: kwargs.pop(key) for key in ("perturb_every", "start") if key in kwargs}
    lets = fastsam.LETS(fastsam.SAM(model.parameters(), **SGD, **every), rho_lr=0.1, **kwargs)
    training, calls = counted(closure_of(loss_fn))
    validation, val_calls = counted(
        closure_of(lambda: torch.nn.functional.cross_entropy(model(x), y))
    )
    found = []
    for _ in range(8):
        calls.clear(), val_calls.clear()
        rho = lets.metrics["rho"] if lets.metrics else lets.param_groups[0]["rho"].clone()
        lets.step(training, validation)
        found.append((len(calls), len(val_calls), bool(lets.metrics["rho"] != rho)))
    return found


def test_learned_radius():
    """A plain step has no perturbation to learn from: it costs one pass, and moves no radius."""
    kinds = due(3, 1, None, 8)
    assert learned(perturb_every=3, start=1) == [
        (3, 1, True) if k else (1, 0, False) for k in kinds
    ]


def test_learned_radius_by_interval():
    """Every second sharpness-aware step, wherever these are."""
    moved = [k for k, (*_, moved) in enumerate(learned(perturb_every=2, interval=2)) if moved]
    assert moved == [2, 6]
