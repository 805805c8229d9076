"""The optimizers that ``test_fuzz.py`` puts side by side, and what they are fed.

A :class:`Side` is an optimizer with parameters of its own. All sides of a trial take the same
actions on the same gradients; the first one, on the reference backend, is the model. After every
action the others take over its numbers, so that rounding errors do not add up
(``fuzz_comparison.py`` says how closely they have to agree, ``fuzz_cases.py`` what is drawn).
"""

import copy
import io
import math
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastsam.kernels.layout import Scalar
from fastsam.step.precision import HALF, MASTER

from faults import FOREIGN, unharmed
from registry import BASES, METHODS, OWN_UPDATES, Base, build

#: What was seen, for the summary of a long run.
SEEN: Counter[str] = Counter()
#: What moves, in one shadow each, and by how many epsilons.
STREAMS = ("nothing", "weights", "state", "first gradients", "second gradients", "norms")
JITTER = 4


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
    """Without the warnings that the fuzzer asks for, also of NumPy in Triton's interpreter."""
    with warnings.catch_warnings(), np.errstate(invalid="ignore", over="ignore"):
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
        scalars = self.optimizer._passes.scalars.vector
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
                # loading adds the second for Adagrad; the last are what they last were saved as
                if key not in ("params", "differentiable") and not key.startswith("fastsam_"):
                    found[f"group {i} {key}"] = x.detach().clone() if isinstance(x, Tensor) else x
        for key, x in self.optimizer.kept.items():
            found[f"kept {key}"] = x.detach().clone() if isinstance(x, Tensor) else x
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
            kept = [(self.optimizer.kept, model.optimizer.kept)]
            groups = zip(self.optimizer.param_groups, model.optimizer.param_groups, strict=True)
            for ours, theirs in [*kept, *groups]:
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
        kept = side.optimizer.kept
        for key in ("lam", "sharpness", "squared_norms", "ascent_squared_norms"):
            if stream == "state" and isinstance(kept.get(key), Tensor):
                kept[key] *= 1 + JITTER * 2**-23
        if stream == "norms":  # what they divide: a factor of all gradients would cancel
            factor = 1 + 2.0**-23 * max(math.sqrt(p.numel()) for p in side.params)
            for group in side.optimizer.param_groups:
                group["rho"], group["lr"] = group["rho"] * factor, group["lr"] * factor
                if "weight_decay" in group:  # of which no norm is a part
                    group["weight_decay"] /= factor
            if side.optimizer.max_grad_norm is not None:
                side.optimizer.max_grad_norm *= factor
    return side


def saved(state: Any) -> Any:
    """A state dict as it comes back from a file."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)
