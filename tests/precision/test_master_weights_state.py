"""Master weights: what they cost, how they are saved, and what others may do to the parameters."""

import copy
import gc
import io
import pickle

import pytest
import torch

import fastsam

from networks import model_and_data, same
from registry import BACKENDS, BASES, DEVICE, METHODS, create
from scaled import assert_same, snapshot
from test_master_weights import check_torchs

MOMENTUM = {"base_optimizer": torch.optim.SGD, "lr": 0.1, "momentum": 0.9}
HALF = [torch.bfloat16, torch.float16]


def trained(method="sam", base="adamw", backend="torch", steps=3, dtype=torch.bfloat16, **kwargs):
    """A network in 16 bits, and its optimizer after some steps."""
    model, _ = model_and_data()
    model = model.to(dtype)
    params = list(model.parameters())
    optimizer = create(method, params, backend, base, **{"master_weights": True} | kwargs)
    run(optimizer, params, steps)
    return params, optimizer


def gradients(params):
    """Of a sum of cosines, as far as the dtype goes."""
    for p in params:
        p.grad = torch.sin(3 * p.detach())


def run(optimizer, params, steps):
    for _ in range(steps):
        optimizer.step(lambda: gradients(params))


def copies(params):
    return [p.detach().clone() for p in params]


def masters(optimizer, params):
    return [optimizer.state[p]["master_weight"].clone() for p in params]


