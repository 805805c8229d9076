"""GSAM at its ends, and in numbers that the paper's words give."""

import pytest
import torch

import fastsam

from registry import BACKENDS, DEVICE

SGD = {"base_optimizer": torch.optim.SGD, "lr": 1.0}


def step(first, second, backend, **kwargs):
    """What a step along these gradients takes away from the weights, which are 0."""
    params = [torch.nn.Parameter(torch.zeros(len(x), device=DEVICE)) for x in first]
    optimizer = fastsam.GSAM(params, **SGD | kwargs, backend=backend)
    for half, grads in ((optimizer.first_step, first), (optimizer.second_step, second)):
        for param, grad in zip(params, grads, strict=True):
            param.grad = torch.tensor(grad, device=DEVICE)
        half()
    return [[-x for x in param.tolist()] for param in params]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("first", "second", "kwargs", "u"),
    [
        # along g~ lies (3, 0) of g = (3, 4)
        ([[3.0], [4.0]], [[2.0], [0.0]], {}, [[2.0], [-2.0]]),
        ([[3.0], [4.0]], [[2.0], [0.0]], {"alpha": 0.0}, [[2.0], [0.0]]),
        ([[4.0], [0.0]], [[1.0], [2.0]], {"variant": "first"}, [[4.0], [1.0]]),
        # nothing is along a gradient of zeros
        ([[3.0], [4.0]], [[0.0], [0.0]], {}, [[-1.5], [-2.0]]),
        ([[0.0], [0.0]], [[1.0], [2.0]], {"variant": "first"}, [[0.5], [1.0]]),
        ([[float("inf")], [4.0]], [[1.0], [2.0]], {}, [[1.0], [2.0]]),
        ([[float("inf")], [4.0]], [[1.0], [2.0]], {"variant": "first"}, [[1.0], [2.0]]),
    ],
)
def test_by_hand(first, second, kwargs, u, backend):
    assert step(first, second, backend, **{"alpha": 0.5} | kwargs) == u


@pytest.mark.parametrize("backend", BACKENDS)
def test_clipping_bounds_what_the_update_takes(backend):
    """u = (2, -2), whose norm is neither gradient's."""
    (x,), (y,) = step([[3.0], [4.0]], [[2.0], [0.0]], backend, alpha=0.5, max_grad_norm=1.0)
    assert x == -y == pytest.approx(0.5**0.5, rel=1e-6)


def test_alpha_is_one_for_all_groups():
    params = [torch.nn.Parameter(torch.ones(2, device=DEVICE)) for _ in range(2)]
    groups = [{"params": params[:1]}, {"params": params[1:], "alpha": 0.2}]
    match = r"alpha must be that of the first group, 0\.4, got 0\.2"
    with pytest.raises(ValueError, match=match):
        fastsam.GSAM(groups, **SGD)
    optimizer = fastsam.GSAM([{"params": [p]} for p in params], **SGD)
    optimizer.param_groups[1]["alpha"] = 0.2
    params[0].grad = torch.ones(2, device=DEVICE)
    with pytest.raises(ValueError, match=match):
        optimizer.first_step()
    assert params[0].tolist() == [1.0, 1.0]
    optimizer.param_groups[0]["alpha"] = 0.2
    optimizer.first_step()
    optimizer.second_step()


def test_what_it_refuses():
    param = [torch.nn.Parameter(torch.ones(2, device=DEVICE))]
    with pytest.raises(TypeError, match="RMSprop has alpha"):
        fastsam.GSAM(param, torch.optim.RMSprop, lr=0.1)
    with pytest.raises(RuntimeError, match="GSAM does not support perturbations by micro-batch"):
        fastsam.GSAM(param, **SGD).step_micro_batches([lambda: 0.0])
    with pytest.raises(ValueError, match="ascent_steps must be 1 with GSAM"):
        fastsam.GSAM(param, **SGD, ascent_steps=2)
    assert fastsam.GSAM(param, **SGD, variant="first").variant == "first"
