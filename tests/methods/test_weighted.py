"""WSAM and GNP by hand, at their ends, and on bases that are not fused."""

import pytest
import torch

import fastsam

from registry import BACKENDS, DEVICE

SGD = {"base_optimizer": torch.optim.SGD, "lr": 1.0}
INF = float("inf")


def passes(optimizer, params, first, second):
    for half, grads in ((optimizer.first_step, first), (optimizer.second_step, second)):
        for param, grad in zip(params, grads, strict=True):
            param.grad = None if grad is None else torch.tensor(grad, device=DEVICE)
        half()


def step(cls, first, second, backend, **kwargs):
    """What a step along these gradients takes away from the weights, which are 0."""
    params = [torch.nn.Parameter(torch.zeros(1, device=DEVICE)) for _ in first]
    optimizer = cls(params, **SGD | kwargs, backend=backend)
    passes(optimizer, params, [x if x is None else [x] for x in first], [[x] for x in second])
    return [-param.item() for param in params]


COUPLED = {"decouple": False}
G, SECOND = (3.0, 4.0), (2.0, 8.0)
CASES = [
    # gamma = 0.75 is alpha = 3
    (fastsam.WSAM, G, SECOND, {"gamma": 0.75}, (3 - 3, 4 + 12)),
    (fastsam.WSAM, G, SECOND, {"gamma": 0.75} | COUPLED, (6 - 6, 24 - 8)),
    (fastsam.WSAM, G, SECOND, {"gamma": 0.0}, G),
    (fastsam.WSAM, G, SECOND, {"gamma": 0.5} | COUPLED, SECOND),
    # up, and not down
    (fastsam.WSAM, G, SECOND, {"gamma": 0.75, "maximize": True}, (0.0, -16.0)),
    # u = g has the norm 5; the sharpness's part is not clipped
    (fastsam.WSAM, G, SECOND, {"gamma": 0.75, "max_grad_norm": 2.5}, (1.5 - 3, 2 + 12)),
    (fastsam.WSAM, (INF, 4.0), SECOND, {"gamma": 0.75}, SECOND),
    (fastsam.WSAM, (INF, 4.0), SECOND, {"gamma": 0.75} | COUPLED, SECOND),
    (fastsam.WSAM, (None, 4.0), SECOND, {"gamma": 0.75}, (6.0, 4 + 12)),
    (fastsam.WSAM, (None, None), SECOND, {"gamma": 0.75}, (6.0, 24.0)),
    (fastsam.WSAM, G, (INF, 8.0), {"gamma": 0.75, "skip_nonfinite": True}, (0.0, 0.0)),
    (fastsam.GNP, G, SECOND, {"alpha": 0.75}, (2.25, 7.0)),
    (fastsam.GNP, G, SECOND, {"alpha": 0.5, "unit": True}, (1.3, 4.4)),
    (fastsam.GNP, (0.0, 0.0), SECOND, {"alpha": 0.5, "unit": True}, (1.0, 4.0)),
    (fastsam.GNP, (None, None), SECOND, {"alpha": 0.75}, (1.5, 6.0)),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("cls", "first", "second", "kwargs", "moved"), CASES)
