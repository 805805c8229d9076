"""The torch backend on a CPU: norms, and the memory for intermediate results."""

import pytest
import torch

import fastsam
from fastsam.backends.eager import blocks, fused, norms, scratch

from test_cpu import own_step


def test_norms_of_large_tensors_are_accurate():
    """float32 cannot count to millions in one sum: 32,768 at a time lose a few ten-millionths."""
    size = 2 * blocks.BLOCK + 3
    param = torch.nn.Parameter(torch.ones(size))
    optimizer = fastsam.SSAM([param], torch.optim.SGD, lr=0.1, backend="torch")
    grad = torch.randn(size, generator=torch.Generator().manual_seed(1))
    own_step(optimizer, [param], lambda k, p: grad)
    exact = pytest.approx(float(grad.double().norm()), rel=2e-7)
    assert optimizer.metrics["grad_norm"] == exact
    assert optimizer.metrics["perturbed_grad_norm"] == exact


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_norms_span_by_span(dtype):
    """Of a large tensor all whole spans in one operator, with the bits that each has alone, and the
    same with any number of threads."""
    span = norms.SPAN
    sizes = [0, 1, 2 * span - 1, 2 * span, 5 * span + 7]
    generator = torch.Generator().manual_seed(0)
    xs = [torch.randn(size, generator=generator, dtype=dtype) for size in sizes]
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(norms.span_norms(xs))
    finally:
        torch.set_num_threads(threads)
    for ends, spans in found:
        assert list(ends) == [0, 1, 2, 4] and list(spans) == [3, 4]
        for k, x in ((0, xs[0]), (1, xs[1]), (2, xs[2]), (4, xs[4][5 * span :])):
            assert torch.equal(ends[k], torch.linalg.vector_norm(x))
        for k, whole in ((3, 2), (4, 5)):
            alone = [torch.linalg.vector_norm(x) for x in xs[k][: whole * span].split(span)]
            assert torch.equal(spans[k], torch.stack(alone))


def test_room_for_intermediate_results_is_taken_from_the_middle():
    """Whatever its size: a second thread finds its half where it left it, in its own cache."""
    memory, middles = scratch.Memory(), set()
    for sizes in ([1 << 16], [1 << 18], [blocks.BLOCK], [3000, 5000, 1 << 16]):
        whole, parts = memory.room([torch.empty(size) for size in sizes])
        assert whole.numel() == sum(sizes)
        assert [part.numel() for part in parts] == sizes
        starts = [part.data_ptr() for part in parts]
        assert starts == [whole.data_ptr() + 4 * sum(sizes[:k]) for k in range(len(sizes))]
        assert whole.data_ptr() % 64 == 0
        middles.add((whole.data_ptr() + 2 * whole.numel()) // 256)
    assert max(middles) - min(middles) <= 1  # 64 elements


def test_gradient_with_gaps_among_large_ones():
    """Its neighbours in memory are not its own."""
    size = 3 * norms.SPAN
    params = [torch.nn.Parameter(torch.zeros(size)) for _ in range(2)]
    optimizer = fastsam.SAM(params, torch.optim.SGD, lr=0.1, backend="torch")
    x = torch.randn(size, generator=torch.Generator().manual_seed(0))
    gapped = torch.stack([x, torch.full_like(x, 9.0)], 1)[:, 0]
    own_step(optimizer, params, lambda k, p: gapped if k else x)
    exact = 2**0.5 * float(x.double().norm())
    assert optimizer.metrics["grad_norm"] == pytest.approx(exact, rel=2e-7)


@pytest.mark.parametrize("dtypes", [("float32", "float64", "float64"), ("float64", "float32")])
def test_adaptive_group_of_two_dtypes(dtypes):
    """Each tensor is scaled in its own, and to the same bits as in a group of its own."""
    seen = []
    for together in (True, False):
        generator = torch.Generator().manual_seed(0)
        params = [
            # squares of which, and sums of those, float32 does not hold
            torch.nn.Parameter(torch.randn(50, generator=generator, dtype=torch.float64).mul(
                1e25 if dtype == "float64" else 1).to(getattr(torch, dtype)))
            for dtype in dtypes
        ]  # fmt: skip
        groups = params if together else [{"params": [param]} for param in params]
        optimizer = fastsam.ASAM(groups, torch.optim.SGD, lr=0.1, backend="torch")
        weights = own_step(optimizer, params, lambda k, p: torch.cos(p.detach()))
        seen.append([optimizer.metrics["grad_norm"], *weights[0], *weights[1]])
    assert seen[0][0].isfinite()
    for one, other in zip(*seen, strict=True):
        assert torch.equal(one, other)


def test_extremes_of_tensors_in_another_order_copy_nothing():
    """An update must not need memory half-way."""
    x = torch.randn(64, 32, 3, 3).to(memory_format=torch.channels_last)
    ends = x.new_empty(()), x.new_empty(())
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, acc_events=True) as profile:
        found = fused.extremes(x, ends)
    assert found == (float(x.min()), float(x.max()))
    names = [event.key for event in profile.key_averages()]
    assert "aten::aminmax" in names and "aten::clone" not in names
