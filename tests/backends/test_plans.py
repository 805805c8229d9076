"""Launches that are prepared once: made again while nothing changes, and by no step after that."""

import itertools

import pytest
import torch

import fastsam
from fastsam.backends.triton.backend import TritonBackend

from registry import DEVICE, METHODS, create

SIZES = (5, 1040, 33)


def gradients(generator, params):
    """Of a quadratic loss with noise, so that the second ones depend on the perturbation."""
    noise = [torch.randn(param.shape, generator=generator).to(param) for param in params]
    return [x + param.detach() for x, param in zip(noise, params, strict=True)]


def take_steps(optimizer, generator, count=1, seconds=None):
    for _ in range(count):
        params = [param for group in optimizer.param_groups for param in group["params"]]
        for half in (optimizer.first_step, optimizer.second_step):
            grads = gradients(generator, params)
            if half == optimizer.second_step and seconds is not None:
                grads = seconds(grads)
            for param, grad in zip(params, grads, strict=True):
                param.grad = grad
            half()


@pytest.mark.parametrize("method", METHODS)
def test_launches_are_prepared_once(method, monkeypatch):
    """Also where gradients and copies move, where state changes places, and with another lam."""
    prepared, prepare = [], TritonBackend._prepare
    monkeypatch.setattr(
        TritonBackend, "_prepare", lambda *args, **kw: prepared.append(1) or prepare(*args, **kw)
    )
    params = [torch.nn.Parameter(torch.ones(n, device=DEVICE)) for n in SIZES]
    optimizer = create(method, params, "triton", METHODS[method].bases[0])
    generator, kept = torch.Generator().manual_seed(3), []
    take_steps(optimizer, generator, 2)
    first = len(prepared)
    assert first >= 2
    for _ in range(3):
        optimizer.param_groups[0]["lr"] *= 0.9
        kept.append([torch.empty_like(param) for param in params])  # takes the memory of the last
        take_steps(optimizer, generator)
    assert len(prepared) == first


def launches(optimizer):
    """What the passes hold prepared, with the bucket that each launch is of."""
    for layout in optimizer._passes.collector.layouts():
        for plan in layout.plans.values():
            reductions = [] if plan.reduction is None else plan.reduction.parts.values()
            yield from [*itertools.chain(*reductions), *plan.launches]


def test_launches_have_the_present_tables():
    """Of misaligned tensors, above all: a stale table would let them be read 16 bytes at once."""
    params = [torch.nn.Parameter(torch.ones(n, device=DEVICE)) for n in SIZES]
    optimizer = fastsam.SSAM(params, torch.optim.SGD, lr=0.1, backend="triton")
    generator = torch.Generator().manual_seed(3)
    for seconds in (None, misaligned, None, lambda grads: [*grads[:1], *misaligned(grads[1:])]):
        take_steps(optimizer, generator, seconds=seconds)
        assert sum(1 for _ in launches(optimizer)) == 4
        for launch in launches(optimizer):
            table = launch.bucket.table
            pointers, chunks, columns = launch.run.arguments[:3]
            assert pointers is table.pointers and columns == len(SIZES)
            assert any(chunks is held for held in table._chunks.values())
        grads = [param.grad.data_ptr() for param in params]
        assert table.aligned.tolist() == [address % 16 == 0 for address in grads]


def misaligned(grads):
    return [torch.cat([grad.flatten(), grad.flatten()[:1]])[1:].view_as(grad) for grad in grads]


def elsewhere(optimizer):
    for param in optimizer.param_groups[0]["params"]:
        param.data = param.data.clone()


def shorter(optimizer):
    """Let a parameter and its state be parts of what they were, at the same address."""
    param = optimizer.param_groups[0]["params"][1]
    param.data = param.data[:1000]
    for name, x in optimizer.state[param].items():
        if x.ndim:
            optimizer.state[param][name] = x[:1000]


def with_infinity(grads):
    return [torch.full_like(grads[0], torch.inf), *grads[1:]]


def added(optimizer):
    param = torch.nn.Parameter(torch.ones(70, device=DEVICE, dtype=torch.float64))
    optimizer.add_param_group({"params": [param], "lr": 0.05, "rho": 0.3})


def set_all(**values):
    return lambda optimizer: [group.update(values) for group in optimizer.param_groups]


def set_attributes(**values):
    return lambda optimizer: [setattr(optimizer, name, value) for name, value in values.items()]


CHANGES = {
    "learning rate": set_all(lr=0.01),
    "radius": set_all(rho=0.5),
    "radius as a tensor": set_all(rho=torch.tensor(0.4, device=DEVICE)),
    "adaptive": set_all(adaptive=True),
    "clipped": set_attributes(max_grad_norm=0.5),
    "another bound": set_attributes(max_grad_norm=0.1),
    "not clipped": set_attributes(max_grad_norm=None),
    "renormalized": set_attributes(renormalize=True),
    "skipping": set_attributes(skip_nonfinite=True),
    "parameters elsewhere": elsewhere,
    "a shorter parameter": shorter,
    "another group": added,
    "loaded": lambda optimizer: optimizer.load_state_dict(optimizer.state_dict()),
    "in one group": lambda optimizer: optimizer.param_groups[0].update(weight_decay=0.3),
    "state elsewhere": lambda optimizer: moved(optimizer),
}
SECONDS = {
    "none in one": lambda grads: [*grads[:1], None, *grads[2:]],
    "one alone": lambda grads: [grads[0], *[None] * len(grads[1:])],
    "not finite": with_infinity,  # before the next, after which launches are prepared anew
    "misaligned": misaligned,
    "as they were": list,
}


def moved(optimizer):
    """Give the state of the first parameter other memory."""
    state = optimizer.state[optimizer.param_groups[0]["params"][0]]
    state.update({name: x * 2 for name, x in state.items() if name != "step"})


@pytest.mark.parametrize(("base", "order"), [(torch.optim.SGD, 1), (torch.optim.AdamW, -1)])
def test_launches_follow_what_changes(base, order):
    """After every change the triton backend goes on as the reference, which keeps nothing."""
    momentum = {"momentum": 0.9} if base is torch.optim.SGD else {}
    runs = []
    for backend in ("triton", "reference"):
        generator = torch.Generator().manual_seed(7)
        noise = [torch.randn(n, generator=generator, dtype=torch.float64) for n in SIZES]
        params = [torch.nn.Parameter(x.to(DEVICE)) for x in noise]
        optimizer = fastsam.SAM(params, base, rho=0.2, lr=0.1, backend=backend, **momentum)
        runs.append((optimizer, torch.Generator().manual_seed(9)))

    def check(changes, seconds=None):
        weights = []
        for optimizer, generator in runs:
            for change in changes:
                change(optimizer)
            take_steps(optimizer, generator, 1 if seconds else 2, seconds)
            optimizer.plain_step()
            weights.append([p for group in optimizer.param_groups for p in group["params"]])
        for p, q in zip(*weights, strict=True):
            # sums of 1,078 squares in another order, over some hundreds of steps
            torch.testing.assert_close(p, q, rtol=1e-11, atol=1e-12)

    check([])
    for change in [*CHANGES.values()][::order]:
        check([change])
        for name, seconds in SECONDS.items():
            if name != "not finite" or runs[0][0].skip_nonfinite:
                check([], seconds)
