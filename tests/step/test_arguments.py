"""Arguments of every class: bad values are refused by name, numbers of every kind are equal."""

import copy
import inspect
import math
import pickle
import warnings
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import tensor
from torch.nn import Parameter

import fastsam

from networks import bits, closure_of, model_and_data, same
from registry import BACKENDS, DEVICE

SGD = {"base_optimizer": torch.optim.SGD, "lr": 0.1, "momentum": 0.9}
LIGHT = {"lr": 0.1, "rho": 0.05}
META = tensor(0.1, device="meta")

#: What is no finite number of at least 0, or one that cannot be computed with.
NO_NUMBER = [
    -0.1, math.nan, math.inf, -math.inf, "0.1", True, 10**400, -(10**5000), 1j, [0.1], (), {},
    Fraction(-1, 2), Decimal("NaN"), Decimal("-1"), np.float32("nan"), np.array(0.1),
    np.bool_(True), tensor(-0.05), tensor(math.nan), tensor(math.inf), tensor([0.1, 0.1]), META,
    tensor(True), tensor(1j), tensor([0.1]).to_sparse(), object(),
]  # fmt: skip
NO_TENSOR = [tensor(0.5), tensor([0.5])]
NO_BOOL = ["False", "True", 0, 1, None, 1.0, [], tensor(True), np.array(True)]
NO_INTEGER = [1.5, 1.0, "1", True, np.bool_(True), tensor(1), math.nan, Fraction(2, 1) / 3, [1], -1]
NO_NAME = [[], {}, 3, None, "", "Nearest", b"nearest", np.array(["a", "b"]), tensor(1.0)]
NO_BETAS = [
    0.9, None, "ab", (0.9,), (0.9, 1.0), (0.9, 0.9, 0.9), (-0.1, 0.9), (0.9, math.nan), (True, 0.9),
    ("a", "b"), tensor([0.9, 0.9]), (0.9, META), (0.9, tensor(1.0)), (tensor([0.9, 0.9]), 0.9),
]  # fmt: skip
NO_CONTEXT = [1, "x", True, [], torch.no_grad(), torch.autograd.set_grad_enabled, lambda x: x]
#: Torch's own, and those whose values need no check.
RANGES = {
    **dict.fromkeys(("rho", "eta", "lr", "weight_decay", "momentum", "lr_decay",
                     "initial_accumulator_value"), [*NO_NUMBER, None]),
    "eps": [*NO_NUMBER, None],
    "dampening": [math.nan, math.inf, -math.inf, "0.1", True, 10**400, META, None],
    "theta": [*NO_NUMBER, None, 1.1, *NO_TENSOR],
    "rho_lr": [*NO_NUMBER, None, *NO_TENSOR],
    "betas": NO_BETAS,
    "max_grad_norm": [x for x in NO_NUMBER if x is not math.inf] + [0, 0.0, *NO_TENSOR],
    **dict.fromkeys(("adaptive", "renormalize", "skip_nonfinite", "master_weights", "maximize",
                     "repeat_random", "set_to_none", "decouple", "unit",
                     "nesterov", "amsgrad", "differentiable", "scratch"), NO_BOOL),
    "amplify": [*(x for x in NO_NUMBER if type(x) not in (bool, np.bool_)), None, 0, *NO_TENSOR],
    "perturb_every": [*NO_INTEGER, 0, None],
    **dict.fromkeys(("ascent_steps", "k"), [*NO_INTEGER, 0, None]),
    "interval": [*NO_INTEGER, 0, None],
    "perturb_when": [3, "late", True],
    "start": [*NO_INTEGER, None],
    "stop": [*NO_INTEGER, 0],
    "seed": [*NO_INTEGER, 2**32, None],
    **dict.fromkeys(("rounding", "backend", "hessian", "norm"), NO_NAME),
    **dict.fromkeys(("ascent_context", "descent_context"), NO_CONTEXT),
    **dict.fromkeys(("alpha", "sigma"), [*NO_NUMBER, None, *NO_TENSOR]),
    "gamma": [*NO_NUMBER, None, 1, *NO_TENSOR],
    "lmbda": [*NO_NUMBER, None, 1.5, *NO_TENSOR],
    "rho_max": [*NO_NUMBER, None],
    **dict.fromkeys(("variant", "form"), NO_NAME),
    "preconditioner": [3, None, "sgd", [], True],
    "lr_max": [*NO_NUMBER, None],
    "loss_min": [math.nan, math.inf, -math.inf, "0.1", True, 10**400, None, *NO_TENSOR],
    "p": [*NO_NUMBER[:2], None, 1, 0, "2", True],
    "beta": [*NO_NUMBER, None, 1, *NO_TENSOR],
    "damping": [*NO_NUMBER, None, 0, *NO_TENSOR],
    **dict.fromkeys(("smoothing", "fast", "slow"), [*NO_NUMBER, None, 1, *NO_TENSOR]),
    "c": [*NO_NUMBER, None, 0.9, *NO_TENSOR],
    **dict.fromkeys(("lam_min", "lam_max"), [*NO_NUMBER, None, *NO_TENSOR]),
    "base_optimizer": [None, "SGD", torch.optim.LBFGS, fastsam.SAM, torch.optim.SGD([META], 0.1)],
    "rho_optimizer": [None, "SGD", torch.optim.LBFGS],
    "optimizer": [None, "SGD", torch.optim.SGD([META], 0.1)],
}  # fmt: skip
#: Those that are something else in some class.
OWN = {
    ("ESAM", "beta"): [*NO_NUMBER, None, 0, 1.5, *NO_TENSOR],
    ("ESAM", "renormalize"): [*NO_BOOL, True],
    ("UnifiedSAM", "lam"): [*NO_NUMBER, None, 1.1, "t", *NO_TENSOR],
    ("SAMSPS", "lam"): [*NO_NUMBER, None, 1.1, "t", *NO_TENSOR],
    ("SSAM", "lam"): [*NO_NUMBER, None, 1.1, "t", *NO_TENSOR],
    ("SAMAR", "lam"): [*NO_NUMBER, None, *NO_TENSOR],
    ("SAMAR", "rule"): [3, "adam", [], True],
    ("LightSAM", "rule"): [[], {}, 3, None, "sgd", torch.optim.SGD, np.array(["adam"])],
}


