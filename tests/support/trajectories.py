"""Steps that are compared with the float64 oracle one by one, and whole trajectories of them.

Two comparisons run side by side. The *forced* oracle takes over the library's weights and state
before each step, so that it sees one step's error and the tolerance can be one rounding of the
storage dtype plus a few of the arithmetic. The *free* one runs on its own, for the dtypes whose
storage loses nothing: it bounds what accumulates.
"""

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch

import oracles
from comparison import EPS, OPERATIONS, adopt, check_close
from registry import (
    BASES,
    DTYPES,
    METHODS,
    OTHERS,
    OWN_UPDATES,
    Dtypes,
    arithmetic,
    base_of,
    build,
    build_oracle,
    numpy,
    parameters,
    set_grads,
    stored_as,
    torch_dtype,
)

FP32 = DTYPES["fp32"]
#: Free run: absolute, for weights up to about 3; errors grow a little by the curvature.
FREE = {"float64": 2e-14, "float32": 5e-6}
#: Norms among the metrics.
NORMS = ("grad_norm", "momentum_norm", "perturbed_grad_norm")
Place = Callable[[torch.Tensor], torch.Tensor]


def check_lam(optimizer, oracle: oracles.Oracle, before: float | None, eps: float) -> None:
    """SAMAR's sharpness, a sum of products that may cancel, and the lam that follows from it."""
    norms = oracle.metrics["grad_norm"] + oracle.metrics["perturbed_grad_norm"]
    error = 16 * eps * norms * np.sqrt(sum((e**2).sum() for e in oracle.e.values()))
    metrics, scalars = optimizer.metrics, optimizer.kept
    assert abs(float(metrics["sharpness"]) - oracle.metrics["sharpness"]) < error
    assert abs(float(scalars["sharpness"]) - oracle.sharpness) < error
    assert float(metrics["lam"]) == pytest.approx(oracle.metrics["lam"], rel=16 * eps)
    relative = 16 * eps + (0 if before is None else error / abs(before))
    assert float(scalars["lam"]) == pytest.approx(oracle.lam, rel=relative)


def name_of(param):
    return str(param.dtype).removeprefix("torch.")


def low(param):
    return param.dtype in (torch.float16, torch.bfloat16)


def make(stored, initial):
    """Parameters, each of its own dtypes."""
    dtypes = [DTYPES[name] for name in stored]
    return [parameters([a], d)[0] for a, d in zip(initial, dtypes, strict=True)], dtypes


def give(params, dtypes, grads, places=None):
    for p, d, g in zip(params, dtypes, grads, strict=True):
        set_grads([p], [g], d)
    for k, place in (places or {}).items():
        params[k].grad = place(params[k].grad)


def masters(optimizer, params):
    """The weights between two steps."""
    return [optimizer.state.get(p, {}).get("master_weight", p.detach()) for p in params]


def check_stored(what, param, exact, terms):
    """Rounded once: within half a unit, and what the arithmetic in float32 can be off."""
    dtype = name_of(param)
    ours = numpy([param])[0]
    unit = np.maximum(oracles.ulp(exact, dtype), oracles.ulp(ours, dtype))
    allowed = unit / 2 + OPERATIONS * EPS["float32"] * terms
    worst = (np.abs(ours - exact) - allowed).max(initial=-np.inf)
    assert worst <= 0, f"{what} is {worst} beyond one rounding to {dtype}"


def check_state(optimizer, params, oracle, before, firsts, seconds, decay):
    for k, param in enumerate(params):
        state = optimizer.state[param]
        for name, exact in oracle.state[k].items():
            if name == "step":
                assert float(state[name]) == exact
                continue
            assert state[name].dtype == torch.float32, name
            terms = np.abs(firsts[k])
            if not name.startswith("ascent"):
                gamma = oracle.metrics["renormalization"]
                terms = terms + gamma * np.abs(seconds[k]) + decay * np.abs(before[k])
            power = 2 if name.endswith(("exp_avg_sq", "sum")) else 1
            old = before[k] if name not in (held := oracle.old[k]) else held[name]
            ours = numpy([state[name]])[0]
            check_close(f"{name} {k}", ours, exact, old, "float32", EPS["float32"], terms**power)


