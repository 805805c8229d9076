"""Odd tensors and odd gradients, on every backend, against the float64 oracle."""

import numpy as np
import pytest
import torch

import fastsam
from fastsam.kernels.layout import CHUNK, REDUCE_CHUNK

import oracles
from layouts import LAYOUTS, channels_last, misaligned
from registry import (
    BACKENDS,
    DEVICE,
    DTYPES,
    METHODS,
    Dtypes,
    base_of,
    build,
    build_oracle,
    create,
    numpy,
    parameters,
    set_grads,
)

CASES = [("sam", "sgd-momentum"), ("asam", "adamw"), ("ssam-adaptive-clip", "adagrad")]
#: Those with state in the ascent, or with more streams.
MORE_CASES = [
    ("vasso-all", "sgd-momentum"), ("samar-all", "sgd-momentum"), ("lightsam-1", ""),
    ("lightsam-2", ""), ("lightsam-3-all", ""), ("adasam", ""),
]  # fmt: skip
FP32 = DTYPES["fp32"]


def compare(params, oracle, tolerance=2e-6):
    """After a few float32 steps of weights up to 3: a few roundings of 2e-7 each."""
    for ours, exact in zip(numpy(params), oracle.weights, strict=True):
        np.testing.assert_allclose(ours, exact, rtol=0, atol=tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("method", "base"), CASES + MORE_CASES)
@pytest.mark.parametrize(
    "size",
    [0, 1, 15, 16, 17, 127, 128, 129, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 2 * CHUNK + 16],
)
def test_block_edges(size, method, base, backend):
    shapes = [(size,), (3,)]
    problem = oracles.Problem(shapes, seed=size)
    params = parameters(problem.initial(), FP32)
    optimizer = build(METHODS[method], base_of(method, base), params, [{"params": [0, 1]}], backend)
    oracle = build_oracle(
        METHODS[method], base_of(method, base), params, [{"params": [0, 1]}], FP32
    )
    for _ in range(3):
        for half in (optimizer.first_step, optimizer.second_step):
            set_grads(params, problem.grad(numpy(params)), FP32)
            half()
        oracle.step(problem.grad)
    compare(params, oracle)
    if "step" in optimizer.state[params[0]]:
        assert all(optimizer.state[p]["step"] == 3 for p in params)  # of empty tensors, too


@pytest.mark.parametrize("size", [REDUCE_CHUNK - 1, REDUCE_CHUNK, REDUCE_CHUNK + 1])
@pytest.mark.parametrize("dtype", ["fp32", "fp64", "bf16"])
@pytest.mark.filterwarnings("ignore:some parameters are float16 or bfloat16")
def test_reduction_edges(size, dtype):
    grad = np.random.default_rng(size).standard_normal(size)
    params = parameters([np.zeros(size), np.zeros(5)], DTYPES[dtype])
    optimizer = fastsam.SAM(params, torch.optim.SGD, lr=0.1, backend="triton")
    set_grads(params, [grad, np.ones(5)], DTYPES[dtype])
    exact = np.sqrt(sum((g**2).sum() for g in numpy([p.grad for p in params])))
    optimizer.first_step()
    eps = 2.0**-53 if dtype == "fp64" else 2.0**-24
    assert float(optimizer.metrics["grad_norm"]) == pytest.approx(exact, rel=8 * eps)


