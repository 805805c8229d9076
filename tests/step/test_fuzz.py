"""Anything, in any order: a stateful search for actions after which two backends disagree.

The backends ``torch`` and, in some trials, ``triton`` (in its interpreter) go through the same
actions as ``reference``: steps of every kind, faults, saves and loads, copies, new groups, changes
of hyper-parameters, and whatever users do to weights between steps. Everything is compared after
every action (``fuzzing.py`` says how closely). A second torch side has to show the same bits as the
first, though it is replaced now and then by a new optimizer that has loaded its state.

A quick search runs as a test. ``FASTSAM_FUZZ_CASES=10000 pytest -s tests/step/test_fuzz.py`` runs a
long one and prints what was covered; ``FASTSAM_FUZZ_SEED`` (default 0) gives it other cases, and
``FASTSAM_FUZZ_TRITON=1`` has triton in every case that is small enough.
"""

import copy
import os
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from faults import Allocations, kernels
from fuzz_cases import changes, configs, new_groups, passes
from fuzz_comparison import Comparison, first_change
from fuzzing import (
    SEEN,
    STREAMS,
    Config,
    Fault,
    Feed,
    Grads,
    Side,
    lay_out,
    noise,
    quiet,
    saved,
    shadow,
)

CASES = int(os.environ.get("FASTSAM_FUZZ_CASES", "0"))
SEED = int(os.environ.get("FASTSAM_FUZZ_SEED", "0"))
ALWAYS_TRITON = os.environ.get("FASTSAM_FUZZ_TRITON") == "1"
#: A trial with triton has at most so many elements: the interpreter is slow.
SMALL = 3000

Action = Callable[[Side], Any]


