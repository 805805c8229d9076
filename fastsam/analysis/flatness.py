"""How flat the loss is around given weights: sharpness, and evaluations without side effects."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from fastsam.arithmetic import wide
from fastsam.backends.base import complete
from fastsam.backends.equations import element_scale, perturbation, radius
from fastsam.backends.sums import global_norm, scaled_norm
from fastsam.kernels.layout import Scalar
from fastsam.step.arguments import Integer
from fastsam.step.batch import Batch
from fastsam.step.caches import forget_weights
from fastsam.step.checks import check_tensors
from fastsam.step.group_arguments import COMMON, settle
from fastsam.step.interrupts import uninterrupted
from fastsam.step.scalars import new_scalars
from fastsam.step.spec import StepSpec
from fastsam.unified import UNIFIED

#: What is added to each parameter; None for one that stays.
Offsets = Sequence[Tensor | None]


def sharpness(
    model: nn.Module | Iterable[Tensor],
    loss_closure: Callable[[], Tensor],
    rho: float | Tensor,
    adaptive: bool = False,
    *,
    eta: float = 0.0,
    steps: int = 1,
) -> Tensor:
    r"""How much the loss rises within a radius: at SAM's perturbation, or by a longer search.

    .. math:: s = L(w + e) - L(w), \qquad e = \rho\, \frac{T^2 g}{\|T g\| + 10^{-12}}

    with :math:`T = 1`, or :math:`T = |w| + \eta` element-wise if adaptive: the perturbation of
    :class:`SAM` and :class:`ASAM`, in which :math:`g` is the gradient at :math:`w` and the norm is
    over every element. One step of gradient ascent estimates the largest rise within
    :math:`\|T^{-1} e\| \le \rho`. With more ``steps`` the search continues by projected gradient
    ascent:

    .. math:: e_{k+1} = \Pi\Bigl(e_k + \rho\, \frac{T^2 g_k}{\|T g_k\| + 10^{-12}}\Bigr), \qquad
              s = \max_{1 \le k \le K} L(w + e_k) - L(w)

    where :math:`g_k` is the gradient at :math:`w + e_k`, :math:`e_0 = 0`, :math:`T` is always taken
    at :math:`w`, and :math:`\Pi` scales perturbations that exceed the radius down to it. More
    ``steps`` never give a smaller result. It is a lower bound of the largest rise.

    Afterwards everything is as before, bit for bit, also if the closure raises: weights, ``.grad``,
    ``requires_grad``, training modes, buffers (with BatchNorm's running statistics) and torch's
    random state. But the memory has been written to, so torch refuses a ``backward`` through a
    graph from before. Every evaluation starts from the same buffers, modes and random state, so
    dropout draws the same masks at :math:`w` and at :math:`w + e`.

    Cost: ``steps`` forward and backward passes, one more forward pass, one copy of the weights that
    have a gradient, and as much again for the gradient and for the perturbation. Nothing waits for
    a GPU.

    Args:
        model: The module, or its parameters. Parameters that need no gradient, or that the loss
            does not depend on, are not perturbed. If only parameters are given, buffers and modes
            are not restored. Under ``DistributedDataParallel`` each rank measures the loss of its
            own closure, along its own gradient.
        loss_closure: Computes the loss at the present weights and returns it, a tensor of one
            element. Unlike the closure of ``step`` it does not call ``backward``. It should return
            the same loss for the same weights, so use a fixed batch. It may use
            :class:`torch.autocast`.
        rho: Radius, at least 0; a number or a 0-dim tensor.
        adaptive: Whether to use ASAM's element-wise scale. Default False.
        eta: Added to ``|w|`` in the adaptive scale, at least 0. Default 0; ASAM's is 0.01.
        steps: Number of ascent steps :math:`K`, at least 1. Default 1.

    Returns:
        The rise, a 0-dim tensor on the loss's device, in float32 or in float64 for a float64 loss.
        0 where the gradient is 0, NaN where its norm is not finite. It may be negative.

    Raises:
        TypeError: If ``model`` is not a module or an iterable of tensors, or ``loss_closure`` not
            callable.
        ValueError: If ``rho``, ``eta`` or ``steps`` is out of range, or no parameter needs a
            gradient.
        RuntimeError: If the closure calls ``backward``, or returns anything but a loss that depends
            on the parameters; for sparse or complex gradients, and parameters on several types of
            device.

    Parameters in float16 or bfloat16 are perturbed in float32 and then rounded to their own dtype,
    which loses most of a small perturbation: measure a copy in float32.

    Example:
        >>> rise = fastsam.sharpness(model, lambda: loss_fn(model(inputs), labels), rho=0.05)
        >>> bool(rise > 0)
        True

    Reference: Foret, Kleiner, Mobahi and Neyshabur, "Sharpness-aware minimization for efficiently
    improving generalization", ICLR 2021; Kwon, Kim, Park and Choi, "ASAM", ICML 2021.
    """
    group = {"rho": rho, "adaptive": adaptive, "eta": eta}
    settle(group, COMMON)
    Integer(1)("steps", steps)
    probe = Probe(model, loss_closure, "sharpness")
    before, grads = probe.gradient()
    offsets, norm = ascend(probe.weights(grads), grads, group)
    losses = []
    for _ in range(steps - 1):
        loss, grads = probe.gradient(offsets)
        losses.append(loss)
        weights = probe.weights(grads, offsets)
        moves, _ = ascend(weights, grads, group)
        offsets = project(weights, list(map(add, offsets, moves)), group)
    losses.append(probe.loss(offsets))
    rise = torch.stack(losses).max() - before
    return torch.where(norm.isfinite().to(rise.device), rise, torch.nan)


def ascend(weights: Offsets, grads: Offsets, group: dict[str, Any]) -> tuple[Offsets, Tensor]:
    """SAM's perturbation as the reference backend has it, and the norm that it divides by."""
    present = [
        (w, g) for w, g in zip(weights, grads, strict=True) if w is not None and g is not None
    ]
    batch = Batch([w for w, _ in present], [g for _, g in present], [0] * len(present))
    spec = StepSpec([group], UNIFIED, base=None)
    scalars = new_scalars(batch.params[0].device)
    norm = scalars[Scalar.ASCENT_NORM] = complete(
        scaled_norm(batch.grads, batch, spec, like=scalars)
    )
    scale = radius(spec, group, scalars)
    moved = iter([perturbation(w, g, group, scale) for w, g in present])
    return [None if g is None else next(moved) for g in grads], norm


def project(weights: Offsets, offsets: Offsets, group: dict[str, Any]) -> Offsets:
    """Scale what is outside ``||e / T|| <= rho`` down to that."""
    parts = []
    for w, e in zip(weights, offsets, strict=True):
        if w is not None and e is not None:
            t = element_scale(w, group)
            # where T is 0 so is e
            parts.append(torch.where(t > 0, e / t, 0.0) if isinstance(t, Tensor) else e)
    norm = complete(global_norm(parts, like=new_scalars(parts[0].device)))
    scale = torch.where(norm > group["rho"], group["rho"] / norm, 1.0)
    return [None if e is None else e * scale.to(e) for e in offsets]


def add(x: Tensor | None, y: Tensor | None) -> Tensor | None:
    """The sum of two offsets."""
    if x is None or y is None:
        return y if x is None else x
    return x + y


class Probe:
    """Evaluates a loss at other weights. Each evaluation leaves everything as it found it.

    Args:
        model: A module, or parameters.
        loss_closure: Returns the loss at the present weights.
        name: The public function's, for errors.

    Attributes:
        params: The parameters in the model's order, each once.
    """

    def __init__(
        self, model: nn.Module | Iterable[Tensor], loss_closure: Callable[[], Any], name: str
    ) -> None:
        if not callable(loss_closure):
            raise TypeError(f"loss_closure must be callable, got {loss_closure!r}")
        self._closure, self._name = loss_closure, name
        self.params: list[Tensor] = list(dict.fromkeys(_parameters(model)))
        modules = list(model.modules()) if isinstance(model, nn.Module) else []
        self._modes = [(module, module.training) for module in modules]
        self._buffers = [(m._buffers, dict(m._buffers)) for m in modules]
        self._contents = [
            (x, x.detach().clone())
            for x in dict.fromkeys(b for _, buffers in self._buffers for b in buffers.values())
            if x is not None
        ]
        # for dropout; on a CPU there is one generator, which is always forked
        self._gpus = sorted({p.device.index for p in self.params if p.device.type == "cuda"})
        self._copies: dict[Tensor, Tensor] = {}

    @property
    def trainable(self) -> list[bool]:
        """Which parameters need a gradient.

        Raises:
            ValueError: If none does.
        """
        needed = [p.requires_grad for p in self.params]
        if not any(needed):
            raise ValueError("model must have a parameter that requires grad, and has none")
        return needed

    def weights(self, *present: Offsets) -> list[Tensor | None]:
        """Copies of the weights, where any of the lists has something for them."""
        return [
            self._copy(p) if any(x is not None for x in xs) else None
            for p, *xs in zip(self.params, *present, strict=True)
        ]

    def loss(self, offsets: Offsets) -> Tensor:
        """The loss at ``w + offsets``: 0-dim, float32 or float64, without its graph."""
        with self._at(offsets), torch.no_grad():
            return self._evaluate()[1]

    def gradient(self, offsets: Offsets | None = None) -> tuple[Tensor, list[Tensor | None]]:
        """The loss at ``w + offsets``, and its gradient with respect to every parameter.

        Raises:
            RuntimeError: If it has none, or one that ``check_tensors`` refuses.
        """
        needed = self.trainable
        inputs = [p for p, has in zip(self.params, needed, strict=True) if has]
        with self._at(offsets), torch.enable_grad():
            loss, value = self._evaluate()
            found: Sequence[Tensor | None] = [None] * len(inputs)
            if loss.requires_grad:
                found = torch.autograd.grad(loss, inputs, allow_unused=True)
        if all(grad is None for grad in found):
            raise RuntimeError(
                "loss_closure must return a loss that depends on a parameter of model, with its "
                "graph; this one does not (through .item(), .detach() or torch.no_grad()?)"
            )
        first: list[Tensor] = []
        for param, grad in zip(inputs, found, strict=True):
            if grad is not None:
                check_tensors(param, grad, first, self._name)
                first = first or [param]
        grads = iter(found)
        return value, [next(grads) if has else None for has in needed]

    def _evaluate(self) -> tuple[Tensor, Tensor]:
        """The loss with its graph, and its value: a copy, as the closure may use memory again."""
        value = self._closure()
        if any(p.grad is not None for p in self.params):
            raise RuntimeError(
                "loss_closure must not call backward: it returns the loss, whose gradient is taken "
                "here"
            )
        if isinstance(value, Real):
            value = torch.tensor(float(value), dtype=torch.float64, device="cpu")
        if not (isinstance(value, Tensor) and value.numel() == 1 and value.is_floating_point()):
            raise RuntimeError(
                f"loss_closure must return the loss, a real tensor of one element, got {value!r}"
            )
        loss = value.reshape(())
        return loss, wide(loss).detach().clone()

    def _copy(self, param: Tensor) -> Tensor:
        if param not in self._copies:
            check_tensors(param, param, [], self._name)
            self._copies[param] = param.detach().clone()
        return self._copies[param]

    @contextmanager
    def _at(self, offsets: Offsets | None) -> Iterator[None]:
        """Have the weights at ``w + offsets`` inside the block, and no gradients."""
        pairs = zip(self.params, offsets or (), strict=offsets is not None)
        # all copies come first: two parameters may be views of the same memory
        moved = [(p, self._copy(p), e) for p, e in pairs if e is not None]
        kept = [(p, p.requires_grad, p.grad) for p in self.params]
        try:
            with torch.random.fork_rng(self._gpus, device_type="cuda"):
                with torch.no_grad():
                    for p, w, e in moved:
                        p.copy_(wide(w) + e)
                forget_weights()
                for p in self.params:
                    p.grad = None
                yield
        finally:
            with uninterrupted(insists=True), torch.no_grad():
                for p, w, _ in moved:
                    p.copy_(w)
                forget_weights()
                for p, needed, grad in kept:
                    p.requires_grad_(needed)
                    p.grad = grad
                self._restore_modules()

    def _restore_modules(self) -> None:
        for module, training in self._modes:
            module.training = training
        for buffers, before in self._buffers:
            buffers.clear()  # a module may have put new tensors in their places
            buffers.update(before)
        for x, copy in self._contents:
            x.copy_(copy)


def _parameters(model: Any) -> list[Tensor]:
    if isinstance(model, nn.Module):
        return list(model.parameters())
    if isinstance(model, Tensor) or not isinstance(model, Iterable):
        raise TypeError(
            "model must be a torch.nn.Module or an iterable of parameters, got "
            f"{type(model).__name__}"
        )
    params = list(model)
    for param in params:
        if not isinstance(param, Tensor):
            raise TypeError(
                "model must be a torch.nn.Module or an iterable of parameters, got one of "
                f"{type(param).__name__}"
            )
        if not param.is_leaf:
            raise ValueError(
                "model must have parameters that are leaves of the graph, got the result of an "
                f"operation, of shape {tuple(param.shape)}"
            )
    return params
