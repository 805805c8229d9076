"""A prepared launch goes straight to the compiled kernel, or Triton's way if that is not known."""

from types import SimpleNamespace

import pytest
import torch
import triton
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

from fastsam.backends.triton import direct
from fastsam.backends.triton.direct import Direct, type_of

from registry import DEVICE, METHODS, create


def kernel_of_four(table, count, origin, SIZE, EXTRA=7):
    """Never run: a signature."""


NAMES = ("table", "count", "origin", "SIZE", "EXTRA")


class Compiled(CompiledKernel):
    """What Triton gives after a launch, as far as it is used."""

    def __init__(self, log, signature=NAMES):
        self.module, self.log = None, log
        self.src = SimpleNamespace(signature=dict.fromkeys(signature))

    def __getitem__(self, grid):
        return lambda *args: self.log.append(("direct", grid, args))


class Kernel(JITFunction):
    """Launches nothing, and gives what it is told to."""

    def __init__(self, log, compiled):
        super().__init__(kernel_of_four)
        self.log, self.compiled = log, compiled

    def run(self, *args, grid, warmup, **kwargs):
        self.log.append(("looked up", grid, args, kwargs))
        return self.compiled


def launched(log):
    return [entry[0] for entry in log]


def of(log, compiled):
    return Direct(Kernel(log, compiled), (3,), "table", 5, SIZE=16, num_warps=4)


def test_first_launch_is_tritons_and_others_are_direct():
    log = []
    launch = of(log, Compiled(log))
    for origin in (1 << 40, 1 << 41, 1 << 42):
        launch(origin)
    looked_up = "looked up", (3,), ("table", 5, 1 << 40), {"SIZE": 16, "num_warps": 4}
    assert log[0] == looked_up
    # all arguments of the kernel in their order, with what has a default, and without options
    assert log[1:] == [("direct", (3, 1, 1), ("table", 5, x, 16, 7)) for x in (1 << 41, 1 << 42)]


def test_launch_without_a_number():
    log = []
    launch = Direct(Kernel(log, Compiled(log)), (2, 5), "table", 5, 6, SIZE=16, EXTRA=8)
    launch()
    launch()
    assert launched(log) == ["looked up", "direct"]
    assert log[1][1:] == ((2, 5, 1), ("table", 5, 6, 16, 8))


def test_number_of_another_type_is_looked_up():
    """A kernel compiled for 32 bits would be given half of an address."""
    log = []
    launch = of(log, Compiled(log))
    numbers = [0, 16, 1 << 40, 1 << 41, 8, 1 << 63, (1 << 64) - 16]
    for origin in numbers:
        launch(origin)
    kinds = ["looked up", "direct"] * 2 + ["looked up"] + ["looked up", "direct"]
    assert launched(log) == kinds
    types = ["i32", "i32", "i64", "i64", "i32", "u64", "u64"]
    assert [type_of(number) for number in numbers] == types


def test_hook_on_the_kernel_sees_every_launch():
    log = []
    launch = of(log, Compiled(log))
    launch(0)
    launch(0)
    launch._kernel.pre_run_hooks.append(lambda *args, **kwargs: None)
    launch(0)
    launch._kernel.pre_run_hooks.clear()
    launch(0)
    assert launched(log) == ["looked up", "direct", "looked up", "direct"]


class Subscripted:
    """A kernel of another kind, as the interpreter's, whose launches return ``given``."""

    def __init__(self, log, given):
        self.log, self.given = log, given

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.log.append(("looked up", grid)) or self.given


def without_source(log):
    compiled = Compiled(log)
    del compiled.src
    return compiled


class Unsubscriptable(CompiledKernel):
    __getitem__ = None

    def __init__(self, log):
        self.module, self.src = None, Compiled(log).src


@pytest.mark.parametrize(
    "make",
    [
        lambda log: of(log, None),
        lambda log: of(log, SimpleNamespace()),
        lambda log: of(log, without_source(log)),
        lambda log: of(log, Compiled(log, signature=NAMES[:3])),
        lambda log: of(log, Unsubscriptable(log)),
        lambda log: Direct(Subscripted(log, None), (3,), "table", 5, SIZE=16),
        lambda log: Direct(Subscripted(log, Compiled(log)), (3,), "table", 5, SIZE=16),
    ],
    ids=["nothing", "another object", "no source", "without constants", "no grid", "other kernel",
         "other kernel that gives a compiled one"],
)  # fmt: skip
def test_every_launch_is_tritons_where_something_is_missing(make):
    log = []
    launch = make(log)
    for _ in range(3):
        launch(1 << 40)
    assert launched(log) == ["looked up"] * 3


@pytest.mark.parametrize("name", ["FUNCTION", "COMPILED"])
def test_every_launch_is_tritons_where_it_has_no_such_class(name, monkeypatch):
    monkeypatch.setattr(direct, name, ())
    log = []
    launch = of(log, Compiled(log))
    launch(0)
    launch(0)
    assert launched(log) == ["looked up"] * 2


# --- on a GPU -------------------------------------------------------------------------------------


@pytest.fixture
def looked_up(monkeypatch):
    """The kernels that Triton has looked up, by name."""
    names, run = [], JITFunction.run

    def counting(self, *args, **kwargs):
        names.append(self.fn.__name__)
        return run(self, *args, **kwargs)

    monkeypatch.setattr(JITFunction, "run", counting)
    return names


@pytest.fixture
def hooked():
    """What a hook sees of every launch."""
    seen = []

    def hook(metadata):
        data = metadata.get()
        seen.append((data["name"], data["stream"]))

    triton.knobs.runtime.launch_enter_hook.add(hook)
    yield seen
    triton.knobs.runtime.launch_enter_hook.remove(hook)


def problem(method, sizes=(1040, 7)):
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(n).to(DEVICE)) for n in sizes]
    return create(method, params, "triton", METHODS[method].bases[0]), params


def take_steps(optimizer, params, count):
    for i in range(count):
        for j, half in enumerate((optimizer.first_step, optimizer.second_step)):
            for k, param in enumerate(params):
                param.grad = torch.full_like(param, 0.1 * (i + 1) - 0.3 * j + k)
            half()


@pytest.mark.gpu
@pytest.mark.parametrize("method", METHODS)
def test_steady_steps_look_nothing_up(method, looked_up, hooked):
    optimizer, params = problem(method)
    take_steps(optimizer, params, 3)
    assert looked_up
    looked_up.clear(), hooked.clear()
    take_steps(optimizer, params, 2)
    assert looked_up == []
    stream = torch.cuda.current_stream().cuda_stream
    assert len(hooked) >= 4 and {s for _, s in hooked} == {stream}


@pytest.mark.gpu
def test_launches_follow_the_current_stream(hooked):
    optimizer, params = problem("sam")
    take_steps(optimizer, params, 2)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    hooked.clear()
    with torch.cuda.stream(stream):
        take_steps(optimizer, params, 1)
    stream.synchronize()
    assert hooked and {s for _, s in hooked} == {stream.cuda_stream}


@pytest.mark.gpu
@pytest.mark.parametrize("method", METHODS)
def test_both_ways_give_the_same_bits(method, looked_up, monkeypatch):
    results = []
    for known in (True, False):
        if not known:
            monkeypatch.setattr(direct, "COMPILED", ())
        optimizer, params = problem(method)
        looked_up.clear()
        take_steps(optimizer, params, 3)
        results.append((params, len(looked_up)))
    assert results[0][1] < results[1][1]
    for x, y in zip(results[0][0], results[1][0], strict=True):
        assert torch.equal(x, y)
