"""The checks of ``check_method``: each is of a method on a backend."""

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import torch

from fastsam.bases import find_base
from fastsam.step.checkpoint import is_own

from .runs import LARGE, PLAIN, RAGGED, SMALL, Method, Run, Tensors, same


def _against_reference(
    method: Method, backend: str, steps: int, tensors: Tensors = SMALL,
    dtype: torch.dtype = torch.float32, **options: Any,
) -> Run | None:  # fmt: skip
    """A run that agrees with the reference; None if the class refuses the options."""
    try:
        run, other = (Run(method, b, tensors, dtype, **options) for b in (backend, "reference"))
    except ValueError:
        return None
    what = ", ".join([str(dtype), *(f"{key}={value}" for key, value in options.items())])
    same(run.trace(steps), other.trace(steps), what, dtype)
    return run


def _agrees_with_the_reference(method: Method, backend: str) -> None:
    _against_reference(method, backend, 4, RAGGED)
    _against_reference(method, backend, 4, RAGGED, torch.float64)
    _against_reference(method, backend, 2, SMALL, torch.float64, second={"adaptive": True})
    _against_reference(
        method, backend, 2, SMALL, torch.float64, renormalize=True, max_grad_norm=0.5
    )


def _follows_the_formula(method: Method, backend: str) -> None:
    if method.formula is None:
        return
    for dtype in (torch.float64, torch.float32):
        run = Run(method, backend, PLAIN, dtype, groups=1)
        start = [p.detach().double() for p in run.params]
        expected = method.formula(start, run.problem.gradient, 10)
        exact = {f"weight {k}": w.to(dtype) for k, w in enumerate(expected)}
        same(run.steps(10).weights(), exact, f"10 steps in {dtype}", dtype)


def _only_reads_gradients(method: Method, backend: str) -> None:
    run = Run(method, backend).steps()
    is_fused = find_base(type(run.optimizer.base_optimizer)) is not None
    for which, call in enumerate((run.optimizer.first_step, run.optimizer.second_step), start=1):
        run.give(which)
        given = {f"gradient {k}": p.grad for k, p in enumerate(run.params) if p.grad is not None}
        before = {name: grad.clone() for name, grad in given.items()}
        call()
        if which == 1 or is_fused:  # another base finds the final gradient in .grad
            same(given, before, f"after pass {which}")


class _Failure(Exception):
    """Raised on purpose."""


def _undoes_a_step_that_fails(method: Method, backend: str) -> None:
    run, twin = Run(method, backend).steps(), Run(method, backend).steps()
    before, calls = run.everything(), 0
    run.half(1)
    run.optimizer.restore()
    same(run.everything(), before, "after restore()")

    def closure() -> None:
        nonlocal calls
        calls += 1
        run.give(calls)
        if calls == 2:
            raise _Failure

    try:
        run.optimizer.step(closure)
    except _Failure:
        same(run.everything(), before, "after a second pass that raised")
        same(run.trace(1), twin.trace(1), "in the step after that")


def _goes_on_from_a_checkpoint(method: Method, backend: str) -> None:
    for reverse in (False, True):
        run = Run(method, backend).steps(2)
        if reverse:
            run.optimizer.param_groups.reverse()
        resumed = Run(method, backend, reverse=reverse).resume(run)
        same(resumed.trace(2), run.trace(2), "with the groups reversed" if reverse else "resumed")


def _goes_on_as_a_copy(method: Method, backend: str) -> None:
    copies: dict[str, Callable[[Any], Any]] = {
        "deepcopy": copy.deepcopy, "pickle": lambda x: pickle.loads(pickle.dumps(x))
    }  # fmt: skip
    for name, copied in copies.items():
        run = Run(method, backend).steps(2)
        twin = copy.copy(run)
        twin.params, twin.optimizer = copied((run.params, run.optimizer))
        same(twin.trace(2), run.trace(2), name)


def _bears_odd_first_gradients(method: Method, backend: str) -> None:
    for name, first, second in (
        ("zeros", 0.0, None), ("zeros in both passes", 0.0, 0.0), ("NaN", math.nan, None),
        ("infinity", math.inf, None),
    ):  # fmt: skip
        run = Run(method, backend).steps()
        run.half(1, first)
        run.half(2, second)
        before = run.steps().weights()
        run.half(1)
        if not all(p.isfinite().all() for p in run.params):
            raise AssertionError(f"{name}: weights are not finite two steps later")
        if all(torch.equal(x, before[k]) for k, x in run.weights().items()):
            if any(float(group["rho"]) > 0 for group in run.optimizer.param_groups):
                raise AssertionError(f"{name}: nothing is perturbed two steps later")


