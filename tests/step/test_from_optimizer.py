"""``from_optimizer``: an optimizer that exists, with its groups, hyper-parameters and state."""

import copy
import functools
import pickle

import pytest
import torch

import fastsam

from conftest import DEVICE
from registry import BACKENDS

RHO = 0.1
SGD = functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9)
ADAMW = functools.partial(torch.optim.AdamW, lr=0.02, eps=1e-3)
ADAGRAD = functools.partial(torch.optim.Adagrad, lr=0.05, initial_accumulator_value=0.1)
MUON = functools.partial(torch.optim.Muon, lr=0.02)  # not fused
ADAGRAD_NORM = functools.partial(fastsam.AdaGradNorm, lr=0.5)
BASES = [SGD, ADAMW, ADAGRAD, MUON, ADAGRAD_NORM]
#: With a base optimizer of the user's choice.
METHODS = [fastsam.SAM, fastsam.ASAM, fastsam.UnifiedSAM, fastsam.USAM, fastsam.SSAM,
           fastsam.VaSSO, fastsam.SAMAR]  # fmt: skip


def parameters(shapes=((3, 4), (4, 5))):
    generator = torch.Generator().manual_seed(0)
    return [
        torch.nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64).to(DEVICE))
        for s in shapes
    ]


def params_of(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


def give_gradients(params):
    for param in params:
        param.grad = torch.sin(3 * param.detach())


def plain_steps(optimizer, count=3):
    for _ in range(count):
        give_gradients(params_of(optimizer))
        optimizer.step()


def sam_step(optimizer):
    for half in (optimizer.first_step, optimizer.second_step):
        give_gradients(params_of(optimizer))
        half()


@torch.no_grad()
def sam_step_by_hand(optimizer, rho=RHO):
    """SAM's equation around a torch optimizer, in float64."""
    params = params_of(optimizer)
    give_gradients(params)
    norm = torch.cat([p.grad.flatten() for p in params]).norm()
    before = [p.clone() for p in params]
    for p in params:
        p += rho * p.grad / (norm + 1e-12)
    give_gradients(params)
    for p, w in zip(params, before, strict=True):
        p.copy_(w)
    optimizer.step()


def close(xs, ys):
    for x, y in zip(xs, ys, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("base", BASES)
def test_it_goes_on_with_groups_and_state(base, backend):
    """After a factory and a resumed run: own keys, a scheduler's initial_lr, momentum, counts."""
    made = []
    for params in (parameters(), parameters()):
        optimizer = base(
            [{"params": params[:1], "lr": 0.03, "lr_scale": 0.5}, {"params": params[1:]}]
        )
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        plain_steps(optimizer)
        scheduler.step()
        made.append((optimizer, scheduler))
    (optimizer, scheduler), (twin, other) = made
    groups, state = optimizer.param_groups, optimizer.state
    keys = [{k: v for k, v in g.items() if not k.startswith("fastsam_")} for g in groups]
    held = {p: dict(values) for p, values in state.items()}

    sam = fastsam.SAM.from_optimizer(optimizer, rho=RHO, backend=backend)
    assert sam.base_optimizer is optimizer and sam.param_groups is groups and sam.state is state
    for group, had in zip(sam.param_groups, keys, strict=True):
        assert had.items() <= group.items() and group["rho"] == RHO
    for p, values in held.items():  # not copied
        assert all(sam.state[p][name] is value for name, value in values.items())
    for _ in range(3):
        sam_step(sam)
        sam_step_by_hand(twin)
        scheduler.step()  # which knows the optimizer that was
        other.step()
    close(params_of(sam), params_of(twin))
    assert [g["lr"] for g in sam.param_groups] == [g["lr"] for g in twin.param_groups]
    torch.optim.lr_scheduler.ExponentialLR(sam, 0.5).step()  # a new one, too


@pytest.mark.parametrize("cls", METHODS)
def test_every_method_is_as_one_made_of_parameters(cls):
    made = []
    for params in (parameters(), parameters()):
        plain = ADAMW(params, weight_decay=0.1)
        plain_steps(plain)
        made.append(plain)
    taken = cls.from_optimizer(made[0], rho=0.2, backend="torch")
    fresh = cls(parameters(), torch.optim.AdamW, rho=0.2, lr=0.02, eps=1e-3, weight_decay=0.1,
                backend="torch")  # fmt: skip
    with torch.no_grad():
        for p, q in zip(params_of(fresh), params_of(made[1]), strict=True):
            p.copy_(q)
    fresh.load_state_dict(made[1].state_dict())
    for _ in range(3):
        sam_step(taken)
        sam_step(fresh)
    assert all(map(torch.equal, params_of(taken), params_of(fresh)))
    saved, other = taken.state_dict(), fresh.state_dict()
    assert saved["param_groups"] == other["param_groups"] and type(taken) is cls


class Needy(torch.optim.Optimizer):
    """Made by a factory's closure: its arguments are not to be found in its groups."""

    def __init__(self, params, schedule):
        super().__init__(params, {"momentum": 0.5})
        self.schedule, self.count = schedule, 0

    @torch.no_grad()
    def step(self, closure=None):
        self.count += 1
        for p in params_of(self):
            p -= self.schedule(self.count) * p.grad


def test_a_class_that_cannot_be_made_again():
    sam = fastsam.SAM.from_optimizer(Needy(parameters(), lambda k: 0.1 / k), rho=RHO)
    twin = Needy(parameters(), lambda k: 0.1 / k)
    for _ in range(3):
        sam_step(sam)
        sam_step_by_hand(twin)
    close(params_of(sam), params_of(twin))


class Louder(torch.optim.SGD):
    @torch.no_grad()
    def step(self, closure=None):
        for p in params_of(self):
            p -= 2 * p.grad


def test_a_subclass_of_a_fused_class_is_stepped_itself():
    sam = fastsam.SAM.from_optimizer(Louder(parameters(), lr=0.0), rho=RHO)
    twin = Louder(parameters(), lr=0.0)
    sam_step(sam)
    sam_step_by_hand(twin)
    close(params_of(sam), params_of(twin))


@pytest.mark.parametrize("base", [SGD, MUON])
def test_hooks_stay_and_the_old_step_is_refused(base):
    optimizer, seen = base(parameters()), []
    optimizer.register_step_pre_hook(lambda *_: seen.append("pre"))
    optimizer.register_step_post_hook(lambda *_: seen.append("post"))
    optimizer.register_state_dict_post_hook(lambda *_: seen.append("saved"))
    sam = fastsam.SAM.from_optimizer(optimizer, RHO)
    assert sam.param_groups[0]["rho"] == RHO
    sam_step(sam)
    assert seen == ["pre", "post"]
    optimizer.state_dict()
    assert seen[2:] == ["saved"]
    before = [p.detach().clone() for p in params_of(sam)]
    with pytest.raises(RuntimeError, match=r"given to SAM\.from_optimizer.*step the SAM instead"):
        optimizer.step()
    assert all(map(torch.equal, before, params_of(sam)))
    sam_step(sam)


def test_copies_state_dicts_and_more_groups():
    optimizer = ADAMW(parameters())
    plain_steps(optimizer)
    sam = fastsam.SAM.from_optimizer(optimizer, rho=RHO, perturb_every=2)
    sam_step(sam)
    twin = copy.deepcopy(sam)
    resumed = fastsam.SAM(parameters(), torch.optim.AdamW, rho=0.3, lr=1.0, perturb_every=2)
    with torch.no_grad():
        for p, q in zip(params_of(resumed), params_of(sam), strict=True):
            p.copy_(q)
    resumed.load_state_dict(copy.deepcopy(sam.state_dict()))
    for one in (sam, twin, resumed):
        sam_step(one)
    for one in (twin, resumed):
        assert all(map(torch.equal, params_of(one), params_of(sam))) and one.kept["t"] == 3
    sam.add_param_group({"params": parameters([(2,)])})
    assert sam.param_groups[1]["lr"] == 0.02 and sam.param_groups[1]["rho"] == RHO
    sam_step(sam)


def test_a_state_dict_of_ours_in_a_torch_optimizer():
    """Its count goes on, and its groups' own radius counts."""
    sam = fastsam.SAM(parameters(), torch.optim.AdamW, rho=0.3)
    sam_step(sam)
    plain = ADAMW(parameters())
    plain.load_state_dict(sam.state_dict())
    taken = fastsam.SAM.from_optimizer(plain, rho=RHO)
    assert taken.kept["t"] == 2 and taken.param_groups[0]["rho"] == 0.3


def test_sums_of_norms_go_on():
    optimizer = ADAGRAD_NORM(parameters(), initial_accumulator_value=2.0)
    plain_steps(optimizer)
    held = float(optimizer.kept["squared_norms"])
    assert held > 2
    sam = fastsam.SAM.from_optimizer(optimizer)
    assert float(sam.kept["squared_norms"]) == held


def test_master_weights():
    params = [torch.nn.Parameter(p.detach().bfloat16()) for p in parameters()]
    optimizer = SGD(params)
    plain_steps(optimizer)
    sam = fastsam.SAM.from_optimizer(optimizer, master_weights=True)
    sam_step(sam)
    assert all(sam.state[p]["momentum_buffer"].dtype == torch.float32 for p in params)


def test_lets_around_it():
    sam = fastsam.SAM.from_optimizer(SGD(parameters()), rho=RHO)
    optimizer = fastsam.LETS(sam)

    def closure():
        give_gradients(params_of(sam))
        return 1.0

    optimizer.step(closure, closure)
    assert optimizer.state is sam.base_optimizer.state
    with pytest.raises(TypeError, match=r"fastsam\.SAM\.from_optimizer"):
        fastsam.LETS(SGD(parameters()))


def snapshot(optimizer):
    hooks = [len(value) for key, value in vars(optimizer).items() if key.endswith("_hooks")]
    groups = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    return (
        hooks,
        groups,
        {id(p): {k: id(v) for k, v in s.items()} for p, s in optimizer.state.items()},
    )


REFUSED = [
    (fastsam.SAM, SGD, {"lr": 0.1}, TypeError, "unexpected argument 'lr'.*param_groups"),
    (fastsam.SAM, SGD, {"rho": -1.0}, ValueError, "rho must be at least 0"),
    (fastsam.SAM, SGD, {"backend": "cuda"}, ValueError, "backend"),
    (fastsam.SAM, MUON, {"master_weights": True}, ValueError, "master_weights must be False"),
    (fastsam.ASAM, SGD, {"renormalise": True}, TypeError, "unexpected argument 'renormalise'"),
    (fastsam.SAMAR, SGD, {"lam": -1.0}, ValueError, "lam must be"),
    (fastsam.SAM, functools.partial(torch.optim.Adadelta, lr=1.0), {}, TypeError, "has rho"),
    (fastsam.SAM, torch.optim.LBFGS, {}, TypeError, "LBFGS needs one"),
    (fastsam.AdaSAM, SGD, {"lr": 0.1, "rho": 0.1}, TypeError, "AdaSAM has an update of its own"),
    (fastsam.LightSAM, SGD, {}, TypeError, "LightSAM has an update of its own.*SGD"),
]


@pytest.mark.parametrize(("cls", "base", "kwargs", "error", "match"), REFUSED)
def test_refused_and_nothing_has_changed(cls, base, kwargs, error, match):
    optimizer = base(parameters())
    if base is not torch.optim.LBFGS:
        plain_steps(optimizer, 1)
    before = snapshot(optimizer)
    with pytest.raises(error, match=match):
        cls.from_optimizer(optimizer, **kwargs)
    assert snapshot(optimizer) == before
    if base is not torch.optim.LBFGS:
        plain_steps(optimizer, 1)


@pytest.mark.parametrize(
    ("given", "error", "match"),
    [
        (lambda: torch.optim.SGD, TypeError, "got the class SGD"),
        (lambda: None, TypeError, "got NoneType"),
        (lambda: fastsam.SAM(parameters(), torch.optim.SGD), TypeError, "sharpness-aware itself"),
        (lambda: fastsam.LETS(fastsam.SAM(parameters(), torch.optim.SGD)), TypeError, "LETS"),
        (lambda: fastsam.SAM.from_optimizer(SGD(parameters())).base_optimizer, ValueError,
         "base of another"),
        (lambda: fastsam.SAM(parameters(), torch.optim.SGD).base_optimizer, ValueError,
         "base of another"),
    ],
)  # fmt: skip
def test_what_cannot_be_taken_over(given, error, match):
    with pytest.raises(error, match=match):
        fastsam.USAM.from_optimizer(given())


def test_a_constructor_that_fails_late():
    """In a subclass, after all else has been done."""

    class Late(fastsam.SAM):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            raise KeyError("late")

    optimizer = ADAGRAD_NORM(parameters())
    plain_steps(optimizer)
    before, kept = snapshot(optimizer), optimizer.kept
    with pytest.raises(KeyError, match="late"):
        Late.from_optimizer(optimizer)
    assert snapshot(optimizer) == before and optimizer.kept is kept
    assert fastsam.SAM.from_optimizer(optimizer).kept["squared_norms"] is kept["squared_norms"]


# --- what a torch optimizer has loaded -----------------------------------------------------------


def loaded(cls, marked=True, **kwargs):
    """AdamW with a state dict of a method on it."""
    given = cls(parameters(), torch.optim.AdamW, **kwargs)
    sam_step(given)
    saved = copy.deepcopy(given.state_dict())
    for group in saved["param_groups"] if not marked else ():
        del group["fastsam_method"], group["fastsam_base"]
    plain = ADAMW(parameters())
    plain.load_state_dict(saved)
    return plain


@pytest.mark.parametrize(("maker", "cls"), [
    (fastsam.ASAM, fastsam.SAM), (fastsam.VaSSO, fastsam.SAM), (fastsam.SAM, fastsam.ASAM),
    (fastsam.SAMAR, fastsam.USAM), (fastsam.SAM, fastsam.VaSSO),
])  # fmt: skip
def test_another_methods_state_is_not_taken_over(maker, cls):
    """By its name, and the optimizer is as it was; its own method goes on with it."""
    plain = loaded(maker)
    before = snapshot(plain)
    match = f"made by {maker.__name__} on AdamW, which {cls.__name__} on AdamW cannot go on with"
    with pytest.raises(ValueError, match=match):
        cls.from_optimizer(plain)
    assert snapshot(plain) == before
    taken = maker.from_optimizer(plain)
    assert taken.kept["t"] == 2
    sam_step(taken)
    maker(parameters(), torch.optim.AdamW).load_state_dict(taken.state_dict())


@pytest.mark.parametrize(("maker", "key"), [
    (fastsam.VaSSO, "ascent_ema"), (fastsam.SAMAR, "fastsam_lam"),
])  # fmt: skip
def test_older_state_of_another_method_is_not_taken_over(maker, key):
    """It does not say whose it is, but has what only that method has."""
    plain = loaded(maker, marked=False)
    before = snapshot(plain)
    with pytest.raises(ValueError, match=f"has '{key}' of another method, which SAM cannot"):
        fastsam.SAM.from_optimizer(plain)
    assert snapshot(plain) == before
    assert maker.from_optimizer(plain).kept["t"] == 2


def test_a_mark_of_another_base_is_refused():
    plain = torch.optim.Adam(parameters())
    plain.load_state_dict(loaded(fastsam.SAM).state_dict())
    with pytest.raises(ValueError, match="made by SAM on AdamW, which SAM on Adam cannot"):
        fastsam.SAM.from_optimizer(plain)


class Mine(fastsam.SAM):
    """It computes what its parent does."""


def test_a_subclass_goes_on_with_its_parents():
    assert Mine.from_optimizer(loaded(fastsam.SAM)).kept["t"] == 2


@pytest.mark.parametrize("base", [SGD, MUON])
@pytest.mark.parametrize("lets", [False, True])
def test_copies_and_pickles_keep_the_guard(base, lets):
    """On their own base, and they step as the original does."""
    sam = fastsam.SAM.from_optimizer(base(parameters()), rho=RHO)
    sam_step(sam)
    whole = fastsam.LETS(sam) if lets else sam
    once = copy.deepcopy(whole)
    for one in (once, copy.deepcopy(once), pickle.loads(pickle.dumps(whole))):
        inner = getattr(one, "optimizer", one)
        with pytest.raises(RuntimeError, match=r"given to SAM\.from_optimizer"):
            inner.base_optimizer.step()
        twin = copy.deepcopy(sam)
        sam_step(inner)
        sam_step(twin)
        assert all(map(torch.equal, params_of(inner), params_of(twin)))
        assert len(inner.base_optimizer._optimizer_step_pre_hooks) == 1


def test_copies_of_others_have_no_guard():
    sam = copy.deepcopy(fastsam.SAM(parameters(), torch.optim.Muon, lr=0.02))
    assert not sam.base_optimizer._optimizer_step_pre_hooks
