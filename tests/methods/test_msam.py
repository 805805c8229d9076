"""MSAM: one pass along the base's momentum, against float64 formulas and its own contract."""

import copy
import pickle

import pytest
import torch

import fastsam

from graphs import captured
from networks import bits, closure_of, loss_of, model_and_data, same
from reads import Reads
from registry import BACKENDS, DEVICE, DTYPES, OTHERS
from trajectories import check_master_trajectory, check_trajectory

SGD = {"base_optimizer": torch.optim.SGD, "lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
ADAMW = {"base_optimizer": torch.optim.AdamW, "lr": 0.02, "eps": 1e-3, "weight_decay": 0.1}
EACH = pytest.mark.parametrize("base", [SGD, ADAMW], ids=["sgd", "adamw"])
ON_EACH = pytest.mark.parametrize("backend", BACKENDS)
CASES = [(name, base) for name in ("msam", "msam-all") for base in OTHERS[name].bases]


def problem(base, backend="torch", **kwargs):
    model, loss_fn = model_and_data()
    return model, fastsam.MSAM(model.parameters(), **base | kwargs, backend=backend), loss_fn


def by_hand(optimizer, loss_fn):
    optimizer.zero_grad()
    optimizer.perturb()
    loss_fn().backward()
    optimizer.step()


# --- the equation ---------------------------------------------------------------------------------

SHAPES = [(1031,), (6, 7), ()]
GROUPS = [
    {"params": [0]},
    {"params": [1], "rho": 0.1, "lr": 0.03},
    {"params": [2], "adaptive": False, "lr": 0.01},
]


@ON_EACH
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("method", "base"), CASES)
@pytest.mark.filterwarnings("ignore:some parameters are float16 or bfloat16")
def test_trajectory(method, base, dtype, backend, record_property):
    found = check_trajectory(method, base, DTYPES[dtype], backend, SHAPES, GROUPS, 5)
    for name, error in found.items():
        record_property(name, error)


@ON_EACH
@pytest.mark.parametrize("base", ["sgd-momentum", "adamw"])
def test_with_master_weights(base, backend):
    check_master_trajectory(
        "msam", base, ["bf16", "bf16-fp32", "fp32"], backend, SHAPES, [{"params": [0, 1, 2]}], 5
    )


class ByHand:
    """The method on torch's own optimizer, in float64."""

    def __init__(self, model, base, rho=0.3):
        self.model = copy.deepcopy(model).double()
        kwargs = dict(base)
        self.base = kwargs.pop("base_optimizer")(self.model.parameters(), **kwargs)
        self.rho = rho

    def step(self, loss_fn):
        params = list(self.model.parameters())
        before = [p.detach().clone() for p in params]
        states = [self.base.state[p] for p in params]
        vs = [s.get("momentum_buffer", s.get("exp_avg")) for s in states]
        if vs[0] is not None:
            norm = torch.cat([v.flatten() for v in vs]).norm()
            with torch.no_grad():
                for p, v in zip(params, vs, strict=True):
                    p.sub_(self.rho * v / norm)
        self.base.zero_grad()
        loss_fn(self.model).backward()
        with torch.no_grad():
            for p, w in zip(params, before, strict=True):
                p.copy_(w)
        self.base.step()


@ON_EACH
@EACH
def test_against_torchs_own_optimizers(base, backend):
    model, optimizer, loss_fn = problem(base, backend)
    exact = ByHand(model, base)
    _, x, y = (cell.cell_contents for cell in loss_fn.__closure__)
    for _ in range(5):
        optimizer.step(closure_of(loss_fn))
        exact.step(lambda model: torch.nn.functional.cross_entropy(model(x.double()), y))
    for p, q in zip(model.parameters(), exact.model.parameters(), strict=True):
        torch.testing.assert_close(p.double(), q, rtol=0, atol=2e-6)


