"""All or nothing: a step that fails anywhere leaves everything as it was, and the next one works.

``FASTSAM_FAULTS=all`` puts a fault at every point of every combination; without it most tests take
samples. A base optimizer that is not fused takes its step by itself, and is not looked into.
"""

import os
import signal
from contextlib import contextmanager

import pytest
import torch

from faults import (
    ALL,
    LARGE,
    PAIRS,
    SMALL,
    TWO,
    Allocations,
    Interrupt,
    Rig,
    bases_of,
    difference,
    kernels,
    spread,
)
from registry import BACKENDS, DEVICE, METHODS

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="counts what the CPU's operators allocate")

#: Between them everything that a step can consist of.
THOROUGH = [("asam", "adamw"), ("vasso-all", "sgd"), ("samar-all", "adagrad_norm"),
            ("samar-callable", "adagrad"), ("lightsam-1", "light_adagrad_norm"),
            ("lightsam-2", "light_adagrad"), ("lightsam-3-all", "uncorrected_adam"),
            ("adasam", "uncorrected_amsgrad"), ("vasso-all", "rmsprop")]  # fmt: skip


#: Triton's interpreter is slow: there every method has one base, and every base some methods.
TURNS = {(method, bases_of(method)[k % len(bases_of(method))]) for k, method in enumerate(METHODS)}
TRIPLES = [(*pair, backend) for backend in BACKENDS for pair in PAIRS
           if backend != "triton" or ALL or pair in TURNS]  # fmt: skip


def pair_of(method: str, base: str, backend: str, tensors=SMALL, **kwargs) -> tuple[Rig, Rig]:
    """A rig with a step behind it, and its undisturbed twin."""
    rig, twin = (Rig(method, base, backend, tensors, **kwargs).steps(1) for _ in range(2))
    return rig, twin


def count(rig: Rig, explicit: bool = False) -> int:
    """The allocations of a step, which is taken."""
    counted = Allocations()
    with kernels(), counted:
        rig.step(explicit)
    return counted.count


def runs_out(rig: Rig, at: int, forever: bool, explicit: bool = False) -> bool:
    """Whether the step fails; if so it is over."""
    faults = Allocations(at, forever)
    try:
        with kernels(), faults:
            rig.step(explicit)
    except torch.OutOfMemoryError:
        if explicit:  # what a loop does whose second pass failed; nothing, unless it did
            rig.optimizer.restore()
        return True
    assert not faults.failed
    return False


def check_allocations(rig: Rig, twin: Rig, samples: int, explicit: bool = False) -> None:
    """Faults in one step after the other, each of which is then taken and equals the twin's."""
    total = count(rig, explicit)
    twin.step(explicit)
    for i, at in enumerate(spread(total, samples, rig.name)):
        before = rig.snapshot()
        if runs_out(rig, at, bool(i % 2), explicit):
            assert difference(rig.snapshot(), before) is None, f"allocation {at} of {total}"
            rig.step(explicit)
        twin.step(explicit)
        if i % 4 == 3:
            assert difference(rig.snapshot(), twin.snapshot()) is None, f"after {at} of {total}"
    assert difference(rig.snapshot(), twin.snapshot()) is None


@pytest.mark.parametrize(("method", "base", "backend"), TRIPLES)
def test_out_of_memory(method, base, backend):
    tensors = TWO if backend == "triton" else SMALL
    check_allocations(*pair_of(method, base, backend, tensors), 1 if backend == "triton" else 2)


@pytest.mark.parametrize(("method", "base"), THOROUGH)
@pytest.mark.parametrize("backend", BACKENDS)
def test_out_of_memory_everywhere(backend, method, base):
    """On the torch backend, which has the most to go wrong, every allocation of two methods."""
    samples = {"reference": 16, "torch": 24, "triton": 5}[backend]
    if backend == "torch" and method in ("vasso-all", "lightsam-3-all"):
        samples = 1000
    tensors = LARGE if backend == "torch" else SMALL
    check_allocations(*pair_of(method, base, backend, tensors), samples)


