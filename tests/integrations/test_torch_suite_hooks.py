"""torch's optimizer suite on fastsam's classes: hooks of steps, of saving and of loading.

What is left out is listed in ``test_torch_suite.py``.
"""

import copy

import pytest
import torch
from torch.nn import Parameter
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from registry import DEVICE
from torch_optimizers import NEEDED
from torch_suite import Problem, each_class, equal, everyone, run, settings, sharp, step


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


# --- hooks of steps -------------------------------------------------------------------------------


def hooked(seen, *labels):
    return [lambda opt, args, kwargs, label=label: seen.append((label, opt)) for label in labels]


@everyone
def test_step_hooks(info, backend):
    """Each once a step, global ones outside of the optimizer's own; none after it is removed."""
    for kwargs in settings(info, backend):
        param = Parameter(torch.ones(2, device=DEVICE))
        optimizer = info.optim_cls([param], **kwargs)
        seen = []
        pre, post, everyones_pre, everyones_post = hooked(seen, 1, 2, 0, 5)
        handles = [
            optimizer.register_step_pre_hook(pre),
            optimizer.register_step_post_hook(post),
            register_optimizer_step_pre_hook(everyones_pre),
            register_optimizer_step_post_hook(everyones_post),
        ]

        def closure(param=param, seen=seen):
            seen.append((3, None))
            param.grad = torch.ones_like(param)
            return torch.ones((), device=DEVICE)

        try:
            step(optimizer, closure)
        finally:
            for handle in handles:
                handle.remove()
        # what it holds and steps is an optimizer, too: only global hooks see that one
        own = [label for label, opt in seen if opt is optimizer]
        assert own == [0, 1, 2, 5]
        assert {label for label, opt in seen if opt not in (optimizer, None)} <= {0, 5}
        first, last = (next(i for i, x in enumerate(seen[::s]) if x[0] == 3) for s in (1, -1))
        assert seen[0] == (0, optimizer) and 1 in dict(seen[:first]) and 2 in dict(seen[-last:])
        seen.clear()
        step(optimizer, closure)
        assert {label for label, _ in seen} == {3}


@sharp
def test_step_hooks_around_explicit_passes(info):
    """As around ``step``: first what comes first there."""
    if info.name == "LETS":
        pytest.skip("LETS has no explicit passes")
    problem = Problem()
    optimizer = info.optim_cls(problem.params, **next(settings(info, "none")))
    seen = []
    pre, post, everyones_pre, everyones_post = hooked(seen, 1, 2, 0, 5)
    optimizer.register_step_pre_hook(pre)
    optimizer.register_step_post_hook(post)
    handles = [
        register_optimizer_step_pre_hook(everyones_pre),
        register_optimizer_step_post_hook(everyones_post),
    ]
    try:
        problem.closure()
        optimizer.first_step(zero_grad=True)
        problem.closure()
        optimizer.second_step()
    finally:
        for handle in handles:
            handle.remove()
    assert [label for label, _ in seen] == [0, 1, 2, 5]


@each_class
def test_pre_hook_may_change_the_arguments(info):
    """Here: another closure in place of the one that was given."""
    problem = Problem()
    optimizer = info.optim_cls(problem.params, **next(settings(info, "none")))
    called = []

    def other():
        called.append(1)
        return problem.closure()

    optimizer.register_step_pre_hook(
        lambda opt, args, kwargs: ((opt, *[other] * len(args[1:])), kwargs)
    )
    before = problem.loss().item()
    step(optimizer, lambda: pytest.fail("not this one"))
    assert called and problem.loss().item() < before


# --- hooks of state dicts -------------------------------------------------------------------------


def made(info, backend):
    """An optimizer for every input, before its first step, with its problem."""
    for kwargs in settings(info, backend):
        problem = Problem()
        yield info.optim_cls(problem.params, **kwargs), problem


def note(optimizer):
    optimizer.state["test"] = 1


def take_note(optimizer, state_dict):
    state_dict["noted"] = state_dict["state"].pop("test", 0)
    return state_dict


@each_class
def test_state_dict_hooks(info):
    for optimizer, _ in made(info, "none"):
        post = optimizer.register_state_dict_post_hook(take_note)
        assert optimizer.state_dict()["noted"] == 0
        pre = optimizer.register_state_dict_pre_hook(note)
        saved = optimizer.state_dict()
        assert saved["noted"] == 1 and "test" not in saved["state"]
        post.remove()
        assert optimizer.state_dict()["state"]["test"] == 1
        pre.remove()
        assert "noted" not in optimizer.state_dict()


