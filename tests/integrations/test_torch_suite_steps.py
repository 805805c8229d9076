"""torch's optimizer suite on fastsam's classes: backends that match, odd gradients.

What is left out is listed in ``test_torch_suite.py``.
"""

import copy
import itertools

import pytest
import torch
from torch.nn import Parameter

from registry import DEVICE
from torch_suite import Problem, each_class, equal, every_backend, everyone, settings, sharp, step

pytestmark = [
    pytest.mark.filterwarnings("ignore:some parameters are float16"),
    pytest.mark.filterwarnings("ignore:the closure left no gradient"),
]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


# --- backends that match --------------------------------------------------------------------------

#: The reference and those compared with it; Triton's interpreter takes three inputs of each class.
OTHERS = ("torch", "triton")


def state_of(optimizer, params):
    """Everything that a step changes; a base that is not fused keeps a number or two."""
    groups = [
        {key: value for key, value in group.items() if key not in ("params", "foreach")}
        for group in optimizer.param_groups
    ]
    state = [optimizer.state.get(p, {}) for p in params]
    return {
        "params": [p.detach() for p in params],
        "state": [{key: torch.as_tensor(x) for key, x in entry.items()} for entry in state],
        "groups": [
            {k: torch.as_tensor(v).double() for k, v in group.items() if not isinstance(v, bool)
             and isinstance(v, (float, torch.Tensor))}
            for group in groups
        ],
    }  # fmt: skip


class Network:
    """Two layers, and one parameter of no dimension whose gradient is always the same."""

    def __init__(self, dtype):
        torch.manual_seed(1)
        layers = (
            torch.nn.Linear(2, 3),
            torch.nn.Sigmoid(),
            torch.nn.Linear(3, 1),
            torch.nn.Sigmoid(),
        )
        self.model = torch.nn.Sequential(*layers).to(DEVICE, dtype)
        self.x = torch.arange(1, 7, device=DEVICE).reshape(3, 2).to(dtype) / 10
        self.scalar = Parameter(torch.tensor(0.5, device=DEVICE, dtype=dtype))
        self.params = [*self.model.parameters(), self.scalar]
        self.time = 0

    def closure(self):
        for p in self.params:
            p.grad = None
        loss = self.model(self.x).sum()
        if self.time != 1:  # where no parameter has a gradient, nothing happens
            loss.backward()
            self.scalar.grad = torch.full_like(self.scalar, 0.25)
        return loss

    def advance(self):
        self.time += 1
        if self.time in (2, 3):  # a layer without gradients for one step
            self.model[2].requires_grad_(self.time == 3)


def compare(info, other, dtype, how_many=None, **tolerance):
    for kwargs in itertools.islice(settings(info, other), how_many):
        networks = Network(dtype), Network(dtype)
        optimizers = [
            info.optim_cls(network.params, **copy.deepcopy(kwargs) | {"backend": backend})
            for network, backend in zip(networks, ("reference", other), strict=True)
        ]
        for k in range(4):
            before = copy.deepcopy(state_of(optimizers[1], networks[1].params)) if k == 1 else {}
            for network, optimizer in zip(networks, optimizers, strict=True):
                step(optimizer, network.closure)
                network.advance()
            ours = state_of(optimizers[1], networks[1].params)
            equal(ours, state_of(optimizers[0], networks[0].params), **tolerance)
            if k == 1:
                equal(ours["params"], before["params"])
                equal(ours["state"], before["state"])
            yield optimizers[1]


#: float32 and float64: a few roundings a step. Stored in 16 bits, a weight may end up a neighbour.
TOLERANCES = {
    torch.float64: {"rtol": 1e-11, "atol": 1e-13},
    torch.float32: {"rtol": 2e-5, "atol": 1e-6},
    torch.bfloat16: {"rtol": 2e-2, "atol": 2e-3},
    torch.float16: {"rtol": 2e-3, "atol": 2e-4},
}


