"""Steps of the base alone between sharpness-aware ones: ``perturb_every``, ``start``, ``stop``."""

import copy

import numpy as np
import pytest
import torch

import fastsam

import oracles
from networks import bits, closure_of, loss_of, model_and_data, same
from registry import (
    BACKENDS,
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

SGD = {"base_optimizer": torch.optim.SGD, "lr": 0.1, "momentum": 0.9}
FP64 = DTYPES["fp64"]
SCHEDULES = [(1, 0, None), (3, 0, None), (2, 1, None), (2, 3, 8), (1, 4, None), (1, 0, 3),
             (5, 2, 3), (4, 9, None), (1, 20, 30)]  # fmt: skip


def due(every, start, stop, count=10):
    """For each of the first steps whether it has two passes."""
    numbers = set(range(start, count if stop is None else stop, every))
    return [k in numbers for k in range(count)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("every", "start", "stop"), SCHEDULES)
def test_kinds_of_steps(every, start, stop, backend):
    param = torch.nn.Parameter(torch.ones(3, device=DEVICE))
    optimizer = fastsam.SAM([param], perturb_every=every, start=start, stop=stop,
                            backend=backend, **SGD)  # fmt: skip
    assert optimizer.metrics == {}
    seen = []

    def loss():
        seen.append(param.detach().clone())
        return (param**2).sum()

    for perturbs in due(every, start, stop):
        seen.clear()
        before = param.detach().clone()
        assert optimizer.perturbs_next is perturbs
        optimizer.step(closure_of(loss))
        assert len(seen) == 1 + perturbs and torch.equal(seen[0], before)
        assert not perturbs or not torch.equal(seen[1], before)
        kind = optimizer.metrics["perturbed"]
        assert kind.ndim == 0 and kind.device == param.device and kind == perturbs
        assert ("grad_norm" in optimizer.metrics) == perturbs  # there is none of an old step


# --- against torch's own optimizers ---------------------------------------------------------------

OWN = {
    "sgd": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}),
    "adamw": (torch.optim.AdamW, {"lr": 0.01}),
    "adagrad": (torch.optim.Adagrad, {"lr": 0.05, "initial_accumulator_value": 0.1}),
    "rmsprop": (torch.optim.RMSprop, {"lr": 0.01, "momentum": 0.9, "eps": 1e-3}),
}


def torchs(base, params, backend):
    """The base alone, by the implementation that the backend has to equal."""
    cls, kwargs = OWN[base]
    if base == "rmsprop":
        return cls(params, **kwargs)
    return cls(params, **kwargs, **({"fused": True} if backend == "torch" else {"foreach": False}))


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("base", OWN)
def test_plain_steps_are_torchs(base, backend):
    """Bit for bit, whether the state began in a plain step or in a sharpness-aware one."""
    cls, kwargs = OWN[base]
    model, loss_fn = model_and_data()
    optimizer = fastsam.SAM(model.parameters(), cls, rho=0.3, perturb_every=3, start=2,
                            backend=backend, **kwargs)  # fmt: skip
    for perturbs in due(3, 2, None, 8):
        twin = copy.deepcopy(model)
        if perturbs:
            other = fastsam.SAM(twin.parameters(), cls, rho=0.3, backend=backend, **kwargs)
        else:
            other = torchs(base, twin.parameters(), backend)
        state = copy.deepcopy(optimizer.state_dict())
        if state["state"]:  # else torch 2.11 would forget what Adagrad begins with
            for key in ("foreach", "fused"):  # the choice of an implementation is loaded, too
                if key in other.param_groups[0]:
                    state["param_groups"][0][key] = other.param_groups[0][key]
            other.load_state_dict(state)
        twin_loss = loss_of(twin)
        if perturbs:
            other.step(closure_of(twin_loss))
        else:
            other.zero_grad()
            twin_loss().backward()
            other.step()
        loss = loss_fn().detach()
        assert optimizer.step(closure_of(loss_fn)) == loss
        assert same(bits(model), bits(twin))
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            assert torch.equal(p.grad, q.grad)
            assert optimizer.state[p].keys() == other.state[q].keys()
            for name, x in optimizer.state[p].items():
                assert torch.equal(x, torch.as_tensor(other.state[q][name])), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("base", OWN)
