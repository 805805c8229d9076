"""A small language model: FunctionalSAM on AdamW, in the second half of training.

    python examples/transformer.py

For language models plain SAM is often no better than AdamW; FunctionalSAM is made for them. It
needs the model's outputs: ``optimizer.outputs(logits)``.
"""

import sys
from pydoc_data.topics import topics  # documentation that comes with Python

import torch
import torch.nn.functional as F
from torch import nn

import fastsam

LENGTH, WIDTH = 64, 64


class Model(nn.Module):
    """A decoder-only transformer on bytes."""

    mask: torch.Tensor

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(128, WIDTH)
        self.position = nn.Parameter(0.02 * torch.randn(LENGTH, WIDTH))
        layer = nn.TransformerEncoderLayer(
            WIDTH, 4, 4 * WIDTH, dropout=0.1, batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, 128)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(LENGTH))

    def forward(self, x):
        hidden = self.embedding(x) + self.position
        return self.head(self.layers(hidden, mask=self.mask, is_causal=True))


def main(steps: int = 200) -> float:
    """Train, and return the loss on text that was not trained on, in nats per character."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    text = "\n".join(topics.values()).encode("ascii", "replace")
    data = torch.tensor(list(text), device=device)
    train, test = data[:-20_000], data[-20_000:].unfold(0, LENGTH + 1, LENGTH)
    model = Model().to(device)
    optimizer = fastsam.FunctionalSAM(
        model.parameters(), torch.optim.AdamW, rho=0.02, lr=3e-3, weight_decay=0.1,
        max_grad_norm=1.0,
    )  # fmt: skip
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    radius = fastsam.tail(optimizer, steps, fraction=0.5)  # before that, a step has one pass
    for step in range(steps):
        starts = torch.randint(len(train) - LENGTH - 1, (32, 1), device=device)
        batch = train[starts + torch.arange(LENGTH + 1, device=device)]

        def closure(batch=batch):
            logits = optimizer.outputs(model(batch[:, :-1]))
            loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
            loss.backward()
            return loss

        loss = optimizer.step(closure)
        scheduler.step()
        radius.step()
        if step % 50 == 49:
            print(f"step {step + 1}: loss {loss.item():.3f}")
    model.eval()
    with torch.no_grad():
        logits = model(test[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), test[:, 1:].flatten()).item()
    print(f"loss on other text: {loss:.3f}")
    return loss


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
