"""What is flat about what each method finds: the Hessian of a network that is small enough.

A perceptron of 1,210 parameters learns the digits, 20 % of their labels wrong. At its end: the rise
of the training loss within a radius (``fastsam.sharpness``), and of the Hessian of that loss, in
float64 by ``torch.func``, the trace, the largest eigenvalue, the Frobenius norm and a logarithm of
the determinant, sum of log(1 + max(eigenvalue, 0) / 0.001) as most eigenvalues are near 0.
Tahmasebi et al. (ICML 2024, arXiv 2406.03682) derive Trace-, Det- and Frob-SAM from these measures:
each is asked here whether it lowers its own. Batches have 64 images, so noise of the batches is
part of what a method sees.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, hessian
from torch.optim.lr_scheduler import CosineAnnealingLR

import fastsam

from .study_core import (
    CHANCE_ACCURACY,
    Result,
    Run,
    Size,
    Study,
    Verdict,
    accuracy_cell,
    compare,
    difference,
    diverged,
    group,
)
from .study_training import BATCH_SIZE, load
from common.data import CLASSES, flip_labels
from common.outputs import RADIUS, align, mean_std
from train import SGD, evaluate, train_epoch

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HIDDEN = 16
FLOOR = 1e-3  # of what counts as an eigenvalue
#: What is measured at the end, and how a table calls it.
MEASURES = {
    "sharpness": f"rise within {RADIUS}", "hessian_trace": "trace", "largest": "largest eigenvalue",
    "frobenius": "Frobenius norm", "log_det": "log determinant",
}  # fmt: skip
#: Methods with the settings that are tried; of the last three with the measure of their name.
TRIED: dict[str, list[dict[str, float]]] = {
    "sgd": [{}],
    "sam": [{"rho": rho} for rho in (0.05, 0.1, 0.2)],
    "asam": [{"rho": rho} for rho in (0.5, 1.0, 2.0)],
    "trace": [{"rho": 0.01, "weight": weight} for weight in (1.0, 10.0, 100.0)],
    "det": [{"rho": 1.0, "weight": weight} for weight in (1.0, 10.0, 100.0)],
    "frob": [{"rho": 0.005, "weight": weight} for weight in (0.005, 0.05, 0.5)],
}
OWN = {"trace": "hessian_trace", "det": "log_det", "frob": "frobenius"}
METHODS: dict[str, Callable[..., Any]] = {
    "sgd": torch.optim.SGD,
    **{
        name: lambda params, cls=cls, **settings: cls(params, torch.optim.SGD, **settings)
        for name, cls in {
            "sam": fastsam.SAM, "asam": fastsam.ASAM, "trace": fastsam.TraceSAM,
            "det": fastsam.DetSAM, "frob": fastsam.FrobSAM,
        }.items()
    },
}  # fmt: skip


def make_perceptron(size: int) -> nn.Sequential:
    """Return a network with a hidden layer for size x size images."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(size * size, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, CLASSES)
    )


def hessian_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Return the Hessian of the mean loss by all parameters in a row, (p, p), in float64."""
    named = dict(model.named_parameters())
    flat = torch.cat([p.detach().double().flatten() for p in named.values()])
    sizes = [p.numel() for p in named.values()]

    def loss(flat: Tensor) -> Tensor:
        parts = zip(named.items(), flat.split(sizes), strict=True)
        weights = {name: part.view(p.shape) for (name, p), part in parts}
        return F.cross_entropy(functional_call(model, weights, (x.double(),)), y)

    found: Tensor = hessian(loss)(flat)
    return found


def measure(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, float]:
    """Return every measure of the loss around the model's weights."""
    rise = fastsam.sharpness(model, lambda: F.cross_entropy(model(x), y), RADIUS)
    eigenvalues = torch.linalg.eigvalsh(hessian_of(model, x, y))
    return {
        "sharpness": rise.item(),
        "hessian_trace": eigenvalues.sum().item(),
        "largest": eigenvalues.max().item(),
        "frobenius": eigenvalues.square().sum().sqrt().item(),
        "log_det": torch.log1p(eigenvalues.clamp(min=0) / FLOOR).sum().item(),
    }


