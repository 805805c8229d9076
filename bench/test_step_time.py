"""Microbenchmarks: the time of a step by method, base, backend and parameter set, against peers.

    pytest bench --benchmark-only                      # ResNet-50 and a ResNet-20; some minutes
    pytest bench --benchmark-only -k "small and sam-sgd"
    BENCH_SETS="gpt2 vit_b16" pytest bench --benchmark-only

They run on a GPU if there is one. What is timed is the optimizer's work of a step, as in
``report.py``, which compares in alternation and so is what to quote; these are for working on one
step. A group of the table is a method on a set, and a copy of the bytes that it has to move.
"""

import os

import pytest
import torch

from speed.contenders import (
    COMPILED,
    METHODS,
    PEERS,
    Contender,
    Problem,
    compiled_contender,
    copy_contender,
    count,
    fastsam_contender,
    parameter_set,
    peer_contender,
    peer_names,
)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BACKENDS = ("triton", "torch") if DEVICE.type == "cuda" else ("torch", "reference")
SETS = os.environ.get("BENCH_SETS", "resnet50 small").split()
ROUNDS = 15
SMALL = 10**6  # parameters, below which a round is several steps

# peers warn, and so does the compiler; that is theirs and no reason to stop
pytestmark = pytest.mark.filterwarnings("default")


def contenders_of(method: str) -> list[str]:
    """The short names under which a method's contenders are benchmarked."""
    names = [f"fastsam-{backend}" for backend in BACKENDS]
    if method.startswith("sam-"):
        names += [name + end for name in PEERS for end in ("", "-fused")]
        names += [COMPILED] * (DEVICE.type == "cuda")
    return [*names, "copy"]


def make(set_name: str, method: str, name: str) -> Contender:
    """Build a contender by its short name."""
    problem = Problem(parameter_set(set_name), DEVICE)
    if name == "copy":
        return copy_contender(problem, METHODS[method].floor(DEVICE))
    if name == COMPILED:
        return compiled_contender(problem, method)
    who, _, backend = name.partition("-")
    if who == "fastsam":
        return fastsam_contender(problem, method, backend)._replace(name=f"fastsam, {backend}")
    package = name.removesuffix("-fused")
    if package not in peer_names():
        pytest.skip(f"{package} is not installed")
    return peer_contender(problem, method, package, fused=name.endswith("-fused"))


@pytest.mark.parametrize(
    ("set_name", "method", "name"),
    [
        pytest.param(set_name, method, name, id=f"{set_name}-{method}-{name}")
        for set_name in SETS
        for method in METHODS
        for name in contenders_of(method)
    ],
)
def test_step(benchmark, set_name, method, name):
    contender = make(set_name, method, name)
    benchmark.group = f"{set_name} · {METHODS[method].label}"
    benchmark.name = contender.name

    def step() -> None:
        contender.step()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    small = count(parameter_set(set_name)) < SMALL
    benchmark.pedantic(step, rounds=ROUNDS, warmup_rounds=3, iterations=10 if small else 1)
    assert all(torch.isfinite(param).all() for param in contender.params)
