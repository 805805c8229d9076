"""The worked examples on every backend; and ``check_method``, on them, on ours, on faulty ones."""

import importlib
import itertools
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import fastsam
from fastsam.methods.vasso import EMA
from fastsam.step.rule import _DECLARED
from fastsam.testing import check_method

import launches
import oracles
from registry import BACKENDS, DEVICE, FixedLoss, diagonal

EXAMPLES = Path(__file__).resolve().parents[2] / "docs" / "examples"
sys.path.insert(0, str(EXAMPLES))  # a user's files, imported by name
PowerSAM = importlib.import_module("power_sam").PowerSAM
GSAM = importlib.import_module("gsam").GSAM
Lion = importlib.import_module("lion").Lion

SGD = torch.optim.SGD
MOMENTUM = {"lr": 0.1, "momentum": 0.9}
LION = {"lr": 0.01, "weight_decay": 0.1}


@pytest.fixture(autouse=True)
def undeclared(monkeypatch):
    """What a test declares is not counted among the library's rules afterwards."""
    monkeypatch.setattr("fastsam.step.rule._DECLARED", weakref.WeakSet(_DECLARED))


# --- the equations, with none of the library's code ---------------------------------------------


def norm(xs):
    return sum((x * x).sum() for x in xs).sqrt()


def perturbed(weights, grads, scale=0.05):
    return [w + scale * g / (norm(grads) + 1e-12) for w, g in zip(weights, grads, strict=True)]


def with_momentum(weights, gradient, steps, u_of):
    """SGD with momentum along what ``u_of`` gives; its buffers start as the first of these."""
    buffers = None
    for _ in range(steps):
        us = u_of(weights, gradient(weights), gradient)
        buffers = us if buffers is None else [0.9 * b + u for b, u in zip(buffers, us, strict=True)]
        weights = [w - 0.1 * b for w, b in zip(weights, buffers, strict=True)]
    return weights


def power_sam(weights, gradient, steps, power=0.5, adaptive=False):
    def u_of(ws, gs, gradient):
        ts = [w.abs() + 0.1 if adaptive else torch.ones_like(w) for w in ws]
        n = norm([t * g for t, g in zip(ts, gs, strict=True)]) + 1e-12
        es = [0.05 * t * t * g / n**power for t, g in zip(ts, gs, strict=True)]
        return gradient([w + e for w, e in zip(ws, es, strict=True)])

    return with_momentum(weights, gradient, steps, u_of)


def gsam(weights, gradient, steps, alpha=0.4):
    """The authors' words: take away alpha times the part of g that is orthogonal to g~."""

    def u_of(ws, gs, gradient):
        seconds = gradient(perturbed(ws, gs))
        length = norm(seconds)
        units = [x / length for x in seconds]
        along = sum((g * x).sum() for g, x in zip(gs, units, strict=True))
        orthogonal = [g - along * x for g, x in zip(gs, units, strict=True)]
        return [x - alpha * o for x, o in zip(seconds, orthogonal, strict=True)]

    return with_momentum(weights, gradient, steps, u_of)


def sam_on_lion(weights, gradient, steps, sign=1.0):
    averages = [torch.zeros_like(w) for w in weights]
    for _ in range(steps):
        gs = [sign * g for g in gradient(weights)]  # of what is minimised
        us = [sign * u for u in gradient(perturbed(weights, gs))]
        cs = [0.9 * m + 0.1 * u for m, u in zip(averages, us, strict=True)]
        averages = [0.99 * m + 0.01 * u for m, u in zip(averages, us, strict=True)]
        weights = [w - 0.01 * (c.sign() + 0.1 * w) for w, c in zip(weights, cs, strict=True)]
    return weights


