"""torch's optimizer suite on fastsam's classes: errors, directions and learning rates.

Gradients and backends, hooks, and state dicts are in the files ``test_torch_suite_*.py``. The
checks are those of ``TestOptimRenewed`` in torch's repository, and those on optimizers of its
suites for schedulers, the profiler and CUDA, written anew, on the entries of ``fastsam_db``. What
torch compares between ``foreach``, ``fused`` and its loop is compared between backends. Turned
round are the checks with complex parameters, sparse gradients, several types of device and
parameters on meta: those are refused. Left out:

=========================================  =========================================================
test_foreach_large_tensor, test_fused_...  2 ** 32 elements need a GPU with 64 GB and more
test_peak_memory_foreach                   no foreach; ``test_scratch.py`` has what a step may hold
test_defaults_changed_to_foreach           no foreach; ``test_backends.py`` has what "auto" chooses
test_fused_does_not_step_if_foundinf       ``skip_nonfinite`` in its place: ``test_contract.py``
test_rosenbrock_sparse                     sparse gradients are refused; dense here
differentiable (its own suite)             refused where the base is fused: a step cannot be
                                           differentiated through
test_graph_optims (capturable)             ``test_capture.py``
test_grad_scaling_autocast_...             ``test_grad_scaler.py``
CompiledOptimizerParityTests               a step calls the user's backward twice: not traced
the values of schedulers, SWA, EMA         not the optimizer's; their effect on it is here
=========================================  =========================================================
"""

import copy
import warnings

import pytest
import torch
from torch.nn import Parameter
from torch.optim import lr_scheduler, swa_utils
from torch.testing._internal.common_optimizers import (
    OptimizerErrorEnum,
    _get_optim_inputs_including_global_cliquey_kwargs,
)

import fastsam

from registry import APART, DEVICE
from torch_optimizers import NEEDED, fastsam_db
from torch_suite import (
    QUICK,
    Problem,
    each_class,
    equal,
    every_backend,
    everyone,
    run,
    settings,
    step,
)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def goes_right(before, problem, maximize):
    after = problem.loss().item()
    assert after > before if maximize else after < before


# --- the database ---------------------------------------------------------------------------------


@each_class
def test_infos_name_no_implementation(info):
    every = _get_optim_inputs_including_global_cliquey_kwargs(DEVICE, torch.float32, info)
    for case in every:  # torch's own reading of the entries
        assert not case.kwargs.keys() & {"foreach", "fused", "differentiable", "backend"}


def test_every_class_is_registered():
    classes = {x for x in vars(fastsam).values() if isinstance(x, type)}
    optimizers = {cls.__name__ for cls in classes if issubclass(cls, torch.optim.Optimizer)}
    # the suite gives every class a learning rate, and steps without a loss
    apart = {"SAMSPS"} | {cls.__name__ for cls in APART}
    assert {info.name for info in fastsam_db} == optimizers - apart
    assert [info.name for info in fastsam_db if not info.step_requires_closure] == ["AdaGradNorm"]


@each_class
def test_errors(info):
    for case in info.optim_error_inputs_func(device="cpu", dtype=torch.float32):
        given = case.optimizer_error_input
        warns = issubclass(case.error_type, Warning)
        catch = (pytest.warns if warns else pytest.raises)(case.error_type, match=case.error_regex)
        if case.error_on is OptimizerErrorEnum.CONSTRUCTION_ERROR:
            with catch:
                info.optim_cls(given.params, **given.kwargs)
            continue
        optimizer = info.optim_cls(given.params, **given.kwargs)
        grads = [p.grad for p in given.params]

        def closure(params=given.params, grads=grads):
            for p, grad in zip(params, grads, strict=True):
                p.grad = grad
            return torch.ones(())

        with catch:
            step(optimizer, closure)
        assert all((p == 0).all() for p in given.params)


@each_class
def test_a_step_without_a_closure(info):
    problem = Problem()
    optimizer = info.optim_cls(problem.params, **next(settings(info, "none")))
    if info.step_requires_closure:
        with pytest.raises(RuntimeError, match="step needs a closure"):
            optimizer.step()
    else:
        before = problem.closure().item()
        assert optimizer.step() is None
        goes_right(before, problem, maximize=False)


# --- the right direction --------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["contiguous", "strided", "scheduled"])
@every_backend
def test_goes_right_direction(info, backend, how):
    quick = backend in (*QUICK, "none")
    if not quick and how == "scheduled":
        pytest.skip("the interpreter is slow, and schedulers are the same to it")
    for constructors in info.scheduler_inputs if how == "scheduled" else [[]]:
        for kwargs in settings(info, backend):  # anew: steps of schedulers write to tensors
            problem = Problem(contiguous=how != "strided")
            assert problem.weight.is_contiguous() == (how != "strided")
            optimizer = info.optim_cls(problem.params, **kwargs)
            schedulers = [constructor(optimizer) for constructor in constructors]
            before = problem.loss().item()
            run(optimizer, problem, 10 if quick else 2, schedulers)
            goes_right(before, problem, kwargs.get("maximize"))


