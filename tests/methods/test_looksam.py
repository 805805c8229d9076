"""LookSAM: against float64 formulas on torch's own optimizers, and what it keeps between steps."""

import copy
import pickle
from functools import partial

import pytest
import torch

import fastsam

from networks import bits, closure_of, loss_of, model_and_data, same
from reads import Reads
from registry import BACKENDS, DEVICE

SGD = {"base_optimizer": torch.optim.SGD, "lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
ADAMW = {"base_optimizer": torch.optim.AdamW, "lr": 0.02, "eps": 1e-3, "weight_decay": 0.1}
NADAM = {"base_optimizer": torch.optim.NAdam, "lr": 0.02, "eps": 1e-3}  # which is not fused
ON_EACH = pytest.mark.parametrize("backend", BACKENDS)
STATE = "ascent_orthogonal"


def problem(base=SGD, backend="torch", **kwargs):
    model, loss_fn = model_and_data()
    optimizer = fastsam.LookSAM(model.parameters(), **base | {"k": 3} | kwargs, backend=backend)
    return model, optimizer, loss_fn


def flat(tensors):
    return torch.cat([x.flatten() for x in tensors])


class ByHand:
    """The paper's equations in float64, whose base update is torch's own."""

    def __init__(self, model, base, k=3, rho=0.05, alpha=0.7, max_grad_norm=None):
        self.model = copy.deepcopy(model).double()
        kwargs = dict(base)
        self.base = kwargs.pop("base_optimizer")(self.model.parameters(), **kwargs)
        self.k, self.rho, self.alpha, self.bound = k, rho, alpha, max_grad_norm
        self.t, self.v = 0, None

    def gradients(self, loss_fn):
        loss = loss_fn(self.model)
        return torch.autograd.grad(loss, list(self.model.parameters()))

    def step(self, loss_fn):
        params = list(self.model.parameters())
        g = self.gradients(loss_fn)
        n = flat(g).norm()
        if self.t % self.k == 0:
            before = [p.detach().clone() for p in params]
            with torch.no_grad():
                for p, x in zip(params, g, strict=True):
                    p.add_(self.rho * x / n)
            u = self.gradients(loss_fn)
            with torch.no_grad():
                for p, w in zip(params, before, strict=True):
                    p.copy_(w)
            cosine = flat(g) @ flat(u) / (n * flat(u).norm())
            self.v = [x - flat(u).norm() * cosine * y / n for x, y in zip(u, g, strict=True)]
        else:
            ratio = self.alpha * n / flat(self.v).norm()
            u = [x + ratio * y for x, y in zip(g, self.v, strict=True)]
        if self.bound is not None:
            u = [x * min(1.0, self.bound / (float(flat(u).norm()) + 1e-6)) for x in u]
        for p, x in zip(params, u, strict=True):
            p.grad = x
        self.base.step()
        self.t += 1


@pytest.mark.parametrize(
    ("base", "more", "backend"),
    [(SGD, {}, "reference"), (SGD, {"skip_nonfinite": True}, "torch"), (NADAM, {}, "torch"),
     (ADAMW, {"k": 2}, "torch"), (SGD, {"skip_nonfinite": True}, "triton"), (NADAM, {}, "triton"),
     (ADAMW, {"max_grad_norm": 0.2}, "triton"), (ADAMW, {"max_grad_norm": 0.2}, "reference")],
)  # fmt: skip
def test_against_float64(base, more, backend, record_property):
    """Two rounds of k steps and one more; v is a small difference, of 1e-3 of the gradients."""
    model, optimizer, loss_fn = problem(base, backend, rho=0.5, **more)
    given = {"k": 3} | {x: more[x] for x in more if x != "skip_nonfinite"}
    exact = ByHand(model, base, rho=0.5, **given)
    _, x, y = (cell.cell_contents for cell in loss_fn.__closure__)
    for _ in range(2 * given["k"] + 1):
        optimizer.step(closure_of(loss_fn))
        exact.step(lambda model: torch.nn.functional.cross_entropy(model(x.double()), y))
    pairs = list(zip(model.parameters(), exact.model.parameters(), strict=True))
    farthest = max(float((p.detach().double() - q.detach()).abs().max()) for p, q in pairs)
    record_property("farthest", farthest)
    assert farthest < 2e-6
    for p, v in zip(model.parameters(), exact.v, strict=True):
        torch.testing.assert_close(optimizer.state[p][STATE].double(), v, rtol=0, atol=2e-6)


@ON_EACH
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_by_hand(backend, sign):
    """g = (3, 0), g~ = (1, 2): v = (0, 2); then g = (4, 3), whose norm is 5."""
    params = [torch.nn.Parameter(torch.zeros(1, device=DEVICE)) for _ in range(2)]
    optimizer = fastsam.LookSAM(params, torch.optim.SGD, k=2, alpha=0.5, lr=1.0, backend=backend,
                                maximize=sign < 0)  # fmt: skip

    def give(*grads):
        for p, g in zip(params, grads, strict=True):
            p.grad = torch.full_like(p, sign * g)

    give(3.0, 0.0)
    optimizer.first_step()
    give(1.0, 2.0)
    optimizer.second_step()
    assert [p.item() for p in params] == [-1.0, -2.0]
    assert [optimizer.state[p][STATE].item() for p in params] == [0.0, sign * 2.0]
    give(4.0, 3.0)
    optimizer.plain_step()  # u = g + 0.5 * 5 / 2 * v
    assert [p.item() for p in params] == pytest.approx([-5.0, -7.5], rel=1e-6)
    assert float(optimizer.metrics["perturbed_grad_norm"]) == pytest.approx(5.0)


@ON_EACH
def test_where_nothing_is_kept_the_gradient_is_taken(backend):
    """Parallel gradients, a first one that is not finite, and a parameter without a first one."""
    params = [torch.nn.Parameter(torch.zeros(1, device=DEVICE)) for _ in range(2)]
    kwargs = {"k": 2, "lr": 1.0, "backend": backend}
    for first, second in (((3.0, 4.0), (6.0, 8.0)), ((float("inf"), 1.0), (1.0, 2.0))):
        optimizer = fastsam.LookSAM(params, torch.optim.SGD, **kwargs)
        for half, grads in ((optimizer.first_step, first), (optimizer.second_step, second)):
            for p, g in zip(params, grads, strict=True):
                p.grad = torch.full_like(p, g)
            half()
        assert [optimizer.state[p][STATE].item() for p in params] == [0.0, 0.0]
        with torch.no_grad():
            for p in params:
                p.zero_()
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.plain_step()
        assert [p.item() for p in params] == [-1.0, -1.0]
    optimizer = fastsam.LookSAM(params, torch.optim.SGD, **kwargs)
    params[0].grad, params[1].grad = torch.ones_like(params[0]), None
    optimizer.first_step()
    params[1].grad = torch.ones_like(params[0])
    optimizer.second_step()
    assert STATE in optimizer.state[params[0]] and STATE not in optimizer.state[params[1]]
    optimizer.plain_step()


@ON_EACH
def test_tensors_that_no_kernel_walks_in_place(backend):
    """Gaps, another order, another dtype of the gradient: what is kept is the same."""
    torch.manual_seed(0)
    start = torch.randn(6, 8, device=DEVICE)
    forms = [start.clone(), start.t().contiguous().t(), torch.zeros(6, 16, device=DEVICE)[:, ::2]]
    found = []
    for form in forms:
        param = torch.nn.Parameter(form)
        with torch.no_grad():
            param.copy_(start)
        optimizer = fastsam.LookSAM([param], **SGD, k=2, backend=backend)
        for _ in range(3):
            if optimizer.perturbs_next:
                param.grad = (start * param.detach()).clone(memory_format=torch.contiguous_format)
                optimizer.first_step(zero_grad=True)
                param.grad = (start * param.detach() ** 2).t().contiguous().t()
                optimizer.second_step()
            else:
                param.grad = start.clone()
                optimizer.plain_step()
        found.append((param.detach().clone(), optimizer.state[param][STATE]))
    for w, v in found[1:]:
        torch.testing.assert_close(w, found[0][0])
        torch.testing.assert_close(v, found[0][1])


def test_calls_and_schedules():
    model, optimizer, loss_fn = problem(k=3, start=1, stop=6)
    calls = []

    def closure():
        calls[-1] += 1
        return closure_of(loss_fn)()

    other, other_loss = model_and_data()
    kwargs = dict(SGD)
    base = kwargs.pop("base_optimizer")(other.parameters(), **kwargs, fused=True)
    for step in range(8):
        calls.append(0)
        if step == 6:
            with torch.no_grad():
                for p, q in zip(other.parameters(), model.parameters(), strict=True):
                    p.copy_(q)
                    base.state[p]["momentum_buffer"].copy_(optimizer.state[q]["momentum_buffer"])
        if step in (0, 6, 7):  # the base's alone
            base.zero_grad()
            other_loss().backward()
            base.step()
        optimizer.step(closure)
        if step in (0, 6, 7):
            assert same(bits(model), bits(other))
    assert calls == [1, 2, 1, 1, 2, 1, 1, 1]
    assert optimizer.k == optimizer.perturb_every == 3


@pytest.mark.parametrize("rho", [0.0, 0.05])
def test_the_base_and_sam_at_the_ends(rho):
    """rho = 0 is the base, k = 1 is SAM, bit for bit."""
    model, optimizer, loss_fn = problem(rho=rho, k=1 if rho else 3)
    other, other_loss = model_and_data()
    sam = fastsam.SAM(other.parameters(), **SGD, rho=rho, backend=optimizer.backend)
    for _ in range(4):
        optimizer.step(closure_of(loss_fn))
        sam.step(closure_of(other_loss))
        assert same(bits(model), bits(other))
    assert not any(STATE in state for state in optimizer.state.values())


def test_the_state_that_a_step_creates_is_created_beforehand():
    """As torch.distributed.checkpoint asks for it."""
    model, optimizer, _ = problem()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()
    assert all(STATE in optimizer.state[p] for p in model.parameters())


@pytest.mark.parametrize("base", [SGD, ADAMW], ids=["sgd", "adamw"])
@pytest.mark.parametrize("how", ["loaded", "pickled"])
def test_goes_on_bit_for_bit(base, how):
    model, optimizer, loss_fn = problem(base)
    for _ in range(5):
        optimizer.step(closure_of(loss_fn))
    if how == "pickled":
        other, resumed = pickle.loads(pickle.dumps((model, optimizer)))
    else:
        other = copy.deepcopy(model)
        resumed = fastsam.LookSAM(other.parameters(), **base, k=3, backend=optimizer.backend)
        resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    other_loss = loss_of(other)
    for _ in range(5):
        optimizer.step(closure_of(loss_fn))
        resumed.step(closure_of(other_loss))
        assert same(bits(model), bits(other))


@ON_EACH
def test_a_failure_leaves_everything(backend):
    model, optimizer, loss_fn = problem(backend=backend)
    for _ in range(3):
        optimizer.step(closure_of(loss_fn))
    before, state = bits(model), copy.deepcopy(optimizer.state_dict()["state"])
    calls = []

    def closure():
        calls.append(None)
        loss_fn().backward()
        if len(calls) > 1:
            raise KeyError("data")

    with pytest.raises(KeyError, match="data"):
        optimizer.step(closure)
    assert same(bits(model), before)
    torch.testing.assert_close(optimizer.state_dict()["state"], state, rtol=0, atol=0)


@ON_EACH
def test_loss_scales(backend):
    """A power of two changes no bit, and a step that overflows none of what was kept."""
    model, optimizer, loss_fn = problem(backend=backend)
    other, scaled, other_loss = problem(backend=backend)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**10, growth_interval=2)

    def closure(factor=1.0):
        loss = other_loss()
        scaler.scale(factor * loss).backward()
        return loss

    for _ in range(5):
        optimizer.step(closure_of(loss_fn))
        scaled.step(closure, grad_scaler=scaler)
        scaler.update()
        assert same(bits(model), bits(other))
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(optimizer.state[p][STATE], scaled.state[q][STATE])
    scaled.step(closure, grad_scaler=scaler)
    scaler.update()
    before, kept = bits(other), [scaled.state[p][STATE].clone() for p in other.parameters()]
    scaled.step(lambda: closure(float("inf")), grad_scaler=scaler)
    scaler.update()
    assert same(bits(other), before) and float(scaled.metrics["skipped"]) == 1
    assert same([scaled.state[p][STATE] for p in other.parameters()], kept)
    scaled.step(closure, grad_scaler=scaler)
    assert not same(bits(other), before)


