"""The suite's quicker interpreter gives the bits of Triton's own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton

pytestmark = pytest.mark.skipif(
    not triton.knobs.runtime.interpret, reason="about Triton's interpreter"
)

STEPS = """
import hashlib, torch, fastsam
digest = hashlib.sha256()
for cls, dtype, kwargs in [
    (fastsam.SSAM, torch.bfloat16, {"adaptive": True, "eta": 0.01, "rounding": "stochastic"}),
    (fastsam.SAMAR, torch.float32, {"max_grad_norm": 0.5}),
    (fastsam.VaSSO, torch.float64, {"skip_nonfinite": True}),
]:
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(s).to(dtype)) for s in ((1031,), (6, 7), ())]
    optimizer = cls(params, torch.optim.AdamW, rho=0.1, lr=0.01, backend="triton", **kwargs)
    for _ in range(2):
        for half in (optimizer.first_step, optimizer.second_step):
            for p in params:
                p.grad = torch.randn(p.shape).to(dtype)
            half()
    for p in params:
        digest.update(p.detach().view(-1).view(torch.uint8).numpy().tobytes())
digest = digest.hexdigest()
"""


def test_bits_are_those_of_the_interpreter_as_it_comes():
    names = {}
    exec(STEPS, names)
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    run = subprocess.run(
        [sys.executable, "-c", STEPS + "print(digest)"], capture_output=True, text=True,
        env=environment, cwd=Path(__file__).resolve().parents[2],
    )  # fmt: skip
    assert run.stdout.strip() == names["digest"], run.stderr
