"""Between the passes large parameters point at scratch memory, where nobody can tell (CPU)."""

import copy

import pytest
import torch

import fastsam
from fastsam.backends.eager import scratch

from large import BIG, SGD, SMALL, copies, gradients, halves, parameters, same, step
from registry import METHODS, create


def assert_close(params, others):
    """Within what a few steps in float32 leave of weights up to 5."""
    for a, b in zip(params, others, strict=True):
        torch.testing.assert_close(a.data, b.data, rtol=2e-6, atol=2e-6)


def moved(param, home):
    return param.data_ptr() != home


@pytest.mark.parametrize("method", METHODS)
def test_large_parameters_move_and_small_ones_stay(method):
    params = parameters(BIG, BIG - 1, (BIG // 64, 65), SMALL)
    params[2].data = params[2].data.t().contiguous().t()
    optimizer, homes, away = create(method, params, "torch"), [p.data_ptr() for p in params], set()
    for _ in range(3):
        before = copies(params)
        for half, _ in enumerate(halves(optimizer, params)):
            expected = [True, False, True, False] if half == 0 else [False] * 4
            assert [moved(p, home) for p, home in zip(params, homes, strict=True)] == expected
            if half == 0:
                away.add((params[0].data_ptr(), params[2].data_ptr()))
                # the weights are where they were, not copied
                assert optimizer._flight.backup.copies[params[0]].data_ptr() == homes[0]
                assert same([optimizer._flight.backup.copies[p] for p in params], before)
    assert len(away) == 1  # one memory for all steps


def test_restored_bit_for_bit():
    params = parameters(BIG, SMALL)
    optimizer = fastsam.ASAM(params, **SGD, backend="torch")
    step(optimizer, params)
    homes, before = [p.data_ptr() for p in params], copies(params)
    state = copies(optimizer.state[p]["momentum_buffer"] for p in params)
    gradients(params)
    optimizer.first_step()
    assert moved(params[0], homes[0])
    optimizer.restore()
    optimizer.restore()
    for call in (1, 2):
        for error in (ValueError, KeyboardInterrupt):
            calls = []

            def closure(calls=calls, call=call, error=error):
                calls.append(moved(params[0], homes[0]))
                sum((p**3).sum() for p in params).backward()
                if len(calls) == call:
                    raise error

            with pytest.raises(error):
                optimizer.step(closure)
            assert calls == [False, True][:call]
            assert same(params, before)
            assert same((optimizer.state[p]["momentum_buffer"] for p in params), state)
            assert [p.data_ptr() for p in params] == homes
    step(optimizer, params)
    assert not same(params, before)


# --- where it must not be ----------------------------------------------------------------------


class Tagged(torch.Tensor):
    """A subclass, which may look after its memory itself."""


class TaggedParameter(torch.nn.Parameter):
    """Another."""


def from_file(x, tmp_path):
    memory = torch.from_file(str(tmp_path / "weights"), shared=True, size=x.numel())
    return torch.nn.Parameter(memory.copy_(x))


def slices(x, _):
    flat = torch.cat([x, x])
    return [torch.nn.Parameter(flat[:BIG]), torch.nn.Parameter(flat[BIG:])]


#: How parameters come to see memory that is not theirs alone: from a tensor and a folder.
SHARED = {
    "view": lambda x, _: torch.nn.Parameter(torch.cat([x, x])[1 : BIG + 1]),
    "slices of a buffer": slices,
    "gaps": lambda x, _: torch.nn.Parameter(torch.stack([x, x], 1)[:, 0]),
    "share_memory_": lambda x, _: torch.nn.Parameter(x.clone().share_memory_()),
    "numpy": lambda x, _: torch.nn.Parameter(torch.from_numpy(x.numpy().copy())),
    "file": from_file,
    "subclass": lambda x, _: x.clone().as_subclass(Tagged).requires_grad_(),
    "subclass of Parameter": lambda x, _: TaggedParameter(x.clone()),
}  # fmt: skip
#: Other tensors of a parameter's memory.
ALIASES = {
    "detach": lambda p: p.detach(), "data": lambda p: p.data, "view": lambda p: p.view(-1),
    "part": lambda p: p.detach()[5:7], "numpy": lambda p: torch.from_numpy(p.detach().numpy()),
    "set_": lambda p: torch.empty(0).set_(p.untyped_storage()),
    "parameter": lambda p: torch.nn.Parameter(p.data),
}  # fmt: skip


@pytest.mark.parametrize("method", ["sam", "asam", "lightsam-3"])
@pytest.mark.parametrize("kind", SHARED)
def test_shared_memory_is_perturbed_in_place(kind, method, tmp_path):
    (x,) = copies(parameters(BIG))
    runs = []
    for backend in ("torch", "reference"):
        params = SHARED[kind](x, tmp_path)
        params = params if isinstance(params, list) else [params]
        optimizer, home, seen = create(method, params, backend), params[0].data_ptr(), []
        for _ in range(3):
            for _ in halves(optimizer, params):
                assert not moved(params[0], home)
                seen += copies(params)
        runs.append(seen)
    assert_close(*runs)


@pytest.mark.parametrize("alias", ALIASES)
def test_aliases_see_perturbed_weights(alias):
    params, twins = parameters(BIG, SMALL), parameters(BIG, SMALL)
    optimizer = fastsam.SAM(params, **SGD, backend="torch")
    twin = fastsam.SAM(twins, **SGD, backend="reference")
    step(optimizer, params)
    step(twin, twins)
    other, home, before = ALIASES[alias](params[0]), params[0].data_ptr(), copies(params)
    for _ in zip(halves(optimizer, params), halves(twin, twins), strict=True):
        assert not moved(params[0], home) and not same(params, before)
        assert torch.equal(other, ALIASES[alias](params[0]))
        assert_close(params, twins)


def test_memory_that_becomes_an_arrays():
    """Where it was, and of a parameter that had moved before."""
    params = parameters(BIG)
    optimizer = fastsam.SAM(params, **SGD, backend="torch")
    home = params[0].data_ptr()
    gradients(params)
    optimizer.first_step()
    assert moved(params[0], home)
    gradients(params)
    optimizer.second_step()
    array = params[0].detach().numpy()
    params[0].data = torch.from_numpy(array)
    for _ in halves(optimizer, params):
        assert not moved(params[0], home)
        assert torch.equal(params[0].detach(), torch.from_numpy(array))


@pytest.mark.parametrize("method", ["sam", "vasso"])
def test_parameters_that_are_the_same_memory(method):
    """Perturbed one after the other, and restored."""
    runs = []
    for backend in ("torch", "reference"):
        params = parameters(BIG)
        params.append(torch.nn.Parameter(params[0].data))
        before, optimizer = copies(params), create(method, params, backend, "sgd", lr=0.0)
        gradients(params)
        optimizer.first_step()
        runs.append(copies(params))
        gradients(params)
        optimizer.second_step()
        assert same(params, before)
    assert_close(*runs)


def test_expanded_gradients():
    runs = []
    for backend in ("torch", "reference"):
        params = parameters(BIG)
        optimizer = fastsam.SAM(params, **SGD, backend=backend)
        for half in 2 * (optimizer.first_step, optimizer.second_step):
            params[0].grad = torch.sin(params[0].detach()[:1]).expand(BIG)
            half()
            runs += copies(params)
    assert_close(runs[:4], runs[4:])


# --- between the passes ------------------------------------------------------------------------


@pytest.mark.parametrize("alias", ["state_dict", "graph", *ALIASES])
def test_aliases_taken_between_the_passes_go_on(alias):
    """They follow the parameter ever after, and memory is used alone again when they are gone."""
    model = torch.nn.Linear(BIG // 64, 64, bias=False)
    params = [model.weight]
    optimizer = fastsam.SAM(params, **SGD, backend="torch")
    twin = copy.deepcopy({"model": model, "optimizer": optimizer})
    twin["optimizer"].backend = "reference"
    take = ALIASES | {"state_dict": lambda p: model.state_dict()["weight"], "graph": torch.t}
    with torch.enable_grad():
        for number in range(4):
            for half, _ in enumerate(halves(optimizer, params)):
                if half == 0 and number == 1:
                    other = take[alias](model.weight)
                if number > 0:
                    assert torch.equal(other, take[alias](model.weight))
            step(twin["optimizer"], [twin["model"].weight])
            assert_close(params, [twin["model"].weight])
    del other
    home = model.weight.data_ptr()
    if alias != "numpy":  # torch lets go of such memory never
        gradients(params)
        optimizer.first_step()
        assert moved(model.weight, home)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("saves", ["parameter", "view"])
@pytest.mark.parametrize("when", ["first_step", "restore", "second_step"])
def test_autograd_notices_that_weights_changed(when, saves, backend):
    (param,) = params = parameters((BIG // 64, 64))
    optimizer = fastsam.SAM(params, **SGD, backend=backend)
    home = param.data_ptr()

    def loss():
        loss = (param**3).sum() if saves == "parameter" else (param.t() @ param).square().sum()
        loss.backward(retain_graph=True)
        return loss

    kept = loss()
    optimizer.first_step(zero_grad=True)
    if saves == "parameter" and backend == "torch":
        assert moved(param, home)
    if when != "first_step":
        kept = loss()  # of the second pass
        getattr(optimizer, when)()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kept.backward()


@pytest.mark.parametrize("swaps", [False, True])
def test_parameters_that_are_pointed_elsewhere_between_the_passes(swaps):
    """Their weights go where they point; memory that somebody still sees is not used again."""
    runs = []
    for backend in ("torch", "reference"):
        params = first, second = parameters(BIG, BIG)
        optimizer = fastsam.SAM(params, **SGD, backend=backend)
        for number in range(3):
            for half, _ in enumerate(halves(optimizer, params)):
                if number == half == 0:
                    left, held = first.data, first.detach().clone()
                    first.data = second.data if swaps else torch.zeros(BIG)
                    if swaps:
                        second.data, left = left, None
                assert left is None or torch.equal(left, held)
                runs += copies(params)
    assert_close(runs[:12], runs[12:])


@pytest.mark.parametrize("method", ["sam", "asam", "ssam"])
@pytest.mark.parametrize(("shape", "other"), [
    ((BIG // 64, 64), (64, BIG // 64)), ((BIG // 64, 64, 1, 1), (BIG // 64, 64)),
    ((1025, 1024), (1024, 1025)), ((5, 8), (8, 5)), ((40,), (5, 8)),
])  # fmt: skip
@pytest.mark.filterwarnings("error")
def test_other_shapes_of_the_same_memory_between_the_steps(shape, other, method):
    runs = []
    for backend in ("torch", "reference"):
        params = parameters(shape, SMALL)
        optimizer = create(method, params, backend, "sgd", rho=2.0, max_grad_norm=0.1)
        step(optimizer, params)
        params[0].grad = None
        params[0].data = params[0].data.view(other)
        for _ in range(2):
            for _ in halves(optimizer, params):
                assert params[0].shape == other
                runs.append(copies(params))
    for a, b in zip(runs[:4], runs[4:], strict=True):
        assert_close(a, b)


def test_what_stays_a_parameters_own():
    (x,) = copies(parameters(BIG))
    assert scratch.owns_memory(x) and scratch.still_owns_memory(x)
    for other in (x.numpy(), x.clone().share_memory_(), x[:1].expand(BIG), x.view(-1)):
        other = torch.as_tensor(other)
        assert not scratch.owns_memory(other) and not scratch.still_owns_memory(other)


def test_scratch_memory_that_somebody_sees_is_not_used_again():
    memory, known, (param,) = scratch.Memory(), {}, parameters(BIG)

    groups = [{"params": [param]}]

    def take(known=known):
        backup = scratch.ScratchBackup(memory, known, groups)
        (target,) = backup.take([param], in_place=False)
        return target

    first = take()
    assert first is not param and take({}) is first and take() is first
    view = first.view(-1)
    other = take()
    assert other is not first and other is not param and take() is other
    del view
    param.data = first
    assert take() is param


def test_memory_is_alone_again_when_an_alias_of_between_the_passes_is_gone():
    (param,) = params = parameters(BIG)
    optimizer = fastsam.SAM(params, **SGD, backend="torch")
    step(optimizer, params)
    gradients(params)
    optimizer.first_step()
    alias = param.detach()
    gradients(params)
    optimizer.second_step()
    assert alias.data_ptr() == param.data_ptr()
    del alias
    assert scratch.is_alone(param)


def test_one_number_in_the_place_of_many():
    """A parameter that has become one is refused as on the other backends."""
    for backend in ("torch", "reference"):
        (param,) = params = parameters(BIG)
        optimizer = fastsam.SAM(params, torch.optim.SGD, lr=0.1, backend=backend)
        step(optimizer, params)
        param.data = param.data[:1].expand(BIG)
        before = param.detach().clone()
        param.grad = torch.ones(BIG)
        with pytest.raises(RuntimeError, match="more than one element"):
            optimizer.first_step()
        assert torch.equal(param.detach(), before)


@pytest.mark.parametrize("change", [
    lambda x: x.double(), lambda x: x[: BIG // 64].clone(), lambda x: x.t().contiguous().t(),
    lambda x: x.clone(), lambda x: x.bfloat16(),
])  # fmt: skip
@pytest.mark.filterwarnings("ignore:some parameters are float16 or bfloat16")
def test_other_weights_between_the_steps(change):
    runs = []
    for backend in ("torch", "reference"):
        params = parameters((BIG // 32, 65))
        optimizer = fastsam.SAM(params, torch.optim.SGD, lr=0.1, rho=2.0, backend=backend)
        step(optimizer, params)
        params[0].data = change(params[0].data)
        params[0].grad = None
        for _ in range(2):
            for _ in halves(optimizer, params):
                runs.append(params[0].detach().clone())
    for a, b in zip(runs[:4], runs[4:], strict=True):
        tolerance = 2.0**-7 if a.dtype == torch.bfloat16 else 2e-6  # one ulp; a few roundings
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
