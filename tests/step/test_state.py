"""Groups, checkpoints, copies: what ``torch.optim`` users rely on."""

import copy
import pickle

import pytest
import torch

import fastsam

from checkpoints import through_disk
from networks import bits, loss_of, model_and_data, same
from registry import BACKENDS, BASES, DEVICE, create


def trained(method, base, backend, steps=3, model=None):
    """A model and its optimizer after some steps."""
    model, loss_fn = model or model_and_data()
    optimizer = create(method, model.parameters(), backend, base)
    run(optimizer, loss_fn, steps)
    return model, loss_fn, optimizer


def run(optimizer, loss_fn, steps=3):
    def closure():
        loss = loss_fn()
        loss.backward()
        return loss

    for _ in range(steps):
        optimizer.step(closure)


RESUMED = [(m, b) for m in ("sam", "unified-1/t", "ssam-adaptive-clip") for b in BASES] + [
    ("vasso", "adagrad_norm"), ("vasso-all", "adamw"), ("samar", "adam-amsgrad"),
    ("samar-all", "sgd-momentum"), ("lightsam-1", ""), ("lightsam-2", ""), ("lightsam-3", ""),
    ("lightsam-3-all", ""), ("adasam", ""),
]  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("method", "base"), RESUMED)
def test_resume_is_exact(method, base, backend):
    model, loss_fn, optimizer = trained(method, base, backend)
    saved = through_disk({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    run(optimizer, loss_fn)

    resumed, resumed_loss = model_and_data()
    resumed.load_state_dict(saved["model"])
    other = create(method, resumed.parameters(), backend, base, lr=123.0)
    other.load_state_dict(saved["optimizer"])
    run(other, resumed_loss)
    assert same(bits(model), bits(resumed))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("base", [name for name in BASES if name != "adagrad_norm"])
def test_checkpoints_of_the_base_alone(base, backend):
    """SAM turned on late, and off again: torch.optim's checkpoints both ways."""
    cls, kwargs = BASES[base].cls, BASES[base].kwargs
    model, loss_fn = model_and_data()
    plain = cls(model.parameters(), **kwargs)
    for _ in range(3):
        plain.zero_grad()
        loss_fn().backward()
        plain.step()
    sharp = fastsam.SAM(model.parameters(), cls, rho=0.1, lr=9.0, backend=backend)
    sharp.load_state_dict(through_disk(plain.state_dict()))
    assert sharp.param_groups[0]["rho"] == 0.1
    assert sharp.param_groups[0]["lr"] == kwargs["lr"]
    # at rho = 0 both go on alike
    twin = copy.deepcopy(model)
    twin_optimizer = cls(twin.parameters(), **kwargs)
    twin_optimizer.load_state_dict(plain.state_dict())
    sharp.param_groups[0]["rho"] = 0.0
    run(sharp, loss_fn, 2)
    x_loss = loss_of(twin)
    for _ in range(2):
        twin_optimizer.zero_grad()
        x_loss().backward()
        twin_optimizer.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        # two float32 steps, and Adam's first ones divide by small numbers
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    # and back
    back = cls(twin.parameters(), **kwargs)
    back.load_state_dict(through_disk(sharp.state_dict()))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert sharp.state[p].keys() == back.state[q].keys()
        for name, value in sharp.state[p].items():
            torch.testing.assert_close(back.state[q][name], value, rtol=0, atol=0)
    back.zero_grad()
    x_loss().backward()
    back.step()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "method", ["sam", "unified-1/t", "vasso", "samar", "lightsam-1", "lightsam-2", "lightsam-3"]
)
def test_state_dict_between_passes(method, backend):
    """It holds the optimizer state that belongs to the unperturbed weights."""
    model, loss_fn, optimizer = trained(method, "adamw", backend)
    before = copy.deepcopy(optimizer.state_dict())
    loss_fn().backward()
    optimizer.first_step()
    between = optimizer.state_dict()
    assert between["param_groups"] == before["param_groups"]
    for key, entry in before["state"].items():
        for name, value in entry.items():
            assert torch.equal(between["state"][key][name], value)
    optimizer.second_step()


def test_state_dict_holds_torchs_entries_and_no_backup():
    _, _, optimizer = trained("ssam", "adamw", "torch")
    for entry in optimizer.state_dict()["state"].values():
        assert entry.keys() == {"step", "exp_avg", "exp_avg_sq"}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("method", "base"), [("unified-1/t", base) for base in BASES] + RESUMED[-9:]
)
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies(duplicate, method, base, backend):
    model, _, optimizer = trained(method, base, backend, steps=1)
    both = duplicate({"model": model, "optimizer": optimizer})
    assert both["optimizer"].param_groups[0]["params"][0] is next(both["model"].parameters())
    run(optimizer, loss_of(model))
    assert not same(bits(model), bits(both["model"]))
    run(both["optimizer"], loss_of(both["model"]))
    assert same(bits(model), bits(both["model"]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("base", ["sgd-momentum", "adamw", "adagrad_norm"])
def test_add_param_group(base, backend):
    """Parameters that join later are perturbed and updated like the others."""
    model, loss_fn, optimizer = trained("sam", base, backend)
    extra = torch.nn.Parameter(torch.zeros(5, device=DEVICE))
    optimizer.add_param_group({"params": [extra], "rho": 0.5, "lr": 0.01})
    group = optimizer.param_groups[1]
    assert group["adaptive"] is False and group["rho"] == 0.5
    assert optimizer.base_optimizer.param_groups is optimizer.param_groups
    seen = []

    def joint():
        seen.append(extra.detach().clone())
        return loss_fn() + (extra - 1).square().sum()

    run(optimizer, joint, 1)
    assert (seen[1] < 0).all() and (extra > 0).all()  # uphill, then downhill


def test_scheduling_rho():
    _, loss_fn, optimizer = trained("sam", "sgd-momentum", "torch", steps=0)
    for rho in (0.1, 0.0, 0.2):
        optimizer.param_groups[0]["rho"] = rho
        run(optimizer, loss_fn, 1)
        assert float(optimizer.metrics["rho"]) == pytest.approx(rho)


def test_repr_and_metrics():
    model, loss_fn, optimizer = trained("unified-1/t", "adamw", "torch", steps=0)
    assert "UnifiedSAM" in repr(optimizer) and "rho: 0.05" in repr(optimizer)
    assert optimizer.metrics == {}
    run(optimizer, loss_fn, 1)
    run(optimizer, loss_fn, 1)
    metrics = optimizer.metrics
    assert metrics.keys() == {"grad_norm", "rho", "lam", "perturbed"}
    assert float(metrics["lam"]) == 0.5  # of the step taken, the second
    device = next(model.parameters()).device
    assert all(m.ndim == 0 and m.device == device for m in metrics.values())
    held = metrics["grad_norm"].clone()
    run(optimizer, loss_fn, 1)
    assert metrics["grad_norm"] == held  # not overwritten by the next step


def test_named_parameters():
    model, loss_fn = model_and_data()
    optimizer = fastsam.SAM(model.named_parameters(), torch.optim.AdamW, lr=0.1)
    run(optimizer, loss_fn, 1)
    assert optimizer.state_dict()["param_groups"][0]["param_names"][0] == "0.weight"


@pytest.mark.parametrize("backend", BACKENDS)
def test_moving_the_model_between_steps(backend):
    """``p.data`` swapped for other memory, as ``module.to`` and ``module.float`` do."""
    model, loss_fn, optimizer = trained("sam", "adamw", backend)
    twin = copy.deepcopy({"model": model, "optimizer": optimizer})
    for p in model.parameters():
        p.data = p.data.clone()
    run(optimizer, loss_fn)
    run(twin["optimizer"], loss_of(twin["model"]))
    assert same(bits(model), bits(twin["model"]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_state_tensors_of_different_dtypes(backend):
    """A state put together by hand goes on in the widest of its dtypes."""
    param = torch.nn.Parameter(torch.ones(1030, device=DEVICE))
    optimizer = fastsam.SAM([param], torch.optim.Adam, lr=0.1, rho=0.0, backend=backend)
    optimizer.state[param] = {
        "step": torch.tensor(3.0),
        "exp_avg": torch.full_like(param, 0.5, dtype=torch.bfloat16),
        "exp_avg_sq": torch.full_like(param, 0.25),
    }
    optimizer.step(lambda: param.sum().backward())
    torch.testing.assert_close(optimizer.state[param]["exp_avg"], torch.full_like(param, 0.55))
    assert optimizer.state[param]["exp_avg_sq"].dtype == torch.float32
    assert optimizer.state[param]["step"] == 4


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("base", ["sgd-momentum", "adamw", "adagrad"])
def test_state_of_other_parameters_is_refused(base, backend):
    """torch loads it without a look at the shapes; walking raw memory with it would crash."""
    cls, kwargs = BASES[base].cls, BASES[base].kwargs
    shapes = (3, 5000)
    params = [torch.nn.Parameter(torch.ones(s, device=DEVICE)) for s in shapes]
    swapped = fastsam.SAM(params[::-1], cls, backend=backend, **kwargs)
    optimizer = fastsam.SAM(params, cls, backend=backend, **kwargs)

    def closure():
        for p in params:
            p.grad = torch.ones_like(p)

    swapped.step(closure)
    before = [p.detach().clone() for p in params]
    with pytest.raises(ValueError, match="made for other parameters"):
        optimizer.load_state_dict(copy.deepcopy(swapped.state_dict()))
    assert not optimizer.state
    for p, q in zip(params, reversed(params), strict=True):
        optimizer.state[p] = dict(swapped.state[q])  # by hand
    with pytest.raises(RuntimeError, match="made for other parameters"):
        optimizer.step(closure)
    assert all(torch.equal(p, w) for p, w in zip(params, before, strict=True))


def test_mixed_dtype_state_survives_loading():
    """A bfloat16 parameter's float32 momentum buffer is not cut down to bfloat16."""
    param = torch.nn.Parameter(torch.ones(40, dtype=torch.bfloat16, device=DEVICE))
    param.grad_dtype = torch.float32
    with pytest.warns(UserWarning, match="rounded away"):
        optimizer = fastsam.SAM([param], torch.optim.SGD, lr=0.1, momentum=0.9)
    for half in (optimizer.first_step, optimizer.second_step):
        param.grad = torch.full((40,), 1 / 3, device=DEVICE)
        half()
    saved = through_disk(optimizer.state_dict())
    optimizer.load_state_dict(saved)
    buffer = optimizer.state[param]["momentum_buffer"]
    assert buffer.dtype == torch.float32 and (buffer == torch.tensor(1 / 3)).all()
