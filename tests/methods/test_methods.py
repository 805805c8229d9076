"""Every method x base x backend x dtype against the float64 oracle, over 20 steps.

Two comparisons run side by side. The *forced* oracle takes over the library's weights and state
before each step, so that it sees one step's error and the tolerance can be one rounding of the
storage dtype plus a few of the arithmetic. The *free* one runs on its own, for the dtypes whose
storage loses nothing: it bounds what accumulates.
"""

import numpy as np
import pytest

import oracles
from comparison import EPS, adopt, check_close
from registry import (
    BACKENDS,
    BASES,
    COMBINATIONS,
    DTYPES,
    METHODS,
    OWN_UPDATES,
    arithmetic,
    build,
    build_oracle,
    numpy,
    parameters,
    set_grads,
    stored_as,
)

STEPS = 20
#: A ragged tensor of two chunks, a small matrix, a scalar; a group each.
SHAPES = [(1031,), (6, 7), ()]
GROUPS = [
    {"params": [0]},
    {"params": [1], "rho": 0.1, "lr": 0.03},
    {"params": [2], "adaptive": False, "lr": 0.01},
]
#: Free run: absolute, for weights up to about 3; errors grow a little by the curvature.
FREE = {"float64": 2e-14, "float32": 5e-6}


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


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("method", "base"), COMBINATIONS)
@pytest.mark.filterwarnings("ignore:some parameters are float16 or bfloat16")
def test_trajectory(method, base, dtype, backend, record_property):
    dtypes = DTYPES[dtype]
    eps = EPS[arithmetic(dtypes)]
    problem = oracles.Problem(SHAPES, seed=3)
    params = parameters(problem.initial(), dtypes)
    spec = METHODS[method], (BASES | OWN_UPDATES)[base]
    # what is maximised is the negative: f has minima alone
    sign = -1.0 if spec[1].kwargs.get("maximize") else 1.0

    def gradients(weights):
        return [sign * g for g in problem.grad(weights)]

    optimizer = build(*spec, params, GROUPS, backend)
    forced = build_oracle(*spec, params, GROUPS, dtypes)
    free = build_oracle(*spec, params, GROUPS, dtypes)
    decay = spec[1].kwargs.get("weight_decay", 0.0)
    farthest = 0.0
    for step in range(STEPS):
        adopt(forced, params, optimizer, step)
        before = numpy(params)
        states = [{k: np.array(v) for k, v in state.items()} for state in forced.state]

        firsts = gradients(numpy(params))
        set_grads(params, firsts, dtypes)
        optimizer.first_step()
        for k, (ours, exact) in enumerate(zip(numpy(params), forced.ascend(firsts), strict=True)):
            check_close(f"w+e {k}, step {step}", ours, exact, before[k], dtypes.param, eps)
        # from here on the forced oracle stands where the library stands
        forced.perturbed = numpy(params)

        grads = gradients(forced.perturbed)
        set_grads(params, grads, dtypes)
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
        for name in {"grad_norm", "perturbed_grad_norm", "renormalization"} & metrics.keys():
            # sums of squares in the arithmetic's precision, at most a few roundings off
            assert abs(float(metrics[name]) / expected[name] - 1) < 16 * eps, name
        if "lam" in metrics and "sharpness" in metrics:
            check_lam(optimizer, forced, before_sharpness, eps)
    record_property("farthest_ulp", farthest)
    if dtypes.wide:
        pairs = zip(numpy(params), free.weights, strict=True)
        error = max(np.abs(ours - exact).max() for ours, exact in pairs)
        record_property("free_error", float(error))
        assert error < FREE[dtypes.param]
    moved = max(np.abs(a - b).max() for a, b in zip(numpy(params), problem.initial(), strict=True))
    assert moved > 0.01
