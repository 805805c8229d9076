"""LoRA adapters: a frozen network with small trainable matrices.

    python examples/lora.py

The optimizer gets only the adapters, so only they are perturbed, copied and updated. The
cost of its step depends on their size alone. Adapters of peft are used in the same way.
"""

import sys

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import fastsam


class LoRA(nn.Module):
    """A linear layer that is frozen, plus a product of two small matrices that is not."""

    def __init__(self, layer: nn.Linear, rank: int = 4):
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(rank, layer.in_features) / layer.in_features**0.5)
        self.up = nn.Parameter(torch.zeros(layer.out_features, rank))

    def forward(self, x):
        return self.layer(x) + F.linear(F.linear(x, self.down), self.up)


def fit(model, optimizer, x, y, epochs):
    for _ in range(epochs):
        for batch in torch.randperm(len(y), device=y.device).split(64):

            def closure(batch=batch):
                loss = F.cross_entropy(model(x[batch]), y[batch])
                loss.backward()
                return loss

            optimizer.step(closure)


def main(epochs: int = 10) -> tuple[float, float]:
    """Train on even digits, then train adapters on all digits; return both accuracies."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    x, y = (torch.tensor(part, device=device) for part in load_digits(return_X_y=True))
    x = x.float() / 16
    train, test = slice(0, 1400), slice(1400, None)
    first, last = nn.Linear(64, 128), nn.Linear(128, 10)
    model = nn.Sequential(first, nn.ReLU(), last).to(device)
    even = (y[train] % 2 == 0).nonzero().squeeze(1)
    whole = fastsam.SAM(model.parameters(), torch.optim.AdamW, rho=0.05, lr=3e-3)
    fit(model, whole, x[train][even], y[train][even], epochs)

    def accuracy():
        with torch.no_grad():
            return 100 * (model(x[test]).argmax(1) == y[test]).float().mean().item()

    before = accuracy()
    model[0], model[2] = LoRA(first).to(device), LoRA(last).to(device)
    adapters = [p for p in model.parameters() if p.requires_grad]
    optimizer = fastsam.SAM(adapters, torch.optim.AdamW, rho=0.05, lr=1e-2)
    fit(model, optimizer, x[train], y[train], epochs)
    trained = sum(p.numel() for p in adapters)
    total = sum(p.numel() for p in model.parameters())
    print(f"{trained} of {total} parameters trained: {before:.1f} % -> {accuracy():.1f} %")
    return before, accuracy()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
