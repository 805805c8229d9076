"""The README's Python runs, and its commands are the ones that exist."""

import re
from pathlib import Path

import pytest
import torch

README = (Path(__file__).resolve().parent.parent / "README.md").read_text()


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", README, re.DOTALL))
def test_python_runs(block):
    torch.manual_seed(0)
    names = {}
    exec(block, names)
    if "optimizer" in names:
        assert torch.isfinite(names["loss"])
        assert float(names["optimizer"].metrics["grad_norm"]) > 0
    else:  # what looks at flatness
        assert torch.isfinite(names["rise"]) and names["figure"].axes


def test_two_commands():
    commands = re.findall(r"^pip install .*$", README, re.MULTILINE)
    assert len(commands) == 2
    assert all(c.startswith("pip install torch==2.13.0 && pip install -e ") for c in commands)
    assert commands[0].endswith("python bench/train.py") and "pytest" in commands[1]
