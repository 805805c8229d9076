"""LETS: checkpoints, copies, groups, and bad input."""

import copy
import pickle
import warnings

import pytest
import torch

import fastsam

from checkpoints import through_disk
from registry import BACKENDS, DEVICE, create
from two_losses import LR, Network, everything, make, same

NAN = float("nan")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("method", "hessian"),
    [("sam", "diag"), ("sam", "difference"), ("unified-1/t", "diag"), ("samar-all", "difference"),
     ("vasso-all", "diag"), ("lightsam-1", "difference")],
)  # fmt: skip
def test_resume_is_exact(method, hessian, backend):
    """In the middle of an interval."""
    options = {"hessian": hessian, "interval": 2}
    _, params, lets, closures = make(backend, method, **options)
    for _ in range(3):
        lets.step(*closures)
    weights = [p.detach() for p in params]
    saved = through_disk({"weights": weights, "optimizer": lets.state_dict()})
    others, resumed, other_closures = make(
        backend, method, wrapped={"lr": 123.0, "rho": 9.0}, **options | {"rho_lr": 5.0}
    )[1:]
    for p, w in zip(others, saved["weights"], strict=True):
        p.data.copy_(w)
    resumed.load_state_dict(saved["optimizer"])
    assert same(everything(others, resumed), everything(params, lets))
    for _ in range(3):
        lets.step(*closures)
        resumed.step(*other_closures)
    assert same(everything(others, resumed), everything(params, lets))


def test_checkpoints_of_the_wrapped_optimizer_alone():
    """LETS turned on late, and off again."""
    _, params, lets, (closure, val_closure) = make(wrapped={"rho": 0.3})
    plain = create("sam", params, "torch", rho=0.07)
    plain.step(closure)
    lets.load_state_dict(through_disk(plain.state_dict()))
    assert float(lets.param_groups[0]["rho"]) == pytest.approx(0.07, rel=1e-12)
    assert same(lets.state[params[0]], plain.state[params[0]])
    lets.step(closure, val_closure)
    plain.load_state_dict(through_disk(lets.state_dict()))
    assert plain.param_groups[0]["rho"] == lets.param_groups[0]["rho"] != 0.07
    plain.step(closure)
    before = everything(params, lets)
    unfit = plain.state_dict()
    unfit["param_groups"][0]["rho"] = 0.0
    with pytest.raises(ValueError, match="rho must be above 0 in the first group"):
        lets.load_state_dict(unfit)
    assert same(everything(params, lets), before)
    del unfit["param_groups"][0]["rho"]  # as of torch.optim: the present radius stays
    lets.load_state_dict(unfit)
    assert same(lets.state_dict()["lets"], before[1]["lets"])


def test_a_checkpoint_from_another_device():
    """Adam counts its steps on a GPU, where it has to be told so, and on a CPU may not."""
    _, _, lets, closures = make()
    lets.step(*closures)
    saved = lets.state_dict()
    here = saved["lets"]["optimizer"]["param_groups"][0]["capturable"]
    saved["lets"]["optimizer"]["param_groups"][0]["capturable"] = not here
    lets.load_state_dict(saved)
    assert lets.rho_optimizer.param_groups[0]["capturable"] == here
    lets.step(*closures)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies(duplicate, backend):
    network, params, lets, closures = make(backend, "samar-all")
    torch.optim.lr_scheduler.ConstantLR(lets)  # wraps step
    lets.step(*closures)
    others, other = duplicate((params, lets))
    assert other.param_groups[0]["params"][0] is others[0]
    assert other.param_groups is other.optimizer.param_groups and other.state is not lets.state
    before = everything(others, other)
    lets.step(*closures)
    assert same(everything(others, other), before)
    other.step(*network.closures(others))
    assert same(everything(others, other), everything(params, lets))
    seen = []
    other.register_state_dict_pre_hook(lambda *_: seen.append(1))
    other.state_dict()
    assert seen == [1]


@pytest.mark.parametrize("backend", BACKENDS)
def test_add_param_group(backend):
    _, params, lets, (closure, val_closure) = make(backend, rho_lr=0.5)
    lets.step(closure, val_closure)
    extra = torch.nn.Parameter(torch.zeros(5, dtype=torch.float64, device=DEVICE))
    first = float(lets.param_groups[0]["rho"])
    lets.add_param_group({"params": [extra], "rho": 0.6, "lr": 0.01})
    assert lets.param_groups is lets.optimizer.param_groups and len(lets.param_groups) == 2
    lets.step(lambda: ((extra - 1).square().sum().backward(), closure())[1], val_closure)
    now = [float(group["rho"]) for group in lets.param_groups]
    assert now[0] != pytest.approx(first, rel=1e-3) and (extra > 0).all()
    assert now[1] / now[0] == pytest.approx(0.6 / first, rel=1e-12)
    with pytest.raises(ValueError, match="rho must be at least 0"):
        lets.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))], "rho": -1.0})
    assert len(lets.param_groups) == 2


