"""What ``test_fuzz.py`` draws, the optimizers under test, and how their results are compared.

A :class:`Side` is an optimizer with parameters of its own. All sides of a trial take the same
actions on the same gradients; the first one, on the reference backend, is the model. After every
action the others take over its numbers, so that rounding errors do not add up.

How far two sides may differ in one action: 4 units in the last place, and 32 times the epsilon of
the arithmetic on what has changed, which is all that a few operations in another order can do;
where a norm was taken over more than 1,024 elements, the root of their number in the place of 32.

Where that is not enough, because something cancelled or was divided by next to nothing, the model's
own sensitivity decides: the action is repeated on copies of the model (its *shadows*) in each of
which one of ``STREAMS`` has moved by 4 units in the last place, and norms by as much as above; a
result may be off by 16 times the sum of what that does. So it passes if it is the exact one for
inputs that nearly are those given: the usual meaning of a stable computation.

A number that is stored in fewer bits than it is computed in may fall to the other side of a tie,
one unit of storage away, in one element of 64 at most. (The chance of it is the distance between
the sides in units of storage: for bfloat16 some 1 in 1,000.)
"""

import copy
import io
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from fastsam.kernels.layout import Scalar
from fastsam.precision import HALF, MASTER

from faults import FOREIGN, unharmed
from registry import BASES, METHODS, OWN_UPDATES, Base, build

#: What was seen, for the summary of a long run.
SEEN: Counter[str] = Counter()
#: What moves, in one shadow each; by how many epsilons; times the distance of their results.
STREAMS = ("nothing", "weights", "state", "first gradients", "second gradients", "norms")
JITTER, FACTOR = 4, 16
#: Below which float32 has no numbers; a unit or two of it are rounding.
TINIEST = 2.0**-147


class Wrapped(torch.optim.SGD):
    """Not fused, because a subclass may change the update."""


FUZZ_BASES = BASES | {
    "rmsprop": FOREIGN,
    "wrapped": Base(Wrapped, "", {"lr": 0.05, "momentum": 0.9}),
}

# --- tensors ------------------------------------------------------------------------------------

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LAYOUTS = ("plain", "transposed", "gaps", "offset", "expanded")