@everyone
def test_param_group_with_scheduler_goes_right_direction(info, backend):
    for constructors in info.scheduler_inputs:
        problem = Problem()
        groups = [{"params": [problem.weight]}, {"params": [problem.bias], "lr": 0.01}]
        optimizer = info.optim_cls(groups, **next(settings(info, backend)))
        schedulers = [constructor(optimizer) for constructor in constructors]
        before = problem.loss().item()
        run(optimizer, problem, 10, schedulers)
        goes_right(before, problem, maximize=False)


def groups_of(optimizer_class, groups, kwargs):
    """The arguments that can go into groups go there; the rest, and what is required, outside."""
    probe = optimizer_class([Parameter(torch.ones(1, device=DEVICE))], **copy.deepcopy(kwargs))
    inside = {key: value for key, value in kwargs.items() if key in probe.defaults}
    groups = [copy.deepcopy(inside) | group for group in groups]
    return groups, {key: value for key, value in kwargs.items() if key not in inside}


@everyone
def test_param_groups_weight_decay(info, backend):
    for kwargs in settings(info, backend):
        problem = Problem()
        idle = [Parameter(torch.full((3,), 2.0, device=DEVICE)) for _ in range(2)]
        groups = [
            {"params": [problem.weight, idle[0]]},
            {"params": [problem.bias, idle[1]], "weight_decay": 0.0},
        ]
        groups, rest = groups_of(info.optim_cls, groups, kwargs)
        required = {key: kwargs[key] for key in ("lr", "rho") if key in kwargs}
        optimizer = info.optim_cls(groups, **required, **rest)

        def closure(problem=problem, idle=idle):
            for p in idle:
                p.grad = torch.zeros_like(p)
            return problem.closure()

        before = problem.loss().item()
        for _ in range(10):
            step(optimizer, closure)
        goes_right(before, problem, kwargs.get("maximize"))
        assert (idle[1] == 2).all()
        # maximize turns the gradient round, and with it all decay but a decoupled one
        if optimizer.param_groups[0].get("weight_decay", 0) > 0:
            assert (idle[0] != 2).all()


@everyone
def test_param_groups_lr(info, backend):
    for kwargs in settings(info, backend):
        kwargs.setdefault("lr", 1e-3)
        problem = Problem()
        irrelevant = Parameter(torch.randn(2, device=DEVICE))
        groups = [{"params": problem.params}, {"params": [irrelevant], "lr": 1e-28}]
        groups, rest = groups_of(info.optim_cls, groups, kwargs)
        required = {key: kwargs[key] for key in ("rho",) if key in kwargs}
        optimizer = info.optim_cls(groups, lr=1e-28, **required, **rest)
        before, start = problem.loss().item(), irrelevant.detach().clone()

        def closure(problem=problem, irrelevant=irrelevant):
            irrelevant.grad = torch.rand_like(irrelevant)
            return problem.closure()

        for _ in range(10):
            step(optimizer, closure)
        goes_right(before, problem, kwargs.get("maximize"))
        equal(irrelevant.detach(), start)


def radius_of(info):
    """The name of the argument."""
    return "rho_max" if info.name == "LESAM" else "rho"


@everyone
def test_rosenbrock(info, backend):
    """torch's has sparse gradients; with dense ones, of both coordinates or of one in turn."""
    for kwargs in settings(info, backend):
        kwargs["lr"] = 1e-5
        if kwargs.get("rho", 1) != 0 and info.step_requires_closure:
            kwargs[radius_of(info)] = (
                1e-4  # at the start the gradient is 475: for USAM that is a lot
            )
        for one in (False, True):
            param = Parameter(torch.tensor([1.5, 1.5], dtype=torch.float64, device=DEVICE))
            optimizer = info.optim_cls([param], **kwargs)
            mask = torch.ones(2, device=DEVICE)

            def loss_fn(param=param):
                x, y = param
                return (1 - x) ** 2 + 100 * (y - x**2) ** 2

            def closure(param=param, loss_fn=loss_fn, mask=mask):
                param.grad = None
                loss = loss_fn()
                loss.backward()
                param.grad *= mask
                return loss

            before = loss_fn().item()
            for k in range(10):
                if one:
                    mask.copy_(torch.eye(2)[k % 2])
                step(optimizer, closure)
            after = loss_fn().item()
            assert after > before if kwargs.get("maximize") else after < before


