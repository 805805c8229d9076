"""Equal random numbers in the passes of a step, and where the generators stand afterwards."""

import contextlib
import copy
import functools

import pytest
import torch

import fastsam

from networks import bits, same
from registry import DEVICE, create

SGD = {"base_optimizer": torch.optim.SGD, "lr": 0.1}
SAM = functools.partial(fastsam.SAM, rho=0.3, **SGD)


def network():
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(6, 32), torch.nn.Dropout(0.5), torch.nn.Linear(32, 2)
    ).to(DEVICE)
    x = torch.randn(9, 6, device=DEVICE)
    return model, x


def states():
    """Where the generators stand."""
    found = [torch.get_rng_state()]
    if DEVICE == "cuda":
        found.append(torch.cuda.get_rng_state())
    return found


def noting(model, x, seen):
    """A closure that draws, and puts down what it drew."""

    def closure():
        mask = torch.rand(4)
        noise = torch.rand(4, device=DEVICE)
        seen.append(torch.cat([mask, noise.cpu()]))
        loss = (model(x) + noise.sum()).square().mean()
        loss.backward()
        return loss

    return closure


def reference(model, x, closure_of, seed):
    """SAM on SGD by hand, seeding before each pass."""
    params = list(model.parameters())

    def gradient():
        torch.manual_seed(seed)
        loss = closure_of()
        return torch.autograd.grad(loss, params)

    grads = gradient()
    norm = torch.sqrt(sum(g.double().square().sum() for g in grads))
    with torch.no_grad():
        for p, g in zip(params, grads, strict=True):
            p += (0.3 * g.double() / norm).to(p)
    second = gradient()
    with torch.no_grad():
        for p, g, h in zip(params, grads, second, strict=True):
            p -= (0.3 * g.double() / norm).to(p) + 0.1 * h


def test_both_calls_draw_the_same():
    model, x = network()
    twin, hand = copy.deepcopy(model), copy.deepcopy(model)
    seen: list = []
    torch.manual_seed(5)
    SAM(model.parameters(), repeat_random=True).step(noting(model, x, seen))
    assert torch.equal(seen[0], seen[1])
    after = states()
    # one call alone leaves the generators there
    torch.manual_seed(5)
    noting(twin, x, [])()
    assert same(states(), after)

    def loss():
        torch.rand(4)
        noise = torch.rand(4, device=DEVICE)
        return (hand(x) + noise.sum()).square().mean()

    reference(hand, x, loss, 5)
    for p, q in zip(model.parameters(), hand.parameters(), strict=True):
        torch.testing.assert_close(p, q)
    seen.clear()
    SAM(twin.parameters()).step(noting(twin, x, seen))
    assert not torch.equal(seen[0], seen[1])  # new ones by default


@pytest.mark.parametrize("method", ["asam", "samar", "vasso", "lightsam-3", "adasam", "ssam"])
def test_every_class_takes_it(method):
    model, x = network()
    optimizer = create(method, model.parameters(), "torch", repeat_random=True)
    seen: list = []
    optimizer.step(noting(model, x, seen))
    assert optimizer.repeat_random and torch.equal(seen[0], seen[1])


def test_steps_draw_on():
    """One step does not repeat another, and a step of the base alone draws as it would."""
    model, x = network()
    optimizer, seen = SAM(model.parameters(), repeat_random=True, perturb_every=2), []
    torch.manual_seed(1)
    for _ in range(3):
        optimizer.step(noting(model, x, seen))
    torch.manual_seed(1)
    drawn: list = []
    for _ in range(3):
        noting(model, x, drawn)()
    assert same(seen, [drawn[i] for i in (0, 0, 1, 2, 2)])


def test_micro_batches_repeat_each_its_own():
    model, x = network()
    optimizer, seen = SAM(model.parameters(), repeat_random=True), []
    optimizer.step_micro_batches([noting(model, x, seen)] * 2)
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[2], seen[3])
    assert not torch.equal(seen[0], seen[2])


