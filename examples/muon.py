"""Muon for matrices and AdamW for the rest, in one sharpness-aware optimizer.

    python examples/muon.py

The perturbation is one vector over all groups, and its norm is taken over all of them.
"""

import sys

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import fastsam


def main(epochs: int = 5) -> float:
    """Train, and return the accuracy on the test images in percent."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    x, y = (torch.tensor(part, device=device) for part in load_digits(return_X_y=True))
    x = x.float() / 16
    model = nn.Sequential(
        nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
    ).to(device)
    hidden = [model[0].weight, model[2].weight]  # Muon is for matrices inside the network
    others = [p for p in model.parameters() if all(p is not q for q in hidden)]
    groups = [
        {"params": hidden, "base_optimizer": torch.optim.Muon, "lr": 0.02},
        {"params": others, "lr": 3e-3},
    ]
    optimizer = fastsam.SAM(groups, torch.optim.AdamW, rho=0.05, weight_decay=0.01)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs)
    for _ in range(epochs):
        for batch in torch.randperm(1400, device=device).split(64):

            def closure(batch=batch):
                loss = F.cross_entropy(model(x[batch]), y[batch])
                loss.backward()
                return loss

            loss = optimizer.step(closure)
        scheduler.step()
        with torch.no_grad():
            accuracy = 100 * (model(x[1400:]).argmax(1) == y[1400:]).float().mean().item()
        print(f"loss {loss.item():.4f}, test accuracy {accuracy:.1f} %")
    return accuracy


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
