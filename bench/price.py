"""What does sharpness cost, and what does it give: time against test accuracy, for each method.

    python bench/price.py                     # three tasks, meant for two CPU cores
    python bench/price.py --tasks digits      # one of them
    python bench/price.py --full              # more epochs and seeds, sized for a GPU
    python bench/price.py --page              # write the documents' tables, measure nothing

First come times of steps: medians of turns that all contenders take in one process, split into
forward and backward passes, the optimizer's own, and the rest. Leave the machine alone meanwhile.
Then each contender trains for as many epochs as the base: at three radii, and at further ones while
the best is the lowest or the highest, up to six. Validation data decide which is the best. There it
trains twice more: for the time that the base takes, and for SAM's. Peers (published packages that
are installed, and loops in plain torch) train once more at the best radius of fastsam's own method.
It writes price.txt, price.csv and price.png.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import os
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from common.jobs import execute_all
from common.options import OneLineParser, number
from prices import page
from prices.contenders import CONTENDERS
from prices.measure import Split, Training, time_steps, train
from prices.peers import PEERS, peers_of
from prices.report import (
    Found,
    by_contender,
    draw,
    peers_table,
    radii_table,
    table,
    time_verdicts,
    verdicts,
    write_csv,
)
from prices.tasks import TASKS, Task

MOST_RADII = 6
OUTPUT = Path(__file__).resolve().parent / "results" / "price"


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line; a bad option ends the program with status 2."""
    count = number(int, "an integer of at least 1", lambda v: v >= 1)
    parser = OneLineParser(
        prog="price.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS), metavar="NAME",
        help=f"any of {', '.join(TASKS)} (default: all)")  # fmt: skip
    add("--methods", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS), metavar="NAME",
        help=f"any of {', '.join(CONTENDERS)}, beside base and sam (default: all)")  # fmt: skip
    add("--full", action="store_true", help="more epochs, five seeds: sized for a GPU")
    add("--epochs", type=count, help="of the base and of SAM (default: each task's own)")
    add("--seeds", type=count, help="how many, from 0 (default: 3; with --full 5)")
    add("--rounds", type=count, default=9, help="turns that are timed (default: %(default)s)")
    add("--jobs", type=count, default=2, help="processes of one thread (default: %(default)s)")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="default: %(default)s")
    add("--output", type=Path, default=OUTPUT, help="folder (default: bench/results/price)")
    add("--page", action="store_true", help="write the tables of README.md and docs/choosing.md "
        "from the folder's price.csv, and measure nothing")  # fmt: skip
    args = parser.parse_args(argv)
    if args.page:
        return args
    if args.device == "auto":
        args.device = "cuda" if args.full and torch.cuda.is_available() else "cpu"
    elif args.device == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: 'cuda' needs a GPU, torch sees none; use 'auto' or 'cpu'")
    if args.device == "cuda":
        args.jobs = 1
    args.seeds = args.seeds or (5 if args.full else 3)
    for name in args.tasks:
        for package in TASKS[name].needs:
            if importlib.util.find_spec(package) is None:
                parser.error(f"argument --tasks: {name!r} needs the package {package}; install "
                             "it, or leave the task out")  # fmt: skip
    if importlib.util.find_spec("matplotlib") is None:
        parser.error("the figure needs the package matplotlib: pip install 'fastsam[bench]'")
    try:
        args.output.mkdir(parents=True, exist_ok=True)
        (args.output / "price.csv").touch()  # fail now, not after the training
    except OSError as error:
        parser.error(f"argument --output: must be a folder that can be written, got "
                     f"{str(args.output)!r} ({error.strerror})")  # fmt: skip
    return args


def epochs_of(task: Task, args: argparse.Namespace) -> int:
    """How many epochs the base and SAM train for."""
    return args.epochs or (task.full_epochs if args.full else task.epochs)


def equal_epochs(task: Task, names: list[str], args: argparse.Namespace) -> list[Training]:
    """Every contender at every radius, for as many epochs as the base."""
    return [
        Training(task.name, name, task.radius * multiple, seed, epochs_of(task, args), args.device)
        for name in names
        for multiple in CONTENDERS[name].multiples
        for seed in range(args.seeds)
    ]


