"""``perturb_every`` with ``amplify``: steps that stand for several, by hand and against torch."""

import pytest
import torch

import fastsam

from networks import bits, closure_of, model_and_data, same
from registry import BACKENDS, DEVICE, DTYPES, OTHERS
from trajectories import check_trajectory

SGD = {"base_optimizer": torch.optim.SGD, "lr": 0.1, "momentum": 0.9}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("base", OTHERS["sam-amplified"].bases)
@pytest.mark.filterwarnings("ignore:some parameters are float16 or bfloat16")
def test_trajectory(base, dtype, backend):
    shapes, groups = [(1031,), (6, 7)], [{"params": [0]}, {"params": [1], "rho": 0.1}]
    check_trajectory("sam-amplified", base, DTYPES[dtype], backend, shapes, groups, 5)


def final_gradient(first, second, backend="torch", **kwargs):
    """u of a step with these gradients."""
    params = [torch.nn.Parameter(torch.zeros(1, device=DEVICE)) for _ in first]
    optimizer = fastsam.SAM(params, torch.optim.SGD, lr=1.0, backend=backend, **kwargs)
    for half, grads in ((optimizer.first_step, first), (optimizer.second_step, second)):
        for param, g in zip(params, grads, strict=True):
            param.grad = None if g is None else torch.full_like(param, g)
        half()
    return [-param.item() for param in params]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("kwargs", "u"),
    [
        ({"perturb_every": 3, "amplify": True}, [7.0, 1.0]),  # g + 3 (g~ - g)
        ({"perturb_every": 4, "amplify": 0.5}, [5.0, 2.0]),
        ({"perturb_every": 3}, [3.0, 3.0]),  # not amplified: g~
        ({"amplify": True}, [3.0, 3.0]),  # of every step: SAM
        ({"amplify": 2}, [5.0, 2.0]),
        ({"perturb_every": 3, "amplify": True, "max_grad_norm": 5.0}, [7 / 2**0.5, 2**-0.5]),
    ],
)
def test_by_hand(kwargs, u, backend):
    found = final_gradient([1.0, 4.0], [3.0, 3.0], backend, **kwargs)
    assert found == pytest.approx(u, rel=1e-6)


def test_a_first_gradient_that_is_not_finite_stays_out():
    found = final_gradient([float("inf"), 4.0], [3.0, 3.0], perturb_every=3, amplify=True)
    assert found == [3.0, 3.0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.Rprop])  # the other is not fused
def test_a_parameter_without_a_first_gradient_is_not_amplified(base, backend):
    """No difference is known of it: it takes its second gradient, in the norm of u as well."""
    amplified = {"backend": backend, "perturb_every": 3, "amplify": True}
    if base is torch.optim.SGD:
        assert final_gradient([1.0, None], [3.0, 3.0], **amplified) == [7.0, 3.0]
        assert final_gradient([None, None], [3.0, 4.0], **amplified) == [3.0, 4.0]
        found = final_gradient([1.0, None], [3.0, 4.0], max_grad_norm=0.1, **amplified)
        assert found == pytest.approx([0.7 / 65**0.5, 0.4 / 65**0.5], rel=1e-5)
    params = [torch.nn.Parameter(torch.zeros(3, device=DEVICE)) for _ in range(2)]
    optimizer = fastsam.SAM(params, base, lr=1.0, **amplified)
    params[0].grad = torch.ones_like(params[0])
    optimizer.first_step()
    params[1].grad = torch.full_like(params[1], 3.0)
    optimizer.second_step()
    if base is torch.optim.Rprop:  # which finds u in .grad
        assert params[1].grad.tolist() == [3.0] * 3


