"""PreconditionedSAM by hand: which averages count, what the constraint weights, and functions."""

import copy
import pickle
from functools import partial

import pytest
import torch

import fastsam

from registry import BACKENDS, DEVICE, diagonal

SGD = {"base_optimizer": torch.optim.SGD, "lr": 0.0}
NAN, INF = float("nan"), float("inf")


def perturbations(optimizer, param, grads):
    """e of every step, from weights that stay 0."""
    found = []
    for g in grads:
        param.grad = torch.tensor(g, device=DEVICE)
        optimizer.first_step()
        found.append(param.tolist())
        param.grad = torch.zeros_like(param)
        optimizer.second_step()
    return found


def weights(*values):
    return torch.nn.Parameter(torch.tensor(values, device=DEVICE))


@pytest.mark.parametrize("form", ["objective", "constraint"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_averages_of_before_the_step_count(backend, form):
    """(9, 12): m = g, s = 0, ||g||^2 = 225. (9, 2): s = 1/2 (0, 100), m = (9, 7)."""
    param = weights(0.0, 0.0)
    optimizer = fastsam.PreconditionedSAM(
        [param], **SGD, rho=1.0, beta=0.5, damping=2.0, form=form, backend=backend
    )
    grads = [[9.0, 12.0], [9.0, 2.0], [3.0, 4.0]]
    found = perturbations(optimizer, param, grads)
    assert found[0] == pytest.approx([0.6, 0.8], rel=1e-6)
    assert found[1] == pytest.approx([9 / 85**0.5, 2 / 85**0.5], rel=1e-6)  # no variance yet
    v = 0.9 * (0.1 * 225) + 0.1 * 85
    floor = 2 * v / 2
    d = floor / (50 + floor)
    n = (9 + 16 * d * d) ** 0.5
    exact = [3 / n, 4 * (d if form == "objective" else d * d) / n]
    assert found[2] == pytest.approx(exact, rel=1e-6)
    assert optimizer.state[param]["ascent_variance"].tolist() == [18.0, 29.5]
    assert optimizer.state[param]["ascent_mean"].tolist() == [6.0, 5.5]
    assert float(optimizer.kept["ascent_squared_norms"]) == pytest.approx(0.9 * v + 2.5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [NAN, INF])
def test_a_gradient_that_is_not_finite_stays_out(bad, backend):
    param, other = weights(0.0, 0.0), weights(0.0, 0.0)
    make = partial(fastsam.PreconditionedSAM, **SGD, rho=1.0, backend=backend)
    optimizer, without = make([param]), make([other])
    good = [[3.0, 4.0], [1.0, 2.0], [2.0, -1.0], [0.5, 1.0]]
    found = perturbations(optimizer, param, [[bad, 1.0], *good[:2], [0.0, bad], *good[2:]])
    expected = perturbations(without, other, good)
    assert found == [[0.0, 0.0], *expected[:2], [0.0, 0.0], *expected[2:]]
    for name, x in without.state[other].items():
        assert torch.equal(x, optimizer.state[param][name])
    assert optimizer.kept["ascent_squared_norms"] == without.kept["ascent_squared_norms"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_square_that_is_too_large_stays_out(backend):
    """Of the element alone: 1e25 is no infinity, its square in float32 is."""
    param = weights(0.0, 0.0)
    optimizer = fastsam.PreconditionedSAM([param], **SGD, rho=1.0, beta=0.5, backend=backend)
    found = perturbations(optimizer, param, [[1.0, 1.0], [1e25, 1.0], [1.0, 1.0]])
    assert found[1][0] == 0.0
    state = optimizer.state[param]
    assert state["ascent_mean"].tolist() == [1.0, 1.0]
    assert state["ascent_variance"].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_failed_step_leaves_the_averages(backend):
    param = weights(0.0, 0.0)
    optimizer = fastsam.PreconditionedSAM([param], **SGD, backend=backend)
    perturbations(optimizer, param, [[3.0, 4.0], [1.0, 2.0]])
    before = {name: x.clone() for name, x in optimizer.state[param].items()}
    kept = float(optimizer.kept["ascent_squared_norms"])
    param.grad = torch.ones_like(param)
    optimizer.first_step()
    optimizer.restore()
    assert float(optimizer.kept["ascent_squared_norms"]) == kept > 0
    for name, x in before.items():
        assert torch.equal(x, optimizer.state[param][name])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_function_that_is_asam(backend):
    """C = |w| + eta in the constraint is ASAM; a function of the state is one of Adam's."""
    ours, theirs = weights(3.0, -2.0, 0.5), weights(3.0, -2.0, 0.5)

    def scale(g, state):
        return ours.detach().abs() + 0.1

    adam = {"base_optimizer": torch.optim.AdamW, "lr": 0.1, "rho": 0.5, "backend": backend}
    one = fastsam.PreconditionedSAM([ours], **adam, preconditioner=scale, form="constraint")
    other = fastsam.SAM([theirs], **adam, adaptive=True, eta=0.1)
    for step in range(3):
        for part in ("first_step", "second_step"):
            for optimizer, param in ((one, ours), (other, theirs)):
                param.grad = torch.tensor([1.0, -2.0, 0.3 * step], device=DEVICE)
                getattr(optimizer, part)()
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)


@pytest.mark.parametrize("form", ["objective", "constraint"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_function_of_the_state(backend, form):
    """Adam's second moment, by the function and read where it lies."""
    given = []

    def preconditioner(g, state):
        given.append((g.clone(), sorted(state)))
        v = state.get("exp_avg_sq")
        return g.new_ones(()) if v is None else 1 / (v.sqrt() + 1e-8)

    adam = {"base_optimizer": torch.optim.Adam, "lr": 0.1, "maximize": True, "backend": backend}
    adam |= {"form": form, "rho": 1e-3}
    params = weights(1.0, 2.0), weights(1.0, 2.0)
    optimizers = [
        fastsam.PreconditionedSAM([param], **adam, preconditioner=kind)
        for param, kind in zip(params, (preconditioner, "second_moment"), strict=True)
    ]
    for _ in range(3):
        before = params[1].detach().clone()
        for part in ("first_step", "second_step"):
            for optimizer, param in zip(optimizers, params, strict=True):
                param.grad = 0.5 * param.detach() + 1
                getattr(optimizer, part)()
            torch.testing.assert_close(*params, rtol=1e-6, atol=0)
            assert part == "second_step" or not torch.equal(params[1], before)
    assert given[0][0].tolist() == [-1.5, -2.0]  # of what is minimised
    assert [names for _, names in given] == [[], *[["exp_avg", "exp_avg_sq", "step"]] * 2]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_function_sees_no_loss_scale(backend):
    given = []

    def preconditioner(g, state):
        given.append(g.clone())
        return g.abs()

    param = weights(1.0, 2.0)
    optimizer = fastsam.PreconditionedSAM(
        [param], **SGD, rho=1.0, preconditioner=preconditioner, backend=backend
    )
    scaler = torch.amp.GradScaler(DEVICE, init_scale=1024.0)
    scaler.scale(torch.ones((), device=DEVICE))
    param.grad = 1024 * torch.tensor([2.0, 1.0], device=DEVICE)
    optimizer.first_step(grad_scaler=scaler)
    assert given[0].tolist() == [2.0, 1.0]
    assert param.tolist() == pytest.approx([1 + 4 / 17**0.5, 2 + 1 / 17**0.5], rel=1e-6)
    optimizer.restore()


def test_what_a_function_may_give():
    param = weights(1.0, 2.0)

    def attempt(value):
        optimizer = fastsam.PreconditionedSAM([param], **SGD, preconditioner=lambda g, state: value)
        param.grad = torch.ones_like(param)
        optimizer.first_step()

    with pytest.raises(TypeError, match="preconditioner must give a tensor, got 1.0"):
        attempt(1.0)
    with pytest.raises(ValueError, match=r"of the gradient's shape, \(2,\), or of no dimension"):
        attempt(torch.ones(3, device=DEVICE))
    assert param.tolist() == [1.0, 2.0]
    attempt(torch.full((2,), NAN, device=DEVICE))  # perturbs nothing
    assert param.tolist() == [1.0, 2.0]


def test_arguments_that_do_not_fit():
    param = [weights(1.0, 2.0)]
    with pytest.raises(ValueError, match="preconditioner must be 'variance', 'second_moment' or"):
        fastsam.PreconditionedSAM(param, **SGD, preconditioner="fisher")
    with pytest.raises(ValueError, match="damping must be left out with preconditioner='second"):
        fastsam.PreconditionedSAM(param, **SGD, preconditioner="second_moment", damping=1.0)
    with pytest.raises(TypeError, match="must be one that keeps 'exp_avg_sq'.* got SGD"):
        fastsam.PreconditionedSAM(param, **SGD, preconditioner="second_moment")
    optimizer = fastsam.PreconditionedSAM(param, **SGD)
    lets = fastsam.LETS(optimizer, hessian="diag")
    with pytest.raises(RuntimeError, match="LETS needs hessian='difference' with Preconditioned"):
        lets.step(lambda: None, lambda: None)


@pytest.mark.parametrize("backend", BACKENDS)
def test_lets_learns_by_the_difference(backend):
    """Which is of gradients alone: of the same ones, the same as SAM's."""
    found = []
    for cls in (fastsam.PreconditionedSAM, fastsam.SAM):
        param = weights(0.0, 0.0)
        lets = fastsam.LETS(
            cls([param], torch.optim.SGD, lr=0.5, backend=backend), hessian="difference"
        )
        for _ in range(2):
            grads = iter([[4.0, 4.0], [9.0, 11.0], [2.0, 3.0], [5.0, 1.0]])
            losses = iter([2.0, 1.0, 1.0, 3.0])

            def closure(param=param, grads=grads, losses=losses):
                param.grad = torch.tensor(next(grads), device=DEVICE)
                return next(losses)

            lets.step(closure, closure)
        found.append(lets.metrics["hypergradient"].item())
    assert found[0] == pytest.approx(found[1], rel=1e-6) and found[0] != 0


def test_copies_go_on_alike():
    """The number of elements is counted anew, and a function goes along."""
    for own in ({}, {"preconditioner": diagonal, "form": "constraint"}):
        param = weights(1.0, 2.0)
        optimizer = fastsam.PreconditionedSAM([param], **SGD | {"lr": 0.1}, **own)
        perturbations(optimizer, param, [[3.0, 4.0], [1.0, 2.0]])
        ours = [param, optimizer]
        for theirs in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
            assert theirs[1].form == optimizer.form
            expected = copy.deepcopy(ours)
            found, exact = (perturbations(x[1], x[0], [[2.0, 5.0]]) for x in (theirs, expected))
            assert found == exact