def test_against_a_loop_in_plain_torch(base, backend):
    """Both kinds in turn, in float64, with torch's own base and a SAM of five lines."""
    cls, kwargs = OWN[base]
    model, loss_fn = model_and_data()
    model.double()
    x, y = (cell.cell_contents for cell in loss_fn.__closure__[1:])
    twin = copy.deepcopy(model)

    def loss_at(net):
        return torch.nn.functional.cross_entropy(net(x.double()), y)

    optimizer = fastsam.SAM(model.parameters(), cls, rho=0.3, perturb_every=2, stop=5,
                            backend=backend, **kwargs)  # fmt: skip
    other, params = cls(twin.parameters(), **kwargs), list(twin.parameters())
    for perturbs in due(2, 0, 5, 7):
        optimizer.step(closure_of(lambda: loss_at(model)))
        grads, old = torch.autograd.grad(loss_at(twin), params), bits(twin)
        with torch.no_grad():
            norm = torch.cat([g.reshape(-1) for g in grads]).norm()
            for p, g in zip(params, grads, strict=True):
                p.add_(0.3 * g / (norm + 1e-12) if perturbs else 0)
        other.zero_grad()
        loss_at(twin).backward()
        with torch.no_grad():
            for p, w in zip(params, old, strict=True):
                p.copy_(w)
        other.step()
    for p, q in zip(model.parameters(), params, strict=True):
        # some ten roundings a step, and a few of the bases divide by small roots
        torch.testing.assert_close(p, q, rtol=0, atol=1e-13)


# --- every method ---------------------------------------------------------------------------------

SHAPES = [(4, 5), (5,), ()]
GROUPS = [{"params": [0, 2], "lr": 0.03}, {"params": [1], "rho": 0.2, "lr": 0.01}]


def plain(oracle, grads):
    """The oracle's base update alone: no ascent, and neither rescaling nor mixture."""
    kept = oracle._renormalize, oracle._mix, oracle._descent
    oracle._renormalize, oracle._mix, oracle._descent = False, None, ""
    oracle._first, oracle.e, oracle._new_state, oracle._new_a2 = {}, {}, {}, oracle.a2
    oracle.t, oracle._n, oracle.perturbed = oracle.t + 1, 0.0, list(oracle.weights)
    oracle.descend(grads)
    oracle._renormalize, oracle._mix, oracle._descent = kept


def of_the_ascent(optimizer, params):
    """A copy of what only sharpness-aware steps may change."""
    state = [{k: x.clone() for k, x in optimizer.state.get(p, {}).items()
              if k.startswith("ascent")} for p in params]  # fmt: skip
    own = ("lam", "sharpness", "ascent_squared_norms")
    return state, {key: float(optimizer.kept[key]) for key in own if key in optimizer.kept}


def equal(a, b):
    pairs = zip(a[0], b[0], strict=True)
    states = all(x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x) for x, y in pairs)
    return states and a[1].keys() == b[1].keys() and np.array_equal(
        list(a[1].values()), list(b[1].values()), equal_nan=True
    )  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("method", METHODS)
def test_every_method(method, backend):
    """Against the float64 formulas; the lam of schedules counts every step."""
    task = oracles.Problem(SHAPES, seed=2)
    params = parameters(task.initial(), FP64)
    spec = METHODS[method], base_of(method)
    optimizer = build(*spec, params, GROUPS, backend, perturb_every=2, start=1)
    oracle = build_oracle(*spec, params, GROUPS, FP64)

    def closure():
        set_grads(params, task.grad(numpy(params)), FP64)

    for perturbs in due(2, 1, None, 6):
        before = of_the_ascent(optimizer, params)
        optimizer.step(closure)
        if perturbs:
            oracle.step(task.grad)
        else:
            plain(oracle, task.grad(oracle.weights))
            assert equal(of_the_ascent(optimizer, params), before)
        if "lam" in optimizer.metrics and "lam" in METHODS[method].oracle:
            schedule = METHODS[method].oracle["lam"]
            expected = schedule(oracle.t) if callable(schedule) else schedule
            assert float(optimizer.metrics["lam"]) == pytest.approx(expected, abs=1e-15)
    for ours, exact in zip(numpy(params), oracle.weights, strict=True):
        np.testing.assert_allclose(ours, exact, rtol=0, atol=1e-13)  # ten roundings a step


