"""With rho = 0 a step is the base optimizer's: against ``torch.optim``, parameters and state."""

import copy

import numpy as np
import pytest
import torch

import fastsam

import oracles
from registry import BACKENDS, BASES, DEVICE, DTYPES, numpy, parameters, set_grads

SHAPES = [(1031,), (6, 7), (), (1,)]
TORCH_BASES = [name for name in BASES if name != "adagrad_norm"]
# torch's defaults, Adam's eps of 1e-8 among them: both sides get the same gradients here
DEFAULTS = {
    "sgd-defaults": (torch.optim.SGD, {}),
    "sgd-maximize": (torch.optim.SGD, {"lr": 0.1, "maximize": True, "weight_decay": 0.1}),
    "adam-defaults": (torch.optim.Adam, {}),
    "adamw-defaults": (torch.optim.AdamW, {}),
    "adagrad-defaults": (torch.optim.Adagrad, {}),
}
CASES = DEFAULTS | {name: (BASES[name].cls, BASES[name].kwargs) for name in TORCH_BASES}


def run(optimizer, params, dtypes, second_pass: bool, steps: int = 20) -> None:
    """Steps with the same gradients whatever the parameters do: errors do not feed back."""
    rng = np.random.default_rng(5)
    for _ in range(steps):
        grads = [rng.standard_normal(tuple(p.shape)) for p in params]
        set_grads(params, grads, dtypes)
        if second_pass:
            optimizer.first_step()
            optimizer.second_step()
        else:
            optimizer.step()


@pytest.mark.parametrize("dtype", ["fp32", "fp64"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES)
def test_rho_zero_is_the_base(case, backend, dtype):
    cls, kwargs = CASES[case]
    dtypes = DTYPES[dtype]
    start = oracles.Problem(SHAPES, seed=1).initial()
    ours, theirs = parameters(start, dtypes), parameters(start, dtypes)
    optimizer = fastsam.SAM(ours, cls, rho=0.0, backend=backend, **kwargs)
    expected = cls(theirs, foreach=False, **kwargs)
    run(optimizer, ours, dtypes, second_pass=True)
    run(expected, theirs, dtypes, second_pass=False)
    exact = backend == "reference" and DEVICE == "cpu"
    # 20 steps of about four roundings each, of weights up to about 3
    tolerance = 0.0 if exact else 80 * 3 * torch.finfo(ours[0].dtype).eps
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance)
        state, expected_state = optimizer.state[a], expected.state[b]
        assert state.keys() == expected_state.keys()
        for key, value in expected_state.items():
            found = state[key].to(value.device)
            torch.testing.assert_close(found, value, rtol=tolerance, atol=tolerance)
    group = dict(optimizer.param_groups[0])
    del group["params"]
    assert {g: v for g, v in group.items() if not g.startswith("fastsam_")} == {
        "rho": 0.0, "adaptive": False, "eta": 0.0, "perturb": True,
        **{g: v for g, v in expected.param_groups[0].items() if g != "params"}, "foreach": None,
    }  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("base", BASES)
def test_rho_zero_has_the_bits_of_one_pass(base, backend, renormalize):
    """Two passes at rho = 0, and the closure's single one, give the same bits."""
    cls, kwargs = BASES[base].cls, BASES[base].kwargs
    results = []
    for explicit in (True, False):
        problem = oracles.Problem(SHAPES, seed=2)
        params = parameters(problem.initial(), DTYPES["fp32"])
        optimizer = fastsam.SAM(
            params, cls, rho=0.0, renormalize=renormalize, backend=backend, **kwargs
        )
        calls = []

        def closure(params=params, problem=problem, calls=calls):
            set_grads(params, problem.grad(numpy(params)), DTYPES["fp32"])
            calls.append(1)
            return torch.zeros(())

        for _ in range(5):
            if explicit:
                closure()
                optimizer.first_step()
                closure()
                optimizer.second_step()
            else:
                optimizer.step(closure)
        assert len(calls) == (10 if explicit else 5)
        results.append(numpy(params))
    for a, b in zip(*results, strict=True):
        np.testing.assert_array_equal(a, b)


