"""A complete loop: SAM on AdamW with OneCycleLR, bfloat16, BatchNorm, clipping and checkpoints.

    python examples/complete.py

If you stop it and start it again, it continues after the last complete epoch.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fastsam


def main(epochs: int = 10, *, checkpoint: Path = Path("complete.pt")) -> float:
    """Train, save after each epoch, and return the accuracy on the test images in percent."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    x, y = (torch.tensor(part) for part in load_digits(return_X_y=True))
    x = x.float().view(-1, 1, 8, 8) / 16
    train, test = TensorDataset(x[:1400], y[:1400]), (x[1400:].to(device), y[1400:].to(device))
    loader = DataLoader(train, batch_size=64, shuffle=True, drop_last=True)

    model = nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.Flatten(),
        nn.Linear(64 * 16, 10),
    ).to(device)  # fmt: skip
    loss_fn = nn.CrossEntropyLoss(label_smoothing=0.1)
    optimizer = fastsam.SAM(
        model.parameters(), torch.optim.AdamW, rho=0.1, lr=1e-3, weight_decay=0.01,
        max_grad_norm=1.0,  # clips the gradient of the update
        descent_context=fastsam.frozen_batch_norm(model),  # only the first pass updates statistics
    )  # fmt: skip
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=3e-3, total_steps=epochs * len(loader)
    )
    begun = 0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        scheduler.load_state_dict(saved["scheduler"])  # after the optimizer's
        begun = saved["epoch"]

    for epoch in range(begun, epochs):
        model.train()
        for inputs, labels in loader:
            inputs, labels = inputs.to(device), labels.to(device)

            def closure(inputs=inputs, labels=labels):
                with torch.autocast(device, torch.bfloat16):  # bfloat16 needs no GradScaler
                    loss = loss_fn(model(inputs), labels)
                loss.backward()  # the step zeroes gradients itself
                return loss

            loss = optimizer.step(closure)  # the loss at w
            scheduler.step()
        model.eval()
        with torch.no_grad():
            accuracy = 100 * (model(test[0]).argmax(1) == test[1]).float().mean().item()
        norm = optimizer.metrics["grad_norm"].item()  # waits for the device: once an epoch
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}, norm {norm:.2f}, test {accuracy:.1f} %")
        parts: dict[str, Any] = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
        torch.save(
            {name: part.state_dict() for name, part in parts.items()} | {"epoch": epoch + 1},
            checkpoint,
        )
    return accuracy


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