class Fuzz(RuleBasedStateMachine):
    sides: list[Side] = []

    @initialize(config=configs(), triton=st.integers(0, 7))
    def start(self, config: Config, triton: int):
        elements = sum(spec.make().numel() for spec in config.specs)
        names = ["reference", "torch", "torch again"]
        if (ALWAYS_TRITON or triton == 7) and elements <= SMALL:
            names.append("triton")
            SEEN["cases with triton"] += 1
        self.sides = [Side(name, config) for name in names]
        self.model, self.config = self.sides[0], config
        SEEN["cases"] += 1
        SEEN[f"method {config.method}"] += 1
        SEEN[f"base {config.base}"] += 1
        for spec in config.specs:
            SEEN[f"dtype {str(spec.dtype)[6:]}"] += 1
            SEEN[f"layout {spec.layout}"] += 1
        for key in config.kwargs:
            SEEN[f"argument {key}"] += 1

    # --- an action of everyone ---

    def act(self, name: str, action: Action, feed: Feed | None = None, cold: bool = False) -> None:
        """Let everyone do it, compare, and start the next one from equal numbers."""
        SEEN[f"action {name}"] += 1
        before, numbers = self.model.copied("before"), self.model.numbers(saved=True)
        if cold:
            self.sides[2].renew()
        for side in self.sides:
            side.begin()
            with quiet():
                action(side)
            if feed is not None and name != "micro-batches":
                check_gradients(side, feed)

        def shadows() -> list[dict[str, Any]]:
            found = []
            for stream in STREAMS:
                side = shadow(before, stream)
                side.begin()
                with quiet():
                    action(side)
                found.append(side.numbers())
            return found

        comparison = Comparison(numbers, self.model, shadows)
        first = None
        for side in self.sides[1:]:
            results = side.numbers()
            if side.name == "torch":
                first = results
            elif side.name == "torch again":
                assert (found := first_change(first, results)) is None, f"not repeatable: {found}"
                continue
            comparison.check(side.name, results)
        if feed is not None and self.config.is_fused:
            check_finite(numbers, comparison.model, feed)
        if is_spoilt(comparison.model):
            self.recover(before)
        else:
            for side in self.sides[1:]:
                side.take_over(self.model)

    def refuse(self, name: str, error: type[BaseException], action: Action) -> None:
        """An action that fails for everyone, and leaves nothing behind."""
        SEEN[f"action {name}"] += 1
        for side in self.sides:
            side.begin()
            expect_unchanged(side, error, lambda side=side: action(side))

    def recover(self, before: Side) -> None:
        """As users do when a run has gone wrong: weights and state of before."""
        SEEN["recovered from weights that are not finite"] += 1
        for side in self.sides:
            with torch.no_grad():
                for param, w in zip(side.params, before.params, strict=True):
                    param.copy_(w)
            side.optimizer.load_state_dict(copy.deepcopy(before.optimizer.state_dict()))

    @property
    def serves_micro_batches(self) -> bool:
        optimizer = self.model.optimizer
        rule = optimizer.ascent
        keeps = rule.advance is not None or rule.accumulate is not None
        return not keeps and optimizer.descent is None and not optimizer.renormalize

    # --- steps ---

    @rule(grads=passes(2), cold=st.booleans())
    def step(self, grads: list[Grads], cold: bool):
        feed = Feed(grads)

        def action(side: Side) -> None:
            assert side.optimizer.step(lambda: feed(side)) == 0.0

        self.act("step", action, feed, cold)

    @rule(
        grads=passes(2), zero=st.tuples(st.booleans(), st.booleans()), cold=st.booleans(),
        between=st.sampled_from(
            ["", "", "state_dict", "restore", "write", "swap", "view", "lr", "misuse", "freeze"]),
    )  # fmt: skip
    def explicit(self, grads: list[Grads], zero: tuple[bool, bool], cold: bool, between: str):
        feed = Feed(grads)

        def action(side: Side) -> None:
            optimizer, views = side.optimizer, []
            feed(side)
            optimizer.first_step(zero_grad=zero[0])
            if between == "state_dict":
                optimizer.state_dict()
            elif between == "restore":
                optimizer.restore()
                side.measures = False
                return
            elif between in ("write", "swap", "view", "freeze"):
                for k, param in enumerate(side.params):
                    if between == "write":
                        param.data.add_(noise(param.shape, k).to(param.dtype))
                    elif between == "swap":
                        param.data = param.data.clone()
                    elif between == "view":
                        views.append((param, param.detach()))
                    elif k == 0:
                        param.requires_grad_(False)
            elif between == "lr":
                optimizer.param_groups[-1]["lr"] = 0.07
            elif between == "misuse" and not side.name.startswith("shadow"):
                for wrong in (
                    optimizer.first_step,
                    optimizer.plain_step,
                    lambda: copy.copy(optimizer),
                    lambda: optimizer.step(lambda: 0.0),
                    lambda: optimizer.load_state_dict(optimizer.state_dict()),
                ):
                    with pytest.raises(RuntimeError, match="second_step"):
                        wrong()
            feed(side)
            optimizer.second_step(zero_grad=zero[1])
            for param, view in views:
                assert torch.equal(param.detach().nan_to_num(), view.nan_to_num()), (
                    "a view stayed behind"
                )

        self.act("explicit passes " + between, action, feed, cold)
        for side in self.sides:
            if between == "freeze":
                side.params[0].requires_grad_(True)
            for param in side.params:
                param.grad = None

    @rule(grads=passes(1), zero=st.booleans(), cold=st.booleans())
    def plain_step(self, grads: list[Grads], zero: bool, cold: bool):
        feed = Feed(grads)

        def action(side: Side) -> None:
            feed(side)
            side.optimizer.plain_step(zero)

        self.act("plain step", action, feed, cold)

    @rule(grads=passes(4), count=st.integers(1, 2))
    def micro_batches(self, grads: list[Grads], count: int):
        feed = Feed(grads)

        def action(side: Side) -> None:
            losses = side.optimizer.step_micro_batches([lambda: feed(side)] * count)
            calls = 2 if side.optimizer.metrics["perturbed"] else 1
            assert losses == [0.0, float(calls)][:count]

        if self.serves_micro_batches:
            self.act("micro-batches", action, feed)
        else:
            self.refuse("micro-batches refused", RuntimeError, action)

    @rule(grads=passes(2), closure=st.booleans(), first=st.booleans())
    def scaled_step(self, grads: list[Grads], closure: bool, first: bool):
        """With a GradScaler, whose scale follows."""
        feed = Feed(grads, scaled=True)

        def action(side: Side) -> None:
            optimizer, scaler = side.optimizer, side.scaler
            if closure:
                optimizer.step(lambda: feed(side), grad_scaler=scaler)
            else:
                feed(side)
                optimizer.first_step(zero_grad=True, grad_scaler=scaler)
                feed(side)
                optimizer.second_step(grad_scaler=scaler if first else None)
            scaler.update()

        self.act("step with GradScaler", action, feed)
        assert len({side.scaler.get_scale() for side in self.sides}) == 1

    @rule(
        grads=passes(2),
        scale=st.sampled_from([None, 8.0, 3.0]),
        found=st.sampled_from([None, 0.0, 1.0]),
    )
    def attributes(self, grads: list[Grads], scale: float | None, found: float | None):
        """With the attributes of torch's fused optimizers."""
        feed = Feed(grads)

        def action(side: Side) -> None:
            side.optimizer.grad_scale = None if scale is None else torch.tensor(scale)
            side.optimizer.found_inf = None if found is None else torch.tensor(found)
            side.optimizer.step(lambda: feed(side))
            del side.optimizer.grad_scale, side.optimizer.found_inf

        self.act("step with grad_scale", action, feed)

    # --- faults ---

    @rule(grads=passes(2), at=st.integers(0, 1))
    def closure_raises(self, grads: list[Grads], at: int):
        feed = Feed(grads)
        if at and not self._takes_two():
            return
        feed.raises = at
        self.refuse("closure raises", Fault, lambda side: side.optimizer.step(lambda: feed(side)))

    def _takes_two(self) -> bool:
        optimizer = self.model.optimizer
        radii = [group["rho"] for group in optimizer.param_groups]
        zero = all(not isinstance(rho, torch.Tensor) and rho == 0 for rho in radii)
        return optimizer.perturbs_next and not (zero and optimizer._is_memoryless)

    @precondition(lambda self: self.config.is_fused)
    @rule(grads=passes(2), at=st.integers(0, 60), forever=st.booleans())
    def out_of_memory(self, grads: list[Grads], at: int, forever: bool):
        """An allocation fails in the step; then the step is taken again."""
        feed = Feed(grads)

        def failing(side: Side) -> None:
            side.begin()
            with kernels(), Allocations(at, forever):
                side.optimizer.step(lambda: feed(side))

        def action(side: Side) -> None:
            if not side.name.startswith("shadow"):
                before = side.numbers(saved=True)
                try:
                    failing(side)
                    SEEN["allocations that did not come"] += 1
                    return
                except torch.OutOfMemoryError:
                    SEEN["allocations that failed"] += 1
                found = first_change(before, side.numbers(saved=True))
                assert found is None, f"{side.name}, after allocation {at} failed: {found}"
            side.begin()
            side.optimizer.step(lambda: feed(side))

        self.act("out of memory", action, feed)

    # --- between steps ---

    @rule(change=changes(), where=st.integers(0, 3))
    def set_hyper_parameter(self, change: tuple[str, Any], where: int):
        key, value = change
        for side in self.sides:
            optimizer = side.optimizer
            groups = optimizer.param_groups
            if key in ("max_grad_norm", "skip_nonfinite", "renormalize"):
                side.attributes[key] = value
                setattr(optimizer, key, value)
            elif key in groups[0]:
                groups[where % len(groups)][key] = copy.deepcopy(value)
            else:
                return
        SEEN[f"changed {key}"] += 1

    @rule(new=st.booleans(), cross=st.booleans(), file=st.booleans())
    def save_and_load(self, new: bool, cross: bool, file: bool):
        SEEN["saves and loads"] += 1
        states = [(self.model if cross else side).optimizer.state_dict() for side in self.sides]
        states = [saved(state) if file else copy.deepcopy(state) for state in states]
        for side, state in zip(self.sides, states, strict=True):
            before = side.numbers(saved=True)
            if new:
                side.renew(state)
            else:
                side.optimizer.load_state_dict(state)
            after = side.numbers(saved=True)
            before.pop("skipped", None), after.pop("skipped", None)
            assert (found := first_change(before, after)) is None, found

    @rule()
    def deepcopy(self):
        SEEN["deep copies"] += 1
        for k, side in enumerate(self.sides):
            before = side.numbers(saved=True)
            self.sides[k] = side.copied(side.name)
            after = self.sides[k].numbers(saved=True)
            before.pop("skipped", None), after.pop("skipped", None)
            assert (found := first_change(before, after)) is None, found
        self.model = self.sides[0]

    @precondition(lambda self: len(self.model.groups) < 4)
    @rule(data=st.data())
    def add_group(self, data: Any):
        group = data.draw(new_groups(self.config))
        SEEN["groups added"] += 1
        for side in self.sides:
            specs, keys = group
            params = [spec.make() for spec in specs]
            with quiet():
                side.optimizer.add_param_group({"params": params, **copy.deepcopy(keys)})
            side.params += params
            side.specs += specs
            side.groups.append((len(specs), keys))

    @rule(
        kind=st.sampled_from(["in place", "swap", "layout", "freeze", "zero", "cast"]),
        k=st.integers(0, 5),
        layout=st.sampled_from(["plain", "transposed", "gaps", "offset"]),
    )
    def write(self, kind: str, k: int, layout: str):
        """What users do to weights."""
        SEEN[f"write {kind}"] += 1
        for side in self.sides:
            k %= len(side.params)
            param = side.params[k]
            if kind == "in place":
                with torch.no_grad():
                    param.mul_(0.75).add_(noise(param.shape, k).to(param.dtype))
            elif kind == "swap":
                param.data = param.data * 0.5
            elif kind == "layout":
                param.data = lay_out(param.data, layout)
            elif kind == "freeze":
                param.requires_grad_(not param.requires_grad)
                param.grad = None
            elif kind == "zero":
                param.data.zero_()
            elif kind == "cast" and self.config.is_fused and param.dtype != torch.float64:
                wide = param.dtype == torch.float32
                param.data = param.data.to(torch.bfloat16 if wide else torch.float32)
                param.grad = None

    def teardown(self):
        for side in self.sides:
            saved(side.optimizer.state_dict())


