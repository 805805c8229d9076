"""A step in a CUDA graph: replays go on as steps would, and what cannot be captured is refused.

Without a GPU a stand-in plays the graph: it records every operator and every kernel launch of one
step, and runs them again on the same memory. Anything that a step decides on the host, or keeps in
another place than the step before, makes its replays differ from steps.
"""

from contextlib import contextmanager

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime import interpreter

import fastsam
import fastsam.backends.launcher
from fastsam.kernels import table

from registry import DEVICE

SGD = (torch.optim.SGD, {"momentum": 0.9, "weight_decay": 5e-4})
ADAMW = (torch.optim.AdamW, {})
CASES = {
    "SAM + SGD": (fastsam.SAM, SGD, {}),
    "SAM + AdamW": (fastsam.SAM, ADAMW, {}),
    "SAM + AdaGradNorm": (fastsam.SAM, (fastsam.AdaGradNorm, {}), {}),
    "ASAM, clipped": (fastsam.ASAM, SGD, {"max_grad_norm": 0.5}),
    "SSAM, skipping": (fastsam.SSAM, ADAMW, {"skip_nonfinite": True}),
    "UnifiedSAM": (fastsam.UnifiedSAM, SGD, {}),
    "VaSSO": (fastsam.VaSSO, SGD, {}),
    "SAMAR": (fastsam.SAMAR, SGD, {}),
    "LightSAM I": (fastsam.LightSAM, None, {"rule": "adagrad_norm"}),
    "LightSAM II": (fastsam.LightSAM, None, {"rule": "adagrad"}),
    "LightSAM III": (fastsam.LightSAM, None, {"rule": "adam"}),
    "AdaSAM": (fastsam.AdaSAM, None, {}),
    "SAM, stochastic": (fastsam.SAM, ADAMW, {"rounding": "stochastic", "seed": 3}),
    "SAM, masters": (fastsam.SAM, ADAMW, {"master_weights": True}),
    "VaSSO, masters": (fastsam.VaSSO, ADAMW, {"master_weights": True, "skip_nonfinite": True}),
}


class Graph(TorchDispatchMode):
    """What runs inside the block, to be run again."""

    def __init__(self):
        super().__init__()
        self.calls = []
        self.memory = []
        self.launching = False

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        if not self.launching:
            assert operator.name() != "aten::_local_scalar_dense", "the host asked the device"
            self.memory.append(result)  # as a graph's pool of memory does
            if "empty" not in operator.name():
                self.calls.append((operator, args, kwargs or {}, result))
        return result

    @contextmanager
    def capture(self, monkeypatch):
        run = interpreter.InterpretedFunction.run

        def launch(kernel, *args, **kwargs):
            self.calls.append((None, (kernel, *args), kwargs, None))
            self.launching = True
            run(kernel, *args, **kwargs)
            self.launching = False

        with monkeypatch.context() as patch, self:
            patch.setattr(interpreter.InterpretedFunction, "run", launch)
            for module in (table, fastsam.backends.launcher):
                patch.setattr(module, "is_capturing", lambda device: True)
            yield

    @torch.no_grad()
    def replay(self):
        for operator, args, kwargs, recorded in self.calls:
            if operator is None:
                interpreter.InterpretedFunction.run(*args, **kwargs)
                continue
            result = operator(*args, **kwargs)
            for old, new in zip(tree_leaves(recorded), tree_leaves(result), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def problem(name, capturable=True):
    """A model, its optimizer with learning rate and radius on the device, and a closure."""
    method, base, kwargs = CASES[name]
    generator = torch.Generator().manual_seed(3)
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 2))
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=generator)
    low = {"rounding", "master_weights"} & kwargs.keys()
    dtype = torch.bfloat16 if low else torch.float32
    model.to(DEVICE, dtype)
    x = torch.empty(8, 6, device=DEVICE, dtype=dtype)
    hyper = {"lr": 0.1, "rho": 0.2} | kwargs | (base[1] if base else {})
    if capturable:
        hyper |= {key: torch.tensor(hyper[key], device=DEVICE) for key in ("lr", "rho")}
    bases = [base[0]] if base else []
    optimizer = method(model.parameters(), *bases, backend="triton", **hyper)

    def closure():
        loss = model(x).square().mean()
        loss.backward()
        return loss

    return model, optimizer, x, closure


def batches(count):
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(8, 6, generator=generator) for _ in range(count)]


