"""Training a small transformer on text for a study."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

import fastsam

from .study_core import Result, Run
from .study_training import WATCHED, make_lets, make_samar, make_samar_trend, step_lets
from common.text import Decoder, Text, load_text, windows

LENGTH = 64  # characters of a window
BATCH_SIZE = 32  # windows
ADAMW = {"lr": 3e-3, "weight_decay": 0.1}
CHANCE = math.log(100)  # nats, about: of some 100 characters, each as likely

ON_ADAMW = {"base_optimizer": torch.optim.AdamW}


def on_normalization(model: nn.Module, **settings: Any) -> fastsam.SAM:
    """SAM-ON: the normalization layers alone are perturbed."""
    return fastsam.SAM(fastsam.normalization_groups(model), torch.optim.AdamW, **settings)


def on_parameters(build: Callable[..., Any], **fixed: Any) -> Callable[..., Any]:
    """What builds an optimizer from the model, by a class that takes its parameters."""

    def make(model: nn.Module, **settings: Any) -> Any:
        return build(model.parameters(), **fixed, **settings)

    return make


# name -> what builds the optimizer from the model and the run's settings
METHODS: dict[str, Callable[..., Any]] = {
    "adamw": on_parameters(torch.optim.AdamW),
    "sam": on_parameters(fastsam.SAM, **ON_ADAMW),
    "asam": on_parameters(fastsam.ASAM, **ON_ADAMW),
    "sam-on": on_normalization,
    "functional": on_parameters(fastsam.FunctionalSAM, **ON_ADAMW),
    "functional-p": on_parameters(fastsam.FunctionalSAM, preconditioned=True, **ON_ADAMW),
    "msam": on_parameters(fastsam.MSAM, **ON_ADAMW),
    "samar": on_parameters(make_samar, **ON_ADAMW),
    "samar-trend": on_parameters(make_samar_trend, **ON_ADAMW),
    "lets": on_parameters(make_lets, **ON_ADAMW),
}
ONE_PASS = ("adamw", "msam")
PASSES = {**dict.fromkeys(ONE_PASS, 1.0), "lets": 4.0}  # a step; the others take two
TRACED = {"lets": 10}  # numbers of the trace for an epoch; of the others one


def test_loss(result: Result) -> float:
    """Return the test loss in nats per character, at most that of chance."""
    return CHANCE if result.diverged else min(result.measured["test_loss"], CHANCE)


@functools.lru_cache(maxsize=1)  # once a process
def load() -> Text:
    return load_text()


def loss_of(model: nn.Module, batch: Tensor, mark: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the mean cross entropy of the next character, in nats.

    ``mark`` is given the logits, and gives them back: FunctionalSAM has to see them.
    """
    logits = mark(model(batch[:, :-1]))
    return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


@torch.no_grad()
def evaluate(model: nn.Module, text: Tensor) -> float:
    """Return the mean loss over all windows of a text, in nats per character."""
    return loss_of(model, windows(text, LENGTH), lambda logits: logits).item()


def train_decoder(run: Run) -> Result:
    """Train one network. At a given seed every method gets the same weights and batches.

    The learning rate falls to 0 along a cosine. The windows of an epoch begin at another character
    in each epoch. LETS is given batches of the validation text, and others of the training text.
    """
    text = load()
    torch.manual_seed(run.seed)
    model = Decoder(text.characters, LENGTH).to(run.device)
    order = torch.Generator().manual_seed(run.seed)
    draws = torch.Generator().manual_seed(run.seed)  # of its own: all methods see the same batches
    training = text.training.to(run.device)
    held_out = windows(text.validation.to(run.device), LENGTH)
    optimizer = METHODS[run.method](model, **run.settings)
    mark = getattr(optimizer, "outputs", lambda logits: logits)
    count = len(windows(training, LENGTH, LENGTH - 1))  # in every epoch, wherever it begins
    schedule = CosineAnnealingLR(optimizer, T_max=run.epochs * math.ceil(count / BATCH_SIZE))
    watched = WATCHED.get(run.method)
    parts = TRACED.get(run.method, 1)
    trace = [float(run.settings[watched])] if watched else []

    def loss_on(batch: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, batch, mark)
        loss.backward()
        return loss

    def loss_of_random(cut: Tensor) -> Tensor:
        chosen = torch.randperm(len(cut), generator=draws)[:BATCH_SIZE]
        return loss_on(cut[chosen.to(run.device)])

    start = time.perf_counter()
    for _ in range(run.epochs):
        seen = []
        shift = int(torch.randint(LENGTH, (1,), generator=order))
        cut = windows(training, LENGTH, shift)[:count]
        for chosen in torch.randperm(count, generator=order).split(BATCH_SIZE):
            batch = cut[chosen.to(run.device)]
            closure = functools.partial(loss_on, batch)
            if run.method == "lets":
                step_lets(
                    optimizer, run.settings["gap_batch"], closure,
                    functools.partial(loss_of_random, cut),
                    functools.partial(loss_of_random, held_out),
                )  # fmt: skip
            else:
                optimizer.step(closure)
            schedule.step()
            if watched:
                seen.append(optimizer.metrics[watched].clone())
        if watched:
            pieces = min(parts, len(seen))
            trace += [part.mean().item() for part in torch.stack(seen).tensor_split(pieces)]
    seconds = time.perf_counter() - start
    measured = {
        "passes": run.epochs * PASSES.get(run.method, 2.0),
        "train_loss": evaluate(model, training[: len(text.test)]),
        "validation_loss": evaluate(model, text.validation.to(run.device)),
        "test_loss": evaluate(model, text.test.to(run.device)),
    }
    if not all(map(math.isfinite, measured.values())):
        return Result(run, {"passes": measured["passes"]}, True, seconds, tuple(trace))
    return Result(run, measured, False, seconds, tuple(trace))
