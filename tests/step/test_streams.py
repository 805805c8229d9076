"""Steps on several CUDA streams that wait for each other, as docs/limits.md asks for it."""

import pytest
import torch

from registry import BACKENDS, DEVICE, METHODS, create

pytestmark = pytest.mark.gpu

#: Without state in the ascent, with it, with first gradients that are kept, with masters.
CASES = [("sam", {}), ("vasso", {}), ("samar", {}), ("lightsam-3", {}),
         ("sam", {"dtype": torch.bfloat16, "master_weights": True})]  # fmt: skip


def problem(method, backend, dtype=torch.float32, **kwargs):
    generator = torch.Generator().manual_seed(2)
    params = [
        torch.nn.Parameter(torch.randn(shape, generator=generator).to(DEVICE, dtype))
        for shape in ((1030,), (6, 5), ())
    ]
    return params, create(
        method, params, backend, "adamw" if METHODS[method].bases else "", **kwargs
    )


def half(take, params):
    for p in params:
        p.grad = torch.sin(3 * p.detach())
    take(zero_grad=True)


def disturb():
    """Use memory that was freed on this stream."""
    for size in (1030, 2048, 1030 + 128, 30):
        torch.full((size,), 7.0, device=DEVICE)
        torch.full((size,), 7.0, device=DEVICE, dtype=torch.bfloat16)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("method", "kwargs"), CASES)
@pytest.mark.parametrize("within", [False, True], ids=["steps", "passes"])
def test_streams_that_wait_for_each_other(within, method, kwargs, backend):
    """A step on each in turn, or the passes of every step: as on one stream, bit for bit."""
    (params, optimizer), (same, alone) = (problem(method, backend, **kwargs) for _ in range(2))
    streams = torch.cuda.Stream(), torch.cuda.Stream()
    last, count = torch.cuda.current_stream(), 0
    for _ in range(5):
        for take in (optimizer.first_step, optimizer.second_step):
            stream = streams[(count if within else count // 2) % 2]
            count += 1
            stream.wait_stream(last)
            with torch.cuda.stream(stream):
                half(take, params)
            if stream is not last:
                last.wait_stream(stream)
                with torch.cuda.stream(last):
                    disturb()
            last = stream
    torch.cuda.current_stream().wait_stream(last)
    for _ in range(5):
        half(alone.first_step, same)
        half(alone.second_step, same)
    for p, q in zip(params, same, strict=True):
        assert torch.equal(p, q)
        for key, x in alone.state[q].items():
            assert torch.equal(optimizer.state[p][key], x)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("method", "kwargs"), CASES)
def test_what_a_step_frees_is_not_used_while_it_is_read(method, kwargs, backend):
    """The second pass is on another stream, for which the first one does not wait."""
    (params, optimizer), (same, alone) = (problem(method, backend, **kwargs) for _ in range(2))
    first, second = torch.cuda.Stream(), torch.cuda.Stream()
    first.wait_stream(torch.cuda.current_stream())
    for _ in range(5):
        with torch.cuda.stream(first):
            half(optimizer.first_step, params)
        second.wait_stream(first)
        with torch.cuda.stream(second):
            half(optimizer.second_step, params)
        with torch.cuda.stream(first):
            disturb()
            first.wait_stream(second)
    torch.cuda.current_stream().wait_stream(first)
    for _ in range(5):
        half(alone.first_step, same)
        half(alone.second_step, same)
    for p, q in zip(params, same, strict=True):
        assert torch.equal(p, q)
