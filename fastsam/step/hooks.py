"""Torch's step hooks, around passes that torch does not run them for."""

from typing import Any

from torch.optim import optimizer as torch_optimizer
from torch.optim.optimizer import Optimizer

from .takeover import Guard


def run_own(optimizer: Optimizer, when: str) -> None:
    """Run the global step hooks and the optimizer's, in torch's order; ``"pre"`` or ``"post"``."""
    hooks: tuple[Any, Any]
    if when == "pre":
        hooks = torch_optimizer._global_optimizer_pre_hooks, optimizer._optimizer_step_pre_hooks
    else:
        hooks = optimizer._optimizer_step_post_hooks, torch_optimizer._global_optimizer_post_hooks
    for some in hooks:
        for hook in some.values():
            hook(optimizer, (), {})


def run_of_base(base: Optimizer, when: str) -> None:
    """Run the step hooks of a base whose ``step`` is not called."""
    for one in (base, *getattr(base, "fused_members", ())):
        for hook in getattr(one, f"_optimizer_step_{when}_hooks").values():
            if not isinstance(hook, Guard):
                hook(one, (), {})
