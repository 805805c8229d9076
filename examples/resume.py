"""A run that is stopped and resumed ends with the same bits as one that was not.

    python examples/resume.py

The checkpoint has the model, optimizer, schedules and random state. Load them in this order.
"""

import io
import sys
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import fastsam


class Run:
    """A model with everything that belongs to its training."""

    def __init__(self):
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        torch.manual_seed(0)
        x, self.y = (torch.tensor(part).to(self.device) for part in load_digits(return_X_y=True))
        self.x = x.float() / 16
        self.model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Dropout(0.2), nn.Linear(64, 10))
        self.model.to(self.device)
        self.optimizer = fastsam.VaSSO(  # its average of gradients is saved, too
            self.model.parameters(), torch.optim.AdamW, rho=0.1, lr=3e-3, repeat_random=True
        )
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, T_max=100)
        self.radius = fastsam.LambdaRho(self.optimizer, lambda t: min(1.0, (t + 1) / 50))
        self.parts: dict[str, Any] = {"model": self.model, "optimizer": self.optimizer,
                                      "schedule": self.schedule, "radius": self.radius}  # fmt: skip

    def train(self, steps: int) -> None:
        for _ in range(steps):
            batch = torch.randint(len(self.y), (64,)).to(self.device)

            def closure(batch=batch):
                loss = F.cross_entropy(self.model(self.x[batch]), self.y[batch])
                loss.backward()
                return loss

            self.optimizer.step(closure)
            self.schedule.step()
            self.radius.step()

    def save(self, file) -> None:
        saved = {name: part.state_dict() for name, part in self.parts.items()}
        torch.save(saved | {"random": torch.get_rng_state()}, file)

    def load(self, file) -> None:
        saved = torch.load(file, weights_only=True, map_location="cpu")
        for name, part in self.parts.items():
            part.load_state_dict(saved[name])
        torch.set_rng_state(saved["random"])


def main(steps: int = 100) -> bool:
    """Train once without a stop and once with one; return whether the weights are equal."""
    whole = Run()
    whole.train(steps // 2)
    file = io.BytesIO()
    whole.save(file)
    whole.train(steps - steps // 2)
    file.seek(0)
    resumed = Run()
    resumed.load(file)
    resumed.train(steps - steps // 2)
    pairs = zip(whole.model.parameters(), resumed.model.parameters(), strict=True)
    same = all(torch.equal(one, other) for one, other in pairs)
    print("the same bits:", same)
    return same


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
