"""One owner for every fact: what people do to an optimizer's groups, state and parameters."""

import copy
import gc
import weakref

import pytest
import torch

import fastsam

from conftest import DEVICE
from registry import BACKENDS

SHAPES = [(33,), (5, 7), (1040,)]
ADAMW = {"lr": 0.02, "eps": 1e-3}
UNFUSED = (torch.optim.RMSprop, {"lr": 0.01})


def parameters(seed=0):
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(shape, generator=generator) for shape in SHAPES]
    return [torch.nn.Parameter(x.to(DEVICE)) for x in tensors]


def give_gradients(params):
    for param in params:
        param.grad = torch.sin(3 * param.detach())


def step(optimizer, params=None):
    """Both passes, along a gradient that depends on where it is taken."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for half in (optimizer.first_step, optimizer.second_step):
        give_gradients(params)
        half()


def equal(xs, ys):
    return all(map(torch.equal, xs, ys))


def make(params, backend="torch", cls=fastsam.SAM, base=torch.optim.AdamW, **kwargs):
    return cls(params, base, backend=backend, **(ADAMW | kwargs))


# --- what is done to the base ---


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("base", [torch.optim.AdamW, torch.optim.RMSprop])
@pytest.mark.parametrize("own", [True, False])
def test_loading_into_the_base(base, own, backend):
    """How people resume the usual class; a checkpoint of ours, or of the base alone."""
    params, saved_params = parameters(), parameters()
    kwargs = {"lr": 0.02, "eps": 1e-3}
    saved = fastsam.SAM(saved_params, base, rho=0.3, backend=backend, **kwargs)
    for _ in range(5):
        step(saved)
    checkpoint = copy.deepcopy(saved.state_dict())
    if not own:
        keep = base([torch.nn.Parameter(torch.zeros(1))], **kwargs).defaults.keys() | {"params"}
        checkpoint["param_groups"] = [
            {key: x for key, x in group.items() if key in keep}
            for group in checkpoint["param_groups"]
        ]
    optimizer = fastsam.SAM(params, base, rho=0.3, backend=backend, **(kwargs | {"lr": 0.5}))
    step(optimizer)
    for param, value in zip(params, saved_params, strict=True):
        param.data.copy_(value)
    optimizer.base_optimizer.load_state_dict(checkpoint)
    assert optimizer.state is optimizer.base_optimizer.state
    assert optimizer.param_groups is optimizer.base_optimizer.param_groups
    assert optimizer.param_groups[0]["lr"] == 0.02
    assert all(float(optimizer.state[p]["step"]) == 5 for p in params)
    assert optimizer.kept["t"] == (6 if own else 2)
    step(saved)
    step(optimizer)
    assert equal(params, saved_params)
    assert all(float(optimizer.state[p]["step"]) == 6 for p in params)


def test_loading_into_the_base_between_the_passes_is_refused():
    optimizer = make(parameters())
    step(optimizer)
    give_gradients(optimizer.param_groups[0]["params"])
    optimizer.first_step()
    with pytest.raises(RuntimeError, match="expected second_step"):
        optimizer.base_optimizer.load_state_dict(optimizer.state_dict())
    optimizer.restore()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_group_added_to_the_base(backend):
    """It gets the defaults of ours, and is stepped."""
    params = parameters()
    optimizer = make(params[:2], backend, rho=0.3)
    step(optimizer)
    optimizer.base_optimizer.add_param_group({"params": [params[2]], "lr": 0.1})
    before = params[2].detach().clone()
    step(optimizer)
    assert not torch.equal(params[2], before)
    group = optimizer.param_groups[1]
    assert (group["rho"], group["adaptive"], group["lr"]) == (0.3, False, 0.1)


def test_setstate_of_the_base():
    params = parameters()
    optimizer = make(params)
    step(optimizer)
    other = make(parameters())
    state = {"state": other.state, "param_groups": optimizer.param_groups}
    optimizer.base_optimizer.__setstate__(state)
    assert optimizer.state is other.state


@pytest.mark.parametrize("base", [torch.optim.AdamW, torch.optim.RMSprop])
def test_step_hooks_of_the_base_run(base):
    """Around its part of the step: what the first changes in the gradients counts."""
    params, seen = parameters(), []
    optimizer = fastsam.SAM(params, base, lr=0.1, rho=0.1, backend="torch")

    def pre(opt, args, kwargs):
        seen.append("pre")
        for param in params:
            param.grad.zero_()

    optimizer.base_optimizer.register_step_pre_hook(pre)
    optimizer.base_optimizer.register_step_post_hook(lambda *_: seen.append("post"))
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
    before = [p.detach().clone() for p in params]
    step(optimizer)
    assert seen == ["pre", "post"]
    assert equal(params, before)
    give_gradients(params)
    optimizer.plain_step()
    assert seen == ["pre", "post"] * 2


# --- what is assigned ---


@pytest.mark.parametrize("base", [torch.optim.AdamW, torch.optim.RMSprop])
def test_assigned_state_and_groups_are_the_bases_too(base):
    from collections import defaultdict

    params = parameters()
    optimizer = fastsam.SAM(params, base, lr=0.02, rho=0.1, backend="torch")
    twin_params = parameters()
    twin = fastsam.SAM(twin_params, base, lr=0.02, rho=0.1, backend="torch")
    step(optimizer)
    optimizer.state = defaultdict(dict)
    assert optimizer.base_optimizer.state is optimizer.state
    for param, value in zip(params, twin_params, strict=True):
        param.data.copy_(value)
    step(optimizer)
    step(twin)
    assert equal(params, twin_params)  # it began anew
    groups = [{**optimizer.param_groups[0], "lr": 0.5}]
    optimizer.param_groups = groups
    assert optimizer.base_optimizer.param_groups is groups
    lets = fastsam.LETS(optimizer)
    lets.state = state = defaultdict(dict)
    assert optimizer.state is state and optimizer.base_optimizer.state is state


# --- what is done to the list of groups ---

OWN = {
    "unified-1/t": lambda groups: fastsam.UnifiedSAM(
        groups, torch.optim.SGD, lam="1/t", lr=0.1, backend="torch"
    ),
    "samar": lambda groups: fastsam.SAMAR(groups, torch.optim.SGD, lr=0.1, backend="torch"),
    "lightsam-1": lambda groups: fastsam.LightSAM(
        groups, lr=0.1, rho=0.1, rule="adagrad_norm", backend="torch"
    ),
    "adagrad_norm": lambda groups: fastsam.SAM(
        groups, fastsam.AdaGradNorm, lr=0.1, backend="torch"
    ),
}
EDITS = {
    "removed": lambda groups: groups.pop(0),
    "reversed": lambda groups: groups.reverse(),
    "copied": lambda groups: groups.__setitem__(slice(None), [dict(g) for g in groups]),
    "inserted": lambda groups: groups.insert(0, groups.pop()),
}


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("method", OWN)
def test_groups_are_edited(method, edit):
    """As with torch's optimizers: counts and accumulators go on, wherever they had been kept."""
    params = parameters()
    optimizer = OWN[method]([{"params": [p]} for p in params])
    for _ in range(3):
        step(optimizer)
    before = {key: float(x) for key, x in optimizer.kept.items()}
    EDITS[edit](optimizer.param_groups)
    step(optimizer)
    assert optimizer.kept["t"] == 5
    for key in ("squared_norms", "ascent_squared_norms"):
        if key in before:
            assert float(optimizer.kept[key]) > before[key]


