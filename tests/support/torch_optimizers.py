"""fastsam's classes as entries of torch's own optimizer test database.

The database is ``torch.testing._internal.common_optimizers``: an ``OptimizerInfo`` for each class,
with the inputs that it is constructed with and those that it has to refuse. A backend is to fastsam
what ``foreach`` and ``fused`` are to torch, so the tests choose it, and no input names one.
"""

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import SGD, Adagrad, Adam, AdamW, NAdam, RMSprop
from torch.optim.lr_scheduler import (
    ConstantLR,
    ExponentialLR,
    LinearLR,
    PolynomialLR,
    ReduceLROnPlateau,
    StepLR,
)
from torch.testing._internal.common_optimizers import (
    ErrorOptimizerInput,
    OptimizerErrorEnum,
    OptimizerInfo,
    OptimizerInput,
    get_error_inputs_for_all_optims,
)

import fastsam

NAN = float("nan")
MOMENTUM = {"base_optimizer": SGD, "lr": 0.01, "momentum": 0.9}
EVERYTHING = {"renormalize": True, "max_grad_norm": 1.0, "skip_nonfinite": True}


class LETS(fastsam.LETS):
    """LETS around SAM, made from parameters as everything in the database is."""

    def __init__(self, params: Any, rho_lr: float = 0.01, hessian: str = "diag", **kwargs: Any):
        super().__init__(fastsam.SAM(params, **kwargs), rho_lr=rho_lr, hessian=hessian)


def inputs(cases: dict[str, dict[str, Any]]) -> Callable[..., list[OptimizerInput]]:
    """What the database calls for the inputs: new ones each time, as tests and steps write to them.

    Args:
        cases: Keyword arguments by description. Tensors are moved to the device.
    """

    def optim_inputs_func(device: Any, dtype: Any = None) -> list[OptimizerInput]:
        made = []
        for desc, kwargs in cases.items():
            kwargs = {
                key: value.to(device, copy=True) if isinstance(value, Tensor) else value
                for key, value in copy.deepcopy(kwargs).items()
            }
            made.append(OptimizerInput(params=None, kwargs=kwargs, desc=desc))
        return made

    return optim_inputs_func


def errors(
    required: dict[str, Any],
    own: Iterable[tuple[dict[str, Any], type[Exception], str]] = (),
    lr_error: str = "lr must be one number",
) -> Callable[..., list[ErrorOptimizerInput]]:
    """What the database calls for the inputs to be refused: torch's, and those of a class.

    Args:
        required: Keyword arguments that the class cannot do without.
        own: Keyword arguments, the error that they raise and its message.
        lr_error: What the class says of a learning rate of two elements.
    """

    def refused(kwargs: dict, error: type[Exception], regex: str, params: Any = None, **more: Any):
        if params is None:
            params = [Parameter(torch.randn(2, 3))]
        wrong = OptimizerInput(params, {**copy.deepcopy(required), **kwargs})
        return ErrorOptimizerInput(wrong, error_type=error, error_regex=regex, **more)

    def optim_error_inputs_func(device: Any, dtype: Any) -> list[ErrorOptimizerInput]:
        made = []
        for case in get_error_inputs_for_all_optims(device, dtype):
            given = case.optimizer_error_input
            regex = lr_error if "lr" in given.kwargs else case.error_regex
            made.append(refused(given.kwargs, case.error_type, regex, given.params))
        made.append(refused({}, ValueError, "empty parameter list", []))
        made += [refused(*case) for case in own]
        at_step = {"error_on": OptimizerErrorEnum.STEP_ERROR}
        sparse = torch.zeros(3, dtype=dtype, device=device)
        sparse.grad = torch.ones_like(sparse).to_sparse()
        made.append(refused({}, RuntimeError, "support sparse gradients", [sparse], **at_step))
        complex_ = torch.zeros(3, dtype=torch.complex64, device=device)
        complex_.grad = torch.ones_like(complex_)
        made.append(refused({}, RuntimeError, "support complex grad", [complex_], **at_step))
        return made

    return optim_error_inputs_func