@pytest.mark.filterwarnings("ignore:some parameters are float16 or bfloat16")
@ON_EACH
@pytest.mark.parametrize("more", [{}, {"master_weights": True}, {"rounding": "stochastic"}],
                         ids=["nearest", "masters", "stochastic"])  # fmt: skip
def test_bfloat16(backend, more):
    """What is kept has the gradient's dtype, and points where float32's does."""
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        model, loss_fn = model_and_data()
        model.to(dtype)
        kwargs = more if dtype is torch.bfloat16 else {}
        optimizer = fastsam.LookSAM(model.parameters(), **SGD, k=2, rho=2.0, backend=backend,
                                    **kwargs)  # fmt: skip
        _, x, y = (cell.cell_contents for cell in loss_fn.__closure__)
        x = x.to(dtype)

        def loss(model=model, x=x, y=y):
            return torch.nn.functional.cross_entropy(model(x).float(), y)

        for _ in range(2):
            optimizer.step(closure_of(loss))
        kept = [optimizer.state[p][STATE] for p in model.parameters()]
        assert {v.dtype for v in kept} == {dtype}
        found.append(flat(kept).float())
    cosine = torch.nn.functional.cosine_similarity(*found, dim=0)
    assert cosine > 0.98


@pytest.mark.parametrize(
    ("kwargs", "error", "match"),
    [
        ({"k": 0}, ValueError, "k must be an integer of at least 1, got 0"),
        ({"k": 2.5}, ValueError, "k must be an integer"),
        ({"base_optimizer": torch.optim.RMSprop, "lr": 0.1}, TypeError, "RMSprop has alpha"),
        ({"alpha": -1.0}, ValueError, "alpha must be at least 0 and finite, got -1"),
        ({"perturb_every": 2}, TypeError, "LookSAM takes no perturb_every; k is that"),
        ({"ascent_steps": 2}, ValueError, "ascent_steps must be 1 with LookSAM"),
        ({"amplify": True}, ValueError, "amplify must be False with LookSAM"),
    ],
)
def test_refused_by_name(kwargs, error, match):
    param = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(error, match=match):
        given = kwargs if "base_optimizer" in kwargs else SGD | kwargs
        fastsam.LookSAM([param], **given)


