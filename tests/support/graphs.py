"""A stand-in for CUDA graphs, and steps to be captured."""

from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime import interpreter

import fastsam
import fastsam.backends.triton.launcher
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
    "TraceSAM + SGD": (fastsam.TraceSAM, SGD, {}),
    "DetSAM, three": (fastsam.DetSAM, ADAMW, {"samples": 3, "half_width": 0.1}),
    "FrobSAM + SGD": (fastsam.FrobSAM, SGD, {}),
    "bSAM": (fastsam.BSAM, None, {"n": 50}),
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
            for module in (table, fastsam.backends.triton.launcher):
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


class Recorder:
    """A stand-in for ``fastsam.graphs.Recorder``: what it records has not run afterwards.

    Args:
        tensors: Gives the tensors whose values are put back, as the recording has written them.
    """

    def __init__(self, tensors, monkeypatch):
        self.tensors, self.monkeypatch = tensors, monkeypatch
        self.recorded = 0

    def __call__(self, name, device):  # in the place of the class
        return self

    def aside(self):
        return nullcontext()

    def record(self, take):
        graph, self.recorded = Graph(), self.recorded + 1
        before = [(x, x.detach().clone()) for x in self.tensors()]
        try:
            with graph.capture(self.monkeypatch):
                take()
        finally:
            with torch.no_grad():
                for x, value in before:
                    x.copy_(value)
        return graph.replay


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