PLAIN = {
    "default": {"base_optimizer": SGD},
    "momentum, weight_decay": MOMENTUM | {"weight_decay": 0.1},
    "AdamW": {"base_optimizer": AdamW},
    "everything": MOMENTUM | EVERYTHING,
}
EVERY_BASE = PLAIN | {
    "Tensor lr and rho": {
        "base_optimizer": SGD, "lr": torch.tensor(0.001), "rho": torch.tensor(0.02)
    },
    "maximize": {"base_optimizer": SGD, "maximize": True, "weight_decay": 0.1},
    "nesterov": MOMENTUM | {"nesterov": True, "weight_decay": 0.1},
    "dampening": MOMENTUM | {"dampening": 0.5},
    "amsgrad, maximize": {
        "base_optimizer": Adam, "amsgrad": True, "maximize": True, "weight_decay": 0.1
    },
    "Adagrad": {
        "base_optimizer": Adagrad, "lr": 0.1, "lr_decay": 0.5, "initial_accumulator_value": 0.1,
        "weight_decay": 0.1,
    },
    "AdaGradNorm": {"base_optimizer": fastsam.AdaGradNorm, "lr": 0.1},
    "RMSprop, not fused": {"base_optimizer": RMSprop, "centered": True, "momentum": 0.1},
    "NAdam, not fused": {"base_optimizer": NAdam, "weight_decay": 0.1, "maximize": True},
    "adaptive": MOMENTUM | {"adaptive": True, "eta": 0.1, "rho": 0.5},
    "no radius": MOMENTUM | {"rho": 0.0},
}  # fmt: skip
#: For LETS, which needs a radius above 0.
LEARNED = PLAIN | {
    "difference": MOMENTUM | {"hessian": "difference", "rho_lr": 0.1},
    "maximize": EVERY_BASE["maximize"],
}
LIGHT = {"lr": 0.001, "rho": 0.01}

COMMON_ERRORS = [
    ({"rho": -0.1}, ValueError, "rho must be at least 0 and finite, got -0.1"),
    ({"rho": NAN}, ValueError, "rho must be at least 0 and finite, got nan"),
    ({"rho": torch.ones(2)}, ValueError, "rho must be a number or a 0-dim tensor"),
    ({"max_grad_norm": 0.0}, ValueError, "max_grad_norm must be None or above 0, got 0.0"),
    ({"backend": "foreach"}, ValueError, "backend must be one of"),
    ({"typo": 1}, TypeError, "typo"),
]
SAM_ERRORS = COMMON_ERRORS + [
    ({"lr": -0.5}, ValueError, "lr must be at least 0 and finite, got -0.5"),
    ({"momentum": -0.5}, ValueError, "momentum must be at least 0 and finite, got -0.5"),
    ({"weight_decay": -1}, ValueError, "weight_decay must be at least 0 and finite, got -1"),
    ({"eta": -1.0}, ValueError, "eta must be at least 0 and finite, got -1.0"),
    ({"differentiable": True}, ValueError, "differentiable must be False"),
    ({"base_optimizer": torch.optim.LBFGS}, TypeError, "LBFGS needs one"),
    (
        {"base_optimizer": Adam, "betas": (1.0, 0.0)},
        ValueError,
        r"betas must be two numbers in \[0, 1",
    ),
]
LIGHT_ERRORS = COMMON_ERRORS + [
    ({"lr": -0.5}, ValueError, "lr must be at least 0 and finite, got -0.5"),
    ({"betas": (1.0, 0.0)}, ValueError, "betas must be two numbers in"),
    ({"eps": 0.0}, ValueError, "eps must be at least 1e-18"),
    ({"weight_decay": -1}, ValueError, "weight_decay must be at least 0"),
]
#: Keys that a state dict may lack: it may be of an older torch, or of the base alone.
NEW_KEYS = (
    "foreach", "differentiable", "maximize", "capturable", "fused",
    "rho", "adaptive", "eta", "theta", "fastsam_t", "fastsam_lam",
    "fastsam_sharpness", "fastsam_method", "fastsam_base",
)  # fmt: skip


def info(
    cls: type,
    cases: dict[str, dict[str, Any]],
    own_errors: Iterable[tuple[dict[str, Any], type[Exception], str]],
    required: dict[str, Any] | None = None,
    lr_error: str = "lr must be one number",
    **kwargs: Any,
) -> OptimizerInfo:
    """An entry of the database, for what all of fastsam's classes have in common."""
    common = {
        "supported_impls": (),
        "not_og_supported_flags": NEW_KEYS,
        "supports_complex": False,
        "step_requires_closure": True,
        "supports_multiple_devices": False,
    }
    required = {"base_optimizer": SGD} if required is None else required
    return OptimizerInfo(
        cls,
        optim_inputs_func=inputs(cases),
        optim_error_inputs_func=errors(required, own_errors, lr_error),
        **(common | kwargs),
    )


