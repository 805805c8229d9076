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
class Base:
    cls: type | None  # None for the update of a method that has its own
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
# here, too, a fair eps: the accumulators start at its square
LIGHT = {"lr": 0.02, "eps": 0.03, "weight_decay": 0.1}
#: Updates of methods that have their own, and the bases of those that need a certain one.
OWN_UPDATES = {
    "light_adagrad_norm": Base(None, "light_adagrad_norm", LIGHT | {"lr": 0.5}),
    "light_adagrad": Base(None, "light_adagrad", LIGHT),
    "uncorrected_adam": Base(None, "uncorrected_adam", LIGHT | {"betas": (0.8, 0.99)}),
    "uncorrected_amsgrad": Base(None, "uncorrected_amsgrad", LIGHT),
    "sps": Base(None, "sps", {}),
    "needed-adamw": Base(torch.optim.AdamW, "adamw", ADAM | {"weight_decay": 0.1}),
    "needed-amsgrad": BASES["adam-amsgrad"],
}


def murmur(x: int) -> int:
    """The finalizer of the 32-bit hash of that name."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ x >> shift) * factor % 2**32
    return x ^ x >> 16


def takes_part(place: int, beta: float, step: int, seed: int = 0) -> bool:
    """ESAM's choice, with 24 bits of a hash."""
    key = murmur(murmur(seed) ^ place * 0x9E3779B1 % 2**32) ^ 0x5BD1E995
    return (murmur(key ^ murmur(step)) >> 8) / 2**24 < float(np.float32(beta))


class FixedLoss(fastsam.SAMSPS):
    """With one loss in every step, whatever the loop gives, so that all kinds of loops serve."""

    LOSS = 0.7

    def __init__(self, params: Any, **kwargs: Any):
        if "lr" in kwargs:
            kwargs["lr_max"] = kwargs.pop("lr")
        super().__init__(params, **kwargs)

    def _take(self, loss: Any, call: str) -> Tensor:
        self._returned = self.LOSS
        return super()._take(self.LOSS, call)


@dataclass(frozen=True)
class Method:
    cls: type
    kwargs: dict[str, Any] = field(default_factory=dict)
    group: dict[str, Any] = field(default_factory=dict)  # the oracle's group keys
    oracle: dict[str, Any] = field(default_factory=dict)  # and its other arguments
    bases: Sequence[str] = tuple(BASES)  # those it is tested with

    @property
    def mixes(self) -> bool:
        """Whether the update takes the first gradient itself."""
        return bool({"mix", "descent", "loss"} & self.oracle.keys())


def wave(t: int) -> float:
    """A schedule for Unified SAM that is none of the named ones."""
    return 0.5 + 0.5 * np.cos(t)


def halfway(lam: Any, sharpness: Any, previous: Any) -> Any:
    """A rule for SAMAR, of tensors or of numbers, that is not its own."""
    return 0.5 * lam + 0.25 * sharpness / (abs(sharpness) + abs(previous))


def diagonal(g: Any, state: dict[str, Any]) -> Any:
    """A preconditioner for PreconditionedSAM, of a tensor."""
    return 1 / (abs(g) + 0.5)


def diagonal_of(g: Any) -> Any:
    """The same of an array."""
    return diagonal(g, {})


