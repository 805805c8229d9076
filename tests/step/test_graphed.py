"""``fastsam.graphed``: a step behind one call is the step, and what a replay would miss is refused.

Without a GPU the capture is the stand-in of ``support/graphs.py``.
"""

import copy
import functools
import math
import os

import pytest
import torch

import fastsam
import fastsam.graphs
from fastsam.graphs import modules_of

from graphs import CASES, Recorder, batches, cpu_only, problem
from registry import DEVICE

WARMUP = 2
#: test_capture.py has replays of all methods; these differ in what they keep on the host.
SOME = ("SAM + SGD", "SAM + AdamW", "ASAM, clipped", "VaSSO", "SAMAR", "VaSSO, masters")
NAMES = CASES if os.environ.get("FASTSAM_EVERY_CASE", "0") != "0" else SOME


@pytest.fixture
def graphed(monkeypatch):
    """``fastsam.graphed``, on a CPU too."""

    def make(optimizer, closure, warmup=WARMUP, **kwargs):
        def tensors():
            yield from (p for group in optimizer.param_groups for p in group["params"])
            yield from (x for state in optimizer.state.values() for x in state.values())
            yield optimizer._passes.scalars.vector

        if DEVICE == "cpu":
            recorder = Recorder(tensors, monkeypatch)
            monkeypatch.setattr(fastsam.graphs, "Recorder", recorder)
        return fastsam.graphed(optimizer, closure, warmup, **kwargs)

    return make


def captured(graphed, name="SAM + AdamW", capturable=True):
    """A problem whose step has been captured."""
    model, optimizer, x, closure = problem(name, capturable)
    step = graphed(optimizer, closure)
    for batch in batches(WARMUP + 1):
        x.copy_(batch)
        step()
    assert step.is_captured
    return model, optimizer, x, step


def values_of(model, optimizer):
    """Everything that a step changes, as copies."""
    everything = [*model.parameters(), *(p.grad for p in model.parameters())]
    everything += [x for p in model.parameters() for x in optimizer.state[p].values()]
    everything += [x for x in optimizer.kept.values() if isinstance(x, torch.Tensor)]
    return [x.detach().clone() for x in everything], optimizer.kept["t"]


def assert_equal(found, expected):
    assert found[1] == expected[1]
    for x, y in zip(found[0], expected[0], strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)  # the same launches: the same bits


@pytest.mark.parametrize("name", NAMES)
def test_calls_are_steps(name, graphed):
    """From the first on, with values written between them, and with steps outside."""
    (model, optimizer, x, closure), (model_, optimizer_, x_, closure_) = map(problem, [name] * 2)
    step = graphed(optimizer, closure)
    for i, batch in enumerate(batches(8)):
        if i == 4:
            optimizer.zero_grad()  # the graph's gradients are there again afterwards
        if i == 5:
            for group in (optimizer.param_groups[0], optimizer_.param_groups[0]):
                group["lr"].fill_(0.01)
                group["rho"].fill_(0.7)
        x.copy_(batch)
        x_.copy_(batch)
        loss = optimizer.step(closure) if i == 6 else step()
        expected = optimizer_.step(closure_)
        assert step.is_captured == (i >= WARMUP)
        assert torch.equal(loss, expected)
        assert i == 6 or not loss.requires_grad
        assert_equal(values_of(model, optimizer), values_of(model_, optimizer_))
        for key, value in optimizer_.metrics.items():
            torch.testing.assert_close(optimizer.metrics[key], value, rtol=0, atol=0)


def test_a_fresh_momentum_buffer_with_dampening(graphed):
    """The first call starts the buffer from the gradient, whatever the dampening."""
    losses = []
    for wraps in (graphed, lambda optimizer, closure: lambda: optimizer.step(closure)):
        model, _, x, closure = problem("SAM + SGD")
        optimizer = fastsam.SAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9,
                                dampening=0.5, backend="triton")  # fmt: skip
        step = wraps(optimizer, closure)
        for batch in batches(5):
            x.copy_(batch)
            loss = step()
        losses.append(loss.detach().clone())
    assert torch.equal(*losses)