def _skips_second_gradients_that_are_not_finite(method: Method, backend: str) -> None:
    run = _against_reference(method, backend, 1, skip_nonfinite=True)
    if run is None:
        return
    before = run.everything(counts=False)
    for skipped, bad in enumerate((math.nan, math.inf), start=1):
        run.half(1)
        run.half(2, bad)
        same(run.everything(counts=False), before, f"after a second gradient with {bad}")
        if float(run.optimizer.metrics["skipped"]) != skipped:
            raise AssertionError(f"metrics['skipped'] is not {skipped}")


def _serves_a_grad_scaler(method: Method, backend: str) -> None:
    run, plain = Run(method, backend), Run(method, backend).steps(3)
    scaler = torch.amp.GradScaler(method.device.type, init_scale=2.0**12)
    scaled = run.steps(3, scaler).everything()
    same(scaled, plain.everything(), "with a scale of 4096", torch.float32)
    before = run.everything(counts=False)
    run.half(1, scaler=scaler)
    run.half(2, math.inf, scaler)
    same(run.everything(counts=False), before, "after an overflow")


def _follows_its_groups(method: Method, backend: str) -> None:
    run = Run(method, backend).steps(2)
    unchanged = Run(method, backend).resume(run)
    descent = run.optimizer.descent
    shared = () if descent is None else descent.arguments  # have one value for all groups
    for i, group in enumerate(run.optimizer.param_groups, start=1):
        numbers = {k: x for k, x in group.items() if isinstance(x, float) or k in ("lr", "rho")}
        powers = {key: 1 if key in shared else i for key in numbers if not is_own(key)}
        group |= {key: numbers[key] * 0.5**power for key, power in powers.items()}
    fresh = Run(method, backend).resume(run)  # which remembers nothing
    found = run.trace(2)
    same(found, fresh.trace(2), "with smaller numbers in the groups, against a new optimizer")
    if all(torch.equal(x, found[name]) for name, x in unchanged.trace(2).items()):
        raise AssertionError("smaller numbers in the groups change nothing")


def _serves_master_weights(method: Method, backend: str) -> None:
    run = _against_reference(method, backend, 3, SMALL, torch.bfloat16, master_weights=True)
    if run is not None:
        pairs = [(run.optimizer.state[p].get("master_weight", p), p) for p in run.params]
        if all(torch.equal(master, p) for master, p in pairs):
            raise AssertionError("master weights hold no more than their parameters")


def _rounds_at_random(method: Method, backend: str) -> None:
    options: dict[str, Any] = {"rounding": "stochastic", "seed": 1}
    run = _against_reference(method, backend, 2, LARGE, torch.bfloat16, **options)
    if run is None:
        return
    exact = Run(method, backend, LARGE).resume(run)
    before = exact.weights()["weight 0"]
    run.half(1)
    exact.half(1)
    e, rounded = (r.weights()["weight 0"] - before for r in (exact, run))
    if not (e * rounded).sum() > 0.5 * (e * e).sum():
        raise AssertionError("most of the perturbation is rounded away")


def _replays_in_a_graph(method: Method, backend: str) -> None:
    if method.device.type != "cuda" or backend != "triton":
        return
    run, twin = Run(method, backend, PLAIN), Run(method, backend, PLAIN)
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
    same(found, expected, "after 3 steps and 2 replays", torch.float32)


def _spreads_over_two_gpus(method: Method, backend: str) -> None:
    if method.device.type == "cuda" and torch.cuda.device_count() > 1:
        devices = [torch.device("cuda", i) for i in range(2)]
        run, one = Run(method, backend, devices=devices), Run(method, backend)
        same(run.trace(3), one.trace(3), "against one of them", torch.float32)


CHECKS: list[Callable[[Method, str], None]] = [
    _agrees_with_the_reference, _follows_the_formula, _only_reads_gradients,
    _undoes_a_step_that_fails, _goes_on_from_a_checkpoint, _goes_on_as_a_copy,
    _bears_odd_first_gradients, _skips_second_gradients_that_are_not_finite,
    _serves_a_grad_scaler, _follows_its_groups, _serves_master_weights, _rounds_at_random,
    _replays_in_a_graph, _spreads_over_two_gpus,
]  # fmt: skip
