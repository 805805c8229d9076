"""A convolutional network with BatchNorm, on SGD with momentum and a cosine schedule.

    python examples/batch_norm.py

A step has two forward passes, the second at perturbed weights. With ``frozen_batch_norm`` only the
first one updates the running statistics.
"""

import sys

import torch
from sklearn.datasets import load_digits
from torch import nn

import fastsam


def main(epochs: int = 10) -> float:
    """Train, and return the accuracy on the test images in percent."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    x, y = (torch.tensor(part, device=device) for part in load_digits(return_X_y=True))
    x = x.float().view(-1, 1, 8, 8) / 16
    model = nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.Flatten(),
        nn.Linear(64 * 16, 10),
    ).to(device)  # fmt: skip
    loss_fn = nn.CrossEntropyLoss()
    optimizer = fastsam.SAM(
        model.parameters(), torch.optim.SGD, rho=0.1, lr=0.05, momentum=0.9, weight_decay=5e-4,
        descent_context=fastsam.frozen_batch_norm(model),
    )  # fmt: skip
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs)
    for _ in range(epochs):
        model.train()
        for batch in torch.randperm(1400, device=device).split(64):

            def closure(batch=batch):
                loss = loss_fn(model(x[batch]), y[batch])
                loss.backward()
                return loss

            loss = optimizer.step(closure)
        scheduler.step()
        model.eval()  # between steps the weights are not perturbed
        with torch.no_grad():
            accuracy = 100 * (model(x[1400:]).argmax(1) == y[1400:]).float().mean().item()
        print(f"loss {loss.item():.4f}, test accuracy {accuracy:.1f} %")
    return accuracy


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
