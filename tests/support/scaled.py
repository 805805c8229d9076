"""Steps with a GradScaler, or without one, on the same problem."""

import copy

import torch

import oracles
from registry import (
    BACKENDS,
    BASES,
    DEVICE,
    DTYPES,
    METHODS,
    OWN_UPDATES,
    Base,
    build,
    numpy,
    parameters,
    set_grads,
)

INF, NAN = float("inf"), float("nan")
SHAPES = [(33,), (4, 5), (), (0,)]
GROUPS = [{"params": [0, 3]}, {"params": [1, 2], "rho": 0.1, "lr": 0.03}]
PROBLEM = oracles.Problem(SHAPES, seed=5)
FP32 = DTYPES["fp32"]
RMSPROP = Base(torch.optim.RMSprop, "", {"lr": 0.01, "eps": 1e-3})
FUSED = ("sgd-momentum", "adamw", "adagrad", "adagrad_norm")
#: Everything on the quick backends; under Triton's interpreter each kernel's variants once.
ON_TRITON = [
    ("sam", "adamw"), ("asam", "sgd-momentum"), ("ssam-adaptive-clip", "adagrad_norm"),
    ("vasso-all", "adagrad"), ("samar-all", "sgd-momentum"), ("sam", "rmsprop"),
    ("lightsam-1", ""), ("lightsam-2", ""), ("lightsam-3-all", ""), ("adasam", ""),
]  # fmt: skip


def own_update(method):
    return METHODS[method].bases[0] in OWN_UPDATES


def cases(bases):
    """(method, base, backend): all on the quick backends, ``ON_TRITON`` under the interpreter."""
    quick = BACKENDS if DEVICE == "cuda" else ("reference", "torch")
    pairs = [(m, base) for m in METHODS for base in ([""] if own_update(m) else bases)]
    slow = [] if DEVICE == "cuda" else ON_TRITON
    return [(*p, b) for p in pairs for b in quick] + [(*p, "triton") for p in slow]


def create(method, base, backend, dtypes=FP32, **kwargs):
    """Parameters at the problem's start, and their optimizer."""
    params = parameters(PROBLEM.initial(), dtypes)
    spec = METHODS[method]
    named = BASES | OWN_UPDATES | {"rmsprop": RMSPROP}
    chosen = named[spec.bases[0] if own_update(method) else base]
    return params, build(spec, chosen, params, GROUPS, backend, **kwargs)


def scaler_of(scale=2.0**12, **kwargs):
    return torch.amp.GradScaler(DEVICE, init_scale=scale, **kwargs)


def give_grads(params, scaler=None, spoil=None, dtypes=FP32):
    """The problem's gradients at the weights, rounded to storage, then scaled as autograd would."""
    grads = PROBLEM.grad(numpy(params))
    if spoil is not None:
        grads[1][2, 3] = spoil
    set_grads(params, grads, dtypes)
    for p in params:
        p.grad = (p.grad * 1.0 if scaler is None else scaler.scale(p.grad)).to(p.grad.dtype)


def step(optimizer, params, scaler=None, spoil=(None, None), dtypes=FP32):
    for half, bad in zip((optimizer.first_step, optimizer.second_step), spoil, strict=True):
        give_grads(params, scaler, bad, dtypes)
        half(grad_scaler=scaler)


def run(optimizer, params, scaler=None, steps=5, dtypes=FP32):
    for _ in range(steps):
        step(optimizer, params, scaler, dtypes=dtypes)
        if scaler is not None:
            scaler.update()
    return params


def snapshot(optimizer, params):
    """Copies of weights and state, but for the host's count of steps, which skipped ones enter."""
    state = copy.deepcopy(optimizer.state_dict())
    for group in state["param_groups"]:
        for key in ("fastsam_t", "fastsam_method", "fastsam_base"):  # the last two are words
            group.pop(key, None)
    return {"weights": [p.detach().clone() for p in params], **state}


def assert_same(a, b):
    """Nested dicts and lists of tensors with the same bits, or NaN in the same places."""
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
