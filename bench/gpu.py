"""Check and time fastsam on this machine's GPU, NVIDIA's or AMD's, in at most 12 minutes.

    python bench/gpu.py                     # everything, or what the last call did not finish
    python bench/gpu.py --stages kernels    # a part of it
    python bench/gpu.py --again             # also what is done already
    python bench/gpu.py --rehearse          # small sizes, to see that it runs; no number counts

Each stage is a process of its own with a limit of time, so that a crash loses no other stage. It
writes a JSON file to bench/results/gpu-NAME, with GPU, driver, versions and date. At the end it
draws figures and writes the section on GPUs of docs/performance.md. A stage that is done on the
same GPU, driver, torch and triton is not run again. A rehearsal writes to build/gpu-rehearsal, with
a copy of that page.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from common.options import OneLineParser, number
from common.pages import PAGE, link
from on_gpu.records import DONE, FAILED, ROOT, TIMED_OUT, Record, describe, load_all, slug
from on_gpu.report_page import rewrite
from on_gpu.stages import STAGES, Context

RESULTS = ROOT / "bench" / "results"
REHEARSAL = ROOT / "build" / "gpu-rehearsal"
MINUTES = 12.0
LEAST = 10.0  # seconds that have to be left for another stage to begin
SLOWER = 10  # how much longer a rehearsal may take, which may be on no GPU at all
ONE_STEP = "one-step"  # what the memory checker runs

Say = Callable[[str], None]


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line; a bad option ends the program with status 2."""
    positive = number(float, "a number above 0", lambda v: v > 0)
    parser = OneLineParser(
        prog="gpu.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--stages", nargs="+", choices=list(STAGES), default=list(STAGES), metavar="NAME",
        help=f"any of {', '.join(STAGES)} (default: all)")  # fmt: skip
    add("--minutes", type=positive, default=MINUTES, help="in all (default: %(default)g)")
    add("--again", action="store_true", help="run stages that are done as well")
    add("--rehearse", action="store_true", help="small sizes; nothing is a measurement")
    add("--output", type=Path, metavar="FOLDER", help="default: bench/results/gpu-NAME")
    add("--page", type=Path, default=PAGE, metavar="FILE",
        help="whose section on GPUs is written (default: docs/performance.md)")  # fmt: skip
    add("--python", type=shlex.split, default=[sys.executable], metavar="COMMAND",
        help="what runs a Python script (default: this interpreter)")  # fmt: skip
    add("--run", choices=[*STAGES, ONE_STEP], help=argparse.SUPPRESS)  # in a child
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error("no GPU: torch.cuda.is_available() is False")
    if args.output is not None and not args.output.name.startswith("gpu-"):
        parser.error(f"argument --output: must be a folder whose name begins with gpu-, which the "
                     f"report looks for, got {str(args.output)!r}")  # fmt: skip
    args.stages = [name for name in STAGES if name in args.stages]
    return args


# --- in the parent ---------------------------------------------------------------------------


def conduct(
    args: argparse.Namespace, machine: Mapping[str, Any], run: Callable[..., Record], say: Say,
    clock: Callable[[], float] = time.monotonic,
) -> list[Record]:  # fmt: skip
    """Run the stages that are due, one after another, as long as there is time.

    Args:
        args: Of the command line.
        machine: What it runs on.
        run: Runs one stage: ``(name, seconds)`` to its record.
        say, clock: Print a line, and give the seconds.

    Returns:
        The records of the stages that were run.
    """
    slower = SLOWER if args.rehearse else 1
    end = clock() + 60 * args.minutes * slower
    earlier = load_all(args.output)
    records = []
    for name in args.stages:
        found = earlier.get(name)
        if found is not None and found.status == DONE and not args.again:
            if found.fits(machine) and found.rehearsal == args.rehearse:
                say(f"{name}: done on {found.machine['date']}, at {found.machine['commit']}")
                continue
        left = end - clock()
        if left < LEAST:
            say(f"{name}: no time is left; the next call begins here")
            continue
        limit = min(float(STAGES[name].seconds * slower), left)
        say(f"{name}: {STAGES[name].title}; at most {limit:.0f} s")
        record = run(name, limit)
        records.append(record)
        say(f"{name}: {record.status} in {record.seconds:.0f} s. {record.error}".rstrip())
    return records


def run_stage(args: argparse.Namespace, machine: dict[str, Any], name: str, limit: float) -> Record:
    """Run a stage in a child, and note how it ended."""
    Record(name, machine, args.rehearse).save(args.output)
    command = [*args.python, str(ROOT / "bench" / "gpu.py"), "--run", name]
    command += ["--output", str(args.output), "--python", shlex.join(args.python)]
    command += ["--rehearse"] * args.rehearse
    log = args.output / f"{name}.log"
    start = time.monotonic()
    with log.open("w", encoding="utf-8") as file:
        # a group of its own, which also holds what the stage starts
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            _end(process)
    record = Record.load(args.output / f"{name}.json")
    record.seconds = time.monotonic() - start
    record.status = DONE if status == 0 else TIMED_OUT if status is None else FAILED
    if record.status == FAILED:
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        record.error = lines[-1][:500] if lines else f"status {status}"
    record.save(args.output)
    return record


def _end(process: subprocess.Popen[Any]) -> None:
    """End a child, and what it has started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def report(args: argparse.Namespace, say: Say) -> None:
    """Draw the figures and write the section on GPUs."""
    if find_spec("matplotlib") is None:
        say("no figures: they need the package matplotlib")
    else:
        from on_gpu.figures import draw_all

        for path in draw_all(load_all(args.output), args.output):
            say(f"wrote {path.name}")
    results = args.output.parent
    if args.rehearse:  # its page is a copy, and no other run counts
        args.page = Path(shutil.copy(args.page, args.output))
    rewrite(args.page, results, link(results, args.page), args.rehearse)
    say(f"wrote the section on GPUs of {args.page.name}")


# --- in a child ------------------------------------------------------------------------------


def run_here(args: argparse.Namespace) -> int:
    """Run a stage in this process; its results are on disk at any time."""
    record = None if args.run == ONE_STEP else Record.load(args.output / f"{args.run}.json")

    def add(**result: Any) -> None:
        if record is not None:
            record.results.append(result)
            record.save(args.output)

    def say(text: str) -> None:
        print(text, flush=True)

    context = Context(torch.device("cuda"), args.rehearse, args.output, args.python, add, say)
    try:
        if record is None:
            from on_gpu.checks import one_step

            one_step(context)
        else:
            STAGES[args.run].run(context)
    except Exception as error:
        traceback.print_exc()
        print(f"{type(error).__name__}: {' '.join(str(error).split())}", flush=True)
        return 1
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run what is due and write the report; return the exit status."""
    args = parse(argv)
    if args.run:
        return run_here(args)
    say = partial(print, flush=True)
    machine = describe(torch.device("cuda"))
    if args.output is None:
        args.output = REHEARSAL if args.rehearse else RESULTS / f"gpu-{slug(machine['gpu'])}"
    args.output.mkdir(parents=True, exist_ok=True)
    say(f"{machine['gpu']}; driver {machine['driver']}; torch {machine['torch']}, triton "
        f"{machine['triton']}; results go to {args.output}")  # fmt: skip
    records = conduct(args, machine, partial(run_stage, args, machine), say)
    report(args, say)
    return int(any(record.status != DONE for record in records))


if __name__ == "__main__":
    sys.exit(main())