@pytest.mark.parametrize("dtype", TOLERANCES, ids=lambda dtype: str(dtype).split(".")[1])
@pytest.mark.parametrize("other", OTHERS)
@sharp
def test_backends_match(info, other, dtype):
    if other == "triton" and DEVICE == "cpu" and dtype is not torch.float32:
        pytest.skip("slow in the interpreter; test_oracles.py has the dtypes")
    how_many = None if dtype.itemsize > 2 else 4
    for _ in compare(info, other, dtype, how_many, **TOLERANCES[dtype]):
        pass


@pytest.mark.parametrize("default", [torch.float64, torch.float16], ids=["float64", "float16"])
@sharp
def test_default_dtype(info, default):
    """Nothing depends on it; steps are counted in float32, as in torch's fused optimizers."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        for optimizer in compare(info, "torch", torch.float64, 4, **TOLERANCES[torch.float64]):
            for entry in optimizer.state.values():
                if "step" in entry and getattr(optimizer, "_base", None) is not None:
                    assert entry["step"].dtype == torch.float32
    finally:
        torch.set_default_dtype(before)


@sharp
def test_mixed_dtypes(info):
    """Four dtypes in one group, next to integers, which have no gradients."""
    dtypes = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
    start = [torch.rand(2, 3, device=DEVICE).to(dtype) for dtype in dtypes]
    grads = [torch.rand_like(x) for x in start]
    whole = torch.randint(1024, (2, 3), device=DEVICE)
    for kwargs in settings(info, "torch"):
        results = []
        for backend in ("reference", "torch"):
            params = [Parameter(x.clone()) for x in start]
            integers = Parameter(whole.clone(), requires_grad=False)
            arguments = copy.deepcopy(kwargs) | {"backend": backend}
            optimizer = info.optim_cls([*params, integers], **arguments)

            def closure(params=params):
                for p, g in zip(params, grads, strict=True):
                    p.grad = g.clone()
                return torch.ones((), device=DEVICE)

            for _ in range(3):
                step(optimizer, closure)
            assert torch.equal(integers, whole) and not torch.equal(params[0], start[0])
            results.append(state_of(optimizer, params))
        for i, dtype in enumerate(dtypes):
            tolerance = dict(TOLERANCES[dtype])
            tolerance["rtol"] = max(tolerance["rtol"], 1e-7)  # norms of the others: in float32
            for part in ("params", "state"):
                equal(results[1][part][i], results[0][part][i], **tolerance)


# --- gradients that are missing, empty or zero ----------------------------------------------------


@every_backend
def test_no_gradients(info, backend):
    """Not an error: the closure is called, its loss returned, and nothing changes."""
    for kwargs in settings(info, backend):
        params = [torch.randn(2, 3, device=DEVICE) for _ in range(2)]
        before = copy.deepcopy(params)
        optimizer = info.optim_cls(params, **kwargs)
        saved = copy.deepcopy(optimizer.state_dict()["state"])  # Adagrad has some from the start
        loss = torch.tensor([1.0], device=DEVICE)
        assert step(optimizer, lambda loss=loss: loss) is loss
        equal(params, before)
        equal(optimizer.state_dict()["state"], saved)


@every_backend
def test_zero_gradients(info, backend):
    for kwargs in settings(info, backend):
        if kwargs.get("weight_decay", 0) != 0:
            continue
        if kwargs.get("base_optimizer") is torch.optim.AdamW:
            kwargs["weight_decay"] = 0.0  # which it has by default
        param = Parameter(torch.randn(5, 1, device=DEVICE))
        before = param.detach().clone()
        optimizer = info.optim_cls([param], **kwargs)

        def closure(param=param):
            param.grad = torch.zeros_like(param)
            return torch.ones((), device=DEVICE)

        for _ in range(2):
            step(optimizer, closure)
        equal(param.detach(), before)


@every_backend
def test_empty_parameters(info, backend):
    """Tensors without elements, alone and between others."""
    for kwargs in settings(info, backend):
        for shapes in ([(0,)], [(3,), (0, 4), (2,)]):
            params = [Parameter(torch.ones(shape, device=DEVICE)) for shape in shapes]
            optimizer = info.optim_cls(params, **kwargs)

            def closure(params=params):
                for p in params:
                    p.grad = torch.full_like(p, 0.5)
                return torch.ones((), device=DEVICE)

            step(optimizer, closure)
            assert all(p.isfinite().all() for p in params)
            assert all((p != 1).all() for p in params if p.numel())


# --- what a step gives and keeps ------------------------------------------------------------------


@everyone
def test_returns_what_the_closure_did(info, backend):
    """The same object, whatever it is, with two passes or one."""
    for kwargs in settings(info, backend):
        param = torch.randn(3, device=DEVICE)
        optimizer = info.optim_cls([param], **kwargs)
        for value in (1.0, torch.tensor([10.0], device=DEVICE), torch.ones((), device=DEVICE)):

            def closure(value=value, param=param):
                param.grad = torch.ones_like(param)
                return value

            assert step(optimizer, closure) is value


@everyone
def test_state_is_not_empty(info, backend):
    for kwargs in settings(info, backend):
        problem = Problem()
        optimizer = info.optim_cls(problem.params, **kwargs)
        step(optimizer, problem.closure)
        assert all(len(entry) > 0 for entry in optimizer.state.values())
        assert all(len(entry) > 0 for entry in optimizer.state_dict()["state"].values())


@everyone
def test_printing(info, backend):
    for kwargs in settings(info, backend):
        params = [Parameter(torch.randn(2, 3, device=DEVICE)) for _ in range(2)]
        optimizer = info.optim_cls([{"params": [p]} for p in params], **kwargs)
        text = repr(optimizer)
        assert text.startswith(info.name) and "Parameter Group 1" in text
        assert all(f"{key}: " in text for key in kwargs.keys() & optimizer.defaults.keys())


@pytest.mark.parametrize("set_to_none", [True, False])
@each_class
def test_zero_grad(info, set_to_none):
    problem = Problem()
    optimizer = info.optim_cls(problem.params, **next(settings(info, "none")))
    problem.closure()
    held = [p.grad for p in problem.params]
    optimizer.zero_grad(set_to_none=set_to_none)
    if set_to_none:
        assert all(p.grad is None for p in problem.params) and held[0].any()
    else:
        assert all(p.grad is g for p, g in zip(problem.params, held, strict=True))
        assert not any(g.any() for g in held)
    before = problem.params[0].detach().clone()
    step(optimizer, problem.closure)
    assert not torch.equal(problem.params[0], before)


@each_class
def test_profiler_names(info):
    problem = Problem()
    optimizer = info.optim_cls(problem.params, **next(settings(info, "none")))
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True
    ) as profiler:
        for _ in range(2):
            step(optimizer, problem.closure)
        optimizer.zero_grad()
    counts = {event.key: event.count for event in profiler.key_averages()}
    assert counts[f"Optimizer.step#{info.name}.step"] == 2
    assert counts[f"Optimizer.zero_grad#{info.name}.zero_grad"] >= 1


# --- devices --------------------------------------------------------------------------------------


@sharp
def test_several_devices_are_refused(info):
    params = [Parameter(torch.ones(2, device=device)) for device in (DEVICE, "meta")]
    optimizer = info.optim_cls(params, **next(settings(info, "none")))

    def closure():
        for p in params:
            p.grad = torch.ones_like(p)
        return torch.ones(())

    with pytest.raises(RuntimeError, match=f"devices of one type, got {DEVICE}.* and meta"):
        step(optimizer, closure)
    assert params[0].tolist() == [1, 1]


@sharp
def test_parameters_on_meta_have_no_kernels(info):
    kwargs = next(settings(info, "triton"))
    with pytest.raises(RuntimeError, match="needs parameters on .* got meta"):
        info.optim_cls([Parameter(torch.ones(2, device="meta"))], **kwargs)
