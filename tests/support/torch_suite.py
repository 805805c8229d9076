"""For the checks of torch's optimizer suite: which optimizers they run on, and what they run."""

import copy
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.testing._internal.common_optimizers import OptimizerInfo

import fastsam

from registry import DEVICE
from torch_optimizers import fastsam_db

#: Backends that run everything. Triton's interpreter is too slow for that, and has these classes.
QUICK = ("reference", "torch") + ("triton",) * (DEVICE == "cuda")
INTERPRETED = ("SAM", "SAMAR", "LightSAM")


def cases(interpreted: Iterable[str] = ()) -> Iterator[tuple[OptimizerInfo, str]]:
    """Every class with each backend; AdaGradNorm by itself has none.

    Args:
        interpreted: Classes that Triton's interpreter runs where there is no GPU.
    """
    for entry in fastsam_db:
        more = ("triton",) * (entry.name in interpreted and "triton" not in QUICK)
        for backend in (*QUICK, *more) if entry.step_requires_closure else ["none"]:
            yield entry, backend


def settings(entry: OptimizerInfo, backend: str) -> Iterator[dict[str, Any]]:
    """The keyword arguments of the inputs, with this backend; of two inputs where it is slow."""
    made = entry.optim_inputs_func(device=DEVICE)
    for case in made if backend in (*QUICK, "none") else made[1:3]:
        yield case.kwargs | ({} if backend == "none" else {"backend": backend})


def _name(value: Any) -> str:
    return getattr(value, "name", None) or str(value)


everyone = pytest.mark.parametrize(("info", "backend"), list(cases()), ids=_name)
every_backend = pytest.mark.parametrize(("info", "backend"), list(cases(INTERPRETED)), ids=_name)
each_class = pytest.mark.parametrize("info", fastsam_db, ids=_name)
sharp = pytest.mark.parametrize(
    "info", [entry for entry in fastsam_db if entry.step_requires_closure], ids=_name
)


def equal(x: Any, y: Any, **tolerance: float) -> None:
    """Exactly, unless there is a tolerance."""
    torch.testing.assert_close(x, y, **({"rtol": 0, "atol": 0, "equal_nan": True} | tolerance))


def step(optimizer: torch.optim.Optimizer, closure: Callable[[], Any]) -> Any:
    """Step with a closure. LETS gets another for its validation loss, with other gradients."""
    if not isinstance(optimizer, fastsam.LETS):
        return optimizer.step(closure)

    def val_closure() -> Any:
        loss = closure()
        for group in optimizer.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.grad = 1.5 * p.grad
        return 2 * loss

    return optimizer.step(closure, val_closure)


class Problem:
    """The suite's usual one: the sum of the squares of a linear layer's outputs."""

    def __init__(self, dtype: torch.dtype = torch.float32, contiguous: bool = True):
        shapes = [(10, 5), (10,), (5,)]
        made = [torch.randn(*shape, 2, dtype=dtype, device=DEVICE)[..., 0] for shape in shapes]
        if contiguous:
            made = [x.contiguous() for x in made]
        self.weight, self.bias = map(Parameter, made[:2])
        self.input = made[2]

    @property
    def params(self) -> list[Parameter]:
        return [self.weight, self.bias]

    def copy(self) -> "Problem":
        return copy.deepcopy(self)

    def loss(self) -> Tensor:
        return (self.weight.mv(self.input) + self.bias).square().sum()

    def closure(self) -> Tensor:
        self.weight.grad = self.bias.grad = None
        loss = self.loss()
        loss.backward()
        return loss


def run(optimizer: torch.optim.Optimizer, problem: Problem, steps: int, schedulers: Any = ()):
    for _ in range(steps):
        loss = step(optimizer, problem.closure)
        for scheduler in schedulers:
            if isinstance(scheduler, ReduceLROnPlateau):
                scheduler.step(loss.detach())
            else:
                scheduler.step()
