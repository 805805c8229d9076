"""What the benchmarks time: parameter sets, contenders, turns. No test here asserts a time."""

import os

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastsam

import host_time
import test_step_time
from conftest import DEVICE
from registry import BACKENDS
from speed import contenders, host_device, measure
from speed.contenders import METHODS, Problem
from speed.measure import Times, Timing

SHAPES = [(4, 3, 3, 3), (4,), (5, 7)]
interpreted = pytest.mark.skipif(
    "TRITON_INTERPRET" not in os.environ, reason="the stubs stand on CPU tensors"
)


@pytest.mark.parametrize(
    ("name", "tensors", "parameters"),
    [
        ("resnet50", 161, 25_557_032),
        ("vit_b16", 152, 86_567_656),
        ("gpt2", 148, 124_439_808),
        ("small", 62, 271_898),
        ("uniform:1000003:10", 10, 1_000_003),
    ],
)
def test_parameter_sets(name, tensors, parameters):
    shapes = contenders.parameter_set(name)
    assert (len(shapes), contenders.count(shapes)) == (tensors, parameters)


def test_uniform_tensors_differ_by_one_element():
    assert contenders.uniform(11, 3) == [(4,), (4,), (3,)]


@pytest.mark.parametrize("name", ["resnet", "uniform", "uniform:5", "uniform:5:6", "uniform:5:-1"])
def test_unknown_sets_are_refused(name):
    with pytest.raises(ValueError, match=f"one of resnet50, .*PARAMETERS:TENSORS, got '{name}'"):
        contenders.parameter_set(name)


@pytest.fixture
def perturbed(monkeypatch):
    """Collects the weights between the passes, by contender's optimizer."""
    seen = []

    def both_passes(optimizer):
        def step():
            optimizer.first_step()
            groups = getattr(optimizer, "param_groups", None)
            params = groups[0]["params"] if groups else optimizer.params
            seen.append([p.detach().clone() for p in params])
            optimizer.second_step()

        return step

    monkeypatch.setattr(contenders, "both_passes", both_passes)
    return seen


@pytest.mark.parametrize("method", ["sam-sgd", "sam-adamw"])
def test_contenders_of_sam_do_the_same(method, perturbed, monkeypatch):
    """Perturbed weights and updated ones agree, so that nobody is faster by doing less."""
    pytest.importorskip("pytorch_optimizer")
    pytest.importorskip("unifiedsam")
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)
    problem = Problem(SHAPES, DEVICE)
    before, grads = problem.params(), [g.clone() for g in problem.grads]
    everyone = [contenders.fastsam_contender(problem, method, name) for name in BACKENDS]
    everyone += contenders.peer_contenders(problem, method)
    everyone.append(contenders.compiled_contender(problem, method))
    assert [c.name for c in everyone[3:]] == [
        "pytorch-optimizer", "pytorch-optimizer, fused base", "unifiedsam",
        "unifiedsam, fused base", "torch.compile",
    ]  # fmt: skip
    for contender in everyone:
        perturbed.clear()
        for _ in range(3):
            contender.step()
        between = perturbed[0]
        norm = torch.stack([(x - p).square().sum() for x, p in zip(between, before, strict=True)])
        torch.testing.assert_close(norm.sum().sqrt().item(), 0.05, rtol=1e-4, atol=0)
        if contender is everyone[0]:
            first, last = between, [p.detach().clone() for p in contender.params]
        assert not any(torch.equal(p, b) for p, b in zip(contender.params, before, strict=True))
        # a few roundings of weights of size 1 to 4
        torch.testing.assert_close(between, first, rtol=0, atol=2e-6)
        torch.testing.assert_close([p.detach() for p in contender.params], last, rtol=0, atol=2e-6)
    assert all(map(torch.equal, problem.grads, grads))  # all share them


@pytest.mark.parametrize("method", [m for m in METHODS if not m.startswith("sam-")])
def test_methods_with_more_work_change_their_parameters(method):
    problem = Problem(SHAPES, DEVICE)
    before, grads = problem.params(), [g.clone() for g in problem.grads]
    ends = []
    for backend in BACKENDS:
        contender = contenders.fastsam_contender(problem, method, backend)
        for _ in range(2):
            contender.step()
        assert not any(torch.equal(p, b) for p, b in zip(contender.params, before, strict=True))
        ends.append([p.detach() for p in contender.params])
    for end in ends:
        torch.testing.assert_close(end, ends[0], rtol=0, atol=2e-6)
    assert all(map(torch.equal, problem.grads, grads))
    assert contenders.peer_contenders(problem, method) == []


