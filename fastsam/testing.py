"""Checks for your own methods: those of fastsam's tests.

``check_method(GSAM, torch.optim.SGD, lr=0.1, momentum=0.9)`` raises AssertionError if a check
fails. It needs no test framework. Without a GPU, ``TRITON_INTERPRET=1`` in the environment, set
before Triton is imported, runs the Triton functions in Triton's interpreter.
"""

import copy
import io
import itertools
import math
import pickle
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from .backends import resolve
from .bases import find_base
from .optimizer import SharpnessAwareOptimizer
from .step.checkpoint import is_own

__all__ = ["check_method"]

#: Gradients of some function of the weights.
Gradient = Callable[[list[Tensor]], list[Tensor]]
#: From the weights before the first step, and their gradients, to those after so many steps.
Formula = Callable[[list[Tensor], Gradient, int], Sequence[Tensor]]
_Values = dict[str, Tensor]

#: Shape, layout, and the pass in which there is no gradient, 0 for none.
_Tensors = list[tuple[tuple[int, ...], str, int]]
_PLAIN: _Tensors = [((33,), "", 0), ((3, 5), "", 0), ((), "", 0)]
_SMALL: _Tensors = [((5, 3), "", 0), ((), "", 0), ((4,), "", 1), ((3,), "", 2)]
_LARGE: _Tensors = [((4096,), "", 0), ((5, 3), "", 0)]
_RAGGED: _Tensors = [
    ((1031,), "", 0), ((6, 7), "", 0), ((), "", 0), ((0,), "", 0), ((33,), "misaligned", 0),
    ((4, 6), "transposed", 0), ((5, 3), "gaps", 0), ((8,), "", 1), ((7,), "", 2),
]  # fmt: skip
#: What a few steps may add up to, relative to weights of about 1: 256 roundings, or 1 in bfloat16.
_TOLERANCE: dict[Any, float] = {
    torch.float64: 2.0**-44,
    torch.float32: 2.0**-15,
    torch.bfloat16: 2.0**-7,
}


def check_method(
    cls: type[SharpnessAwareOptimizer],
    *args: Any,
    backends: Sequence[str] | None = None,
    formula: Formula | None = None,
    **kwargs: Any,
) -> None:
    """Check a method on small problems: in a second, or in twenty in Triton's interpreter.

    - Backends agree within rounding, in float32 and float64: on tensors of odd shapes and layouts,
      in several groups, with gradients that are missing in one of the passes.
    - Gradients are only read.
    - A step that fails, or is undone, leaves weights and state as they were, bit for bit.
    - An optimizer that is resumed, copied or pickled continues bit for bit.
    - First gradients that are zero or not finite do no harm.
    - Changes in the groups take effect in the next step.
    - ``skip_nonfinite``, a :class:`torch.amp.GradScaler`, ``master_weights`` and
      ``rounding="stochastic"`` work as documented; so do CUDA graphs if there is a GPU, and
      parameters on two GPUs if there are two.

    Options that the class refuses with ValueError are not checked. Not for ascents with ``noise``:
    it depends on the order of the parameters, which some checks change.

    Args:
        cls: A subclass of ``fastsam.rules.SharpnessAwareOptimizer``.
        *args, **kwargs: Its arguments after ``params``, except ``backend``.
        backends: The backends to check. Default: ``"reference"``, ``"torch"``, and ``"triton"`` if
            there is a GPU or the environment has ``TRITON_INTERPRET=1``.
        formula: The method written again, without its code. It takes the weights, a function that
            returns their gradients, and a number of steps, and returns the weights after these
            steps. Weights and gradients are lists of float64 tensors. There is one group, with the
            values of ``kwargs``. Default None.

    Raises:
        AssertionError: If a check fails. Names the class, the backend, the check and what differs.
        TypeError: If ``cls`` is no such class, or does not take the arguments.
        ValueError, ImportError, RuntimeError: If a backend is unknown or does not run here; if the
            class refuses its arguments.

    Example:
        >>> fastsam.testing.check_method(
        ...     fastsam.GSAM, torch.optim.SGD, lr=0.1, alpha=0.3, backends=["torch"]
        ... )
    """
    if not (isinstance(cls, type) and issubclass(cls, SharpnessAwareOptimizer)):
        raise TypeError(f"cls must be a subclass of SharpnessAwareOptimizer, got {cls!r}")
    if "backend" in kwargs:
        raise TypeError("backend must not be among the arguments of cls; use backends=[...]")
    device = torch.device("cpu")
    if torch.cuda.is_available() and not _serves("triton", device):  # there it is interpreted
        device = torch.device("cuda")
    if backends is None:
        backends = ["reference", "torch"] + ["triton"] * _serves("triton", device)
    for backend in backends:
        resolve(backend, device)
    method = _Method(cls, args, kwargs, formula, device)
    _Run(method, "reference")  # the arguments are wrong if this raises, and not the method
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "some parameters are float16 or bfloat16")
        warnings.filterwarnings("ignore", ".*encountered in", RuntimeWarning)  # when interpreted
        for check, backend in itertools.product(_CHECKS, backends):
            try:
                check(method, backend)
            except Exception as error:
                name = check.__name__.strip("_").replace("_", " ")
                kind = "" if type(error) is AssertionError else f"{type(error).__name__}: "
                raise AssertionError(
                    f"{cls.__name__} on backend {backend!r}: {name}: {kind}{error}"
                ) from error