def test_by_hand(cls, first, second, kwargs, moved, backend):
    assert step(cls, first, second, backend, **kwargs) == pytest.approx(moved, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_group_that_is_not_perturbed(backend):
    """Its first gradient is in u, unless it is not finite, which the ascent's norm does not see."""
    for g, moved in ((4.0, (0.0, 16.0)), (INF, (2.0, 8.0))):
        params = [torch.nn.Parameter(torch.zeros(1, device=DEVICE)) for _ in range(2)]
        groups = [{"params": params[:1]}, {"params": params[1:], "perturb": False}]
        optimizer = fastsam.WSAM(groups, **SGD, gamma=0.75, backend=backend)
        passes(optimizer, params, [[3.0], [g]], [[2.0], [8.0]])
        assert [-p.item() for p in params] == pytest.approx(moved)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("skip", [False, True])
def test_a_base_that_is_not_fused(skip, backend):
    """RMSprop takes g; the rest follows it. Alone, and beside a group with a fused base."""
    new = [torch.linspace(-1, 1, 5, device=DEVICE) for _ in range(2)]
    params = [torch.nn.Parameter(x.clone()) for x in new]
    twins = [torch.nn.Parameter(x.clone()) for x in new]
    groups = [
        {"params": params[:1]},
        {"params": params[1:], "base_optimizer": torch.optim.SGD, "lr": 0.1},
    ]
    optimizer = fastsam.WSAM(groups if skip else params, torch.optim.RMSprop, lr=0.1, gamma=0.75,
                             skip_nonfinite=skip, backend=backend)  # fmt: skip
    bases = [torch.optim.RMSprop(twins[: 1 if skip else 2], lr=0.1)]
    if skip:
        bases.append(torch.optim.SGD(twins[1:], lr=0.1))
    for k in range(3):
        first = [torch.sin(x + k) for x in new]
        second = [torch.cos(x * k) for x in new]
        if skip and k == 1:
            second[0][2] = INF
        passes(optimizer, params, [x.tolist() for x in first], [x.tolist() for x in second])
        if skip and k == 1:
            continue
        for twin, g in zip(twins, first, strict=True):
            twin.grad = g.clone()
        for base in bases:
            base.step()
        with torch.no_grad():
            for twin, g, x in zip(twins, first, second, strict=True):
                twin -= 0.1 * 3 * (x - g)
    for p, twin in zip(params, twins, strict=True):
        torch.testing.assert_close(p, twin, rtol=0, atol=2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_setting_that_changes_between_the_passes(backend):
    """What the first pass left is not taken where the second measures, nor the reverse."""
    for before, after, moved in ((None, 2.5, (-1.5, 14.0)), (2.5, None, (0.0, 16.0))):
        params = [torch.nn.Parameter(torch.zeros(1, device=DEVICE)) for _ in range(2)]
        optimizer = fastsam.WSAM(params, **SGD, gamma=0.75, max_grad_norm=before, backend=backend)
        for half, grads in ((optimizer.first_step, G), (optimizer.second_step, SECOND)):
            for param, grad in zip(params, grads, strict=True):
                param.grad = torch.full_like(param, grad)
            half()
            optimizer.max_grad_norm = after
        assert [-p.item() for p in params] == pytest.approx(moved)


def test_what_it_refuses():
    params = [torch.nn.Parameter(torch.ones(2, device=DEVICE)) for _ in range(2)]
    groups = [{"params": params[:1]}, {"params": params[1:], "gamma": 0.2}]
    with pytest.raises(ValueError, match=r"gamma must be that of the first group, 0\.9, got 0\.2"):
        fastsam.WSAM(groups, **SGD)
    with pytest.raises(ValueError, match=r"gamma must be in \[0, 1\), got 1\.0"):
        fastsam.WSAM(params, **SGD, gamma=1.0)
    with pytest.raises(ValueError, match="decouple must be True or False, got 'no'"):
        fastsam.WSAM(params, **SGD, decouple="no")
    with pytest.raises(RuntimeError, match="WSAM does not support perturbations by micro-batch"):
        fastsam.WSAM(params, **SGD).step_micro_batches([lambda: 0.0])
    assert fastsam.WSAM(params, **SGD, **COUPLED).decouple is False
    assert fastsam.GNP(params, **SGD, unit=True).unit is True


class WithoutRate(torch.optim.Optimizer):
    def __init__(self, params):
        super().__init__(params, {})

    def step(self):
        raise AssertionError


def test_a_base_without_a_learning_rate():
    params = [torch.nn.Parameter(torch.ones(2, device=DEVICE))]
    with pytest.raises(ValueError, match="lr must be in every group with decouple=True"):
        fastsam.WSAM(params, WithoutRate)
    fastsam.WSAM(params, WithoutRate, decouple=False)