ADAPTIVE = {"adaptive": True}
TWO = ("sgd-momentum", "adamw")
THREE = (*TWO, "adagrad_norm")
HAND = {"by_hand": True}
#: Everything that composes with a method, at once.
ALL = {"renormalize": True, "max_grad_norm": 0.5, "skip_nonfinite": True}
RATIO = {"c": 1.2, "lam_min": 0.3, "lam_max": 1.5, "smoothing": 0.4}
TREND = {"c": 1.3, "fast": 0.3, "slow": 0.8}
METHODS = {
    "sam": Method(fastsam.SAM),
    "asam": Method(fastsam.ASAM, {}, {"rho": 0.5, "eta": 0.01} | ADAPTIVE),
    "asam-max": Method(
        fastsam.ASAM, {"rho": 0.05, "p": float("inf")},
        {"rho": 0.05, "eta": 0.01} | ADAPTIVE, {"ascent": "sign"}, TWO,
    ),
    "usam": Method(fastsam.USAM, {}, {}, {"lam": 0.0}),
    "unified-1/t": Method(fastsam.UnifiedSAM, {"lam": "1/t"}, {}, {"lam": lambda t: 1 / t}, TWO),
    "unified-1-1/t": Method(
        fastsam.UnifiedSAM, {"lam": "1-1/t"}, {}, {"lam": lambda t: 1 - 1 / t}, TWO
    ),
    "unified-callable": Method(fastsam.UnifiedSAM, {"lam": wave}, {}, {"lam": wave}),
    "ssam": Method(fastsam.SSAM, {}, {}, {"renormalize": True}),
    "ssam-usam": Method(fastsam.SSAM, {"lam": 0.0}, {}, {"lam": 0.0, "renormalize": True}),
    "ssam-adaptive-clip": Method(
        fastsam.SSAM, {"rho": 0.5, "eta": 0.1} | ADAPTIVE | ALL,
        {"rho": 0.5, "eta": 0.1} | ADAPTIVE, ALL,
    ),
    "sam-clip": Method(fastsam.SAM, {"max_grad_norm": 0.5}, {}, {"max_grad_norm": 0.5}),
    "vasso": Method(fastsam.VaSSO, {}, {"theta": 0.9}, {"ascent": "vasso"}),
    "vasso-all": Method(
        fastsam.VaSSO, {"rho": 0.5, "theta": 0.3, "eta": 0.1} | ADAPTIVE | ALL,
        {"rho": 0.5, "theta": 0.3, "eta": 0.1} | ADAPTIVE, {"ascent": "vasso"} | ALL, TWO,
    ),
    "samar": Method(fastsam.SAMAR, {"lam": 0.8}, {}, {"mix": oracles.Ratio(0.8)}),
    "samar-all": Method(
        fastsam.SAMAR,
        {"rho": 0.5, "eta": 0.1, "rule": fastsam.SharpnessRatio(**RATIO)} | ADAPTIVE | ALL,
        {"rho": 0.5, "eta": 0.1} | ADAPTIVE, {"mix": oracles.Ratio(**RATIO)} | ALL,
        ("sgd-momentum", "adagrad_norm"),
    ),
    "samar-callable": Method(fastsam.SAMAR, {"rule": halfway}, {}, {"mix": halfway}, TWO),
    "gsam": Method(fastsam.GSAM, {}, {}, {"descent": "gsam"}, THREE),
    "gsam-first-all": Method(
        fastsam.GSAM,
        {"rho": 0.5, "eta": 0.1, "alpha": 0.7, "variant": "first"} | ADAPTIVE | ALL,
        {"rho": 0.5, "eta": 0.1, "alpha": 0.7} | ADAPTIVE, {"descent": "gsam-first"} | ALL,
        ("sgd-momentum", "adagrad_norm"),
    ),
    "wsam": Method(fastsam.WSAM, {"gamma": 0.6}, {"gamma": 0.6}, {"descent": "wsam"}, THREE),
    "wsam-all": Method(
        fastsam.WSAM, {"rho": 0.5, "eta": 0.1, "gamma": 0.6} | ADAPTIVE | ALL,
        {"rho": 0.5, "eta": 0.1, "gamma": 0.6} | ADAPTIVE, {"descent": "wsam"} | ALL, TWO,
    ),
    "wsam-coupled": Method(
        fastsam.WSAM, {"gamma": 0.6, "decouple": False}, {"gamma": 0.6},
        {"descent": "wsam-coupled"}, THREE,
    ),
    "gnp": Method(fastsam.GNP, {}, {}, {"descent": "gnp"}, TWO),
    "gnp-unit": Method(fastsam.GNP, {"unit": True}, {}, {"descent": "gnp-unit"}, THREE),
    "lesam": Method(
        fastsam.LESAM, {"sigma": 0.1, "rho_max": 0.2}, {"sigma": 0.1, "rho": 0.2},
        {"ascent": "lesam"}, TWO,
    ),
    # with sigma = 1 two equal gradients leave nothing to perturb along
    "friendly": Method(
        fastsam.FriendlySAM, {"sigma": 0.9}, {"sigma": 0.9}, {"ascent": "friendly"}, THREE
    ),
    "friendly-all": Method(
        fastsam.FriendlySAM,
        {"rho": 0.5, "sigma": 0.7, "lmbda": 0.6, "eta": 0.1} | ADAPTIVE | ALL,
        {"rho": 0.5, "sigma": 0.7, "lmbda": 0.6, "eta": 0.1} | ADAPTIVE,
        {"ascent": "friendly"} | ALL, TWO,
    ),
    # with several perturbations, and where losses count: test_universal.py
    "trace": Method(
        fastsam.TraceSAM, {"rho": 0.1, "weight": 0.7}, {"rho": 0.1, "weight": 0.7},
        {"ascent": "normal", "descent": "trace"}, TWO,
    ),
    "lightsam-1": Method(
        fastsam.LightSAM, {"rho": 0.3, "rule": "adagrad_norm"}, {"rho": 0.3},
        {"ascent": "adagrad_norm"}, ("light_adagrad_norm",),
    ),
    "lightsam-2": Method(
        fastsam.LightSAM, {"rho": 0.01, "rule": "adagrad"}, {"rho": 0.01}, {"ascent": "adagrad"},
        ("light_adagrad",),
    ),
    "lightsam-3": Method(
        fastsam.LightSAM, {"rho": 0.01}, {"rho": 0.01}, {"ascent": "adam"}, ("uncorrected_adam",)
    ),
    "lightsam-3-all": Method(
        fastsam.LightSAM, {"rho": 0.01} | ALL, {"rho": 0.01}, {"ascent": "adam"} | ALL,
        ("uncorrected_adam",),
    ),
    # what it makes of a model's outputs is in test_functional.py; its plain form is SAM without
    "functional-adam": Method(
        fastsam.FunctionalSAM, {"preconditioned": True, "warmup": 1} | HAND, {},
        {"ascent": "second_moment", "warmup": 1}, ("needed-adamw",),
    ),
    "functional-adam-all": Method(
        fastsam.FunctionalSAM,
        {"rho": 0.5, "eta": 0.1, "preconditioned": True, "warmup": 0} | ADAPTIVE | ALL | HAND,
        {"rho": 0.5, "eta": 0.1} | ADAPTIVE, {"ascent": "second_moment"} | ALL,
        ("needed-amsgrad",),
    ),
    "preconditioned": Method(
        fastsam.PreconditionedSAM, {"beta": 0.8, "damping": 0.5}, {"beta": 0.8, "damping": 0.5},
        {"ascent": "variance"}, THREE,
    ),
    "preconditioned-all": Method(
        fastsam.PreconditionedSAM, {"rho": 0.5, "form": "constraint", "beta": 0.6} | ALL,
        {"rho": 0.5, "beta": 0.6}, {"ascent": "variance", "constrained": True} | ALL, TWO,
    ),
    "preconditioned-callable": Method(
        fastsam.PreconditionedSAM,
        {"rho": 0.5, "eta": 0.1, "preconditioner": diagonal, "form": "constraint"} | ADAPTIVE | ALL,
        {"rho": 0.5, "eta": 0.1} | ADAPTIVE,
        {"ascent": "diagonal", "constrained": True, "diagonal": diagonal_of} | ALL, TWO,
    ),
    "esam": Method(
        fastsam.ESAM, {"beta": 0.8, "eta": 0.1} | ADAPTIVE, {"beta": 0.8, "eta": 0.1} | ADAPTIVE,
        {"ascent": "esam", "takes_part": takes_part}, TWO,
    ),
    "sps": Method(
        FixedLoss, {"rho": 0.05, "lr_max": 0.3, "loss_min": -100.0},
        {"lr": 0.3, "loss_min": -100.0}, {"loss": FixedLoss.LOSS}, ("sps",),
    ),
    "sps-all": Method(
        FixedLoss,
        {"rho": 0.05, "lam": "1/t", "lr_max": 0.2, "loss_min": -100.0, "weight_decay": 0.1} | ALL,
        {"lr": 0.2, "loss_min": -100.0, "weight_decay": 0.1},
        {"loss": FixedLoss.LOSS, "lam": lambda t: 1 / t} | ALL, ("sps",),
    ),
    "adasam": Method(fastsam.AdaSAM, {"rho": 0.05}, {}, {}, ("uncorrected_amsgrad",)),
}  # fmt: skip
#: What tests that take all methods have no use for: methods of whose steps some have one pass, a
#: setting whose equation depends on another's, and a rule that differs from another in what it
#: makes of one number. Each has tests of its own (``test_msam.py``, ``test_delayed.py``,
#: ``test_looksam.py``, ``test_amplify.py``, ``test_samar.py``).
OTHERS = {
    # GNP's equation, with the weight of the setting
    "sam-amplified": Method(
        fastsam.SAM, {"amplify": 1.7}, {"alpha": 1.7}, {"descent": "gnp"}, THREE
    ),
    "samar-trend": Method(
        fastsam.SAMAR,
        {"rho": 0.5, "eta": 0.1, "lam": 0.8, "rule": fastsam.SharpnessTrend(**TREND)} | ADAPTIVE
        | ALL, {"rho": 0.5, "eta": 0.1} | ADAPTIVE, {"mix": oracles.Trend(0.8, **TREND)} | ALL,
        ("adagrad_norm",),
    ),
    "msam": Method(
        fastsam.MSAM, {}, {"rho": 0.3}, {"ascent": "momentum"},
        ("sgd-nesterov", "sgd-dampening", "adam-amsgrad", "adamw"),
    ),
    "msam-all": Method(
        fastsam.MSAM,
        {"rho": 0.5, "eta": 0.1, "max_grad_norm": 0.5, "skip_nonfinite": True} | ADAPTIVE,
        {"rho": 0.5, "eta": 0.1} | ADAPTIVE,
        {"ascent": "momentum", "max_grad_norm": 0.5, "skip_nonfinite": True}, ("sgd-momentum",),
    ),
    "delayed": Method(fastsam.DelayedSAM, {}, {}, {}, TWO),
    "looksam": Method(fastsam.LookSAM, {}, {}, {}, TWO),  # of which these are SAM's steps
}  # fmt: skip
#: Methods that differ from another by an equation alone, and share with it whatever else a step
#: has. Their equations are tested as all are; other tests are given them one by one only where
#: every case runs (``conftest.py``).
RELATIVES = ("asam-max", "esam", "gsam", "gsam-first-all", "wsam-all", "wsam-coupled", "gnp",
             "gnp-unit", "lesam", "friendly-all", "functional-adam-all",
             "preconditioned-all", "preconditioned-callable", "sps-all", "trace")  # fmt: skip
