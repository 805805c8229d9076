"""Gradients whose squares leave float32: norms are right over all of its range."""

import numpy as np
import pytest

import fastsam

from oracles import Oracle, Ratio
from registry import BACKENDS, BASES, DTYPES, Base, Method, build, numpy, parameters, set_grads

NORM = Base(fastsam.AdaGradNorm, "adagrad_norm", {"lr": 0.5})
LIGHT = Base(None, "light_adagrad_norm", {"lr": 0.5, "eps": 1e-18})
SGD = BASES["sgd"]
ASAM = {"rho": 0.5, "eta": 0.5}
#: Method and base, of which every one uses its norms in another way.
CASES = {
    "SAM": (Method(fastsam.SAM), SGD),
    "ASAM": (Method(fastsam.ASAM, ASAM, ASAM | {"adaptive": True}), SGD),
    "VaSSO": (Method(fastsam.VaSSO, {}, {"theta": 0.9}, {"ascent": "vasso"}), SGD),
    "clipping": (Method(fastsam.SAM, {"max_grad_norm": 0.5}, {}, {"max_grad_norm": 0.5}), SGD),
    "SSAM": (Method(fastsam.SSAM, {}, {}, {"renormalize": True}), SGD),
    "AdaGradNorm": (Method(fastsam.SAM), NORM),
    "LightSAM I": (
        Method(fastsam.LightSAM, {"rho": 0.3, "rule": "adagrad_norm"}, {"rho": 0.3},
               {"ascent": "adagrad_norm"}),
        LIGHT,
    ),
    "SAMAR": (
        Method(fastsam.SAMAR, {"lam": 0.8}, {}, {"mix": Ratio(0.8)}), NORM,
    ),
}  # fmt: skip
#: Sizes of the gradients of two tensors, the second of several chunks' scalar path.
SIZES = {
    "1e-37": (1e-37, 1e-37), "1e-30": (1e-30, 1e-30), "1e-22": (1e-22, 1e-22),
    "1e-19": (1e-19, 1e-19), "1e19": (1e19, 1e19), "1e25": (1e25, 1e25),
    "mixed": (1e25, 1e-30), "zeros": (0.0, 1e-22),
}  # fmt: skip


def gradients(sizes):
    rng = np.random.default_rng(0)
    shapes = (33,), (5, 7)
    values = [s * rng.uniform(0.5, 1, x) for s, x in zip(sizes, shapes, strict=True)]
    return [x.astype(np.float32).astype(np.float64) for x in values]


def agree(found, expected, what):
    for x, y in zip(numpy(found), expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-43, err_msg=what)


@pytest.mark.filterwarnings("ignore:overflow encountered")  # the interpreter's, on the first look
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_norms_over_the_range_of_float32(case, backend, size):
    """Against formulas in float64, with weights of 0, beside which no perturbation is lost."""
    method, base = CASES[case]
    grads = gradients(SIZES[size])
    params = parameters([np.zeros(g.shape) for g in grads], DTYPES["fp32"])
    optimizer = build(method, base, params, None, backend)
    oracle = Oracle(
        numpy(params), [{"params": [0, 1]} | method.group | base.kwargs], base.oracle,
        **method.oracle,
    )  # fmt: skip
    set_grads(params, grads, DTYPES["fp32"])
    optimizer.first_step()
    oracle.ascend(grads)
    agree(params, oracle.perturbed, "perturbed weights")
    second = [2 * g[::-1].copy() for g in grads]
    set_grads(params, second, DTYPES["fp32"])
    optimizer.second_step()
    oracle.descend(second)
    agree(params, oracle.weights, "weights")
    for name in ("grad_norm", "perturbed_grad_norm"):
        if name in optimizer.metrics:
            assert float(optimizer.metrics[name]) == pytest.approx(oracle.metrics[name], rel=1e-5,
                                                                   abs=1e-44)  # fmt: skip


@pytest.mark.parametrize("start", [0.0, 1e-80])
@pytest.mark.parametrize("backend", BACKENDS)
def test_step_sizes_that_leave_float32(backend, start):
    """Of gradients below float32's normal numbers: the step is short, and no weight infinite."""
    base = Base(fastsam.AdaGradNorm, "", {"lr": 0.5, "initial_accumulator_value": start})
    grads = [np.full(4, 1e-42)]
    params = parameters([np.zeros(4)], DTYPES["fp32"])
    optimizer = build(Method(fastsam.SAM), base, params, None, backend)
    for half in (optimizer.first_step, optimizer.second_step):
        set_grads(params, grads, DTYPES["fp32"])
        half()
    exact = -np.finfo(np.float32).max * grads[0].astype(np.float32).astype(np.float64)
    np.testing.assert_allclose(numpy(params)[0], exact, rtol=1e-6)