def test_schedulers_hooks_names_and_metrics():
    network = Network()
    params = [torch.nn.Parameter(w.clone()) for w in network.start]
    named = [(f"w{k}", p) for k, p in enumerate(params)]
    lets = fastsam.LETS(fastsam.UnifiedSAM(named, torch.optim.SGD, lr=LR))
    assert "LETS" in repr(lets) and "rho: " in repr(lets) and "lam" not in lets.metrics
    closures, seen = network.closures(params), []
    lets.register_step_pre_hook(lambda *_: seen.append("pre"))
    lets.register_step_post_hook(lambda *_: seen.append("post"))
    lets.register_state_dict_pre_hook(lambda *_: seen.append("save"))
    lets.register_load_state_dict_post_hook(lambda *_: seen.append("load"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler = torch.optim.lr_scheduler.StepLR(lets, 1, gamma=0.5)
        for k in range(3):
            assert lets.optimizer.base_optimizer.param_groups[0]["lr"] == LR * 0.5**k
            lets.step(*closures)
            scheduler.step()
    lets.load_state_dict(lets.state_dict())
    assert seen == ["pre", "post"] * 3 + ["save", "load"]
    assert lets.state_dict()["param_groups"][0]["param_names"] == ["w0", "w1", "w2", "w3"]
    metrics = lets.metrics
    names = {"grad_norm", "lam", "rho", "hypergradient", "validation_gap", "perturbed"}
    assert metrics.keys() == names
    assert all(x.ndim == 0 and x.device == params[0].device for x in metrics.values())
    assert metrics["rho"] == lets.param_groups[0]["rho"]  # of the next step
    held = copy.deepcopy(metrics)
    lets.step(*closures)
    assert same(metrics, held) and not same(lets.metrics, held)


def test_a_first_group_without_parameters():
    _, params, lets, closures = make()
    groups = [{"params": []}, {"params": params}]
    lets = fastsam.LETS(fastsam.SAM(groups, torch.optim.SGD, lr=LR))
    lets.step(*closures)
    assert lets._nu.device == params[0].device and lets.metrics["hypergradient"] != 0


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"rho_lr": -0.1}, ValueError, "rho_lr must be at least 0 and finite, got -0.1"),
        ({"rho_optimizer": torch.optim.LBFGS}, TypeError, "must step without a closure, and LBFGS"),
        ({"rho_lr": NAN}, ValueError, "rho_lr must be at least 0 and finite, got nan"),
        ({"rho_lr": "1"}, ValueError, "rho_lr must be at least 0 and finite, got '1'"),
        (
            {"hessian": "exact"},
            ValueError,
            "hessian must be one of 'diag', 'difference', got",
        ),
        ({"interval": 0}, ValueError, "interval must be an integer of at least 1, got 0"),
        ({"interval": 1.5}, ValueError, "interval must be an integer of at least 1, got 1.5"),
        ({"interval": True}, ValueError, "interval must be an integer of at least 1, got True"),
        ({"rho_optimizer": "adam"}, TypeError, "rho_optimizer must be a subclass.* got 'adam'"),
        ({"rho_optimizer": torch.nn.Linear}, TypeError, "rho_optimizer must be a subclass"),
        ({"betas": (2.0, 0.9)}, ValueError, "Invalid beta parameter"),
        ({"typo": 1}, TypeError, "typo"),
        ({"lr": 0.1}, TypeError, "lr"),
    ],
)
def test_bad_arguments(kwargs, error, message):
    wrapped = create("sam", [torch.nn.Parameter(torch.ones(2, device=DEVICE))], "auto")
    with pytest.raises(error, match=message):
        fastsam.LETS(wrapped, **kwargs)
    assert wrapped.param_groups[0]["rho"] == 0.05  # still the number that it was


@pytest.mark.parametrize("rho", [0.0, torch.tensor(0.0)])
def test_a_radius_to_start_from(rho):
    wrapped = fastsam.SAM([torch.nn.Parameter(torch.ones(2))], torch.optim.SGD, rho=rho)
    with pytest.raises(ValueError, match="rho must be above 0 in the first group, to be learned"):
        fastsam.LETS(wrapped)


def test_what_can_be_wrapped():
    params = [torch.nn.Parameter(torch.ones(2))]
    sam = fastsam.SAM(params, torch.optim.SGD)
    for wrong in (torch.optim.SGD(params), fastsam.LETS(sam), fastsam.SAM, None):
        with pytest.raises(TypeError, match="optimizer must be one of fastsam's with a radius"):
            fastsam.LETS(wrong)
