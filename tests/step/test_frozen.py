"""Momentum encoders, averages and queues that forward updates, kept out of the second pass."""

import contextlib
import copy
import pickle

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fastsam
from fastsam import frozen_batch_norm, frozen_updates

from networks import same
from registry import DEVICE, create

SGD = {"base_optimizer": torch.optim.SGD, "lr": 0.1}
BACKENDS = ("reference", "torch")


class Contrastive(nn.Module):
    """As MoCo: an encoder, one that follows it, and a queue of its keys with a pointer."""

    def __init__(self, how):
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4))
        self.follower = copy.deepcopy(self.encoder).requires_grad_(False)
        self.register_buffer("queue", torch.randn(12, 4))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.long))
        self.how = how

    @torch.no_grad()
    def follow(self):
        pairs = zip(self.follower.parameters(), self.encoder.parameters(), strict=True)
        for slow, fast in pairs:
            if self.how == "in place":
                slow.mul_(0.9).add_(fast, alpha=0.1)
            else:  # as MoCo's authors write it
                slow.data = slow.data * 0.9 + fast.data * 0.1

    def forward(self, x):
        self.follow()
        with torch.no_grad():
            keys = self.follower(x + 0.1)
        loss = (self.encoder(x) - keys).square().mean() - (
            self.encoder(x) @ self.queue.clone().T
        ).mean()
        with torch.no_grad():
            start = int(self.pointer)
            self.queue[start : start + 3] = keys
            self.pointer.fill_((start + 3) % 12)
        return loss


def frozen_of(model):
    return frozen_updates(model.follower, model.queue, model.pointer)


def values(model):
    return [x.detach().clone() for x in model.state_dict().values()]


def closure_of(model):
    x = torch.linspace(-1, 1, 15, device=DEVICE).reshape(3, 5)

    def closure():
        loss = model(x)
        loss.backward()
        return loss

    return closure


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("how", ["in place", "replaced"])
def test_followers_see_one_pass(how, backend):
    """Several steps leave them as one pass each has, which is counted by hand."""
    model = Contrastive(how).to(DEVICE)
    optimizer = create("sam", model.encoder.parameters(), backend, "sgd", rho=0.5,
                       descent_context=frozen_of(model))  # fmt: skip
    addresses = [x.data_ptr() for x in (model.queue, model.pointer)]
    for t in range(1, 4):
        slow = [p.detach().double().clone() for p in model.follower.parameters()]
        fast = [p.detach().double().clone() for p in model.encoder.parameters()]
        optimizer.step(closure_of(model))
        for p, s, f in zip(model.follower.parameters(), slow, fast, strict=True):
            torch.testing.assert_close(p.double(), 0.9 * s + 0.1 * f, rtol=1e-6, atol=1e-7)
        assert int(model.pointer) == 3 * t % 12
        assert int(model.follower[1].num_batches_tracked) == t
        assert int(model.encoder[1].num_batches_tracked) == 3 * t + t  # twice, in either pass
    assert addresses == [x.data_ptr() for x in (model.queue, model.pointer)]


def test_by_default_they_see_two():
    model = Contrastive("in place").to(DEVICE)
    fastsam.SAM(model.encoder.parameters(), **SGD).step(closure_of(model))
    assert int(model.pointer) == 6


@pytest.mark.parametrize("fails", [False, True])
def test_averaged_model(fails):
    """torch's averages of weights, updated inside forward, with a count and buffers."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4)).to(DEVICE)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    averaged.update_parameters(model)  # whose first call copies
    frozen = frozen_updates(averaged)
    optimizer = fastsam.SAM(model.parameters(), rho=0.5, descent_context=lambda: frozen, **SGD)
    expected = copy.deepcopy(averaged)
    expected.update_parameters(model)
    calls = []

    def closure():
        calls.append(averaged.update_parameters(model))
        loss = model(torch.ones(3, 5, device=DEVICE).cumsum(0)).square().mean()
        loss.backward()
        if fails and len(calls) == 2:
            raise KeyError

    with pytest.raises(KeyError) if fails else contextlib.nullcontext():
        optimizer.step(closure)
    assert len(calls) == 2 and int(averaged.n_averaged) == 2
    for (name, x), y in zip(averaged.state_dict().items(), expected.state_dict().values(),
                            strict=True):  # fmt: skip
        assert torch.equal(x, y), name


def test_two_contexts():
    model = Contrastive("replaced").to(DEVICE)

    @contextlib.contextmanager
    def second_pass():
        with frozen_batch_norm(model.encoder), frozen_of(model):
            yield

    optimizer = fastsam.SAM(model.encoder.parameters(), descent_context=second_pass, **SGD)
    twin = copy.deepcopy(model)
    closure_of(twin)()
    optimizer.step(closure_of(model))
    trained = {f"encoder.{name}" for name, _ in model.encoder.named_parameters()}
    for (name, x), y in zip(model.state_dict().items(), twin.state_dict().values(), strict=True):
        assert torch.equal(x, y) or name in trained, name


def test_explicit_halves_and_nesting():
    model = Contrastive("in place").to(DEVICE)
    frozen, closure = frozen_of(model), closure_of(model)
    optimizer = fastsam.SAM(model.encoder.parameters(), **SGD)
    closure()
    optimizer.first_step(zero_grad=True)
    after = [x.clone() for x in (*model.follower.state_dict().values(), model.queue)]
    with frozen:
        closure()
        with frozen:
            inner = values(model.follower)
            closure()
        assert same(values(model.follower), inner)
    optimizer.second_step()
    assert same([*model.follower.state_dict().values(), model.queue], after)


def test_replaced_and_moved():
    """A tensor replaced in its module is put back; one of another dtype takes the value."""
    model = nn.Linear(3, 2).to(DEVICE)
    model.register_buffer("held", torch.ones(2, device=DEVICE))
    weight, held, before = model.weight, model.held, values(model)
    with frozen_updates(model):
        model.weight = nn.Parameter(torch.zeros_like(weight))
        model.held = torch.zeros_like(held)
    assert model.weight is weight and model.held is held and same(values(model), before)
    with frozen_updates(model):
        model.double()
        with torch.no_grad():
            model.weight.zero_()
    assert model.weight.dtype == model.held.dtype == torch.float64
    assert torch.equal(model.weight.float(), before[0])


def test_backward_after_the_block():
    """What no graph has read may be put back without autograd's hearing of it."""
    model = Contrastive("in place").to(DEVICE)
    x = torch.ones(3, 5, device=DEVICE).cumsum(0)
    with frozen_updates(model.follower):
        loss = (model.encoder(x) - model.follower(x)).square().sum()
    loss.backward()


@pytest.mark.parametrize("followers", [(), ("model",), (nn.Linear(1, 1).parameters(),)])
def test_bad_followers(followers):
    with pytest.raises(TypeError, match="followers must be"):
        frozen_updates(*followers)


def test_copies():
    frozen = frozen_updates(nn.Linear(2, 1), torch.ones(3))
    twin = pickle.loads(pickle.dumps(frozen))
    assert repr(twin) == repr(frozen) == "frozen_updates(Linear, tensor of shape (3,))"
    with twin:
        twin.followers[1].zero_()
    assert torch.equal(twin.followers[1], torch.ones(3))