CASES = {
    "power": (PowerSAM, (SGD,), MOMENTUM, power_sam),
    "power 0.25, adaptive": (
        PowerSAM, (SGD,), MOMENTUM | {"power": 0.25, "adaptive": True, "eta": 0.1},
        lambda *args: power_sam(*args, power=0.25, adaptive=True),
    ),
    "gsam": (GSAM, (SGD,), MOMENTUM, gsam),
    "gsam 1.5": (GSAM, (SGD,), MOMENTUM | {"alpha": 1.5}, lambda *args: gsam(*args, alpha=1.5)),
    "lion": (fastsam.SAM, (Lion,), LION, sam_on_lion),
    "lion, up": (
        fastsam.SAM, (Lion,), LION | {"maximize": True},
        lambda *args: sam_on_lion(*args, sign=-1.0),
    ),
}  # fmt: skip
#: Absolute, for weights up to about 3; as in ``test_methods.py``.
TOLERANCE = {torch.float64: 2e-14, torch.float32: 5e-6}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_equation(name, dtype, backend):
    """Over 12 steps, from a formula in float64 that runs on its own."""
    cls, args, kwargs, formula = CASES[name]
    problem = oracles.Problem([(1031,), (6, 7), ()], seed=3)

    def gradient(weights):
        return [torch.as_tensor(g) for g in problem.grad([w.numpy() for w in weights])]

    start = [torch.as_tensor(w) for w in problem.initial()]
    params = [torch.nn.Parameter(w.to(DEVICE, dtype, copy=True)) for w in start]
    optimizer = cls(params, *args, backend=backend, **kwargs)
    for _ in range(12):
        for half in (optimizer.first_step, optimizer.second_step):
            grads = gradient([p.detach().double().cpu() for p in params])
            for p, g in zip(params, grads, strict=True):
                p.grad = g.to(DEVICE, dtype)
            half()
    for p, w in zip(params, formula(start, gradient, 12), strict=True):
        torch.testing.assert_close(p.double().cpu(), w, rtol=0, atol=TOLERANCE[dtype])


# --- what is special about each -----------------------------------------------------------------


def take_steps(optimizer, params, count=3):
    for _ in range(count):
        for half in (optimizer.first_step, optimizer.second_step):
            for p in params:
                p.grad = torch.sin(3 * p.detach()) + p.detach().flip(0) / 3
            half()
    return [p.detach() for p in params]


def new_params():
    return [torch.nn.Parameter(torch.linspace(-2, 3, n, device=DEVICE)) for n in (17, 5)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("cls", "special", "same"),
    [
        (PowerSAM, {"power": 1.0}, fastsam.SAM), (PowerSAM, {"power": 0.0}, fastsam.USAM),
        (GSAM, {"alpha": 0.0}, fastsam.SAM),
    ],
)  # fmt: skip
def test_is_another_method_at_one_end(cls, special, same, backend):
    found, expected = (
        take_steps(c([*(ps := new_params())], SGD, backend=backend, **k, **MOMENTUM), ps)
        for c, k in ((cls, special), (same, {}))
    )
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gsam_without_a_second_gradient(backend):
    """u = g~ - alpha g, where g~ is 0."""
    param = torch.nn.Parameter(torch.ones(3, device=DEVICE))
    optimizer = GSAM([param], SGD, lr=1.0, alpha=0.5, backend=backend)
    for half, grad in ((optimizer.first_step, 2.0), (optimizer.second_step, 0.0)):
        param.grad = torch.full_like(param, grad)
        half()
    assert param.tolist() == [2.0, 2.0, 2.0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("maximize", [False, True])
def test_lion_by_itself_is_lion_fused(backend, maximize):
    """Without a perturbation, whose second gradient is then the first."""
    kwargs = {"lr": 0.01, "weight_decay": 0.1, "maximize": maximize}
    alone, params = new_params(), new_params()
    lion = Lion(alone, **kwargs)
    optimizer = fastsam.SAM(params, Lion, rho=0.0, backend=backend, **kwargs)

    def closure(params):
        loss = sum((p.sin() * p).sum() for p in params)
        loss.backward()
        return loss

    for _ in range(4):
        lion.zero_grad()
        losses = lion.step(lambda: closure(alone)), optimizer.step(lambda: closure(params))
        torch.testing.assert_close(*losses)
    for p, q in zip(alone, params, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)
        torch.testing.assert_close(lion.state[p]["exp_avg"], optimizer.state[q]["exp_avg"])
    optimizer.base_optimizer.load_state_dict(lion.state_dict())  # the same names


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda ps: PowerSAM(ps, SGD, power=1.5, lr=0.1), r"power must be in \[0, 1\], got 1.5"),
        (lambda ps: GSAM(ps, SGD, alpha=-1, lr=0.1), "alpha must be at least 0 and finite, got -1"),
        (lambda ps: Lion(ps, lr=-1.0), "lr and weight_decay must be at least 0, got -1.0"),
        (lambda ps: fastsam.SAM(ps, Lion, betas=(0.9, 1.0)), r"betas must be in \[0, 1\)"),
    ],
)
def test_out_of_range(make, message):
    with pytest.raises(ValueError, match=message):
        make(new_params())