def params():
    return [Parameter(torch.ones(2, device=DEVICE))]


def create(name, **kwargs):
    cls = getattr(fastsam, name)
    if name == "LETS":
        return cls(kwargs.pop("optimizer", fastsam.SAM(params(), **SGD)), **kwargs)
    if name in ("SharpnessRatio", "SharpnessTrend"):
        return cls(**kwargs)
    own = (
        {}
        if name in ("AdaGradNorm", "SAMSPS")
        else LIGHT
        if name in ("LightSAM", "AdaSAM")
        else SGD
    )
    return cls(params(), **own | kwargs)


def arguments():
    """Every argument of every class, of its own, of SAM's and of the bases that it passes on to."""
    common = [key for key in inspect.signature(fastsam.SAM).parameters if key in RANGES]
    for name in ("SAM", "ASAM", "USAM", "UnifiedSAM", "SSAM", "VaSSO", "SAMAR", "FriendlySAM",
                 "LESAM", "GSAM", "WSAM", "GNP", "MSAM", "DelayedSAM", "LookSAM",
                 "PreconditionedSAM", "SAMSPS", "ESAM", "LightSAM",
                 "AdaSAM", "AdaGradNorm", "LETS", "SharpnessRatio",
                 "SharpnessTrend"):  # fmt: skip
        parameters = inspect.signature(getattr(fastsam, name)).parameters
        for key, parameter in parameters.items():
            if parameter.kind is not inspect.Parameter.VAR_KEYWORD and key != "params":
                yield name, key, {}
        light = ("adaptive", "eta", "base_optimizer", "rho")
        if "kwargs" in parameters:
            for key in common:
                fixed = (name == "ASAM" and key == "adaptive") or key in parameters
                fixed = fixed or (name == "LESAM" and key == "rho")  # its rho_max
                fixed = fixed or (name == "LookSAM" and key == "perturb_every")  # its k
                if not fixed and not (name in ("LightSAM", "AdaSAM", "SAMSPS") and key in light):
                    yield name, key, {}
    for rule in ("adagrad_norm", "adagrad"):
        for key in ("lr", "rho", "eps", "betas", "weight_decay"):
            yield "LightSAM", key, {"rule": rule}
    for base in (torch.optim.SGD, torch.optim.AdamW, torch.optim.Adagrad, fastsam.AdaGradNorm):
        for key in inspect.signature(base).parameters:
            if key not in ("params", "foreach", "fused", "capturable"):
                yield "SAM", key, {"base_optimizer": base}
    yield "SAM", "lr", {"base_optimizer": torch.optim.RMSprop}