def check_trajectory(
    method: str, base: str, dtypes: Dtypes, backend: str, shapes: list[tuple[int, ...]],
    groups: list[dict], steps: int, places: dict[int, Place] | None = None,
    grad_places: dict[int, Place] | None = None,
) -> dict[str, float]:  # fmt: skip
    """Follow a method for some steps; gives how far off it was.

    ``places`` puts parameters elsewhere in memory, by index, and ``grad_places`` gradients.
    """
    eps = EPS[arithmetic(dtypes)]
    problem = oracles.Problem(shapes, seed=3)
    params = parameters(problem.initial(), dtypes)
    for k, place in (places or {}).items():
        params[k] = torch.nn.Parameter(place(params[k].detach()))
        params[k].grad_dtype = torch_dtype(dtypes.grad)
    spec = (METHODS | OTHERS)[method], (BASES | OWN_UPDATES)[base]
    # what is maximised is the negative: f has minima alone
    sign = -1.0 if spec[1].kwargs.get("maximize") else 1.0

    def gradients(weights):
        return [sign * g for g in problem.grad(weights)]

    optimizer = build(*spec, params, groups, backend)
    forced = build_oracle(*spec, params, groups, dtypes)
    free = build_oracle(*spec, params, groups, dtypes)
    decay = spec[1].kwargs.get("weight_decay", 0.0)
    farthest = 0.0
    for step in range(steps):
        adopt(forced, params, optimizer, step)
        before = numpy(params)
        states = [{k: np.array(v) for k, v in state.items()} for state in forced.state]

        firsts = gradients(numpy(params))
        give(params, [dtypes] * len(params), firsts, grad_places)
        optimizer.first_step()
        for k, (ours, exact) in enumerate(zip(numpy(params), forced.ascend(firsts), strict=True)):
            terms = forced.ascent_terms.get(k, 0.0)
            check_close(f"w+e {k}, step {step}", ours, exact, before[k], dtypes.param, eps, terms)
        # from here on the forced oracle stands where the library stands
        forced.perturbed = numpy(params)

        grads = gradients(forced.perturbed)
        give(params, [dtypes] * len(params), grads, grad_places)
        before_sharpness = forced.sharpness
        optimizer.second_step()
        forced.descend(grads)
        free.step(gradients)
        for k, ours in enumerate(numpy(params)):
            worst = check_close(
                f"w {k}, step {step}", ours, forced.weights[k], before[k], dtypes.param, eps,
                forced.terms.get(k, 0.0),
            )  # fmt: skip
            farthest = max(farthest, worst)
            for name, exact in forced.state[k].items():
                ours = optimizer.state[params[k]][name].double().cpu().numpy()
                if name == "step":
                    assert ours == exact == step + 1
                    continue
                old = states[k].get(name, np.zeros_like(exact))
                # the parts of what the state averages
                terms = np.abs(firsts[k])
                if not name.startswith("ascent"):
                    terms = terms + forced.metrics["renormalization"] * np.abs(grads[k])
                    terms += decay * np.abs(before[k])
                power = 2 if name.endswith(("exp_avg_sq", "sum")) else 1
                label = f"{name} {k}, step {step}"
                storage = stored_as(name, spec[1], dtypes)
                check_close(label, ours, exact, old, storage, eps, terms**power)
        metrics, expected = optimizer.metrics, dict(forced.metrics)
        if not optimizer.renormalize:  # then nothing measures T g~
            squares = (oracles.rounding(dtypes.grad)(g) ** 2 for g in grads)
            expected["perturbed_grad_norm"] = np.sqrt(sum(x.sum() for x in squares))
        for name in {*NORMS, "renormalization"} & metrics.keys():
            # sums of squares in the arithmetic's precision, at most a few roundings off
            assert abs(float(metrics[name]) - expected[name]) <= 16 * eps * expected[name], name
        if "lam" in metrics and "sharpness" in metrics:
            check_lam(optimizer, forced, before_sharpness, eps)
    found = {"farthest_ulp": farthest}
    if dtypes.wide:
        pairs = zip(numpy(params), free.weights, strict=True)
        error = max(np.abs(ours - exact).max(initial=0) for ours, exact in pairs)
        found["free_error"] = float(error)
        assert error < FREE[dtypes.param]
    pairs = zip(numpy(params), problem.initial(), strict=True)
    moved = max(np.abs(a - b).max(initial=0) for a, b in pairs)
    assert moved > 0.0005 * steps
    return found


def check_master_trajectory(
    method: str, base: str, stored: Sequence[str], backend: str, shapes: list[tuple[int, ...]],
    groups: list[dict], steps: int, **settings,
) -> None:  # fmt: skip
    """The same with master weights, and parameters each of its own dtypes.

    Between two steps the weights are float32 and the parameters are these, rounded. The oracle is
    given float32 storage, and gradients taken at what the parameters hold.
    """
    problem = oracles.Problem(shapes, seed=3)
    params, dtypes = make(stored, problem.initial())
    spec = (METHODS | OTHERS)[method], base_of(method, base)
    optimizer = build(*spec, params, groups, backend, master_weights=True, **settings)
    oracle = build_oracle(*spec, params, groups, FP32)
    for step in range(steps):
        adopt(oracle, params, optimizer, step)
        before = numpy(masters(optimizer, params))
        oracle.weights = list(before)
        for state in oracle.state:
            state.pop("master_weight", None)
        oracle.old = [dict(state) for state in oracle.state]

        give(params, dtypes, problem.grad(numpy(params)))
        firsts = numpy([p.grad for p in params])
        optimizer.first_step()
        oracle.ascend(firsts)
        for k, param in enumerate(params):
            e = oracle.e.get(k, np.zeros_like(before[k]))
            check_stored(
                f"w+e {k}, step {step}", param, before[k] + e, np.abs(before[k]) + np.abs(e)
            )
        oracle.perturbed = numpy(params)  # where the second gradient is taken, and its T

        give(params, dtypes, problem.grad(numpy(params)))
        seconds = numpy([p.grad for p in params])
        optimizer.second_step()
        oracle.descend(seconds)
        weights = masters(optimizer, params)
        for k, (param, weight) in enumerate(zip(params, weights, strict=True)):
            assert weight.dtype == torch.float32
            exact = oracle.weights[k]
            label = f"w {k}, step {step}"
            check_close(label, numpy([weight])[0], exact, before[k], "float32", EPS["float32"])
            assert torch.equal(param, weight.to(param.dtype))
        decay = spec[1].kwargs.get("weight_decay", 0.0)
        check_state(optimizer, params, oracle, before, firsts, seconds, decay)
        if "grad_norm" in optimizer.metrics:  # of T g, where T is the master's
            n = float(optimizer.metrics["grad_norm"])
            assert n == pytest.approx(oracle.metrics["grad_norm"], rel=16 * EPS["float32"])
    kept = [torch.equal(p.float(), w) for p, w in zip(params, weights, strict=True) if low(p)]
    assert not kept[0]  # the masters know more than the parameters
