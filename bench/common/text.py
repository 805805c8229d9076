"""The text of the language study, and the network that reads it.

The text is the documentation that comes with Python, ``pydoc_data.topics``: 79 topics and some 465
thousand characters in Python 3.11; other versions have slightly other ones.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

PARTS = 8  # one topic in eight is for validation, and one for the test
UNKNOWN = 0  # characters that the training text has not


class Text(NamedTuple):
    """Characters as numbers, shape (n,), of the three parts; and how many different ones."""

    training: Tensor
    validation: Tensor
    test: Tensor
    characters: int


def load_text() -> Text:
    """Return the text, split by topics in alphabetical order."""
    from pydoc_data.topics import topics

    parts: list[list[str]] = [[] for _ in range(PARTS)]
    for i, name in enumerate(sorted(topics)):
        parts[i % PARTS].append(topics[name])
    test, validation, *training = ("\n".join(part) for part in parts)
    text = "\n".join(training)
    numbers = {character: i for i, character in enumerate(sorted(set(text)), start=1)}

    def encode(text: str) -> Tensor:
        return torch.tensor([numbers.get(character, UNKNOWN) for character in text])

    return Text(encode(text), encode(validation), encode(test), len(numbers) + 1)


def windows(text: Tensor, length: int, start: int = 0) -> Tensor:
    """Cut windows of ``length`` characters and the one after them, shape (n, length + 1).

    The last character of a window is the first of the next; what is left at the end is dropped.
    """
    return text[start:].unfold(0, length + 1, length)


class Decoder(nn.Module):
    """A decoder-only transformer on characters: 112k parameters at the defaults.

    Args:
        characters: how many different ones.
        length: the longest window, in characters.
        width, layers, heads: of torch's transformer layers, with the norm before each part.
    """

    def __init__(
        self, characters: int, length: int = 64, width: int = 64, layers: int = 2, heads: int = 4
    ):
        super().__init__()
        self.embedding = nn.Embedding(characters, width)
        self.position = nn.Parameter(torch.randn(length, width) * 0.02)
        layer = nn.TransformerEncoderLayer(
            width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True,
            norm_first=True,
        )  # fmt: skip
        self.layers = nn.TransformerEncoder(
            layer, layers, norm=nn.LayerNorm(width), enable_nested_tensor=False
        )
        self.head = nn.Linear(width, characters)
        nn.init.normal_(self.embedding.weight, std=0.02)
        mask = nn.Transformer.generate_square_subsequent_mask(length)
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (batch, length, characters) of the next character at every position."""
        n = x.shape[1]
        hidden = self.embedding(x) + self.position[:n]
        return self.head(self.layers(hidden, mask=self.mask[:n, :n], is_causal=True))
