"""Stages that ask whether the kernels are right: memory checks, and the core tests."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fastsam

from .problems import quietly
from .records import ROOT
from .stages import Context

TOOLS = ("memcheck", "racecheck")
ERRORS = 9  # the status that the checker is asked for where it finds something
TESTS = ("tests/step/test_capture.py", "tests/backends/test_edges.py",
         "tests/methods/test_methods.py")  # fmt: skip
#: Elements and how far from an aligned address each tensor begins, in elements.
RAGGED = [(1000, 0), (5001, 1), (3, 0), (40_000, 3), (17, 5), (0, 0), (16_384, 0), (1, 1)]
METHODS = {
    "SAM + AdamW": lambda params, **kwargs: fastsam.SAM(
        params, torch.optim.AdamW, lr=1e-2, **kwargs),
    "SAMAR + SGD": lambda params, **kwargs: fastsam.SAMAR(
        params, torch.optim.SGD, lr=1e-2, momentum=0.9, **kwargs),
    "LightSAM III": lambda params, **kwargs: fastsam.LightSAM(
        params, lr=1e-2, rho=1e-2, rule="adam", **kwargs),
}  # fmt: skip
TOLERANCE = 1e-5


# --- memory ----------------------------------------------------------------------------------


def checker() -> str | None:
    """Where NVIDIA's compute-sanitizer is; AMD has none for compiled kernels."""
    places = os.pathsep.join(["/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer"])
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=places)


def memory(context: Context) -> None:
    """Steps of three methods, as they are and under the checker's tools."""
    one_step(context)
    found = checker()
    if found is None or context.rehearsal:
        why = "it is a rehearsal" if found else "it is not installed"
        context.add(tool="compute-sanitizer", ran=False, why=why)
        context.say(f"compute-sanitizer was not run: {why}")
        return
    for tool in TOOLS:
        start = time.monotonic()
        command = [found, "--tool", tool, "--error-exitcode", str(ERRORS), *context.python,
                   str(ROOT / "bench" / "gpu.py"), "--run", "one-step", "--output",
                   str(context.folder)]  # fmt: skip
        # else an access beyond one tensor would be one to its neighbour in torch's cache
        environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
                                    "PYTORCH_NO_HIP_MEMORY_CACHING": "1"}  # fmt: skip
        run = subprocess.run(command, capture_output=True, text=True, env=environment)
        print(run.stdout, run.stderr, flush=True)
        summary = re.findall(r"={9} (.*SUMMARY.*)", run.stdout + run.stderr)
        context.add(
            tool=tool, ran=True, status=run.returncode, passed=run.returncode == 0,
            summary=summary[-1] if summary else "", seconds=time.monotonic() - start,
        )  # fmt: skip
        context.say(f"{tool}: {summary[-1] if summary else f'status {run.returncode}'}")


def one_step(context: Context) -> None:
    """Two steps of three methods on ragged, misaligned tensors, against the reference backend.

    Raises:
        RuntimeError: If the weights differ.
    """
    for name, make in METHODS.items():
        for dtype in (torch.float32, torch.bfloat16):
            found = _weights(make, "triton", dtype, context.device)
            expected = _weights(make, "reference", dtype, context.device)
            pairs = list(zip(found, expected, strict=True))
            tolerance = TOLERANCE if dtype == torch.float32 else 2.0**-6
            worst = max(float((x - y).abs().max()) for x, y in pairs if x.numel())
            right = worst <= tolerance
            context.add(method=name, dtype=str(dtype)[6:], difference=worst, passed=right)
            if not right:
                raise RuntimeError(f"{name} in {dtype} differs by {worst:.3g} from the equations")


def _weights(make: Any, backend: str, dtype: torch.dtype, device: torch.device) -> list[Any]:
    generator = torch.Generator().manual_seed(0)

    def ragged(elements: int, shift: int) -> torch.Tensor:
        x = torch.randn(elements + shift, generator=generator).to(device, dtype)
        return x[shift:]

    params = [nn.Parameter(ragged(*shape)) for shape in RAGGED]
    groups = [{"params": params[:3]}, {"params": params[3:], "rho": 0.02}]
    optimizer = quietly(make, groups, backend=backend)

    def closure() -> float:
        for param, shape in zip(params, RAGGED, strict=True):
            param.grad = ragged(*shape)
        return 0.0

    for _ in range(2):
        optimizer.step(closure)
    torch.cuda.synchronize(device)
    return [param.detach().double().cpu() for param in params]


# --- tests -----------------------------------------------------------------------------------


class Counts:
    """A plugin of pytest's that counts, and remembers what failed."""

    def __init__(self) -> None:
        self.passed = self.skipped = 0
        self.failed: list[str] = []

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self.failed.append(report.nodeid)
        elif report.skipped:
            self.skipped += 1
        elif report.when == "call":
            self.passed += 1


def tests(context: Context) -> None:
    """Run test files one after another.

    Raises:
        RuntimeError: If a test fails.
    """
    import pytest

    os.environ.pop("TRITON_INTERPRET", None)
    os.chdir(ROOT)
    failed = []
    for name in TESTS[: 1 if context.rehearsal else None]:
        counts = Counts()
        arguments = [name, "-q", "--maxfail=20", "--tb=native", "-p", "no:cacheprovider"]
        if context.rehearsal:
            arguments += ["-k", "on_a_gpu and AdamW", "-p", "no:xdist", "--assert=plain"]
        elif _has_xdist():
            arguments += ["-n", str(max(1, min(8, (os.cpu_count() or 2) // 2)))]
        start = time.monotonic()
        status = pytest.main(arguments, plugins=[counts])
        failed += counts.failed
        context.add(
            file=name, passed=counts.passed, skipped=counts.skipped, failed=counts.failed,
            status=int(status), seconds=time.monotonic() - start,
        )  # fmt: skip
        context.say(f"{Path(name).name}: {counts.passed} passed, {len(counts.failed)} failed")
        for module in [m for m in sys.modules if m.startswith("test_")]:
            del sys.modules[module]
    if failed:
        raise RuntimeError(f"{len(failed)} tests failed, the first of them {failed[0]}")


def _has_xdist() -> bool:
    from importlib.util import find_spec

    return find_spec("xdist") is not None
