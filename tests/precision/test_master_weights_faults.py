"""Master weights next to wide parameters: a step that fails in between has not been.

16-bit parameters with masters and float32 ones go through launches of their own. After a failure
the first are restored from their masters, the others from copies; a parameter that had not been
perturbed yet holds what somebody may just have written, and keeps it.
"""

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from fastsam.backends import reference
from fastsam.backends.triton.backend import TritonBackend, perturb_kernel

from faults import LARGE, SMALL, Allocations, Rig, difference, kernels, spread
from networks import same
from registry import BACKENDS, DEVICE, create

LOW, WIDE = torch.bfloat16, torch.float32
ADAMW = {"base": "adamw", "master_weights": True}
cpu_only = pytest.mark.skipif(DEVICE != "cpu", reason="counts what the CPU's operators allocate")


def gradients(params):
    for p in params:
        p.grad = torch.sin(3 * p.detach())


def write(params):
    """As a user may, between two steps: what no master knows of yet."""
    with torch.no_grad():
        for p in params:
            p.reshape(-1)[:2] = 0.5


def everything(optimizer, params):
    """Weights and state. Masters are to follow their parameters; whether they have is no matter."""
    held = {"weights": [p.detach().clone() for p in params]}
    for k, p in enumerate(params):
        held[k] = {name: x.clone() for name, x in optimizer.state.get(p, {}).items()}
        if (master := held[k].get("master_weight")) is not None:
            held[k]["master_weight"] = torch.where(master.to(p.dtype) == p, master, p.float())
    return held


@contextmanager
def failing_launch(number, patch):
    """The launch that perturbs fails, as one does whose code does not fit on the device."""
    prepare, launches = TritonBackend._prepare, []

    def preparing(self, kernel, *args, **kwargs):
        launch = prepare(self, kernel, *args, **kwargs)
        if kernel is perturb_kernel:
            launches.append(launch)
            if len(launches) == number:
                return replace(launch, run=fail)
        return launch

    def fail(origin):
        raise RuntimeError("no such launch")

    with patch.context() as inside:
        inside.setattr(TritonBackend, "_prepare", preparing)
        inside.setattr(TritonBackend, "_dependencies", lambda *_: [object()])
        yield
    assert len(launches) == number


@pytest.fixture
def uninitialized_is_nan():
    """What ``torch.empty`` gives, so that restoring from it shows."""
    was = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = was


@pytest.mark.parametrize("method", ["sam", "vasso"])
@pytest.mark.parametrize("writes", [False, True], ids=["untouched", "written"])
@pytest.mark.parametrize("dtypes", [(LOW, WIDE), (WIDE, LOW)], ids=["bf16-fp32", "fp32-bf16"])
@pytest.mark.parametrize("launch", [1, 2])
def test_failing_launch(launch, dtypes, writes, method, uninitialized_is_nan, monkeypatch):
    rigs = []
    for _ in range(2):
        starts = [torch.linspace(-1, 1, 50, device=DEVICE).to(dtype) for dtype in dtypes]
        params = [torch.nn.Parameter(w) for w in starts]
        optimizer = create(method, params, "triton", **ADAMW)
        optimizer.step(lambda params=params: gradients(params))
        if writes:
            write(params)
        rigs.append((params, optimizer))
    (params, optimizer), (others, twin) = rigs
    before = everything(optimizer, params)
    gradients(params)
    with pytest.raises(RuntimeError, match="no such"), failing_launch(launch, monkeypatch):
        optimizer.first_step()
    assert difference(everything(optimizer, params), before) is None
    for ps, each in rigs:  # and the next step is as if nothing had been
        each.step(lambda ps=ps: gradients(ps))
    assert difference(everything(optimizer, params), everything(twin, others)) is None
    assert not same(params, before["weights"])


@cpu_only
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("method", ["sam", "vasso-all"])
def test_out_of_memory(method, backend):
    """Wherever a step may be short of it; others write to the parameters before every step."""
    tensors = LARGE if backend == "torch" else SMALL
    rig, twin = (
        Rig(method, "adamw", backend, tensors, master_weights=True).steps(1) for _ in range(2)
    )
    counted = Allocations()
    with kernels(), counted:
        rig.step()
    twin.step()
    samples = {"reference": 40, "torch": 40, "triton": 3}[backend]
    failures = 0
    for i, at in enumerate(spread(counted.count, samples, rig.name)):
        write(rig.params)
        write(twin.params)
        before = everything(rig.optimizer, rig.params)
        try:
            with kernels(), Allocations(at, forever=bool(i % 2)):
                rig.step()
        except torch.OutOfMemoryError:
            after = everything(rig.optimizer, rig.params)
            assert difference(after, before) is None, f"allocation {at} of {counted.count}"
            failures += 1
            rig.step()
        twin.step()
    ends = [everything(each.optimizer, each.params) for each in (rig, twin)]
    assert difference(*ends) is None
    assert failures > samples / 2


@pytest.mark.parametrize("writes", [False, True], ids=["untouched", "written"])
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_failing_tensor(backend, writes, monkeypatch):
    """One at a time: any of them may be the one that fails, and those before it are restored."""
    starts = [torch.linspace(-1, 1, 18, device=DEVICE).to(d) for d in (LOW, WIDE, LOW, WIDE)]
    starts[3] = starts[3][::2]  # with gaps, which torch's operators do not serve
    params = [torch.nn.Parameter(w) for w in starts]
    optimizer = create("sam", params, backend, **ADAMW)
    optimizer.step(lambda: gradients(params))
    perturb, failing = reference.perturb_one, 0
    calls = []

    def perturbing(*args):
        calls.append(1)
        if len(calls) == failing:
            raise RuntimeError("no such tensor")
        perturb(*args)

    monkeypatch.setattr(reference, "perturb_one", perturbing)
    optimizer.step(lambda: gradients(params))
    total = len(calls)
    assert total >= 3
    for failing in range(1, total + 1):
        if writes:
            write(params)
        before = everything(optimizer, params)
        gradients(params)
        calls.clear()
        with pytest.raises(RuntimeError, match="no such"):
            optimizer.first_step()
        assert len(calls) == failing
        assert difference(everything(optimizer, params), before) is None
        optimizer.step(lambda: gradients(params))
        assert not same(params, before["weights"])