interpreted = pytest.mark.skipif(DEVICE != "cpu", reason="counts in Triton's interpreter")
SAM_BYTES = 4 + 16 + 20  # reduce, perturb, update


@interpreted
@pytest.mark.parametrize(
    ("name", "kernels", "expected"),
    [
        ("power", ["reduce", "perturb", "update"], SAM_BYTES),
        ("gsam", ["reduce", "perturb", "reduce", "update"], SAM_BYTES + 8 + 4),
        ("lion", ["reduce", "perturb", "update"], SAM_BYTES),
    ],
)
def test_launches_and_bytes(name, kernels, expected, monkeypatch):
    """As the docstrings say; the base's own ``step`` is never called."""
    cls, args, kwargs, _ = CASES[name]
    params = [torch.nn.Parameter(torch.ones(8192))]
    optimizer = cls(params, *args, backend="triton", **kwargs)
    monkeypatch.setattr(args[0], "step", None)
    take_steps(optimizer, params, 1)
    grads = [torch.ones_like(p) for p in params]
    with launches.record() as log:
        for half in (optimizer.first_step, optimizer.second_step):
            for p, g in zip(params, grads, strict=True):
                p.grad = g
            half(zero_grad=True)
    assert log.kernels == [f"{kernel}_kernel" for kernel in kernels]
    assert (log.loaded + log.stored) / 8192 == pytest.approx(expected, rel=0.02)


# --- check_method ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_examples_pass(name):
    cls, args, kwargs, formula = CASES[name]
    check_method(cls, *args, formula=formula, **kwargs)


LIGHT = {"lr": 0.01, "rho": 0.01}
OURS = [
    (fastsam.SAM, (torch.optim.AdamW,), {}), (fastsam.SAM, (fastsam.AdaGradNorm,), {}),
    (fastsam.SAM, (torch.optim.RMSprop,), {}), (fastsam.ASAM, (SGD,), MOMENTUM),
    (fastsam.USAM, (torch.optim.Adagrad,), {}), (fastsam.UnifiedSAM, (SGD,), {"lam": "1/t"}),
    (fastsam.SSAM, (torch.optim.Adam,), {}), (fastsam.VaSSO, (SGD,), MOMENTUM),
    (fastsam.SAMAR, (SGD,), MOMENTUM), (fastsam.AdaSAM, (), LIGHT),
    (fastsam.GSAM, (SGD,), MOMENTUM), (fastsam.WSAM, (SGD,), MOMENTUM | {"gamma": 0.6}),
    (fastsam.GNP, (SGD,), MOMENTUM), (fastsam.LESAM, (SGD,), MOMENTUM),
    (fastsam.FriendlySAM, (SGD,), MOMENTUM | {"sigma": 0.9}),
    (fastsam.FunctionalSAM, (SGD,), {"by_hand": True}),
    (fastsam.FunctionalSAM, (torch.optim.AdamW,), {"by_hand": True, "preconditioned": True}),
    (fastsam.PreconditionedSAM, (SGD,), MOMENTUM),
    (fastsam.PreconditionedSAM, (torch.optim.AdamW,), {"preconditioner": diagonal}),
    (fastsam.DelayedSAM, (SGD,), MOMENTUM),
    (fastsam.MSAM, (SGD,), MOMENTUM), (fastsam.LookSAM, (SGD,), MOMENTUM),
    (FixedLoss, (), {}), (fastsam.ESAM, (SGD,), MOMENTUM),
    *((fastsam.LightSAM, (), LIGHT | {"rule": r}) for r in ("adagrad_norm", "adagrad", "adam")),
]  # fmt: skip
#: Triton's interpreter takes ten seconds for each; the others differ from them little there.
ON_TRITON = (fastsam.VaSSO, fastsam.SAMAR)


