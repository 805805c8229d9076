"""Compare fastsam's speed with a plain copy of its bytes and with its peers, in one run.

    python bench/report.py                                 # everything; some minutes on two cores
    python bench/report.py --sections copy --sets resnet50 # a part of it
    python bench/report.py --page                          # write its page, measure nothing

Prints every ratio with its target, and writes NAME.json, NAME-bars.png and NAME-growth.png, where
NAME is "cpu" or the GPU's. A part of the comparison, or a --quick one, which has too few turns to
judge by, is written only where --output names a folder.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from common.options import OneLineParser, number
from common.outputs import align
from common.pages import PAGE, ROOT, link
from speed.contenders import PEERS, SETS, count, parameter_set, peer_names
from speed.measure import describe_hardware, versions
from speed.report_figures import draw_bars, draw_growth, title
from speed.report_page import rewrite
from speed.report_sections import SECTIONS, measure
from speed.report_verdicts import Report, Row, judge, not_measured

OUTPUT = ROOT / "bench" / "results" / "speed"
ROUNDS = {"cpu": 41, "cuda": 5}  # on a GPU each turn is the median of many steps
# compiling a foreach step takes a minute for every set: on a GPU those that a target names
DEFAULT_SETS = {"cpu": list(SETS), "cuda": ["gpt2", "small"]}
QUICK_ROUNDS = 3


def set_name(text: str) -> str:
    """Check the name of a parameter set, for argparse."""
    try:
        parameter_set(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line; a bad option ends the program with status 2."""
    counter = number(int, "an integer of at least 1", lambda v: v >= 1)
    parser = OneLineParser(
        prog="report.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--sections", nargs="+", choices=list(SECTIONS), default=list(SECTIONS), metavar="NAME",
        help=f"any of {', '.join(SECTIONS)} (default: all)")  # fmt: skip
    add("--sets", nargs="+", type=set_name, metavar="NAME",
        help=f"any of {', '.join(SETS)}, uniform:PARAMETERS:TENSORS (default: the named; on a GPU "
        f"{', '.join(DEFAULT_SETS['cuda'])})")  # fmt: skip
    add("--rounds", type=counter, help=f"turns of each contender (default: {ROUNDS['cpu']}; on a "
        f"GPU {ROUNDS['cuda']})")  # fmt: skip
    add("--quick", action="store_true", help=f"{QUICK_ROUNDS} rounds")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="default: %(default)s")
    add("--threads", type=counter, help="CPU threads (default: torch's)")
    add("--output", type=Path, metavar="FOLDER", help="default: bench/results/speed")
    add("--page", type=Path, nargs="?", const=PAGE, metavar="FILE",
        help="write its section on speed from the results in the folder, and measure nothing "
        "(default: docs/performance.md)")  # fmt: skip
    args = parser.parse_args(argv)

    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    elif args.device == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: 'cuda' needs a GPU, torch sees none; use 'auto' or 'cpu'")
    args.sections = [name for name in SECTIONS if name in args.sections]
    args.sets = list(dict.fromkeys(args.sets or DEFAULT_SETS[args.device]))
    whole = args.sections == list(SECTIONS) and set(DEFAULT_SETS[args.device]) <= set(args.sets)
    if args.output is None and (args.page or (whole and not args.quick)):
        args.output = OUTPUT
    default = QUICK_ROUNDS if args.quick else None
    args.host_rounds = args.rounds or default or ROUNDS["cpu"]
    args.rounds = args.rounds or default or ROUNDS[args.device]
    if args.page or args.output is None:
        return args
    if importlib.util.find_spec("matplotlib") is None:
        parser.error("the figures need the package matplotlib: pip install 'fastsam[bench]'")
    try:  # fail now, not after the measurements
        args.output.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=args.output).close()
    except OSError as error:
        parser.error(f"argument --output: must be a folder that can be written, got "
                     f"{str(args.output)!r} ({error.strerror})")  # fmt: skip
    return args


def tabulate(rows: Sequence[Row]) -> str:
    """Return the rows as plain text in columns."""
    return align([["what", "measured", "target", "verdict"], *(row.cells() for row in rows)])


def run(args: argparse.Namespace) -> Report:
    """Take the measurements and judge them."""
    device = torch.device(args.device)
    for name in PEERS.keys() - peer_names():
        print(f"{name} is not installed and left out", file=sys.stderr)
    timings = measure(
        args.sections, args.sets, device, args.rounds, args.host_rounds,
        lambda text: print(text, file=sys.stderr, flush=True),
    )  # fmt: skip
    on_gpu = device.type == "cuda"
    rows = judge(timings, args.sections, args.sets, on_gpu)
    if not on_gpu:
        seen = torch.cuda.is_available()
        rows += not_measured(args.sections, *["not measured: run with --device cuda"] * seen)
    return Report(
        describe_hardware(device), versions(), str(datetime.date.today()), args.rounds, args.quick,
        timings, rows,
    )  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Measure, print the table, write JSON and figures; return the exit status."""
    args = parse(argv)
    if args.page:
        try:
            rewrite(args.page, args.output, link(args.output, args.page))
        except (OSError, ValueError) as error:
            print(f"report.py: error: {error}", file=sys.stderr)
            return 2
        return 0
    if args.threads:
        torch.set_num_threads(args.threads)
    report = run(args)
    sizes = ", ".join(
        f"{name} ({len(shapes)} tensors, {count(shapes):,} parameters)"
        for name, shapes in ((name, parameter_set(name)) for name in args.sets)
    )
    note = "; too few rounds to judge by" if report.quick else ""
    print(f"{title(report)}\n{sizes}; {report.rounds} rounds{note}\n\n{tabulate(report.rows)}\n")
    if args.output is None:
        print("nothing written: --output FOLDER writes results and figures of a part")
        return 0
    written = [args.output / f"{report.name}.json"]
    report.save(written[0])
    for draw, what in ((draw_bars, "bars"), (draw_growth, "growth")):
        path = args.output / f"{report.name}-{what}.png"
        if draw(report, path):
            written.append(path)
    print(f"wrote {', '.join(path.name for path in written)} in {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
