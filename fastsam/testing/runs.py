"""Steps of a method on a small problem, and the comparison of two runs."""

import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from fastsam.optimizer import SharpnessAwareOptimizer

#: Gradients of some function of the weights.
Gradient = Callable[[list[Tensor]], list[Tensor]]
#: From the weights before the first step, and their gradients, to those after so many steps.
Formula = Callable[[list[Tensor], Gradient, int], Sequence[Tensor]]
Values = dict[str, Tensor]

#: Shape, layout, and the pass in which there is no gradient, 0 for none.
Tensors = list[tuple[tuple[int, ...], str, int]]
PLAIN: Tensors = [((33,), "", 0), ((3, 5), "", 0), ((), "", 0)]
SMALL: Tensors = [((5, 3), "", 0), ((), "", 0), ((4,), "", 1), ((3,), "", 2)]
LARGE: Tensors = [((4096,), "", 0), ((5, 3), "", 0)]
RAGGED: Tensors = [
    ((1031,), "", 0), ((6, 7), "", 0), ((), "", 0), ((0,), "", 0), ((33,), "misaligned", 0),
    ((4, 6), "transposed", 0), ((5, 3), "gaps", 0), ((8,), "", 1), ((7,), "", 2),
]  # fmt: skip
#: What a few steps may add up to, relative to weights of about 1: 256 roundings, or 1 in bfloat16.
_TOLERANCE: dict[Any, float] = {
    torch.float64: 2.0**-44,
    torch.float32: 2.0**-15,
    torch.bfloat16: 2.0**-7,
}


@dataclass(frozen=True)
class Method:
    cls: type[SharpnessAwareOptimizer]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    formula: Formula | None
    device: torch.device


class _Problem:
    """``size / 8 sum_k sin(<a_k, x> + b_k) + sum_i x_i^4 / 20``, ``x`` being all weights in a row.

    Gradients and curvature are of order 1, for any number of weights.
    """

    def __init__(self, sizes: list[int], device: torch.device):
        def normal(*shape: int) -> Tensor:
            numbers = torch.randn(*shape, generator=generator, dtype=torch.float64)
            return numbers.to(device)

        generator = torch.Generator().manual_seed(1)
        self.sizes, self.size = sizes, sum(sizes)
        self.start = 0.8 * normal(self.size)
        self.a, self.b = 4 * normal(6, self.size) / self.size, 6 * normal(6)

    def gradient(self, weights: list[Tensor]) -> list[Tensor]:
        x = torch.cat([w.reshape(-1) for w in weights])
        g = self.size / 8 * self.a.T @ torch.cos(self.a @ x + self.b) + 0.2 * x**3
        pairs = zip(torch.split(g, self.sizes), weights, strict=True)
        return [part.reshape(w.shape) for part, w in pairs]


def _laid_out(x: Tensor, layout: str) -> Tensor:
    """A copy in an odd place."""
    if layout == "misaligned":
        return x.new_empty(x.numel() + 1)[1:].view(x.shape).copy_(x)
    if layout == "gaps":
        return x.new_empty(*x.shape, 2)[..., 0].copy_(x)
    return x.t().contiguous().t() if layout == "transposed" else x.clone()