def expect_unchanged(side: Side, error: type[BaseException], action: Callable[[], Any]) -> None:
    before = side.numbers(saved=True)
    with quiet(), pytest.raises(error):
        action()
    found = first_change(before, side.numbers(saved=True))
    assert found is None, f"{side.name} after {error.__name__}: {found}"


def check_gradients(side: Side, feed: Feed) -> None:
    """They were read only."""
    if not side.config.is_fused or not side.calls:
        return
    for param, g in zip(side.params, feed.recorded[side.calls - 1], strict=True):
        if param.grad is not None:
            assert g is not None  # autograd may give a NaN another sign
            same = (param.grad == g) | (param.grad.isnan() & g.isnan())
            assert same.all(), f"{param.grad} is not {g}"


def check_finite(before: dict[str, Any], after: dict[str, Any], feed: Feed) -> None:
    """No NaN comes of numbers that are finite; in 16 bits ``w + e`` may not be."""
    given = [g for grads in feed.recorded for g in grads if g is not None]
    given += [w for weights in feed.weights for w in weights]
    if is_spoilt(before) or not all(x.isfinite().all() for x in given):
        return
    if any(x.abs().max() > 1e6 for x in given if x.numel()):
        return
    for key, x in after.items():
        if key.startswith("weight"):
            assert not x.isnan().any(), f"{key} is NaN"