def _serves(backend: str, device: torch.device) -> bool:
    try:
        return bool(resolve(backend, device))
    except (ImportError, RuntimeError):
        return False


# --- a method at work -------------------------------------------------------------------------


@dataclass(frozen=True)
class _Method:
    cls: type[SharpnessAwareOptimizer]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    formula: Formula | None
    device: torch.device


class _Problem:
    """``size / 8 sum_k sin(<a_k, x> + b_k) + sum_i x_i^4 / 20``, ``x`` being all weights in a row.

    Gradients and curvature are of order 1, for any number of weights.
    """

    def __init__(self, sizes: list[int], device: torch.device):
        def normal(*shape: int) -> Tensor:
            numbers = torch.randn(*shape, generator=generator, dtype=torch.float64)
            return numbers.to(device)

        generator = torch.Generator().manual_seed(1)
        self.sizes, self.size = sizes, sum(sizes)
        self.start = 0.8 * normal(self.size)
        self.a, self.b = 4 * normal(6, self.size) / self.size, 6 * normal(6)

    def gradient(self, weights: list[Tensor]) -> list[Tensor]:
        x = torch.cat([w.reshape(-1) for w in weights])
        g = self.size / 8 * self.a.T @ torch.cos(self.a @ x + self.b) + 0.2 * x**3
        pairs = zip(torch.split(g, self.sizes), weights, strict=True)
        return [part.reshape(w.shape) for part, w in pairs]


def _laid_out(x: Tensor, layout: str) -> Tensor:
    """A copy in an odd place."""
    if layout == "misaligned":
        return x.new_empty(x.numel() + 1)[1:].view(x.shape).copy_(x)
    if layout == "gaps":
        return x.new_empty(*x.shape, 2)[..., 0].copy_(x)
    return x.t().contiguous().t() if layout == "transposed" else x.clone()