@ON_EACH
def test_by_hand(backend):
    """v = (3, 4), so e = -(3, 4) at rho = 5; what maximizes has v of the negative."""
    for maximize in (False, True):
        params = [torch.nn.Parameter(torch.zeros(1, device=DEVICE)) for _ in range(2)]
        optimizer = fastsam.MSAM(params, torch.optim.SGD, rho=5.0, lr=1.0, momentum=0.5,
                                 maximize=maximize, backend=backend)  # fmt: skip
        sign = -1.0 if maximize else 1.0
        seen, found = [], []
        for grads in ([3.0, 4.0], [0.0, 0.0]):
            optimizer.perturb()
            seen.append([p.item() for p in params])
            for p, g in zip(params, grads, strict=True):
                p.grad = torch.full_like(p, sign * g)
            optimizer.step()
            found.append([p.item() for p in params])
        assert seen[0] == [0.0, 0.0]  # no momentum yet
        assert found == [[-3.0, -4.0], [-4.5, -6.0]]
        assert seen[1] == pytest.approx([-6.0, -8.0], rel=1e-6)
        assert float(optimizer.metrics["momentum_norm"]) == pytest.approx(5.0)


@ON_EACH
@pytest.mark.parametrize("bad", [0.0, float("inf"), float("nan")])
def test_a_momentum_without_direction_perturbs_nothing(bad, backend):
    param = torch.nn.Parameter(torch.ones(3, device=DEVICE))
    optimizer = fastsam.MSAM([param], torch.optim.SGD, lr=0.1, momentum=0.9, backend=backend)
    optimizer.state[param]["momentum_buffer"] = torch.full_like(param, bad)
    optimizer.perturb()
    assert torch.equal(param, torch.ones_like(param)) and optimizer.between_passes
    optimizer.restore()


@ON_EACH
def test_groups_that_are_not_perturbed_are_not_in_the_norm(backend):
    params = [torch.nn.Parameter(torch.zeros(2, device=DEVICE)) for _ in range(2)]
    groups = [{"params": params[:1]}, {"params": params[1:], "perturb": False, "momentum": 0.0}]
    optimizer = fastsam.MSAM(groups, torch.optim.SGD, rho=5.0, lr=0.0, momentum=0.9,
                             backend=backend)  # fmt: skip
    for _ in range(2):
        optimizer.perturb()
        before = [p.tolist() for p in params]
        params[0].grad = torch.tensor([3.0, 4.0], device=DEVICE)
        params[1].grad = torch.tensor([100.0, 0.0], device=DEVICE)
        optimizer.step()
    assert before[0] == pytest.approx([-3.0, -4.0]) and before[1] == [0.0, 0.0]


# --- steps ----------------------------------------------------------------------------------------


@ON_EACH
@EACH
def test_calls_the_closure_once_and_by_hand_is_the_same(base, backend):
    model, optimizer, loss_fn = problem(base, backend)
    other, by_calls, other_loss = problem(base, backend)
    start, calls, at = bits(model), [], []

    def closure():
        calls.append(None)
        at.append(bits(model))
        return closure_of(loss_fn)()

    for _ in range(3):
        before = bits(model)
        loss = optimizer.step(closure)
        by_hand(by_calls, other_loss)
        assert same(bits(model), bits(other)) and not same(bits(model), before)
    assert len(calls) == 3
    assert same(at[0], start) and not same(at[2], before)
    assert float(loss.detach()) != float(loss_fn().detach())  # at w + e
    state, theirs = (o.state_dict()["state"] for o in (optimizer, by_calls))
    torch.testing.assert_close(state, theirs, rtol=0, atol=0)


def test_the_first_step_is_the_bases():
    model, optimizer, loss_fn = problem(SGD)
    other, other_loss = model_and_data()
    kwargs = dict(SGD)
    base = kwargs.pop("base_optimizer")(other.parameters(), **kwargs)
    other_loss().backward()
    base.step()
    optimizer.step(closure_of(loss_fn))
    assert same(bits(model), bits(other))


def test_micro_batches_add_up_between_the_calls():
    model, optimizer, loss_fn = problem(SGD)
    other, other_optimizer, other_loss = problem(SGD)
    for _ in range(3):
        optimizer.step(closure_of(loss_fn))
        other_optimizer.perturb()
        for _ in range(2):  # halves are exact
            (other_loss() / 2).backward()
        other_optimizer.step()
        other_optimizer.zero_grad()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)


