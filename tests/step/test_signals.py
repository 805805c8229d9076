"""Signals whose handlers raise, as a cluster's notice of preemption: no step is half, none is lost.

They are sent at chosen lines and instructions, so that every run tries the same.
"""

import contextlib
import gc
import os
import signal
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import pytest
import torch

from fastsam.step import interrupts
from fastsam.step.interrupts import uninterrupted

from faults import ALL, TWO, Rig, difference
from registry import DEVICE
from signalling import NUMBERS, PACKAGE, At, Handlers, Preempted, send

pytestmark = [
    pytest.mark.skipif(len(NUMBERS) < 3, reason="Windows has neither these signals nor masks"),
    pytest.mark.skipif(DEVICE != "cpu", reason="host code, the same for all devices"),
]
TORCH = sys.modules["torch.optim.optimizer"].__file__


# --- the block itself --------------------------------------------------------------------------


def flush(handlers: Handlers) -> list[int]:
    """What the handlers have seen, when none is due any more."""
    raising, handlers.raising = handlers.raising, []
    with uninterrupted():  # looks for what is pending
        pass
    handlers.raising = raising
    return sorted(handlers.seen)


@pytest.mark.parametrize("numbers", [NUMBERS[:1], NUMBERS], ids=["one", "three at once"])
@pytest.mark.parametrize("inside", [[], NUMBERS], ids=["none inside", "three inside"])
@pytest.mark.parametrize("insists", [False, True])
def test_at_every_instruction(insists, numbers, inside):
    """Of entry, exit and delivery. Each handler is called once for each signal, and lives on."""
    began = []

    def block():
        with uninterrupted(insists):
            began.append(True)
            send(*inside)

    for event in ("opcode", "line"):  # Python 3.12 has releases that show no instructions
        with Handlers(raising=[]):
            with At(None, (interrupts.__file__,), event=event) as counted:
                block()
        if counted.count > 100:
            break
    assert counted.count > 20
    torn = 0
    for at in range(counted.count):
        began.clear()
        with Handlers() as handlers:
            with pytest.raises(Preempted):
                with At(at, (interrupts.__file__,), lambda: send(*numbers), event):
                    block()
            torn += not handlers.are_back
            assert interrupts._holder is None
            expected = sorted([*numbers, *(inside if began else [])])
            seen = flush(handlers)
            if len(numbers) > 1 and inside:  # a signal that is pending already is not sent twice
                assert set(seen) == set(expected) and len(seen) <= len(expected)
            else:
                assert seen == expected, f"instruction {at}"
            for number in NUMBERS:  # also where a tracer raises and Python itself never would
                handlers.seen.clear()
                signal.raise_signal(number)
                assert handlers.seen == [number], f"after instruction {at}"
    assert torn < counted.count / 10


def held(function):
    with uninterrupted():
        function()


def test_all_handlers_are_called_in_order():
    """The last exception propagates, with the others as its context."""
    first, second, third = NUMBERS
    sent = [third, first, second, first, third]
    with Handlers(raising=[first, third], where="") as handlers:
        with pytest.raises(Preempted) as raised:
            held(lambda: [signal.raise_signal(number) for number in sent])
        assert handlers.seen == sent and handlers.are_back
    chain, error = [], raised.value
    while error is not None:
        chain.append(error.args[0])
        error = error.__context__
    assert chain == [third, first, first, third]


def test_blocks_in_blocks():
    with Handlers(raising=[]) as handlers:

        def inner():
            held(lambda: signal.raise_signal(NUMBERS[0]))
            assert handlers.seen == []

        held(inner)
        assert handlers.seen == NUMBERS[:1] and handlers.are_back