@pytest.mark.parametrize("method", OWN)
def test_a_state_dict_with_its_groups_in_another_order(method):
    params, others = parameters(), parameters()
    optimizer = OWN[method]([{"params": [p]} for p in params])
    for _ in range(3):
        step(optimizer)
    resumed = OWN[method]([{"params": [p]} for p in reversed(others)])
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"].reverse()
    for param, value in zip(others, params, strict=True):
        param.data.copy_(value)
    resumed.load_state_dict(saved)
    assert {k: float(x) for k, x in resumed.kept.items()} == pytest.approx(
        {k: float(x) for k, x in optimizer.kept.items()}, nan_ok=True
    )
    step(optimizer)
    step(resumed)
    for ours, theirs in zip(others, params, strict=True):
        torch.testing.assert_close(ours, theirs)  # norms add up in another order


def test_two_optimizers_over_one_list_of_groups():
    """Numbers of the groups are shared, as with torch's; what belongs to an optimizer is not."""
    params = parameters()
    groups = [{"params": params}]
    first = OWN["lightsam-1"](groups)
    for _ in range(3):
        step(first)
    second = OWN["lightsam-1"](first.param_groups)
    assert second.kept["t"] == 1
    assert float(second.kept["ascent_squared_norms"]) == pytest.approx(1e-16)
    count = first.kept["t"]
    step(second)
    assert first.kept["t"] == count and second.kept["t"] == 2