def test_loops_of_two_passes_run():
    """With a pass too many, whose gradients are not looked at."""
    model, optimizer, loss_fn = problem(SGD)
    other, other_optimizer, other_loss = problem(SGD)
    for _ in range(3):
        (7 * other_loss()).backward()
        other_optimizer.first_step(zero_grad=True)
        other_loss().backward()
        other_optimizer.second_step(zero_grad=True)
        optimizer.step(closure_of(loss_fn))
    assert same(bits(model), bits(other))


def test_between_steps_and_inside_unperturbed_weights_are_w():
    model, optimizer, loss_fn = problem(SGD)
    optimizer.step(closure_of(loss_fn))
    before = bits(model)
    optimizer.perturb()
    assert not same(bits(model), before)
    with optimizer.unperturbed():
        assert same(bits(model), before)
    optimizer.restore()
    assert same(bits(model), before) and not optimizer.between_passes


@ON_EACH
def test_a_failure_leaves_everything(backend):
    model, optimizer, loss_fn = problem(SGD, backend)
    optimizer.step(closure_of(loss_fn))
    before, state = bits(model), copy.deepcopy(optimizer.state_dict())

    def closure():
        loss_fn().backward()
        raise KeyError("data")

    with pytest.raises(KeyError, match="data"):
        optimizer.step(closure)
    assert same(bits(model), before)
    torch.testing.assert_close(optimizer.state_dict()["state"], state["state"], rtol=0, atol=0)
    optimizer.step(closure_of(loss_fn))


def test_hooks_run_once_a_step():
    model, optimizer, loss_fn = problem(SGD)
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("pre"))
    optimizer.register_step_post_hook(lambda *_: seen.append("post"))
    for take in (lambda: optimizer.step(closure_of(loss_fn)), lambda: by_hand(optimizer, loss_fn)):
        take()
        assert seen == ["pre", "post"]
        seen.clear()


@EACH
def test_schedules(base):
    """Steps of the base alone in between, by both ways of stepping."""
    model, optimizer, loss_fn = problem(base, perturb_every=2, start=1)
    other, by_calls, other_loss = problem(base, perturb_every=2, start=1)
    perturbed = []
    for _ in range(5):
        before = bits(model)

        def closure(before=before):
            perturbed.append(not same(bits(model), before))
            return closure_of(loss_fn)()

        optimizer.step(closure)
        by_hand(by_calls, other_loss)
        assert same(bits(model), bits(other))
    assert perturbed == [False, True, False, True, False]
    optimizer.param_groups[0]["rho"] = 0.0
    optimizer.step(closure_of(loss_fn))
    assert float(optimizer.metrics["perturbed"]) == 0


@pytest.mark.parametrize("how", ["loaded", "pickled", "from the base"])
@EACH
def test_goes_on_bit_for_bit(base, how):
    model, optimizer, loss_fn = problem(base)
    for _ in range(3):
        optimizer.step(closure_of(loss_fn))
    if how == "pickled":
        both = pickle.loads(pickle.dumps((model, optimizer)))
        other, resumed = both
    else:
        other = copy.deepcopy(model)
        kwargs = dict(base)
        if how == "loaded":
            resumed = fastsam.MSAM(other.parameters(), **kwargs, backend=optimizer.backend)
            resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        else:
            taken = kwargs.pop("base_optimizer")(other.parameters(), **kwargs)
            state = optimizer.base_optimizer.state_dict()
            taken.load_state_dict(copy.deepcopy(state))
            resumed = fastsam.MSAM.from_optimizer(taken, backend=optimizer.backend)
    other_loss = loss_of(other)
    for _ in range(3):
        optimizer.step(closure_of(loss_fn))
        resumed.step(closure_of(other_loss))
        assert same(bits(model), bits(other))
    assert float(resumed.metrics["momentum_norm"]) > 0


def scaled_closure(loss_fn, scaler, factor=1.0):
    def closure():
        loss = loss_fn()
        scaler.scale(factor * loss).backward()
        return loss

    return closure


