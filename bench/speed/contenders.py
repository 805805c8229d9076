"""What takes part in a comparison of speed: parameter sets, fastsam, its peers, and a plain copy.

A contender is one call that does the optimizer's work of one sharpness-aware step, both passes of
it. The gradients are there beforehand, the same for all; no forward or backward pass is timed.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import fastsam

from .foreach_sam import ForeachSAM

Shape = tuple[int, ...]

# the same gradients for both passes are what is timed here, and a mistake anywhere else
warnings.filterwarnings("ignore", message=r"second_step\(\) seems to find gradients")

# --- parameter sets ---


def _convolution(out: int, into: int, size: int) -> list[Shape]:
    """A convolution without bias and the batch normalisation after it."""
    return [(out, into, size, size), (out,), (out,)]


def _linear(out: int, into: int) -> list[Shape]:
    return [(out, into), (out,)]


def _norm(width: int) -> list[Shape]:
    return [(width,), (width,)]


def _resnet50() -> list[Shape]:
    shapes, into = _convolution(64, 3, 7), 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes += _convolution(width, into, 1) + _convolution(width, width, 3)
            shapes += _convolution(4 * width, width, 1)
            if block == 0:
                shapes += _convolution(4 * width, into, 1)
            into = 4 * width
    return shapes + _linear(1000, into)


def _resnet20() -> list[Shape]:
    """A ResNet-20 for 32x32 images, with one projection at the entry of its last stage."""
    shapes, into = _convolution(16, 3, 3), 16
    for width in (16, 32, 64):
        for _ in range(3):
            shapes += _convolution(width, into, 3) + _convolution(width, width, 3)
            into = width
    return shapes + _convolution(64, 32, 1) + _linear(10, into)


def _transformer(width: int, layers: int) -> list[Shape]:
    """Layers of attention and a perceptron, with the normalisation after the last."""
    attention = _linear(3 * width, width) + _linear(width, width)
    perceptron = _linear(4 * width, width) + _linear(width, 4 * width)
    return layers * (_norm(width) + attention + _norm(width) + perceptron) + _norm(width)


def uniform(parameters: int, tensors: int) -> list[Shape]:
    """Vectors of equal length, or of two lengths that differ by one."""
    length, longer = divmod(parameters, tensors)
    return [(length + (i < longer),) for i in range(tensors)]


SETS: dict[str, list[Shape]] = {
    "resnet50": _resnet50(),
    "vit_b16": [(768, 3, 16, 16), (768,), (1, 1, 768), (1, 197, 768)]
    + _transformer(768, 12) + _linear(1000, 768),
    "gpt2": [(50257, 768), (1024, 768)] + _transformer(768, 12),
    "small": _resnet20(),
}  # fmt: skip
SET_LABELS = {"resnet50": "ResNet-50", "vit_b16": "ViT-B/16", "gpt2": "GPT-2", "small": "ResNet-20"}


def parameter_set(name: str) -> list[Shape]:
    """The shapes of a set: a key of ``SETS``, or ``uniform:PARAMETERS:TENSORS``.

    Raises:
        ValueError: If there is no such set.
    """
    if name in SETS:
        return SETS[name]
    kind, _, sizes = name.partition(":")
    counts = sizes.split(":")
    if kind == "uniform" and len(counts) == 2 and all(count.isdecimal() for count in counts):
        parameters, tensors = map(int, counts)
        if 1 <= tensors <= parameters:
            return uniform(parameters, tensors)
    raise ValueError(
        f"must be one of {', '.join(SETS)} or uniform:PARAMETERS:TENSORS, got {name!r}"
    )


def count(shapes: Sequence[Shape]) -> int:
    """Number of elements of all tensors."""
    return sum(torch.Size(shape).numel() for shape in shapes)


# --- methods ---


class Method(NamedTuple):
    """A method of fastsam and its arguments; ``base`` is a key of ``BASES`` or empty."""

    label: str
    cls: Callable[..., Optimizer]
    base: str
    kwargs: dict[str, Any]
    scratch_bytes: int  # what a step has to move per float32 parameter, with the perturbed
    # weights in scratch memory, which spares the copy of the weights
    inplace_bytes: int  # and where the weights themselves are perturbed

    def floor(self, device: torch.device) -> int:
        """Bytes per parameter that the method has to move; its backend there decides which."""
        return self.inplace_bytes if device.type == "cuda" else self.scratch_bytes


# One learning rate for all that keeps the weights finite over thousands of steps along the same
# gradients; no value of a hyper-parameter but 0 decides what a step costs.
LR = 1e-3
BASES: dict[str, tuple[type[Optimizer], dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, {"lr": LR, "momentum": 0.9}),
    "adamw": (torch.optim.AdamW, {"lr": LR}),
}
BASE_LABELS = {"sgd": "SGD", "adamw": "AdamW"}
METHODS: dict[str, Method] = {
    "sam-sgd": Method("SAM + SGD", fastsam.SAM, "sgd", {}, 36, 40),
    "sam-adamw": Method("SAM + AdamW", fastsam.SAM, "adamw", {}, 44, 48),
    "asam-sgd": Method("ASAM + SGD", fastsam.ASAM, "sgd", {}, 40, 44),
    "ssam-sgd": Method("SSAM + SGD", fastsam.SSAM, "sgd", {}, 40, 44),
    "lightsam-2": Method(
        "LightSAM II", fastsam.LightSAM, "", {"lr": LR, "rho": LR, "rule": "adagrad"}, 40, 44
    ),
    "lightsam-3": Method(
        "LightSAM III", fastsam.LightSAM, "", {"lr": LR, "rho": LR, "rule": "adam"}, 56, 60
    ),
    "samar-sgd": Method("SAMAR + SGD", fastsam.SAMAR, "sgd", {}, 48, 52),
}


def build(method: str, params: list[nn.Parameter], backend: str = "auto") -> Optimizer:
    """A fastsam optimizer of ``METHODS``."""
    _, cls, base, kwargs, *_ = METHODS[method]
    if not base:
        return cls(params, backend=backend, **kwargs)
    base_class, options = BASES[base]
    return cls(params, base_class, backend=backend, **kwargs, **options)


# --- contenders ---


class Contender(NamedTuple):
    """A name, the work to be timed, and the parameters that it changes (a copy has none)."""

    name: str
    step: Callable[[], None]
    params: list[nn.Parameter]


class Problem:
    """A parameter set on a device: gradients that all contenders share, weights for each.

    Args:
        shapes: Of the tensors.
        device: Where they are.
        seed: Of the values; the weights of all contenders start equal.
    """

    def __init__(self, shapes: Sequence[Shape], device: torch.device | str = "cpu", seed: int = 0):
        self.shapes = shapes
        self.device = torch.device(device)
        self.seed = seed
        self.grads = self._random(1)

    def _random(self, stream: int) -> list[Tensor]:
        generator = torch.Generator(self.device).manual_seed(2 * self.seed + stream)
        return [
            torch.randn(shape, generator=generator, device=self.device) for shape in self.shapes
        ]

    def params(self) -> list[nn.Parameter]:
        """New parameters with the first weights, and with the gradients set."""
        params = [nn.Parameter(x) for x in self._random(0)]
        for param, grad in zip(params, self.grads, strict=True):
            param.grad = grad
        return params


def both_passes(optimizer: Any) -> Callable[[], None]:
    """The two passes of an optimizer with the usual signature; both see the same gradients."""

    def step() -> None:
        optimizer.first_step()
        optimizer.second_step()

    return step


def _keeping_first(optimizer: Any, params: list[nn.Parameter], firsts: list[Tensor],
                   seconds: list[Tensor]) -> Callable[[], None]:  # fmt: skip
    """As :func:`both_passes`, for a method that reads both passes' gradients at once.

    They are two sets of tensors here, or a cache would serve half of the reads. And the first pass
    clears them, as in ``step(closure)``, so that the method may keep the first without a copy, as
    long as nobody else has them.
    """

    def step() -> None:
        for param, grad in zip(params, firsts, strict=True):
            param.grad = _as_from_backward(grad)
        optimizer.first_step(zero_grad=True)
        for param, grad in zip(params, seconds, strict=True):
            param.grad = grad
        optimizer.second_step()

    return step


def _as_from_backward(grad: Tensor) -> Tensor:
    """The same memory in a tensor that knows of no other, at less than the cost of a copy."""
    return torch.from_numpy(grad.numpy()) if grad.device.type == "cpu" else torch.from_dlpack(grad)


def fastsam_contender(problem: Problem, method: str, backend: str = "auto") -> Contender:
    """A method of fastsam on a backend."""
    params = problem.params()
    optimizer = build(method, params, backend)
    if METHODS[method].cls is fastsam.SAMAR:
        seconds = [grad.flip(0) for grad in problem.grads]
        return Contender("fastsam", _keeping_first(optimizer, params, problem.grads, seconds),
                         params)  # fmt: skip
    return Contender("fastsam", both_passes(optimizer), params)


FUSED = ", fused base"  # the end of the name of a peer with torch's fused base
PEERS = {"pytorch-optimizer": "pytorch_optimizer", "unifiedsam": "unifiedsam"}


def peer_names() -> list[str]:
    """Published packages that are installed here."""
    return [name for name, module in PEERS.items() if importlib.util.find_spec(module)]


def peer_contender(problem: Problem, method: str, name: str, fused: bool) -> Contender:
    """SAM of a published package, with its default base or with torch's fused base."""
    params = problem.params()
    base, options = BASES[METHODS[method].base]
    if fused:
        options = options | {"fused": True}
    if name == "unifiedsam":
        import unifiedsam

        optimizer = unifiedsam.unifiedSAM(params, base, rho=0.05, lambd=1.0, **options)
    else:
        import pytorch_optimizer

        optimizer = pytorch_optimizer.SAM(params, base, rho=0.05, **options)
    return Contender(name + FUSED * fused, both_passes(optimizer), params)


