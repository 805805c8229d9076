"""What is refused: each error says what to use instead, and that then works."""

import functools
import subprocess
import sys
import types

import pytest
import torch
from torch.nn import Parameter

import fastsam

from registry import DEVICE

SGD = {"base_optimizer": torch.optim.SGD, "lr": 0.1, "momentum": 0.9}


def partitioned(size=0):
    """As DeepSpeed leaves a parameter in stage 3: empty, with its own attributes."""
    param = Parameter(torch.ones(size))
    param.ds_id = 3
    return param


@pytest.mark.parametrize("make", [
    lambda params: fastsam.SAM(params, **SGD),
    lambda params: fastsam.VaSSO(params, torch.optim.RMSprop),
    lambda params: fastsam.LightSAM(params, lr=0.1, rho=0.1),
])  # fmt: skip
@pytest.mark.parametrize("as_groups", [False, True])
def test_deepspeed_zero_3(make, as_groups):
    params = [Parameter(torch.ones(2)), partitioned()]
    given = [{"params": [p]} for p in params] if as_groups else params
    with pytest.raises(RuntimeError, match=r"DeepSpeed's ZeRO.* use FSDP2 \(torch\.distributed\.f"):
        make(given)
    optimizer = make(params[:1])
    with pytest.raises(RuntimeError, match="DeepSpeed's ZeRO"):
        optimizer.add_param_group({"params": [partitioned(3)]})
    assert len(optimizer.param_groups) == 1
    params[0].grad = torch.ones(2)
    optimizer.first_step()  # it goes on with what it has
    optimizer.second_step()


@pytest.mark.parametrize("name", ["_fsdp_flattened", "_is_flat_param"])
@pytest.mark.parametrize("late", [False, True])
def test_fully_sharded_data_parallel(late, name):
    """The parameters of the older FSDP, also of a model that it wrapped after the optimizer."""
    param = Parameter(torch.ones(2))
    message = r"FullyShardedDataParallel.* use FSDP2 \(torch\.distributed\.fsdp\.fully_shard\)"
    if late:
        optimizer = fastsam.SAM([param], **SGD)
    setattr(param, name, True)
    if late:
        param.grad = torch.ones(2)
        with pytest.raises(RuntimeError, match=message):
            optimizer.first_step()
    else:
        with pytest.raises(RuntimeError, match=message):
            fastsam.SAM([param], **SGD)
    assert param.tolist() == [1, 1]


def test_deepspeed_engines(monkeypatch):
    """They step without a closure, whatever the stage; the error knows that they are there."""
    param = Parameter(torch.ones(2))
    optimizer = fastsam.SAM([param], **SGD)
    param.grad = torch.ones(2)
    monkeypatch.delitem(sys.modules, "deepspeed", raising=False)
    with pytest.raises(RuntimeError, match="needs a closure") as plain:
        optimizer.step()
    assert "DeepSpeed" not in str(plain.value)
    monkeypatch.setitem(sys.modules, "deepspeed", types.ModuleType("deepspeed"))
    with pytest.raises(RuntimeError, match=r"needs a closure.*DeepSpeed's ZeRO, FSDP2 \(torch\.di"):
        optimizer.step()
    assert param.tolist() == [1, 1] and not optimizer.state


def test_grad_scaler_that_steps():
    """torch's own way with a loss scale calls ``step`` without a closure."""
    param = Parameter(torch.ones(2, device=DEVICE))
    optimizer = fastsam.SAM([param], **SGD)
    scaler = torch.amp.GradScaler(DEVICE)
    scaler.scale(param.sum()).backward()
    with pytest.raises(
        RuntimeError, match=r"step\(closure, grad_scaler=scaler\) instead of scaler"
    ):
        scaler.step(optimizer)


def test_accumulation_before_a_closure_of_the_last_micro_batch():
    """Lightning's closure is a partial function of its module, which knows its trainer."""
    param = Parameter(torch.ones(2))
    optimizer = fastsam.SAM([param], **SGD)

    def closure(module):
        param.sum().backward()

    trainer = types.SimpleNamespace(accumulate_grad_batches=4)
    module = types.SimpleNamespace(_trainer=trainer)
    with pytest.raises(
        RuntimeError, match="accumulate_grad_batches must be 1 .* got 4; use manual"
    ):
        optimizer.step(functools.partial(closure, module))
    assert param.tolist() == [1, 1]
    for allowed in (1, None):
        trainer.accumulate_grad_batches = allowed
        optimizer.step(functools.partial(closure, module))
    optimizer.step(functools.partial(closure, None))
    optimizer.step(functools.partial(closure, module=None))


def test_sparse_gradient():
    """The embedding that the error names trains, rows that no batch has included."""
    torch.manual_seed(0)
    index = torch.tensor([[1, 2], [2, 5]], device=DEVICE)
    weight = torch.randn(7, 3, device=DEVICE, dtype=torch.float64)
    sparse = torch.nn.Embedding.from_pretrained(weight.clone(), freeze=False, sparse=True)
    sam = fastsam.SAM(sparse.parameters(), **SGD)
    with pytest.raises(
        RuntimeError, match="sparse gradients, .* torch.nn.Embedding with sparse=Fa"
    ):
        sam.step(lambda: sparse(index).square().sum().backward())
    assert torch.equal(sparse.weight, weight)
    dense = torch.nn.Embedding.from_pretrained(weight.clone(), freeze=False, sparse=False)
    sam = fastsam.SAM(dense.parameters(), **SGD, rho=0.1)
    sam.step(lambda: dense(index).square().sum().backward())
    count = torch.zeros(7, 1, dtype=weight.dtype, device=DEVICE)
    count[[1, 2, 5]] = torch.tensor([[1.0], [2.0], [1.0]], dtype=weight.dtype, device=DEVICE)
    grad = 2 * count * weight
    perturbed = weight + 0.1 * grad / grad.norm()
    torch.testing.assert_close(dense.weight, weight - 0.1 * 2 * count * perturbed)


def test_complex_parameter():
    """Its real view trains: SAM's norm is that of the complex gradient."""
    torch.manual_seed(0)
    weight = torch.randn(4, dtype=torch.complex128, device=DEVICE)
    target = torch.randn(4, dtype=torch.complex128, device=DEVICE)
    param = Parameter(weight.clone())
    sam = fastsam.SAM([param], **SGD)
    with pytest.raises(RuntimeError, match="make torch.view_as_real.* torch.view_as_complex of it"):
        sam.step(lambda: (param - target).abs().square().sum().backward())
    assert torch.equal(param, weight)
    real = Parameter(torch.view_as_real(weight).clone())
    sam = fastsam.SAM([real], **SGD, rho=0.1)
    sam.step(lambda: (torch.view_as_complex(real) - target).abs().square().sum().backward())
    grad = 2 * (weight - target)
    second = 2 * (weight + 0.1 * grad / grad.norm() - target)
    torch.testing.assert_close(torch.view_as_complex(real.detach()), weight - 0.1 * second)


def test_frameworks_are_imported_only_when_used():
    names = "transformers", "accelerate", "lightning", "pytorch_lightning", "deepspeed"
    code = f"import sys, fastsam\nprint({set(names)!r} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout == "set()\n", run.stderr
