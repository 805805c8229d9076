"""torch's optimizer suite on fastsam's classes: state dicts and copies.

What is left out is listed in ``test_torch_suite.py``.
"""

import copy
import io
import itertools
import pickle

import pytest
import torch
from torch.nn import Parameter

from registry import DEVICE
from torch_suite import Problem, each_class, equal, everyone, run, settings, step


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def named(problem, names):
    """The parameters, with names where they are asked for."""
    return list(zip(("weight", "bias"), problem.params, strict=True)) if names else problem.params


def without_names(state_dict):
    state_dict = copy.deepcopy(state_dict)
    for group in state_dict["param_groups"]:
        group.pop("param_names", None)
    return state_dict


def same_dicts(x, y):
    """Equal with all that is in them, tensors bit for bit, and of the same types."""
    if isinstance(x, dict):
        assert isinstance(y, dict) and list(x) == list(y)
        for key in x:
            same_dicts(x[key], y[key])
    elif isinstance(x, (list, tuple)):
        assert type(x) is type(y) and len(x) == len(y)
        for a, b in zip(x, y, strict=True):
            same_dicts(a, b)
    elif isinstance(x, torch.Tensor):
        assert isinstance(y, torch.Tensor)
        equal(x, y)
    else:
        assert type(x) is type(y) and (x == y or x != x and y != y)


@pytest.mark.parametrize("names", [(0, 0), (0, 1), (1, 0), (1, 1)], ids=str)
@everyone
def test_state_dict_is_deterministic(info, backend, names):
    """Resumed and continued give the same bits, and then the same state dict."""
    for kwargs in itertools.islice(settings(info, backend), 2 if any(names) else None):
        problem = Problem()
        optimizer = info.optim_cls(named(problem, names[0]), **copy.deepcopy(kwargs))
        run(optimizer, problem, 3)
        twin = problem.copy()
        other = info.optim_cls(named(twin, names[1]), **kwargs)
        saved = copy.deepcopy(optimizer.state_dict())
        given = copy.deepcopy(saved)
        other.load_state_dict(given)
        same_dicts(given, saved)
        for _ in range(3):
            step(optimizer, problem.closure)
            step(other, twin.closure)
            equal(twin.params, problem.params)
        mine, its = without_names(optimizer.state_dict()), without_names(other.state_dict())
        for one in (mine, its):  # in which order keys were completed says nothing
            one["param_groups"] = [dict(sorted(group.items())) for group in one["param_groups"]]
        same_dicts(its, mine)
        if any(names):
            assert other.state_dict()["param_groups"][0]["param_names"] == ["weight", "bias"]
        # groups that come twice look the same both times
        other.param_groups.extend(other.param_groups)
        groups = other.state_dict()["param_groups"]
        assert groups[0]["params"] == groups[1]["params"]


@everyone
def test_older_state_dict(info, backend):
    """Without the keys that older versions of torch had not, or that the base alone has not."""
    for kwargs in settings(info, backend):
        problem = Problem()
        optimizer = info.optim_cls(problem.params, **copy.deepcopy(kwargs))
        run(optimizer, problem, 2)
        present = [dict(group) for group in optimizer.param_groups]
        saved = copy.deepcopy(optimizer.state_dict())
        gone = 0
        for group in saved["param_groups"]:
            for key in info.not_og_supported_flags:
                gone += group.pop(key, None) is not None
        assert gone or not info.step_requires_closure
        twin = problem.copy()
        other = info.optim_cls(twin.params, **kwargs)
        ours, theirs = (getattr(x, "optimizer", x) for x in (optimizer, other))  # within LETS
        if hasattr(ours, "kept"):  # what every step changes
            theirs.kept.update(copy.deepcopy(ours.kept))
        other.load_state_dict(saved)
        for group, old in zip(other.param_groups, present, strict=True):
            assert group.keys() == old.keys()
        run(optimizer, problem, 2)
        run(other, twin, 2)
        # what the checkpoint lacks is as before, but maximize, which torch's bases complete
        same = all(torch.equal(p, q) for p, q in zip(problem.params, twin.params, strict=True))
        assert same != (kwargs.get("maximize", False) and info.step_requires_closure)


@everyone
def test_step_that_is_no_tensor(info, backend):
    """As in the checkpoints of old versions of torch."""
    for kwargs in settings(info, backend):
        problem = Problem()
        optimizer = info.optim_cls(problem.params, **kwargs)
        run(optimizer, problem, 3)
        twin, saved = problem.copy(), copy.deepcopy(optimizer.state_dict())
        for entry in saved["state"].values():
            if "step" in entry:
                entry["step"] = float(entry["step"])
        other = info.optim_cls(twin.params, **kwargs)
        other.load_state_dict(saved)
        run(optimizer, problem, 2)
        run(other, twin, 2)
        equal(twin.params, problem.params)