def test_samar_mixes_two_sets_of_gradients_and_copies_none(monkeypatch):
    seen = []
    finish = fastsam.SAMAR._finish
    monkeypatch.setattr(
        fastsam.SAMAR, "_finish",
        lambda self, batch, spec, flight: seen.append((flight.firsts[1], batch))
        or finish(self, batch, spec, flight),
    )  # fmt: skip
    problem = Problem(SHAPES, DEVICE)
    contender = contenders.fastsam_contender(problem, "samar-sgd", "torch")
    for _ in range(2):
        contender.step()
        firsts, batch = seen.pop()
        pointers = [x.data_ptr() for x in firsts]
        assert pointers == [g.data_ptr() for g in problem.grads]
        assert not set(pointers) & {g.data_ptr() for g in batch.grads}


class Copies(TorchDispatchMode):
    """Adds up the bytes that ``copy_`` reads and writes."""

    calls = moved = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        assert operator.name() == "aten::copy_"
        self.calls += 1
        self.moved += sum(x.numel() * x.element_size() for x in args)
        return operator(*args, **(kwargs or {}))


@pytest.mark.parametrize(("largest", "calls"), [(10**9, 1), (20_000, 2), (10_000, 4)])
def test_copy_moves_the_bytes_that_it_says(largest, calls, monkeypatch):
    monkeypatch.setattr(contenders, "LARGEST_COPY", largest)
    copy = contenders.copy_contender(Problem([(1000,)], DEVICE), 36)
    assert (copy.name, copy.params) == ("copy, 36 B", [])
    with Copies() as copies:
        copy.step()
    assert (copies.calls, copies.moved) == (calls, 36_000)


def test_contenders_take_turns():
    turns = []

    def sample(name):
        return lambda steps: turns.append((name, steps)) or len(turns) / 1e3

    times = measure.alternate({name: sample(name) for name in "ABC"}, rounds=5, shortest=8e-3)
    assert turns[:9] == [(name, 1) for name in "AAABBBCCC"]  # warm-up, which counts steps
    steps = {"A": 8, "B": 2, "C": 2}  # fastest of 1, 4 and 7 ms
    assert turns[9:] == [(name, steps[name]) for name in "ABC" * 5]
    a = [x / 1e3 for x in (10, 13, 16, 19, 22)]
    assert times["A"] == pytest.approx((a[2], a[1], a[3], 5, 8))
    assert [times[name].steps for name in "ABC"] == [8, 2, 2]


def test_wall_clock_waits_for_the_device_before_and_after():
    events = []
    sample = measure.wall_clock(lambda: events.append("step"), lambda: events.append("wait"))
    assert sample(3) > 0
    assert events == ["wait", "step", "step", "step", "wait"]


def test_moved_gradients_are_new_to_every_pass():
    class Recorder:
        def __init__(self):
            self.seen = []

        def first_step(self):
            self.seen.append([p.grad.data_ptr() for p in params])

        second_step = first_step

    problem = Problem(SHAPES)
    params, recorder = problem.params(), Recorder()
    assert host_time.moving_gradients(recorder, params, problem.grads)(3) > 0
    assert len(recorder.seen) == 6
    for i in range(2, 6):  # neither the pass before nor the same one of the step before
        for k in range(len(params)):
            assert recorder.seen[i][k] not in (recorder.seen[i - 1][k], recorder.seen[i - 2][k])


@pytest.fixture
def kernels(monkeypatch):
    """The triton backend's module, whose kernels come back after the test."""
    import fastsam.backends.triton.backend as backend

    for name in host_time.KERNELS:
        monkeypatch.setattr(backend, name, getattr(backend, name))
    return backend


@interpreted
def test_host_time_of_stubbed_steps(kernels):
    host_time.stub_launches()
    timings = host_time.measure(5, rounds=2)
    expected = [("", "sweep")]
    for method in ("sam-sgd", "sam-adamw"):
        expected += [(method, "step"), (method, "step, moved gradients")]
    assert [(t.method, t.contender) for t in timings] == expected
    for t in timings:
        assert (t.section, t.set, t.tensors, t.parameters) == ("host", "5 tensors", 5, 80)
        assert 0 < t.times.lower <= t.times.median <= t.times.upper and t.times.rounds == 2