class _Run:
    """An optimizer with its parameters, and gradients that follow from these alone.

    Args:
        groups: How many. The second has another ``rho`` and ``lr``, and what ``second`` gives.
        reverse: Whether they come in the other order.
        devices: Where the parameters lie, by turns. Default: on the method's device.
        **kwargs: Further arguments of the class.
    """

    def __init__(
        self, method: _Method, backend: str, tensors: _Tensors = _SMALL,
        dtype: torch.dtype = torch.float32, *, groups: int = 2, reverse: bool = False,
        devices: Sequence[torch.device] = (), second: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ):  # fmt: skip
        self.missing = [which for *_, which in tensors]
        self.problem = _Problem([math.prod(shape) for shape, *_ in tensors], method.device)
        self.params, devices = [], devices or [method.device]
        starts = torch.split(self.problem.start, self.problem.sizes)
        for k, (x, (shape, layout, _)) in enumerate(zip(starts, tensors, strict=True)):
            x = x.reshape(shape).to(devices[k % len(devices)], dtype)
            self.params.append(Parameter(_laid_out(x, layout)))
        given: list[dict[str, Any]] = [{"params": self.params[k::groups]} for k in range(groups)]
        given[-1] |= second or {}
        self.optimizer: Any = method.cls(
            given[::-1] if reverse else given, *method.args, backend=backend,
            **{**method.kwargs, **kwargs},
        )  # fmt: skip
        if groups > 1:
            group = self.optimizer.param_groups[0 if reverse else 1]
            group |= {key: group[key] * 0.7 for key in ("rho", "lr") if key in group}

    @torch.no_grad()
    def give(self, which: int, spoil: float | None = None, scaler: Any = None) -> None:
        """Set the gradients of a pass; ``spoil`` takes the place of all if it is 0, else of one."""
        grads = self.problem.gradient([p.to(self.problem.start) for p in self.params])
        if spoil is not None:
            for grad in grads if spoil == 0 else grads[:1]:
                grad.view(-1)[: None if spoil == 0 else 1] = spoil
        for param, grad, missing in zip(self.params, grads, self.missing, strict=True):
            grad = grad.to(param.device, param.dtype)
            grad = grad if scaler is None else scaler.scale(grad)
            param.grad = None if missing == which else grad

    def half(self, which: int, spoil: float | None = None, scaler: Any = None) -> None:
        """The first or the second pass of a step."""
        self.give(which, spoil, scaler)
        passes = self.optimizer.first_step, self.optimizer.second_step
        passes[which - 1](grad_scaler=scaler)

    def steps(self, count: int = 1, scaler: Any = None) -> "_Run":
        for _ in range(count):
            self.half(1, scaler=scaler)
            self.half(2, scaler=scaler)
            if scaler is not None:
                scaler.update()
        return self

    def weights(self) -> _Values:
        return {f"weight {k}": p.detach().clone() for k, p in enumerate(self.params)}

    def everything(self, counts: bool = True) -> _Values:
        """Weights, state and the optimizer's own numbers, its count of steps among them or not."""
        found: dict[str, Any] = dict(self.weights())
        for k, param in enumerate(self.params):
            for name, x in self.optimizer.state.get(param, {}).items():
                found[f"state {name!r} of weight {k}"] = x
        kept = self.optimizer.kept.items()
        found |= {f"kept[{name!r}]": x for name, x in kept if counts or name != "t"}
        return {name: torch.as_tensor(x).detach().clone() for name, x in found.items()}

    def trace(self, steps: int) -> _Values:
        """Everything after each of some steps, and the weights between its passes."""
        found: _Values = {}
        for step in range(1, steps + 1):
            self.half(1)
            found |= {f"{name} between passes {step}": x for name, x in self.weights().items()}
            self.half(2)
            found |= {f"{name} after step {step}": x for name, x in self.everything().items()}
        return found

    @torch.no_grad()
    def resume(self, other: "_Run") -> "_Run":
        """Take over another run's weights, and its state dict by way of a file."""
        for param, weight in zip(self.params, other.params, strict=True):
            param.copy_(weight)
        file = io.BytesIO()
        torch.save(other.optimizer.state_dict(), file)
        file.seek(0)
        self.optimizer.load_state_dict(torch.load(file))
        return self


def _same(found: _Values, expected: _Values, what: str, within: torch.dtype | None = None) -> None:
    """Raises AssertionError unless both are the same: bit for bit, or ``within`` rounding."""
    if found.keys() != expected.keys():
        raise AssertionError(f"{what}: {min(found.keys() ^ expected.keys())} is there only once")
    for name, x in expected.items():
        y = found[name].to(x.device)
        if y.shape != x.shape:
            raise AssertionError(f"{what}: {name} has shape {tuple(y.shape)}, not {tuple(x.shape)}")
        # the optimizer's own numbers are in float64, but made of what is not
        dtype = within if x.dtype == torch.float64 else x.dtype
        tolerance = 0.0 if within is None else _TOLERANCE.get(dtype, 0.0)
        bad = ~torch.isclose(y.double(), x.double(), tolerance, tolerance, equal_nan=True)
        if bad.any():
            raise AssertionError(
                f"{what}: {name} is {float(y[bad][0])!r} and should be {float(x[bad][0])!r} "
                f"({int(bad.sum())} of {x.numel()} numbers differ)"
            )


# --- the checks, each of a method on a backend --------------------------------------------------


def _against_reference(
    method: _Method, backend: str, steps: int, tensors: _Tensors = _SMALL,
    dtype: torch.dtype = torch.float32, **options: Any,
) -> _Run | None:  # fmt: skip
    """A run that agrees with the reference; None if the class refuses the options."""
    try:
        run, other = (_Run(method, b, tensors, dtype, **options) for b in (backend, "reference"))
    except ValueError:
        return None
    what = ", ".join([str(dtype), *(f"{key}={value}" for key, value in options.items())])
    _same(run.trace(steps), other.trace(steps), what, dtype)
    return run


