"""DelayedSAM: along the last step's gradient, against a float64 loop, and what it keeps."""

import copy
import pickle

import pytest
import torch

import fastsam

from graphs import Graph
from networks import bits, closure_of, loss_of, model_and_data, same
from reads import Reads
from registry import BACKENDS, DEVICE

SGD = {"base_optimizer": torch.optim.SGD, "lr": 0.1}
ADAMW = {"base_optimizer": torch.optim.AdamW, "lr": 0.02, "eps": 1e-3, "weight_decay": 0.1}
ON_EACH = pytest.mark.parametrize("backend", BACKENDS)
STATE = "ascent_last"


def problem(base=SGD, backend="torch", **kwargs):
    model, loss_fn = model_and_data()
    kwargs = {"rho": 0.3} | kwargs
    return model, fastsam.DelayedSAM(model.parameters(), **base, **kwargs, backend=backend), loss_fn


@ON_EACH
@pytest.mark.parametrize("base", [SGD, ADAMW], ids=["sgd", "adamw"])
def test_against_float64(base, backend):
    model, optimizer, loss_fn = problem(base, backend)
    exact, kwargs, last = copy.deepcopy(model).double(), dict(base), None
    twin = kwargs.pop("base_optimizer")(exact.parameters(), **kwargs)
    _, x, y = (cell.cell_contents for cell in loss_fn.__closure__)
    for _ in range(5):
        optimizer.step(closure_of(loss_fn))
        params = list(exact.parameters())
        before = [p.detach().clone() for p in params]
        if last is not None:
            norm = torch.cat([g.flatten() for g in last]).norm()
            with torch.no_grad():
                for p, g in zip(params, last, strict=True):
                    p.add_(0.3 * g / norm)
        loss = torch.nn.functional.cross_entropy(exact(x.double()), y)
        last = torch.autograd.grad(loss, params)
        with torch.no_grad():
            for p, w, g in zip(params, before, last, strict=True):
                p.copy_(w)
                p.grad = g
        twin.step()
    for p, q in zip(model.parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(p.double(), q, rtol=0, atol=2e-6)


@ON_EACH
@pytest.mark.parametrize("maximize", [False, True])
def test_by_hand(backend, maximize):
    """g = (3, 4), so e = (3, 4) at rho = 5; with weights that do not move."""
    params = [torch.nn.Parameter(torch.zeros(1, device=DEVICE)) for _ in range(2)]
    optimizer = fastsam.DelayedSAM(params, torch.optim.SGD, rho=5.0, lr=0.0, maximize=maximize,
                                   backend=backend)  # fmt: skip
    sign, seen = -1.0 if maximize else 1.0, []
    for grads in ([3.0, 4.0], [0.0, -2.0], [0.0, 0.0], [1.0, 1.0]):
        optimizer.perturb()
        seen += [p.item() for p in params]
        for p, g in zip(params, grads, strict=True):
            p.grad = torch.full_like(p, sign * g)
        optimizer.step()
    assert seen == pytest.approx([0.0, 0.0, 3.0, 4.0, 0.0, -5.0, 0.0, 0.0], rel=1e-6)
    assert [optimizer.state[p][STATE].item() for p in params] == [sign, sign]


@ON_EACH
def test_a_step_that_is_skipped_or_fails_keeps_the_gradient_before_it(backend):
    model, optimizer, loss_fn = problem(backend=backend, skip_nonfinite=True)
    optimizer.step(closure_of(loss_fn))
    before = bits(model)
    kept = [optimizer.state[p][STATE].clone() for p in model.parameters()]
    optimizer.step(closure_of(lambda: float("inf") * loss_fn()))

    def closure():
        loss_fn().backward()
        raise KeyError("data")

    with pytest.raises(KeyError, match="data"):
        optimizer.step(closure)
    assert same(bits(model), before)
    assert same([optimizer.state[p][STATE] for p in model.parameters()], kept)


@pytest.mark.parametrize("how", ["loaded", "pickled"])
def test_goes_on_bit_for_bit(how):
    model, optimizer, loss_fn = problem(ADAMW)
    for _ in range(3):
        optimizer.step(closure_of(loss_fn))
    if how == "pickled":
        other, resumed = pickle.loads(pickle.dumps((model, optimizer)))
    else:
        other = copy.deepcopy(model)
        resumed = fastsam.DelayedSAM(other.parameters(), **ADAMW, rho=0.3)
        resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    other_loss = loss_of(other)
    for _ in range(3):
        optimizer.step(closure_of(loss_fn))
        resumed.step(closure_of(other_loss))
        assert same(bits(model), bits(other))
    assert float(resumed.metrics["grad_norm"]) > 0


@ON_EACH
def test_loss_scales(backend):
    model, optimizer, loss_fn = problem(backend=backend)
    other, scaled, other_loss = problem(backend=backend)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**10, growth_interval=2)

    def closure():
        loss = other_loss()
        scaler.scale(loss).backward()
        return loss

    for _ in range(4):
        optimizer.step(closure_of(loss_fn))
        scaled.step(closure, grad_scaler=scaler)
        scaler.update()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)


