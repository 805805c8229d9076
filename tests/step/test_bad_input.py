"""Bad input: an error that names it and what is allowed, before anything changes."""

import pytest
import torch

import fastsam

from networks import bits, model_and_data, same
from registry import BACKENDS, DEVICE

BASE = {"base_optimizer": torch.optim.SGD, "lr": 0.1, "momentum": 0.9}


def make(**kwargs):
    return fastsam.SAM([torch.nn.Parameter(torch.ones(2))], **(BASE | kwargs))


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"rho": -0.1}, ValueError, "rho must be at least 0 and finite, got -0.1"),
        ({"rho": float("nan")}, ValueError, "rho must be at least 0 and finite, got nan"),
        ({"rho": float("inf")}, ValueError, "rho must be at least 0 and finite, got inf"),
        ({"rho": torch.ones(1)}, ValueError, "rho must be a number or a 0-dim tensor"),
        ({"rho": "0.1"}, ValueError, "rho must be at least 0 and finite, got '0.1'"),
        ({"max_grad_norm": "1"}, ValueError, "max_grad_norm must be None or above 0, got '1'"),
        ({"eta": -1.0}, ValueError, "eta must be at least 0 and finite, got -1.0"),
        ({"max_grad_norm": 0.0}, ValueError, "max_grad_norm must be None or above 0, got 0.0"),
        ({"backend": "cuda"}, ValueError, "backend must be one of 'auto', .* got 'cuda'"),
        ({"base_optimizer": torch.nn.Linear}, TypeError, "base_optimizer must be a subclass"),
        ({"base_optimizer": "sgd"}, TypeError, "base_optimizer must be a subclass.* got 'sgd'"),
        ({"base_optimizer": fastsam.SAM}, TypeError, "must not be sharpness-aware itself"),
        ({"base_optimizer": torch.optim.LBFGS}, TypeError, "LBFGS needs one"),
        ({"lr": -1.0}, ValueError, "lr must be at least 0 and finite, got -1.0"),
        ({"typo": 1}, TypeError, "typo"),
        ({"differentiable": True}, ValueError, "differentiable must be False"),
    ],
)
def test_bad_arguments(kwargs, error, message):
    with pytest.raises(error, match=message):
        make(**kwargs)


def test_base_with_a_key_of_ours_is_refused():
    """Adadelta's own rho would be taken for the radius, and the radius for its decay."""
    with pytest.raises(TypeError, match="Adadelta has rho"):
        fastsam.SAM([torch.nn.Parameter(torch.ones(2))], torch.optim.Adadelta, lr=1.0)


@pytest.mark.parametrize("lam", [-0.1, 1.1, "t", None, float("nan")])
def test_bad_lam(lam):
    with pytest.raises(ValueError, match="lam must be"):
        fastsam.UnifiedSAM([torch.nn.Parameter(torch.ones(2))], torch.optim.SGD, lam=lam)


def test_bad_values_set_later_change_nothing():
    model, loss_fn = model_and_data()
    optimizer = fastsam.UnifiedSAM(model.parameters(), lam=lambda t: 3.0, **BASE)
    before = bits(model)
    loss_fn().backward()
    with pytest.raises(ValueError, match="lam must be .* got 3.0"):
        optimizer.first_step()
    optimizer.lam = 0.5
    optimizer.param_groups[0]["rho"] = -1.0
    with pytest.raises(ValueError, match="rho must be"):
        optimizer.first_step()
    assert same(bits(model), before)
    optimizer.param_groups[0]["rho"] = 0.1
    optimizer.first_step()
    optimizer.second_step()
    with pytest.raises(ValueError, match="rho must be"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))], "rho": -1})
    with pytest.raises(ValueError, match="differentiable must be False"):
        extra = torch.nn.Parameter(torch.ones(1))
        optimizer.add_param_group({"params": [extra], "differentiable": True})
    assert len(optimizer.param_groups) == 1
    with pytest.raises(ValueError, match="max_grad_norm must be"):
        optimizer.max_grad_norm = -1.0
    assert optimizer.max_grad_norm is None


@pytest.mark.parametrize("backend", BACKENDS)
def test_sparse_gradient_is_refused(backend):
    torch.manual_seed(0)
    model = torch.nn.Embedding(10, 3, sparse=True, device=DEVICE)
    dense = torch.nn.Parameter(torch.ones(3, device=DEVICE))
    optimizer = fastsam.SAM([dense, model.weight], backend=backend, **BASE)
    index = torch.tensor([1, 2], device=DEVICE)
    before = [dense.detach().clone(), model.weight.detach().clone()]
    (model(index) * dense).sum().backward()
    with pytest.raises(RuntimeError, match="sparse gradients"):
        optimizer.first_step()
    assert same([dense, model.weight], before)
    # in the second pass the weights are restored first
    model.weight.grad = model.weight.grad.to_dense()
    optimizer.first_step(zero_grad=True)
    (model(index) * dense).sum().backward()
    with pytest.raises(RuntimeError, match="sparse gradients"):
        optimizer.second_step()
    assert same([dense, model.weight], before)
    optimizer.zero_grad()
    optimizer.first_step()
    optimizer.second_step()


def test_complex_gradient_is_refused():
    param = torch.nn.Parameter(torch.ones(2, dtype=torch.complex64))
    optimizer = fastsam.SAM([param], **BASE)
    param.grad = torch.ones_like(param)
    with pytest.raises(RuntimeError, match="view_as_real"):
        optimizer.first_step()


def test_overlapping_parameter_is_refused():
    param = torch.nn.Parameter(torch.ones(1, 3, device=DEVICE).expand(4, 3))
    optimizer = fastsam.SAM([param], **BASE)
    param.grad = torch.ones_like(param)
    with pytest.raises(RuntimeError, match=r"memory of their own, got one of shape \(4, 3\)"):
        optimizer.first_step()


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_of_another_shape_is_refused(backend):
    param = torch.nn.Parameter(torch.ones(3, device=DEVICE))
    optimizer = fastsam.SAM([param], backend=backend, **BASE)
    param.grad = torch.ones_like(param)
    param.data = torch.ones(6, device=DEVICE)
    with pytest.raises(RuntimeError, match=r"gradient of shape \(3,\) .* shape \(6,\)"):
        optimizer.first_step()


def test_wrapped_parameters_are_refused():
    from torch.testing._internal.two_tensor import TwoTensor

    param = torch.nn.Parameter(TwoTensor(torch.ones(3), torch.ones(3)))
    optimizer = fastsam.SAM([param], **BASE)
    param.grad = torch.ones_like(param)
    with pytest.raises(RuntimeError, match="SAM does not support"):
        optimizer.first_step()


def test_several_devices_are_refused():
    params = [torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2, device="meta"))]
    optimizer = fastsam.SAM(params, **BASE)
    for p in params:
        p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match="devices of one type, got cpu and meta"):
        optimizer.first_step()
    assert params[0].tolist() == [1, 1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_parameters_warn_once(dtype):
    params = [torch.nn.Parameter(torch.ones(2, dtype=dtype)) for _ in range(3)]
    with pytest.warns(UserWarning, match="rounded away") as caught:
        fastsam.SAM(params, **BASE)
    assert len(caught) == 1
