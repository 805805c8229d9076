"""Checkpoints of sharded training, taken up by another number of processes."""

from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor

import processes
from processes import data, small_network
from shards import closure_of, made, sharded

#: What has state of its own in different places: the method, its base, and other arguments.
CASES = {
    "sam": ("sam", "adam-amsgrad", {}),
    "base-step-count": ("ssam", "adamw", {"perturb_every": 3}),
    "t": ("unified-1/t", "sgd-momentum", {}),
    "squared_norms": ("sam", "adagrad_norm", {}),
    "ema": ("vasso", "adagrad", {}),
    "lam": ("samar", "sgd-momentum", {}),
    "ascent_squared_norms": ("lightsam-1", "", {}),
    "ascent_sum": ("lightsam-2", "", {}),
    "ascent_exp_avg": ("lightsam-3", "", {}),
    "foreign": ("vasso", "rmsprop", {}),
    "master_weights": ("adasam", "", {"master_weights": True}),
    "rounding_step": ("sam", "adamw", {"rounding": "stochastic", "seed": 7}),
}
ROUTES = ["functions", "flattened", "plain"]


@pytest.fixture(scope="module", autouse=True)
def _end_processes():
    yield
    processes.close()


def start(name, size, rank):
    """A model, sharded where there are several processes, its optimizer and its closure."""
    method, base, kwargs = CASES[name]
    dtype = torch.bfloat16 if kwargs.keys() & {"master_weights", "rounding"} else torch.float64
    model = small_network(dtype)
    if size > 1:
        sharded(model, "sharded")
    params = list(model.parameters())
    groups = [{"params": params[:1], "rho": 0.02}, {"params": params[1:]}]
    optimizer = made(method, base, groups, **kwargs)
    x, y = data(rank, size, dtype)
    return model, optimizer, closure_of(model, (x, y))


def whole(x):
    if isinstance(x, DTensor):
        x = x.full_tensor()
    return x.detach().clone() if isinstance(x, torch.Tensor) else x


def everything(model, optimizer):
    """Weights, state and groups, in the order of the parameters."""
    state = [
        {key: whole(x) for key, x in sorted(optimizer.state[p].items())} for p in model.parameters()
    ]
    groups = [
        {
            key: whole(x)
            for key, x in sorted(group.items())
            if key != "params" and not key.startswith("fastsam_")
        }
        for group in optimizer.param_groups
    ]
    groups.append({key: whole(x) for key, x in sorted(optimizer.kept.items())})
    return [whole(p) for p in model.parameters()], state, groups


def gathered(runs, route):
    """The state dict that is saved, or that a checkpoint is loaded into."""
    options = StateDictOptions(flatten_optimizer_state_dict=route == "flattened")
    return {
        name: {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict()
            if route == "plain"
            else get_optimizer_state_dict(model, optimizer, options=options),
        }
        for name, (model, optimizer, _) in runs.items()
    }


def stepped(runs, steps):
    """What everything is after some more steps."""
    for _, optimizer, closure in runs.values():
        for _ in range(steps):
            optimizer.step(closure)
    return {name: everything(model, optimizer) for name, (model, optimizer, _) in runs.items()}


def saved(rank, size, directory):
    """Trains, saves and trains on."""
    runs = {name: start(name, size, rank) for name in CASES}
    before = stepped(runs, 4)
    for route in ROUTES:
        dcp.save(gathered(runs, route), checkpoint_id=Path(directory) / route)
    return before, stepped(runs, 2)


def loaded(rank, size, directory, route):
    """Takes it up in new objects."""
    runs = {name: start(name, size, rank) for name in CASES}
    if route == "plain":  # which has to find tensors to load into
        stepped(runs, 1)
    states = gathered(runs, route)
    dcp.load(states, checkpoint_id=Path(directory) / route)
    for name, (model, optimizer, _) in runs.items():
        model.load_state_dict(states[name]["model"])
        if route == "plain":
            optimizer.load_state_dict(states[name]["optimizer"])
        else:
            options = StateDictOptions(flatten_optimizer_state_dict=route == "flattened")
            set_optimizer_state_dict(model, optimizer, states[name]["optimizer"], options=options)
    return stepped(runs, 0), stepped(runs, 2)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    directory = str(tmp_path_factory.mktemp("checkpoint"))
    return directory, processes.run(2, saved, directory)[0]


@pytest.mark.parametrize(
    ("route", "size"),
    [("functions", 1), ("functions", 2), ("functions", 4), ("flattened", 4), ("plain", 1),
     ("plain", 4)],
)  # fmt: skip
def test_resharded(route, size, uninterrupted):
    """Two processes' state is loaded bit for bit; what follows differs by the order of sums."""
    directory, (before, after) = uninterrupted
    for same, later in processes.run(size, loaded, directory, route):
        torch.testing.assert_close(same, before, rtol=0, atol=0, equal_nan=True)
        for name in CASES:
            if size == 2:
                torch.testing.assert_close(later[name], after[name], rtol=0, atol=0)
            elif after[name][0][0].dtype == torch.float64:
                # in bfloat16 gradients are rounded before they are added up
                torch.testing.assert_close(later[name], after[name], rtol=1e-14, atol=2e-14)