@ON_EACH
@pytest.mark.parametrize("base", ["fused", "by hand"])
def test_loss_scales(base, backend):
    """A power of two changes no bit, and an overflow none of weights and state."""
    model, optimizer, loss_fn = problem(SGD, backend)
    other, scaled, other_loss = problem(SGD, backend)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**10, growth_interval=2)
    for _ in range(4):
        optimizer.step(closure_of(loss_fn))
        if base == "fused":
            scaled.step(scaled_closure(other_loss, scaler), grad_scaler=scaler)
        else:
            scaled.zero_grad()
            scaled.perturb()
            scaler.scale(other_loss()).backward()
            scaled.step(grad_scaler=scaler)
        scaler.update()
        assert same(bits(model), bits(other))
    before, state = bits(other), copy.deepcopy(scaled.state_dict()["state"])
    scaled.step(scaled_closure(other_loss, scaler, float("inf")), grad_scaler=scaler)
    scale = scaler.get_scale()
    scaler.update()
    assert scaler.get_scale() == scale / 2 and float(scaled.metrics["skipped"]) == 1
    assert same(bits(other), before)
    torch.testing.assert_close(scaled.state_dict()["state"], state, rtol=0, atol=0)
    for _ in range(2):  # the overflow is forgotten, with a scale and without
        scaled.step(scaled_closure(other_loss, scaler), grad_scaler=scaler)
        scaler.update()
        optimizer.step(closure_of(loss_fn))
        assert same(bits(model), bits(other))
    scaled.step(closure_of(other_loss))
    optimizer.step(closure_of(loss_fn))
    assert same(bits(model), bits(other))


@ON_EACH
def test_stochastic_rounding_depends_on_the_seed_alone(backend):
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(0)
        param = torch.nn.Parameter(torch.randn(300, device=DEVICE).bfloat16())
        optimizer = fastsam.MSAM([param], **SGD, rounding="stochastic", seed=seed,
                                 backend=backend)  # fmt: skip
        for _ in range(3):
            optimizer.perturb()
            param.grad = (0.1 * param.detach()).bfloat16()
            optimizer.step()
        found.append(param.detach().clone())
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "error", "match"),
    [
        (SGD | {"momentum": 0.0}, TypeError, "keeps 'momentum_buffer'.* SGD with momentum=0"),
        ({"base_optimizer": torch.optim.Adagrad}, TypeError, "keeps 'exp_avg'.* Adagrad"),
        ({"base_optimizer": torch.optim.NAdam}, TypeError, "whose update is fused.* NAdam"),
        (SGD | {"renormalize": True}, ValueError, "renormalize must be False with MSAM"),
        (SGD | {"repeat_random": True}, ValueError, "repeat_random must be False"),
        (SGD | {"ascent_context": torch.no_grad}, ValueError, "ascent_context must be None"),
        (SGD | {"descent_context": torch.no_grad}, ValueError, "descent_context must be None"),
        (SGD | {"ascent_steps": 2}, ValueError, "ascent_steps must be 1 with MSAM"),
        (SGD | {"rho": -1.0}, ValueError, "rho must be at least 0"),
    ],
)
def test_refused_by_name(kwargs, error, match):
    param = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(error, match=match):
        fastsam.MSAM([param], **kwargs)


def test_refused_later():
    model, optimizer, loss_fn = problem(SGD)
    closure = closure_of(loss_fn)
    with pytest.raises(RuntimeError, match=r"a closure, or perturb\(\) before the forward pass"):
        optimizer.step()
    with pytest.raises(TypeError, match="second_closure must be None"):
        optimizer.step(closure, closure)
    with pytest.raises(RuntimeError, match="does not support perturbations by micro-batch"):
        optimizer.step_micro_batches([closure])
    with pytest.raises(RuntimeError, match="LETS does not support MSAM"):
        fastsam.LETS(optimizer).step(closure, closure)
    optimizer.perturb()
    with pytest.raises(RuntimeError, match="expected second_step"):
        optimizer.perturb()
    with pytest.raises(RuntimeError, match="expected second_step"):
        optimizer.step(closure)
    optimizer.restore()
    optimizer.renormalize = True
    with pytest.raises(ValueError, match="renormalize must be False"):
        optimizer.perturb()
    optimizer.renormalize = False
    optimizer.param_groups[0]["momentum"] = 0.0
    with pytest.raises(TypeError, match="momentum=0"):
        optimizer.step(closure)
    assert not optimizer.between_passes