def test_handlers_that_are_set_in_between_stay():
    """By the block, and by a handler that runs while others are being replaced."""
    first, _, last = NUMBERS
    with Handlers(raising=[]) as handlers:
        held(lambda: signal.signal(first, signal.SIG_IGN))
        assert signal.getsignal(first) is signal.SIG_IGN
        signal.signal(first, lambda *_: signal.signal(last, signal.SIG_IGN))
        with At(None, (interrupts.__file__,)) as counted:
            held(lambda: None)
        for at in range(counted.count):
            signal.signal(last, handlers.handler)
            with At(at, (interrupts.__file__,), lambda: send(first)):
                held(lambda: signal.raise_signal(last))
            assert signal.getsignal(last) is signal.SIG_IGN, f"line {at}"
    assert interrupts._holder is None and not interrupts._due


def test_nothing_is_kept():
    """Of a handler that has been replaced, which may be all that holds a model."""
    handlers = Handlers()
    with handlers:
        held(lambda: None)
    gone = weakref.ref(handlers)
    del handlers
    gc.collect()
    assert gone() is None


def test_other_threads():
    done = []
    thread = threading.Thread(target=lambda: held(lambda: done.append(True)))
    thread.start()
    thread.join()
    assert done


def test_other_interpreters():
    """Run in a process of its own: once there was another interpreter, torch's backward raises."""
    code = """
try:
    import _interpreters as interpreters  # since Python 3.13
except ImportError:
    import _xxsubinterpreters as interpreters
code = source + "\\nwith uninterrupted():\\n    assert _holder is None and not _HANDLES_SIGNALS"
error = interpreters.run_string(interpreters.create(), code)  # before 3.13 it raises
assert error is None, error
exec(source + "\\nwith uninterrupted():\\n    assert _holder is not None", {"__name__": "main"})
"""
    source = Path(interrupts.__file__).read_text(encoding="utf-8")
    subprocess.run([sys.executable, "-c", f"source = {source!r}{code}"], check=True, timeout=60)


# --- steps -------------------------------------------------------------------------------------


def check_signals(rig: Rig, twin: Rig, stride: int, numbers, step=Rig.step) -> None:
    """A step at one of whose lines signals arrive is complete or has not been."""
    with Handlers() as handlers:
        with At(None, (PACKAGE,)) as counted:
            step(rig)
        step(twin)
        outcomes = set()
        for at in range(0 if ALL else sum(map(ord, rig.name)) % stride, counted.count,
                        1 if ALL else stride):  # fmt: skip
            before = rig.snapshot()
            sent = numbers(at)
            handlers.seen.clear()
            trace = At(at, (PACKAGE,), lambda sent=sent: send(*sent))
            with contextlib.suppress(Preempted), trace:
                step(rig)
            assert flush(handlers) == (sent if trace.count > at else [])
            step(twin)
            left = rig.snapshot()
            is_old = difference(left, before)
            if is_old is None:
                step(rig)
            else:
                found = difference(left, twin.snapshot())
                assert found is None, f"line {at} of {counted.count}: neither {is_old} nor {found}"
                rig.taken = twin.taken
            outcomes.add(is_old is None)
        assert outcomes == {True, False}
    assert difference(rig.snapshot(), twin.snapshot()) is None


@pytest.mark.parametrize(
    ("method", "base", "backend", "stride"),
    [("unified-1/t", "sgd", "torch", 11), ("vasso-all", "rmsprop", "reference", 23)],
)
@pytest.mark.parametrize("at_once", [1, 2, 3])
def test_steps(method, base, backend, stride, at_once):
    rig, twin = (Rig(method, base, backend, TWO).steps(1) for _ in range(2))
    turns = {1: lambda at: NUMBERS[at % 3 :][:1], 2: lambda _: NUMBERS[1:], 3: lambda _: NUMBERS}
    check_signals(rig, twin, stride, turns[at_once])


@pytest.mark.parametrize("at_once", [1, 3])
def test_steps_of_micro_batches(at_once):
    def step(rig):
        rig.calls = 0
        rig.optimizer.step_micro_batches([rig.closure] * 2)
        rig.taken += 1

    rig, twin = (Rig("sam", "sgd", "torch", TWO).steps(1) for _ in range(2))
    check_signals(rig, twin, 29, lambda _: NUMBERS[:at_once], step)