@pytest.mark.parametrize(
    ("name", "key", "more"), list(arguments()), ids=lambda x: getattr(x, "__name__", None)
)
def test_bad_values_are_refused_by_name(name, key, more):
    """Nothing is accepted that a step would fail for, or take for something else."""
    values = OWN.get((name, key)) or RANGES[key]
    for value in values:
        if "base_optimizer" in more:
            more.pop("momentum", None)
        is_unfused = more.get("base_optimizer") is torch.optim.RMSprop
        if is_unfused and not isinstance(value, (float, str)):
            continue  # a base that is not fused may have rates of other kinds
        with pytest.raises((ValueError, TypeError), match=rf"\b{key}\b") as raised:
            kwargs = more | {key: value}
            if more.get("base_optimizer") is not None:
                fastsam.SAM(params(), **{"lr": 0.1} | kwargs)
            else:
                create(name, **kwargs)
        message = str(raised.value)
        assert " must " in message or " needs one" in message, message
        assert "got " in message or "sharpness-aware" in message or " needs one" in message
        assert len(message) < 400 and "\n" not in message


@pytest.mark.parametrize(
    ("base", "given", "message"),
    [
        (torch.optim.RMSprop, {"lr": "x"}, "lr must be at least 0 and finite, got 'x'"),
        (torch.optim.RMSprop, {"lr": None}, "lr must be a number or a tensor of one, got None"),
        (torch.optim.RMSprop, {"lr": 0.1, "alpha": []}, "alpha must be a number .*, got \\[\\]"),
        (torch.optim.RAdam, {"betas": ("a", 0.9)}, "betas must be 2 numbers, got \\('a', 0.9\\)"),
    ],
)
@pytest.mark.parametrize("where", ["argument", "several"])
def test_what_a_base_that_is_not_fused_fails_for_is_named(where, base, given, message):
    group = {"params": params()}
    with pytest.raises(ValueError, match=f"^{message}$"):
        if where == "argument":
            fastsam.SAM(**group, base_optimizer=base, **given)
        else:
            fastsam.SAM([group | given | {"base_optimizer": base}], torch.optim.SGD, lr=0.1)


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize(
    ("key", "value"), [("lr", "x"), ("lr", None), ("weight_decay", "x"), ("alpha", None)]
)
def test_what_is_set_in_a_base_that_is_not_fused_is_named(key, value, several):
    """And the weights are those of before the step."""
    model, loss_fn = model_and_data()
    group = {"params": model.parameters()}
    group |= {"base_optimizer": torch.optim.RMSprop} if several else {}
    default = torch.optim.SGD if several else torch.optim.RMSprop
    optimizer = fastsam.SAM([group], default, lr=0.1)
    optimizer.step(closure_of(loss_fn))
    optimizer.param_groups[0][key] = value
    before = bits(model)
    with pytest.raises(ValueError, match=f"^{key} must be .*, got {value!r}$"):
        optimizer.step(closure_of(loss_fn))
    assert same(bits(model), before)


def test_a_base_may_take_what_it_likes_and_fail_for_its_own_reasons():
    class Own(torch.optim.Optimizer):
        def __init__(self, params, lr=None, decay=0.1):
            super().__init__(params, {"lr": lr, "decay": decay})

        def step(self):
            raise TypeError("its own")

    model, loss_fn = model_and_data()
    optimizer = fastsam.SAM(model.parameters(), Own, decay=0.2)
    with pytest.raises(TypeError, match="its own"):
        optimizer.step(closure_of(loss_fn))
    optimizer.param_groups[0]["decay"] = "later"
    with pytest.raises(ValueError, match="decay must be a number"):
        optimizer.step(closure_of(loss_fn))


@pytest.mark.parametrize("name", ["SAM", "RMSprop", "LightSAM", "from_optimizer"])
def test_a_key_of_groups_is_no_argument(name):
    made = torch.optim.SGD(params(), lr=0.1)
    with pytest.raises(TypeError, match="perturb is a key of parameter groups and no argument"):
        if name == "from_optimizer":
            fastsam.SAM.from_optimizer(made, perturb=False)
        elif name == "LightSAM":
            fastsam.LightSAM(params(), **LIGHT, perturb=False)
        else:
            base = torch.optim.SGD if name == "SAM" else torch.optim.RMSprop
            fastsam.SAM(params(), base, lr=0.1, perturb=False)


