"""What the triton backend costs on the host.

    python bench/host_time.py --tensors 161 1000 --rounds 20 --table

takes steps on a GPU, or on ``tests/standin``, which stands for the driver of one: all methods and
torch's AdamW, fused and foreach, in one process and in turns, with launches and uploads as they are
(``speed/host_device.py``). It prints their ratios, or without ``--table`` a JSON line per
measurement. Where there is no GPU

    TRITON_INTERPRET=1 python bench/host_time.py --tensors 161 1000 --rounds 100

takes steps of SAM whose launches do nothing. ``report.py`` runs it so as a child, since the
variable has to be set before Triton is imported; it lets the backend take tensors on a CPU. What a
launch itself costs, and the upload of a table to a GPU, are not in these times.

Beside the step with SGD and with AdamW stand one bare sweep over the gradients' addresses, below
which no step can come that notices a moved gradient, and the step where every pass finds gradients
at new addresses, so that tables are made and uploaded anew.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from speed import host_device
from speed.contenders import Problem, both_passes, build, uniform
from speed.measure import Sample, Timing, alternate, wall_clock

KERNELS = ("perturb_kernel", "reduce_kernel", "update_kernel")
METHODS = ("sam-sgd", "sam-adamw")
STEPS = 10  # in every turn, of a step and of the sweep: caches are as warm for the one as the other
ELEMENTS = 16  # per tensor: the work on the host does not depend on it
SWEEP, STEP, FRESH = "sweep", "step", "step, moved gradients"


class NoLaunch:
    """Stands for a kernel: ``kernel[grid](...)`` counts the launch and does nothing."""

    launches = 0

    def __getitem__(self, grid: Any) -> NoLaunch:
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        NoLaunch.launches += 1

    def warmup(self, *args: Any, **kwargs: Any) -> None:
        """What compiles a kernel before its first launch."""


def stub_launches() -> None:
    """Put :class:`NoLaunch` in the place of the triton backend's kernels, for good."""
    import fastsam.backends.triton.backend as backend

    for name in KERNELS:
        if not hasattr(backend, name):
            raise RuntimeError(f"fastsam.backends.triton has no {name} whose launch could be left "
                               "out; bench/host_time.py has to follow its change")  # fmt: skip
        setattr(backend, name, NoLaunch())


def moving_gradients(
    optimizer: Any, params: Sequence[nn.Parameter], grads: Sequence[Tensor]
) -> Sample:
    """Time a step whose passes find their gradients at other addresses than any pass before.

    Three sets of gradients take turns, so that neither the pass before nor the same pass of the
    step before has seen a pass's set. Setting them is not timed.
    """
    copies = [list(grads), *([grad.clone() for grad in grads] for _ in range(2))]
    turns = itertools.cycle(copies)

    def one_pass(work: Any) -> float:
        for param, grad in zip(params, next(turns), strict=True):
            param.grad = grad
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    def sample(steps: int) -> float:
        passes = (optimizer.first_step, optimizer.second_step)
        return sum(one_pass(work) for _ in range(steps) for work in passes) / steps

    return sample


def measure(tensors: int, rounds: int) -> list[Timing]:
    """Time the sweep and the steps on so many small tensors, in turns; launches are stubbed."""
    problem = Problem(uniform(ELEMENTS * tensors, tensors))
    swept = problem.params()
    samples = {("", SWEEP): wall_clock(lambda: [p.grad.data_ptr() for p in swept])}
    stepped = []
    for method in METHODS:
        params, moving = problem.params(), problem.params()
        stepped += [params, moving]
        optimizer = build(method, params, "triton")
        samples[method, STEP] = wall_clock(both_passes(optimizer))
        optimizer = build(method, moving, "triton")
        samples[method, FRESH] = moving_gradients(optimizer, moving, problem.grads)
    before = NoLaunch.launches
    times = alternate(samples, rounds, steps=STEPS)
    moved = any(not torch.equal(p, q) for params in stepped
                for p, q in zip(params, swept, strict=True))  # fmt: skip
    if moved or NoLaunch.launches == before:
        raise RuntimeError("the step ran something else than the kernels that were left out")
    name, size = f"{tensors} tensors", ELEMENTS * tensors
    return [Timing("host", name, method, contender, tensors, size, 0, taken)
            for (method, contender), taken in times.items()]  # fmt: skip


def measure_in_child(tensors: Sequence[int], rounds: int) -> list[Timing]:
    """Run this file in another process and return what it measured.

    Raises:
        RuntimeError: If it failed; the message is what it said.
    """
    command = [sys.executable, __file__, "--rounds", str(rounds), "--tensors", *map(str, tensors)]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    if run.returncode != 0:
        raise RuntimeError(f"bench/host_time.py failed:\n{run.stderr.strip()}")
    return [Timing.from_json(json.loads(line)) for line in run.stdout.splitlines()]


def main(argv: list[str] | None = None) -> int:
    """Measure and print; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="host_time.py", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--tensors", type=int, nargs="+", default=[161, 1000], metavar="N",
                        help="numbers of tensors (default: 161 1000)")  # fmt: skip
    parser.add_argument("--rounds", type=int, default=100, help="default: %(default)s")
    parser.add_argument("--table", action="store_true", help="print ratios; needs a GPU")
    args = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET") != "1":
        if not torch.cuda.is_available():
            parser.error("the environment must have TRITON_INTERPRET=1 where there is no GPU")
        for tensors in args.tensors:
            show(host_device.measure(tensors, args.rounds, torch.device("cuda")), args.table)
        return 0
    if args.table:
        parser.error("--table needs a GPU, and an environment without TRITON_INTERPRET=1")
    stub_launches()
    for tensors in args.tensors:
        show(measure(tensors, args.rounds))
    return 0


def show(timings: Sequence[Timing], as_table: bool = False) -> None:
    """Print them, by line or as a table."""
    lines = [json.dumps(timing.to_json()) for timing in timings]
    print(host_device.table(timings) if as_table else "\n".join(lines))


if __name__ == "__main__":
    sys.exit(main())
