"""Sharpness: its closed form on quadratics, SAM's perturbation, and no trace left behind."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fastsam
from fastsam.analysis.flatness import sharpness

from conftest import DEVICE
from losses import Quadratic, assert_untouched, meddle, snapshot, stateful
from networks import bits, model_and_data, same

RHO = 0.3
SCALES = [(False, 0.0), (True, 0.0), (True, 0.1)]


@pytest.mark.parametrize("adaptive, eta", SCALES)
def test_quadratic_has_its_closed_form(adaptive, eta):
    problem = Quadratic()
    t, g = problem.scale(adaptive, eta), problem.a @ problem.w
    expected = problem.rise(RHO * t**2 * g / np.linalg.norm(t * g))
    value = sharpness(problem.params, problem.loss, RHO, adaptive, eta=eta)
    assert value.shape == () and value.dtype == torch.float64 and not value.requires_grad
    # a difference of two losses some ten times as large; 1e-12 in SAM's denominator
    assert value.item() == pytest.approx(expected, rel=1e-11)


def largest_rise(a: np.ndarray, g: np.ndarray, radius: float) -> float:
    """The maximum of g'e + e'Ae/2 over |e| <= radius: there (nu I - A) e = g, nu above A's."""
    values, vectors = np.linalg.eigh(a)
    c = vectors.T @ g
    low, high = values[-1], values[-1] + np.linalg.norm(g) / radius + 1
    for _ in range(200):
        nu = (low + high) / 2
        low, high = (nu, high) if np.linalg.norm(c / (nu - values)) > radius else (low, nu)
    e = c / (high - values)
    return float(c @ e + 0.5 * e @ (values * e))


@pytest.mark.parametrize("adaptive, eta", SCALES)
def test_more_steps_never_find_less_and_lead_to_the_largest_rise(adaptive, eta):
    problem = Quadratic()
    t = problem.scale(adaptive, eta)
    largest = largest_rise(t[:, None] * problem.a * t, t * (problem.a @ problem.w), RHO)
    found = [
        sharpness(problem.params, problem.loss, RHO, adaptive, eta=eta, steps=steps).item()
        for steps in (1, 2, 4, 60)
    ]
    assert found == sorted(found)
    assert found[0] < largest * (1 - 1e-4) and found[1] > found[0]
    assert found[-1] == pytest.approx(largest, rel=1e-9)


def test_the_largest_rise_counts_not_the_last():
    w = torch.zeros((), dtype=torch.float64, requires_grad=True, device=DEVICE)

    def loss():  # its peak is at 0.4: a step of 1 leads past it, the next one back, and so on
        return -((w - 0.4) ** 2)

    found = [sharpness([w], loss, 1.0, steps=steps).item() for steps in (1, 2, 3)]
    assert found == pytest.approx([-0.2, 0, 0], abs=1e-11)


@pytest.mark.parametrize("adaptive", [False, True])
def test_the_perturbation_is_sams_bit_for_bit(adaptive):
    model, loss_fn = model_and_data()
    seen = []

    def closure():
        seen.append(bits(model))
        return loss_fn()

    rise = sharpness(model, closure, 0.7, adaptive, eta=0.01)
    sam = fastsam.SAM(
        model.parameters(), torch.optim.SGD, rho=0.7, adaptive=adaptive, eta=0.01, lr=0.1,
        backend="reference",
    )  # fmt: skip
    before = loss_fn()
    before.backward()
    sam.first_step()
    assert len(seen) == 2 and same(seen[1], bits(model))
    assert torch.equal(rise, loss_fn() - before)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("meddles", [False, True])
def test_everything_is_as_it_was(steps, meddles):
    model, loss_fn = stateful()
    with torch.no_grad():
        model.first.bias[0] = -0.0

    def closure():
        loss = loss_fn()
        if meddles:
            meddle(model)
        return loss

    before = snapshot(model)
    assert sharpness(model, closure, 0.1, steps=steps) > 0
    assert_untouched(model, before)