def check(name, capture, replay):
    """Two steps, then four replays of which the last two have another learning rate and radius."""
    (model, optimizer, x, closure), (model_, optimizer_, x_, closure_) = map(problem, [name] * 2)
    data = batches(7)
    for batch in data[:2]:
        for input_, step, f in ((x, optimizer, closure), (x_, optimizer_, closure_)):
            input_.copy_(batch)
            step.step(f)
    capture(lambda: x.copy_(data[2]), lambda: optimizer.step(closure))
    x_.copy_(data[2])
    optimizer_.step(closure_)
    for i, batch in enumerate(data[3:]):
        if i == 2:
            for group in (optimizer.param_groups[0], optimizer_.param_groups[0]):
                group["lr"].fill_(0.01)
                group["rho"].fill_(0.7)
        x.copy_(batch)
        replay()
        x_.copy_(batch)
        optimizer_.step(closure_)
        for p, p_ in zip(model.parameters(), model_.parameters(), strict=True):
            torch.testing.assert_close(p, p_, rtol=0, atol=0)  # the same launches: the same bits
        for p, p_ in zip(model.parameters(), model_.parameters(), strict=True):
            for key, value in optimizer_.state[p_].items():
                torch.testing.assert_close(optimizer.state[p][key], value, rtol=0, atol=0)
        for key, value in optimizer_.metrics.items():
            torch.testing.assert_close(optimizer.metrics[key], value, rtol=0, atol=0)
    x.copy_(data[0])  # the optimizer goes on outside, and the graph after it
    optimizer.step(closure)
    replay()
    x_.copy_(data[0])
    optimizer_.step(closure_)
    optimizer_.step(closure_)
    for p, p_ in zip(model.parameters(), model_.parameters(), strict=True):
        torch.testing.assert_close(p, p_, rtol=0, atol=0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
@pytest.mark.parametrize("name", CASES)
def test_replays_are_steps(name, monkeypatch):
    graph = Graph()

    def capture(prepare, step):
        prepare()
        with graph.capture(monkeypatch):
            step()

    check(name, capture, graph.replay)


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_replays_are_steps_on_a_gpu(name):
    graph = torch.cuda.CUDAGraph()

    def capture(prepare, step):
        with torch.cuda.graph(graph):
            step()
        prepare()
        graph.replay()  # capture does not run

    check(name, capture, graph.replay)


def captured(monkeypatch, step):
    with Graph().capture(monkeypatch):
        step()


def refused(monkeypatch, optimizer, closure, match):
    before = [p.detach().clone() for p in optimizer.param_groups[0]["params"]]
    with pytest.raises(RuntimeError, match=match):
        captured(monkeypatch, lambda: optimizer.step(closure))
    for p, old in zip(optimizer.param_groups[0]["params"], before, strict=True):
        assert torch.equal(p.detach(), old)


cpu_only = pytest.mark.skipif(torch.cuda.is_available(), reason="needs the stand-in")


@cpu_only
@pytest.mark.parametrize("name", ["SAM + SGD", "SAM + AdamW", "VaSSO", "LightSAM III"])
def test_state_has_to_be_there(name, monkeypatch):
    model, optimizer, x, closure = problem(name)
    x.copy_(batches(1)[0])
    refused(monkeypatch, optimizer, closure, "take a step outside|taken no step outside")
    assert not optimizer.state
    optimizer.step(closure)
    key = next(iter(optimizer.state[model[0].weight]))
    del optimizer.state[model[0].weight][key]
    refused(monkeypatch, optimizer, closure, "only after its first step")


@cpu_only
def test_what_the_host_decides_is_refused(monkeypatch):
    model, _, x, closure = problem("SAM + SGD")
    x.copy_(batches(1)[0])
    params, sgd = list(model.parameters()), torch.optim.SGD

    def rule(lam, sharpness, old):
        return 0.5

    for optimizer, match in [
        (fastsam.UnifiedSAM(params, sgd, lam="1/t", lr=0.1, backend="triton"), "lam that changes"),
        (fastsam.UnifiedSAM(params, sgd, lam=lambda t: 0.5, lr=0.1, backend="triton"), "lam that"),
        (fastsam.SAM(params, torch.optim.RMSprop, skip_nonfinite=True, backend="triton"), "skip_"),
        (
            fastsam.SAMAR(params, sgd, rule=rule, lr=0.1, backend="triton"),
            "rule must give a tensor",
        ),
    ]:
        optimizer.step(closure)
        refused(monkeypatch, optimizer, closure, match)
        optimizer.step(closure)  # and the optimizer is as it was
    lets = fastsam.LETS(fastsam.SAM(params, sgd, lr=0.1, backend="triton"))
    monkeypatch.setattr(table, "is_capturing", lambda device: True)
    with pytest.raises(RuntimeError, match="LETS cannot be captured"):
        lets.step(closure, closure)


@pytest.mark.gpu
def test_capture_before_a_step_on_a_gpu():
    model, optimizer, x, closure = problem("SAM + AdamW")
    x.normal_()
    closure()  # else cuBLAS would make its handle inside the capture
    optimizer.zero_grad()
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="step outside"), torch.cuda.graph(graph):
        optimizer.step(closure)