def test_a_users_own_key_t():
    params = parameters()
    optimizer = make([{"params": params, "t": "mine"}])
    step(optimizer)
    assert optimizer.param_groups[0]["t"] == "mine" and optimizer.kept["t"] == 2
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.param_groups[0]["t"] == "mine" and optimizer.kept["t"] == 2


# --- names in the state ---


class Averaging(torch.optim.SGD):
    """A base that is not fused, with an average of its own that has VaSSO's usual name."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for param in group["params"]:
                ema = self.state[param].setdefault("ema", torch.zeros_like(param))
                ema.mul_(0.5).add_(param.grad)
                param.sub_(group["lr"] * ema)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_base_with_an_average_of_its_own(backend):
    params, others = parameters(), parameters()
    optimizer = fastsam.VaSSO(params, Averaging, theta=1.0, lr=0.1, rho=0.2, backend=backend)
    plain = Averaging(others, lr=0.1)
    for _ in range(4):
        give_gradients(others)
        n = torch.stack([p.grad.norm() for p in others]).norm()
        kept = [p.detach().clone() for p in others]
        with torch.no_grad():
            for p in others:
                p.add_(p.grad, alpha=float(0.2 / (n + 1e-7)))
        give_gradients(others)
        with torch.no_grad():
            for p, w in zip(others, kept, strict=True):
                p.copy_(w)
        plain.step()
        step(optimizer)
    for ours, theirs in zip(params, others, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert optimizer.state[params[0]].keys() == {"ema", "ascent_ema"}


# --- parameters that change between the passes ---


def transposed(param):
    return param.data.t().contiguous().t()


CHANGES = {
    "bfloat16": lambda param: param.data.bfloat16(),
    "double": lambda param: param.data.double(),
    "strides": lambda param: transposed(param) if param.dim() == 2 else param.data,
    "elsewhere": lambda param: param.data.clone(),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("which", ["one", "all"])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.filterwarnings("ignore:some parameters are")
def test_parameters_that_change_between_the_passes(change, which, backend):
    """Restored all the same, and updated from there."""
    params = parameters()
    optimizer = fastsam.SAM(params, torch.optim.SGD, lr=0.5, rho=1.0, backend=backend)
    for _ in range(2):
        step(optimizer)
    before = [p.detach().clone() for p in params]
    give_gradients(params)
    optimizer.first_step()
    for param in params[1:2] if which == "one" else params:
        param.grad = None
        param.data = CHANGES[change](param)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.second_step()
    for param, w in zip(params, before, strict=True):
        expected = (w.to(param.dtype).double() - 0.5).to(param.dtype)
        # in 16 bits: from w itself, or from w rounded
        half = param.dtype == torch.bfloat16
        tolerance = {"rtol": 2**-7, "atol": 2**-8} if half else {}
        torch.testing.assert_close(param.detach(), expected, **tolerance)
    step(optimizer)
    assert all(p.isfinite().all() for p in params)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.filterwarnings("ignore:some parameters are")
def test_undone_after_parameters_have_changed(change, backend):
    params = parameters()
    optimizer = fastsam.SAM(params, torch.optim.SGD, lr=0.5, rho=1.0, backend=backend)
    step(optimizer)
    before = [p.detach().clone() for p in params]
    give_gradients(params)
    optimizer.first_step()
    for param in params:
        param.grad = None
        param.data = CHANGES[change](param)
    optimizer.restore()
    for param, w in zip(params, before, strict=True):
        assert torch.equal(param.detach(), w.to(param.dtype))


# --- parameters that are dropped ---


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("method", ["sam", "vasso", "samar", "light"])
def test_dropped_parameters_are_gone(method, backend):
    """Without a garbage collection, once a step has been taken without them."""
    make_one = {
        "sam": lambda ps: make(ps, backend),
        "vasso": lambda ps: make(ps, backend, fastsam.VaSSO),
        "samar": lambda ps: make(ps, backend, fastsam.SAMAR),
        "light": lambda ps: fastsam.LightSAM(ps, lr=0.01, rho=0.01, backend=backend),
    }[method]
    optimizer = make_one(parameters())
    gc.collect()
    gc.disable()
    try:
        dropped = []
        for k in range(6):
            for _ in range(2):
                step(optimizer)
            group = optimizer.param_groups[0]
            dropped += [weakref.ref(p) for p in group["params"]]
            for param in group["params"]:
                optimizer.state.pop(param, None)
            group["params"] = parameters(seed=k + 1)
            del param
        step(optimizer)
        assert [ref for ref in dropped if ref() is not None] == []
    finally:
        gc.enable()
