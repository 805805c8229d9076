"""SAM in torch's foreach operators, one function a pass: what ``torch.compile`` is given.

It stands for what a user gets who writes SAM plainly and lets the compiler fuse it. There is no
``zero_grad``, no state dict and no check of anything: only the arithmetic of a step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def _ascend(params: list[Tensor], grads: list[Tensor], backups: list[Tensor], rho: float) -> None:
    norm = torch.stack(torch._foreach_norm(grads)).norm()
    torch._foreach_copy_(backups, params)
    torch._foreach_add_(params, torch._foreach_mul(grads, rho / (norm + 1e-12)))


def _descend_sgd(
    params: list[Tensor], grads: list[Tensor], backups: list[Tensor], buffers: list[Tensor],
    lr: float, momentum: float,
) -> None:  # fmt: skip
    torch._foreach_copy_(params, backups)
    torch._foreach_mul_(buffers, momentum)
    torch._foreach_add_(buffers, grads)
    torch._foreach_add_(params, buffers, alpha=-lr)


def _descend_adamw(
    params: list[Tensor], grads: list[Tensor], backups: list[Tensor], means: list[Tensor],
    squares: list[Tensor], step: Tensor, lr: float, betas: tuple[float, float], eps: float,
    weight_decay: float,
) -> None:  # fmt: skip
    step.add_(1)
    torch._foreach_copy_(params, backups)
    torch._foreach_mul_(params, 1 - lr * weight_decay)
    torch._foreach_lerp_(means, grads, 1 - betas[0])
    torch._foreach_mul_(squares, betas[1])
    torch._foreach_addcmul_(squares, grads, grads, 1 - betas[1])
    roots = torch._foreach_sqrt(squares)
    torch._foreach_div_(roots, (1 - betas[1] ** step).sqrt())
    torch._foreach_add_(roots, eps)
    updates = torch._foreach_div(means, roots)
    torch._foreach_mul_(updates, -lr / (1 - betas[0] ** step))
    torch._foreach_add_(params, updates)


class ForeachSAM:
    """SAM on SGD with momentum or on AdamW, with the usual two passes.

    Args:
        params: Parameters; their gradients are there when a pass begins.
        base: ``"sgd"`` or ``"adamw"``.
        lr, rho, momentum, betas, eps, weight_decay: As in torch, with its defaults.
        compiled: Compile each pass.
    """

    def __init__(
        self,
        params: Sequence[nn.Parameter],
        base: str,
        lr: float,
        rho: float = 0.05,
        momentum: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        compiled: bool = False,
    ):
        self.params, self.base, self.rho = list(params), base, rho
        self.backups = [torch.empty_like(p) for p in self.params]
        self.averages = [torch.zeros_like(p) for p in self.params]  # of the gradients
        self.hyper = (lr, momentum) if base == "sgd" else (lr, betas, eps, weight_decay)
        self.ascend, self.descend = _ascend, _descend_sgd if base == "sgd" else _descend_adamw
        self.more: tuple[list[Tensor] | Tensor, ...] = ()
        if base == "adamw":  # a count on the device: a number would be compiled in at every step
            squares = [torch.zeros_like(p) for p in self.params]
            self.more = squares, torch.zeros((), device=self.params[0].device)
        if compiled:  # for these shapes: a second set would else get kernels for any shape
            self.ascend = torch.compile(self.ascend, dynamic=False)
            self.descend = torch.compile(self.descend, dynamic=False)

    @torch.no_grad()
    def first_step(self) -> None:
        """Copy the weights and perturb them."""
        self.ascend(self.params, [p.grad for p in self.params], self.backups, self.rho)

    @torch.no_grad()
    def second_step(self) -> None:
        """Restore the weights and update them."""
        grads = [p.grad for p in self.params]
        self.descend(self.params, grads, self.backups, self.averages, *self.more, *self.hyper)
