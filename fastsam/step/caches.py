"""What torch remembers of the weights' values, in regions that may be around a whole step."""

import torch
from torch.nn.utils import parametrize


def forget_weights() -> None:
    """The weights have changed: ``torch.autocast`` has no casts of them, nor ``cached`` results."""
    torch.clear_autocast_cache()
    forget_parametrizations()


def forget_parametrizations() -> None:
    """Let ``torch.nn.utils.parametrize.cached`` compute anew, as each pass needs its own graph."""
    if parametrize._cache:
        parametrize._cache.clear()