NUMBERS = [
    Fraction(1, 8),
    Decimal("0.125"),
    np.float32(0.125),
    np.float64(0.125),
    np.float16(0.125),
]


@pytest.mark.parametrize("backend", BACKENDS)
def test_numbers_of_every_kind_are_equal(backend):
    """A step with each is the step with the float, bit for bit; they are kept as that."""

    def run(value, betas):
        torch.manual_seed(0)
        model, loss_fn = model_and_data()
        optimizer = fastsam.SAM(
            model.parameters(), torch.optim.AdamW, rho=value, eta=value, adaptive=True, lr=value,
            weight_decay=value, betas=betas, max_grad_norm=value, eps=value, backend=backend,
        )  # fmt: skip
        optimizer.step(closure_of(loss_fn))
        group = optimizer.param_groups[0]
        return bits(model), [type(group[key]) for key in ("rho", "eta", "lr", "weight_decay")]

    expected, _ = run(0.125, (0.875, 0.875))
    for value in NUMBERS[: None if backend != "triton" else 2]:
        found, kinds = run(value, (1 - value if value is not NUMBERS[1] else 0.875, 0.875))
        assert same(found, expected) and set(kinds) <= {float, np.float64}


def test_tensors_of_one_element():
    """As torch has them for its rates; other arguments keep a view, which follows the tensor."""
    decay, lr = tensor([0.5]), tensor([[0.1]])
    optimizer = fastsam.SAM(params(), torch.optim.SGD, lr=lr, weight_decay=decay)
    group = optimizer.param_groups[0]
    assert group["lr"] is lr and group["weight_decay"].shape == ()
    decay.fill_(0.25)
    assert group["weight_decay"].item() == 0.25


@pytest.mark.parametrize("flag", ["renormalize", "skip_nonfinite", "nesterov", "adaptive"])
def test_bools_of_numpy(flag):
    optimizer = create("SAM", **{flag: np.True_})
    kept = getattr(optimizer, flag, optimizer.param_groups[0].get(flag))
    assert kept is True


# --- groups, added and changed ---


@pytest.mark.parametrize("name", ["SAM", "VaSSO", "LightSAM", "AdaGradNorm"])
@pytest.mark.parametrize("key", ["lr", "rho", "weight_decay"])
@pytest.mark.parametrize("value", [-1, math.nan, tensor(-1.0), META, "1"])
def test_groups_that_are_added(name, key, value):
    if name == "AdaGradNorm" and key != "lr":
        return
    optimizer = create(name)
    with pytest.raises(ValueError, match=f"{key} must be"):
        optimizer.add_param_group({"params": params(), key: value})
    assert len(optimizer.param_groups) == 1
    with pytest.raises(ValueError, match=f"{key} must be"):
        type(optimizer)(
            [{"params": params(), key: value}], *([torch.optim.SGD] if name in ("SAM", "VaSSO")
                                                 else []), **LIGHT if name == "LightSAM" else {}
        )  # fmt: skip
    group = {"params": params(), "lr": Fraction(1, 8)}
    optimizer.add_param_group(group)
    assert optimizer.param_groups[1] is group and type(group["lr"]) is float


@pytest.mark.parametrize("key", ["rho", "lr", "momentum", "adaptive"])
def test_group_keys_that_change_are_looked_at_in_the_step(key):
    """Replaced, or a tensor on a CPU that was written to."""
    model, loss_fn = model_and_data()
    kwargs = (
        SGD | {"adaptive": False, "rho": 0.05} | ({} if key == "adaptive" else {key: tensor(0.1)})
    )
    optimizer = fastsam.SAM(model.parameters(), **kwargs)
    closure = closure_of(loss_fn)
    optimizer.step(closure)
    before, good = bits(model), optimizer.param_groups[0][key]
    wrong = [-1.0, math.nan, tensor(-1.0), "1"] if key != "adaptive" else ["False", 1]
    for value in wrong:
        optimizer.param_groups[0][key] = value
        for _ in range(2):
            with pytest.raises(ValueError, match=f"{key} must be"):
                optimizer.step(closure)
    optimizer.param_groups[0][key] = good
    if key != "adaptive":
        good.fill_(-1)
        with pytest.raises(ValueError, match=rf"{key} must be .*, got tensor\(-1"):
            optimizer.step(closure)
        good.fill_(0.1)
    assert same(bits(model), before)
    optimizer.step(closure)
    assert not same(bits(model), before)
    optimizer.param_groups[0]["rho"] = Fraction(1, 4)
    optimizer.step(closure)
    assert optimizer.param_groups[0]["rho"] == 0.25
    optimizer.base_optimizer.add_param_group({"params": params(), "lr": -1.0})
    with pytest.raises(ValueError, match="lr must be"):
        optimizer.step(closure)