def is_spoilt(numbers: dict[str, Any]) -> bool:
    """Whether weights or state are of no more use: what is not finite, or has been thrown far off.

    VaSSO's average may be NaN: not begun. So may SAMAR's sharpness.
    """
    for key, x in numbers.items():
        if not (isinstance(x, torch.Tensor) and x.is_floating_point()) or key.endswith("sharpness"):
            continue
        bad = x.abs() > 1e6
        bad |= x.isinf() if key.endswith("ascent_ema") else ~x.isfinite()
        if key.startswith(("weight", "state", "group", "kept")) and bad.any():
            return True
    return False


QUICK = settings(
    max_examples=60, stateful_step_count=8, deadline=None, derandomize=True, database=None,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
LONG = settings(QUICK, max_examples=CASES or 1, derandomize=False, print_blob=True)


def test_backends_agree_whatever_happens(capsys):
    SEEN.clear()
    if not CASES:
        run_state_machine_as_test(Fuzz, settings=QUICK)
        return
    machine = seed(SEED)(Fuzz)
    start = time.perf_counter()
    try:
        run_state_machine_as_test(machine, settings=LONG)
    finally:
        with capsys.disabled():
            seconds = time.perf_counter() - start
            print(f"\nseed {SEED}, {CASES} cases, {seconds:.0f} s")
            for name, count in sorted(SEEN.items()):
                print(f"{count:8d}  {name}")