def light(cls: type, cases: dict, own_errors: Iterable[Any]) -> OptimizerInfo:
    """An entry for a class that has an update of its own."""
    own_errors = [*LIGHT_ERRORS, *own_errors]
    return info(cls, cases, own_errors, LIGHT, r"lr must be one number, got shape \(2,\)")


#: What a class needs in loops that do no more than any optimizer's.
NEEDED: dict[str, dict[str, Any]] = {
    "FunctionalSAM": {"by_hand": True}, "MSAM": {"momentum": 0.9}
}  # fmt: skip
#: Cases of methods whose perturbation is noise.
BY_NOISE = {name: kwargs for name, kwargs in PLAIN.items() if name != "everything"}
NO_ETA = [error for error in SAM_ERRORS if "eta" not in error[0]]
LAM = ({"lam": 1.5}, ValueError, r"lam must be a number in \[0, 1\]")
fastsam_db = [
    info(
        fastsam.SAM, EVERY_BASE, SAM_ERRORS,
        scheduler_inputs=(
            [lambda opt: StepLR(opt, gamma=0.9, step_size=10)],
            [lambda opt: LinearLR(opt, start_factor=0.4, total_iters=4)],
            [lambda opt: ConstantLR(opt, factor=0.4, total_iters=4), ReduceLROnPlateau],
            [
                lambda opt: StepLR(opt, gamma=0.9, step_size=10),
                lambda opt: ExponentialLR(opt, gamma=0.99),
                lambda opt: PolynomialLR(opt, power=0.9, total_iters=40),
                ReduceLROnPlateau,
            ],
        ),
    ),
    info(fastsam.ASAM, PLAIN, SAM_ERRORS),
    info(
        fastsam.UnifiedSAM,
        PLAIN | {
            "to USAM": MOMENTUM | {"lam": "1/t"},
            "to SAM": {"base_optimizer": NAdam, "lam": "1-1/t"},
        },
        [*SAM_ERRORS, LAM],
    ),
    info(fastsam.USAM, PLAIN, SAM_ERRORS),
    info(fastsam.SSAM, PLAIN | {"on USAM": MOMENTUM | {"lam": 0.0}}, [*SAM_ERRORS, LAM]),
    info(
        fastsam.VaSSO,
        PLAIN | {"RMSprop, not fused": {"base_optimizer": RMSprop, "theta": 0.4}},
        [*SAM_ERRORS, ({"theta": 1.5}, ValueError, r"theta must be in \[0, 1\], got 1.5")],
    ),
    info(
        fastsam.SAMAR, PLAIN | {"below SAM": MOMENTUM | {"lam": 0.5}},
        [*SAM_ERRORS, ({"lam": -1.0}, ValueError, "lam must be at least 0 and finite, got -1.0"),
         ({"rule": 1}, TypeError, "rule must be a SharpnessRatio, a SharpnessTrend or another")],
    ),
    info(
        fastsam.GSAM, PLAIN | {"along the first": MOMENTUM | {"alpha": 0.2, "variant": "first"}},
        [*SAM_ERRORS, ({"alpha": -1.0}, ValueError, "alpha must be at least 0 and finite, got -1"),
         ({"variant": "g"}, ValueError, "variant must be one of 'perturbed', 'first', got 'g'")],
    ),
    info(
        fastsam.WSAM,
        PLAIN | {"coupled": MOMENTUM | {"decouple": False},
                 "RMSprop, not fused": {"base_optimizer": RMSprop, "gamma": 0.4}},
        [*SAM_ERRORS, ({"gamma": 1.0}, ValueError, r"gamma must be in \[0, 1\), got 1.0")],
    ),
    info(fastsam.GNP, PLAIN | {"unit": MOMENTUM | {"unit": True}},
         [*SAM_ERRORS, ({"alpha": -1.0}, ValueError, "alpha must be at least 0 and finite")]),
    info(fastsam.LESAM, PLAIN | {"close by": MOMENTUM | {"sigma": 0.1, "rho_max": 0.2}},
         [({"sigma": -1.0}, ValueError, "sigma must be at least 0 and finite, got -1.0"),
          ({"rho_max": -1.0}, ValueError, "rho_max must be at least 0 and finite, got -1.0")]),
    info(fastsam.ESAM, PLAIN | {"half": MOMENTUM | {"beta": 0.5}},
         [*SAM_ERRORS, ({"beta": 0.0}, ValueError, r"beta must be in \(0, 1\], got 0.0")]),
    info(fastsam.FriendlySAM, PLAIN | {"of half": MOMENTUM | {"sigma": 0.5, "lmbda": 0.6}},
         [*SAM_ERRORS, ({"lmbda": 1.5}, ValueError, r"lmbda must be in \[0, 1\], got 1.5")]),
    info(
        fastsam.PreconditionedSAM,
        PLAIN | {"second moment": {"base_optimizer": AdamW, "preconditioner": "second_moment",
                                   "form": "constraint"}},
        [*SAM_ERRORS, ({"damping": 0.0}, ValueError, "damping must be above 0 and finite, got 0.0"),
         ({"form": "c"}, ValueError, "form must be one of 'objective', 'constraint', got 'c'")],
    ),
    info(
        fastsam.FunctionalSAM,
        {name: kwargs | {"by_hand": True} for name, kwargs in PLAIN.items()}
        | {"preconditioned": {"base_optimizer": AdamW, "by_hand": True, "preconditioned": True,
                              "warmup": 1}},
        [*SAM_ERRORS, ({"warmup": -1}, ValueError, "warmup must be"),
         ({"preconditioned": True}, TypeError, "exp_avg_sq")],
        {"base_optimizer": SGD} | NEEDED["FunctionalSAM"],
    ),
    info(fastsam.TraceSAM, BY_NOISE | {"several": MOMENTUM | {"samples": 2}},
         [*NO_ETA, ({"samples": 0}, ValueError, "samples must be")]),
    info(
        fastsam.MSAM,
        {"momentum": MOMENTUM, "AdamW": {"base_optimizer": AdamW},
         "adaptive": MOMENTUM | {"adaptive": True, "eta": 0.1, "max_grad_norm": 1.0}},
        [*SAM_ERRORS, ({"momentum": 0.0}, TypeError, "SGD with momentum=0"),
         ({"renormalize": True}, ValueError, "renormalize must be False with MSAM")],
        {"base_optimizer": SGD} | NEEDED["MSAM"],
    ),
    info(fastsam.DelayedSAM,
         {name: kwargs for name, kwargs in PLAIN.items() if name != "everything"},
         [*SAM_ERRORS, ({"renormalize": True}, ValueError, "renormalize must be False with")]),
    info(
        fastsam.LookSAM,  # with a radius at which v is no difference of nearly equal gradients
        {name: kwargs | {"rho": 0.5} for name, kwargs in PLAIN.items()}
        | {"every second": MOMENTUM | {"k": 2, "alpha": 0.5, "rho": 0.5}},
        [*SAM_ERRORS, ({"k": 0}, ValueError, "k must be an integer of at least 1, got 0"),
         ({"alpha": -1.0}, ValueError, "alpha must be at least 0 and finite, got -1.0")],
    ),
    light(
        fastsam.LightSAM,
        {
            "adam": LIGHT | EVERYTHING,
            "adagrad": LIGHT | {"rule": "adagrad", "weight_decay": 0.1},
            "adagrad_norm": LIGHT | {"rule": "adagrad_norm", "lr": 0.1},
        },
        [({"rule": "sgd"}, ValueError, "rule must be one of .* got 'sgd'")],
    ),
    light(fastsam.AdaSAM, {"default": LIGHT, "everything": LIGHT | EVERYTHING}, []),
    info(
        LETS, LEARNED,
        [*SAM_ERRORS, ({"rho_lr": -1.0}, ValueError, "rho_lr must be at least 0 and finite"),
         ({"hessian": "exact"}, ValueError, "hessian must be one of 'diag', 'difference'")],
    ),
    info(
        fastsam.AdaGradNorm,
        {
            "default": {},
            "non-default lr": {"lr": 0.1, "initial_accumulator_value": 0.1},
            "Tensor lr": {"lr": torch.tensor(0.1)},
            "maximize": {"maximize": True},
        },
        [
            ({"lr": -0.5}, ValueError, "lr must be at least 0 and finite, got -0.5"),
            ({"lr": NAN}, ValueError, "lr must be at least 0 and finite, got nan"),
            ({"initial_accumulator_value": -1.0}, ValueError, "initial_accumulator_value must be"),
        ],
        {},
        step_requires_closure=False, not_og_supported_flags=(),
    ),
]  # fmt: skip
