"""The unperturbed weights in the middle of a step, and the perturbed ones again, bit for bit."""

import copy
import io

import pytest
import torch

import fastsam

from networks import bits, closure_of, loss_of, model_and_data, same
from registry import BACKENDS, DEVICE, create

SHAPES = [(33, 7), (5,), (), (0,)]
#: On a CPU the torch backend points a parameter of this size at scratch memory.
LARGE = (130, 130)


def parameters(backend, dtype=torch.float32):
    torch.manual_seed(0)
    shapes = [LARGE if backend == "torch" else (9, 13), *SHAPES]
    params = [torch.nn.Parameter(torch.randn(s, device=DEVICE).to(dtype)) for s in shapes]
    wide = torch.randn(6, 8, device=DEVICE).to(dtype)
    params.append(torch.nn.Parameter(wide[:, ::2]))  # with gaps
    params.append(torch.nn.Parameter(wide.t().contiguous().t()))
    return params


def give(params, seed):
    torch.manual_seed(seed)
    for p in params:
        p.grad = torch.randn_like(p)


def raw(params):
    """Their bits, which tell -0 from 0."""
    return [p.detach().clone().reshape(-1).view(torch.uint8) for p in params]


def half_way(params, method, backend, **kwargs):
    optimizer = create(method, params, backend, **kwargs)
    give(params, 1)
    optimizer.first_step(zero_grad=True)
    give(params, 2)
    optimizer.second_step(zero_grad=True)  # state is there from here on
    before = raw(params)
    give(params, 3)
    optimizer.first_step(zero_grad=True)
    return optimizer, before


MODES = [
    ("sam", torch.float32, {}),
    ("samar-all", torch.float32, {}),
    ("lightsam-2", torch.float32, {}),
    ("sam", torch.bfloat16, {"master_weights": True}),
    ("vasso", torch.bfloat16, {"rounding": "stochastic"}),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("method", "dtype", "kwargs"), MODES)
def test_swaps_and_swaps_back(method, dtype, kwargs, backend):
    ends = []
    for looks in (False, True):
        params = parameters(backend, dtype)
        optimizer, before = half_way(params, method, backend, **kwargs)
        perturbed = raw(params)
        assert not same(perturbed, before)
        if looks:
            with optimizer.unperturbed():
                assert same(raw(params), before) and optimizer.between_passes
                with optimizer.unperturbed():
                    assert same(raw(params), before)
                assert same(raw(params), before)
                with torch.no_grad():
                    params[0].add_(1)  # is gone with the block
            assert same(raw(params), perturbed)
            with pytest.raises(KeyError), optimizer.unperturbed():
                assert same(raw(params), before)
                raise KeyError
            assert same(raw(params), perturbed)
        give(params, 4)
        optimizer.second_step(zero_grad=True)
        ends.append(raw(params))
    assert same(*ends)