@pytest.mark.parametrize("backend", BACKENDS)
def test_out_of_memory_in_explicit_passes(backend):
    samples = {"reference": 12, "torch": 20, "triton": 4}[backend]
    for method, base in [("samar-all", "sgd"), ("vasso-all", "adamw")]:
        check_allocations(*pair_of(method, base, backend), samples, explicit=True)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_out_of_memory_without_ascent(backend):
    """With a radius of 0 there is no copy of the weights to go back to."""
    rig, twin = pair_of("sam", "adamw", backend, LARGE, rho=0.0, max_grad_norm=0.5)
    check_allocations(rig, twin, 1000)
    assert rig.calls == 1  # of the closure


def test_out_of_memory_with_tiny_averages():
    """LightSAM's update where torch's fused operator does not serve."""
    for method, base in [("lightsam-3-all", "uncorrected_adam"), ("lightsam-2", "light_adagrad")]:
        rig, twin = pair_of(method, base, "torch", LARGE, weight_decay=0.5)
        for each in (rig, twin):
            for state in each.optimizer.state.values():
                for name in ("sum", "exp_avg_sq"):
                    state.get(name, torch.empty(0)).fill_(1e-43)
        before = twin.snapshot()
        seen = 0
        while runs_out(rig, seen, forever=bool(seen % 2)):
            assert difference(rig.snapshot(), before) is None, f"allocation {seen}"
            seen += 1
        twin.step()
        assert seen > 20
        assert difference(rig.snapshot(), twin.snapshot()) is None


@pytest.mark.parametrize(
    ("method", "base"),
    [("sam", "sgd"), ("vasso-all", "adamw"), ("samar", "adagrad_norm"), ("sam", "adagrad"),
     ("lightsam-3", "uncorrected_adam"), ("vasso", "rmsprop")],
)  # fmt: skip
@pytest.mark.parametrize("backend", BACKENDS)
def test_out_of_memory_in_the_first_step(backend, method, base):
    """What it creates is not there yet, or as if it had just begun."""
    twin = Rig(method, base, backend)
    total = count(twin)
    after = [twin.snapshot(), twin.steps(1).snapshot()]
    for i, at in enumerate(spread(total, 5 if backend == "triton" else 12, method)):
        rig = Rig(method, base, backend)
        weights = rig.snapshot()["weights"]
        runs_out(rig, at, bool(i % 2))
        left = rig.snapshot()
        assert difference(left["weights"], weights) is None, f"allocation {at} of {total}"
        assert not any("momentum_buffer" in state for state in left["state"].values())
        for expected in after:
            rig.step()
            assert difference(rig.snapshot(), expected) is None, f"after {at} of {total}"


# --- kernel launches ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "base"),
    [("sam", "sgd"), ("ssam-adaptive-clip", "adamw"), ("vasso-all", "sgd"),
     ("samar-all", "adagrad_norm"), ("lightsam-1", "light_adagrad_norm"), ("vasso-all", "rmsprop")],
)  # fmt: skip
def test_kernels_that_cannot_be_launched(method, base):
    """Any but an update's, after which there would be no way back."""
    rig, twin = pair_of(method, base, "triton", TWO)
    names: list[str] = []
    with kernels(names.append):
        rig.step()
    twin.step()
    names = [name for name in names if not name.startswith("compile")]
    foreign = base == "rmsprop"
    assert names.count("perturb_kernel") == 2
    assert names.count("update_kernel") == (0 if foreign else 2)
    for at, name in enumerate(names):
        if name == "update_kernel":
            continue
        seen = []

        def fail(name, seen=seen, at=at):
            seen.append(name)
            if len(seen) == at + 1:
                raise RuntimeError("launch failed")

        before = rig.snapshot()
        with kernels(fail), pytest.raises(RuntimeError, match="launch failed"):
            rig.step()
        assert difference(rig.snapshot(), before) is None, f"launch {at} of {names}"
        rig.step()
        twin.step()
        assert difference(rig.snapshot(), twin.snapshot()) is None, f"after {at} of {names}"


