"""Sums over many programs, which are added up window by window, and the order of walking."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

import fastsam
from fastsam.backends.triton.backend import TritonBackend
from fastsam.kernels import layout, reduce
from fastsam.kernels.layout import Launch, Launches, Row
from fastsam.kernels.table import Table

from registry import DEVICE

#: One element per thread, so that few elements are many programs.
SMALL = Launch(32, 32)
FEW = replace(Launches(), reduce=SMALL, reduce_scaled=SMALL, reduce_streams=SMALL)
SGD = {"lr": 0.1, "momentum": 0.9}
needs_interpreter = pytest.mark.skipif(
    not triton.knobs.runtime.interpret, reason="compiled kernels have their constants for good"
)


def optimizer_on(method, sizes, **kwargs):
    generator = torch.Generator().manual_seed(sum(sizes))
    params = [torch.nn.Parameter(torch.randn(n, generator=generator).to(DEVICE)) for n in sizes]
    optimizer = method(params, torch.optim.SGD, backend="triton", **SGD, **kwargs)
    backend = TritonBackend(FEW)
    optimizer._passes.backends.use("triton", params[0].device, backend)
    grads = [[torch.randn(n, generator=generator).to(DEVICE) for n in sizes] for _ in range(2)]
    return optimizer, params, grads, backend


def norm(xs):
    return float(torch.cat([x.detach().double().flatten() for x in xs]).norm())


def step(optimizer, params, grads):
    for half, given in zip((optimizer.first_step, optimizer.second_step), grads, strict=True):
        for param, grad in zip(params, given, strict=True):
            param.grad = grad.clone()
        half()


@pytest.fixture
def window(monkeypatch):
    """Windows so short that few programs fill several: the interpreter takes what is there."""
    monkeypatch.setattr(layout, "WINDOW", 8)
    monkeypatch.setattr(reduce, "WINDOW", tl.constexpr(8))
    return 8


def check_sums(sums, programs):
    """Two steps, whose sums use the same counters, against norms of all elements."""
    kwargs = {"adaptive": True, "max_grad_norm": 1e9} if sums == 2 else {}
    method = fastsam.SAMAR if sums == 5 else fastsam.SSAM
    optimizer, params, grads, backend = optimizer_on(method, [programs * SMALL.chunk - 5], **kwargs)
    eta = optimizer.param_groups[0]["eta"]
    for _ in range(2):
        norms = []
        for half, (grad,) in zip((optimizer.first_step, optimizer.second_step), grads, strict=True):
            norms.append(norm([(params[0].detach().abs() + eta if sums == 2 else 1) * grad]))
            params[0].grad = grad.clone()
            half()
        names = "grad_norm", "perturbed_grad_norm"
        assert [float(optimizer.metrics[name]) for name in names] == pytest.approx(norms, rel=1e-6)
    counts = [x for key, x in backend._scratches.items() if key[0] == "reduced"]
    assert counts and all(x.numel() == layout.counters(programs) and not x.any() for x in counts)


@needs_interpreter
@pytest.mark.parametrize("programs", [1, 8, 9, 19, 75])
@pytest.mark.parametrize("sums", [1, 2, 5])
def test_sums_of_any_number_of_programs(programs, sums, window):
    """One window, several, and more than a window of them; odd rows and even ones."""
    check_sums(sums, programs)


@pytest.mark.skipif(triton.knobs.runtime.interpret, reason="takes the interpreter 7 s")
def test_sums_of_two_windows():
    check_sums(1, layout.WINDOW + 1)


def test_what_an_odd_row_is_read_beyond_its_end_counts_for_nothing():
    """Rows are read in pairs of numbers; after an even row may lie anything."""
    optimizer, params, grads, backend = optimizer_on(fastsam.SSAM, [3 * SMALL.chunk])
    step(optimizer, params, grads)
    for scratch in backend._scratches.values():
        if scratch.dtype == torch.float64:
            scratch.fill_(float("nan"))
    step(optimizer, params, grads)
    assert float(optimizer.metrics["grad_norm"]) == pytest.approx(norm(grads[0]), rel=1e-6)


@needs_interpreter
def test_norms_of_segments_over_several_windows(window):
    sizes = [SMALL.chunk * window + 7, 40, 2 * SMALL.chunk]
    optimizer, params, grads, _ = optimizer_on(fastsam.SAM, sizes, norm="layer", rho=0.5)
    before = [param.detach().clone() for param in params]
    for param, grad in zip(params, grads[0], strict=True):
        param.grad = grad
    optimizer.first_step()
    for param, w, grad in zip(params, before, grads[0], strict=True):
        expected = w.double() + 0.5 * grad.double() / norm([grad])
        torch.testing.assert_close(param.detach().double(), expected, rtol=0, atol=1e-6)


def test_chunks_from_the_last_on():
    table = Table(torch.device(DEVICE))
    table.set({Row.GRAD: [1024, 2048]}, [3000, 5], [0, 1])
    there, back = (table.chunks(1024, backwards).cpu().numpy() for backwards in (False, True))
    assert len(there) == 4
    np.testing.assert_array_equal(back, there[::-1])
    one = Table(torch.device(DEVICE))
    one.set({Row.GRAD: [1024]}, [3], [0])
    assert one.chunks(1024, True).tolist() == one.chunks(1024).tolist()


@pytest.mark.parametrize(
    ("method", "expected"), [(fastsam.SAM, [False, True, False]),
                             (fastsam.SSAM, [False, True, False, True])],
)  # fmt: skip
def test_what_follows_a_reduction_walks_the_other_way(method, expected, monkeypatch):
    """And what follows a backward pass does not: that came from the last parameters."""
    seen, prepare = [], TritonBackend._prepare

    def noting(self, *args, backwards=False, **constants):
        seen.append(backwards)
        return prepare(self, *args, backwards=backwards, **constants)

    monkeypatch.setattr(TritonBackend, "_prepare", noting)
    optimizer, params, grads, _ = optimizer_on(method, [3000, 5])
    step(optimizer, params, grads)
    assert seen == expected


@pytest.mark.parametrize("backwards", [False, True])
def test_the_order_of_walking_changes_no_bit(backwards):
    results = []
    for launches in (Launches(), replace(Launches(), backwards=backwards)):
        optimizer, params, grads, _ = optimizer_on(fastsam.SSAM, [5000, 17, 2048])
        backend = TritonBackend(launches)
        optimizer._passes.backends.use("triton", params[0].device, backend)
        for _ in range(2):
            step(optimizer, params, grads)
        results.append(torch.cat([param.detach() for param in params]))
    assert torch.equal(*results)
