"""Tensor-parallel parameters: sharded, replicated or plain, alone and with FSDP2 on top."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

import processes
from processes import Fleet, data, difference, train
from shards import EVERYTHING, INTERPRETED, closure_of, made, same, snapshot, squared_error, whole


@pytest.fixture(scope="module", autouse=True)
def _end_processes():
    yield
    processes.close()


def network():
    """34 columns are 17 for each rank, which FSDP2 then divides into 9 and 8."""
    torch.manual_seed(0)
    layers = (
        nn.Linear(7, 34), nn.Tanh(), nn.Linear(34, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 1)
    )  # fmt: skip
    return nn.Sequential(*layers).double()


def parallel(module, size):
    """The networks in ``module``, over two ranks, or over two times two with FSDP2.

    The samples are divided between the ranks for the normalisation, so that its parameters'
    gradients are partial sums. The last layer is not parallel: its parameters are plain tensors,
    or those of FSDP2 alone.
    """
    mesh = init_device_mesh("cpu", (size // 2, 2), mesh_dim_names=("data", "tensor"))
    for one in module.networks if isinstance(module, Fleet) else [module]:
        plan = {
            "0": ColwiseParallel(),
            "2": RowwiseParallel(output_layouts=Shard(0)),
            "3": SequenceParallel(sequence_dim=0),
            "5": PrepareModuleInput(
                input_layouts=Shard(0), desired_input_layouts=Replicate(), use_local_output=True
            ),
        }
        parallelize_module(one, mesh["tensor"], plan)
        if size > 2 and isinstance(module, Fleet):
            fully_shard(one[0], mesh=mesh["data"])
    if size > 2:
        fully_shard(module, mesh=mesh["data"])
    return module


def share(rank, size):
    """The data of the ranks that have the same."""
    return data(rank // 2, size // 2)


def one_process(rank, size, combinations, backend, steps):
    fleets = [Fleet(len(combinations), network) for _ in range(2)]
    parallel(fleets[0], size)
    for fleet, batch in zip(fleets, (share(rank, size), data()), strict=True):
        several = [
            made(method, base, one.parameters(), backend)
            for one, (method, base) in zip(fleet.networks, combinations, strict=True)
        ]
        train(fleet, several, batch, steps)
    return difference(whole(fleets[0].parameters()), list(fleets[1].parameters()))


@pytest.mark.parametrize(
    ("size", "backend", "combinations", "steps"),
    [
        (2, "torch", EVERYTHING[::6], 3),
        (2, "reference", EVERYTHING[2::16], 3),
        pytest.param(2, "triton", [("samar-all", "adagrad_norm")], 1, marks=INTERPRETED),
        (4, "torch", EVERYTHING[1::16], 3),
        (4, "reference", EVERYTHING[3::40], 2),
        pytest.param(4, "triton", [("ssam-adaptive-clip", "adamw")], 1, marks=INTERPRETED),
    ],
)
def test_equal_to_one_process(size, backend, combinations, steps):
    """Only the order of sums differs: roundings of 2**-53, grown a little."""
    assert max(processes.run(size, one_process, combinations, backend, steps)) < 2e-14


def kinds(rank, size):
    """Placements of parameters and gradients, and what a step leaves of the latter."""
    model, alone = parallel(network(), size), network()
    squared_error(model, share(rank, size)).backward()
    placements = [
        (str(p.placements), str(p.grad.placements)) if isinstance(p, DTensor) else ("", "")
        for p in model.parameters()
    ]
    for p in model.parameters():
        p.grad = None
    several = [made("ssam", "rmsprop", m.parameters()) for m in (model, alone)]
    several[0].step(closure_of(model, share(rank, size)))
    several[1].step(closure_of(alone, data()))
    grads = [[p.grad for p in m.parameters()] for m in (model, alone)]
    return placements, difference(*map(whole, grads))


def test_gradients_that_are_partial_sums():
    """The base that is not fused finds its final gradient in the place of each."""
    for placements, worst in processes.run(2, kinds):
        assert ("(Replicate(),)", "(Partial(sum),)") in placements
        assert ("", "") in placements
        assert worst < 2e-14
    for placements, worst in processes.run(4, kinds):
        assert any("_StridedShard" in of_param for of_param, _ in placements)
        assert worst < 2e-14


def communication(rank, size, method):
    """The optimizer's own all-reduces in each half of a step."""
    model = parallel(network(), size)
    optimizer = made(method, "adamw", model.parameters())
    plain_all_reduce, seen, halves = dist.all_reduce, [], []

    def noted(x, *args, **kwargs):
        seen.append(x.numel())
        return plain_all_reduce(x, *args, **kwargs)

    for half in (optimizer.first_step, optimizer.second_step):
        squared_error(model, share(rank, size)).backward()
        dist.all_reduce = noted
        try:
            half(zero_grad=True)
        finally:
            dist.all_reduce = plain_all_reduce
        halves.append(seen[:])
        seen.clear()
    return halves


def test_one_all_reduce_for_each_dimension():
    """Of parameters sharded along both dimensions, and of those along one of them, together."""
    for halves in processes.run(2, communication, "ssam"):
        assert halves == [[1], [1]]
    for halves in processes.run(4, communication, "ssam"):
        assert halves == [[2, 1]] * 2


def nonfinite(rank, size, backend):
    """One element of one shard of the second gradients is NaN."""
    model = parallel(network(), size)
    optimizer = made("vasso", "adamw", model.parameters(), backend, skip_nonfinite=True)
    moved = []
    for step in range(3):
        before = snapshot(model, optimizer)
        for i, half in enumerate((optimizer.first_step, optimizer.second_step)):
            squared_error(model, share(rank, size)).backward()
            if step == 1 and i == 1 and rank == size - 1:
                model[0].weight.grad.to_local()[-1, -1] = float("nan")
            half(zero_grad=True)
        moved.append(not same(before, snapshot(model, optimizer)))
    return moved


@pytest.mark.parametrize(("size", "backend"), [(2, "reference"), (4, "torch")])
def test_all_ranks_skip(size, backend):
    assert processes.run(size, nonfinite, backend) == [[True, False, True]] * size


def failing(rank, size):
    """The second call of a closure fails on all ranks."""
    ends = []
    for fails in (True, False):
        model = parallel(network(), size)
        optimizer = made("ssam", "adamw", model.parameters())
        closure = closure_of(model, share(rank, size))
        calls = []

        def failing(closure=closure, calls=calls):
            calls.append(closure())
            if len(calls) == 2:
                raise ValueError("no")

        optimizer.step(closure)
        before = snapshot(model, optimizer)
        if fails:
            with pytest.raises(ValueError, match="no"):
                optimizer.step(failing)
            assert same(before, snapshot(model, optimizer))
        optimizer.step(closure)
        ends.append(snapshot(model, optimizer))
    return same(*ends)


@pytest.mark.parametrize("size", [2, 4])
def test_failures_on_all_ranks_change_nothing(size):
    assert all(processes.run(size, failing))