def peer_contenders(problem: Problem, method: str) -> list[Contender]:
    """The method in every published package that is here, on both kinds of base."""
    if METHODS[method].cls is not fastsam.SAM:
        return []
    return [
        peer_contender(problem, method, name, fused)
        for name in peer_names() for fused in (False, True)
    ]  # fmt: skip


COMPILED = "torch.compile"


def compiled_contender(problem: Problem, method: str) -> Contender:
    """SAM in torch's foreach operators, each pass compiled: for GPUs."""
    params = problem.params()
    base = METHODS[method].base
    sam = ForeachSAM(params, base, **BASES[base][1], compiled=True)
    return Contender(COMPILED, both_passes(sam), params)


#: A copy of more bytes than this is made in several equal parts: no cache holds that much either.
LARGEST_COPY = 2 * 10**9


def copy_contender(problem: Problem, bytes_per_parameter: int) -> Contender:
    """A plain copy of contiguous memory that moves as many bytes, half read and half written."""
    total = count(problem.shapes) * bytes_per_parameter
    times = -(-total // LARGEST_COPY)
    source = torch.ones(max(1, total // (8 * times)), device=problem.device)
    target = torch.zeros_like(source)

    def step() -> None:
        for _ in range(times):
            target.copy_(source)

    return Contender(f"copy, {bytes_per_parameter} B", step, [])
