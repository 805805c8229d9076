"""``torch.compile`` around the model, the optimizer's calls, or the loop that makes them."""

import copy

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

import fastsam

from networks import bits, closure_of, same
from registry import DEVICE, METHODS, create

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    # the compiler looks at the loss that a step returned
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]
#: Weights of 16,900 elements: on a CPU the torch backend moves these to other memory to perturb.
WIDTH = 130


@pytest.fixture(autouse=True)
def fresh():
    torch.compiler.reset()
    yield
    torch.compiler.set_stance("default")
    torch.compiler.reset()


def network(width=WIDTH):
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(width, width), torch.nn.Tanh(), torch.nn.Linear(width, 3)
    ).to(DEVICE)
    x, y = torch.randn(6, width, device=DEVICE), torch.randint(3, (6,), device=DEVICE)
    return model, lambda net: torch.nn.functional.cross_entropy(net(x), y)


def sam(model, backend="torch", **kwargs):
    defaults = {"base_optimizer": torch.optim.SGD, "rho": 1.0, "lr": 0.2, "momentum": 0.9}
    return fastsam.SAM(model.parameters(), backend=backend, **defaults | kwargs)


class Frames(CompileCounterWithBackend):
    """A compiler that counts, and from now on refuses to compile anything more."""

    def enough(self):
        torch.compiler.set_stance("fail_on_recompile")


def check_close(model, twin):
    """Compilers may take sums in another order; these do not, or hardly."""
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


# --- compiled models ------------------------------------------------------------------------------


def by_closure(optimizer, loss):
    optimizer.step(closure_of(loss))


def by_passes(optimizer, loss):
    optimizer.zero_grad()
    loss().backward()
    if not optimizer.perturbs_next:
        optimizer.plain_step()
        return
    optimizer.first_step(zero_grad=True)
    loss().backward()
    optimizer.second_step()


def by_micro_batches(optimizer, loss):
    optimizer.step_micro_batches([closure_of(loss)] * 2)


@pytest.mark.parametrize(
    ("backend", "step", "options", "compiler"),
    [("torch", by_closure, {}, "eager"), ("torch", by_closure, {}, "aot_eager"),
     ("torch", by_passes, {"perturb_every": 2}, "aot_eager"),
     ("torch", by_micro_batches, {}, "aot_eager"),
     ("torch", by_closure, {"max_grad_norm": 0.1, "renormalize": True}, "eager"),
     ("torch", by_closure, {"base_optimizer": torch.optim.RMSprop, "lr": 0.001}, "eager"),
     ("reference", by_closure, {}, "aot_eager"),
     ("reference", by_passes, {"perturb_every": 3, "stop": 3}, "eager"),
     ("triton", by_closure, {}, "aot_eager"),
     ("triton", by_closure, {"scratch": True}, "aot_eager")],
)  # fmt: skip
def test_compiled_models(backend, step, options, compiler):
    """Compiled once, though the weights change between the passes, and in some where they are."""
    results = []
    for compiles in (False, True):
        model, loss_of = network()
        frames = Frames(compiler)
        net = torch.compile(model, backend=frames, fullgraph=True) if compiles else model
        optimizer, losses, places = sam(model, backend, **options), [], set()

        def loss(net=net, model=model, losses=losses, places=places, loss_of=loss_of):
            places.add(model[0].weight.data_ptr())
            losses.append(loss_of(net))
            return losses[-1]

        for k in range(3):
            step(optimizer, loss)
            if k == 0:
                frames.enough()
        torch.compiler.set_stance("default")
        assert not compiles or frames.frame_count == 1
        in_place = backend != "torch" or "base_optimizer" in options or DEVICE != "cpu"
        assert (len(places) == 1) == (in_place and "scratch" not in options)
        results.append((model, torch.stack(losses).detach()))
    check_close(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-6, atol=1e-6)
    assert results[0][1].unique().numel() > 3  # of both passes, at different weights


