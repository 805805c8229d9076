"""40 % of the training labels are wrong: SGD learns them by heart, SAM much less.

python examples/noisy_labels.py
"""

import sys
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import fastsam

SGD: dict[str, Any] = {"lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4}


def train(make, epochs: int) -> float:
    """Train one network, and return the accuracy on the test images in percent."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    x, y = (torch.tensor(part, device=device) for part in load_digits(return_X_y=True))
    x = x.float().view(-1, 1, 8, 8)
    x = (x - x.mean()) / x.std()
    order = torch.randperm(len(y), device=device)
    train, test = order[:1200], order[1200:]
    labels = y.clone()
    wrong = train[: int(0.4 * len(train))]
    labels[wrong] = (labels[wrong] + torch.randint(1, 10, wrong.shape, device=device)) % 10

    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64 * 4, 10),
    ).to(device)  # fmt: skip
    optimizer = make(model.parameters())
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs)
    for _ in range(epochs):
        for batch in train[torch.randperm(len(train), device=device)].split(64):

            def closure(batch=batch):
                optimizer.zero_grad()  # torch's optimizers need this; fastsam's do it themselves
                loss = F.cross_entropy(model(x[batch]), labels[batch])
                loss.backward()
                return loss

            optimizer.step(closure)
        scheduler.step()
    with torch.no_grad():
        return 100 * (model(x[test]).argmax(1) == y[test]).float().mean().item()


def main(epochs: int = 40) -> dict[str, float]:
    """Train with SGD and with SAM, and return the accuracies."""
    makers = {
        "SGD": lambda params: torch.optim.SGD(params, **SGD),
        "SAM": lambda params: fastsam.SAM(params, torch.optim.SGD, rho=0.2, **SGD),
    }
    found = {name: train(make, epochs) for name, make in makers.items()}
    for name, accuracy in found.items():
        print(f"{name}: {accuracy:.1f} % of the test images")
    return found


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