def _agrees_with_the_reference(method: _Method, backend: str) -> None:
    _against_reference(method, backend, 4, _RAGGED)
    _against_reference(method, backend, 4, _RAGGED, torch.float64)
    _against_reference(method, backend, 2, _SMALL, torch.float64, second={"adaptive": True})
    _against_reference(
        method, backend, 2, _SMALL, torch.float64, renormalize=True, max_grad_norm=0.5
    )


def _follows_the_formula(method: _Method, backend: str) -> None:
    if method.formula is None:
        return
    for dtype in (torch.float64, torch.float32):
        run = _Run(method, backend, _PLAIN, dtype, groups=1)
        start = [p.detach().double() for p in run.params]
        expected = method.formula(start, run.problem.gradient, 10)
        exact = {f"weight {k}": w.to(dtype) for k, w in enumerate(expected)}
        _same(run.steps(10).weights(), exact, f"10 steps in {dtype}", dtype)


def _only_reads_gradients(method: _Method, backend: str) -> None:
    run = _Run(method, backend).steps()
    is_fused = find_base(type(run.optimizer.base_optimizer)) is not None
    for which, call in enumerate((run.optimizer.first_step, run.optimizer.second_step), start=1):
        run.give(which)
        given = {f"gradient {k}": p.grad for k, p in enumerate(run.params) if p.grad is not None}
        before = {name: grad.clone() for name, grad in given.items()}
        call()
        if which == 1 or is_fused:  # another base finds the final gradient in .grad
            _same(given, before, f"after pass {which}")


class _Failure(Exception):
    """Raised on purpose."""


def _undoes_a_step_that_fails(method: _Method, backend: str) -> None:
    run, twin = _Run(method, backend).steps(), _Run(method, backend).steps()
    before, calls = run.everything(), 0
    run.half(1)
    run.optimizer.restore()
    _same(run.everything(), before, "after restore()")

    def closure() -> None:
        nonlocal calls
        calls += 1
        run.give(calls)
        if calls == 2:
            raise _Failure

    try:
        run.optimizer.step(closure)
    except _Failure:
        _same(run.everything(), before, "after a second pass that raised")
        _same(run.trace(1), twin.trace(1), "in the step after that")


def _goes_on_from_a_checkpoint(method: _Method, backend: str) -> None:
    for reverse in (False, True):
        run = _Run(method, backend).steps(2)
        if reverse:
            run.optimizer.param_groups.reverse()
        resumed = _Run(method, backend, reverse=reverse).resume(run)
        _same(resumed.trace(2), run.trace(2), "with the groups reversed" if reverse else "resumed")


def _goes_on_as_a_copy(method: _Method, backend: str) -> None:
    copies: dict[str, Callable[[Any], Any]] = {
        "deepcopy": copy.deepcopy, "pickle": lambda x: pickle.loads(pickle.dumps(x))
    }  # fmt: skip
    for name, copied in copies.items():
        run = _Run(method, backend).steps(2)
        twin = copy.copy(run)
        twin.params, twin.optimizer = copied((run.params, run.optimizer))
        _same(twin.trace(2), run.trace(2), name)


def _bears_odd_first_gradients(method: _Method, backend: str) -> None:
    for name, first, second in (
        ("zeros", 0.0, None), ("zeros in both passes", 0.0, 0.0), ("NaN", math.nan, None),
        ("infinity", math.inf, None),
    ):  # fmt: skip
        run = _Run(method, backend).steps()
        run.half(1, first)
        run.half(2, second)
        before = run.steps().weights()
        run.half(1)
        if not all(p.isfinite().all() for p in run.params):
            raise AssertionError(f"{name}: weights are not finite two steps later")
        if all(torch.equal(x, before[k]) for k, x in run.weights().items()):
            if any(float(group["rho"]) > 0 for group in run.optimizer.param_groups):
                raise AssertionError(f"{name}: nothing is perturbed two steps later")


def _skips_second_gradients_that_are_not_finite(method: _Method, backend: str) -> None:
    run = _against_reference(method, backend, 1, skip_nonfinite=True)
    if run is None:
        return
    before = run.everything(counts=False)
    for skipped, bad in enumerate((math.nan, math.inf), start=1):
        run.half(1)
        run.half(2, bad)
        _same(run.everything(counts=False), before, f"after a second gradient with {bad}")
        if float(run.optimizer.metrics["skipped"]) != skipped:
            raise AssertionError(f"metrics['skipped'] is not {skipped}")


