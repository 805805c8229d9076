"""What ``test_fuzz.py`` draws: parameters, groups, arguments and gradients."""

from typing import Any

import torch
from hypothesis import strategies as st

from fastsam.step.precision import HALF

from fuzzing import DTYPES, FUZZ_BASES, LAYOUTS, Config, Grads, Spec
from registry import METHODS, OWN_UPDATES

FEW = [(), (0,), (1,), (2,), (5,), (3, 4), (2, 3, 4), (2, 0), (2, 3, 4, 5)]
SHAPES = FEW * 4 + [(1023,), (1024,), (1025,), (31, 33)] * 2 + [(16384,), (129, 128), (16383,)]
SHAPES += [(256, 257)]
RHOS, LRS = [0.05, 0.31, 0.73, 0.0], [0.11, 0.013, 0.0]
sampled = st.sampled_from


@st.composite
def specs(draw: Any, dtypes: tuple[torch.dtype, ...], free: bool) -> Spec:
    dtype = draw(sampled(dtypes))
    grad_dtype = None
    if free and draw(st.integers(0, 3)) == 3:
        others = (torch.float32, torch.bfloat16, torch.float64)
        grad_dtype = draw(sampled([other for other in others if other != dtype]))
    return Spec(draw(sampled(SHAPES)), dtype, draw(sampled(LAYOUTS[:1] * 4 + LAYOUTS[:4])),
                grad_dtype, draw(st.integers(0, 9)))  # fmt: skip


@st.composite
def keys_of_group(draw: Any, method: str, base: str) -> dict[str, Any]:
    """Hyper-parameters of one group's own."""
    keys: dict[str, Any] = {}
    if draw(st.booleans()):
        rho = draw(sampled(RHOS))
        keys["rho"] = torch.tensor(rho) if draw(st.integers(0, 5)) == 5 else rho
    if draw(st.booleans()):
        keys["lr"] = draw(sampled(LRS))
    if not method.startswith("light") and draw(st.integers(0, 2)) == 2:
        keys |= {"adaptive": draw(st.booleans()), "eta": draw(sampled([0.01, 0.0, 0.4]))}
    if method.startswith("vasso") and draw(st.booleans()):
        keys["theta"] = draw(sampled([0.2, 1.0, 0.0]))
    if (
        base.startswith(("sgd", "adam", "adagrad"))
        and base != "adagrad_norm"
        and draw(st.booleans())
    ):
        keys["weight_decay"] = draw(sampled([0.03, 0.0]))
    return keys


#: Methods with an ``alpha`` of their own, which refuse a base that has one, too.
NAMESAKES = ("gnp", "gsam")


@st.composite
def configs(draw: Any) -> Config:
    method = draw(sampled(sorted(METHODS)))
    own = [name for name in METHODS[method].bases if name in OWN_UPDATES]
    taken = {"rmsprop"} if method.startswith(NAMESAKES) else set()
    base = draw(sampled(own or sorted(FUZZ_BASES.keys() - taken)))
    fused = base not in ("rmsprop", "wrapped")
    dtypes = draw(sampled([DTYPES[:1], DTYPES[:1], DTYPES[1:2], DTYPES[:2], DTYPES[2:3], DTYPES[3:],
                           DTYPES, DTYPES[:3]]))  # fmt: skip
    kwargs: dict[str, Any] = {}
    half = any(dtype in HALF for dtype in dtypes)
    if half and fused and draw(st.booleans()):
        kwargs["master_weights"] = True
    elif half and torch.float16 not in dtypes and draw(st.booleans()):
        kwargs |= {"rounding": "stochastic", "seed": draw(sampled([0, 7, 2**32 - 1]))}
    for name, values in (
        ("max_grad_norm", [0.7, 30.0]), ("skip_nonfinite", [True]), ("renormalize", [True]),
        ("perturb_every", [2, 3]), ("start", [1, 2]), ("stop", [3, 4]),
    ):  # fmt: skip
        if draw(st.integers(0, 4)) == 4:
            kwargs[name] = draw(sampled(values))
    sizes = draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
    groups = tuple((size, draw(keys_of_group(method, base))) for size in sizes)
    drawn = tuple(draw(specs(dtypes, fused)) for _ in range(sum(sizes)))
    return Config(method, base, kwargs, drawn, groups)


@st.composite
def new_groups(draw: Any, config: Config) -> tuple[list[Spec], dict[str, Any]]:
    dtypes = tuple(sorted({spec.dtype for spec in config.specs}, key=str))
    drawn = draw(st.lists(specs(dtypes, config.is_fused), min_size=1, max_size=2))
    return drawn, draw(keys_of_group(config.method, config.base))


ODD = ("missing", "zero", "huge", "tiny", "inf", "nan", "holes")


@st.composite
def one_pass(draw: Any) -> Grads:
    odd = {}
    if draw(st.integers(0, 1)):
        odd = draw(st.dictionaries(st.integers(0, 5), sampled(ODD), max_size=2))
    return Grads(
        seed=draw(st.integers(0, 99)), scale=draw(sampled([1.0, 0.03, 40.0])),
        pull=draw(sampled([0.0, 0.6])), odd=odd,
        layouts=tuple(draw(st.lists(sampled(LAYOUTS), min_size=1, max_size=2))),
        delivery=draw(sampled(["assign", "backward", "into", "bucket"])),
    )  # fmt: skip


def passes(count: int) -> Any:
    return st.lists(one_pass(), min_size=count, max_size=count)


def changes() -> Any:
    """A hyper-parameter's key, or an attribute's name, and its new value."""
    values = {
        "rho": [*RHOS, torch.tensor(0.21)], "lr": LRS, "weight_decay": [0.0, 0.02],
        "eta": [0.0, 0.3],
        "momentum": [0.0, 0.9], "theta": [0.0, 0.5, 1.0], "maximize": [True, False],
        "amsgrad": [True, False], "betas": [(0.7, 0.9), (0.0, 0.99)], "max_grad_norm": [None, 0.7],
        "skip_nonfinite": [True, False], "renormalize": [True, False],
    }  # fmt: skip
    return sampled(sorted(values)).flatmap(
        lambda key: st.tuples(st.just(key), sampled(values[key]))
    )