class Walk(torch.optim.Optimizer):
    """A foreign base with state of its own: normalised descent that counts its steps."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    state = self.state[p]
                    state["walked"] = state.get("walked", 0) + 1
                    p.sub_(p.grad / (1 + p.grad.norm()), alpha=group["lr"] / state["walked"])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize(
    ("cls", "kwargs"),
    [
        (torch.optim.RMSprop, {"lr": 0.01, "momentum": 0.5}),
        (torch.optim.NAdam, {"lr": 0.01}),
        (Walk, {"lr": 0.05}),
    ],
)
def test_foreign_base(cls, kwargs, renormalize, backend):
    """Any optimizer class: against it, driven by hand with SAM's equations in float64."""
    dtypes = DTYPES["fp64"]
    problem = oracles.Problem(SHAPES, seed=4)
    params, expected = (parameters(problem.initial(), dtypes) for _ in range(2))
    groups = [{"params": params[:2], "lr": 0.02}, {"params": params[2:], "rho": 0.1}]
    optimizer = fastsam.SAM(groups, cls, renormalize=renormalize, backend=backend, **kwargs)
    theirs = cls([{"params": expected[:2], "lr": 0.02}, {"params": expected[2:]}], **kwargs)
    for _ in range(20):
        set_grads(params, problem.grad(numpy(params)), dtypes)
        optimizer.first_step()
        set_grads(params, problem.grad(numpy(params)), dtypes)
        optimizer.second_step()

        w = numpy(expected)
        g = problem.grad(w)
        n = np.sqrt(sum((x**2).sum() for x in g))
        rhos = (0.05, 0.05, 0.1, 0.1)
        u = problem.grad([x + rho / (n + 1e-12) * y for x, rho, y in zip(w, rhos, g, strict=True)])
        if renormalize:
            gamma = n / (np.sqrt(sum((x**2).sum() for x in u)) + 1e-12)
            u = [gamma * x for x in u]
        set_grads(expected, u, dtypes)
        theirs.step()
    for a, b in zip(params, expected, strict=True):
        # float64 roundings of 20 steps, enlarged by RMSprop where a gradient is small
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)
        assert optimizer.state[a].keys() == theirs.state[b].keys()


@pytest.mark.parametrize("backend", BACKENDS)
def test_foreign_base_with_an_expanded_gradient(backend):
    """``u`` goes to ``.grad``, which may not be writable in place."""
    param = torch.nn.Parameter(torch.zeros(4, 5, device=DEVICE))
    optimizer = fastsam.SSAM([param], torch.optim.NAdam, rho=1.0, lr=0.1, backend=backend)
    for value, half in ((1.0, optimizer.first_step), (2.0, optimizer.second_step)):
        param.grad = torch.full((), value, device=DEVICE).expand(4, 5)
        half()
    assert (param.grad == 1).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("base", ["sgd-momentum", "adam-amsgrad", "adamw"])
def test_infinite_weights_stay_what_they_are(base, backend):
    """Without weight decay nothing multiplies a weight: 0 times infinity would be NaN."""
    kwargs = BASES[base].kwargs | {"weight_decay": 0.0, "maximize": False}
    param = torch.nn.Parameter(torch.tensor([1.0, float("inf")], device=DEVICE))
    optimizer = fastsam.SAM([param], BASES[base].cls, rho=0.0, backend=backend, **kwargs)
    for half in (optimizer.first_step, optimizer.second_step):
        param.grad = torch.ones_like(param)
        half()
    assert param[0] < 1 and param[1] == float("inf")


@pytest.mark.parametrize("backend", BACKENDS)
def test_foreign_base_without_a_learning_rate(backend):
    """Some choose it themselves; LETS needs one."""

    class Signed(torch.optim.Optimizer):
        def __init__(self, params, lr=None):
            super().__init__(params, {"lr": lr})

        @torch.no_grad()
        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    p.sub_(p.grad.sign())

    param = torch.nn.Parameter(torch.zeros(4, device=DEVICE))
    optimizer = fastsam.SAM([param], Signed, backend=backend)
    optimizer.step(lambda: param.sum().backward())
    assert (param == -1).all()
    with pytest.raises(ValueError, match="lr must be a number or a tensor in every group"):
        fastsam.LETS(optimizer)