@pytest.mark.parametrize(
    ("cls", "args", "kwargs"), OURS, ids=lambda x: x.__name__ if isinstance(x, type) else None
)
def test_our_methods_pass(cls, args, kwargs):
    everywhere = DEVICE == "cuda" or cls in ON_TRITON
    check_method(cls, *args, backends=None if everywhere else ["reference", "torch"], **kwargs)


def test_every_class_of_ours_is_checked():
    public = [getattr(fastsam, name) for name in fastsam.__all__]
    common = fastsam.rules.SharpnessAwareOptimizer
    classes = {x for x in public if isinstance(x, type) and issubclass(x, common)}
    # the places of parameters count for noise, and their order is one of the things checked
    noisy = {x for x in classes if issubclass(x, (fastsam.UniversalSAM, fastsam.BSAM))}
    ours = {fastsam.SAMSPS if cls is FixedLoss else cls for cls, *_ in OURS}
    assert classes - noisy == ours


@pytest.mark.parametrize(
    "cls", [SGD, fastsam.LETS, "SAM", None, fastsam.SAM([torch.zeros(2)], SGD, lr=0.1)], ids=str
)
def test_what_is_no_method(cls):
    with pytest.raises(TypeError, match="cls must be a subclass of SharpnessAwareOptimizer, got"):
        check_method(cls, SGD, lr=0.1)


def test_wrong_arguments_are_not_taken_for_faults():
    with pytest.raises(ValueError, match="rho must be at least 0"):
        check_method(fastsam.SAM, SGD, lr=0.1, rho=-1.0)
    with pytest.raises(TypeError, match="base_optimizer must be a subclass"):
        check_method(fastsam.SAM, "SGD")
    with pytest.raises(TypeError, match="backend must not be among the arguments"):
        check_method(fastsam.SAM, SGD, lr=0.1, backend="torch")
    with pytest.raises(ValueError, match="backend must be one of"):
        check_method(fastsam.SAM, SGD, lr=0.1, backends=["cuda"])


# --- faults that it has to find -----------------------------------------------------------------

number = itertools.count()


@pytest.fixture
def edited(tmp_path, monkeypatch):
    """An example as another module, in which one text has been replaced where it comes first."""

    def edit(name, old, new, times=1):
        text = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
        assert old in text, old
        module = f"edited_{next(number)}"
        (tmp_path / f"{module}.py").write_text(text.replace(old, new, times), encoding="utf-8")
        monkeypatch.syspath_prepend(tmp_path)
        return importlib.import_module(module)

    yield edit
    for name in [name for name in sys.modules if name.startswith("edited_")]:
        del sys.modules[name]


def finds(message, cls, *args, backends=None, **kwargs):
    with pytest.raises(AssertionError, match=message) as caught:
        check_method(cls, *args, backends=backends, **kwargs)
    assert str(caught.value).startswith(f"{cls.__name__} on backend ")


AGREES, FORMULA = "agrees with the reference", "follows the formula"
IN_KERNEL = ["triton"]


@pytest.mark.parametrize(
    ("example", "old", "new", "message"),
    [
        ("power_sam", "tl.log(norm + 1e-12)", "tl.log(norm + 1e-6)", AGREES),
        ("power_sam", "rho / (norm + 1e-12) **", "rho / (1.001 * norm + 1e-12) **", AGREES),
        ("gsam", "tl.where(second > 0, product / second, 0.0)", "product / first", AGREES),
        ("lion", " * (1 - lr * tl.load(h + WEIGHT_DECAY))", "", AGREES),
        ("lion", "w.mul_(1 - ", "w.mul(1 - ", AGREES),
        ("lion", " - lr * sign, (average,)", " + lr * sign, (average,)", AGREES),
        ("lion", '"WEIGHT_DECAY": group["weight_decay"], ', "", "must have the same names"),
        ("power_sam", "return tl.where((norm > 0) & (norm < float(\"inf\")), scale, 0.0)",
         "return scale", "bears odd first gradients: NaN: weights are not finite"),
    ],
)  # fmt: skip
def test_wrong_in_one_of_both(example, old, new, message, edited):
    """The Triton functions and the torch equations are not the same."""
    module = edited(example, old, new)
    if example == "lion":
        finds(f"'triton': .*{message}", fastsam.SAM, module.Lion, backends=IN_KERNEL, **LION)
    else:
        cls = module.PowerSAM if example == "power_sam" else module.GSAM
        finds(f"'triton': .*{message}", cls, SGD, backends=IN_KERNEL, **MOMENTUM)


