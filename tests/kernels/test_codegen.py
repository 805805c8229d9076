"""The machine code of every kernel variant, for GPUs that need not be there."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton

import fastsam

import codegen
import launches
from compiled.measure import KERNELS, TARGETS
from compiled.variants import variants
from covered_kernels import covering_variants
from registry import COMBINATIONS, DTYPES, LEARNING, OTHERS, create, parameters, torch_dtype

ROOT = Path(__file__).resolve().parents[2]
BROKEN = "tests/support/broken_kernels.py"
needs_interpreter = pytest.mark.skipif(
    not triton.knobs.runtime.interpret, reason="records launches in Triton's interpreter"
)


def run(script: str | Path, *args: str) -> subprocess.CompletedProcess:
    """Run in a process that compiles: this one may interpret."""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT / "bench"), *sys.path])
    jobs = ["--jobs", "1"] * bool(args)  # workers would import torch again, beside other tests
    command = [sys.executable, ROOT / script, *args, *jobs]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


def check_clean(done: subprocess.CompletedProcess) -> None:
    print(done.stdout)
    failures = [line for line in done.stdout.splitlines() if "FAILED" in line]
    assert done.returncode == bool(failures), done.stderr
    if triton.__version__.startswith("3.6."):
        # its ptxas would rather spill 20 bytes than use 116 registers, where float64 is not for
        # speed; and one or two registers of reductions, beside hundreds of bytes that they load
        known = re.compile(
            r"  FAILED (update_kernel adagrad fp64/fp64/fp64 .*: 20 B spilled"
            r"|reduce_kernel (of_both mix unified|of_ascent variance) .*: [48] B spilled)"
        )
        failures = [line for line in failures if not known.fullmatch(line)]
    assert not failures


def test_variants_with_every_pair_of_settings_on_hopper():
    """All of them take ten times as long: that is what ``bench/codegen.py`` is for."""
    chosen = covering_variants()
    done = run("tests/support/covered_kernels.py", "--target", "cuda:90")
    check_clean(done)
    families = {variant.family for variant in variants()}
    assert {variant.family for variant in chosen} == families
    assert "in flight" not in done.stdout  # which takes as long again, and is for --flight
    assert len(chosen) > 80 and all(f"  {variant}: " in done.stdout for variant in chosen)


def test_sample_on_other_targets():
    others = [target for target in TARGETS if target != "cuda:90"]
    done = run("bench/codegen.py", "--summary", "--sample", "16", "--target", *others)
    check_clean(done)
    for target in others:
        assert f"{target}: triton {triton.__version__}, 16 variants" in done.stdout


@pytest.mark.parametrize("target", ["cuda:90", "hip:gfx942"])
def test_a_lost_alignment_hint_is_reported(target):
    done = run(BROKEN, "hint", "--sample", "9", "--target", target)
    assert done.returncode == 1, done.stderr
    streams = re.findall(r" (\w+ (?:load|store)) \d+", done.stdout)
    assert {"param load", "grad load", "backup store", "state2 store"} <= set(streams)
    failures = re.findall(r"FAILED (\w+) .*: (\w+ (?:load|store)) is \d+-bit", done.stdout)
    assert [stream for _, stream in failures] == streams  # none escapes
    assert {kernel for kernel, _ in failures} == set(KERNELS)


FINISH = """
import triton
from triton.compiler import ASTSource
from compiled.measure import TARGETS
from compiled.variants import GROUPS
from fastsam.backends.triton.plan import ascent_sums, descent_sums, hypergradient_sums
from fastsam.kernels.reduce import finish_kernel, segments_kernel
from fastsam.methods.lightsam import LIGHT_NORM
from fastsam.methods.samar import MIX
from fastsam.unified import UNIFIED
from fastsam.methods.vasso import EMA
from fastsam.methods.weighted import DECOUPLED
from fastsam.step.spec import StepSpec

names = finish_kernel.arg_names
types = {"hyper": "*fp32", "scalars": "*fp64", "tasks": "i32"}
signature = {name: types.get(name, "constexpr") for name in names}
groups = [GROUPS[1]]
plain, mixed = StepSpec(groups, UNIFIED, None), StepSpec(groups, UNIFIED, None, descent=MIX)
average, light = StepSpec(groups, EMA, None), StepSpec(groups, LIGHT_NORM, None)
known = StepSpec(groups, UNIFIED, None, descent=DECOUPLED)  # the coefficients, at once
for sums in (ascent_sums(average), ascent_sums(light), ascent_sums(known), descent_sums(plain),
             descent_sums(mixed), descent_sums(known), hypergradient_sums(plain, "diag")):
    constants = {(names.index(k),): v for k, v in sums.constants.items() if k in names}
    for target in TARGETS.values():
        source = ASTSource(finish_kernel, signature, constants, {})
        triton.compile(source, target=target, options={"num_warps": 1, "enable_fp_fusion": True})