#: The classes of these that have no other row.
RELATIVE_CLASSES = ("ESAM", "GSAM", "GNP", "LESAM", "TraceSAM", "DetSAM", "FrobSAM",
                    "UniversalSAM", "BSAM")  # fmt: skip
#: Classes without a row, whose passes need losses, or noise around them; they are tested in
#: test_universal.py and test_bsam.py.
APART = (fastsam.DetSAM, fastsam.FrobSAM, fastsam.UniversalSAM, fastsam.BSAM)
#: Those whose radius LETS learns with either Hessian: the second gradient is that of the loss, the
#: step size no other's, and the perturbation follows from nothing that the update changes, nor from
#: noise.
NOT_LEARNING = (fastsam.FunctionalSAM, fastsam.PreconditionedSAM, fastsam.TraceSAM, fastsam.ESAM,
                FixedLoss)  # fmt: skip
LEARNING = [name for name, method in METHODS.items() if method.cls not in NOT_LEARNING]
#: Every method with every base that it is tested with.
COMBINATIONS = [(name, base) for name, method in METHODS.items() for base in method.bases]

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


def create(
    method: str, params: Any, backend: str, base: str = "sgd-momentum", **kwargs: Any
) -> fastsam.optimizer.SharpnessAwareOptimizer:
    """A method by name, on this base unless it has an update of its own; ``kwargs`` go first."""
    spec = (METHODS | OTHERS)[method]
    return build(spec, base_of(method, base), params, None, backend, **kwargs)