@EACH
def test_the_host_reads_nothing(base):
    params = [torch.nn.Parameter(torch.ones(s, device=DEVICE)) for s in ((1030,), (3, 5), ())]
    optimizer = fastsam.MSAM(params, **base, backend="triton")
    with Reads() as reads:
        for _ in range(2):
            optimizer.perturb()
            for p in params:
                p.grad = torch.ones_like(p)
            optimizer.step()
        optimizer.metrics  # noqa: B018
    assert reads.seen == []


@pytest.mark.parametrize("wrong", [torch.ones(3), 1.0])
def test_a_momentum_that_is_none(wrong):
    """Put there by hand: nothing has changed when it is found."""
    param = torch.nn.Parameter(torch.ones(2))
    optimizer = fastsam.MSAM([param], **SGD)
    optimizer.state[param]["momentum_buffer"] = wrong
    with pytest.raises(RuntimeError, match="momentum_buffer"):
        optimizer.perturb()
    assert torch.equal(param, torch.ones(2)) and not optimizer.between_passes


def test_a_closure_without_gradients_is_warned_of():
    _, optimizer, loss_fn = problem(SGD)
    with pytest.warns(UserWarning, match="left no gradient"):
        optimizer.step(lambda: loss_fn())


# --- graphs ---------------------------------------------------------------------------------------


def graphed_problem():
    torch.manual_seed(0)
    model = torch.nn.Linear(6, 5).to(DEVICE)
    x = torch.randn(8, 6, device=DEVICE)
    hyper = {key: torch.tensor(value, device=DEVICE) for key, value in (("lr", 0.1), ("rho", 0.2))}
    optimizer = fastsam.MSAM(model.parameters(), torch.optim.SGD, momentum=0.9, backend="triton",
                             **hyper)  # fmt: skip
    return model, optimizer, closure_of(lambda: model(x).square().mean())


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs the stand-in")
def test_captured_steps_are_steps(monkeypatch):
    from graphs import Graph

    (model, optimizer, closure), (other, stepped, other_closure) = (
        graphed_problem() for _ in range(2)
    )
    with pytest.raises(RuntimeError, match="no step outside|only after its first step"):
        captured(monkeypatch, lambda: optimizer.step(closure))
    for _ in range(2):
        optimizer.step(closure)
        stepped.step(other_closure)
    graph = Graph()
    with graph.capture(monkeypatch):
        optimizer.step(closure)
    stepped.step(other_closure)
    for _ in range(2):
        graph.replay()
        stepped.step(other_closure)
    assert same(bits(model), bits(other))


@pytest.mark.gpu
def test_graphed_steps_are_steps():
    (model, optimizer, closure), (other, stepped, other_closure) = (
        graphed_problem() for _ in range(2)
    )
    step = fastsam.graphed(optimizer, closure)
    for _ in range(8):
        step()
        stepped.step(other_closure)
    assert same(bits(model), bits(other))


@ON_EACH
def test_what_is_frozen_later_is_not_perturbed(backend):
    model, optimizer, loss_fn = problem(SGD, backend, rho=0.5)
    for _ in range(2):
        optimizer.step(closure_of(loss_fn))
    frozen, *others = model.parameters()
    frozen.requires_grad_(False)
    optimizer.zero_grad()
    before = frozen.detach().clone()
    norm = torch.cat([optimizer.state[p]["momentum_buffer"].flatten() for p in others]).norm()
    optimizer.perturb()
    assert torch.equal(frozen, before)
    loss_fn().backward()
    optimizer.step()
    torch.testing.assert_close(
        optimizer.metrics["momentum_norm"].float(), norm.float(), rtol=1e-5, atol=0
    )
    assert torch.equal(frozen, before)
