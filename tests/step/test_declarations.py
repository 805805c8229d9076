"""Wrong declarations of rules: each is refused by name, before a weight has changed."""

import importlib
import itertools
import sys
import weakref
from functools import partial

import pytest
import torch

import fastsam
from fastsam import bases
from fastsam.rules import Ascent, Base, Descent, SharpnessAwareOptimizer, register_base
from fastsam.step.rule import _DECLARED

from registry import DEVICE

SGD = torch.optim.SGD


@pytest.fixture(autouse=True)
def undeclared(monkeypatch):
    """What a test declares or registers is not there afterwards."""
    monkeypatch.setattr("fastsam.step.rule._DECLARED", weakref.WeakSet(_DECLARED))
    monkeypatch.setattr(bases, "BASES", dict(bases.BASES))


def nothing(*args):
    return None


def one(*args):
    return 1.0


def radius(rho, norm, total, h):
    return rho * torch.ones_like(torch.as_tensor(norm))


ascent = partial(Ascent, name="mine", kernel="nowhere", radius=radius)
descent = partial(Descent, name="mine", kernel="nowhere", coefficients=lambda *_: (1.0, 0.0))
base = partial(Base, name="mine", kernel="nowhere", update=nothing)
RULES = {"ascent": ascent, "descent": descent, "base": base}


def states(*names):
    return lambda group: dict.fromkeys(names, 0.0)


# --- refused where it is declared -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("declare", "message"),
    [
        (partial(ascent, norm="both"), "norm of ascent 'mine' must be 'gradient', 'direction' or"),
        (partial(ascent, advance=nothing), "ascent 'mine' has advance and needs usable with it"),
        (partial(ascent, usable=nothing), "ascent 'mine' has usable and needs advance with it"),
        (partial(ascent, accumulate=one), "ascent 'mine' has accumulate and needs accumulator"),
        (partial(ascent, accumulator=one), "ascent 'mine' has accumulator and needs accumulate"),
        (partial(ascent, states=states("ascent_a")), "has states and needs advance with them"),
        (partial(descent, sums=("first", "third")),
         "sums of descent 'mine' must be among 'first', 'second', 'product', 'sharpness', 'rise', "
         "'loss', got "
         "'third'"),
        (partial(descent, keeps=True, fills=True),
         "descent 'mine' must not have both keeps and fills"),
        (partial(descent, scalars=dict.fromkeys("abc", 0.0)),
         "descent 'mine' has three scalars and needs adapt with them"),
        (partial(descent, scalars=dict.fromkeys("abcd", 0.0)),
         "descent 'mine' may have 3 scalars, got a, b, c, d"),
        (partial(descent, scalars={"t": 0.0}), "scalars of descent 'mine' must have none of the"),
        (partial(descent, adapt=nothing, scalars={"a": 0.0}),
         "descent 'mine' has adapt and needs scalars, and 'sharpness' among its sums"),
        (partial(descent, adapt=nothing, sums=("sharpness",)),
         "descent 'mine' has adapt and needs scalars, and 'sharpness' among its sums"),
        *((partial(rule, kernel=nothing), "kernel of a rule must be a string, got <function")
          for rule in (ascent, descent, base)),
        *((partial(rule, name=""), "name of a rule must be a string, got ''")
          for rule in (ascent, descent, base)),
    ],
)  # fmt: skip
def test_refused_where_it_is_declared(declare, message):
    with pytest.raises(ValueError, match=message):
        declare()


def test_registered_once():
    class Mine(SGD):
        pass

    first = base()
    register_base(Mine, first)
    register_base(Mine, first)  # as when a module is loaded anew
    with pytest.raises(ValueError, match="cls Mine has been registered with another declaration"):
        register_base(Mine, base())
    with pytest.raises(ValueError, match="cls SGD has been registered with another declaration"):
        register_base(SGD, first)
    assert bases.find_base(Mine) is first and bases.find_base(SGD) is not first


@pytest.mark.parametrize("cls", [None, "SGD", torch.nn.Linear, SGD([torch.zeros(1)], lr=0.1)])
def test_registers_optimizers_only(cls):
    with pytest.raises(TypeError, match="cls must be a subclass of torch.optim.Optimizer, got"):
        register_base(cls, base())


@pytest.mark.parametrize("make", [lambda: None, lambda: "sgd", ascent, descent])
def test_registers_bases_only(make):
    with pytest.raises(TypeError, match="base must be a fastsam.rules.Base, got"):
        register_base(torch.optim.Rprop, make())