# --- learning rates and schedulers ----------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (1, 1)], ids=["0-dim", "1-element"])
@every_backend
def test_tensor_lr(info, backend, shape):
    for kwargs in settings(info, backend):
        kwargs["lr"] = 0.125  # exact in float32, so that both are the same number
        problem = Problem()
        twin = problem.copy()
        optimizer = info.optim_cls(problem.params, **kwargs)
        kwargs["lr"] = torch.full(shape, 0.125, device=DEVICE)
        other = info.optim_cls(twin.params, **kwargs)
        for _ in range(2):
            step(optimizer, problem.closure)
            step(other, twin.closure)
        # one rounds lr to float32 before it is multiplied, the other after that
        equal(twin.params, problem.params, rtol=1e-5, atol=1e-6)


SCHEDULERS = {
    "LambdaLR": lambda opt: lr_scheduler.LambdaLR(opt, lambda k: 0.9**k),
    "MultiplicativeLR": lambda opt: lr_scheduler.MultiplicativeLR(opt, lambda k: 0.9),
    "StepLR": lambda opt: lr_scheduler.StepLR(opt, 2),
    "MultiStepLR": lambda opt: lr_scheduler.MultiStepLR(opt, [1, 3]),
    "ConstantLR": lambda opt: lr_scheduler.ConstantLR(opt, total_iters=2),
    "LinearLR": lambda opt: lr_scheduler.LinearLR(opt, total_iters=3),
    "ExponentialLR": lambda opt: lr_scheduler.ExponentialLR(opt, 0.5),
    "PolynomialLR": lambda opt: lr_scheduler.PolynomialLR(opt, 4),
    "CosineAnnealingLR": lambda opt: lr_scheduler.CosineAnnealingLR(opt, 4),
    "CosineAnnealingWarmRestarts": lambda opt: lr_scheduler.CosineAnnealingWarmRestarts(opt, 2),
    "CyclicLR": lambda opt: lr_scheduler.CyclicLR(opt, 0.001, 0.01, 2, cycle_momentum=cycles(opt)),
    "OneCycleLR": lambda opt: lr_scheduler.OneCycleLR(
        opt, 0.01, total_steps=9, cycle_momentum=cycles(opt)
    ),
    "ChainedScheduler": lambda opt: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(opt), lr_scheduler.ExponentialLR(opt, 0.9)], opt
    ),
    "SequentialLR": lambda opt: lr_scheduler.SequentialLR(
        opt, [lr_scheduler.ConstantLR(opt), lr_scheduler.ExponentialLR(opt, 0.9)], [2]
    ),
    "ReduceLROnPlateau": lambda opt: lr_scheduler.ReduceLROnPlateau(opt, patience=1, threshold=9.0),
    "SWALR": lambda opt: swa_utils.SWALR(opt, 0.005, 2),
}


def cycles(optimizer):
    """Whether it has a momentum that a scheduler may cycle."""
    return bool(optimizer.defaults.keys() & {"momentum", "betas"})


def test_schedulers_are_all_tested():
    known = {
        name
        for name, cls in vars(lr_scheduler).items()
        if isinstance(cls, type) and issubclass(cls, lr_scheduler.LRScheduler)
    }
    assert known - {"LRScheduler", "_LRScheduler"} <= SCHEDULERS.keys()


@each_class
def test_schedulers(info):
    """They set what they set on a plain optimizer of torch's, and nothing warns."""
    kwargs = {"lr": 0.01}
    if info.step_requires_closure:
        kwargs[radius_of(info)] = 0.05
        own = info.name in ("LightSAM", "AdaSAM")
        kwargs |= {} if own else {"base_optimizer": torch.optim.SGD, "momentum": 0.9}
        kwargs |= NEEDED.get(info.name, {})
    watched = ("lr", "momentum", "betas")
    for constructor in SCHEDULERS.values():
        problem = Problem()
        optimizer = info.optim_cls(problem.params, **kwargs)
        plain_cls = torch.optim.SGD if "momentum" in kwargs else torch.optim.Adam
        plain_kwargs = {key: kwargs[key] for key in ("lr", "momentum") if key in kwargs}
        plain = plain_cls(problem.copy().params, **plain_kwargs)
        if not cycles(optimizer):
            plain.defaults.pop("betas")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            schedulers = [constructor(optimizer), constructor(plain)]
            for _ in range(6):
                loss = step(optimizer, problem.closure).detach()
                plain.step()
                for scheduler in schedulers:
                    plateau = isinstance(scheduler, lr_scheduler.ReduceLROnPlateau)
                    scheduler.step(*[loss] * plateau)
                for key in watched if cycles(optimizer) else ("lr",):
                    assert optimizer.param_groups[0].get(key) == plain.param_groups[0].get(key)
        if info.step_requires_closure and info.name != "LETS":
            assert optimizer.base_optimizer.param_groups[0] is optimizer.param_groups[0]