@pytest.mark.parametrize("method", METHODS)
def test_saved_resumed_and_copied_in_phase(method):
    model, loss_fn = model_and_data()
    schedule = {"perturb_every": 3, "start": 1, "stop": 9}
    optimizer = create(method, model.parameters(), "torch", **schedule)
    kinds = due(3, 1, 9, 12)
    for k, kind in enumerate(kinds):
        assert optimizer.perturbs_next is kind
        twin, _ = model_and_data()
        twin.load_state_dict(model.state_dict())
        other = create(method, twin.parameters(), "torch", **schedule)
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        assert other.kept["t"] == k + 1
        assert other.perturbs_next is copy.deepcopy(optimizer).perturbs_next is kind
        optimizer.step(closure_of(loss_fn))
    # a checkpoint without a count, as of the base alone, begins at the start
    state = copy.deepcopy(optimizer.state_dict())
    for group in state["param_groups"]:
        for key in [key for key in group if key.startswith("fastsam_")]:
            del group[key]
    other = create(method, twin.parameters(), "torch", **schedule)
    other.load_state_dict(state)
    assert other.perturbs_next is kinds[0] is False


# --- perturb_when ---------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_policy_says_which_steps_are_sharpness_aware(backend):
    asked = []

    def late(step, metrics):
        asked.append((step, dict(metrics)))
        return metrics["lr"] < 0.05

    param = torch.nn.Parameter(torch.ones(3, device=DEVICE))
    optimizer = fastsam.SAM([param], rho=0.2, perturb_when=late, backend=backend, **SGD)
    for k in range(6):
        optimizer.param_groups[0]["lr"] = lr = 0.1 if k < 3 else 0.01
        assert optimizer.perturbs_next is (k >= 3)
        optimizer.step(closure_of(lambda: (param**2).sum()))
        assert optimizer.metrics["perturbed"] == (k >= 3)
        assert asked == [(i, asked[i][1]) for i in range(k + 1)]  # once for each step
        assert asked[k][1] == {"lr": lr, "rho": 0.2}


def test_a_policy_is_asked_again_where_it_would_see_something_else():
    """As where ``perturbs_next`` is read before the learning rate's schedule has taken its step."""
    param = torch.nn.Parameter(torch.ones(3, device=DEVICE))
    optimizer = fastsam.SAM([param], perturb_when=lambda k, m: m["lr"] < 0.05, **SGD)
    assert not optimizer.perturbs_next
    optimizer.param_groups[0]["lr"] = 0.01
    assert optimizer.perturbs_next
    optimizer.step(closure_of(lambda: (param**2).sum()))
    assert optimizer.metrics["perturbed"] == 1


def test_a_policy_is_asked_within_the_other_bounds():
    asked = []
    param = torch.nn.Parameter(torch.ones(3, device=DEVICE))
    optimizer = fastsam.SAM(
        [param], perturb_every=2, start=2, stop=7, perturb_when=lambda k, _: asked.append(k), **SGD
    )
    for _ in range(9):
        optimizer.step(closure_of(lambda: (param**2).sum()))
        assert optimizer.metrics["perturbed"] == 0  # None counts as False
    assert asked == [2, 4, 6]


def test_numbers_on_the_device_are_not_shown_to_a_policy():
    seen = []
    param = torch.nn.Parameter(torch.ones(3, device=DEVICE))
    rho = torch.tensor(0.1, device=DEVICE)
    optimizer = fastsam.SAM([param], rho=rho, perturb_when=lambda k, m: not seen.append(m), **SGD)
    optimizer.step(closure_of(lambda: (param**2).sum()))
    assert seen == [{"lr": 0.1}] and optimizer.metrics["perturbed"] == 1


def test_policies_that_are_refused():
    def sam(**kwargs):
        return fastsam.SAM([torch.nn.Parameter(torch.ones(3, device=DEVICE))], **kwargs, **SGD)

    with pytest.raises(TypeError, match="perturb_when must be None or a function .*, got 3"):
        sam(perturb_when=3)
    with pytest.raises(ValueError, match="amplify must be False with perturb_when"):
        sam(perturb_when=lambda k, m: True, amplify=True)
    with pytest.raises(ValueError, match="perturb_when must be None with amplify=True"):
        sam(amplify=True, perturb_every=2).perturb_when = lambda k, m: True
    optimizer = sam(perturb_when=lambda k, m: torch.tensor(True))
    with pytest.raises(TypeError, match="must give a bool, got a tensor"):
        optimizer.step(lambda: None)