def test_lets_draws_on_after_the_step():
    model, x = network()
    lets = fastsam.LETS(SAM(model.parameters(), repeat_random=True))
    seen: list = []
    closure = noting(model, x, seen)
    lets.step(closure, closure)
    assert torch.equal(seen[0], seen[1])
    assert len({tuple(x.tolist()) for x in seen}) == 3


def test_what_a_context_draws_is_none_of_it():
    model, x = network()

    @contextlib.contextmanager
    def drawing():
        torch.rand(7)
        yield

    seen: list = []
    optimizer = SAM(model.parameters(), repeat_random=True, descent_context=drawing)
    optimizer.step(noting(model, x, seen))
    assert torch.equal(seen[0], seen[1])


@pytest.mark.parametrize("fails", [0, 1])
def test_failures_leave_the_generators_after_the_first_call(fails):
    model, x = network()
    seen: list = []
    optimizer = SAM(model.parameters(), repeat_random=True)

    def failing():
        good = noting(model, x, seen)()
        if len(seen) == fails + 1:
            torch.rand(100)
            raise KeyError("no")
        return good

    before = bits(model)
    torch.manual_seed(3)
    with pytest.raises(KeyError):
        optimizer.step(failing)
    found = states()
    torch.manual_seed(3)
    noting(copy.deepcopy(model), x, [])()
    if not fails:
        torch.rand(100)
    assert same(states(), found) and same(bits(model), before)


def test_explicit_halves():
    model, x = network()
    twin = copy.deepcopy(model)
    torch.manual_seed(5)
    SAM(model.parameters(), repeat_random=True).step(noting(model, x, []))
    after = states()
    torch.manual_seed(5)
    optimizer = SAM(twin.parameters())
    closure = noting(twin, x, [])
    with optimizer.repeated_random():
        closure()
    optimizer.first_step(zero_grad=True)
    with optimizer.repeated_random():
        closure()
    optimizer.second_step(zero_grad=True)
    assert same(bits(model), bits(twin)) and same(states(), after)


def test_explicit_halves_in_the_wrong_order():
    model, x = network()
    optimizer, closure = SAM(model.parameters()), noting(model, x, [])

    def half(block):
        with optimizer.repeated_random() if block else contextlib.nullcontext():
            closure()

    half(True)
    optimizer.first_step(zero_grad=True)
    half(True)
    with pytest.raises(RuntimeError, match="once in every pass, around all of its micro-batches"):
        half(True)
    optimizer.second_step(zero_grad=True)
    half(False)  # what was noted belongs to the step before
    optimizer.first_step(zero_grad=True)
    with pytest.raises(RuntimeError, match=r"repeated_random\(\) has to be around the first pass"):
        half(True)
    optimizer.restore()


def test_only_the_devices_of_parameters(monkeypatch):
    """CUDA is not asked for anything where no parameter is there."""

    def refuse(*args, **kwargs):
        raise AssertionError("CUDA was asked")

    for name in ("get_rng_state", "set_rng_state", "init", "_lazy_init", "current_device"):
        monkeypatch.setattr(torch.cuda, name, refuse)
    model = torch.nn.Linear(3, 1, device="cpu")
    x = torch.ones(2, 3, device="cpu")
    optimizer = SAM(model.parameters(), repeat_random=True, backend="torch")

    def closure():
        loss = (model(x) * torch.rand(2, 1, device="cpu")).sum()
        loss.backward()
        return loss

    optimizer.step(closure)


@pytest.mark.parametrize("value", ["False", 1, None])
def test_it_is_a_switch(value):
    with pytest.raises(ValueError, match="repeat_random must be True or False"):
        SAM(network()[0].parameters(), repeat_random=value)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
def test_capture_is_refused():
    model, x = network()
    optimizer = SAM(model.parameters(), repeat_random=True)
    closure = noting(model, x, [])

    def quiet():
        loss = model(x).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="repeat_random"), torch.cuda.graph(graph):
        optimizer.step(quiet)