def base_of(method: str, base: str = "sgd-momentum") -> Base:
    """The base of this name, or the one that the method has of its own, or needs."""
    own = (METHODS | OTHERS)[method].bases[0]
    return OWN_UPDATES[own] if own in OWN_UPDATES else BASES[base]


def build(
    method: Method, base: Base, params: Any, groups: list[dict] | None, backend: str, **kwargs: Any
) -> fastsam.optimizer.SharpnessAwareOptimizer:
    """The fastsam optimizer; ``groups`` are dicts with ``params`` as indices and overrides."""
    if groups is not None:
        params = [group | {"params": [params[i] for i in group["params"]]} for group in groups]
    bases = () if base.cls is None else (base.cls,)
    return method.cls(params, *bases, backend=backend, **(method.kwargs | base.kwargs | kwargs))


def arithmetic(dtypes: Dtypes) -> str:
    """The dtype of the arithmetic, and of what the library keeps in it."""
    return "float64" if dtypes.param == "float64" else "float32"


def stored_as(name: str, base: Base, dtypes: Dtypes) -> str:
    """The dtype of a state tensor."""
    if name.startswith("ascent") or base.cls is None:
        return arithmetic(dtypes)
    return dtypes.grad if name == "momentum_buffer" else dtypes.param


def build_oracle(
    method: Method, base: Base, params: Sequence[Tensor], groups: list[dict], dtypes: Dtypes
) -> oracles.Oracle:
    defaults = method.group | base.kwargs
    any_state = "momentum_buffer" if base.oracle == "sgd" else "any"
    return oracles.Oracle(
        numpy(params), [defaults | group for group in groups], base.oracle,
        storage=oracles.rounding(dtypes.param), grad_storage=oracles.rounding(dtypes.grad),
        state_storage=oracles.rounding(stored_as(any_state, base, dtypes)),
        ascent_storage=oracles.rounding(arithmetic(dtypes)), **method.oracle,
    )  # fmt: skip
