"""Faults put into kernels and tables on purpose: the emulator has to find each of them.

What is changed in the kernels' sources is given by patterns, which have to occur there.
"""

import re
import shutil

import numpy as np
import pytest
import torch

import fastsam
from fastsam.kernels import table

import compiled_launches
from ptx_emulator import EmulatorError
from registry import BASES, DTYPES, METHODS, build, build_oracle, numpy, parameters, set_grads

FP32 = DTYPES["fp32"]
#: Chunks that are ragged in their vectors and behind them; tensors of several chunks.
SHAPES = [(523,), (2500,), (3101,), (5,)]
SEEDS = range(8)


def check_steps(machine, seed=1, params=None, **settings):
    """Two steps of SAM + AdamW: the sums of its norm, its weights and its counts of steps."""
    rng = np.random.default_rng(0)
    params = params or parameters([rng.standard_normal(shape) for shape in SHAPES], FP32)
    spec, groups = (METHODS["sam"], BASES["adamw"]), [{"params": range(len(params))}]
    optimizer = build(*spec, params, groups, "triton")
    oracle = build_oracle(*spec, params, groups, FP32)
    with compiled_launches.on(machine, seed=seed, **settings):
        for step in range(2):
            firsts, seconds = ([rng.standard_normal(p.shape) for p in params] for _ in range(2))
            set_grads(params, firsts, FP32)
            optimizer.first_step()
            oracle.ascend(firsts)
            norm = float(optimizer.metrics["grad_norm"])
            assert norm == pytest.approx(oracle.metrics["grad_norm"], rel=1e-6)
            set_grads(params, seconds, FP32)
            optimizer.second_step()
            oracle.descend(seconds)
            assert all(float(optimizer.state[p]["step"]) == step + 1 for p in params)
            for ours, exact in zip(numpy(params), oracle.weights, strict=True):
                np.testing.assert_allclose(ours, exact, rtol=0, atol=2e-6)


def test_nothing_is_found_where_nothing_is_wrong(machine):
    for seed in SEEDS:
        check_steps(machine, seed)


def broken(folder, module, pattern, replacement):
    """A copy of the kernels with one change."""
    copy = folder / "kernels"
    shutil.copytree(compiled_launches.KERNELS, copy, ignore=shutil.ignore_patterns("__pycache__"))
    path = copy / f"{module}.py"
    text, times = re.subn(pattern, replacement, path.read_text())
    assert times, f"{pattern} does not occur in {module}.py"
    path.write_text(text)
    return copy


#: Module, pattern, replacement.
MUTATIONS = {
    "a mask that is too long, of vectors": (
        "perturb", r"offsets < vector", "offsets < vector + 16",
    ),
    "a mask that is too long, of single elements": (
        "update", r"offsets < size", "offsets <= size",
    ),
    "a counter of the reduction that is not reset": (
        "reduce", r"tl\.store\(arrivals.*, 0\)", "pass",
    ),
    "a counter of the update that is not reset": (
        "update", r"tl\.store\(arrivals.*, 0\)", "pass",
    ),
    "a count that the first chunk writes": (
        "update", r"if tl\.atomic_add\(.*\) == last:", "if index == 0:",
    ),
}  # fmt: skip
#: What the emulator itself sees; the others give wrong numbers.
REPORTED = {
    "a mask that is too long, of vectors": r"perturb\.py:\d+.*out of bounds",
    "a mask that is too long, of single elements": r"update\.py:\d+.*out of bounds",
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_mutation_is_found(machine, tmp_path, mutation):
    kernels = broken(tmp_path, *MUTATIONS[mutation])
    with pytest.raises((EmulatorError, AssertionError), match=REPORTED.get(mutation)):
        for seed in SEEDS:
            check_steps(machine, seed, kernels=kernels)


def test_a_misaligned_tensor_that_counts_as_aligned_is_found(machine, monkeypatch):
    whole = table.chunk_table

    def careless(sizes, groups, aligned, chunk):
        return whole(sizes, groups, np.ones_like(aligned), chunk)

    monkeypatch.setattr(table, "chunk_table", careless)
    params = [torch.nn.Parameter(torch.zeros(1 + n)[1:]) for n in (1030, 64)]
    with pytest.raises(EmulatorError, match=r"\w+\.py:\d+.*misaligned 16-byte"):
        check_steps(machine, params=params)


BARRIER = r"\tbar\.sync[^;]*;"


def test_barriers_that_are_left_out_before_an_arrival_are_found(machine):
    """A program that arrives while its own threads have the step count still to read.

    In the PTX, as Triton puts a barrier before such an atomic by itself.
    """

    def edit(text):
        head, atomic, tail = text.partition("atom.")
        return re.sub(BARRIER, "", head) + atomic + tail if "entry update_kernel" in text else text

    with pytest.raises(AssertionError):
        for seed in SEEDS:
            check_steps(machine, seed, edit=edit)


def test_barriers_that_are_left_out_of_a_sum_are_found(machine):
    """Warps add up over shared memory: one that does not wait finds nothing there yet.

    Each of the reduction's barriers is left out in turn, under gradients whose squares float32
    holds and others, which take another path. Triton has more of them than a reduction needs: where
    two follow each other, and where all threads are given a sum of which one makes use.
    """
    params = [torch.nn.Parameter(torch.zeros(2500))]
    barriers = 0

    def norm(scale, seed, left_out=None):
        def edit(text):
            nonlocal barriers
            if "entry reduce_kernel" not in text:
                return text
            parts = re.split(f"({BARRIER})", text)
            barriers = len(parts) // 2
            if left_out is not None:
                del parts[2 * left_out + 1]
            return "".join(parts)

        optimizer = fastsam.SAM(params, torch.optim.SGD, lr=0.1, rho=0.0, backend="triton")
        params[0].grad = torch.linspace(scale, 2 * scale, 2500)
        with compiled_launches.on(machine, seed=seed, edit=edit):
            optimizer.first_step()
        optimizer.restore()
        return float(optimizer.metrics["grad_norm"])

    def is_found(scale, left_out):
        try:
            return any(norm(scale, seed, left_out) != right[scale] for seed in SEEDS)
        except EmulatorError:
            return True

    right = {scale: norm(scale, seed=0) for scale in (1.0, 1e-25)}
    found = [any(is_found(scale, number) for scale in right) for number in range(barriers)]
    assert barriers > 4 and sum(found) >= barriers / 3, found
