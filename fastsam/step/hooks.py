"""Torch's step hooks, around passes that torch does not run them for."""

from collections.abc import Callable
from typing import Any

from torch.optim import optimizer as torch_optimizer
from torch.optim.optimizer import Optimizer

from .takeover import Guard


class Observer:
    """A post hook that only looks at what the step measured: it can do so after a replay, too.

    Args:
        look: Is called after every step.
    """

    def __init__(self, look: Callable[[], None]) -> None:
        self.look = look

    def __call__(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self.look()


class Notice:
    """A pre hook of a base: its own step is about to write to the state.

    The steps that fastsam takes in its place do not run it.

    Args:
        tell: Is called before every step.
    """

    def __init__(self, tell: Callable[[], None]) -> None:
        self.tell = tell

    def __call__(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self.tell()


def run_observers(optimizer: Optimizer) -> None:
    """Run the optimizer's observers after a step that ran no Python."""
    for hook in optimizer._optimizer_step_post_hooks.values():
        if isinstance(hook, Observer):
            hook.look()


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
            if not isinstance(hook, (Guard, Notice)):
                hook(one, (), {})