def test_schedulers_and_results_of_any_shape(graphed):
    model, optimizer, x, closure = problem("SAM + SGD")
    step = graphed(optimizer, lambda: {"loss": closure(), "more": [None, (x.sum(),)]})
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    for batch in batches(5):
        x.copy_(batch)
        result = step()
        scheduler.step()
        assert torch.equal(result["more"][1][0], x.sum()) and result["more"][0] is None
        assert math.isfinite(float(result["loss"]))
    torch.testing.assert_close(optimizer.param_groups[0]["lr"].cpu(), torch.tensor(0.1 * 0.5**5))


def test_memory_of_the_result_stays(graphed):
    model, optimizer, x, step = captured(graphed)
    x.copy_(batches(1)[0])
    first = step()
    address, value = first.data_ptr(), first.clone()
    x.mul_(2)
    assert step().data_ptr() == address and not torch.equal(first, value)
    grads = [p.grad for p in model.parameters()]
    optimizer.zero_grad()
    step()
    assert all(p.grad is grad for p, grad in zip(model.parameters(), grads, strict=True))


def test_without_gradients_set_to_none(graphed):
    (model, optimizer, x, closure), (model_, optimizer_, x_, closure_) = map(
        problem, ["SAM + SGD"] * 2
    )
    optimizer.set_to_none = optimizer_.set_to_none = False
    step = graphed(optimizer, closure)
    for i, batch in enumerate(batches(6)):
        x.copy_(batch)
        x_.copy_(batch)
        step()
        optimizer_.step(closure_)
        assert_equal(values_of(model, optimizer), values_of(model_, optimizer_))
        if i == 4:
            optimizer.zero_grad(set_to_none=True)


# --- what a replay would miss ----------------------------------------------------------------


def another_lr(optimizer, model):
    optimizer.param_groups[0]["lr"] = 0.5


def another_tensor(optimizer, model):
    optimizer.param_groups[0]["rho"] = torch.tensor(0.5, device=DEVICE)


def another_number(optimizer, model):
    optimizer.param_groups[0]["weight_decay"] = 0.125


def a_pair(optimizer, model):
    optimizer.param_groups[0]["betas"] = (0.5, 0.999)


def a_key_less(optimizer, model):
    del optimizer.param_groups[0]["eps"]


def a_group(optimizer, model):
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(3, device=DEVICE))]})


def another_parameter(optimizer, model):
    params = optimizer.param_groups[0]["params"]
    params[0] = torch.nn.Parameter(params[0].detach().clone())


def moved(optimizer, model):
    model[0].weight.data = model[0].weight.data.clone()


def frozen(optimizer, model):
    model[0].bias.requires_grad_(False)


def loaded(optimizer, model):
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def moved_state(optimizer, model):
    state = optimizer.state[model[0].weight]
    state["exp_avg"].data = state["exp_avg"].data.clone()


def less_state(optimizer, model):
    del optimizer.state[model[0].weight]


def clipped(optimizer, model):
    optimizer.max_grad_norm = 0.25


def scheduled(optimizer, model):
    optimizer.perturb_every = 2


def evaluating(optimizer, model):
    model.eval()


def scaled(optimizer, model):
    optimizer.grad_scale = torch.tensor(2.0, device=DEVICE)


def hooked(optimizer, model):
    optimizer.register_step_post_hook(lambda *args: None)


CHANGES = [
    (another_lr, "lr of group 0 was"),
    (another_tensor, "rho of group 0 has become another object.* Write to the tensor"),
    (another_number, r"weight_decay of group 0 was 0\.01 and has become 0\.125.*graphed again"),
    (a_pair, r"betas of group 0 was \(0\.9, 0\.999\) and has become \(0\.5, 0\.999\)"),
    (a_key_less, "eps of group 0 was removed"),
    (a_group, "other parameters or groups"),
    (another_parameter, "other parameters or groups"),
    (moved, "a parameter or its state has moved"),
    (frozen, "requires_grad of a parameter"),
    (loaded, "other tensors, as by load_state_dict"),
    (moved_state, "a parameter or its state has moved"),
    (less_state, "other tensors, as by load_state_dict"),
    (clipped, r"max_grad_norm was None and has become 0\.25"),
    (scheduled, "perturb_every was 1 and has become 2"),
    (evaluating, r"train\(\) or eval\(\) of a module"),
    (scaled, "grad_scale or found_inf"),
    (hooked, "a step hook was registered"),
]