@pytest.mark.parametrize("backend", BACKENDS)
def test_nor_where_its_second_gradient_carries_another_loss_scale(backend):
    params = [torch.nn.Parameter(torch.zeros(1, device=DEVICE)) for _ in range(2)]
    optimizer = fastsam.SAM(params, torch.optim.SGD, lr=1.0, amplify=3.0, backend=backend)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=8.0)
    scaler.scale(torch.zeros((), device=DEVICE))  # from here on it has a scale
    params[0].grad = torch.full_like(params[0], 8.0)
    optimizer.first_step(grad_scaler=scaler)
    for param in params:
        param.grad = torch.full_like(param, 3.0 * 8.0)
    scaler.unscale_(optimizer)
    optimizer.second_step(grad_scaler=scaler)
    assert [-param.item() for param in params] == pytest.approx([7.0, 3.0], rel=1e-6)


def test_steps_in_between_are_the_bases():
    """And what is amplified is as if k were the weight of the sharpness's part."""
    model, loss_fn = model_and_data()
    other, other_loss = model_and_data()
    optimizer = fastsam.SAM(model.parameters(), **SGD, perturb_every=2, amplify=True)
    weighted = fastsam.GNP(other.parameters(), **SGD, alpha=2.0, perturb_every=2)
    for _ in range(4):
        optimizer.step(closure_of(loss_fn))
        weighted.step(closure_of(other_loss))
        assert same(bits(model), bits(other))
    optimizer.perturb_every, weighted.param_groups[0]["alpha"] = 1, 1.0
    weighted.perturb_every = 1
    optimizer.step(closure_of(loss_fn))
    weighted.step(closure_of(other_loss))
    assert all(torch.allclose(x, y) for x, y in zip(bits(model), bits(other), strict=True))


def test_the_steps_of_the_base_cost_what_they_did():
    """No gradient is kept, and where k is 1 nothing is mixed at all."""
    model, loss_fn = model_and_data()
    optimizer = fastsam.SAM(model.parameters(), **SGD, perturb_every=2, amplify=True)
    assert optimizer._mixing is optimizer._mixing is not None
    optimizer.step(closure_of(loss_fn))
    assert optimizer._last.descent is optimizer._mixing
    optimizer.step(closure_of(loss_fn))
    assert optimizer._last.descent is None
    optimizer.perturb_every = 1
    assert optimizer._mixing is None


@pytest.mark.parametrize("cls", [fastsam.LightSAM, fastsam.AdaSAM, fastsam.VaSSO])
def test_classes_whose_descent_is_plain(cls):
    model, loss_fn = model_and_data()
    base = () if cls is not fastsam.VaSSO else (torch.optim.SGD,)
    optimizer = cls(model.parameters(), *base, lr=0.01, rho=0.05, perturb_every=2, amplify=True)
    before = bits(model)
    for _ in range(3):
        optimizer.step(closure_of(loss_fn))
    assert not same(bits(model), before)


@pytest.mark.parametrize(
    ("cls", "kwargs", "match"),
    [
        (fastsam.SAM, {"amplify": 0.0}, "amplify must be True, False or a number above 0"),
        (fastsam.SAM, {"amplify": "x"}, "amplify must be True, False or a number above 0"),
        (fastsam.SAM, {"ascent_steps": 2}, "amplify must be False with ascent_steps=2"),
        (fastsam.GSAM, {}, "amplify must be False with GSAM, whose update is made of both"),
        (fastsam.MSAM, {"momentum": 0.9}, "amplify must be False with MSAM"),
    ],
)
def test_refused_by_name(cls, kwargs, match):
    param = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match=match):
        cls([param], torch.optim.SGD, lr=0.1, **{"amplify": True} | kwargs)
    optimizer = fastsam.SAM([param], torch.optim.SGD, lr=0.1, amplify=True)
    with pytest.raises(ValueError, match="amplify must be False with ascent_steps=2"):
        optimizer.ascent_steps = 2
    optimizer.perturb_every = 2
    with pytest.raises(RuntimeError, match="does not support perturbations by micro-batch"):
        optimizer.step_micro_batches([lambda: None])