@pytest.mark.parametrize("backend", BACKENDS)
def test_wrong_in_both(backend, edited):
    """Only the formula tells."""
    module = edited("gsam", "1 + alpha * projection, -alpha", "1 - alpha * projection, -alpha", 2)
    check_method(module.GSAM, SGD, backends=[backend], **MOMENTUM)
    finds(f"{backend!r}: {FORMULA}: .* weight 0 is", module.GSAM, SGD, backends=[backend],
          formula=gsam, **MOMENTUM)  # fmt: skip


# Classes of this module, so that they can be pickled.


def _advance_in_place(g, state, h):
    average = state["ascent_ema"]
    average.copy_(torch.where(average.isnan(), g, average + h["THETA"] * (g - average)))
    return {"ascent_ema": average}


class InPlace(fastsam.VaSSO):
    """Its rule writes to the state that it is given, which a failed step has to leave alone."""

    ascent = replace(EMA, name="in place", advance=_advance_in_place, eager="")


class Forgetful(fastsam.SAM):
    """Its radius follows a count that no state dict has."""

    taken = 0

    def first_step(self, *args, **kwargs):
        for group in self.param_groups:
            group["rho"] = 0.05 / (1 + self.taken)
        super().first_step(*args, **kwargs)

    def second_step(self, *args, **kwargs):
        super().second_step(*args, **kwargs)
        self.taken += 1


class Unpicklable(fastsam.SAM):
    """Has a function without a name."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.schedule = lambda t: 1 / t


class Shrinking(fastsam.SAM):
    """Changes the gradients that it is given."""

    def first_step(self, *args, **kwargs):
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    param.grad *= 0.5
        super().first_step(*args, **kwargs)


class Deaf(fastsam.SAM):
    """Sets what others are to set."""

    def first_step(self, *args, **kwargs):
        for group in self.param_groups:
            group |= {"rho": 0.05, "lr": 0.1}
        super().first_step(*args, **kwargs)


class Unscaled(fastsam.SAM):
    """Does not pass the scaler on."""

    def first_step(self, zero_grad=False, grad_scaler=None):
        super().first_step(zero_grad)

    def second_step(self, zero_grad=False, grad_scaler=None):
        super().second_step(zero_grad)


class Secretive(fastsam.SAM):
    """Takes an option and does not pass it on."""

    option = ""

    def __init__(self, *args, **kwargs):
        kwargs.pop(self.option, None)
        super().__init__(*args, **kwargs)


class NeverSkips(Secretive):
    option = "skip_nonfinite"


class NoMasters(Secretive):
    option = "master_weights"


class ToNearest(Secretive):
    option = "rounding"


class Lost(fastsam.SAM):
    """After a first gradient that is not finite it perturbs no more."""

    def first_step(self, *args, **kwargs):
        super().first_step(*args, **kwargs)
        if not torch.isfinite(self.metrics["grad_norm"]):
            for group in self.param_groups:
                group["rho"] = 1e-30


@pytest.mark.parametrize(
    ("cls", "message"),
    [
        (InPlace, "undoes a step that fails: after restore"),
        (Forgetful, "goes on from a checkpoint: resumed: weight 0 between passes 1 is"),
        (Unpicklable, "goes on as a copy: .*Error: .*lambda"),
        (Shrinking, "only reads gradients: after pass 1: gradient 0 is"),
        (Deaf, "follows its groups: smaller numbers in the groups change nothing"),
        (Unscaled, "serves a grad scaler: "),
        (
            NeverSkips,
            "skips second gradients that are not finite: after a second gradient with nan",
        ),
        (NoMasters, "serves master weights: master weights hold no more than their parameters"),
        (ToNearest, "rounds at random: most of the perturbation is rounded away"),
        (Lost, "bears odd first gradients: NaN: nothing is perturbed two steps later"),
    ],
)
def test_breaks_a_promise(cls, message):
    finds(message, cls, SGD, backends=["reference"], lr=0.1)