def test_loading_and_adding_groups():
    """At every line, torch's own included."""

    def load(rig):
        rig.optimizer.load_state_dict(saved)

    def add(rig):
        rig.optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})

    other = Rig("vasso-all", "adagrad_norm", "torch", TWO, lr=0.7).steps(3)
    saved = other.optimizer.state_dict()
    for action in (load, add):
        twin = Rig("vasso-all", "adagrad_norm", "torch", TWO).steps(1)
        with At(None, (PACKAGE, TORCH)) as counted:
            action(twin)
        outcomes = set()
        for at in range(0, counted.count, 1 if ALL else 17):
            rig = Rig("vasso-all", "adagrad_norm", "torch", TWO).steps(1)
            before = rig.snapshot()
            with Handlers() as handlers, contextlib.suppress(Preempted):
                with At(at, (PACKAGE, TORCH), lambda: send(*NUMBERS)):
                    action(rig)
            assert flush(handlers) == NUMBERS
            is_old = difference(rig.snapshot(), before) is None
            assert is_old or difference(rig.snapshot(), twin.snapshot()) is None, f"line {at}"
            assert not rig.optimizer._optimizer_load_state_dict_pre_hooks  # those of the call
            outcomes.add(is_old)
        assert outcomes == {True, False}, action


@pytest.mark.parametrize("sender", ["another thread", "another process"])
@pytest.mark.parametrize("half", ["first", "second"])
def test_signals_from_elsewhere(half, sender, monkeypatch):
    """In the middle of a pass; the system may give them to any thread of this process."""
    rig, twin = (Rig("unified-1/t", "sgd", "torch", TWO).steps(2) for _ in range(2))
    before = rig.snapshot()
    serving, passes = rig.optimizer._passes.backends.serving, []

    def interrupted(name, batch):
        passes.append(batch)
        if len(passes) == (1 if half == "first" else 2):
            for _ in range(20):
                sending(handlers)
        return serving(name, batch)

    def sending(handlers):
        pid, already = os.getpid(), len(interrupts._due)
        for number in NUMBERS:
            if sender == "another thread":
                thread = threading.Thread(target=os.kill, args=(pid, number))
                thread.start()
                thread.join()
            else:
                subprocess.run(["kill", f"-{int(number)}", str(pid)], check=True)
        assert handlers.seen == []
        while len(interrupts._due) < already + len(NUMBERS):  # until Python has seen all
            signal.pthread_sigmask(signal.SIG_BLOCK, [])

    monkeypatch.setattr(rig.optimizer._passes.backends, "serving", interrupted)
    with Handlers() as handlers:
        with pytest.raises(Preempted):
            rig.step()
        assert handlers.are_back
        assert sorted(handlers.seen) == sorted(NUMBERS * 20)
    if half == "second":
        twin.step()
        before = twin.snapshot()
        rig.taken = twin.taken
    assert difference(rig.snapshot(), before) is None
    monkeypatch.undo()
    assert difference(rig.steps(1).snapshot(), twin.steps(1).snapshot()) is None


def test_ctrl_c_is_never_dead():
    """A raising handler just after SIGINT's has been replaced, or put back."""
    rig = Rig("sam", "sgd", "torch", TWO).steps(1)
    original = signal.getsignal(signal.SIGINT)
    with At(None, (interrupts.__file__,)) as counted:
        rig.step()
    for at in range(counted.count):
        with Handlers() as handlers, contextlib.suppress(Preempted):
            with At(at, (interrupts.__file__,), lambda: send(signal.SIGTERM)):
                rig.step()
        rig.optimizer.restore()
        assert handlers.seen == [signal.SIGTERM]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is original, f"line {at}"