def through_disk(obj):
    buffer = io.BytesIO()
    torch.save(obj, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


# --- what is held --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("base", BASES)
def test_state_is_float32_under_torchs_names(base, dtype):
    params, optimizer = trained(base=base, dtype=dtype)
    wide, twin = trained(base=base, dtype=torch.float32)
    for p, q in zip(params, wide, strict=True):
        state = optimizer.state[p]
        assert state.keys() == twin.state[q].keys() | {"master_weight"}
        assert {x.dtype for x in state.values()} == {torch.float32}
        assert p.dtype == dtype and torch.equal(p, state["master_weight"].to(dtype))


@pytest.mark.parametrize("backend", BACKENDS)
def test_wide_parameters_have_no_masters(backend):
    """Next to 16-bit ones they go on as they would without."""
    dtypes = [torch.float32, torch.bfloat16] + [torch.float64] * (backend == "reference")
    starts = [torch.linspace(-1, 1, 40, device=DEVICE, dtype=d) for d in dtypes]
    params, alone = ([torch.nn.Parameter(w.clone()) for w in starts] for _ in range(2))
    optimizer = fastsam.USAM(params, **MOMENTUM, backend=backend, master_weights=True)
    del alone[1]
    twin = fastsam.USAM(alone, **MOMENTUM, backend=backend)
    run(optimizer, params, 2)
    run(twin, alone, 2)
    assert [("master_weight" in optimizer.state[p]) for p in params[:2]] == [False, True]
    for p, q in zip(params[:1] + params[2:], alone, strict=True):
        assert torch.equal(p, q) and optimizer.state[p].keys() == twin.state[q].keys()


@pytest.fixture
def live_bytes():
    """Counts the bytes of all tensors that Python has come to hold since, shared memory once."""

    def count():
        gc.collect()
        held = {}
        for x in gc.get_objects():
            if type(x) in (torch.Tensor, torch.nn.Parameter) and x.layout == torch.strided:
                held[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return sum(held.values())

    gc.collect()
    gc.freeze()  # what is there already is not looked through again
    yield count
    gc.unfreeze()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "kept", [{"master_weights": True}, {"rounding": "stochastic"}], ids=["master", "stochastic"]
)
def test_no_backup_between_the_passes(kept, backend, live_bytes):
    """The masters are what is restored from; without them there is one copy of the weights."""
    size = 200_000  # beside it tables, and the scratch memory of a reduction, are little
    param = torch.nn.Parameter(torch.linspace(-1, 1, size, device=DEVICE, dtype=torch.bfloat16))
    optimizer = fastsam.SAM([param], **MOMENTUM, backend=backend, **kept)
    for step in range(2):
        gradients([param])
        before = live_bytes()
        optimizer.first_step()
        grown = (live_bytes() - before) / size
        if "master_weights" not in kept:
            assert step == 1 or grown >= 2  # a CPU may keep that memory
        else:
            assert 4 <= grown < 4.1 if step == 0 else grown < 0.1
        gradients([param])
        optimizer.second_step()


# --- others write to the parameters --------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("first", [True, False])
def test_values_written_in_between_count(backend, first):
    """Elements that somebody has changed start from there; the others keep their low bits."""
    param = torch.nn.Parameter(torch.linspace(-1, 1, 64, device=DEVICE, dtype=torch.bfloat16))
    optimizer = fastsam.USAM([param], torch.optim.SGD, lr=0.1, backend=backend, master_weights=True)
    run(optimizer, [param], 2)
    expected = masters(optimizer, [param])[0]
    with torch.no_grad():
        param[:8] = 0.5
        param[8:16] *= 1.0
        param.clamp_(-0.75, 0.75)
    changed = param.float() != expected.bfloat16().float()
    assert 8 < int(changed.sum()) < 40
    expected[changed] = param.detach().float()[changed]
    before = param.detach().clone()
    optimizer.param_groups[0]["lr"] = 0.0
    if first:
        gradients([param])
    else:
        param.grad = None  # not perturbed, only updated
    optimizer.first_step()
    assert torch.equal(param, before) != first
    gradients([param])
    optimizer.second_step()
    assert torch.equal(param, before)
    assert torch.equal(optimizer.state[param]["master_weight"], expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_missing_gradients(backend):
    """Perturbed only: restored and not updated. Updated only: from its own master."""
    starts = [torch.linspace(-1, 1, n, device=DEVICE, dtype=torch.bfloat16) for n in (40, 30, 20)]
    params = [torch.nn.Parameter(w) for w in starts]
    optimizer = fastsam.SAM(params, torch.optim.SGD, lr=0.01, backend=backend, master_weights=True)
    run(optimizer, params, 1)
    before, held = copies(params), masters(optimizer, params)
    gradients(params[:1])
    params[1].grad = params[2].grad = None
    optimizer.first_step(zero_grad=True)
    assert [torch.equal(p, w) for p, w in zip(params, before, strict=True)] == [False, True, True]
    params[1].grad = torch.ones_like(params[1])
    optimizer.second_step()
    exact = [held[0], held[1] - 0.01, held[2]]
    torch.testing.assert_close(masters(optimizer, params), exact, rtol=2.0**-23, atol=2.0**-26)
    assert torch.equal(params[0], before[0]) and torch.equal(params[2], before[2])
    assert torch.equal(params[1], masters(optimizer, params)[1].bfloat16())


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_loading_other_weights(backend):
    """A model's checkpoint loaded after some steps, or memory swapped: as a fresh optimizer."""
    params, optimizer = trained("usam", "sgd", backend)
    fresh, twin = trained("usam", "sgd", backend, steps=0)
    with torch.no_grad():
        for i, (p, q) in enumerate(zip(params, fresh, strict=True)):
            q.copy_(torch.linspace(-0.9, 1, q.numel()).view(q.shape))
            if i % 2:
                p.data = q.data.clone()
            else:
                p.copy_(q)
    run(optimizer, params, 2)
    run(twin, fresh, 2)
    assert same(params, fresh)
    assert same(masters(optimizer, params), masters(twin, fresh))


# --- failures ------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("steps", [0, 1])
@pytest.mark.parametrize("call", [1, 2])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_failing_closure(backend, steps, call, error):
    if backend == "triton" and DEVICE == "cpu" and (steps == 0 or error is ValueError):
        pytest.skip("slow under Triton's interpreter, and the same on the host")
    params, optimizer = trained("vasso", "adamw", backend, steps)
    undisturbed, twin = trained("vasso", "adamw", backend, steps)
    before, calls = snapshot(optimizer, params), []

    def failing():
        calls.append(1)
        gradients(params)
        if len(calls) == call:
            raise error("no")

    with pytest.raises(error, match="no"):
        optimizer.step(failing)
    assert same(params, before["weights"])
    if steps:
        assert_same(snapshot(optimizer, params), before)
    run(optimizer, params, 1)
    run(twin, undisturbed, 1)
    assert same(params, undisturbed)
    assert same(masters(optimizer, params), masters(twin, undisturbed))


@pytest.mark.parametrize("backend", BACKENDS)
def test_restore(backend):
    params, optimizer = trained("sam", "adamw", backend, 1)
    before = snapshot(optimizer, params)
    gradients(params)
    optimizer.first_step()
    assert not same(params, before["weights"])
    assert_same(snapshot(optimizer, params)["state"], before["state"])  # what is saved there
    optimizer.restore()
    assert_same(snapshot(optimizer, params), before)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("method", ["sam", "ssam-adaptive-clip"])
def test_nonfinite_second_gradient(method, backend):
    params, optimizer = trained(method, "adamw", backend, 1, skip_nonfinite=True)
    before = snapshot(optimizer, params)
    gradients(params)
    optimizer.first_step()
    gradients(params)
    params[0].grad[0, 0] = float("inf")
    optimizer.second_step()
    assert_same(snapshot(optimizer, params), before)
    assert float(optimizer.metrics["skipped"]) == 1


# --- checkpoints ---------------------------------------------------------------------------------

SAVED = [("sam", base) for base in BASES] + [
    (method, "adamw") for method in METHODS if method not in ("sam", "asam", "usam")
]


@pytest.mark.parametrize(("method", "base"), SAVED)
def test_resumed_run_is_exact(method, base):
    """torch alone would cast what it loads to the parameters' dtype."""
    params, optimizer = trained(method, base)
    saved = through_disk({"model": copies(params), "optimizer": optimizer.state_dict()})
    held = masters(optimizer, params)
    run(optimizer, params, 2)

    resumed, other = trained(method, base, steps=0, lr=123.0)
    with torch.no_grad():
        for p, w in zip(resumed, saved["model"], strict=True):
            p.copy_(w)
    other.load_state_dict(saved["optimizer"])
    assert same(masters(other, resumed), held)
    for p in resumed:
        assert {x.dtype for x in other.state[p].values()} == {torch.float32}
    run(other, resumed, 2)
    assert same(params, resumed)
    assert same(masters(optimizer, params), masters(other, resumed))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies(duplicate):
    params, optimizer = trained("ssam", "adamw")
    twins, twin = duplicate((params, optimizer))
    run(optimizer, params, 2)
    assert not same(params, twins)
    run(twin, twins, 2)
    assert same(params, twins) and same(masters(optimizer, params), masters(twin, twins))


@pytest.mark.parametrize("base", [base for base in BASES if base != "adagrad_norm"])
def test_checkpoints_of_the_base_alone(base):
    """SAM turned on late: torch's 16-bit state goes on in float32, and back into torch."""
    cls, kwargs = BASES[base].cls, BASES[base].kwargs
    model, _ = model_and_data()
    params = list(model.bfloat16().parameters())
    plain = cls(params, foreach=False, **kwargs)
    for _ in range(2):
        gradients(params)
        plain.step()
    saved = through_disk(plain.state_dict())
    wide = [torch.nn.Parameter(p.detach().float()) for p in params]
    torchs = cls(wide, foreach=False, **kwargs)
    torchs.load_state_dict(copy.deepcopy(saved))  # torch shares step counts with what it loads

    optimizer = fastsam.SAM(params, cls, rho=0.0, lr=9.0, backend="reference", master_weights=True)
    optimizer.load_state_dict(saved)
    exact = DEVICE == "cpu" or cls is torch.optim.SGD
    for _ in range(2):  # without a radius both go on alike
        for p, w in zip(params, wide, strict=True):
            w.grad = torch.sin(3 * p.detach()).float()
        optimizer.step(lambda: gradients(params))
        torchs.step()
    for p, w in zip(params, wide, strict=True):
        master = optimizer.state[p]["master_weight"]
        check_torchs("master", master, w, exact)
        assert torch.equal(p, master.bfloat16())
        for name, value in torchs.state[w].items():
            check_torchs(name, optimizer.state[p][name], value, exact)

    back = cls(params, foreach=False, **kwargs)
    back.load_state_dict(through_disk(optimizer.state_dict()))
    gradients(params)
    before = copies(params)
    back.step()
    assert not same(params, before)


# --- what is refused -----------------------------------------------------------------------------


def test_refusals():
    param = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16, device=DEVICE))
    with pytest.raises(ValueError, match="master_weights"):
        fastsam.SAM([param], torch.optim.RMSprop, master_weights=True)
    with pytest.raises(ValueError, match="master_weights"):
        fastsam.SAM([param], **MOMENTUM, master_weights=True, rounding="stochastic")
    with pytest.raises(ValueError, match="master"):
        fastsam.LETS(fastsam.SAM([param], **MOMENTUM, master_weights=True), rho_lr=0.1)
    with pytest.warns(UserWarning, match="rounded away"):
        fastsam.SAM([param], **MOMENTUM)


@pytest.mark.parametrize("backend", BACKENDS)
def test_masters_of_other_parameters_are_refused(backend):
    """torch loads them without a look at the shapes; walking raw memory with them would crash."""
    shapes = (3, 500)
    params = [torch.nn.Parameter(torch.ones(s, device=DEVICE).bfloat16()) for s in shapes]
    kwargs = {"base_optimizer": torch.optim.SGD, "lr": 0.1, "backend": backend}
    swapped = fastsam.SAM(params[::-1], master_weights=True, **kwargs)
    optimizer = fastsam.SAM(params, master_weights=True, **kwargs)
    run(swapped, params, 1)
    before = copies(params)
    with pytest.raises(ValueError, match="made for other parameters"):
        optimizer.load_state_dict(copy.deepcopy(swapped.state_dict()))
    for p, q in zip(params, reversed(params), strict=True):
        optimizer.state[p] = dict(swapped.state[q])  # by hand
    with pytest.raises(RuntimeError, match="made for other parameters"):
        run(optimizer, params, 1)
    assert same(params, before)
