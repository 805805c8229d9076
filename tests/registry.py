"""Every method and base update, by name: a new one is a line here, and every check comes with it.

``METHODS`` gives the fastsam class, its arguments and the oracle's arguments for the same
mathematics. ``BASES`` gives the torch class, its arguments and the oracle's name for it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

import fastsam

import oracles
from conftest import DEVICE


@dataclass(frozen=True)
class Method:
    cls: type
    kwargs: dict[str, Any] = field(default_factory=dict)
    group: dict[str, Any] = field(default_factory=dict)  # the oracle's group keys
    oracle: dict[str, Any] = field(default_factory=dict)  # and its other arguments


def wave(t: int) -> float:
    """A schedule for Unified SAM that is none of the named ones."""
    return 0.5 + 0.5 * np.cos(t)


ADAPTIVE = {"adaptive": True}
METHODS = {
    "sam": Method(fastsam.SAM),
    "asam": Method(fastsam.ASAM, {}, {"rho": 0.5, "eta": 0.01} | ADAPTIVE),
    "usam": Method(fastsam.USAM, {}, {}, {"lam": 0.0}),
    "unified-1/t": Method(fastsam.UnifiedSAM, {"lam": "1/t"}, {}, {"lam": lambda t: 1 / t}),
    "unified-1-1/t": Method(fastsam.UnifiedSAM, {"lam": "1-1/t"}, {}, {"lam": lambda t: 1 - 1 / t}),
    "unified-callable": Method(fastsam.UnifiedSAM, {"lam": wave}, {}, {"lam": wave}),
    "ssam": Method(fastsam.SSAM, {}, {}, {"renormalize": True}),
    "ssam-usam": Method(fastsam.SSAM, {"lam": 0.0}, {}, {"lam": 0.0, "renormalize": True}),
    "ssam-adaptive-clip": Method(
        fastsam.SSAM,
        {"rho": 0.5, "adaptive": True, "eta": 0.1, "max_grad_norm": 0.5, "skip_nonfinite": True},
        {"rho": 0.5, "eta": 0.1} | ADAPTIVE,
        {"renormalize": True, "max_grad_norm": 0.5, "skip_nonfinite": True},
    ),
    "sam-clip": Method(fastsam.SAM, {"max_grad_norm": 0.5}, {}, {"max_grad_norm": 0.5}),
}  # fmt: skip


@dataclass(frozen=True)
class Base:
    cls: type
    oracle: str
    kwargs: dict[str, Any]


# Adam's eps is a fair size here: with 1e-8 the first steps are sign(g), and where a gradient is
# near zero a rounding error decides the sign. The default is tested against torch, step by step.
ADAM = {"lr": 0.02, "eps": 1e-3}
BASES = {
    "sgd": Base(torch.optim.SGD, "sgd", {"lr": 0.05}),
    "sgd-momentum": Base(torch.optim.SGD, "sgd", {"lr": 0.05, "momentum": 0.9}),
    "sgd-nesterov": Base(
        torch.optim.SGD, "sgd",
        {"lr": 0.05, "momentum": 0.8, "nesterov": True, "weight_decay": 0.01},
    ),
    "sgd-dampening": Base(
        torch.optim.SGD, "sgd",
        {"lr": 0.05, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.01},
    ),
    "adam": Base(torch.optim.Adam, "adam", ADAM | {"weight_decay": 0.01}),
    "adam-amsgrad": Base(torch.optim.Adam, "adam", ADAM | {"amsgrad": True, "maximize": True}),
    "adamw": Base(torch.optim.AdamW, "adamw", ADAM | {"weight_decay": 0.1}),
    "adagrad": Base(
        torch.optim.Adagrad, "adagrad",
        {"lr": 0.05, "lr_decay": 0.1, "weight_decay": 0.01, "initial_accumulator_value": 0.1,
         "maximize": True},
    ),
    "adagrad_norm": Base(
        fastsam.AdaGradNorm, "adagrad_norm", {"lr": 0.5, "initial_accumulator_value": 0.5}
    ),
}  # fmt: skip

BACKENDS = ("reference", "torch", "triton")


@dataclass(frozen=True)
class Dtypes:
    param: str
    grad: str

    @property
    def wide(self) -> bool:
        """Whether everything is stored in the dtype of the arithmetic."""
        return self.param == self.grad and self.param in ("float32", "float64")


DTYPES = {
    "fp32": Dtypes("float32", "float32"),
    "fp64": Dtypes("float64", "float64"),
    "bf16": Dtypes("bfloat16", "bfloat16"),
    "fp16": Dtypes("float16", "float16"),
    "bf16-fp32": Dtypes("bfloat16", "float32"),
}


def torch_dtype(name: str) -> torch.dtype:
    return getattr(torch, name)


def parameters(arrays: Sequence[np.ndarray], dtypes: Dtypes) -> list[torch.nn.Parameter]:
    params = []
    for array in arrays:
        data = torch.from_numpy(np.array(array)).to(DEVICE, torch_dtype(dtypes.param))
        params.append(torch.nn.Parameter(data))
        params[-1].grad_dtype = torch_dtype(dtypes.grad)
    return params


def numpy(tensors: Sequence[Tensor]) -> list[np.ndarray]:
    """Exact float64 copies."""
    return [t.detach().double().cpu().numpy().copy() for t in tensors]


def set_grads(params: Sequence[Tensor], grads: Sequence[np.ndarray | None], dtypes: Dtypes) -> None:
    for param, grad in zip(params, grads, strict=True):
        if grad is None:
            param.grad = None
        else:
            rounded = oracles.rounding(dtypes.grad)(grad)
            param.grad = torch.from_numpy(rounded).to(param.device, torch_dtype(dtypes.grad))


def build(
    method: Method, base: Base, params: Sequence[Tensor], groups: list[dict], backend: str
) -> fastsam.optimizer.SharpnessAwareOptimizer:
    """The fastsam optimizer; ``groups`` are dicts with ``params`` as indices and overrides."""
    tensors = [group | {"params": [params[i] for i in group["params"]]} for group in groups]
    return method.cls(tensors, base.cls, backend=backend, **method.kwargs, **base.kwargs)


def build_oracle(
    method: Method, base: Base, params: Sequence[Tensor], groups: list[dict], dtypes: Dtypes
) -> oracles.Oracle:
    defaults = method.group | base.kwargs
    return oracles.Oracle(
        numpy(params), [defaults | group for group in groups], base.oracle,
        storage=oracles.rounding(dtypes.param), grad_storage=oracles.rounding(dtypes.grad),
        # the momentum buffer has the gradient's dtype, every other state the parameter's
        state_storage=oracles.rounding(dtypes.grad if base.oracle == "sgd" else dtypes.param),
        **method.oracle,
    )  # fmt: skip
