"""Slices of the loss: exact parabolas, normalised directions, no trace left, figures."""

import sys

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastsam.analysis.flatness import sharpness
from fastsam.analysis.landscape import Landscape, loss_landscape

from conftest import DEVICE
from losses import Quadratic, assert_untouched, meddle, snapshot, stateful
from networks import bits, model_and_data, same


def flat(direction) -> np.ndarray:
    return np.concatenate([d.reshape(-1).cpu().numpy() for d in direction])


def parabola(problem: Quadratic, result: Landscape) -> np.ndarray:
    """The loss at every point, from the directions."""
    directions = [flat(d) for d in result.directions]
    losses = np.empty([len(result.coordinates)] * len(directions))
    for place in np.ndindex(losses.shape):
        steps = [result.coordinates[i] * d for i, d in zip(place, directions, strict=True)]
        w = problem.w + sum(steps)
        losses[place] = 0.5 * w @ problem.a @ w
    return losses


@pytest.mark.parametrize("ndim", [1, 2])
@pytest.mark.parametrize("directions", ["random", "gradient"])
@pytest.mark.parametrize("normalization", ["auto", "filter", "layer", "unit", None])
def test_quadratic_gives_the_exact_parabola(ndim, directions, normalization):
    problem = Quadratic()
    result = loss_landscape(
        problem.params, problem.loss, directions, ndim=ndim, points=5, span=0.75,
        normalization=normalization, biases=True,
    )  # fmt: skip
    np.testing.assert_array_equal(result.coordinates, [-0.75, -0.375, 0, 0.375, 0.75])
    assert result.losses.dtype == np.float64 and result.losses.shape == (5,) * ndim
    np.testing.assert_allclose(result.losses, parabola(problem, result), rtol=1e-12, atol=0)
    # bit for bit at the weights themselves
    assert result.losses[(2,) * ndim] == problem.loss().item()


def test_axes_of_a_plane_are_in_order():
    w = torch.zeros(2, dtype=torch.float64, device=DEVICE, requires_grad=True)
    scale = torch.tensor([1.0, 10.0], dtype=torch.float64, device=DEVICE)
    first, second = torch.eye(2, dtype=torch.float64, device=DEVICE)
    result = loss_landscape([w], lambda: (w * scale).sum(), [[first], [second]], points=3)
    np.testing.assert_array_equal(result.losses, np.add.outer([-1.0, 0.0, 1.0], [-10.0, 0.0, 10.0]))
    assert result.labels == ("directions[0]", "directions[1]")


def test_along_the_gradient_lies_sams_perturbation():
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 3)).to(DEVICE, torch.float64)
    x = torch.randn(9, 7, device=DEVICE, dtype=torch.float64)

    def loss() -> Tensor:
        return nn.functional.cross_entropy(model(x), torch.arange(9, device=DEVICE) % 3)

    result = loss_landscape(model, loss, "gradient", ndim=2, points=3, span=0.2)
    grads = torch.autograd.grad(loss(), list(model.parameters()))
    g = flat(grads)
    first, second = map(flat, result.directions)
    # rounding of some 300 float64 products
    np.testing.assert_allclose(first, g / np.linalg.norm(g), rtol=0, atol=1e-15)
    assert abs(first @ second) < 1e-14
    assert np.linalg.norm(second) == pytest.approx(1, rel=1e-13)
    rise = result.losses[2, 1] - result.losses[1, 1]
    assert rise == pytest.approx(sharpness(model, loss, 0.2).item(), rel=1e-9)