@pytest.mark.parametrize("method", METHODS)
def test_every_method(method):
    """Small weights, which stay where they are."""
    model, loss_of = network(width=7)
    twin, frames = copy.deepcopy(model), Frames("eager")
    net = torch.compile(model, backend=frames)
    optimizer, other = (create(method, m.parameters(), "torch", "adamw") for m in (model, twin))
    for _ in range(3):
        optimizer.step(closure_of(lambda: loss_of(net)))
        other.step(closure_of(lambda: loss_of(twin)))
        frames.enough()
    assert frames.frame_count == 1
    check_close(model, twin)


def test_sixteen_bits_and_a_learned_radius():
    for options in ({"master_weights": True}, {"rounding": "stochastic"}, {}):
        results = []
        for compiles in (False, True):
            torch.compiler.set_stance("default")
            model, _ = network()
            model.to(torch.bfloat16 if options else torch.float32)
            x = torch.ones(2, WIDTH, device=DEVICE, dtype=model[0].weight.dtype)
            frames = Frames("aot_eager")
            net = torch.compile(model, backend=frames) if compiles else model
            optimizer = sam(model, **options)
            closure = closure_of(lambda net=net, x=x: net(x).float().square().mean())
            if options:
                for _ in range(3):
                    optimizer.step(closure)
                    frames.enough()
            else:
                lets = fastsam.LETS(optimizer)
                for _ in range(3):
                    lets.step(closure, closure)
                    frames.enough()
            results.append(model)
            assert not compiles or frames.frame_count == 1
        check_close(*results)


def test_failing_closure_is_undone():
    """While the weights are elsewhere; the model goes on without another compilation."""
    model, loss_of = network()
    frames, optimizer = Frames("aot_eager"), sam(model)
    net = torch.compile(model, backend=frames)
    optimizer.step(closure_of(lambda: loss_of(net)))
    before, calls = bits(model), []

    def failing():
        calls.append(1)
        loss_of(net).backward()
        if len(calls) == 2:
            assert not same(bits(model), before)
            raise KeyError("no")

    frames.enough()
    with pytest.raises(KeyError):
        optimizer.step(failing)
    assert same(bits(model), before)
    torch.testing.assert_close(loss_of(net), loss_of(model))
    optimizer.step(closure_of(lambda: loss_of(net)))
    assert frames.frame_count == 1


def test_names_are_those_of_the_model_itself():
    """Checkpoints of a compiled model and of its original are the same."""
    model, loss_of = network()
    net = torch.compile(model, backend="eager")
    optimizer = sam(net)
    optimizer.step(closure_of(lambda: loss_of(net)))
    saved = get_optimizer_state_dict(net, optimizer)
    assert saved["param_groups"][0]["params"] == [name for name, _ in model.named_parameters()]
    plain = get_optimizer_state_dict(model, optimizer)
    assert saved["state"].keys() == plain["state"].keys()


# --- compiled optimizers and loops ----------------------------------------------------------------


def compiled_step(model, optimizer, loss_of, compile_):
    step = compile_(optimizer.step)
    return lambda: step(closure_of(lambda: loss_of(model)))


def compiled_passes(model, optimizer, loss_of, compile_):
    first, second = compile_(optimizer.first_step), compile_(optimizer.second_step)
    plain = compile_(optimizer.plain_step)

    def train():
        optimizer.zero_grad()
        loss_of(model).backward()
        if not optimizer.perturbs_next:
            return plain()
        first(zero_grad=True)
        loss_of(model).backward()
        second()

    return train


def compiled_loop(model, optimizer, loss_of, compile_):
    """The whole step of a user's training function, with some arithmetic around it."""

    def train():
        def closure():
            loss = loss_of(model)
            loss.backward()
            return loss

        scale = torch.ones(3, device=DEVICE) * 2
        return optimizer.step(closure) * scale.sum()

    return compile_(train)