@pytest.mark.parametrize("change, message", CHANGES, ids=lambda x: getattr(x, "__name__", ""))
def test_a_change_is_refused(change, message, graphed, monkeypatch):
    model, optimizer, x, step = captured(graphed)
    if change is another_lr:
        message = "lr of group 0 has become another object"
    change(optimizer, model)
    before = [p.detach().clone() for p in model.parameters()], optimizer.kept["t"]
    with pytest.raises(RuntimeError, match=f"SAM: .*{message}"):
        step()
    assert_equal(([p.detach() for p in model.parameters()], optimizer.kept["t"]), before)


def test_numbers_are_recorded(graphed):
    """Where learning rate and radius are numbers, or tensors that are not on the device."""
    model, optimizer, x, step = captured(graphed, capturable=False)
    optimizer.param_groups[0]["lr"] = 0.1  # an equal one is no change
    step()
    optimizer.param_groups[0]["lr"] = 0.05
    with pytest.raises(RuntimeError, match=r"lr of group 0 was 0\.1 and has become 0\.05"):
        step()
    if DEVICE == "cpu":  # where nothing else is a tensor on a CPU
        return
    optimizer.param_groups[0]["lr"] = torch.tensor(0.1)
    step = graphed(optimizer, lambda: model(x).square().mean().backward())
    for _ in range(WARMUP + 1):
        step()
    optimizer.param_groups[0]["lr"].fill_(0.05)
    with pytest.raises(RuntimeError, match="lr of group 0 was"):
        step()


def test_called_again_after_a_change(graphed):
    model, optimizer, x, step = captured(graphed)
    loaded(optimizer, model)
    again = graphed(optimizer, lambda: model(x).square().mean().backward())
    count = optimizer.kept["t"]
    for _ in range(5):
        again()
    assert optimizer.kept["t"] == count + 5
    with pytest.raises(RuntimeError, match="load_state_dict"):
        step()


def test_between_passes_and_inside_a_closure(graphed):
    model, optimizer, x, step = captured(graphed)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.first_step()
    with pytest.raises(RuntimeError, match="expected second_step"):
        step()
    optimizer.restore()
    with pytest.raises(RuntimeError, match="inside a closure"):
        optimizer.step(step)
    step()


# --- what cannot be captured -----------------------------------------------------------------


@pytest.mark.skipif(DEVICE != "cpu", reason="for machines without a GPU")
def test_a_cpu_is_refused():
    _, optimizer, x, closure = problem("SAM + SGD")
    with pytest.raises(RuntimeError, match="needs a GPU.*parameters of SAM are on cpu"):
        fastsam.graphed(optimizer, closure)


def test_arguments(graphed):
    _, optimizer, x, closure = problem("SAM + SGD")
    for given, error, match in [
        ((torch.optim.SGD([x], lr=0.1), closure), TypeError, "one of fastsam's, got SGD"),
        ((optimizer, 3), TypeError, "closure must be a function"),
        ((optimizer, None), RuntimeError, "needs a closure"),
        ((optimizer, closure, 1), ValueError, "warmup must be an integer of at least 2, got 1"),
        ((optimizer, closure, 2.5), ValueError, "warmup must be an integer of at least 2"),
    ]:
        with pytest.raises(error, match=match):
            graphed(*given)


def test_what_the_host_decides_is_refused_at_once(graphed):
    model, _, x, closure = problem("SAM + SGD")
    params, sgd = list(model.parameters()), torch.optim.SGD
    sam = functools.partial(fastsam.SAM, params, sgd, lr=0.1, backend="triton")
    hooked_one = sam()
    hooked(hooked_one, model)
    for optimizer, match in [
        (fastsam.UnifiedSAM(params, sgd, lam="1/t", lr=0.1, backend="triton"), "lam that changes"),
        (sam(perturb_every=2), "perturb_every"),
        (sam(stop=9), "start and stop"),
        (sam(repeat_random=True), "repeat_random"),
        (fastsam.SAM(params, torch.optim.RMSprop, skip_nonfinite=True, backend="triton"), "skip_"),
        (fastsam.LETS(sam()), "counts its steps on the host"),
        (hooked_one, "step hooks"),
    ]:
        with pytest.raises(RuntimeError, match=f"cannot be captured.*{match}"):
            graphed(optimizer, closure)