def test_foreign_base_skips_a_nonfinite_gradient():
    param = torch.nn.Parameter(torch.ones(3, device=DEVICE))
    optimizer = fastsam.SAM([param], torch.optim.RMSprop, skip_nonfinite=True, lr=0.1)
    param.grad = torch.ones_like(param)
    optimizer.first_step()
    param.grad = torch.tensor([1.0, float("nan"), 1.0], device=DEVICE)
    optimizer.second_step()
    assert param.tolist() == [1, 1, 1] and not optimizer.state[param]
    assert optimizer.metrics["skipped"] == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_tensor_hyper_parameters(backend):
    """lr and rho as 0-dim tensors give what the numbers give, and may change in place."""
    results = []
    for as_tensor in (False, True):
        problem = oracles.Problem(SHAPES, seed=6)
        params = parameters(problem.initial(), DTYPES["fp32"])
        make = (lambda x: torch.tensor(x, device=DEVICE)) if as_tensor else float
        optimizer = fastsam.SAM(
            params, torch.optim.AdamW, rho=make(0.5), lr=make(0.125), backend=backend
        )
        for step in range(4):
            if step == 2 and as_tensor:
                optimizer.param_groups[0]["lr"].mul_(0.5)
                optimizer.param_groups[0]["rho"].mul_(0.5)
            elif step == 2:
                optimizer.param_groups[0]["lr"] *= 0.5
                optimizer.param_groups[0]["rho"] *= 0.5
            for half in (optimizer.first_step, optimizer.second_step):
                set_grads(params, problem.grad(numpy(params)), DTYPES["fp32"])
                half()
        results.append(numpy(params))
    for a, b in zip(*results, strict=True):
        # lr and rho are powers of two: only lr * weight_decay may round differently
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-6)


def test_adagrad_norm_alone_is_the_fused_one():
    problem = oracles.Problem(SHAPES, seed=7)
    oracle = oracles.Oracle(
        problem.initial(), [{"params": [0, 1, 2, 3], "rho": 0.0, "lr": 0.3}], "adagrad_norm"
    )
    params = parameters(problem.initial(), DTYPES["fp64"])
    optimizer = fastsam.AdaGradNorm(params, lr=0.3)
    for _ in range(20):
        set_grads(params, problem.grad(numpy(params)), DTYPES["fp64"])
        assert optimizer.step() is None
        oracle.step(problem.grad)
    for ours, exact in zip(numpy(params), oracle.weights, strict=True):
        np.testing.assert_allclose(ours, exact, rtol=1e-12, atol=1e-12)
    assert float(optimizer.kept["squared_norms"]) == pytest.approx(oracle.b2, rel=1e-12)
    resumed = fastsam.AdaGradNorm(params, lr=0.3)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert resumed.kept["squared_norms"] == optimizer.kept["squared_norms"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_adagrad_norm_stands_still_at_zero_gradients(backend):
    param = torch.nn.Parameter(torch.ones(5, device=DEVICE))
    optimizer = fastsam.SAM([param], fastsam.AdaGradNorm, lr=0.5, backend=backend)
    for _ in range(2):
        for half in (optimizer.first_step, optimizer.second_step):
            param.grad = torch.zeros_like(param)
            half()
    assert param.tolist() == [1] * 5
    assert optimizer.kept["squared_norms"] == 0


def test_adagrad_norm_validates():
    param = torch.nn.Parameter(torch.ones(1))
    with pytest.raises(ValueError, match="lr must be at least 0 and finite, got -1"):
        fastsam.AdaGradNorm([param], lr=-1)
    with pytest.raises(ValueError, match="initial_accumulator_value must be at least 0 and finite"):
        fastsam.AdaGradNorm([param], initial_accumulator_value=-1)