@pytest.mark.parametrize("failing", [1, 2, 3])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_everything_is_as_it_was_when_the_closure_fails(failing, error):
    model, loss_fn = stateful()
    weights, calls = bits(model), []

    def closure():
        calls.append(same(weights, bits(model)))
        loss = loss_fn()
        meddle(model)
        if len(calls) == failing:
            raise error("here")
        return loss

    before = snapshot(model)
    with pytest.raises(error, match="here"):
        sharpness(model, closure, 0.1, steps=2)
    assert calls == [True, False, False][:failing]  # it was perturbed when it failed
    assert_untouched(model, before)


def test_every_evaluation_starts_alike():
    """Dropout's masks and the buffer that scales the loss would otherwise differ."""
    model, loss_fn = stateful()
    assert sharpness(model, loss_fn, 0.0, steps=3) == 0
    first, second = (sharpness(model, loss_fn, 0.1) for _ in range(2))
    assert torch.equal(first, second)


def test_tied_weights_count_once_and_others_stay():
    model, loss_fn = stateful(torch.float64)
    model.eval()
    seen = []

    def closure():
        seen.append(bits(model))
        return loss_fn()

    value = sharpness(model, closure, RHO)
    names = [name for name, _ in model.named_parameters()]
    params = dict(model.named_parameters())
    used = [name for name in names if name not in ("frozen", "unused")]
    moved = [not torch.equal(x, y) for x, y in zip(*seen, strict=True)]
    assert moved == [name in used for name in names]
    grads = torch.autograd.grad(loss_fn(), [params[name] for name in used])
    norm = torch.cat([g.reshape(-1) for g in grads]).norm()
    model.calls.zero_()  # the call above counted
    model.calls += 1
    for name, g in zip(used, grads, strict=True):
        start, end = (weights[names.index(name)] for weights in seen)
        # SAM's 1e-12 is far below; a sum of squares is rounded some 80 times
        torch.testing.assert_close(end - start, RHO * g / norm, rtol=1e-12, atol=1e-14)
    assert value > 0


def test_a_parameter_given_twice_counts_once():
    problem = Quadratic()
    once = sharpness(problem.params, problem.loss, RHO)
    twice = sharpness(iter([*problem.params, problem.params[0]]), problem.loss, RHO)
    assert torch.equal(once, twice)


def test_non_contiguous_weights():
    torch.manual_seed(0)
    start, x = torch.randn(2, 4, 3, dtype=torch.float64, device=DEVICE)
    p, q = start.clone().requires_grad_(), start.T.contiguous().T.requires_grad_()
    assert not q.is_contiguous()
    expected = sharpness([p], lambda: (p * x).sum().exp(), 0.1, adaptive=True, steps=2)
    value = sharpness([q], lambda: (q * x).sum().exp(), 0.1, adaptive=True, steps=2)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    assert torch.equal(q, start) and q.stride() == (1, 4)


def test_zero_gradient_is_flat():
    w = torch.zeros(3, requires_grad=True, device=DEVICE)
    assert sharpness([w], lambda: (w**2).sum(), 0.1, steps=3) == 0
    assert torch.equal(w, torch.zeros(3, device=DEVICE))


@pytest.mark.parametrize("steps", [1, 2])
def test_a_gradient_that_is_not_finite_gives_nan(steps):
    w = torch.zeros(3, requires_grad=True, device=DEVICE)
    # the loss is 0, its gradient infinite: 0 would read as flat
    assert sharpness([w], lambda: w.sqrt().sum(), 0.1, steps=steps).isnan()
    assert torch.equal(w, torch.zeros(3, device=DEVICE))


def test_a_loss_that_overflows_gives_infinity():
    w = torch.ones((), requires_grad=True, device=DEVICE)
    assert sharpness([w], lambda: (80 * w).exp(), 1.0) == torch.inf
    assert w == 1