def failing(optimizer, step, match, error=RuntimeError):
    """A capture that fails leaves everything as it was, and the optimizer able to go on."""
    params = optimizer.param_groups[0]["params"]
    grads = [p.grad for p in params]
    before = [p.detach().clone() for p in params], optimizer.kept["t"]
    state = [dict(optimizer.state[p]) for p in params]
    for _ in range(2):
        with pytest.raises(error, match=match):
            step()
        assert not step.is_captured
        assert_equal(([p.detach() for p in params], optimizer.kept["t"]), before)
        assert all(p.grad is grad for p, grad in zip(params, grads, strict=True))
        for p, held in zip(params, state, strict=True):
            assert all(optimizer.state[p][key] is x for key, x in held.items())


@pytest.mark.parametrize("fails_in", [1, 2])
def test_a_closure_that_fails_in_the_capture(fails_in, graphed):
    """In the first pass or in the second. Steps outside go on as if nothing had been tried."""
    (model, optimizer, x, closure), (model_, optimizer_, x_, closure_) = map(problem, ["VaSSO"] * 2)
    passes = []

    def fails():
        passes.append(None)
        if len(passes) > 2 * WARMUP and len(passes) % 2 == fails_in % 2:
            raise ArithmeticError("odd")
        return closure()

    step = graphed(optimizer, fails)
    data = batches(6)
    for batch in data[:WARMUP]:
        x.copy_(batch)
        x_.copy_(batch)
        step()
        optimizer_.step(closure_)
    with pytest.raises(RuntimeError, match="VaSSO cannot be captured.*ArithmeticError: odd"):
        step()
    for batch in data[WARMUP:]:
        x.copy_(batch)
        x_.copy_(batch)
        optimizer.step(closure)
        optimizer_.step(closure_)
        assert_equal(values_of(model, optimizer), values_of(model_, optimizer_))


def test_a_result_that_no_replay_renews(graphed):
    model, optimizer, x, closure = problem("SAM + SGD")
    step = graphed(optimizer, lambda: (closure(), 3))
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match="closure must return tensors.*got tuple"):
        step()
    assert all(map(torch.equal, model.parameters(), before)) and optimizer.kept["t"] == 1


class Counting(torch.optim.Optimizer):
    """A base whose step changes what ``keep`` says, on the host."""

    def __init__(self, params, lr=0.1, keep="group"):
        super().__init__(params, {"lr": lr, "k": 0})
        self.keep = keep

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["k"] += self.keep == "group"
            for p in group["params"]:
                if self.keep == "number":
                    self.state[p]["count"] = self.state[p].get("count", 0) + 1
                if self.keep == "tensor":
                    self.state[p]["mean"] = self.state[p].get("mean", 0) + p.grad
                p.sub_(p.grad * group["lr"])


@pytest.mark.parametrize("keep, match", [
    ("group", "k of group 0 was 2 and has become 3 on the host during the step"),
    ("number", "Counting keeps 2 in its state, which is on the host"),
    ("tensor", "the state has got other tensors"),
])  # fmt: skip
def test_bases_that_count_on_the_host(keep, match, graphed):
    model, _, x, closure = problem("SAM + SGD")
    optimizer = fastsam.SAM(model.parameters(), Counting, lr=0.1, keep=keep, backend="triton")
    step = graphed(optimizer, closure)
    for batch in batches(WARMUP):
        x.copy_(batch)
        step()
    failing(optimizer, step, f"SAM cannot be captured.*{match}")
    assert optimizer.param_groups[0]["k"] == (WARMUP if keep == "group" else 0)


@pytest.mark.gpu
def test_a_closure_that_waits_for_the_gpu():
    model, optimizer, x, closure = problem("SAM + AdamW")
    step = fastsam.graphed(optimizer, lambda: closure() * closure().item())
    stream = torch.cuda.current_stream()
    for batch in batches(3):
        x.copy_(batch)
        step()
    failing(optimizer, step, "cannot be captured")
    assert torch.cuda.current_stream() == stream
    optimizer.step(closure)


@cpu_only
def test_modules_of_a_closure():
    class Method:
        def __init__(self):
            self.model = model

        def closure(self):
            return self.model

    model, other = torch.nn.Sequential(torch.nn.Linear(2, 2)), torch.nn.Linear(1, 1)
    everything = [model, model[0]]
    assert modules_of(lambda: model(1)) == everything
    assert modules_of(functools.partial(lambda a, b: a, model, b=other)) == [*everything, other]
    assert modules_of(model.forward) == modules_of(model) == everything
    assert modules_of(Method().closure) == [] and modules_of(len) == []

    def unset():
        return later

    assert modules_of(unset) == []
    later = model
    assert modules_of(unset) == [later, model[0]]
