"""The reference backend: every equation in plain torch, one tensor at a time, to be read.

Any floating dtype; arithmetic in float32, or float64 for float64 tensors; norms in float64. In
float32 and float64 on a CPU the base updates perform torch's own operations in the order of its
for-loop implementations, so that they match ``torch.optim`` bit for bit.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from fastsam.kernels.layout import Scalar

from ..rules import Base, Batch, Group, Step

EPS = 1e-12


def wide(x: Tensor) -> Tensor:
    """``x`` in the dtype of the arithmetic."""
    return x if x.dtype == torch.float64 else x.float()


# --- norms and scalars -----------------------------------------------------------------------


def element_scale(w: Tensor, group: Group) -> Tensor | float:
    """ASAM's ``T = |w| + eta`` in an adaptive group, else 1."""
    return wide(w).abs() + group["eta"] if group["adaptive"] else 1.0


def global_norm(parts: Iterable[Tensor], like: Tensor) -> Tensor:
    """The L2 norm over all tensors, as a 0-dim tensor of the dtype of ``like``."""
    norms = [torch.linalg.vector_norm(part, dtype=like.dtype) for part in parts]
    return torch.stack(norms).square().sum().sqrt()


def scaled_norm(batch: Batch, step: Step, like: Tensor) -> Tensor:
    """``||T g||`` over all groups, at the parameters' present values."""
    return global_norm(
        (
            element_scale(w, step.groups[i]) * wide(g) if step.groups[i]["adaptive"] else g
            for w, g, i in zip(batch.params, batch.grads, batch.groups, strict=True)
        ),
        like,
    )


def radius_per_norm(group: Group, lam: float, norm: Tensor) -> Tensor:
    """``rho (1 - lam + lam / (n + eps))``; 0 where ``n`` is zero or not finite."""
    scale = group["rho"] * (1 - lam + lam / (norm + EPS))
    return torch.where(norm.isfinite() & (norm > 0), scale, 0.0)


def perturbation(w: Tensor, g: Tensor, group: Group, scale: Tensor) -> Tensor:
    """``e = scale T^2 g``, with ``scale`` from :func:`radius_per_norm`."""
    t, g = element_scale(w, group), wide(g)
    # a cast, because two 0-dim tensors would be promoted to the wider of their dtypes
    return torch.where(scale != 0, scale.to(g.dtype) * (t * (t * g)), 0.0)


def descent_scalars(measured: Tensor, plain: Tensor, step: Step, scalars: Tensor) -> None:
    """What follows from the norms of the second gradient, with and without ``T``.

    These are gamma, the coefficient of ``u``, its acceptance and AdaGradNorm's accumulator.
    """
    n = scalars[Scalar.GRAD_NORM]
    gamma = torch.ones_like(n)
    if step.renormalize:
        # n = n~ gives exactly 1, so that SSAM is then SAM bit for bit; so does a non-finite n,
        # where nothing was perturbed and there is no norm to restore
        exact = (n == measured) | ~n.isfinite()
        gamma = torch.where(exact, 1.0, n / (measured + EPS))
    coefficient = gamma
    if step.max_grad_norm is not None:
        clip = step.max_grad_norm / (gamma * plain + 1e-6)
        coefficient = torch.where(clip < 1, gamma * clip, gamma)
    accepted = plain.isfinite() if step.skip_nonfinite else torch.ones_like(plain)
    scalars[Scalar.PERTURBED_GRAD_NORM] = measured
    scalars[Scalar.RENORMALIZATION] = gamma
    scalars[Scalar.COEFFICIENT] = coefficient
    scalars[Scalar.ACCEPTED] = accepted
    scalars[Scalar.SKIPPED] += 1 - scalars[Scalar.ACCEPTED]
    if step.base is not None and step.base.needs_norm:
        squared = torch.where(accepted != 0, (coefficient * plain).square(), 0.0)
        scalars[Scalar.SQUARED_NORMS] += squared


# --- base updates: w and the state change in place --------------------------------------------


def sgd(w: Tensor, u: Tensor, state: dict[str, Tensor], group: Group, fresh: bool) -> None:
    if group["maximize"]:
        u = -u
    if group["weight_decay"] != 0:
        u = u.add(w, alpha=group["weight_decay"])
    if group["momentum"] != 0:
        buffer = state["momentum_buffer"]
        if fresh:  # torch starts with the gradient itself, undampened
            buffer.copy_(u)
        else:
            buffer.mul_(group["momentum"]).add_(u, alpha=1 - group["dampening"])
        u = u.add(buffer, alpha=group["momentum"]) if group["nesterov"] else buffer
    if isinstance(group["lr"], Tensor):
        w.sub_(group["lr"].to(w.dtype) * u)
    else:
        w.add_(u, alpha=-group["lr"])


def advance(state: dict[str, Tensor]) -> Any:
    """Advance and return the step count: a number on a CPU, for torch's own rounding."""
    state["step"] += 1
    return state["step"].item() if state["step"].device.type == "cpu" else state["step"].double()


def narrowed(x: Any, like: Tensor) -> Any:
    """A 0-dim tensor in the dtype of the arithmetic, else two 0-dim tensors would be promoted."""
    return x.to(like.dtype) if isinstance(x, Tensor) else x