# --- settings ---

SETTINGS = ["repeat_random", "set_to_none", "scratch", "ascent_steps", "seed", "max_grad_norm",
            "skip_nonfinite", "renormalize", "perturb_every", "start", "stop", "perturb_when",
            "ascent_context", "descent_context", "backend", "rounding",
            "master_weights"]  # fmt: skip


@pytest.mark.parametrize("key", SETTINGS)
@pytest.mark.parametrize("how", ["made", "copied", "pickled"])
def test_settings_are_checked_when_they_are_set(key, how):
    optimizer = create("SAM")
    if how != "made":
        optimizer = (
            copy.deepcopy(optimizer) if how == "copied" else pickle.loads(pickle.dumps(optimizer))
        )
    before = getattr(optimizer, key)
    for value in RANGES[key]:
        with pytest.raises((ValueError, TypeError), match=f"{key} must be"):
            setattr(optimizer, key, value)
        assert getattr(optimizer, key) is before
    setattr(optimizer, key, before)


def test_settings_that_cannot_change():
    optimizer = create("SAM")
    with pytest.raises(AttributeError, match="rounding must stay 'nearest' .*, got 'stochastic'"):
        optimizer.rounding = "stochastic"
    with pytest.raises(AttributeError, match="master_weights must stay False .*, got True"):
        optimizer.master_weights = True
    optimizer.master_weights = np.False_  # as it is
    with pytest.raises(AttributeError):
        create("LightSAM").rule = "adagrad"
    if DEVICE == "cpu":
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRITON_INTERPRET", "0")
            with pytest.raises((RuntimeError, ImportError), match="backend='triton' needs"):
                optimizer.backend = "triton"
    assert optimizer.backend == "auto"


def test_settings_of_other_classes():
    lets, unified = create("LETS"), create("UnifiedSAM")
    for optimizer, key, values in (
        (lets, "hessian", NO_NAME),
        (lets, "interval", RANGES["interval"]),
        (unified, "lam", OWN["UnifiedSAM", "lam"]),
    ):
        before = getattr(optimizer, key)
        for value in values:
            with pytest.raises(ValueError, match=f"{key} must be"):
                setattr(optimizer, key, value)
        assert getattr(optimizer, key) == before


@pytest.mark.parametrize("value", ["x", 1, None, tensor(True)])
def test_zero_grad_is_a_bool(value):
    model, loss_fn = model_and_data()
    optimizer = fastsam.SAM(model.parameters(), **SGD)
    before = bits(model)
    loss_fn().backward()
    for call in (optimizer.first_step, optimizer.plain_step):
        with pytest.raises(TypeError, match="zero_grad must be True or False, got "):
            call(value)
    assert same(bits(model), before)
    optimizer.first_step(np.True_)
    with pytest.raises(TypeError, match="zero_grad must be True or False, got "):
        optimizer.second_step(value)
    assert same(bits(model), before) and not optimizer.between_passes


# --- a warm-up from 0 whose closure was forgotten ---


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW, torch.optim.NAdam])
@pytest.mark.parametrize("gradients", ["of a loss", "none", "some are zero", "one is missing"])
def test_a_forgotten_closure_in_a_warm_up_from_0(base, gradients):
    """Refused, though every rate is 0; torch.distributed.checkpoint's call has zero gradients."""
    model, loss_fn = model_and_data()
    optimizer = fastsam.SAM(model.parameters(), base, lr=0.1)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: t / 10)
    assert optimizer.param_groups[0]["lr"] == 0
    if gradients != "none":
        loss_fn().backward()
    weights = list(model.parameters())
    if gradients == "some are zero":
        for p in weights[1:]:
            p.grad.zero_()
    elif gradients == "one is missing":
        for p in weights:
            p.grad.zero_()
        weights[0].grad = None
    with pytest.raises(RuntimeError, match="SAM.step needs a closure"):
        optimizer.step()
    assert not optimizer.state


