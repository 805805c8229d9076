"""Training in bfloat16 with stochastic rounding, and what of a perturbation the weights take up."""

import copy
import io

import numpy as np
import pytest
import torch

import fastsam

from faults import difference
from networks import same
from reads import never_waiting
from registry import BACKENDS, BASES, DEVICE
from test_stochastic_rounding import BRAIN, neighbours, numpy, usam


def gradients(params):
    for p in params:
        p.grad = torch.sin(3 * p.detach())


def trained(base="adamw", steps=3, backend="torch", cls=fastsam.SAM, **kwargs):
    generator = torch.Generator().manual_seed(0)
    starts = [torch.randn(s, generator=generator) for s in ((300,), (5, 7), ())]
    params = [torch.nn.Parameter(w.to(DEVICE, BRAIN)) for w in starts]
    chosen = BASES[base]
    kwargs = {"rounding": "stochastic", "seed": 3} | chosen.kwargs | kwargs
    optimizer = cls(params, chosen.cls, backend=backend, **kwargs)
    run(optimizer, params, steps)
    return params, optimizer


def run(optimizer, params, steps):
    for _ in range(steps):
        optimizer.step(lambda: gradients(params))


@pytest.mark.parametrize("cls", [fastsam.SAM, fastsam.VaSSO])
@pytest.mark.parametrize("base", BASES)
def test_resumed_run_is_exact(base, cls):
    params, optimizer = trained(base, cls=cls)
    buffer = io.BytesIO()
    torch.save({"params": [p.detach() for p in params], "state": optimizer.state_dict()}, buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    run(optimizer, params, 2)
    resumed, other = trained(base, steps=0, cls=cls)
    with torch.no_grad():
        for p, w in zip(resumed, saved["params"], strict=True):
            p.copy_(w)
    other.load_state_dict(saved["state"])
    assert float(other.kept["rounding_step"]) == 3
    run(other, resumed, 2)
    assert same(params, resumed)


@pytest.mark.parametrize("backend", BACKENDS)
def test_restored_bit_for_bit_and_retried_alike(backend):
    """A step that failed has left no trace in the random numbers either."""
    params, optimizer = trained(backend=backend, steps=1)
    undisturbed, twin = trained(backend=backend, steps=1)
    before = [p.detach().clone() for p in params]
    state = copy.deepcopy(optimizer.state_dict())
    gradients(params)
    optimizer.first_step()
    assert not same(params, before)
    optimizer.restore()
    assert same(params, before)
    calls = []

    def failing():
        gradients(params)
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(failing)
    assert same(params, before)
    assert difference(optimizer.state_dict(), state) is None
    run(optimizer, params, 1)
    run(twin, undisturbed, 1)
    assert same(params, undisturbed)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("base", ["sgd-momentum", "adamw"])
@pytest.mark.filterwarnings("ignore:some parameters are float16 or bfloat16")
def test_state_and_wide_parameters_are_rounded_to_nearest(base, backend):
    """Given the same gradients, only the bfloat16 weights differ from the other mode's."""
    results = []
    for rounding in ("stochastic", "nearest"):
        params = [torch.nn.Parameter(torch.full((400,), 0.7, dtype=d, device=DEVICE))
                  for d in (BRAIN, torch.float32)]  # fmt: skip
        kwargs = {"rounding": rounding, "lr": 0.01} | ({"momentum": 0.9} if base != "adamw" else {})
        optimizer = fastsam.USAM(params, BASES[base].cls, 0.05, backend=backend, **kwargs)
        for half in (optimizer.first_step, optimizer.second_step):
            for p in params:
                p.grad = torch.linspace(-1, 1, 400, dtype=p.dtype, device=DEVICE)
            half()
        results.append((params, [optimizer.state[p] for p in params]))
    (ours, states), (nearest, others) = results
    assert not torch.equal(ours[0], nearest[0]) and torch.equal(ours[1], nearest[1])
    torch.testing.assert_close(states, others, rtol=0, atol=0)
    assert all(x.dtype == BRAIN for name, x in states[0].items() if name != "step")


@pytest.mark.parametrize("backend", BACKENDS)
def test_base_that_is_not_fused(backend):
    """Its perturbation is rounded stochastically, its update is its own."""
    starts = torch.linspace(-1, 1, 300, device=DEVICE, dtype=BRAIN)
    params, plain = ([torch.nn.Parameter(starts.clone())] for _ in range(2))
    kwargs = {"base_optimizer": torch.optim.RMSprop, "rho": 2.0**-10, "lr": 0.01}
    optimizer = usam(params, backend, **kwargs)
    gradients(params)
    optimizer.first_step()
    exact = starts.float() + 2.0**-10 * torch.sin(3 * starts).float()
    low, high = neighbours(numpy(exact).astype(np.float32))
    ours = numpy(params[0])
    assert ((ours == low) | (ours == high)).all() and not torch.equal(params[0], exact.to(BRAIN))
    gradients(params)
    plain[0].grad = params[0].grad.clone()
    optimizer.second_step()
    torch.optim.RMSprop(plain, lr=0.01).step()
    assert same(params, plain)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kept", [{}, {"rounding": "nearest", "master_weights": True}])
def test_gpu_is_never_waited_for(kept, backend):
    params, optimizer = trained(backend=backend, steps=1, **kept)  # compiles
    with never_waiting():
        run(optimizer, params, 2)


def test_refusals():
    half, brain = (torch.nn.Parameter(torch.ones(3, dtype=d)) for d in (torch.float16, BRAIN))
    with pytest.raises(ValueError, match="float16"):
        fastsam.SAM([brain, half], torch.optim.SGD, rounding="stochastic")
    with pytest.raises(ValueError, match="rounding"):
        fastsam.SAM([brain], torch.optim.SGD, rounding="up")
    with pytest.raises(ValueError, match="seed"):
        fastsam.SAM([brain], torch.optim.SGD, rounding="stochastic", seed=-1)
    optimizer = fastsam.SAM([brain], torch.optim.SGD, rounding="stochastic")
    with pytest.raises(ValueError, match="float16"):
        optimizer.add_param_group({"params": [half]})
        optimizer.step(lambda: gradients([brain, half]))


# --- the perturbation that is realised -----------------------------------------------------------


def plain_share(size, kept, seed=0):
    """A perturbation by rho = 0.05 of weights of a usual size, as stored.

    With delta the change of the stored weights and e what was asked for: delta's component along
    e and its length, both over rho; and the length that rounding is expected to give.
    """
    generator = torch.Generator(DEVICE).manual_seed(seed)

    def normal():
        return torch.randn(size, generator=generator, device=DEVICE)

    param, rho = torch.nn.Parameter((0.02 * normal()).to(BRAIN)), 0.05
    optimizer = fastsam.SAM([param], torch.optim.SGD, rho, lr=1e-3, backend="torch", **kept)
    if "master_weights" in kept:  # an update by some spacings fills the masters' low bits
        for half in (optimizer.first_step, optimizer.second_step):
            param.grad = normal().to(BRAIN)
            half()
    before = param.detach().float()
    param.grad = normal().to(BRAIN)
    optimizer.first_step()
    delta = param.detach().float() - before
    e = param.grad.float()
    e *= rho / torch.linalg.vector_norm(e, dtype=torch.float64).float()
    optimizer.restore()
    assert torch.equal(param.float(), before)
    component = float(torch.dot(delta.double(), e.double())) / rho**2
    length = float(torch.linalg.vector_norm(delta, dtype=torch.float64)) / rho
    return component, length, expected_length(before, e) / rho


def expected_length(w, e):
    """The root of the mean square of unbiased rounding from w, which bfloat16 holds.

    Of spacings q it goes k = floor(e/q) or, with probability e/q - k, one more.
    """
    x = w + e
    below = x.view(torch.int32).bitwise_and(-0x10000).view(torch.float32)  # towards zero
    q = (below.view(torch.int32) + 0x10000).view(torch.float32) - below
    p = (x - below) / q
    return float(((1 - p) * (below - w) ** 2 + p * (below + q - w) ** 2).double().sum().sqrt())


@pytest.mark.parametrize("size", [1_000_000, 10_000_000])
@pytest.mark.filterwarnings("ignore:some parameters are float16 or bfloat16")
def test_realised_perturbation(size, record_property):
    """Its component along e is rho, in both modes; to nearest much of it is rounded away.

    Its length cannot be rho: where an element of e is far below the spacing q of bfloat16, any
    unbiased rounding moves it by q with probability |e|/q, a mean square of q |e| and not e^2.
    """
    modes = {
        "nearest": {},
        "stochastic": {"rounding": "stochastic"},
        "master": {"master_weights": True},
    }
    measured = {mode: plain_share(size, kept) for mode, kept in modes.items()}
    for mode, (component, length, expected) in measured.items():
        record_property(mode, f"component {component:.4f}, length {length:.4f} ({expected:.4f})")
        if mode != "nearest":
            assert abs(component - 1) < 0.02
            assert abs(length / expected - 1) < 0.02
            assert length > 1.25
    assert measured["nearest"][0] < 0.9
