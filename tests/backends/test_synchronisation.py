"""No step waits for the device: nothing on it is read by the host."""

import pytest
import torch

from reads import Reads, never_waiting
from registry import BACKENDS, COMBINATIONS, DEVICE, METHODS, create


def run(optimizer, params, steps):
    for _ in range(steps):
        for half in (optimizer.first_step, optimizer.second_step):
            for p in params:
                p.grad = torch.ones_like(p)
            half()


def build(method, base, backend):
    params = [torch.nn.Parameter(torch.ones(s, device=DEVICE)) for s in ((1030,), (3, 5), ())]
    return create(method, params, backend, base), params


@pytest.mark.parametrize(("method", "base"), COMBINATIONS)
def test_triton_backend_reads_nothing(method, base):
    """Holds on any device, since the host code is the same on all."""
    optimizer, params = build(method, base, "triton")
    with Reads() as reads:
        run(optimizer, params, 1)
        optimizer.metrics  # noqa: B018
    assert reads.seen == []


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("method", ["adasam", "lightsam-1", "lightsam-2", "lightsam-3", "sam"])
def test_tensor_learning_rates_and_radii_are_not_read(method, backend):
    if backend != "triton" and DEVICE == "cpu":
        pytest.skip("torch's operators on a CPU take numbers, which have to be read there")
    params = [torch.nn.Parameter(torch.ones(5, device=DEVICE))]
    lr, rho = (torch.tensor(x, device=DEVICE) for x in (0.1, 0.05))
    optimizer = create(method, params, backend, "sgd", lr=lr, rho=rho)
    with Reads() as reads:
        run(optimizer, params, 2)
    assert reads.seen == []


def test_reads_are_noticed():
    with Reads() as reads:
        float(torch.ones(()))
    assert reads.seen == ["aten::_local_scalar_dense"]


@pytest.mark.gpu
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("method", METHODS)
def test_gpu_is_never_waited_for(method, backend):
    for base in METHODS[method].bases:
        run(*build(method, base, backend), 1)  # compiles
        optimizer, params = build(method, base, backend)
        with never_waiting():  # from the first step on
            run(optimizer, params, 2)