@interpreted
def test_host_time_notices_kernels_that_run(kernels):
    with pytest.raises(RuntimeError, match="something else than the kernels"):
        host_time.measure(1, rounds=1)


@interpreted
def test_host_time_notices_a_kernel_that_is_gone(kernels, monkeypatch):
    monkeypatch.delattr(kernels, "update_kernel")
    with pytest.raises(RuntimeError, match="has no update_kernel"):
        host_time.stub_launches()


def test_host_times_of_all_optimizers(monkeypatch):
    """On a CPU as well, where they say nothing of launches."""
    monkeypatch.setattr(host_device, "STEPS", 2)
    timings = host_device.measure(3, 1, torch.device(DEVICE))
    cases = host_device.CASES
    found = [(t.method, t.contender) for t in timings]
    moving = [name for name, case in cases.items() if case.gradients == host_device.GIVEN]
    assert found == [(name, "step") for name in cases] + [
        (name, "step, moved gradients") for name in moving
    ]
    for t in timings:
        assert (t.section, t.set, t.tensors, t.parameters) == ("host", "3 tensors", 3, 48)
        assert 0 < t.times.median and t.times.steps == 2


@pytest.mark.parametrize("name", host_device.CASES)
def test_host_loop_takes_steps(name):
    """The passes find gradients, in the way that the case names."""
    case = host_device.CASES[name]
    loop = host_device.Loop(case, [(4,), (2, 3)], torch.device(DEVICE))
    for xs in loop._sets:
        for x in xs:
            x.fill_(1.0)
    before = [p.detach().clone() for p in loop.params]
    assert loop.sample(moves=False)(3) > 0
    left = [p.grad for p in loop.params]
    if case.gradients == host_device.KEPT:
        assert all(x is y for x, y in zip(left, loop._sets[0], strict=True))
    else:
        assert left == [None, None]
    if case.gradients != host_device.NEW:  # whose values are nobody's
        assert not any(torch.equal(p, x) for p, x in zip(loop.params, before, strict=True))


def test_table_of_host_times():
    times = {host_device.FUSED: 2e-4, host_device.FOREACH: 8e-4, "SAM": 1e-4}
    timings = [
        Timing("host", "5 tensors", name, contender, 5, 80, 0, Times(x, x, x, 1, 1))
        for contender in ("step", "step, moved gradients") for name, x in times.items()
        if (name, contender) != ("SAM", "step, moved gradients")
    ]  # fmt: skip
    lines = host_device.table(timings).splitlines()
    assert [line.split()[-3:] for line in lines if "SAM" in line] == [["100.0", "0.50", "0.12"]]
    assert [line.split()[-3:] for line in lines if host_device.FOREACH in line] == [
        ["800.0", "4.00", "1.00"]
    ] * 2


def test_child_that_fails_is_an_error():
    with pytest.raises(RuntimeError, match=r"(?s)host_time.py failed:\n.*invalid int value: 'x'"):
        host_time.measure_in_child(["x"], 1)


class Benchmark:
    """Stands for pytest-benchmark's fixture: runs the step twice."""

    def pedantic(self, step, rounds, warmup_rounds, iterations):
        assert rounds >= 5 and warmup_rounds >= 3 and iterations >= 1
        step()
        step()


@pytest.mark.parametrize("method", METHODS)
def test_microbenchmarks(method):
    names = []
    for name in test_step_time.contenders_of(method):
        if name == contenders.COMPILED:  # compiling takes long, and is done above
            continue
        benchmark = Benchmark()
        test_step_time.test_step(benchmark, "uniform:60:3", method, name)
        assert benchmark.group == f"uniform:60:3 · {METHODS[method].label}"
        names.append(benchmark.name)
    ours = [f"fastsam, {backend}" for backend in test_step_time.BACKENDS]
    assert (
        names[:2] == ours and names[-1] == f"copy, {METHODS[method].floor(test_step_time.DEVICE)} B"
    )
    assert len(names) == len(set(names)) == (7 if method.startswith("sam-") else 3)
