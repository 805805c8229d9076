"""Choosing a backend, and doing without Triton."""

import re
import subprocess
import sys

import pytest
import torch

import fastsam
from fastsam import backends

from registry import DEVICE


def python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run code in a new interpreter."""
    import os

    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | env
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )


STEP = """
import torch, fastsam
param = torch.nn.Parameter(torch.ones(3))
optimizer = fastsam.SAM([param], torch.optim.SGD, lr=0.5, {arguments})
optimizer.step(lambda: (param ** 2).sum().backward())
print(param.tolist())
"""
NO_TRITON = "import sys; sys.modules['triton'] = None\n" + (
    "import importlib.util; find = importlib.util.find_spec\n"
    "importlib.util.find_spec = lambda name, *a: None if name == 'triton' else find(name, *a)\n"
)


def test_works_without_triton():
    result = python(NO_TRITON + STEP.format(arguments=""))
    assert result.returncode == 0, result.stderr
    # on w^2: e = 0.05 / sqrt(3) each, u = 2 (1 + e), w = 1 - u / 2 = -e
    assert eval(result.stdout) == pytest.approx([-0.05 / 3**0.5] * 3, abs=2e-7)


def test_asking_for_triton_where_there_is_none():
    result = python(NO_TRITON + STEP.format(arguments="backend='triton'"))
    assert result.returncode != 0
    assert "ImportError: backend='triton' needs the package triton" in result.stderr


def test_importing_fastsam_does_not_import_triton():
    code = "import sys, torch; before = 'triton' in sys.modules; import fastsam, fastsam.kernels\n"
    result = python(code + "print(before or 'triton' not in sys.modules)")
    assert result.stdout.strip() == "True", result.stderr


def test_triton_on_cpu_tensors():
    """An error without the interpreter, at construction; the kernels themselves with it."""
    code = STEP.format(arguments="backend='triton'")
    refused = python(code)
    assert refused.returncode != 0
    assert "RuntimeError: backend='triton' needs parameters on a GPU, got cpu" in refused.stderr
    interpreted = python(code, TRITON_INTERPRET="1")
    assert interpreted.returncode == 0, interpreted.stderr
    assert interpreted.stdout == python(STEP.format(arguments="backend='reference'")).stdout


def test_resolve():
    device = torch.device("cpu")
    assert backends.resolve("auto", device) == "torch"
    assert backends.resolve("reference", device) == "reference"
    if DEVICE == "cpu":  # then the suite interprets, and the interpreter cannot reach a GPU
        assert backends.resolve("auto", torch.device("cuda")) == "torch"
        with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1 needs parameters on the CPU"):
            backends.resolve("triton", torch.device("cuda"))
    with pytest.raises(ValueError, match="backend must be one of"):
        backends.resolve("Triton", device)


@pytest.mark.parametrize(
    ("triton_version", "numpy_version", "works"),
    [("3.6.0", "2.4.0", False), ("3.6.1", "3.0.0rc1", False), ("3.6.0", "2.3.5", True),
     ("3.7.0", "2.4.6", True), ("3.10.0", "2.10.1", True), ("3.6.0+git1", "2.4.0", False)],
)  # fmt: skip
def test_interpreting_with_a_numpy_that_triton_cannot_take(
    triton_version, numpy_version, works, monkeypatch
):
    monkeypatch.setattr("triton.__version__", triton_version)
    monkeypatch.setattr("numpy.__version__", numpy_version)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    param = torch.nn.Parameter(torch.ones(3))
    if works:
        assert backends.resolve("triton", param.device) == "triton"
    else:
        with pytest.raises(
            RuntimeError,
            match=re.escape(
                f"triton 3.7 or later with numpy {numpy_version}, or a numpy before 2.4: the "
                f"interpreter of triton {triton_version} fails"
            ),
        ):
            fastsam.SAM([param], torch.optim.SGD, lr=0.1, backend="triton")
    monkeypatch.delenv("TRITON_INTERPRET")
    if DEVICE == "cuda":  # compiled kernels take any numpy
        assert backends.resolve("triton", torch.device("cuda")) == "triton"


@pytest.mark.gpu
def test_auto_takes_triton_on_a_gpu():
    assert backends.resolve("auto", torch.device("cuda")) == "triton"


@pytest.mark.parametrize("name", ["triton", "torch", "reference"])
def test_the_backend_asked_for_runs(name, monkeypatch):
    """The fast path is taken: each backend sees both halves of the step."""
    param = torch.nn.Parameter(torch.ones(5, device=DEVICE))
    optimizer = fastsam.SAM([param], torch.optim.SGD, lr=0.1, backend=name)
    seen = []
    create = backends.create

    def recording(created):
        backend = create(created)
        for half in ("ascend", "descend"):
            run = getattr(backend, half)

            def wrapped(*args, half=half, run=run):
                seen.append((created, half))
                return run(*args)

            setattr(backend, half, wrapped)
        return backend

    monkeypatch.setattr(backends, "create", recording)
    optimizer.step(lambda: (param**2).sum().backward())
    assert seen == [(name, "ascend"), (name, "descend")]


def test_torch_backend_takes_the_fused_operators(monkeypatch):
    from fastsam.backends import reference

    def refuse(*args):
        raise AssertionError("one tensor at a time")

    monkeypatch.setattr(reference, "update_one", refuse)
    for base, kwargs in [
        (torch.optim.SGD, {"momentum": 0.9}),
        (torch.optim.Adam, {"amsgrad": True}),
        (torch.optim.AdamW, {}),
        (torch.optim.Adagrad, {}),
    ]:
        params = [torch.nn.Parameter(torch.ones(s, device=DEVICE)) for s in (5, (3, 4), ())]
        optimizer = fastsam.SSAM(params, base, lr=0.1, backend="torch", **kwargs)
        optimizer.step(lambda p=params: sum((x**2).sum() for x in p).backward())