def _serves_a_grad_scaler(method: _Method, backend: str) -> None:
    run, plain = _Run(method, backend), _Run(method, backend).steps(3)
    scaler = torch.amp.GradScaler(method.device.type, init_scale=2.0**12)
    scaled = run.steps(3, scaler).everything()
    _same(scaled, plain.everything(), "with a scale of 4096", torch.float32)
    before = run.everything(counts=False)
    run.half(1, scaler=scaler)
    run.half(2, math.inf, scaler)
    _same(run.everything(counts=False), before, "after an overflow")


def _follows_its_groups(method: _Method, backend: str) -> None:
    run = _Run(method, backend).steps(2)
    unchanged = _Run(method, backend).resume(run)
    descent = run.optimizer.descent
    shared = () if descent is None else descent.arguments  # have one value for all groups
    for i, group in enumerate(run.optimizer.param_groups, start=1):
        numbers = {k: x for k, x in group.items() if isinstance(x, float) or k in ("lr", "rho")}
        powers = {key: 1 if key in shared else i for key in numbers if not is_own(key)}
        group |= {key: numbers[key] * 0.5**power for key, power in powers.items()}
    fresh = _Run(method, backend).resume(run)  # which remembers nothing
    found = run.trace(2)
    _same(found, fresh.trace(2), "with smaller numbers in the groups, against a new optimizer")
    if all(torch.equal(x, found[name]) for name, x in unchanged.trace(2).items()):
        raise AssertionError("smaller numbers in the groups change nothing")


def _serves_master_weights(method: _Method, backend: str) -> None:
    run = _against_reference(method, backend, 3, _SMALL, torch.bfloat16, master_weights=True)
    if run is not None:
        pairs = [(run.optimizer.state[p].get("master_weight", p), p) for p in run.params]
        if all(torch.equal(master, p) for master, p in pairs):
            raise AssertionError("master weights hold no more than their parameters")


def _rounds_at_random(method: _Method, backend: str) -> None:
    options: dict[str, Any] = {"rounding": "stochastic", "seed": 1}
    run = _against_reference(method, backend, 2, _LARGE, torch.bfloat16, **options)
    if run is None:
        return
    exact = _Run(method, backend, _LARGE).resume(run)
    before = exact.weights()["weight 0"]
    run.half(1)
    exact.half(1)
    e, rounded = (r.weights()["weight 0"] - before for r in (exact, run))
    if not (e * rounded).sum() > 0.5 * (e * e).sum():
        raise AssertionError("most of the perturbation is rounded away")


def _replays_in_a_graph(method: _Method, backend: str) -> None:
    if method.device.type != "cuda" or backend != "triton":
        return
    run, twin = _Run(method, backend, _PLAIN), _Run(method, backend, _PLAIN)
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run.steps(3)  # creates the state
    torch.cuda.current_stream().wait_stream(side)
    try:
        with torch.cuda.graph(graph):
            run.steps()
    except RuntimeError as error:
        if "cannot be captured" in str(error):  # as with a schedule on the host
            return
        raise
    graph.replay()
    graph.replay()
    found, expected = run.everything(counts=False), twin.steps(5).everything(counts=False)
    _same(found, expected, "after 3 steps and 2 replays", torch.float32)


def _spreads_over_two_gpus(method: _Method, backend: str) -> None:
    if method.device.type == "cuda" and torch.cuda.device_count() > 1:
        devices = [torch.device("cuda", i) for i in range(2)]
        run, one = _Run(method, backend, devices=devices), _Run(method, backend)
        _same(run.trace(3), one.trace(3), "against one of them", torch.float32)


_CHECKS: list[Callable[[_Method, str], None]] = [
    _agrees_with_the_reference, _follows_the_formula, _only_reads_gradients,
    _undoes_a_step_that_fails, _goes_on_from_a_checkpoint, _goes_on_as_a_copy,
    _bears_odd_first_gradients, _skips_second_gradients_that_are_not_finite,
    _serves_a_grad_scaler, _follows_its_groups, _serves_master_weights, _rounds_at_random,
    _replays_in_a_graph, _spreads_over_two_gpus,
]  # fmt: skip