@pytest.mark.parametrize("size", [2 * CHUNK - 1, 2 * CHUNK, 2 * CHUNK + 1, 4 * CHUNK + 16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.filterwarnings("ignore:some parameters are float16 or bfloat16")
def test_perturbation_edges_of_16_bits(size, dtype):
    """They are perturbed twice as many at a time, and restored as they were."""
    w, grad = (torch.linspace(-1, x, size, device=DEVICE).to(dtype) for x in (1.0, 2.0))
    param = torch.nn.Parameter(w.clone())
    optimizer = fastsam.SAM([param], torch.optim.SGD, lr=0.0, rho=0.5, backend="triton")
    param.grad = grad.clone()
    optimizer.first_step()
    e = 0.5 * grad.double() / grad.double().norm()
    expected = (w.double() + e).to(dtype)
    # float32 rounds the sum before the store does: rarely, the other neighbour
    torch.testing.assert_close(param.detach(), expected, rtol=torch.finfo(dtype).eps, atol=1e-6)
    assert (param.detach() == expected).float().mean() > 0.99
    param.grad = grad.clone()
    optimizer.second_step()
    assert torch.equal(param.detach(), w)


# Layouts: the same mathematics wherever the elements lie in memory.

GRAD_LAYOUTS = LAYOUTS | {"contiguous": lambda a: torch.from_numpy(a).float().to(DEVICE)}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("grad_layout", GRAD_LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("method", "base"), CASES[:2] + MORE_CASES[:2] + MORE_CASES[4:5])
def test_layouts(layout, grad_layout, method, base, backend):
    shapes = [(5, 4, 7, 8), (3,)]
    problem = oracles.Problem(shapes, seed=8)
    start = problem.initial()
    params = [
        torch.nn.Parameter(LAYOUTS[layout](start[0])),
        torch.nn.Parameter(torch.from_numpy(start[1]).float().to(DEVICE)),
    ]
    strides = params[0].stride()
    address = params[0].data_ptr()
    optimizer = build(METHODS[method], base_of(method, base), params, [{"params": [0, 1]}], backend)
    oracle = build_oracle(
        METHODS[method], base_of(method, base), params, [{"params": [0, 1]}], FP32
    )
    for _ in range(3):
        for half in (optimizer.first_step, optimizer.second_step):
            grads = problem.grad(numpy(params))
            set_grads(params, grads, FP32)
            params[0].grad = GRAD_LAYOUTS[grad_layout](grads[0])
            half()
        oracle.step(problem.grad)
    compare(params, oracle)
    assert params[0].stride() == strides and params[0].data_ptr() == address


@pytest.mark.parametrize("backend", BACKENDS)
def test_expanded_gradient(backend):
    """``p.sum().backward()`` gives a gradient of stride 0."""
    param = torch.nn.Parameter(torch.zeros(40, 5, device=DEVICE))
    optimizer = fastsam.SAM([param], torch.optim.SGD, lr=0.5, rho=2.0, backend=backend)
    optimizer.zero_grad()
    param.sum().backward()
    param.grad = torch.ones((), device=DEVICE).expand(40, 5)
    optimizer.first_step()
    torch.testing.assert_close(param, torch.full_like(param, 2 / 200**0.5))
    param.grad = torch.ones((), device=DEVICE).expand(40, 5)
    optimizer.second_step()
    assert (param == -0.5).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_neighbours_of_a_view_are_untouched(backend):
    flat = torch.full((3000,), 7.0, device=DEVICE)
    params = [torch.nn.Parameter(flat[1:1200]), torch.nn.Parameter(flat[1201:2999])]
    optimizer = fastsam.SAM(params, torch.optim.AdamW, lr=0.1, rho=1.0, backend=backend)
    for half in (optimizer.first_step, optimizer.second_step):
        for p in params:
            p.grad = torch.ones_like(p)
        half()
    assert flat[0] == flat[1200] == flat[2999] == 7
    assert (flat[1:1200] != 7).all() and (flat[1201:2999] != 7).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_state_of_another_layout(backend, memory_format):
    """A checkpoint's state may have other strides than the parameter."""
    start = np.random.default_rng(0).standard_normal((4, 3, 5, 6))
    param = torch.nn.Parameter(channels_last(start))
    optimizer = fastsam.SAM([param], torch.optim.SGD, lr=0.1, momentum=0.5, rho=0.0,
                            backend=backend)  # fmt: skip
    buffer = torch.from_numpy(start).float().to(DEVICE).contiguous(memory_format=memory_format)
    optimizer.state[param]["momentum_buffer"] = buffer.clone(memory_format=torch.preserve_format)
    for half in (optimizer.first_step, optimizer.second_step):
        param.grad = torch.zeros_like(param)
        half()
    torch.testing.assert_close(param, torch.from_numpy(start * 0.95).float().to(DEVICE))


@pytest.mark.parametrize("backend", BACKENDS)
def test_mixed_dtypes_in_one_optimizer(backend):
    """One global norm over float32, float64 and bfloat16 tensors."""
    names = ["fp32", "fp64", "fp32", "bf16-fp32"]
    arrays = [np.full(1030, 0.5), np.full(9, 0.25), np.full(3, 2.0), np.full(20, 1.0)]
    params = [parameters([a], DTYPES[n])[0] for a, n in zip(arrays, names, strict=True)]
    with pytest.warns(UserWarning, match="rounded away"):
        optimizer = fastsam.SSAM(params, torch.optim.SGD, lr=0.5, rho=8.0, backend=backend)
    for p, n in zip(params, names, strict=True):
        set_grads([p], [np.ones(tuple(p.shape))], DTYPES[n])
    optimizer.first_step()
    norm = np.sqrt(1030 + 9 + 3 + 20)
    assert float(optimizer.metrics["grad_norm"]) == pytest.approx(norm, rel=1e-6)
    for p, a in zip(params, arrays, strict=True):
        expected = torch.from_numpy(a + 8 / norm).to(DEVICE, p.dtype)
        torch.testing.assert_close(p.detach(), expected, rtol=1e-6, atol=1e-7)
    for p, n in zip(params, names, strict=True):
        set_grads([p], [np.full(tuple(p.shape), 2.0)], DTYPES[n])
    optimizer.second_step()
    for p, a in zip(params, arrays, strict=True):  # gamma = 1/2, so u = 1
        expected = torch.from_numpy(a - 0.5).to(DEVICE, p.dtype)
        torch.testing.assert_close(p.detach(), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("method", "base"), CASES + [("lightsam-3-all", ""), ("vasso-all", "adam")]
)
@pytest.mark.parametrize(
    ("param", "grad", "tolerance"),
    [
        ("float64", "float32", 2e-6),  # norms are those of float32
        ("float64", "bfloat16", 2e-6),
        ("float32", "float64", 2e-6),
        ("bfloat16", "float64", 0.04),  # weights up to 3, rounded in every step
    ],
)
@pytest.mark.filterwarnings("ignore:some parameters are float16 or bfloat16")
def test_gradients_of_another_dtype(param, grad, tolerance, method, base, backend):
    dtypes, groups = Dtypes(param, grad), [{"params": [0, 1, 2]}]
    problem = oracles.Problem([(5, 3), (), (1025,)], seed=1)
    params = parameters(problem.initial(), dtypes)
    optimizer = build(METHODS[method], base_of(method, base), params, groups, backend)
    oracle = build_oracle(METHODS[method], base_of(method, base), params, groups, dtypes)
    for _ in range(3):
        for half in (optimizer.first_step, optimizer.second_step):
            set_grads(params, problem.grad(numpy(params)), dtypes)
            half()
        oracle.step(problem.grad)
    compare(params, oracle, tolerance)


# Gradients that come and go.


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("method", "base"),
    [
        (method, base)
        for method in ("sam", "ssam-adaptive-clip")
        for base in ("sgd-momentum", "sgd-dampening", "adam-amsgrad", "adagrad", "adagrad_norm")
    ]
    + MORE_CASES,
)
def test_missing_gradients(method, base, backend):
    """Each parameter misses its first, its second, both or neither gradient, in turn."""
    shapes = [(5,), (1030,), (2, 3), ()]
    groups = [{"params": [0, 1]}, {"params": [2, 3], "rho": 0.2}]
    problem = oracles.Problem(shapes, seed=9)
    params = parameters(problem.initial(), FP32)
    spec = METHODS[method], base_of(method, base)
    optimizer = build(*spec, params, groups, backend)
    oracle = build_oracle(*spec, params, groups, FP32)
    for step in range(6):
        for name, half in enumerate((optimizer.first_step, optimizer.second_step)):

            def drop(grads, name=name, step=step):
                return [g if (step + k) >> name & 1 else None for k, g in enumerate(grads)]

            set_grads(params, drop(problem.grad(numpy(params))), FP32)
            half()
            if name == 0:
                oracle.ascend(drop(problem.grad(oracle.weights)))
            else:
                oracle.descend(drop(problem.grad(oracle.perturbed)))
        compare(params, oracle, tolerance=5e-6)
        for k, p in enumerate(params):
            steps = optimizer.state[p].get("step")
            assert steps is None or steps == oracle.state[k].get("step", 0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.filterwarnings("ignore:the second pass left no gradients")
def test_all_gradients_missing(backend):
    params = parameters([np.ones(3), np.ones((2, 2))], FP32)
    optimizer = fastsam.SAM(params, torch.optim.AdamW, lr=0.1, backend=backend)
    optimizer.first_step()
    optimizer.second_step()
    assert all((p == 1).all() for p in params)
    set_grads(params, [np.ones(3), None], FP32)
    optimizer.first_step(zero_grad=True)
    assert (params[0] != 1).all()
    optimizer.second_step()
    assert all((p == 1).all() for p in params)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("method", METHODS)
def test_zero_gradients(method, backend):
    params = parameters([np.ones(1030), np.ones(())], FP32)
    optimizer = create(method, params, backend, "sgd", weight_decay=0.0)
    for half in (optimizer.first_step, optimizer.second_step):
        set_grads(params, [np.zeros(1030), np.zeros(())], FP32)
        half()
        assert all((p == 1).all() for p in params)
    if METHODS[method].cls is not fastsam.LightSAM:  # whose rules II and III take no norm
        assert optimizer.metrics["grad_norm"] == 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [1e-20, 1e15])
def test_extreme_gradients(scale, backend):
    """Squares that leave float32 only at the far ends; the perturbation keeps its norm."""
    grad = np.random.default_rng(1).standard_normal(2000) * scale
    params = parameters([np.zeros(2000)], FP32)
    optimizer = fastsam.SAM(params, torch.optim.SGD, lr=0.0, rho=0.5, backend=backend)
    set_grads(params, [grad], FP32)
    optimizer.first_step()
    moved = numpy(params)[0]
    n = np.linalg.norm(grad)
    np.testing.assert_allclose(moved, 0.5 * grad / (n + 1e-12), rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize("backend", BACKENDS)
def test_tied_parameters(backend):
    """A weight used twice, and listed twice, is perturbed and updated once."""
    torch.manual_seed(0)
    results = []
    for repeat in (1, 2):
        torch.manual_seed(0)
        encoder = torch.nn.Linear(6, 6, bias=False).to(DEVICE)
        decoder = torch.nn.Linear(6, 6, bias=False).to(DEVICE)
        decoder.weight = encoder.weight
        x = torch.randn(4, 6, device=DEVICE)

        def build_optimizer(params):
            return fastsam.SAM(params, torch.optim.SGD, lr=0.1, momentum=0.9, backend=backend)

        if repeat == 2:
            with pytest.warns(UserWarning, match="duplicate parameters"):
                optimizer = build_optimizer([encoder.weight, decoder.weight])
        else:
            optimizer = build_optimizer([encoder.weight])
        for _ in range(3):
            optimizer.step(lambda e=encoder, d=decoder, x=x: (d(e(x)) ** 2).sum().backward())
        results.append(encoder.weight.detach().clone())
    assert torch.equal(*results)


def test_misaligned_takes_the_scalar_path():
    from fastsam.backends.triton.backend import TritonBackend

    start = np.random.default_rng(0).standard_normal(1500)
    params = [torch.nn.Parameter(misaligned(start)), *parameters([start], FP32)]
    optimizer = fastsam.SAM(params, torch.optim.SGD, lr=0.1, rho=0.5, backend="triton")
    for half in (optimizer.first_step, optimizer.second_step):
        for p in params:
            p.grad = torch.ones(1500, device=DEVICE)
        half()
    backend = optimizer._passes.backends._made["triton"]
    assert isinstance(backend, TritonBackend)
    for table in backend._tables.values():
        assert table.aligned.tolist() == [False, True]
    assert torch.equal(params[0], params[1])  # same bits on both paths