def train_perceptron(run: Run) -> Result:
    """Train one network, as ``study_training`` does, and measure where it ends."""
    train_set, test = load(run.data, run.device)
    torch.manual_seed(run.seed)
    model = make_perceptron(train_set.x.shape[-1]).to(run.device)
    generator = torch.Generator().manual_seed(run.seed)
    train_set = train_set._replace(y=flip_labels(train_set.y, run.label_noise, generator))
    optimizer = METHODS[run.method](model.parameters(), **run.settings)
    schedule = CosineAnnealingLR(optimizer, T_max=run.epochs)
    seconds = 0.0
    for _ in range(run.epochs):
        seconds += train_epoch(model, optimizer, train_set, BATCH_SIZE, generator)
        schedule.step()
    loss, _ = evaluate(model, train_set)
    if not math.isfinite(loss):
        return Result(run, {"test_accuracy_percent": CHANCE_ACCURACY}, True, seconds)
    measured = {"train_loss": loss, "test_accuracy_percent": evaluate(model, test)[1]}
    return Result(run, measured | measure(model, *train_set), False, seconds)


def make_runs(size: Size) -> list[Run]:
    return [
        Run(method, {**SGD, **settings}, seed, size.epochs, size.data, size.label_noise,
            cosine=True, device=size.device)
        for method, tried in TRIED.items()
        for settings in tried
        for seed in range(size.seeds)
    ]  # fmt: skip


def of(name: str) -> Callable[[Result], float]:
    """What reads a measure; a run that diverged is as sharp as can be."""
    return lambda result: math.inf if result.diverged else result.measured[name]


def tabulate(results: list[Result]) -> str:
    lines = [["method", "rho", "weight", "test accuracy (%)", "training loss", *MEASURES.values(),
              "diverged"]]  # fmt: skip
    for (method, rho, weight), runs in group(results, "method", "rho", "weight").items():
        good = [r.measured for r in runs if not r.diverged]
        cells = [
            mean_std([m[name] for m in good], 3) if good else "-"
            for name in ("train_loss", *MEASURES)
        ]
        settings = ["-" if x is None else f"{x:g}" for x in (rho, weight)]
        lines.append([method, *settings, accuracy_cell(runs), *cells, diverged(runs)])
    return align(lines)


def judge(results: list[Result]) -> list[Verdict]:
    """A measure is lower than SGD's where the mean over the seeds of the difference is below minus
    its standard error; accuracy is lower where that of its difference is. Trace-, Det- and
    Frob-SAM: reproduced if at one of the weights the measure of its name is lower and the accuracy
    is not; partly if the measure is lower, and the accuracy, too; else not. Weights at which a run
    diverged do not count.
    """
    cells = group(results, "method", "rho", "weight")
    (sgd,) = (runs for (method, *_), runs in cells.items() if method == "sgd")
    verdicts = []
    for method, name in OWN.items():
        found, told = 0, []
        for (other, _, weight), runs in cells.items():
            if other != method or any(result.diverged for result in runs):
                continue
            gap, gain = difference(runs, sgd, of(name)), compare(runs, sgd)
            found = max(found, gap.lower + (gap.lower and not gain.lower))
            told.append(f"weight {weight:g}: {gap} of {MEASURES[name]}, {gain} points of accuracy")
        outcome = ("not reproduced", "partly reproduced", "reproduced")[found]
        mean = statistics.fmean(map(of(name), sgd))
        claim = f"{method.capitalize()}-SAM lowers the {MEASURES[name]} of the Hessian."
        verdicts.append(Verdict(claim, outcome, f"SGD's is {mean:.3g}. " + "; ".join(told) + "."))
    return verdicts


def draw(results: list[Result], figure: Figure) -> None:
    """Draw accuracy against each measure: a marker for each setting, a colour for each method."""
    axes = figure.subplots(1, len(MEASURES), sharey=True)
    cells = group(results, "method", "rho", "weight")
    colours = {method: f"C{i}" for i, method in enumerate(TRIED)}
    for axis, (name, title) in zip(axes, MEASURES.items(), strict=True):
        seen = set()
        for (method, *_), runs in cells.items():
            good = [r for r in runs if not r.diverged]
            if good:
                x = np.mean([r.measured[name] for r in good])
                y = np.mean([r.measured["test_accuracy_percent"] for r in good])
                label = None if method in seen else method
                axis.plot(x, y, "o", color=colours[method], label=label)
                seen.add(method)
        axis.set(xlabel=title)
        axis.grid(alpha=0.3)
    axes[0].set(ylabel="test accuracy (%)")
    axes[-1].legend(fontsize=8)


STUDY = Study(
    small=Size("digits", epochs=60, seeds=5, label_noise=0.2),
    full=Size("digits", epochs=200, seeds=10, label_noise=0.2),  # MNIST's Hessian is too large
    make_runs=make_runs,
    execute=train_perceptron,
    tabulate=tabulate,
    judge=judge,
    draw=draw,
    figure_size=(16.0, 4.0),
)