def noise(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def lay_out(x: Tensor, layout: str) -> Tensor:
    """A tensor with these elements, laid out otherwise in memory."""
    if layout == "transposed":
        order = tuple(reversed(range(x.ndim)))
        return x.permute(order).clone(memory_format=torch.contiguous_format).permute(order)
    if layout == "gaps":
        spread = x.new_zeros((*x.shape, 2))
        spread[..., 0] = x
        return spread[..., 0]
    if layout == "offset":  # one element off the alignment of allocations
        return torch.cat([x.new_zeros(1), x.reshape(-1)])[1:].view(x.shape)
    if layout == "expanded" and x.ndim and x.size(0):
        return x[:1].clone().expand(x.shape)
    return x.clone()


@dataclass(frozen=True)
class Spec:
    """One parameter."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    layout: str = "plain"
    grad_dtype: torch.dtype | None = None
    seed: int = 0

    def make(self) -> torch.nn.Parameter:
        data = lay_out(noise(self.shape, self.seed).to(self.dtype), self.layout)
        return self.adopt(torch.nn.Parameter(data))

    def adopt(self, param: torch.nn.Parameter) -> torch.nn.Parameter:
        if self.grad_dtype is not None:
            param.grad_dtype = self.grad_dtype
        return param


@dataclass(frozen=True)
class Grads:
    """The gradients of one pass: ``odd`` holds what is out of the ordinary, by parameter.

    They are drawn, or with ``pull`` those of a noisy quadratic at the present weights of the model.
    """

    seed: int
    scale: float = 1.0
    pull: float = 0.0
    odd: dict[int, str] = field(default_factory=dict)
    layouts: tuple[str, ...] = ("plain",)
    delivery: str = "assign"

    def layout(self, k: int) -> str:
        return self.layouts[k % len(self.layouts)]

    def value(self, k: int, param: Tensor, spec: Spec) -> Tensor | None:
        """What the model's parameter gets."""
        odd = self.odd.get(k, "")
        if odd == "missing" or not param.requires_grad:
            return None
        g = noise(tuple(param.shape), 1000 * self.seed + k) * self.scale
        g += self.pull * param.detach().double()
        if odd == "zero":
            g.zero_()
        elif odd in ("huge", "tiny"):
            g *= 1e13 if odd == "huge" else 1e-13
        elif odd in ("inf", "nan") and g.numel():
            g.view(-1)[self.seed % g.numel()] = float(odd)
        elif odd == "holes":
            g *= noise(tuple(param.shape), self.seed + k) > 0
        if self.layout(k) == "expanded":
            g = lay_out(g, "expanded")
        g = g.to(spec.grad_dtype or param.dtype)
        # autograd passes it on in the parameter's dtype: there, too, it has to be exact
        return g.to(param.dtype) if self.delivery == "backward" else g

    def deliver(
        self, params: list[Any], grads: list[Tensor | None], buckets: dict[Any, Tensor]
    ) -> None:
        """Let every parameter have its gradient."""
        if self.delivery == "backward":
            for param in params:
                param.grad = None
            losses = [(p * g).sum() for p, g in zip(params, grads, strict=True) if g is not None]
            if losses:
                torch.stack([loss.double() for loss in losses]).sum().backward()
            return
        for k, (param, g) in enumerate(zip(params, grads, strict=True)):
            if g is None:
                param.grad = None
            elif self.delivery == "bucket":  # views of memory that every pass fills again
                memory = buckets.setdefault((k, g.dtype), g.new_zeros(g.numel() + 1))
                param.grad = memory[: g.numel()].view(g.shape).copy_(g)
            elif self.delivery == "into" and _takes(param.grad, g):
                param.grad.copy_(g)
            else:
                param.grad = lay_out(g, self.layout(k))


def _takes(held: Tensor | None, g: Tensor) -> bool:
    if held is None or held.dtype != g.dtype:
        return False
    return not torch._debug_has_internal_overlap(held)


# --- sides --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """What a trial starts from; ``groups`` has the number of parameters and the keys of each."""

    method: str
    base: str
    kwargs: dict[str, Any]
    specs: tuple[Spec, ...]
    groups: tuple[tuple[int, dict[str, Any]], ...]

    @property
    def spec_of_base(self) -> Base:
        return OWN_UPDATES[self.base] if self.base in OWN_UPDATES else FUZZ_BASES[self.base]

    @property
    def is_fused(self) -> bool:
        return self.base not in ("rmsprop", "wrapped")


@contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings that the fuzzer asks for."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


class Side:
    """An optimizer on one backend, with its own parameters."""

    def __init__(self, name: str, config: Config):
        self.name, self.config = name, config
        self.backend = name.split()[0]
        self.specs = list(config.specs)
        self.params: list[Any] = [spec.make() for spec in self.specs]
        self.groups = list(config.groups)
        self.attributes: dict[str, Any] = {}
        self.optimizer = self.create()
        self.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
        self.calls = 0
        self.passes: list[list[Tensor]] = []  # weights at every call of a closure
        self.measures = True  # whether the action is a whole step
        self.buckets: dict[Any, Tensor] = {}
        self.skipped = 0.0

    def create(self) -> Any:
        """The optimizer, new."""
        at, groups = 0, []
        for count, keys in self.groups:
            groups.append({"params": list(range(at, at + count)), **keys})
            at += count
        with quiet():
            optimizer = build(METHODS[self.config.method], self.config.spec_of_base, self.params,
                              groups, self.backend, **self.config.kwargs)  # fmt: skip
        for name, value in self.attributes.items():
            setattr(optimizer, name, value)
        return optimizer

    def renew(self, state: dict[str, Any] | None = None) -> None:
        """Go on with a new optimizer on the same parameters, that has loaded the state."""
        state = self.optimizer.state_dict() if state is None else state
        self.optimizer = self.create()
        self.optimizer.load_state_dict(state)
        self.skipped = 0.0

    def copied(self, name: str) -> "Side":
        """A side with copies of everything."""
        side = copy.copy(self)
        side.name = name
        with quiet():
            side.params, side.optimizer = copy.deepcopy((self.params, self.optimizer))
        for spec, param in zip(self.specs, side.params, strict=True):
            spec.adopt(param)
        side.scaler = torch.amp.GradScaler("cpu", growth_interval=2)
        side.scaler.load_state_dict(self.scaler.state_dict())
        side.buckets, side.groups, side.specs = {}, list(self.groups), list(self.specs)
        side.attributes, side.skipped = dict(self.attributes), 0.0
        return side

    def begin(self) -> None:
        self.calls, self.passes, self.measures = 0, [], True
        self.skipped = self._skipped()

    def _skipped(self) -> float:
        """Steps that this optimizer has skipped so far: the one number that is not saved."""
        scalars = self.optimizer._scalars
        return 0.0 if scalars is None else float(scalars[Scalar.SKIPPED])

    def numbers(self, saved: bool = False) -> dict[str, Any]:
        """Everything there is to compare, by name; ``saved``: without what a step measured."""
        found: dict[str, Any] = {}
        for k, param in enumerate(self.params):
            found[f"weight {k}"] = param.detach().clone()
            for name, x in self.optimizer.state.get(param, {}).items():
                if name == MASTER:  # which counts only where the parameter is what it rounds to
                    x = torch.where(x.to(param.dtype) == param, x, param.float())
                found[f"state {k} {name}"] = x.detach().clone() if isinstance(x, Tensor) else x
        for i, group in enumerate(self.optimizer.param_groups):
            for key, x in group.items():
                if key not in ("params", "differentiable"):  # which loading adds for Adagrad
                    found[f"group {i} {key}"] = x.detach().clone() if isinstance(x, Tensor) else x
        metrics = dict(self.optimizer.metrics)
        metrics.pop("skipped", None)
        found["skipped"] = self._skipped() - self.skipped
        if not saved and self.measures:
            found |= {f"metric {name}": x for name, x in metrics.items()}
            for i, weights in enumerate(self.passes):
                found |= {f"pass {i} {k}": w for k, w in enumerate(weights)}
            found["calls"] = self.calls
        return found

    def take_over(self, model: "Side") -> None:
        """Make the model's numbers this side's, in place."""
        with torch.no_grad():
            for ours, theirs in zip(self.params, model.params, strict=True):
                copy_over(ours, theirs)
                held = self.optimizer.state.get(ours, {})
                for name, x in model.optimizer.state.get(theirs, {}).items():
                    copy_over(held[name], x)
            groups = self.optimizer.param_groups, model.optimizer.param_groups
            for ours, theirs in zip(*groups, strict=True):
                for key, x in theirs.items():
                    if isinstance(x, Tensor):
                        copy_over(ours[key], x)


def copy_over(ours: Any, theirs: Any) -> None:
    if not same_bits(ours, theirs):
        ours.copy_(theirs)


def same_bits(a: Any, b: Any) -> bool:
    """Equal to the bit; a number that has become a device scalar is the same number."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if a.dtype != b.dtype or a.shape != b.shape:
            return False
        a, b = (
            torch.empty(x.shape, dtype=x.dtype).copy_(x).view(-1).view(torch.uint8)
            for x in (a.detach(), b.detach())
        )
        return torch.equal(a, b)
    return a is b or bool(a == b) or bool(a != a and b != b)


class Feed:
    """The closure of all sides: gives them the model's gradients, pass after pass."""

    def __init__(self, passes: list[Grads], scaled: bool = False):
        self.passes, self.scaled = passes, scaled
        self.recorded: list[list[Tensor | None]] = []
        self.weights: list[list[Tensor]] = []
        self.raises: int | None = None  # at which call

    def __call__(self, side: Side) -> float:
        call = side.calls
        side.calls += 1
        with unharmed(), torch.enable_grad():
            side.passes.append([p.detach().clone() for p in side.params])
            if call == self.raises:
                raise Fault("in the closure")
            grads = self.passes[call % len(self.passes)]
            if call == len(self.recorded):
                assert side.name == "reference", f"{side.name} called the closure once more"
                self._record(side, grads)
            values = self.recorded[call]
            if side.name.startswith("shadow"):
                values = [None if g is None else _wide(g) for g in values]
                if side.name == f"shadow {STREAMS[3 + call % 2]}":
                    together = max(math.sqrt(p.numel()) for p in side.params)
                    values = [None if g is None else jittered(g, k, together)
                              for k, g in enumerate(values)]  # fmt: skip
                grads = replace(grads, delivery="assign", layouts=("plain",))
            else:
                self._straighten(side, call)
            if self.scaled:
                side.scaler.scale(torch.zeros(()))
            grads.deliver(side.params, values, side.buckets)
        return float(call)

    def _record(self, side: Side, grads: Grads) -> None:
        scale = float(side.scaler.get_scale()) if self.scaled else 1.0
        values = []
        for k, (param, spec) in enumerate(zip(side.params, side.specs, strict=True)):
            g = grads.value(k, param, spec)
            values.append(None if g is None else (g.double() * scale).to(g.dtype))
        self.recorded.append(values)
        self.weights.append([p.detach().clone() for p in side.params])

    def _straighten(self, side: Side, call: int) -> None:
        """Give 16-bit weights that were rounded the other way the model's value.

        Else the second pass, where it looks at them, would differ by more than a rounding error.
        """
        with torch.no_grad():
            for param, w in zip(side.params, self.weights[call], strict=True):
                if call and param.dtype in HALF and not same_bits(param, w):
                    param.copy_(w)


class Fault(Exception):
    """Put into a closure."""


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def jittered(x: Tensor, salt: int, together: float = 0.0) -> Tensor:
    """Moved by a few units in the last place of the arithmetic, each element and all together."""
    wide = _wide(x)
    drawn = JITTER * noise((*x.shape, 1), salt)[..., 0].sign() + together
    return wide * (1 + torch.finfo(wide.dtype).eps * drawn).to(wide.dtype)


def shadow(before: Side, stream: str) -> Side:
    """A copy of the model in float32 or wider, in which one of ``STREAMS`` has moved a little."""
    side = before.copied("shadow " + stream)
    with torch.no_grad():
        for k, param in enumerate(side.params):
            param.grad_dtype = None
            held = side.optimizer.state.get(param, {})
            param.data = _wide(held.pop(MASTER, param.data))
            if stream == "weights":
                param.copy_(jittered(param, k))
            for name, x in held.items():
                if isinstance(x, Tensor) and name != "step":
                    moves = stream == "state"
                    held[name] = jittered(x, 100 * k + len(name)) if moves else _wide(x)
        for group in side.optimizer.param_groups if stream == "state" else ():
            for key in ("lam", "sharpness", "squared_norms", "ascent_squared_norms"):
                if isinstance(group.get(key), Tensor):
                    group[key] *= 1 + JITTER * 2**-23
        if stream == "norms":  # what they divide: a factor of all gradients would cancel
            factor = 1 + 2.0**-23 * max(math.sqrt(p.numel()) for p in side.params)
            for group in side.optimizer.param_groups:
                group["rho"], group["lr"] = group["rho"] * factor, group["lr"] * factor
            if side.optimizer.max_grad_norm is not None:
                side.optimizer.max_grad_norm *= factor
    return side


# --- comparing ----------------------------------------------------------------------------------

Numbers = dict[str, Any]


class Comparison:
    """Whether results are within rounding of the model's."""

    def __init__(self, before: Numbers, model: Side, shadows: Callable[[], list[Numbers]]):
        self.before, self.model = before, model.numbers()
        self.dtypes, self.is_fused = [p.dtype for p in model.params], model.config.is_fused
        self.grad_dtypes = [spec.grad_dtype or p.dtype
                            for spec, p in zip(model.specs, model.params, strict=True)]  # fmt: skip
        # the norm, which decides how far everything moves, is that of the narrowest
        coarse = self._arithmetic("norm")
        self.slack = coarse * max([32.0, *(math.sqrt(p.numel()) for p in model.params)])
        self._make, self._shadows = shadows, None

    @property
    def shadows(self) -> list[Numbers]:
        if self._shadows is None:
            SEEN["actions measured with shadows"] += 1
            self._shadows = self._make()
        return self._shadows

    def check(self, name: str, numbers: Numbers) -> None:
        assert numbers.keys() == self.model.keys(), (
            f"{name} differs in {sorted(numbers.keys() ^ self.model.keys())}"
        )
        for key, b in self.model.items():
            found = self._difference(key, numbers[key], b)
            assert found is None, f"{name}: {key}: {found}"

    def _arithmetic(self, key: str) -> float:
        """The epsilon of what the number was computed in."""
        kind, *rest = key.split()
        if kind in ("weight", "state") and not self.is_fused:  # torch's own, as it is stored
            return torch.finfo(self.dtypes[int(rest[0])]).eps
        if kind in ("weight", "state"):
            wide = self.dtypes[int(rest[0])] == torch.float64
        elif kind == "pass":
            wide = self.dtypes[int(rest[1])] == torch.float64
        else:
            wide = {torch.float64}.issuperset(self.dtypes + self.grad_dtypes)
        return 2.0**-52 if wide else 2.0**-23

    def _difference(self, key: str, a: Any, b: Any) -> str | None:
        if not (isinstance(b, Tensor) and b.is_floating_point()):
            return None if same_bits(a, b) else f"{a} is not {b}"
        if not isinstance(a, Tensor) or a.dtype != b.dtype or a.shape != b.shape:
            return f"{a} is not like {b}"
        if same_bits(a, b):
            return None
        if key.endswith(" step") or "rounding_step" in key:
            return f"{a} is not {b}"
        x, y = a.double(), b.double()
        alike = (x == y) | (x.isnan() & y.isnan())
        if key.startswith("metric"):  # a norm that is not finite is infinite or NaN
            alike |= ~x.isfinite() & ~y.isfinite()
        if key.endswith("max_exp_avg_sq"):  # torch's fused Adam leaves NaN out of it
            alike |= y.isnan()
        error = torch.where(alike, 0.0, (x - y).abs().nan_to_num(math.inf, math.inf))
        eps = self._arithmetic(key)
        start = self.before.get(_origin(key), self.before.get(_weight_of(key)))
        start = start.double() if isinstance(start, Tensor) else torch.zeros_like(y)
        moved = (y - start).abs().nan_to_num(0.0, 0.0)
        size = torch.maximum(y.abs(), start.abs()).nan_to_num(0.0, 0.0)
        tolerance = 4 * eps * size + self.slack * moved + TINIEST
        if (error <= tolerance).all():
            return None
        still, *others = (self._unrounded(numbers, key) for numbers in self.shadows)
        for z in others:
            far = torch.where((z == still) | (z.isnan() & still.isnan()), 0.0, (z - still).abs())
            tolerance += FACTOR * far.nan_to_num(math.inf, math.inf)
        beyond = error > tolerance
        if not beyond.any():
            return None
        info = torch.finfo(b.dtype)
        if info.eps > eps:  # stored in fewer bits
            unit = (info.eps * torch.maximum(x.abs(), y.abs())).clamp(
                min=info.smallest_normal * info.eps
            )
            unit *= 1 + key.startswith("pass")  # one that was written to has been rounded twice
            if (error <= tolerance + unit).all() and beyond.sum() <= 2 + y.numel() / 64:
                SEEN["elements on the other side of a tie"] += int(beyond.sum())
                return None
        worst = (error - tolerance).flatten().argmax()
        at = [z.flatten()[worst].item() for z in (x, y, moved, error, tolerance)]
        return (
            f"{int(beyond.sum())} of {y.numel()} differ; at {int(worst)}: {at[0]!r} is not "
            f"{at[1]!r} (moved by {at[2]:.3g}; off by {at[3]:.3g}, allowed {at[4]:.3g})"
        )

    @staticmethod
    def _unrounded(numbers: Numbers, key: str) -> Tensor:
        return numbers[key if key in numbers else _weight_of(key)].double()


def _origin(key: str) -> str:
    kind, *rest = key.split()
    return f"weight {rest[1]}" if kind == "pass" else key


def _weight_of(key: str) -> str:
    return f"weight {key.split()[1]}" if key.endswith(MASTER) else ""


def first_change(before: Numbers, after: Numbers) -> str | None:
    """What differs in a bit; state that has been created, and has not changed yet, may be new."""
    for key, x in before.items():
        if key not in after or not same_bits(x, after[key]):
            return f"{key}: {after.get(key)} is not {x}"
    added = [key for key in after if key not in before and not key.startswith("state")]
    return f"new: {added}" if added else None


def saved(state: Any) -> Any:
    """A state dict as it comes back from a file."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# --- strategies ---------------------------------------------------------------------------------

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


@st.composite
def configs(draw: Any) -> Config:
    method = draw(sampled(sorted(METHODS)))
    own = [name for name in METHODS[method].bases if name in OWN_UPDATES]
    base = draw(sampled(own or sorted(FUZZ_BASES)))
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