@pytest.mark.parametrize(("method", "base"), [pair for pair in PAIRS if pair[1] != "rmsprop"])
def test_nothing_can_fail_between_updates(method, base):
    """Once a kernel has changed state, nothing is allocated or compiled until the last update."""
    rig = Rig(method, base, "triton", TWO)
    faults = Allocations()
    for _ in range(2):  # the first step compiles
        events: list[tuple[str, int]] = []
        with kernels(lambda name, e=events: e.append((name, faults.count))), faults:
            rig.step()
        names = [name for name, _ in events]
        assert names[-2:] == ["update_kernel"] * 2
        descent = events[max(k for k, name in enumerate(names) if name == "perturb_kernel") + 1 :]
        while descent[0][0].startswith("compile"):
            descent.pop(0)
        assert not any(name.startswith("compile") for name, _ in descent)
        first = descent[-2] if method == "samar-callable" else descent[0]  # the rule is a user's
        assert first[1] == descent[-1][1], "memory was allocated between launches"


# --- the user's own code -----------------------------------------------------------------------


class Broken(Exception):
    """What the user's code raises."""


class Fuse:
    """Something of the user's that fails at the n-th call after :meth:`light`; a rule for SAMAR,
    a ``lam`` for Unified SAM, a hook or a context."""

    def __init__(self) -> None:
        self.left = -1

    def light(self, calls: int = 0) -> None:
        self.left = calls

    def burn(self) -> None:
        self.left -= 1
        if self.left == -1:
            raise Broken

    def __call__(self, *given):
        self.burn()
        return given[0] * 0.5 if isinstance(given[0], torch.Tensor) else 1 / given[0]

    def hook(self, *_) -> None:
        self.burn()

    @contextmanager
    def context(self):
        self.burn()
        yield
        self.burn()


def check_broken(rig: Rig, twin: Rig, explicit: bool = False) -> None:
    """The rig's fuse is lit: its step fails and changes nothing, and the next one is as it was."""
    before = rig.snapshot()
    with pytest.raises(Broken):
        rig.step(explicit)
    assert difference(rig.snapshot(), before) is None
    for _ in range(2):
        rig.step(explicit)
        twin.step(explicit)
        assert difference(rig.snapshot(), twin.snapshot()) is None


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize(("method", "base"), PAIRS)
def test_broken_closure(method, base, backend, monkeypatch):
    """After its gradients are there, in either pass."""
    rig, twin = pair_of(method, base, backend)
    fuse, closure = Fuse(), rig.closure
    monkeypatch.setattr(rig, "closure", lambda: (closure(), fuse.burn()))
    for calls in (0, 1):
        fuse.light(calls)
        check_broken(rig, twin)


@pytest.mark.parametrize("backend", BACKENDS)
def test_broken_lam(backend):
    fuse = Fuse()
    rig, twin = (Rig("unified-callable", "sgd", backend, lam=lam).steps(1)
                 for lam in (fuse, Fuse()))  # fmt: skip
    for explicit in (False, True):
        fuse.light()
        check_broken(rig, twin, explicit)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("base", ["adagrad_norm", "sgd", "rmsprop"])
def test_broken_rule(base, backend):
    """SAMAR's is asked after the norms have been added up."""
    fuse = Fuse()
    rig, twin = (Rig("samar", base, backend, rule=rule, skip_nonfinite=True).steps(1)
                 for rule in (fuse, Fuse()))  # fmt: skip
    for explicit in (False, True):
        fuse.light()
        check_broken(rig, twin, explicit)


@pytest.mark.parametrize("which", ["ascent_context", "descent_context"])
@pytest.mark.parametrize("method", ["sam", "vasso-all", "samar-all"])
def test_broken_contexts(method, which):
    """On entry, and on exit, with the gradients computed."""
    rig, twin = pair_of(method, "sgd", "torch")
    fuse = Fuse()
    setattr(rig.optimizer, which, fuse.context)
    for calls in (0, 1):
        fuse.light(calls)
        check_broken(rig, twin)


@pytest.mark.parametrize("explicit", [False, True])
def test_broken_hooks(explicit):
    rig, twin = pair_of("unified-1/t", "sgd", "torch")
    before, after = Fuse(), Fuse()
    rig.optimizer.register_step_pre_hook(before.hook)
    rig.optimizer.register_step_post_hook(after.hook)
    before.light()
    check_broken(rig, twin, explicit)
    after.light()  # the step is complete then
    with pytest.raises(Broken):
        rig.step(explicit)
    twin.step(explicit)
    rig.taken = twin.taken
    assert difference(rig.snapshot(), twin.snapshot()) is None
    before.light()
    check_broken(rig, twin, explicit)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("method", ["samar-all", "vasso-all"])
