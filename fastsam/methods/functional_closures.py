"""Closures for :class:`FunctionalSAM` from a model and a loss."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from torch.nn import Module

from fastsam.batch_norm import frozen_batch_norm
from fastsam.derivatives import Derivatives, go_back
from fastsam.step.arguments import Context, shown
from fastsam.step.arguments import context as check_context


def functional_closures(
    model: Callable[..., Any],
    loss_fn: Callable[[Any, Any], Tensor],
    inputs: Any,
    targets: Any,
    *,
    grad_scaler: GradScaler | None = None,
    context: Context | None = None,
) -> tuple[Callable[[], Tensor], Callable[[], None]]:
    """Two closures for a step of :class:`FunctionalSAM`, of which the second computes no loss.

    ::

        loss = optimizer.step(*fastsam.functional_closures(model, loss_fn, x, y))

    The first runs ``loss_fn(model(x), y)`` and ``backward``, and keeps the derivative of the loss
    with respect to the outputs. The second runs the model at the perturbed weights, and
    ``backward`` from its outputs with that derivative. If ``model`` is a ``Module``, the statistics
    of its BatchNorm layers are frozen in the second.

    Args:
        model: Returns the outputs: a tensor, or a list or tuple of tensors, none of which depends
            on another.
        loss_fn: Returns the loss from the outputs and ``targets``.
        inputs: The input of the model: a tuple holds its arguments, a dict its keyword arguments,
            anything else is its one argument.
        targets: The second argument of ``loss_fn``.
        grad_scaler: A :class:`torch.amp.GradScaler` to scale the loss with; give it to ``step``,
            too.
        context: Returns a context manager for forward and loss, as in
            ``lambda: torch.autocast("cuda", torch.bfloat16)``. Default None.

    Returns:
        The closures.

    Raises:
        TypeError: If ``model`` or ``loss_fn`` is no function, or ``context`` gives no context.

    Example:
        >>> optimizer = fastsam.FunctionalSAM(model.parameters(), torch.optim.AdamW, lr=1e-3)
        >>> closures = fastsam.functional_closures(model, loss_fn, inputs, labels)
        >>> loss = optimizer.step(*closures)
    """
    for name, function in (("model", model), ("loss_fn", loss_fn)):
        if not callable(function):
            raise TypeError(f"{name} must be callable, got {shown(function)}")
    around = check_context("context", context) or nullcontext
    kept = Derivatives("functional_closures")

    def outputs() -> Any:
        if isinstance(inputs, tuple):
            return model(*inputs)
        return model(**inputs) if isinstance(inputs, Mapping) else model(inputs)

    def first() -> Tensor:
        kept.forget()
        with around():
            found = outputs()
            kept.mark(found, second=False)
            loss = loss_fn(found, targets)
        scaled: Tensor = loss if grad_scaler is None else grad_scaler.scale(loss)
        scaled.backward()  # type: ignore[no-untyped-call]
        kept.close()
        return loss

    def second() -> None:
        kept.begin_again()
        frozen = frozen_batch_norm(model) if isinstance(model, Module) else nullcontext()
        with frozen:
            with around():
                found = outputs()
            kept.mark(found, second=True)
            go_back(found)
        kept.check_all_used()
        kept.forget()

    return first, second