signature = {"partials": "*fp64", "ranges": "*i64", "squares": "*fp64", "tasks": "i32"}
for target in TARGETS.values():
    source = ASTSource(segments_kernel, signature, {}, {})
    triton.compile(source, target=target, options={"num_warps": 4})
"""


def test_what_finishes_sums_over_processes_compiles(tmp_path):
    script = tmp_path / "finish.py"  # Triton reads sources: it takes no command line
    script.write_text(FINISH)
    done = run(script)
    assert done.returncode == 0, done.stderr


def test_spilled_registers_are_reported():
    done = run(BROKEN, "registers", "--sample", "6", "--target", "cuda:90")
    assert done.returncode == 1, done.stderr
    assert re.search(r"FAILED update_kernel adam .*: [1-9]\d* B spilled", done.stdout)


def test_what_cannot_be_checked(capsys, monkeypatch):
    assert codegen.main(["--target", "cuda:90", "cuda:1"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "unknown target 'cuda:1'" in err
    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)
    assert codegen.main(["--target", "cuda:90"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "TRITON_INTERPRET" in err


def take_steps(optimizer, params, grads) -> None:
    for _ in range(2):
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        for _ in range(optimizer.ascent_steps):
            optimizer.first_step()
        optimizer.second_step()


@needs_interpreter
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.filterwarnings("ignore:some parameters are float16 or bfloat16")
def test_all_launches_are_known_variants(dtype):
    dtypes = DTYPES[dtype]
    known = set(variants())
    others = [(name, base) for name, method in OTHERS.items() for base in method.bases]
    for method, base in [*COMBINATIONS, *others]:
        params = parameters([torch.ones(3).numpy()], dtypes)
        grads = [torch.ones(3, dtype=torch_dtype(dtypes.grad))]
        optimizer = create(method, params, "triton", base)
        with launches.record(execute=False) as log:
            take_steps(optimizer, params, grads)
        assert log.variants <= known
    for cls in (torch.optim.SGD, torch.optim.AdamW):
        params = parameters([torch.ones(3).numpy()], dtypes)
        optimizer = fastsam.LookSAM(params, cls, lr=0.1, k=2, skip_nonfinite=True, backend="triton")
        grad = torch.ones(3, dtype=torch_dtype(dtypes.grad))
        with launches.record(execute=False) as log:
            take_steps(optimizer, params, [grad])
            optimizer.plain_step()
            params[0].grad = grad.clone()
            optimizer.first_step(zero_grad=True)
            params[0].grad = grad.clone()
            optimizer.second_step()
            params[0].grad = grad.clone()
            optimizer.plain_step()
        assert log.variants <= known
    for method in ("sam", "asam"):
        params = parameters([torch.ones(3).numpy()], dtypes)
        optimizer = create(method, params, "triton", "sgd", ascent_steps=2)
        with launches.record(execute=False) as log:
            take_steps(optimizer, params, [torch.ones(3, dtype=torch_dtype(dtypes.grad))])
        assert log.variants <= known


@needs_interpreter
@pytest.mark.parametrize("hessian", ["diag", "difference"])
def test_all_launches_of_lets_are_known_variants(hessian):
    known = set(variants())
    for method in LEARNING:
        params = parameters([torch.ones(3).numpy()], DTYPES["fp32"])
        lets = fastsam.LETS(create(method, params, "triton"), hessian=hessian)

        def closure(params=params):
            params[0].grad = torch.ones(3)
            return 0.0

        with launches.record(execute=False) as log:
            lets.step(closure, closure)
        assert log.kernels[-1] == "reduce_kernel"
        assert log.variants <= known


@needs_interpreter
def test_misaligned_tensors_launch_the_same_kernels():
    """So a misaligned tensor cannot cost the others their vector path, nor a compilation."""
    logs = []
    for offset in (0, 1):
        params = [torch.nn.Parameter(torch.ones(n + offset)[offset:]) for n in (2051, 64)]
        grads = [torch.ones(n + offset)[offset:] for n in (2051, 64)]
        assert all((x.data_ptr() % 16 == 0) == (offset == 0) for x in (*params, *grads))
        optimizer = fastsam.ASAM(
            params, torch.optim.SGD, lr=0.1, momentum=0.9, max_grad_norm=1.0, backend="triton"
        )
        with launches.record() as log:
            take_steps(optimizer, params, grads)
        logs.append(log)
    aligned, misaligned = logs
    assert [x.variant for x in aligned.launches] == [x.variant for x in misaligned.launches]
    assert [x.grid for x in aligned.launches] == [x.grid for x in misaligned.launches]
