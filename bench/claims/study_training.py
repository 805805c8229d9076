"""Training one network for a study."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

import fastsam

from .study_core import Result, Run
from common.data import Images, flip_labels, load_images, make_model
from train import evaluate, train_epoch

BATCH_SIZE = 64
ON_SGD = {"base_optimizer": torch.optim.SGD}


def make_samar(
    params: Iterable[Tensor], c: float, lam_min: float, lam_max: float, **settings: Any
) -> Any:
    """Build SAMAR with the constants of its rule among the settings; on SGD by default."""
    rule = fastsam.SharpnessRatio(c=c, lam_min=lam_min, lam_max=lam_max)
    return fastsam.SAMAR(params, **{**ON_SGD, **settings}, rule=rule)


def make_samar_trend(
    params: Iterable[Tensor], c: float, fast: float, slow: float, **settings: Any
) -> Any:
    """The same by its rule of two averages."""
    rule = fastsam.SharpnessTrend(c=c, fast=fast, slow=slow)
    return fastsam.SAMAR(params, **{**ON_SGD, **settings}, rule=rule)


def make_lets(
    params: Iterable[Tensor], rho_lr: float, hessian: str, gap_batch: str, **settings: Any
) -> Any:
    """Build LETS around SAM, on SGD by default; ``rho`` in the settings is its first radius.

    ``gap_batch`` is for :func:`step_lets`.
    """
    sam = fastsam.SAM(params, **{**ON_SGD, **settings})
    return fastsam.LETS(sam, rho_lr=rho_lr, hessian=hessian)


# name -> what builds the optimizer from the parameters and the run's settings
METHODS: dict[str, Callable[..., Any]] = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "sam": functools.partial(fastsam.SAM, base_optimizer=torch.optim.SGD),
    "ssam": functools.partial(fastsam.SSAM, base_optimizer=torch.optim.SGD),
    "usam": functools.partial(fastsam.USAM, base_optimizer=torch.optim.SGD),
    "ssam-usam": functools.partial(fastsam.SSAM, base_optimizer=torch.optim.SGD, lam=0.0),
    "unified": functools.partial(fastsam.UnifiedSAM, base_optimizer=torch.optim.SGD),
    "adasam": fastsam.AdaSAM,
    "lightsam-1": functools.partial(fastsam.LightSAM, rule="adagrad_norm"),
    "lightsam-2": functools.partial(fastsam.LightSAM, rule="adagrad"),
    "lightsam-3": functools.partial(fastsam.LightSAM, rule="adam"),
    "vasso": functools.partial(fastsam.VaSSO, base_optimizer=torch.optim.SGD),
    "samar": make_samar,
    "samar-trend": make_samar_trend,
    "lets": make_lets,
}
WATCHED = {"lets": "rho", "samar": "lam", "samar-trend": "lam"}  # the numbers that a method adapts


def step_lets(
    optimizer: fastsam.LETS,
    gap_batch: str,
    closure: Callable[[], Tensor],
    fresh: Callable[[], Tensor],
    validation: Callable[[], Tensor],
) -> None:
    """Take a step of LETS, with the gap measured on the batch that the settings ask for.

    Args:
        optimizer: What is stepped.
        gap_batch: ``"same"`` for the training batch of the step, as published, or ``"fresh"``.
        closure: Computes the loss of that batch and its gradients.
        fresh, validation: The same of another training batch, and of a validation batch.
    """
    calls = 0

    def training_loss() -> Tensor:
        nonlocal calls
        calls += 1
        # the third call is for the radius alone
        return fresh() if calls == 3 and gap_batch == "fresh" else closure()

    optimizer.step(training_loss, validation)


class Stepper:
    """What ``train_epoch`` steps: an optimizer, with a record of one of its metrics.

    Args:
        run: decides which metric is recorded.
        optimizer: what is stepped.
        model: whose gradients are cleared, and whose losses LETS is given.
        training, validation: the images of those losses; used by LETS only.
    """

    def __init__(
        self, run: Run, optimizer: Any, model: nn.Module, training: Images,
        validation: Images | None,
    ):  # fmt: skip
        self.run, self.optimizer, self.model = run, optimizer, model
        self.training, self.validation = training, validation
        self.order = torch.Generator().manual_seed(run.seed)
        self.metric = WATCHED.get(run.method)
        self.record: list[Tensor] = []

    def zero_grad(self) -> None:
        self.model.zero_grad()

    def step(self, closure: Callable[[], Tensor]) -> None:
        if self.run.method == "lets":
            self._step_lets(closure)
        else:
            self.optimizer.step(closure)
        if self.metric:
            self.record.append(self.optimizer.metrics[self.metric].clone())

    def _step_lets(self, closure: Callable[[], Tensor]) -> None:
        step_lets(
            self.optimizer, self.run.settings["gap_batch"], closure,
            lambda: self._loss_of_batch(self.training),
            lambda: self._loss_of_batch(self.validation),
        )  # fmt: skip

    def _loss_of_batch(self, images: Images | None) -> Tensor:
        """Return the loss of a random batch, with its gradients in place."""
        assert images is not None
        x, y = images
        batch = torch.randperm(len(y), generator=self.order)[:BATCH_SIZE].to(y.device)
        self.zero_grad()
        loss = F.cross_entropy(self.model(x[batch]), y[batch])
        loss.backward()
        return loss

    def mean_of_epoch(self) -> float:
        """Return the mean of the metric since the last call."""
        mean = torch.stack(self.record).mean().item()
        self.record.clear()
        return mean


@functools.lru_cache(maxsize=2)  # once a process
def load(name: str, device: str) -> tuple[Images, Images]:
    return load_images(name, torch.device(device))


def split(train_set: Images, clean: Tensor, share: float) -> tuple[Images, Images]:
    """Return a training and a validation part, by a fixed split stratified by the true labels."""
    parts = train_test_split(
        np.arange(len(clean)), test_size=share, stratify=clean.cpu(), random_state=1
    )
    first, second = (torch.from_numpy(part).to(clean.device) for part in parts)
    return Images(*(t[first] for t in train_set)), Images(*(t[second] for t in train_set))


def train_network(run: Run) -> Result:
    """Train one network. At a given seed every method gets the same weights, labels and batches.

    A share of ``validation`` is taken from the training images, wrong labels included: a user has
    no cleaner ones. The test images are only ever used to measure the accuracy reported.
    """
    full, test = load(run.data, run.device)
    torch.manual_seed(run.seed)
    model = make_model(full.x.shape[-1]).to(run.device)
    generator = torch.Generator().manual_seed(run.seed)
    train_set = full._replace(y=flip_labels(full.y, run.label_noise, generator))
    validation = None
    if run.validation:
        train_set, validation = split(train_set, full.y, run.validation)
    optimizer = METHODS[run.method](model.parameters(), **run.settings)
    stepper = Stepper(run, optimizer, model, train_set, validation)
    schedule = None
    if run.cosine:
        schedule = CosineAnnealingLR(optimizer, T_max=run.epochs)
    trace = [float(run.settings[stepper.metric])] if stepper.metric else []
    seconds = 0.0
    for epoch in range(1, run.epochs + 1):
        seconds += train_epoch(model, stepper, train_set, BATCH_SIZE, generator)
        if schedule:
            schedule.step()
        if stepper.metric:
            trace.append(stepper.mean_of_epoch())
        loss, _ = evaluate(model, train_set)
        if not math.isfinite(loss):
            nothing = {"train_loss": math.nan, "test_accuracy_percent": math.nan}
            return Result(run, {"epochs_done": epoch, **nothing}, True, seconds, tuple(trace))
    measured = {
        "epochs_done": run.epochs,
        "train_loss": loss,
        "test_accuracy_percent": evaluate(model, test)[1],
    }
    if validation:
        measured["validation_accuracy_percent"] = evaluate(model, validation)[1]
    return Result(run, measured, False, seconds, tuple(trace))