def further_radii(task: Task, found: Found, args: argparse.Namespace) -> list[Training]:
    """Half or twice the radii of contenders whose best one is the lowest or highest so far."""
    trainings = []
    for name, radii in by_contender(found.equal_epochs).items():
        best = found.best()[name][0].training.rho
        if name == "base" or len(radii) >= MOST_RADII or min(radii) < best < max(radii):
            continue
        rho = best / 2 if best == min(radii) else 2 * best
        trainings += [
            Training(task.name, name, rho, seed, epochs_of(task, args), args.device)
            for seed in range(args.seeds)
        ]
    return trainings


def equal_time(
    task: Task, times: dict[str, Split], best: dict[str, float], of: str, args: argparse.Namespace
) -> list[Training]:
    """Every contender once more, for as many steps as fit into the time of the one that is ``of``.

    Where that changes their number by less than a hundredth, equal epochs say it all.
    """
    trainings = []
    for name, rho in best.items():
        ratio = times[of].total / times[name].total
        if abs(ratio - 1) >= 0.01:
            trainings += [
                Training(task.name, name, rho, seed, epochs_of(task, args) * ratio, args.device)
                for seed in range(args.seeds)
            ]
    return trainings


def of_peers(
    task: Task, peers: list[str], best: dict[str, float], args: argparse.Namespace
) -> list[Training]:
    """Peers at the best radius of the contender that they are compared with."""
    return [
        Training(task.name, name, best[PEERS[name].like], seed, epochs_of(task, args), args.device)
        for name in peers
        for seed in range(args.seeds)
    ]


def time_all(
    tasks: list[str], names: list[str], args: argparse.Namespace
) -> dict[str, dict[str, Split]]:
    """Time the steps of every contender and peer on every task, in this process alone."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return {
            task: time_steps(task, names + peers_of(names), args.rounds, args.device)
            for task in tqdm(tasks, desc="times of steps", unit="task")
        }
    finally:
        torch.set_num_threads(threads)


def look_at(
    task: Task, times: dict[str, Split], names: list[str], args: argparse.Namespace
) -> Found:
    """Train every contender on a task."""

    def train_all(trainings: list[Training], what: str) -> list:
        with tqdm(total=len(trainings), desc=f"{task.name}, {what}", unit="training") as progress:
            return execute_all(train, trainings, args.jobs, progress)

    first = train_all(equal_epochs(task, names, args), "equal epochs")
    found = Found(task.name, times, first)
    while more := further_radii(task, found, args):
        first = first + train_all(more, "further radii")
        found = Found(task.name, times, first)
    best = {name: outcomes[0].training.rho for name, outcomes in found.best().items()}
    later = [
        train_all(equal_time(task, times, best, of, args), f"the time of {CONTENDERS[of].title}")
        for of in ("base", "sam")
    ]
    others = train_all(of_peers(task, peers_of(names), best, args), "peers")
    return Found(task.name, times, first, *later, others)


def report(found: list[Found], args: argparse.Namespace, minutes: float) -> str:
    """Return tables and verdicts, and what was run where."""
    where = f"{os.cpu_count()} CPU cores, {args.jobs} process(es) of one thread"
    if args.device == "cuda":
        where = torch.cuda.get_device_name()
    parts = [
        f"{args.seeds} seed(s), {minutes:.1f} minutes; {where}, torch {torch.__version__}, "
        f"{datetime.date.today()}"
    ]
    for one in found:
        task = TASKS[one.task]
        parts += [
            f"{task.title}: {epochs_of(task, args)} epoch(s), base {task.base.__name__}",
            table(one), "\n".join(time_verdicts(one) + verdicts(one)), peers_table(one),
            radii_table(one),
        ]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def main(argv: list[str] | None = None) -> int:
    """Run everything, print the tables, write the three files; return the exit status."""
    args = parse(argv)
    if args.page:
        try:
            page.rewrite(args.output / "price.csv")
        except (OSError, ValueError) as error:
            print(f"price.py: error: {error}", file=sys.stderr)
            return 2
        return 0
    names = list(dict.fromkeys(["base", "sam", *args.methods]))
    start = time.perf_counter()
    tasks = list(dict.fromkeys(args.tasks))
    times = time_all(tasks, names, args)
    found = [look_at(TASKS[name], times[name], names, args) for name in tasks]
    text = report(found, args, (time.perf_counter() - start) / 60)
    print(text)
    (args.output / "price.txt").write_text(text, encoding="utf-8")
    write_csv(found, args.output / "price.csv")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5 * len(found), 5.2), layout="constrained")
    draw(found, figure)
    figure.savefig(args.output / "price.png", dpi=110)
    print(f"wrote price.txt, price.csv and price.png in {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