def adam(w: Tensor, u: Tensor, state: dict[str, Tensor], group: Group) -> None:
    beta1, beta2 = group["betas"]
    lr = narrowed(group["lr"], w)
    if group["maximize"]:
        u = -u
    if group["weight_decay"] != 0:
        if group["decoupled_weight_decay"]:
            w.mul_(1 - lr * group["weight_decay"])
        else:
            u = u.add(w, alpha=group["weight_decay"])
    step = advance(state)
    state["exp_avg"].lerp_(u, 1 - beta1)
    state["exp_avg_sq"].mul_(beta2).addcmul_(u, u, value=1 - beta2)
    second = state["exp_avg_sq"]
    if group["amsgrad"]:
        second = torch.maximum(state["max_exp_avg_sq"], second, out=state["max_exp_avg_sq"])
    step_size = narrowed(lr / (1 - beta1**step), w)
    correction = narrowed((1 - beta2**step) ** 0.5, w)
    denominator = (second.sqrt() / correction).add_(group["eps"])
    w.add_(-step_size * state["exp_avg"] / denominator)


def adagrad(w: Tensor, u: Tensor, state: dict[str, Tensor], group: Group) -> None:
    if group["maximize"]:
        u = -u
    if group["weight_decay"] != 0:
        u = u.add(w, alpha=group["weight_decay"])
    step = advance(state)
    state["sum"].addcmul_(u, u)
    step_size = narrowed(group["lr"] / (1 + (step - 1) * group["lr_decay"]), w)
    w.add_(-step_size * u / state["sum"].sqrt().add_(group["eps"]))


def adagrad_norm(w: Tensor, u: Tensor, group: Group, squared_norms: Tensor) -> None:
    # nothing has been accumulated while it is 0: every gradient so far was zero
    scale = torch.where(squared_norms == 0, 0.0, group["lr"] / squared_norms.sqrt())
    w.add_((scale if group["maximize"] else -scale).to(w.dtype) * u)


def base_update(
    base: Base, w: Tensor, u: Tensor, state: dict[str, Tensor], group: Group, fresh: bool,
    squared_norms: Tensor,
) -> None:  # fmt: skip
    if base.name == "sgd":
        sgd(w, u, state, group, fresh)
    elif base.name == "adam":
        adam(w, u, state, group)
    elif base.name == "adagrad":
        adagrad(w, u, state, group)
    else:
        adagrad_norm(w, u, group, squared_norms)


# --- the backend -----------------------------------------------------------------------------


class ListBackup:
    """Copies of the weights, one tensor each."""

    def __init__(self) -> None:
        self.copies: dict[Tensor, Tensor] = {}

    def restore(self) -> None:
        for param, copy in self.copies.items():
            param.copy_(copy)


def update_one(
    batch: Batch, k: int, backup: ListBackup | None, step: Step, scalars: Tensor
) -> None:
    """Restore parameter ``k`` of the batch and apply the base update to it."""
    assert step.base is not None
    param, group, stored = batch.params[k], step.groups[batch.groups[k]], batch.states[k]
    before = param if backup is None else backup.copies.get(param, param)
    w = wide(before).clone()
    u = wide(batch.grads[k])
    if step.rescales:
        u = scalars[Scalar.COEFFICIENT].to(u.dtype) * u
    names = step.base.states(group)
    state = {name: wide(stored[name]).clone() for name in names}
    if step.base.counts_steps:
        state["step"] = stored["step"].clone()
    base_update(step.base, w, u, state, group, batch.fresh[k], scalars[Scalar.SQUARED_NORMS])
    if step.skip_nonfinite:
        accepted = scalars[Scalar.ACCEPTED] != 0
        w = torch.where(accepted, w, wide(before))
        for name, new in state.items():
            state[name] = torch.where(accepted, new, wide(stored[name]))
    param.copy_(w)
    for name, new in state.items():
        stored[name].copy_(new)


def rescale_grads(batch: Batch, scalars: Tensor) -> None:
    """Leave ``u`` in ``.grad`` for a foreign base optimizer."""
    for param, grad in zip(batch.params, batch.grads, strict=True):
        coefficient = scalars[Scalar.COEFFICIENT].to(grad.dtype)
        if torch._debug_has_internal_overlap(grad):  # expanded: cannot be written in place
            param.grad = coefficient * grad
        else:
            grad.mul_(coefficient)


class ReferenceBackend:
    """See the module's docstring."""

    def ascend(self, batch: Batch, step: Step, scalars: Tensor) -> ListBackup:
        scalars[Scalar.GRAD_NORM] = scaled_norm(batch, step, like=scalars)
        backup = ListBackup()
        try:
            # all copies come first: two parameters may be views of the same memory
            backup.copies = {w: w.detach().clone() for w in batch.params}
            for w, g, i in zip(batch.params, batch.grads, batch.groups, strict=True):
                scale = radius_per_norm(step.groups[i], step.lam, scalars[Scalar.GRAD_NORM])
                w.copy_(wide(w) + perturbation(w, g, step.groups[i], scale))
        except BaseException:
            backup.restore()
            raise
        return backup

    def descend(self, batch: Batch, backup: ListBackup | None, step: Step, scalars: Tensor) -> None:
        if step.needs_descent_norm:
            measured = plain = global_norm(batch.grads, like=scalars)
            if step.adaptive and step.renormalize:
                measured = scaled_norm(batch, step, like=scalars)
            descent_scalars(measured, plain, step, scalars)
        if backup is not None:
            updated = set(batch.params) if step.base is not None else set()
            for param, copy in backup.copies.items():
                if param not in updated:
                    param.copy_(copy)
        if step.base is None:
            if step.rescales:
                rescale_grads(batch, scalars)
            return
        for k in range(len(batch.params)):
            update_one(batch, k, backup, step, scalars)