def test_a_loss_that_is_the_weight_itself():
    w = torch.tensor([2.0], dtype=torch.float64, requires_grad=True, device=DEVICE)
    assert sharpness([w], lambda: w, 0.25).item() == pytest.approx(0.25, rel=1e-11)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_weights_are_perturbed_in_float32(dtype):
    w = torch.linspace(-1, 1, 40, device=DEVICE).to(dtype).requires_grad_()
    x = torch.linspace(0.5, 1, 40, device=DEVICE)
    seen = []

    def loss():
        seen.append(w.detach().clone())
        return (w.float() * x).sum()

    value = sharpness([w], loss, 0.5, adaptive=True)
    t, g = w.detach().double().abs(), x.to(dtype).double()
    e = 0.5 * t * t * g / (t * g).norm()
    exact = w.detach().double() + e
    # one rounding to the dtype, of a sum in float32
    torch.testing.assert_close(
        seen[1].double(), exact, rtol=torch.finfo(dtype).eps / 2 * 1.01, atol=1e-7
    )
    assert not torch.equal(seen[0], seen[1]) and torch.equal(w, seen[0])
    assert value.dtype == torch.float32
    assert sharpness([w], lambda: (w * x.to(dtype)).sum(), 0.5).dtype == torch.float32


def test_works_where_gradients_are_off():
    problem = Quadratic()
    expected = sharpness(problem.params, problem.loss, RHO)
    with torch.no_grad():
        assert torch.equal(sharpness(problem.params, problem.loss, RHO), expected)


def test_radius_may_be_a_tensor():
    problem = Quadratic()
    expected = sharpness(problem.params, problem.loss, 0.25, steps=2)
    rho = torch.tensor(0.25, device=DEVICE)
    assert torch.equal(sharpness(problem.params, problem.loss, rho, steps=2), expected)


W = torch.ones(2, requires_grad=True)
FROZEN = torch.ones(2)
SPARSE = nn.Embedding(4, 2, sparse=True)
COMPLEX = torch.ones(2, dtype=torch.complex64, requires_grad=True)
EXPANDED = torch.ones(1).expand(3).requires_grad_()


def square() -> Tensor:
    return (W**2).sum()


def backward() -> Tensor:
    loss = square()
    loss.backward()
    return loss


@pytest.mark.parametrize(
    "arguments, error, words",
    [
        ((W, square, 0.1), TypeError, "model must be .*got Tensor"),
        ((3, square, 0.1), TypeError, "model must be .*got int"),
        (([("w", W)], square, 0.1), TypeError, "model must be .*got one of tuple"),
        (([W * 2], square, 0.1), ValueError, r"model must .*leaves.*\(2,\)"),
        (([FROZEN], square, 0.1), ValueError, "model must have a parameter that requires grad"),
        (([], square, 0.1), ValueError, "model must have a parameter that requires grad"),
        (([W], 3.0, 0.1), TypeError, "loss_closure must be callable, got 3.0"),
        (([W], square, -0.1), ValueError, "rho must be at least 0 and finite, got -0.1"),
        (([W], square, float("nan")), ValueError, "rho must be .*got nan"),
        (([W], square, torch.ones(2)), ValueError, "rho must be .*shape"),
        (([W], square, 0.1, True, {"eta": -1}), ValueError, "eta must be at least 0.*got -1"),
        (([W], square, 0.1, False, {"steps": 0}), ValueError, "steps must be .*at least 1, got 0"),
        (([W], square, 0.1, False, {"steps": 1.0}), ValueError, "steps must be .*got 1.0"),
        (([W], lambda: (W**2), 0.1), RuntimeError, "loss_closure must return the loss"),
        (([W], lambda: None, 0.1), RuntimeError, "loss_closure must return the loss.*None"),
        (([W], lambda: square().item(), 0.1), RuntimeError, "loss_closure must return a loss that"),
        (([W], lambda: FROZEN.sum(), 0.1), RuntimeError, "loss_closure must return a loss that"),
        (([W], lambda: COMPLEX.real.sum(), 0.1), RuntimeError, "depends on a parameter"),
        (([W], backward, 0.1), RuntimeError, "loss_closure must not call backward"),
        ((SPARSE, lambda: SPARSE(torch.tensor([1])).sum(), 0.1), RuntimeError, "sparse"),
        (([COMPLEX], lambda: COMPLEX.abs().sum(), 0.1), RuntimeError, "complex"),
        (([EXPANDED], lambda: EXPANDED.sum(), 0.1), RuntimeError, "memory of their own"),
    ],
)  # fmt: skip
def test_bad_input(arguments, error, words):
    *arguments, options = arguments if isinstance(arguments[-1], dict) else (*arguments, {})
    with pytest.raises(error, match=words):
        sharpness(*arguments, **options)
    assert W.grad is None and torch.equal(W, torch.ones(2))