@pytest.mark.parametrize("backend", BACKENDS)
def test_in_the_second_call_of_a_closure(backend):
    """Saving and evaluating there, with no effect on the run."""
    runs = []
    for looks in (False, True):
        model, loss_fn = model_and_data()
        optimizer = create("sam", model.parameters(), backend)
        seen = []

        def closure(looks=looks, model=model, loss_fn=loss_fn, optimizer=optimizer, seen=seen):
            loss = loss_fn()
            loss.backward()
            if looks:
                with optimizer.unperturbed(), torch.no_grad():
                    seen.append(loss_fn())
                    buffer = io.BytesIO()
                    torch.save(model.state_dict(), buffer)
                    buffer.seek(0)
                    seen.append(torch.load(buffer)["0.weight"])
            return loss

        before = bits(model)
        first = optimizer.step(closure)
        if looks:
            assert seen[0] == seen[2] == first.detach()
            assert torch.equal(seen[1], before[0]) and torch.equal(seen[3], before[0])
        optimizer.step(closure)
        runs.append(bits(model))
    assert same(*runs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_restored_inside(backend):
    params = parameters(backend)
    optimizer, before = half_way(params, "sam", backend)
    with optimizer.unperturbed():
        optimizer.restore()
        assert same(raw(params), before)
    assert same(raw(params), before) and not optimizer.between_passes
    give(params, 5)
    optimizer.first_step()
    optimizer.restore()
    assert same(raw(params), before)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_parameters_without_a_gradient(backend):
    """One that is not perturbed, one that is perturbed and not updated, and none at all."""
    params = parameters(backend)
    optimizer = create("sam", params, backend)
    before = raw(params)
    params[0].grad = torch.ones_like(params[0])
    params[1].grad = torch.ones_like(params[1])
    optimizer.first_step(zero_grad=True)
    perturbed = raw(params)
    with optimizer.unperturbed():
        assert same(raw(params), before)
    assert same(raw(params), perturbed) and not same(perturbed, before)
    params[0].grad, params[2].grad = torch.ones_like(params[0]), torch.ones_like(params[2])
    optimizer.second_step(zero_grad=True)
    assert torch.equal(raw(params)[1], before[1])
    changed = raw(params)
    optimizer.first_step()
    with optimizer.unperturbed():
        assert same(raw(params), changed)
    optimizer.restore()


def test_outside_of_two_passes_nothing_happens():
    model, loss_fn = model_and_data()
    optimizer = create("sam", model.parameters(), "torch")
    before = bits(model)
    versions = [p._version for p in model.parameters()]
    with optimizer.unperturbed():
        loss_fn().backward()
    assert same(bits(model), before) and versions == [p._version for p in model.parameters()]
    optimizer.plain_step()
    assert not same(bits(model), before)


@pytest.mark.parametrize("between", [False, True])
def test_steps_inside_are_refused(between):
    model, loss_fn = model_and_data()
    optimizer = create("sam", model.parameters(), "torch")
    closure = closure_of(loss_fn)
    closure()
    if between:
        optimizer.first_step()
    calls = {
        "step": lambda: optimizer.step(closure),
        "step_micro_batches": lambda: optimizer.step_micro_batches([closure]),
        "first_step": optimizer.first_step,
        "second_step": optimizer.second_step,
        "plain_step": optimizer.plain_step,
    }
    perturbed = bits(model)
    with optimizer.unperturbed():
        inside = bits(model)
        for name, call in calls.items():
            with pytest.raises(RuntimeError, match=rf"^{name} cannot be called inside unperturbed"):
                call()
        assert same(bits(model), inside)
    assert same(bits(model), perturbed)
    (optimizer.second_step if between else optimizer.plain_step)()


def test_gradients_enabled_inside_and_copies():
    model, loss_fn = model_and_data()
    optimizer = create("sam", model.parameters(), "torch")
    loss_fn().backward()
    before = bits(model)
    optimizer.first_step()
    with optimizer.unperturbed():
        assert torch.is_grad_enabled()
        twin = copy.deepcopy(model)
        assert loss_of(twin) is not None
    optimizer.second_step()
    assert same(bits(twin), before)


def test_autocast_does_not_keep_the_other_weights():
    model, loss_fn = model_and_data()
    optimizer = create("sam", model.parameters(), "torch", rho=0.5)
    with torch.autocast(DEVICE, torch.bfloat16):
        at_w = loss_fn()
        at_w.backward()
        optimizer.first_step(zero_grad=True)
        perturbed = loss_fn().detach()
        with optimizer.unperturbed():
            assert torch.equal(loss_fn(), at_w)
        assert torch.equal(loss_fn(), perturbed) and perturbed > at_w
    optimizer.restore()


def test_a_graph_across_the_block_is_refused_by_autograd():
    model, loss_fn = model_and_data()
    optimizer = fastsam.SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    loss_fn().backward()
    optimizer.first_step(zero_grad=True)
    with optimizer.unperturbed():
        loss = loss_fn()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    optimizer.restore()
