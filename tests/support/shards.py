"""Models and optimizers spread over processes, and what they are compared with."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed._composable.replicate_with_fsdp import replicate
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import fastsam

from conftest import DEVICE
from processes import Fleet, data, network
from registry import (
    COMBINATIONS,
    DTYPES,
    METHODS,
    Base,
    base_of,
    build,
    build_oracle,
    create,
    numpy,
)

#: For tests of the triton backend on CPU tensors.
INTERPRETED = pytest.mark.skipif(DEVICE != "cpu", reason="Triton's interpreter is off")


def wrapped(module, **kwargs):
    return DistributedDataParallel(module, **kwargs)


def gradients(weights, share):
    model = network()
    names = [name for name, _ in model.named_parameters()]
    tensors = [torch.tensor(w, requires_grad=True) for w in weights]
    x, y = share
    output = torch.func.functional_call(model, dict(zip(names, tensors, strict=True)), (x,))
    return numpy(torch.autograd.grad((output - y).square().mean(), tensors))


def formula(method, base, size, steps):
    """m-sharpness, with an oracle for each rank: they share the second gradient's mean."""
    params = list(network().parameters())
    ranks = [
        build_oracle(
            METHODS[method], base_of(method, base), params, [{"params": range(len(params))}],
            DTYPES["fp64"],
        )
        for _ in range(size)
    ]  # fmt: skip
    shares = [data(rank, size) for rank in range(size)]
    for _ in range(steps):
        seconds = [
            gradients(one.ascend(gradients(one.weights, share)), share)
            for one, share in zip(ranks, shares, strict=True)
        ]
        norm = np.sqrt(np.mean([one._n**2 for one in ranks]))
        for one in ranks:
            one._n = norm  # only the descent of SSAM looks at it from here on
            one.descend([np.mean(same, axis=0) for same in zip(*seconds, strict=True)])
    return ranks[0].weights


def gpus():
    return min(2, torch.cuda.device_count())


FOREIGN = Base(torch.optim.RMSprop, "", {"lr": 0.01, "eps": 1e-3, "weight_decay": 0.01})


def mesh_of(kind, device="cpu"):
    size = dist.get_world_size()
    if kind == "replicated":
        shape = (min(2, size), max(1, size // 2))
        return init_device_mesh(device, shape, mesh_dim_names=("replica", "shard"))
    return init_device_mesh(device, (size,))


def sharded(module, kind, **kwargs):
    """``fully_shard`` on a part, or the parts, and the rest; of mixed ones some stay plain."""
    mesh = mesh_of(kind, next(module.parameters()).device.type)
    if kind == "copied":
        return replicate(module, mesh=mesh)
    layers = [layer for layer in module.modules() if isinstance(layer, torch.nn.Linear)]
    plain = {
        p for layer in layers for p in layer.parameters()
        if kind == "mixed" and layer.out_features == 5
    }  # fmt: skip
    for p in plain:
        p.register_post_accumulate_grad_hook(_averaged)
    for part in module.networks[:1] if isinstance(module, Fleet) else layers[::2]:
        fully_shard(part, mesh=mesh, ignored_params=plain, **kwargs)
    return fully_shard(module, mesh=mesh, ignored_params=plain, **kwargs)


def _averaged(param):
    dist.all_reduce(param.grad)
    param.grad /= dist.get_world_size()


def made(method, base, params, backend="torch", **kwargs):
    if base == "rmsprop":
        return build(METHODS[method], FOREIGN, params, None, backend, **kwargs)
    return create(method, params, backend, base, **kwargs)


def whole(tensors):
    """What all shards make, on every rank."""
    return [(x.full_tensor() if isinstance(x, DTensor) else x).detach() for x in tensors]


def squared_error(model, batch):
    x, y = batch
    return (model(x) - y).square().mean()


def closure_of(model, batch):
    def closure():
        loss = squared_error(model, batch)
        loss.backward()
        return loss

    return closure


#: Shards of a parameter draw numbers of their own: not those of one process (``test_noise.py``).
WITHOUT_NOISE = [name for name, method in METHODS.items() if method.cls is not fastsam.TraceSAM]
EVERYTHING = [(name, base) for name, base in COMBINATIONS if name in WITHOUT_NOISE] + [
    (name, "rmsprop") for name in WITHOUT_NOISE if METHODS[name].bases[0] in ("sgd", "adamw")
]


def snapshot(model, optimizer):
    """Copies of this rank's shards, and of everything in the optimizer's state."""
    states = [x for state in optimizer.state.values() for x in state.values()]
    groups = [x for group in optimizer.param_groups for x in group.values()]
    tensors = [x for x in [*model.parameters(), *states, *groups] if isinstance(x, torch.Tensor)]
    return [(x.to_local() if isinstance(x, DTensor) else x).detach().clone() for x in tensors]


def same(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