class Run:
    """An optimizer with its parameters, and gradients that follow from these alone.

    Args:
        groups: How many. The second has another ``rho`` and ``lr``, and what ``second`` gives.
        reverse: Whether they come in the other order.
        devices: Where the parameters lie, by turns. Default: on the method's device.
        **kwargs: Further arguments of the class.
    """

    def __init__(
        self, method: Method, backend: str, tensors: Tensors = SMALL,
        dtype: torch.dtype = torch.float32, *, groups: int = 2, reverse: bool = False,
        devices: Sequence[torch.device] = (), second: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ):  # fmt: skip
        self.missing = [which for *_, which in tensors]
        self.problem = _Problem([math.prod(shape) for shape, *_ in tensors], method.device)
        self.params, devices = [], devices or [method.device]
        starts = torch.split(self.problem.start, self.problem.sizes)
        for k, (x, (shape, layout, _)) in enumerate(zip(starts, tensors, strict=True)):
            x = x.reshape(shape).to(devices[k % len(devices)], dtype)
            self.params.append(Parameter(_laid_out(x, layout)))
        given: list[dict[str, Any]] = [{"params": self.params[k::groups]} for k in range(groups)]
        given[-1] |= second or {}
        self.optimizer: Any = method.cls(
            given[::-1] if reverse else given, *method.args, backend=backend,
            **{**method.kwargs, **kwargs},
        )  # fmt: skip
        if groups > 1:
            group = self.optimizer.param_groups[0 if reverse else 1]
            group |= {key: group[key] * 0.7 for key in ("rho", "lr") if key in group}

    @torch.no_grad()
    def give(self, which: int, spoil: float | None = None, scaler: Any = None) -> None:
        """Set the gradients of a pass; ``spoil`` takes the place of all if it is 0, else of one."""
        grads = self.problem.gradient([p.to(self.problem.start) for p in self.params])
        if spoil is not None:
            for grad in grads if spoil == 0 else grads[:1]:
                grad.view(-1)[: None if spoil == 0 else 1] = spoil
        for param, grad, missing in zip(self.params, grads, self.missing, strict=True):
            grad = grad.to(param.device, param.dtype)
            grad = grad if scaler is None else scaler.scale(grad)
            param.grad = None if missing == which else grad

    def half(self, which: int, spoil: float | None = None, scaler: Any = None) -> None:
        """The first or the second pass of a step."""
        self.give(which, spoil, scaler)
        passes = self.optimizer.first_step, self.optimizer.second_step
        passes[which - 1](grad_scaler=scaler)

    def steps(self, count: int = 1, scaler: Any = None) -> "Run":
        for _ in range(count):
            self.half(1, scaler=scaler)
            self.half(2, scaler=scaler)
            if scaler is not None:
                scaler.update()
        return self

    def weights(self) -> Values:
        return {f"weight {k}": p.detach().clone() for k, p in enumerate(self.params)}

    def everything(self, counts: bool = True) -> Values:
        """Weights, state and the optimizer's own numbers, its count of steps among them or not."""
        found: dict[str, Any] = dict(self.weights())
        for k, param in enumerate(self.params):
            for name, x in self.optimizer.state.get(param, {}).items():
                found[f"state {name!r} of weight {k}"] = x
        kept = self.optimizer.kept.items()
        found |= {f"kept[{name!r}]": x for name, x in kept if counts or name != "t"}
        return {name: torch.as_tensor(x).detach().clone() for name, x in found.items()}

    def trace(self, steps: int) -> Values:
        """Everything after each of some steps, and the weights between its passes."""
        found: Values = {}
        for step in range(1, steps + 1):
            self.half(1)
            found |= {f"{name} between passes {step}": x for name, x in self.weights().items()}
            self.half(2)
            found |= {f"{name} after step {step}": x for name, x in self.everything().items()}
        return found

    @torch.no_grad()
    def resume(self, other: "Run") -> "Run":
        """Take over another run's weights, and its state dict by way of a file."""
        for param, weight in zip(self.params, other.params, strict=True):
            param.copy_(weight)
        file = io.BytesIO()
        torch.save(other.optimizer.state_dict(), file)
        file.seek(0)
        self.optimizer.load_state_dict(torch.load(file))
        return self


def same(found: Values, expected: Values, what: str, within: torch.dtype | None = None) -> None:
    """Raises AssertionError unless both are the same: bit for bit, or ``within`` rounding."""
    if found.keys() != expected.keys():
        raise AssertionError(f"{what}: {min(found.keys() ^ expected.keys())} is there only once")
    for name, x in expected.items():
        y = found[name].to(x.device)
        if y.shape != x.shape:
            raise AssertionError(f"{what}: {name} has shape {tuple(y.shape)}, not {tuple(x.shape)}")
        # the optimizer's own numbers are in float64, but made of what is not
        dtype = within if x.dtype == torch.float64 else x.dtype
        tolerance = 0.0 if within is None else _TOLERANCE.get(dtype, 0.0)
        bad = ~torch.isclose(y.double(), x.double(), tolerance, tolerance, equal_nan=True)
        if bad.any():
            raise AssertionError(
                f"{what}: {name} is {float(y[bad][0])!r} and should be {float(x[bad][0])!r} "
                f"({int(bad.sum())} of {x.numel()} numbers differ)"
            )