@everyone
def test_flags_of_a_checkpoint_from_another_device(info, backend):
    """fused and capturable as a run on a GPU has saved them: a CPU has none to offer, or others."""
    for kwargs in settings(info, backend):
        problem = Problem()
        optimizer = info.optim_cls(problem.params, **copy.deepcopy(kwargs))
        if "fused" not in optimizer.param_groups[0] or getattr(optimizer, "_base", 1) is None:
            continue
        run(optimizer, problem, 2)
        saved = copy.deepcopy(optimizer.state_dict())
        for group in saved["param_groups"]:
            group.update(dict.fromkeys({"fused", "capturable"} & group.keys(), True))
        for entry in saved["state"].values():
            if "step" in entry:
                entry["step"] = entry["step"].cpu()
        twin = problem.copy()
        other = info.optim_cls(twin.params, **kwargs)
        other.load_state_dict(saved)
        run(optimizer, problem, 2)
        run(other, twin, 2)
        equal(twin.params, problem.params)


@pytest.mark.parametrize("names", [False, True], ids=["plain", "named"])
@everyone
def test_saved_and_loaded_are_equal(info, backend, names):
    for kwargs in settings(info, backend):
        problem = Problem()
        optimizer = info.optim_cls(named(problem, names), **kwargs)
        run(optimizer, problem, 3)
        saved = optimizer.state_dict()
        for weights_only in (False, True):
            buffer = io.BytesIO()
            torch.save(saved, buffer)
            buffer.seek(0)
            same_dicts(torch.load(buffer, weights_only=weights_only), saved)
        same_dicts(pickle.loads(pickle.dumps(saved)), saved)


@each_class
def test_names_of_groups(info):
    """One name a parameter, in every group or in none."""
    kwargs = next(settings(info, "none"))
    weight, bias = Problem().params
    groups = [{"params": [("w", weight)]}, {"params": [("b", bias)]}]
    optimizer = info.optim_cls(groups, **kwargs)
    names = [group["param_names"] for group in optimizer.state_dict()["param_groups"]]
    assert names == [["w"], ["b"]]
    more = Parameter(torch.ones(2, device=DEVICE))
    with pytest.raises(ValueError, match="with/without names"):
        optimizer.add_param_group({"params": [more]})
    optimizer.add_param_group({"params": [("more", more)]})
    assert optimizer.state_dict()["param_groups"][2]["param_names"] == ["more"]
    plain = info.optim_cls([weight, bias], **next(settings(info, "none")))
    with pytest.raises(ValueError, match="with/without names"):
        plain.add_param_group({"params": [("more", more)]})
    assert "param_names" not in plain.state_dict()["param_groups"][0]


# --- copies ---------------------------------------------------------------------------------------


def saved_whole(both):
    buffer = io.BytesIO()
    torch.save(both, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both)), saved_whole],
    ids=["deepcopy", "pickle", "torch.save"],
)
@everyone
def test_copies(info, backend, duplicate):
    """They have every public attribute and go on alike; hooks stay behind, as in torch."""
    for kwargs in settings(info, backend):
        problem = Problem()
        optimizer = info.optim_cls(problem.params, **kwargs)
        seen = []
        optimizer.register_step_pre_hook(lambda *_, seen=seen: seen.append("step"))
        optimizer.register_state_dict_pre_hook(lambda *_, seen=seen: seen.append("save"))
        optimizer.register_load_state_dict_post_hook(lambda *_, seen=seen: seen.append("load"))
        run(optimizer, problem, 2)
        both = duplicate({"problem": problem, "optimizer": optimizer})
        twin, other = both["problem"], both["optimizer"]
        assert type(other) is type(optimizer)
        assert other.param_groups[0]["params"][0] is twin.weight
        public = [{k for k in vars(x) if not k.startswith("_")} for x in (optimizer, other)]
        assert public[0] == public[1]
        seen.clear()
        run(other, twin, 2)
        other.load_state_dict(other.state_dict())
        assert seen == []
        run(optimizer, problem, 2)
        equal(twin.params, problem.params)
        if info.step_requires_closure:
            inner = getattr(other, "optimizer", other)  # LETS holds one
            assert inner.base_optimizer.param_groups is other.param_groups


# --- between devices ------------------------------------------------------------------------------


@pytest.mark.gpu
@each_class
def test_state_dict_from_the_cpu(info):
    """Loaded on a GPU, it is not written to, and both go on alike."""
    backend = "auto" if info.step_requires_closure else "none"
    for case in info.optim_inputs_func(device="cpu"):
        kwargs = case.kwargs | ({} if backend == "none" else {"backend": backend})
        problem = Problem()
        for name in ("weight", "bias"):
            setattr(problem, name, Parameter(getattr(problem, name).detach().cpu()))
        problem.input = problem.input.cpu()
        optimizer = info.optim_cls(problem.params, **copy.deepcopy(kwargs))
        run(optimizer, problem, 3)
        there = problem.copy()
        for name in ("weight", "bias"):
            setattr(there, name, Parameter(getattr(there, name).detach().cuda()))
        there.input = there.input.cuda()
        other = info.optim_cls(there.params, **kwargs)
        # a copy: torch's own loading shares a count of steps that stays on the CPU
        saved, given = (copy.deepcopy(optimizer.state_dict()) for _ in range(2))
        other.load_state_dict(given)
        same_dicts(given, saved)
        for _ in range(5):
            step(optimizer, problem.closure)
            step(other, there.closure)
            # sums in another order: float32's rounding, and what a step makes of it
            equal([p.cpu() for p in there.params], problem.params, rtol=2e-5, atol=2e-5)
