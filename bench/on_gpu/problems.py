"""Tensors and optimizers to be timed, and the bytes that each of their kernels has to move."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fastsam
from fastsam.kernels.layout import Launches

from speed.contenders import _as_from_backward, uniform

LR = 1e-3
#: Of the free memory, what a problem may take.
SHARE = 0.8
WIDE = 4  # bytes of what is in float32 whatever the weights are
Streams = Mapping[str, int]


class Case(NamedTuple):
    """A method to be timed kernel by kernel.

    Attributes:
        label: For people.
        make: ``(params)`` to the optimizer.
        streams: By kernel, how often an element of each kind is read or written: ``P`` of a
            parameter, ``G`` of a gradient, ``S`` of a state in the parameter's dtype, ``W`` of one
            in float32.
        held: The same for what lies in memory.
        keeps_first: Whether the second pass reads the first gradients, too.
    """

    label: str
    make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]
    streams: dict[str, Streams]
    held: Streams
    keeps_first: bool = False

    def bytes_of(self, kernel: str, dtype: torch.dtype, scratch: bool) -> int:
        """What a kernel has to move per element.

        ``scratch`` says whether the perturbed weights had memory of their own: then nothing is
        backed up.
        """
        moved = _bytes(self.streams[kernel], dtype)
        return moved - dtype.itemsize * (scratch and kernel == "perturb")


def _bytes(streams: Streams, dtype: torch.dtype) -> int:
    sizes = {"P": dtype.itemsize, "G": dtype.itemsize, "S": dtype.itemsize, "W": WIDE}
    return sum(count * sizes[kind] for kind, count in streams.items())


def _with(cls: Any, base: Any, **kwargs: Any) -> Callable[[list[nn.Parameter]], Any]:
    return lambda params: cls(params, base, lr=LR, backend="triton", **kwargs)


def _lightsam(params: list[nn.Parameter]) -> Any:
    return fastsam.LightSAM(params, lr=LR, rho=LR, rule="adam", backend="triton")


SGD, ADAMW = torch.optim.SGD, torch.optim.AdamW
REDUCE, PERTURB = {"G": 1}, {"P": 3, "G": 1}
OF_SGD, OF_ADAMW = {"P": 2, "G": 1, "S": 2}, {"P": 2, "G": 1, "S": 4}
CASES = {
    "sam-sgd": Case(
        "SAM + SGD", _with(fastsam.SAM, SGD, momentum=0.9),
        {"reduce": REDUCE, "perturb": PERTURB, "update": OF_SGD}, {"P": 2, "G": 1, "S": 1},
    ),
    "sam-adamw": Case(
        "SAM + AdamW", _with(fastsam.SAM, ADAMW),
        {"reduce": REDUCE, "perturb": PERTURB, "update": OF_ADAMW}, {"P": 2, "G": 1, "S": 2},
    ),
    "asam-sgd": Case(
        "ASAM + SGD", _with(fastsam.ASAM, SGD, momentum=0.9),
        {"reduce": {"P": 1, "G": 1}, "perturb": PERTURB, "update": OF_SGD},
        {"P": 2, "G": 1, "S": 1},
    ),
    "vasso-sgd": Case(
        "VaSSO + SGD", _with(fastsam.VaSSO, SGD, momentum=0.9),
        {"reduce": {"G": 1, "W": 1}, "perturb": {"P": 3, "G": 1, "W": 2}, "update": OF_SGD},
        {"P": 2, "G": 1, "S": 1, "W": 2},
    ),
    "samar-sgd": Case(
        "SAMAR + SGD", _with(fastsam.SAMAR, SGD, momentum=0.9),
        {"reduce": REDUCE, "perturb": PERTURB, "reduce again": {"G": 2},
         "update": {"P": 2, "G": 2, "S": 2}},
        {"P": 2, "G": 2, "S": 1}, keeps_first=True,
    ),
    "lightsam-3": Case(
        "LightSAM III", _lightsam,
        {"perturb": {"P": 3, "G": 1, "W": 4}, "update": {"P": 2, "G": 1, "W": 4}},
        {"P": 2, "G": 1, "W": 6},
    ),
}  # fmt: skip


class Trial:
    """A case on tensors of one dtype, with the launch configurations that are given."""

    def __init__(
        self, name: str, elements: int, tensors: int, dtype: torch.dtype, device: torch.device,
        launches: Launches | None = None,
    ) -> None:  # fmt: skip
        self.case, self.dtype = CASES[name], dtype
        torch.manual_seed(0)

        def random(shape: tuple[int, ...]) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device).normal_()

        shapes = uniform(elements, tensors)
        self.params = [nn.Parameter(random(shape)) for shape in shapes]
        self.seconds = list(map(random, shapes))
        self.firsts = list(map(random, shapes)) if self.case.keeps_first else self.seconds
        self.optimizer: Any = quietly(self.case.make, self.params)
        if launches is not None:
            from fastsam.backends.triton.backend import TritonBackend

            backend = TritonBackend(launches)
            self.optimizer._passes.backends.use("triton", self.params[0].device, backend)
        self.scratch = False  # whether w + e had memory of its own

    def first(self) -> None:
        keeps = self.case.keeps_first
        for param, grad in zip(self.params, self.firsts, strict=True):
            param.grad = _as_from_backward(grad) if keeps else grad
        before = self.params[0].data_ptr()
        self.optimizer.first_step(zero_grad=keeps)
        self.scratch = self.params[0].data_ptr() != before

    def second(self) -> None:
        if self.case.keeps_first:
            for param, grad in zip(self.params, self.seconds, strict=True):
                param.grad = grad
        self.optimizer.second_step()


def quietly(make: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What ``make`` gives, without the advice on 16-bit parameters."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="some parameters are float16")
        return make(*args, **kwargs)


def fitting(name: str, elements: int, dtype: torch.dtype, free: int) -> int:
    """As many elements as fit into so much memory: halved until they do."""
    case = CASES[name]
    while elements > 1024 and elements * _bytes(case.held, dtype) > SHARE * free:
        elements //= 2
    return elements


def release(device: torch.device) -> int:
    """Give back what is not in use, and say how much is free."""
    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]
