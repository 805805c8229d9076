"""The torch backend on a CPU: state after a failure, and memory that is used again."""

import copy
import pickle

import pytest
import torch

import fastsam
from fastsam.backends import sums
from fastsam.backends.eager import blocks, cpu, fused, scratch

from large import BIG, SGD, SMALL, copies, gradients, halves, parameters, same, step
from registry import BASES, create


def equal(a, b):
    """Whether two state dicts hold the same bits."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a.nan_to_num(9), b.nan_to_num(9))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


# --- failures -----------------------------------------------------------------------------------

LARGE = blocks.LARGE
BACKUP = scratch.ScratchBackup
#: What may fail before the first write: pass, where, what, and with which method and base.
FAULTS = [
    ("first", cpu, "split", "sam", "sgd-momentum"),
    ("first", torch, "_foreach_norm", "sam", "sgd-momentum"),
    ("first", torch, "_foreach_norm", "sam", "adamw"),
    ("first", torch, "_foreach_copy_", "sam", "sgd-momentum"),
    ("first", torch, "add", "sam", "sgd-momentum"),
    ("first", torch, "_foreach_add_", "sam", "sgd-momentum"),
    ("first", torch, "_foreach_mul_", "asam", "sgd-momentum"),
    ("first", torch, "addcmul", "asam", "sgd-momentum"),
    ("first", torch, "lerp", "vasso", "sgd-momentum"),
    ("first", torch, "_fused_adamw_", "lightsam-3", ""),
    ("first", torch, "aminmax", "lightsam-3", ""),
    ("first", torch, "_fused_adagrad_", "lightsam-2", ""),
    ("first", sums, "finish_ascent", "unified-1/t", "adamw"),
    ("first", sums, "finish_ascent", "lightsam-1", ""),
    ("first", BACKUP, "move", "vasso", "adamw"),
    ("first", scratch, "_count_as_changed", "lightsam-1", ""),
    ("second", cpu, "split", "unified-1/t", "adagrad"),
    ("second", torch, "_foreach_norm", "ssam", "sgd-momentum"),
    ("second", torch, "_foreach_norm", "sam-clip", "adam-amsgrad"),
    ("second", torch, "_foreach_mul_", "ssam-adaptive-clip", "sgd-momentum"),
    ("second", torch, "stack", "samar", "sgd-momentum"),
    ("second", sums, "finish_descent", "samar", "sgd-momentum"),
    ("second", sums, "finish_descent", "sam", "adagrad_norm"),
    ("second", sums, "finish_descent", "lightsam-1", ""),
    ("second", sums, "adapt", "samar", "adagrad_norm"),  # as where a user's rule fails
    ("second", fused.Update, "__init__", "sam", "sgd-momentum"),
    ("second", fused.Update, "__init__", "vasso-all", "adamw"),
    ("second", fused.Update, "__init__", "samar", "sgd-momentum"),
    ("second", fused.Update, "__init__", "sam", "adagrad_norm"),
    ("second", fused.Update, "__init__", "lightsam-1", ""),
    ("second", fused.Update, "__init__", "lightsam-3", ""),
    ("second", fused, "blocks", "ssam", "adagrad"),
]


def fail_in(half, module, name, optimizer, params, monkeypatch):
    """A step in which this fails, in one of the passes."""

    def fail(*args, **kwargs):
        raise MemoryError

    gradients(params)
    if half == "second":
        optimizer.first_step()
        gradients(params)
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(module, name, fail)
        (optimizer.first_step if half == "first" else optimizer.second_step)()


@pytest.mark.parametrize(("half", "module", "name", "method", "base"), FAULTS)
def test_a_failure_before_the_first_write(half, module, name, method, base, monkeypatch):
    """Weights and state are those of before, and the next steps those of a run without it."""
    params = parameters(LARGE, BIG, SMALL)
    optimizer = create(method, params, "torch", base)
    step(optimizer, params)
    twin = copy.deepcopy(optimizer)
    before, state = copies(params), copy.deepcopy(optimizer.state_dict())
    homes = [p.data_ptr() for p in params]
    fail_in(half, module, name, optimizer, params, monkeypatch)
    assert same(params, before) and [p.data_ptr() for p in params] == homes
    assert equal(optimizer.state_dict(), state)
    for _ in range(2):
        step(optimizer, params)
        step(twin, twin.param_groups[0]["params"])
    assert same(params, twin.param_groups[0]["params"])
    assert equal(optimizer.state_dict(), twin.state_dict())


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize(
    "fault", [("first", torch, "_foreach_norm"), ("second", fused.Update, "__init__")]
)
def test_a_failure_in_the_first_step_of_all(fault, base, monkeypatch):
    runs = []
    for fails in (True, False):
        params = parameters(LARGE, BIG, SMALL)
        optimizer = create("sam", params, "torch", base)
        if fails:
            fail_in(*fault, optimizer, params, monkeypatch)
            assert same(params, parameters(LARGE, BIG, SMALL))
        for _ in range(2):
            step(optimizer, params)
        runs.append(params)
    assert same(*runs)


@pytest.mark.parametrize("method", ["sam", "ssam-adaptive-clip", "vasso", "samar"])
def test_a_base_that_fails_after_its_update(method):
    """A foreign one: then the old weights have to be somewhere else."""

    class Failing(torch.optim.RMSprop):
        fails = False

        def step(self, closure=None):
            super().step(closure)
            if self.fails:
                raise ArithmeticError

    params = parameters(BIG, SMALL)
    spec = create(method, params, "torch", "sgd")
    own = {k: v for k, v in spec.defaults.items() if k in ("rho", "adaptive", "eta", "theta")}
    optimizer = type(spec)(params, Failing, lr=0.01, backend="torch", **own)
    step(optimizer, params)
    before, homes = copies(params), [p.data_ptr() for p in params]
    optimizer.base_optimizer.fails = True
    gradients(params)
    optimizer.first_step()
    assert not same(params, before)
    with pytest.raises(ArithmeticError):
        gradients(params)
        optimizer.second_step()
    assert same(params, before) and [p.data_ptr() for p in params] == homes
    optimizer.base_optimizer.fails = False
    step(optimizer, params)
    assert not same(params, before)


@pytest.mark.parametrize("missing", [[0], [1], [0, 1, 2]])
@pytest.mark.filterwarnings("ignore:the second pass left no gradients")
def test_missing_second_gradients(missing):
    params = parameters(BIG, BIG, SMALL)
    optimizer = fastsam.SAM(params, **SGD, backend="torch")
    before, homes = copies(params), [p.data_ptr() for p in params]
    gradients(params)
    optimizer.first_step(zero_grad=True)
    gradients([p for k, p in enumerate(params) if k not in missing])
    optimizer.second_step()
    kept = [k for k, (p, w) in enumerate(zip(params, before, strict=True)) if torch.equal(p, w)]
    assert kept == missing and [p.data_ptr() for p in params] == homes


# --- what reads weights or state after the step ---------------------------------------------------


@pytest.mark.parametrize("hessian", ["diag", "difference"])
@pytest.mark.parametrize("method", ["asam", "sam", "samar-all", "lightsam-3"])
def test_lets(method, hessian):
    """With "diag" and an adaptive method the old weights are asked for after the update."""
    seen = []
    for backend in ("torch", "reference"):
        params = parameters(BIG, SMALL)
        # a radius that hardly moves: only what moves it is compared
        optimizer = fastsam.LETS(create(method, params, backend), rho_lr=1e-12, hessian=hessian)

        def closure(scale, params=params):
            loss = sum(torch.cos(scale * p).sum() for p in params)
            loss.backward()
            return loss

        for _ in range(3):
            optimizer.step(lambda: closure(1.0), lambda: closure(0.9))
            seen += [*copies(params), optimizer.metrics["hypergradient"]]
    for k, (a, b) in enumerate(zip(seen[:9], seen[9:], strict=True)):
        # a sum of products that cancel
        torch.testing.assert_close(a, b, rtol=1e-4 if k % 3 == 2 else 2e-6, atol=2e-6)


def test_copies_of_the_optimizer_leave_it_behind():
    params = parameters(BIG)
    optimizer = fastsam.VaSSO(params, **SGD, backend="torch")
    step(optimizer, params)
    step(optimizer, params)
    size = 4 * BIG
    data = pickle.dumps(optimizer)
    assert 3 * size < len(data) < 3.5 * size  # the weights, the momentum, the average
    for twin in (copy.deepcopy(optimizer), pickle.loads(data)):
        (theirs,) = twin.param_groups[0]["params"]
        assert theirs.data_ptr() != params[0].data_ptr() and torch.equal(theirs, params[0])
        step(twin, [theirs])
    step(optimizer, params)
    assert torch.equal(theirs, params[0])


OWN = {"ascent_ema", "ascent_sum", "ascent_exp_avg", "ascent_exp_avg_sq"}
WITH_STATE = ["vasso", "lightsam-2", "lightsam-3"]
#: How a user may hold on to a tensor.
HOLD = {
    "tensor": lambda x: x, "detach": lambda x: x.detach(), "view": lambda x: x.view(-1),
    "part": lambda x: x[3:5], "numpy": lambda x: x.numpy(), "list": lambda x: [x],
    "set_": lambda x: torch.empty(0).set_(x.untyped_storage()),
}  # fmt: skip


def ascent_state(optimizer):
    """What the ascent keeps of each parameter."""
    return [s[name] for s in optimizer.state.values() for name in sorted(OWN & s.keys())]


@pytest.mark.parametrize("method", WITH_STATE)
def test_memory_of_the_state_before_last_is_used_again(method):
    params = parameters(BIG, SMALL)
    optimizer, seen = create(method, params, "torch"), []
    for _ in range(6):
        step(optimizer, params)
        seen.append([x.data_ptr() for x in ascent_state(optimizer)])
    assert seen[1] == seen[3] == seen[5] and seen[2] == seen[4] and seen[1] != seen[2]


@pytest.mark.parametrize("when", ["between", "after"])
@pytest.mark.parametrize("hold", HOLD)
@pytest.mark.parametrize("method", WITH_STATE)
def test_state_that_somebody_holds_is_not_written_to(method, hold, when):
    params, twins = parameters(BIG, SMALL), parameters(BIG, SMALL)
    optimizer, twin = create(method, params, "torch"), create(method, twins, "torch")
    held = []
    for number in range(8):
        for half, _ in enumerate(halves(optimizer, params)):
            if number in (1, 2, 4) and half == ("between", "after").index(when):
                held += [(HOLD[hold](x), x.clone()) for x in ascent_state(optimizer)]
        step(twin, twins)
        for x, value in held:
            x = torch.as_tensor(x[0] if isinstance(x, list) else x)
            assert torch.equal(x, HOLD[hold](value) if hold == "part" else value)
    assert same(params, twins) and same(ascent_state(optimizer), ascent_state(twin))


@pytest.mark.parametrize("method", WITH_STATE)
def test_optimizers_that_share_a_checkpoint(method):
    """``load_state_dict`` takes tensors as they are: none may write to those of another."""
    runs = []
    for shares in (True, False):
        params = parameters(BIG, SMALL)
        optimizer = create(method, params, "torch")
        step(optimizer, params)
        everyone = [(optimizer, params)]
        for _ in range(2):
            others = [torch.nn.Parameter(x) for x in copies(params)]
            saved = copy.deepcopy(optimizer.state_dict())
            for k, entry in enumerate(saved["state"].values()):
                names = OWN & entry.keys() if shares else ()
                entry |= {name: optimizer.state[params[k]][name] for name in names}
            everyone.append((create(method, others, "torch"), others))
            everyone[-1][0].load_state_dict(saved)
        del saved, entry
        for number in range(12):
            one, its = everyone[number % 3 if number < 6 else number // 4]
            step(one, its)
        runs.append([p for _, its in everyone for p in its])
    assert same(*runs)
