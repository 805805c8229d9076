"""SAM-ON, which perturbs the normalization layers alone, against SAM.

Müller et al. (NeurIPS 2023, arXiv 2306.04226; CIFAR, ImageNet) find SAM-ON better than SAM on
networks with BatchNorm and at least as good on those with LayerNorm, with radii several times as
large. Here two small networks learn the images: a convolutional one with BatchNorm, and one of
linear layers with LayerNorm; a share of the training labels is wrong, as clean digits tell no
methods apart. BatchNorm's statistics are frozen in the second pass, for every method. What the
optimizer takes of a step is its wall-clock time less that of its closures.

The radii were extended once, by two doublings each. In a first run, up to 0.4 (SAM), 0.8 (SAM-ON)
and 4 (ASAM-ON), every method's best radius was the largest; ASAM-ON less SAM was -0.17 ± 0.39
points of accuracy with BatchNorm and -0.33 ± 0.19 with LayerNorm.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

import fastsam

from .study_core import (
    Result,
    Run,
    Size,
    Study,
    Verdict,
    accuracy,
    accuracy_cell,
    best_radii,
    compare,
    diverged,
    group,
    mean_accuracy,
    plot_radii,
    radius_cell,
)
from .study_training import BATCH_SIZE, load
from common.data import CLASSES, flip_labels
from common.outputs import align, mean_std
from train import SGD, evaluate, train_epoch

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NETWORKS = ("batch", "layer")
RADII = {
    "sgd": (),
    "sam": (0.05, 0.1, 0.2, 0.4, 0.8, 1.6),
    "sam-on": (0.1, 0.2, 0.4, 0.8, 1.6, 3.2),
    "asam-on": (0.5, 1.0, 2.0, 4.0, 8.0, 16.0),
}
CLAIMS = {
    "batch": "SAM-ON is more accurate than SAM on a network with BatchNorm.",
    "layer": "SAM-ON is at least as accurate as SAM on a network with LayerNorm.",
}


def make_network(kind: str, size: int) -> nn.Sequential:
    """Return a network for size x size images.

    At 8x8 the one with BatchNorm has 26k parameters, 224 of them in its norms; the other 43k, 768.
    """
    if kind == "layer":
        widths = [size * size, 128, 128, 128]
        layers: list[nn.Module] = [nn.Flatten()]
        for before, after in zip(widths, widths[1:], strict=False):
            layers += [nn.Linear(before, after), nn.LayerNorm(after), nn.ReLU()]
        return nn.Sequential(*layers, nn.Linear(widths[-1], CLASSES))
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.Flatten(),
        nn.Linear(64 * (size // 4) ** 2, CLASSES),
    )  # fmt: skip


def make_optimizer(method: str, model: nn.Module, settings: dict[str, Any]) -> Any:
    if method == "sgd":
        return torch.optim.SGD(model.parameters(), **settings)
    cls = fastsam.ASAM if method == "asam-on" else fastsam.SAM
    params = model.parameters() if method == "sam" else fastsam.normalization_groups(model)
    frozen = fastsam.frozen_batch_norm(model)
    return cls(params, torch.optim.SGD, descent_context=frozen, **settings)


class Timed:
    """What ``train_epoch`` steps: an optimizer, with the time that its steps take less closures."""

    def __init__(self, optimizer: Any):
        self.optimizer = optimizer
        self.zero_grad = optimizer.zero_grad
        self.seconds: list[float] = []

    def step(self, closure: Callable[[], Tensor]) -> None:
        inside = 0.0

        def timed() -> Tensor:
            nonlocal inside
            start = time.perf_counter()
            loss = closure()
            inside += time.perf_counter() - start
            return loss

        start = time.perf_counter()
        self.optimizer.step(timed)
        self.seconds.append(time.perf_counter() - start - inside)


def train_network(run: Run) -> Result:
    """Train one network, of the kind in the settings, as ``study_training`` does."""
    settings = dict(run.settings)
    train_set, test = load(run.data, run.device)
    torch.manual_seed(run.seed)
    model = make_network(settings.pop("network"), train_set.x.shape[-1]).to(run.device)
    generator = torch.Generator().manual_seed(run.seed)
    train_set = train_set._replace(y=flip_labels(train_set.y, run.label_noise, generator))
    optimizer = Timed(make_optimizer(run.method, model, settings))
    schedule = CosineAnnealingLR(optimizer.optimizer, T_max=run.epochs)
    seconds = 0.0
    for _ in range(run.epochs):
        seconds += train_epoch(model, optimizer, train_set, BATCH_SIZE, generator)
        schedule.step()
    model.eval()
    loss, _ = evaluate(model, train_set)
    measured = {
        "epochs_done": run.epochs,
        "train_loss": loss,
        "test_accuracy_percent": evaluate(model, test)[1],
        "optimizer_us": 1e6 * statistics.median(optimizer.seconds),
    }
    return Result(run, measured, not math.isfinite(loss), seconds)


def make_runs(size: Size) -> list[Run]:
    return [
        Run(method, {"network": network, **SGD, **radius}, seed, size.epochs, size.data,
            size.label_noise, cosine=True, device=size.device)
        for network in NETWORKS
        for method, radii in RADII.items()
        for radius in [{"rho": rho} for rho in radii] or [{}]
        for seed in range(size.seeds)
    ]  # fmt: skip


def tabulate(results: list[Result]) -> str:
    lines = [["norm", "method", "rho", "test accuracy (%)", "optimizer (µs a step)", "diverged"]]
    for (network, method, rho), runs in group(results, "network", "method", "rho").items():
        times = mean_std([r.measured["optimizer_us"] for r in runs], 0)
        lines.append(
            [network, method, radius_cell(rho), accuracy_cell(runs), times, diverged(runs)]
        )
    return align(lines)


def judge(results: list[Result]) -> list[Verdict]:
    """Each method stands at the radius of its highest mean accuracy; SAM-ON as the better of its
    two forms, plain and ASAM's element-wise one. It is above (below) SAM where the mean over the
    seeds of the difference is above (below) its standard error. With BatchNorm reproduced if above,
    partly if neither above nor below, else not; with LayerNorm reproduced if not below, else not.
    """
    verdicts = []
    for network, runs in group(results, "network").items():
        best = best_radii(runs, mean_accuracy, "method")
        form = max(("sam-on", "asam-on"), key=lambda name: mean_accuracy(best[name]))
        gap = compare(best[form], best["sam"])
        outcome = "not reproduced" if gap.lower else "reproduced"
        if network == "batch" and not gap.lower and not gap.higher:
            outcome = "partly reproduced"
        radius, other = (best[name][0].get("rho") for name in (form, "sam"))
        evidence = (
            f"{form} at rho {radius:g}, SAM at {other:g}: {gap} points of accuracy; "
            f"against SGD {compare(best[form], best['sgd'])}."
        )
        verdicts.append(Verdict(CLAIMS[network], outcome, evidence))
    return verdicts


def draw(results: list[Result], figure: Figure) -> None:
    """Draw accuracy against the radius, a panel a network, and SGD's as a band."""
    axes = figure.subplots(1, len(NETWORKS), squeeze=False)[0]
    for axis, (network, runs) in zip(axes, group(results, "network").items(), strict=True):
        for method, own in group(runs, "method").items():
            plot_radii(axis, own, accuracy, label=method)
        axis.set(xlabel="rho (each method's own measure)", ylabel="test accuracy (%)",
                 xscale="log", title=f"{network.capitalize()}Norm")  # fmt: skip
        axis.grid(alpha=0.3)
        axis.legend()


STUDY = Study(
    small=Size("digits", epochs=40, seeds=3, label_noise=0.2),
    full=Size("mnist5k", epochs=60, seeds=5, label_noise=0.2),
    make_runs=make_runs,
    execute=train_network,
    tabulate=tabulate,
    judge=judge,
    draw=draw,
    figure_size=(11.0, 4.5),
)