@everyone
def test_stepping_with_a_note_in_the_state(info, backend):
    """What a hook leaves there under a key that is no parameter is left alone, and saved."""
    for optimizer, problem in made(info, backend):
        base = getattr(optimizer, "base_optimizer", None)
        if isinstance(base, torch.optim.Adagrad) and torch.__version__ < "2.13":
            continue  # torch's own could not load such a state
        note(optimizer)
        run(optimizer, problem, 3)
        assert optimizer.state["test"] == 1
        optimizer.load_state_dict(optimizer.state_dict())
        run(optimizer, problem, 1)
        assert optimizer.state["test"] == 1
        copied = copy.deepcopy({"problem": problem, "optimizer": optimizer})
        run(copied["optimizer"], copied["problem"], 1)
        assert copied["optimizer"].state["test"] == 1


def set_lr(optimizer, state_dict):
    state_dict["param_groups"][0]["lr"] = 0.002


def replace_lr(optimizer, state_dict):
    state_dict = copy.deepcopy(state_dict)
    state_dict["param_groups"][0]["lr"] = 0.003
    return state_dict


@each_class
def test_load_state_dict_hooks(info):
    for optimizer, problem in made(info, "none"):
        seen = []
        optimizer.register_load_state_dict_pre_hook(set_lr)
        optimizer.register_load_state_dict_post_hook(
            lambda opt, seen=seen: seen.append(float(opt.param_groups[0]["lr"]))
        )
        saved = optimizer.state_dict()
        optimizer.load_state_dict(saved)
        handle = optimizer.register_load_state_dict_pre_hook(replace_lr, prepend=True)
        optimizer.load_state_dict(saved)
        assert saved["param_groups"][0]["lr"] == 0.002  # written to by the first load
        handle.remove()
        optimizer.register_load_state_dict_pre_hook(replace_lr)
        optimizer.load_state_dict(saved)
        assert seen == [0.002, 0.002, 0.003]
        assert saved["param_groups"][0]["lr"] == 0.002
        before = problem.loss().item()
        run(optimizer, problem, 1)
        assert problem.loss().item() != before


def unwrap(optimizer, state_dict):
    return state_dict["wrapped"]


@each_class
def test_pre_hook_may_bring_another_state_dict(info):
    """What is loaded is what the hook returns, whatever ``load_state_dict`` was given."""
    for optimizer, problem in made(info, "none"):
        run(optimizer, problem, 2)
        saved = copy.deepcopy(optimizer.state_dict())
        optimizer.register_load_state_dict_pre_hook(unwrap)
        own = {key: saved.pop(key) for key in ("lets",) if key in saved}  # LETS's own entry
        run(optimizer, problem, 2)
        optimizer.load_state_dict({"wrapped": saved, **own})
        equal(optimizer.state_dict()["state"], saved["state"])


def narrow(optimizer, state_dict):
    state_dict = copy.deepcopy(state_dict)
    for entry in state_dict["state"].values():
        entry["momentum_buffer"] = torch.full_like(entry["momentum_buffer"], 2.0).bfloat16()
    return state_dict


@sharp
def test_state_of_a_hook_is_the_one_that_counts(info):
    """Its values and its dtype, not those of the state dict that it was made from."""
    if info.name in ("LightSAM", "AdaSAM"):
        pytest.skip("it has no momentum buffer")
    problem = Problem()
    kwargs = {"base_optimizer": torch.optim.SGD, "lr": 0.01, "momentum": 0.9}
    kwargs |= NEEDED.get(info.name, {})
    optimizer = info.optim_cls(problem.params, **kwargs)
    run(optimizer, problem, 1)
    saved = optimizer.state_dict()
    for entry in saved["state"].values():
        entry["momentum_buffer"] = entry["momentum_buffer"].double()
    optimizer.register_load_state_dict_pre_hook(narrow)
    optimizer.load_state_dict(saved)
    for entry in optimizer.state.values():
        assert (entry["momentum_buffer"] == 2).all()
        assert entry["momentum_buffer"].dtype == torch.bfloat16


@sharp
def test_post_hook_sees_what_was_loaded(info):
    """Complete: here a checkpoint that lacks the radius. And what it changes stays."""
    for optimizer, problem in made(info, "none"):
        run(optimizer, problem, 2)
        saved = copy.deepcopy(optimizer.state_dict())
        for group in saved["param_groups"]:
            del group["rho"]
        for entry in saved["state"].values():
            for name in ("exp_avg", "momentum_buffer"):
                if entry.get(name) is not None:
                    entry[name] = entry[name].double()
        seen = []

        def hook(opt, seen=seen):
            seen.append(float(opt.param_groups[0]["rho"]))
            for entry in opt.state.values():
                for name in entry.keys() & {"exp_avg", "momentum_buffer"}:
                    entry[name] = torch.full_like(entry[name], 3.0)

        rho = float(optimizer.param_groups[0]["rho"])
        optimizer.register_load_state_dict_post_hook(hook)
        optimizer.load_state_dict(saved)
        assert seen == [pytest.approx(rho)]
        for entry in optimizer.state.values():
            for name in entry.keys() & {"exp_avg", "momentum_buffer"}:
                assert (entry[name] == 3).all()