def test_alpha_is_one_for_all_groups():
    params = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    groups = [{"params": params[:1]}, {"params": params[1:], "alpha": 0.2}]
    with pytest.raises(ValueError, match=r"alpha must be that of the first group, 0\.7, got 0\.2"):
        fastsam.LookSAM(groups, **SGD)


@pytest.mark.parametrize("k", [1, 2])
def test_the_host_reads_nothing(k):
    """Neither of a step with a perturbation nor of one that reuses."""
    params = [torch.nn.Parameter(torch.ones(s, device=DEVICE)) for s in ((1030,), (3, 5), ())]
    optimizer = fastsam.LookSAM(params, **SGD, k=k, backend="triton", max_grad_norm=1.0)
    with Reads() as reads:
        for one_pass in (optimizer.first_step, optimizer.second_step, optimizer.plain_step):
            for p in params:
                p.grad = torch.ones_like(p)
            one_pass()
        optimizer.metrics  # noqa: B018
    assert reads.seen == []


def test_refused_later():
    _, optimizer, loss_fn = problem()
    closure = closure_of(loss_fn)
    with pytest.raises(RuntimeError, match="does not support perturbations by micro-batch"):
        optimizer.step_micro_batches([closure])
    with pytest.raises(RuntimeError, match="LETS does not support LookSAM"):
        fastsam.LETS(optimizer).step(closure, closure)
    other = fastsam.SAM(optimizer.param_groups[0]["params"], **SGD)
    optimizer.step(closure)
    with pytest.raises(ValueError, match="LookSAM"):
        other.load_state_dict(optimizer.state_dict())


@ON_EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("why", ["linear", "no radius"])
def test_nothing_is_reused_where_the_perturbation_changed_no_gradient(why, dtype, backend):
    """Both gradients are equal bit for bit then, and v is 0, and no rounding to be scaled up."""
    rho = 0.05 if why == "linear" else torch.tensor(0.0, device=DEVICE)
    for seed in range(5):
        torch.manual_seed(seed)
        new = partial(torch.zeros, dtype=dtype, device=DEVICE)
        params = [torch.nn.Parameter(new(7)), torch.nn.Parameter(new(50, 3))]
        slopes = [torch.randn_like(p) for p in params]
        optimizer = fastsam.LookSAM(params, torch.optim.SGD, rho=rho, k=2, lr=1.0, backend=backend)

        def closure(params=params, slopes=slopes):
            loss = sum((a * p).sum() for a, p in zip(slopes, params, strict=True))
            loss.backward()
            return loss

        optimizer.step(closure)
        before = [p.detach().clone() for p in params]
        optimizer.step(closure)
        for p, w, a in zip(params, before, slopes, strict=True):
            assert torch.equal(p, w - a)