# --- refused by the optimizer ---------------------------------------------------------------------


def params():
    return [torch.nn.Parameter(torch.ones(3, device=DEVICE))]


def method(**rules):
    """A class with these rules."""
    return type("Mine", (SharpnessAwareOptimizer,), rules)


def with_base(rule):
    """A base optimizer of this rule."""
    cls = type("MyBase", (SGD,), {})
    register_base(cls, rule)
    return cls


averaging = partial(ascent, advance=nothing, usable=nothing)


@pytest.mark.parametrize(
    ("rule", "error", "message"),
    [
        (partial(averaging, states=states("ascent_a", "ascent_b", "ascent_c")), ValueError,
         "ascent 'mine' may have 2 states, got ascent_a, ascent_b, ascent_c"),
        (partial(averaging, states=states("average")), ValueError,
         "states of ascent 'mine' must have names that begin with 'ascent_', got 'average'"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("optimizer", [SGD, torch.optim.RMSprop])
def test_wrong_states_of_an_ascent(rule, error, message, optimizer):
    """At once where the base is fused, else in the first step."""
    with pytest.raises(error, match=message):
        step(method(ascent=rule())(params(), optimizer, rho=0.1, lr=0.1))


@pytest.mark.parametrize(
    ("rule", "error", "message"),
    [
        (partial(base, states=states("a", "b", "c", "d")), ValueError,
         "base 'mine' may have 3 states, got a, b, c, d"),
        (partial(base, states=states("ascent_ema")), TypeError,
         "base 'mine' must have none of the states ascent_ema, master_weight, which are fastsam's"),
        (partial(base, states=states("master_weight")), TypeError, "and has master_weight"),
    ],
)  # fmt: skip
def test_wrong_states_of_a_base(rule, error, message):
    with pytest.raises(error, match=message):
        fastsam.VaSSO(params(), with_base(rule()), lr=0.1)


def test_group_keys_that_the_base_has():
    class Mine(SharpnessAwareOptimizer):
        def __init__(self, params, base_optimizer, **kwargs):
            super().__init__(params, base_optimizer, rho=0.1, own={"momentum": 0.5}, **kwargs)

    with pytest.raises(
        TypeError, match="base_optimizer must have none of the group keys .*momentum"
    ):
        Mine(params(), SGD, lr=0.1)


def check_lr(group):
    """The base completes groups after the rules have seen them for the first time."""
    if group.get("lr", 0.0) > 1:
        raise ValueError("lr is too large")


@pytest.mark.parametrize("kind", ["ascent", "descent", "base"])
def test_checks_of_rules_are_asked(kind):
    """In the constructor, where a group has the value, by add_param_group, and in every step."""
    rule = RULES[kind](check=check_lr)
    optimizer = with_base(rule) if kind == "base" else SGD
    cls = method(**({} if kind == "base" else {kind: rule}))
    with pytest.raises(ValueError, match="lr is too large"):
        cls([{"params": params(), "lr": 2.0}], optimizer, rho=0.1, lr=0.5)
    made = cls(params(), optimizer, rho=0.1, lr=0.5)
    with pytest.raises(ValueError, match="lr is too large"):
        made.add_param_group({"params": params(), "lr": 2.0})
    assert len(made.param_groups) == 1
    made.param_groups[0]["lr"] = 2.0
    refused(made, ValueError, "lr is too large")


# --- refused when the triton backend looks for the functions --------------------------------------

FUNCTIONS = {
    "ascent": ("direction(g, state, h)", "radius(rho, norm, total, h)"),
    "descent": ("coefficients(state, first, second, product, h)", "adapt(state, sharpness, h)"),
    "base": ("update(w, u, state, h, step, fresh, squared_norms)",),
}
ROOM = {"ascent": 3, "descent": 4, "base": 12}
numbers = itertools.count()


@pytest.fixture
def kernel(tmp_path, monkeypatch):
    """Write a module with the functions of a kind of rule, changed, and give its name."""

    def write(kind, columns="class Columns(IntEnum):\n    A = 0\n", edit=("", "")):
        functions = "".join(f"@triton.jit\ndef {f}:\n    return 1.0\n" for f in FUNCTIONS[kind])
        text = f"from enum import IntEnum\nimport triton\n{columns}{functions}"
        assert edit[0] in text
        name = f"kernel_{next(numbers)}"
        (tmp_path / f"{name}.py").write_text(text.replace(*edit), encoding="utf-8")
        monkeypatch.syspath_prepend(tmp_path)
        importlib.invalidate_caches()
        return name

    yield write
    for name in [name for name in sys.modules if name.startswith("kernel_")]:
        del sys.modules[name]


def columns_a(*args):
    return {"A": 1.0}


def declare(kind, kernel, columns=columns_a):
    """An optimizer on the triton backend, whose rule of this kind has the kernel."""
    given = {"kernel": kernel, "columns": columns}
    if kind == "ascent":
        return method(ascent=ascent(**given))(params(), SGD, rho=0.1, lr=0.1, backend="triton")
    if kind == "base":
        return fastsam.SAM(params(), with_base(base(**given)), lr=0.1, backend="triton")
    rule = descent(sums=("sharpness",), scalars={"a": 1.0}, adapt=nothing, **given)
    return method(descent=rule)(params(), SGD, rho=0.1, lr=0.1, backend="triton")


def step(optimizer):
    (param,) = optimizer.param_groups[0]["params"]
    try:
        for half in (optimizer.first_step, optimizer.second_step):
            param.grad = torch.full_like(param, 2.0)
            half()
    finally:
        assert param.tolist() == [1.0] * 3


def refused(optimizer, error, message):
    with pytest.raises(error, match=message):
        step(optimizer)
    assert not optimizer.between_passes


@pytest.mark.parametrize("kind", FUNCTIONS)
def test_a_kernel_that_does_not_exist(kind):
    refused(declare(kind, "no.such.kernel"), ImportError, "No module named 'no'")


EVERY_FUNCTION = [(k, f.partition("(")[0]) for k, fs in FUNCTIONS.items() for f in fs]


@pytest.mark.parametrize(("kind", "function"), EVERY_FUNCTION)
def test_a_kernel_without_a_function(kind, function, kernel):
    name = kernel(kind, edit=(f"def {function}(", f"def {function}_("))
    message = f"kernel '{name}' of {kind} 'mine' needs a function '{function}'"
    refused(declare(kind, name), AttributeError, message)


@pytest.mark.parametrize(("kind", "function"), EVERY_FUNCTION)
def test_a_function_that_is_not_triton_s(kind, function, kernel):
    name = kernel(kind, edit=(f"@triton.jit\ndef {function}(", f"def {function}("))
    message = (
        f"'{function}' in kernel '{name}' of {kind} 'mine' must be a function with @triton.jit"
    )
    refused(declare(kind, name), TypeError, message)


@pytest.mark.parametrize("kind", FUNCTIONS)
@pytest.mark.parametrize(
    ("columns", "error", "message"),
    [
        ("", ValueError, "columns of {kind} 'mine' and Columns in kernel '{name}' must have the "
         "same names, and only one of them has 'A'"),
        ("class Columns(IntEnum):\n    A = 0\n    B = 1\n", ValueError,
         "must have the same names, and only one of them has 'B'"),
        ("class Columns(IntEnum):\n    B = 0\n", ValueError, "only one of them has 'A'"),
        ("class Columns:\n    A = 0\n", TypeError,
         "Columns in kernel '{name}' must be an IntEnum"),
        ("class Columns(IntEnum):\n    A = 1\n", ValueError,
         "Columns in kernel '{name}' must be numbered from 0, at most {room}"),
    ],
)  # fmt: skip
def test_columns_that_do_not_match(kind, columns, error, message, kernel):
    name = kernel(kind, columns)
    message = message.format(kind=kind, name=name, room=ROOM[kind])
    refused(declare(kind, name), error, message)


@pytest.mark.parametrize("kind", FUNCTIONS)
def test_too_many_columns(kind, kernel):
    names = [f"A{i}" for i in range(ROOM[kind] + 1)]
    lines = "".join(f"    {name} = {i}\n" for i, name in enumerate(names))
    name = kernel(kind, f"class Columns(IntEnum):\n{lines}")
    optimizer = declare(kind, name, lambda *_: dict.fromkeys(names, 1.0))
    refused(optimizer, ValueError, f"must be numbered from 0, at most {ROOM[kind]}")


@pytest.mark.parametrize("kind", FUNCTIONS)
def test_a_kernel_is_found_when_it_is_needed(kind):
    """Not by the other backends."""
    rule = RULES[kind]()
    optimizer = with_base(rule) if kind == "base" else SGD
    cls = method(**({} if kind == "base" else {kind: rule}))
    for backend in ("reference", "torch"):
        step(cls(params(), optimizer, rho=0.1, lr=0.0, backend=backend))