def test_steps_of_the_base_keep_their_gradient_too():
    model, optimizer, loss_fn = problem(perturb_every=2, start=1)
    optimizer.step(closure_of(loss_fn))
    assert all(optimizer.state[p][STATE].any() for p in model.parameters())


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs the stand-in")
def test_captured_steps_are_steps(monkeypatch):
    both = [problem(backend="triton") for _ in range(2)]
    for _ in range(2):
        for _, optimizer, loss_fn in both:
            optimizer.step(closure_of(loss_fn))
    (model, optimizer, loss_fn), (other, stepped, other_loss) = both
    graph = Graph()
    with graph.capture(monkeypatch):
        optimizer.step(closure_of(loss_fn))
    stepped.step(closure_of(other_loss))
    for _ in range(3):
        graph.replay()
        stepped.step(closure_of(other_loss))
    assert same(bits(model), bits(other))


def test_the_host_reads_nothing():
    params = [torch.nn.Parameter(torch.ones(s, device=DEVICE)) for s in ((1030,), (3, 5), ())]
    optimizer = fastsam.DelayedSAM(params, **SGD, backend="triton", skip_nonfinite=True)
    with Reads() as reads:
        for _ in range(2):
            optimizer.perturb()
            for p in params:
                p.grad = torch.ones_like(p)
            optimizer.step()
    assert reads.seen == []


@pytest.mark.parametrize(
    ("kwargs", "error", "match"),
    [
        ({"base_optimizer": torch.optim.NAdam}, TypeError, "whose update is fused with 'delayed'"),
        (SGD | {"renormalize": True}, ValueError, "renormalize must be False with DelayedSAM"),
        (SGD | {"ascent_steps": 2}, ValueError, "ascent_steps must be 1 with DelayedSAM"),
        (SGD | {"amplify": True}, ValueError, "amplify must be False with DelayedSAM"),
    ],
)
def test_refused_by_name(kwargs, error, match):
    with pytest.raises(error, match=match):
        fastsam.DelayedSAM([torch.nn.Parameter(torch.ones(2))], **kwargs)


@ON_EACH
def test_loss_scales_of_other_steps_are_not_mixed(backend):
    """A parameter whose last gradient is older than the others' has it in the same units."""
    a, b = (torch.nn.Parameter(torch.ones(1, device=DEVICE)) for _ in "ab")
    optimizer = fastsam.DelayedSAM([a, b], torch.optim.SGD, rho=1.0, lr=0.0, backend=backend)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=256.0, growth_interval=1, growth_factor=16.0)
    moved = []

    def closure(step):
        moved[:] = [x.item() - 1 for x in (a, b)]
        loss = (a**2).sum() + ((b**2).sum() if step != 1 else 0)
        scaler.scale(loss).backward()
        return loss

    for step in range(3):
        optimizer.step(lambda step=step: closure(step), grad_scaler=scaler)
        scaler.update()
    # g~ = 2 at w = 1, then (2 (1 + 1 / sqrt 2), none): b's is that of the first step
    last = torch.tensor([2 + 2**0.5, 2.0], dtype=torch.float64)
    assert optimizer.metrics["grad_norm"].item() == pytest.approx(last.norm().item(), rel=1e-6)
    assert moved == pytest.approx((last / last.norm()).tolist(), rel=1e-5)