def test_broken_foreign_base(method, backend, monkeypatch):
    """Fails before it changes anything; whether it can later is its own affair."""
    rig, twin = pair_of(method, "rmsprop", backend)
    fuse, step = Fuse(), rig.optimizer.base_optimizer.step
    monkeypatch.setattr(rig.optimizer.base_optimizer, "step", lambda: (fuse.burn(), step()))
    for explicit in (False, True):
        fuse.light()
        check_broken(rig, twin, explicit)


# --- Ctrl-C ------------------------------------------------------------------------------------


def check_interrupts(rig: Rig, twin: Rig, stride: int, explicit: bool = False) -> None:
    counted = Interrupt(None)
    with counted:
        rig.step(explicit)
    twin.step(explicit)
    offset = sum(map(ord, rig.name)) % stride
    seen = set()
    for at in range(0 if ALL else offset, counted.count, 1 if ALL else stride):
        before = rig.snapshot()
        try:
            with Interrupt(at):
                rig.step(explicit)
            interrupted = False
        except KeyboardInterrupt:
            interrupted = True
        if interrupted and rig.optimizer.between_passes:  # between the calls, outside of both
            rig.optimizer.restore()
        twin.step(explicit)
        left, complete = rig.snapshot(), twin.snapshot()
        is_old = difference(left, before)
        if is_old is None:
            rig.step(explicit)
        else:
            found = difference(left, complete)
            assert found is None, f"line {at} of {counted.count}: neither {is_old} nor {found}"
            rig.taken = twin.taken
        seen.add(is_old is None)
    assert seen == {True, False}
    rig.step()
    twin.step()
    assert difference(rig.snapshot(), twin.snapshot()) is None


@pytest.mark.parametrize(
    ("method", "base", "backend", "stride"),
    [("unified-1/t", "sgd", "torch", 7), ("vasso-all", "rmsprop", "torch", 29),
     ("samar-callable", "adagrad", "torch", 29), ("lightsam-2", "light_adagrad", "torch", 29),
     ("samar-all", "adagrad_norm", "reference", 61), ("vasso-all", "adamw", "triton", 199)],
)  # fmt: skip
def test_interrupts(method, base, backend, stride):
    check_interrupts(*pair_of(method, base, backend, TWO), stride)


def test_interrupts_of_explicit_passes():
    check_interrupts(*pair_of("samar-all", "sgd", "torch", TWO), 13, explicit=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_interrupted_while_perturbing(backend, monkeypatch):
    """Held back until the pass is complete, which is undone then."""
    rig, twin = (Rig("sam", "sgd", backend, TWO).steps(2) for _ in range(2))
    before, optimizer = rig.snapshot(), rig.optimizer
    backends = type(optimizer._passes.backends)
    original = backends.serving

    def interrupted(self, name, batch):
        os.kill(os.getpid(), signal.SIGINT)
        return original(self, name, batch)

    with monkeypatch.context() as patch:
        patch.setattr(backends, "serving", interrupted)
        with pytest.raises(KeyboardInterrupt):
            rig.step(explicit=True)
    rig.taken = twin.taken
    assert difference(rig.snapshot(), before) is None
    assert difference(rig.steps(1).snapshot(), twin.steps(1).snapshot()) is None


@pytest.mark.parametrize("backend", BACKENDS)
def test_interrupts_of_the_first_step(backend):
    """A momentum buffer begins with the update that fills it."""
    twin = Rig("sam", "sgd", backend, TWO)
    counted = Interrupt(None)
    with counted:
        twin.step()
    after = twin.snapshot()
    expected = twin.steps(1).snapshot()
    stride = 1 if ALL else {"reference": 17, "torch": 13, "triton": 151}[backend]
    for at in range(counted.count % stride, counted.count, stride):
        rig = Rig("sam", "sgd", backend, TWO)
        with pytest.raises(KeyboardInterrupt), Interrupt(at):
            rig.step()
        if difference(rig.snapshot(), after) is None:
            rig.taken = 1
        rig.steps(2 - rig.taken)
        assert difference(rig.snapshot(), expected) is None, f"line {at} of {counted.count}"