class Filters(nn.Module):
    """Weights of every number of dimensions, one filter of zeros and one tensor with none."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3)
        self.linear = nn.Linear(3, 4)
        self.norm = nn.BatchNorm2d(3)
        self.number = nn.Parameter(torch.tensor(2.0))
        self.empty = nn.Parameter(torch.empty(2, 0))
        with torch.no_grad():
            self.conv.weight[1] = 0


def make_filters() -> Filters:
    torch.manual_seed(2)
    return Filters().to(DEVICE, torch.float64)


def zero_loss() -> Tensor:
    return torch.zeros((), device=DEVICE)


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("normalization", ["filter", "layer"])
def test_normalised_directions_have_the_norms_of_the_weights(normalization, biases):
    model = make_filters()
    options = {"points": 2, "ndim": 2, "biases": biases}
    result = loss_landscape(model, zero_loss, normalization=normalization, **options)
    drawn = loss_landscape(model, zero_loss, normalization=None, **options)
    for direction, raw in zip(result.directions, drawn.directions, strict=True):
        for w, d, r in zip(model.parameters(), direction, raw, strict=True):
            if w.ndim < 2 and not biases:
                assert d is None
                continue
            by_filter = normalization == "filter" and w.ndim > 1
            parts = ((x.detach() if by_filter else x.detach()[None]) for x in (w, d, r))
            for w_part, d_part, r_part in zip(*parts, strict=True):
                assert d_part.norm().item() == pytest.approx(w_part.norm().item(), rel=1e-14)
                # the same direction as before: their cosine is 1
                product = (d_part * r_part).sum()
                torch.testing.assert_close(product, d_part.norm() * r_part.norm())


SIZES = [(1e-22, 1.0), (1e-30, 1.0), (1e-40, 1.0), (1e25, 1.0), (1.0, 1e-30), (1e-25, 1e-25)]


@pytest.mark.parametrize("kind", ["given", "gradient"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("normalization", ["filter", "layer", "unit"])
def test_squares_of_directions_and_weights_need_not_be_float32(normalization, size, kind):
    """A gradient that vanishes still has a direction; a factor may be beyond float32, too."""
    generator = torch.Generator().manual_seed(1)
    tiny, small = ([torch.randn(shape, generator=generator) * x for shape in ((3, 4), (5,), ())]
                   for x in size)  # fmt: skip
    tiny[0][1] = 0  # a filter without direction stays
    params = [w.to(DEVICE, copy=True).requires_grad_() for w in small]
    along = [d.to(DEVICE) for d in tiny]

    def loss() -> Tensor:  # whose gradient is exactly the direction
        return sum((w * d).sum() for w, d in zip(params, along, strict=True))

    (direction,) = loss_landscape(
        params, loss, [along] if kind == "given" else "gradient", points=2,
        normalization=normalization, biases=True,
    ).directions  # fmt: skip
    total = np.sqrt(sum(np.square(d.double().numpy()).sum() for d in tiny))
    for found, d, w in zip(direction, tiny, small, strict=True):
        d, w = d.double().numpy(), w.double().numpy()
        by_filter = normalization == "filter" and d.ndim > 1
        inside = tuple(range(by_filter, d.ndim))
        norm, target = (np.sqrt(np.square(x).sum(inside, keepdims=True)) for x in (d, w))
        if normalization == "unit":
            norm, target = total, 1.0
        expected = d * np.divide(target, norm, where=norm > 0, out=np.zeros_like(norm))
        assert found.dtype == torch.float32 and np.abs(expected).max() > 1e-32
        # rounded once
        np.testing.assert_allclose(found.cpu().double().numpy(), expected, rtol=2.0**-24 * 1.01)


def test_rescaled_networks_have_the_same_filter_normalised_slice():
    """A ReLU network whose layers are scaled by c and 1/c is the same function."""
    torch.manual_seed(3)
    x = torch.randn(20, 4, dtype=torch.float64, device=DEVICE)
    model = nn.Sequential(nn.Linear(4, 8, bias=False), nn.ReLU(), nn.Linear(8, 1, bias=False))
    model.to(DEVICE, torch.float64)

    def loss() -> Tensor:
        return (model(x) - 1).square().mean()

    def slices() -> list[np.ndarray]:
        return [loss_landscape(model, loss, points=5, normalization=n).losses
                for n in ("filter", "unit")]  # fmt: skip

    before = slices()
    with torch.no_grad():
        model[0].weight *= 16
        model[2].weight /= 16
    after = slices()
    np.testing.assert_allclose(after[0], before[0], rtol=1e-11)
    assert abs(after[1] / before[1] - 1).max() > 0.1  # so the test can fail


def test_same_seed_same_directions_and_torchs_random_state_is_not_used():
    model, loss_fn = model_and_data()
    results = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(results))
        state = torch.get_rng_state()
        results.append(loss_landscape(model, loss_fn, ndim=2, points=2, seed=seed))
        assert torch.equal(torch.get_rng_state(), state)
    first, again, other = results
    np.testing.assert_array_equal(first.losses, again.losses)
    assert not np.array_equal(first.losses, other.losses)
    assert all(
        np.array_equal(*pair)
        for pair in zip(
            *[
                [flat([x for x in d if x is not None]) for d in r.directions]
                for r in (first, again)
            ],
            strict=True,
        )
    )
    assert not torch.equal(first.directions[0][0], first.directions[1][0])


def test_directions_can_be_given_again():
    model, loss_fn = model_and_data()
    first = loss_landscape(model, loss_fn, ndim=2, points=3, span=0.5)
    again = loss_landscape(model, loss_fn, first.directions, points=3, span=0.5)
    np.testing.assert_array_equal(first.losses, again.losses)
    assert any(d is None for d in first.directions[0])  # the biases


def test_a_given_direction_is_normalised_only_if_asked_and_does_not_change():
    torch.manual_seed(4)
    w = torch.ones(3, 2, device=DEVICE, requires_grad=True)
    given = torch.full((3, 2), 5.0, dtype=torch.float64, device=DEVICE, requires_grad=True)
    raw, scaled = (
        loss_landscape([w], lambda: w.sum(), [[given]], points=3, normalization=n)
        for n in ("auto", "filter")
    )
    np.testing.assert_allclose(raw.losses, [6 - 30, 6, 6 + 30])
    np.testing.assert_allclose(scaled.losses, [0, 6, 12], atol=1e-6)
    assert raw.directions[0][0].dtype == torch.float32
    assert not raw.directions[0][0].requires_grad and (given == 5).all()


def test_a_filter_without_direction_stays():
    w = torch.ones(2, 2, dtype=torch.float64, device=DEVICE, requires_grad=True)
    given = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    for normalization in ("filter", "layer", "unit"):
        result = loss_landscape([w], lambda: w[0].sum(), [[given]], normalization=normalization)
        np.testing.assert_array_equal(result.losses, np.full(21, 2.0))


def test_interpolation_between_two_models():
    start, loss_fn = model_and_data(0)
    end, _ = model_and_data(1)
    way = [b - a for a, b in zip(start.parameters(), end.parameters(), strict=True)]
    result = loss_landscape(start, loss_fn, [way], points=3)
    with torch.no_grad():
        for p, q in zip(start.parameters(), end.parameters(), strict=True):
            p.copy_(q)
        assert result.losses[-1] == pytest.approx(loss_fn().item(), rel=1e-6)


@pytest.mark.parametrize("directions", ["random", "gradient"])
def test_tied_and_frozen_weights(directions):
    model, loss_fn = stateful(torch.float64)
    seen = []

    def closure():
        seen.append(bits(model))
        return loss_fn()

    result = loss_landscape(model, closure, directions, points=3, normalization="unit")
    names = [name for name, _ in model.named_parameters()]
    stays = {"random": {"frozen"}, "gradient": {"frozen", "unused"}}[directions]
    (direction,) = result.directions
    assert {name for name, d in zip(names, direction, strict=True) if d is None} == stays
    for before, after, d in zip(bits(model), seen[-1], direction, strict=True):
        # a tied weight that were counted twice would have moved by 2 d
        torch.testing.assert_close(after, before if d is None else before + d, rtol=0, atol=1e-15)


def test_a_given_direction_moves_frozen_weights():
    w = torch.ones(2, dtype=torch.float64, device=DEVICE)
    result = loss_landscape([w], lambda: w.sum().item(), [[torch.ones(2)]], points=3)
    np.testing.assert_array_equal(result.losses, [0, 2, 4])
    assert torch.equal(w, torch.ones_like(w))


@pytest.mark.parametrize("directions", ["random", "gradient"])
@pytest.mark.parametrize("meddles", [False, True])
def test_everything_is_as_it_was(directions, meddles):
    model, loss_fn = stateful()
    graphs = []

    def closure():
        graphs.append(torch.is_grad_enabled())
        loss = loss_fn()
        if meddles:
            meddle(model)
        return loss

    before = snapshot(model)
    result = loss_landscape(model, closure, directions, ndim=2, points=3)
    assert_untouched(model, before)
    assert graphs == [True] * (directions == "gradient") + [False] * 9
    # dropout's masks and the counter in the buffers were the same at every point
    line = loss_landscape(model, closure, [result.directions[0]], points=3)
    np.testing.assert_array_equal(line.losses, result.losses[:, 1])


@pytest.mark.parametrize("failing", [1, 2, 6])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_everything_is_as_it_was_when_the_closure_fails(failing, error):
    model, loss_fn = stateful()
    calls = []

    def closure():
        calls.append(bits(model))
        loss = loss_fn()
        if len(calls) == failing:
            meddle(model)
            raise error("here")
        return loss

    before = snapshot(model)
    with pytest.raises(error, match="here"):
        loss_landscape(model, closure, "gradient", ndim=2, points=3)
    assert len(calls) == failing and same(calls[-1], bits(model)) == (failing in (1, 6))
    assert_untouched(model, before)


def test_half_weights_are_moved_in_float32():
    w = torch.linspace(-1, 1, 12, device=DEVICE).view(3, 4).to(torch.bfloat16).requires_grad_()
    seen = []

    def loss():
        seen.append(w.detach().clone())
        return w.sum()

    result = loss_landscape([w], loss, points=3, span=0.25)
    (d,) = result.directions[0]
    assert d.dtype == torch.float32
    for a, weights in zip([-0.25, 0, 0.25], seen, strict=True):
        assert torch.equal(weights, (w.detach().float() + a * d).bfloat16())


def test_zero_gradient_gives_a_constant():
    w = torch.zeros(3, requires_grad=True, device=DEVICE)
    result = loss_landscape([w], lambda: (w**2).sum() + 1, "gradient", points=3)
    np.testing.assert_array_equal(result.losses, [1, 1, 1])


def test_losses_that_are_not_finite_are_kept():
    w = torch.ones(1, 1, requires_grad=True, device=DEVICE)
    one = [torch.ones(1, 1)]
    result = loss_landscape([w], lambda: (w - 1).log().sum(), [one], points=3)
    assert np.isnan(result.losses[0]) and result.losses[1] == -np.inf and result.losses[2] == 0
    result.plot().canvas.draw()
    assert torch.equal(w, torch.ones_like(w))


@pytest.mark.parametrize("seed", [0, 5])
def test_random_directions_do_not_depend_on_the_device(seed):
    """They come from a generator on the CPU, whatever the default device."""
    model = make_filters()
    kinds = {}
    for default in ("cpu", "meta"):
        with torch.device(default):
            kinds[default] = loss_landscape(
                model, lambda: model.number * 1, points=2, seed=seed, normalization=None
            )
    pairs = zip(kinds["cpu"].directions[0], kinds["meta"].directions[0], strict=True)
    assert all(torch.equal(x, y) for x, y in pairs)


def landscapes() -> dict[str, Landscape]:
    problem = Quadratic()
    made = {
        str(ndim): loss_landscape(problem.params, problem.loss, "gradient", ndim=ndim, points=5)
        for ndim in (1, 2)
    }
    x = made["2"].coordinates
    for name, losses in (("constant", np.ones((5, 5))), ("lost", np.full((5, 5), np.nan))):
        made[name] = Landscape(x, losses, made["2"].directions, made["2"].labels)
    return made


@pytest.mark.parametrize("name", ["1", "2", "constant", "lost"])
def test_figure(name, tmp_path):
    figure = landscapes()[name].plot()
    figure.savefig(tmp_path / "landscape.png")
    assert (tmp_path / "landscape.png").read_bytes().startswith(b"\x89PNG")
    axes = figure.axes[0]
    assert axes.get_xlabel() == "gradient, unit length"
    assert axes.get_ylabel() == ("loss" if name == "1" else "random, unit length")


def test_contours_have_the_first_direction_to_the_right():
    x = np.linspace(-1, 1, 5)
    slope = Landscape(x, np.add.outer(x, 0 * x), ((), ()), ("first", "second"))
    (axes, _) = slope.plot().axes
    boxes = [path.get_extents() for path in axes.collections[0].get_paths() if len(path.vertices)]
    assert len(boxes) > 5
    assert all(box.height == 2 and box.width < 0.5 for box in boxes)


def test_figure_holds_the_losses_and_may_be_drawn_into_axes():
    from matplotlib.figure import Figure

    problem = Quadratic()
    result = loss_landscape(problem.params, problem.loss, "gradient", points=5, figure=True)
    (line,) = result.figure.axes[0].lines
    np.testing.assert_array_equal(line.get_xydata(), np.c_[result.coordinates, result.losses])
    figure = Figure()
    axes = figure.subplots(1, 2)
    assert result.plot(axes[1], label="here") is figure
    assert not axes[0].lines and axes[1].lines[0].get_label() == "here"
    plain = loss_landscape(problem.params, problem.loss, "gradient", points=5)
    assert plain.figure is None


def test_without_matplotlib_only_figures_are_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as if it were not installed
    problem = Quadratic()
    calls = []

    def loss():
        calls.append(1)
        return problem.loss()

    with pytest.raises(ImportError, match=r"matplotlib: pip install 'fastsam\[bench\]'"):
        loss_landscape(problem.params, loss, "gradient", figure=True)
    assert not calls
    result = loss_landscape(problem.params, loss, "gradient", points=2)
    with pytest.raises(ImportError, match="matplotlib"):
        result.plot()


W = torch.ones(2, 2, requires_grad=True)
ONE = torch.ones(1, requires_grad=True)
D = torch.ones(2, 2)


@pytest.mark.parametrize(
    "options, error, words",
    [
        ({"directions": "hessian"}, ValueError, "directions must be .*got 'hessian'"),
        ({"directions": [D]}, TypeError, "directions must be .*got list of Tensor"),
        ({"directions": D}, TypeError, "directions must be .*got Tensor"),
        ({"directions": [[D], None]}, TypeError, "directions must be .*got list of NoneType, list"),
        ({"directions": ["random"]}, TypeError, "directions must be .*got list of str"),
        ({"directions": None}, TypeError, "directions must be .*got NoneType"),
        ({"directions": []}, ValueError, "directions must be one or two, got 0"),
        ({"directions": [[D]] * 3}, ValueError, "directions must be one or two, got 3"),
        ({"directions": [[D, D]]}, ValueError, r"directions\[0\] must have .*1 parameter.*got 2"),
        ({"directions": [[D], [3]]}, TypeError, r"directions\[1\]\[0\] must be a tensor.*got int"),
        ({"directions": [[D[0]]]}, ValueError, r"directions\[0\]\[0\] must be .*\(2, 2\).*\(2,\)"),
        ({"directions": [[D + 0j]]}, ValueError, r"directions\[0\]\[0\] must be real.*complex"),
        ({"directions": [[None]]}, ValueError, r"leaves no parameter that directions\[0\] moves"),
        ({"directions": [[D]], "ndim": 2}, ValueError, "ndim must be one of None, 1 with 1 given"),
        ({"ndim": 3}, ValueError, "ndim must be one of None, 1, 2, got 3"),
        ({"ndim": True}, ValueError, "ndim must be .*got True"),
        ({"model": [ONE], "directions": "gradient", "ndim": 2}, ValueError, "ndim must be 1 for 1"),
        ({"model": [ONE]}, ValueError, "normalization 'filter' with biases=False leaves no"),
        ({"model": [D]}, ValueError, "model must have a parameter that requires grad"),
        ({"model": W}, TypeError, "model must be .*got Tensor"),
        ({"loss_closure": 1}, TypeError, "loss_closure must be callable"),
        ({"loss_closure": lambda: W}, RuntimeError, "loss_closure must return the loss"),
        ({"points": 1}, ValueError, "points must be an integer of at least 2, got 1"),
        ({"points": 5.0}, ValueError, "points must be .*got 5.0"),
        ({"span": 0}, ValueError, "span must be above 0 and finite, got 0"),
        ({"span": float("inf")}, ValueError, "span must be .*got inf"),
        ({"normalization": "max"}, ValueError, "normalization must be one of 'auto'.*got 'max'"),
        ({"seed": -1}, ValueError, "seed must be an integer from 0.*got -1"),
        ({"seed": 0.5}, ValueError, "seed must be .*got 0.5"),
    ],
)  # fmt: skip
def test_bad_input(options, error, words):
    arguments = {"model": [W], "loss_closure": lambda: (W**2).sum() + ONE.sum()} | options
    with pytest.raises(error, match=words):
        loss_landscape(**arguments)
    assert W.grad is None and torch.equal(W, torch.ones(2, 2))