def test_the_state_that_torch_asks_for():
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    model, loss_fn = model_and_data()
    for parameter in list(model.parameters())[:1]:
        parameter.requires_grad_(False)
    optimizer = fastsam.VaSSO(model.parameters(), torch.optim.AdamW, lr=tensor(0.1))
    saved = get_optimizer_state_dict(model, optimizer)
    assert len(saved["state"]) == len(list(model.parameters())) - 1
    assert all({"exp_avg", "ascent_ema"} <= set(state) for state in saved["state"].values())
    optimizer.step(closure_of(loss_fn))


def test_what_to_do_after_a_failed_second_pass():
    model, loss_fn = model_and_data()
    optimizer = fastsam.SAM(model.parameters(), **SGD)
    before = bits(model)
    loss_fn().backward()
    optimizer.first_step(zero_grad=True)
    for call in (optimizer.first_step, lambda: optimizer.step(closure_of(loss_fn))):
        with pytest.raises(RuntimeError, match=r"expected second_step.* call restore\(\) first"):
            call()
    optimizer.restore()
    assert same(bits(model), before)
    optimizer.step(closure_of(loss_fn))


# --- dtypes that change ---


def cast_run(optimizer, model, loss_fn):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(3):
            optimizer.step(closure_of(loss_fn))
    return [w for w in seen if "rounded away" in str(w.message)]


def network(dtype=torch.float32):
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2).to(DEVICE, dtype)
    x = torch.ones(4, 3, device=DEVICE)
    return model, lambda: model(x.to(model.weight.dtype)).square().mean()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("explicit", [False, True])
def test_a_model_that_is_cast_in_mid_run(dtype, explicit):
    """The warning of construction, once, at the user's line; none where the user has chosen."""
    model, loss_fn = network()
    optimizer = fastsam.SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    assert cast_run(optimizer, model, loss_fn) == []
    model.to(dtype)
    if explicit:
        loss_fn().backward()
        with pytest.warns(UserWarning, match="rounded away") as seen:
            optimizer.first_step(zero_grad=True)
        assert len(seen) == 1 and seen[0].filename == __file__
        loss_fn().backward()
        optimizer.second_step()
    else:
        seen = cast_run(optimizer, model, loss_fn)
        assert len(seen) == 1 and seen[0].filename == __file__
    assert cast_run(optimizer, model.to(torch.bfloat16), loss_fn) == []
    assert cast_run(copy.deepcopy(optimizer), model, loss_fn) == []
    model, loss_fn = network()
    optimizer = fastsam.SAM(model.parameters(), torch.optim.SGD, lr=0.1, master_weights=True)
    cast_run(optimizer, model, loss_fn)
    assert cast_run(optimizer, model.to(dtype), loss_fn) == []


def test_a_16_bit_group_that_is_added():
    model, loss_fn = network()
    optimizer = fastsam.SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    late = Parameter(torch.ones(2, dtype=torch.bfloat16, device=DEVICE))
    with pytest.warns(UserWarning, match="rounded away") as seen:
        optimizer.add_param_group({"params": [late]})
    assert len(seen) == 1 and seen[0].filename == __file__
    assert cast_run(optimizer, model, loss_fn) == []
    optimizer = fastsam.SAM(model.parameters(), torch.optim.SGD, lr=0.1, rounding="stochastic")
    optimizer.add_param_group({"params": [late]})
    with pytest.raises(
        ValueError, match="rounding='stochastic' is for bfloat16 parameters, got float16"
    ):
        optimizer.add_param_group({"params": [Parameter(late.detach().half())]})
    assert len(optimizer.param_groups) == 2


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("call", ["step", "first_step", "plain_step", "step_micro_batches"])
def test_float16_under_stochastic_rounding_is_refused_in_the_step(call, backend):
    model, loss_fn = network(torch.bfloat16)
    optimizer = fastsam.SAM(
        model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, rounding="stochastic",
        backend=backend,
    )  # fmt: skip
    optimizer.step(closure_of(loss_fn))
    model.half()
    before, state = bits(model), copy.deepcopy(optimizer.state_dict())
    closure = closure_of(loss_fn)
    for _ in range(2):
        optimizer.zero_grad()
        loss_fn().backward()
        with pytest.raises(
            ValueError, match="rounding='stochastic' is for bfloat16 parameters, got float16"
        ):
            {
                "step": lambda: optimizer.step(closure),
                "step_micro_batches": lambda: optimizer.step_micro_batches([closure]),
            }.get(call, getattr(optimizer, call))()
    assert same(bits(model), before) and not optimizer.between_passes
    assert str(optimizer.state_dict()) == str(state)
    model.bfloat16()
    optimizer.step(closure)