def compiled_loop_of_passes(model, optimizer, loss_of, compile_):
    def train():
        optimizer.zero_grad()
        loss_of(model).backward()
        if optimizer.perturbs_next:
            optimizer.first_step(zero_grad=True)
            loss_of(model).backward()
            optimizer.second_step()
        else:
            optimizer.plain_step()

    return compile_(train)


def compiled_micro_batches(model, optimizer, loss_of, compile_):
    step = compile_(optimizer.step_micro_batches)
    return lambda: step([closure_of(lambda: loss_of(model))] * 2)


WAYS = [compiled_step, compiled_passes, compiled_loop, compiled_loop_of_passes,
        compiled_micro_batches]  # fmt: skip


def train(way, compiler, backend, scheduled, steps=6, **kwargs):
    """Steps with another learning rate and radius each, compiled in the first two of each kind."""
    model, loss_of = network()
    frames = Frames(compiler or "eager")
    optimizer = sam(model, backend, **kwargs)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9) if scheduled else None
    step = way(model, optimizer, loss_of,
               lambda f: torch.compile(f, backend=frames) if compiler else f)  # fmt: skip
    counts = []
    for k in range(steps):
        step()
        counts.append(frames.frame_count)
        if scheduler is not None:
            scheduler.step()
            optimizer.param_groups[0]["rho"] *= 0.9
        if k == 3 and compiler:
            frames.enough()
    torch.compiler.set_stance("default")
    return model, counts


@pytest.mark.parametrize(("compiler", "scheduled"), [("eager", False), ("aot_eager", True)])
@pytest.mark.parametrize("way", WAYS)
def test_compiled_optimizers(way, scheduled, compiler):
    """The step is a graph break; what is around it is compiled, and not anew in every step."""
    kwargs = {"perturb_every": 2} if scheduled and way is not compiled_micro_batches else {}
    expected, _ = train(way, None, "torch", scheduled, **kwargs)
    model, counts = train(way, compiler, "torch", scheduled, **kwargs)
    check_close(model, expected)
    assert counts[3] == counts[-1]


def test_compiled_optimizers_of_the_triton_backend():
    expected, _ = train(compiled_loop, None, "triton", True, steps=4)
    model, _ = train(compiled_loop, "eager", "triton", True, steps=4)
    check_close(model, expected)


@pytest.mark.parametrize("name", ["step", "step_micro_batches", "LETS"])
def test_the_library_itself_is_not_compiled(name):
    """It would take seconds, for code that launches a few operators."""
    model, loss_of = network(width=7)
    frames, optimizer = Frames("eager"), sam(model)
    closure = closure_of(lambda: loss_of(model))
    lets = fastsam.LETS(optimizer)
    calls = {
        "step": (optimizer.step, closure),
        "step_micro_batches": (optimizer.step_micro_batches, [closure] * 2),
        "LETS": (lets.step, closure, closure),
    }
    function, *given = calls[name]
    step = torch.compile(function, backend=frames)
    for _ in range(2):
        step(*given)
    assert frames.frame_count == 0


@pytest.mark.parametrize("way", ["step", "loop"])
def test_compiled_learning_of_the_radius(way):
    results = []
    for compiles in (False, True):
        model, loss_of = network(width=7)
        frames = Frames("eager")
        lets = fastsam.LETS(sam(model), rho_lr=0.1, interval=2)
        closure = closure_of(lambda model=model, loss_of=loss_of: loss_of(model))

        def loop(closure=closure, lets=lets):
            return lets.step(closure, closure) * torch.ones(3, device=DEVICE).sum()

        step = (lambda closure=closure, lets=lets: lets.step(closure, closure),
                loop)[way == "loop"]  # fmt: skip
        if compiles:
            step = torch.compile(step, backend=frames)
        for k in range(8):
            step()
            if compiles and k == 5:
                frames.enough()
        torch.compiler.set_stance("default")
        results.append((model, lets.metrics["rho"]))
    check_close(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-6, atol=0)
