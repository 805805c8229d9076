"""State dicts: which are loaded, which are refused and by what name, and that nothing is halved."""

import copy
import dataclasses
import pickle

import numpy as np
import pytest
import torch
from torch.optim import SGD, Adam, AdamW, NAdam, RMSprop

import fastsam

from checkpoints import through_disk
from registry import BACKENDS, DEVICE
from two_losses import everything, same

NAN, INF = float("nan"), float("inf")


def parameters(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 4), (5,)]
    return [torch.nn.Parameter(torch.randn(s, generator=generator).to(DEVICE, dtype))
            for s in shapes]  # fmt: skip


def params_of(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


def run(optimizer, steps=2):
    """Some steps along gradients that depend on where they are taken."""
    params = params_of(optimizer)

    def closure():
        for p in params:
            p.grad = torch.sin(3 * p.detach())
        return sum((p.detach().double() ** 2).sum() for p in params)

    for _ in range(steps):
        if isinstance(optimizer, fastsam.LETS):
            optimizer.step(closure, lambda: 2 * closure())
        elif isinstance(optimizer, (fastsam.optimizer.SharpnessAwareOptimizer)):
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()
    return optimizer


def sam(base=Adam, cls=fastsam.SAM, **kwargs):
    return lambda params, **more: cls(params, base, **({"lr": 0.1} | kwargs | more))


def light(cls=fastsam.LightSAM, **kwargs):
    return lambda params, **more: cls(params, lr=0.1, rho=0.1, **kwargs, **more)


def lets(rho_optimizer=Adam, cls=fastsam.SAM, **kwargs):
    return lambda params: fastsam.LETS(
        cls(params, SGD, lr=0.1, momentum=0.9), 0.1, rho_optimizer=rho_optimizer, **kwargs
    )


MAKERS = {
    "sam-sgd": sam(SGD, momentum=0.9),
    "sam-adam": sam(),
    "sam-adamw": sam(AdamW),
    "asam-adam": sam(cls=fastsam.ASAM),
    "usam-adam": sam(cls=fastsam.USAM),
    "sam-adagrad_norm": sam(fastsam.AdaGradNorm),
    "sam-nadam": sam(NAdam),
    "vasso-sgd": sam(SGD, fastsam.VaSSO, momentum=0.9),
    "samar-rmsprop": sam(RMSprop, fastsam.SAMAR, momentum=0.5),
    "lightsam-1": light(rule="adagrad_norm"),
    "lightsam-3": light(),
    "adasam": light(fastsam.AdaSAM),
    "sgd": lambda params: SGD(params, lr=0.2, momentum=0.8),
    "adam": lambda params: Adam(params, lr=0.2),
    "adamw": lambda params: AdamW(params, lr=0.2),
    "rmsprop": lambda params: RMSprop(params, lr=0.2),
    "nadam": lambda params: NAdam(params, lr=0.2),
    "adagrad_norm": lambda params: fastsam.AdaGradNorm(params, lr=0.2),
    "lets-adam": lets(),
    "lets-sgd": lets(SGD),
}


def trained(name, steps=2, **kwargs):
    return run(MAKERS[name](parameters(), **kwargs), steps)


def without_marks(state_dict):
    """As older versions have saved it."""
    for group in state_dict["param_groups"]:
        for key in ("fastsam_method", "fastsam_base"):
            group.pop(key, None)
    state_dict.get("lets", {}).pop("rho_optimizer", None)
    return state_dict


def check_refused(optimizer, load, given, match):
    """With this message, and without a trace: bit for bit, object for object."""
    params, before = params_of(optimizer), everything(params_of(optimizer), optimizer)
    inner = getattr(optimizer, "optimizer", optimizer)
    base = getattr(inner, "base_optimizer", inner)
    held = optimizer.state, optimizer.param_groups, dict(getattr(inner, "kept", {}))
    with pytest.raises(ValueError, match=match):
        load(given)
    assert base.state is optimizer.state is held[0]
    assert base.param_groups is optimizer.param_groups is held[1]
    if hasattr(inner, "kept"):
        assert all(inner.kept[key] is value for key, value in held[2].items())
    assert same(everything(params, optimizer), before)


# --- who made it ---------------------------------------------------------------------------------

OTHERS = [
    ("sam-adam", "sam-sgd", "made by SAM on Adam and cannot be loaded into SAM on SGD",
     "made by Adam .its groups have 'betas' and lack 'momentum'"),
    ("adam", "sam-sgd", "made by Adam .*cannot be loaded into SAM on SGD", None),
    ("sgd", "sam-adam", "made by SGD .its groups have 'momentum' and lack 'betas'", None),
    ("adamw", "sam-adam", "made by AdamW and cannot be loaded into SAM on Adam", None),
    ("adam", "sam-adamw", "made by Adam and cannot be loaded into SAM on AdamW", None),
    ("nadam", "sam-adam", "made by NAdam .its groups have 'momentum_decay'", None),
    ("adam", "sam-nadam", "made by Adam |NAdam cannot take over .* 'mu_product'", None),
    ("rmsprop", "sam-sgd", "made by RMSprop ", None),
    ("sgd", "sam-adagrad_norm", "made by SGD ", None),
    ("adagrad_norm", "sam-sgd", "made by AdaGradNorm and", "its groups have 'fastsam_squared_no"),
    ("sgd", "adagrad_norm", "made by SGD ", None),
    ("sam-sgd", "adagrad_norm", "made by SAM on SGD and cannot be loaded into AdaGradNorm",
     "made by SGD "),
    ("sam-adam", "asam-adam", "made by SAM on Adam and cannot be loaded into ASAM on Adam",
     "with adaptive=False"),
    ("asam-adam", "sam-adam", "made by ASAM on Adam", "with adaptive=True"),
    ("usam-adam", "sam-adam", "made by USAM on Adam", ""),
    ("vasso-sgd", "sam-sgd", "made by VaSSO on SGD", "'ascent_ema' of parameter 0 .* another"),
    ("adasam", "lightsam-3", "made by AdaSAM", "with amsgrad=True"),
    ("adam", "adasam", "made by Adam ", None),
    ("lightsam-3", "adasam", "made by LightSAM on Unc.*into AdaSAM", "'ascent_exp_avg' of|amsgrad"),
    ("lightsam-1", "lightsam-3", "made by LightSAM on UncorrectedAdaGradNorm", "squared_norms"),
    ("sam-adam", "lets-adam", "made by SAM on Adam and cannot be loaded into SAM on SGD", "Adam"),
    ("lets-adam", "lets-sgd", "made with rho_optimizer=Adam .* with rho_optimizer=SGD",
     "does not fit rho_optimizer=SGD: .* made by Adam "),
    ("lets-sgd", "lets-adam", "made with rho_optimizer=SGD .* with rho_optimizer=Adam",
     "does not fit rho_optimizer=Adam: .* made by SGD "),
]  # fmt: skip


@pytest.mark.parametrize(("maker", "receiver", "message", "unmarked"), OTHERS)
def test_what_another_method_or_base_made_is_refused(maker, receiver, message, unmarked):
    """By its name; and by what it has where it is older than the names. None: the same message."""
    optimizer, saved = trained(receiver), through_disk(trained(maker).state_dict())
    check_refused(optimizer, optimizer.load_state_dict, saved, message)
    base = getattr(optimizer, "base_optimizer", None)
    if base is not None:
        check_refused(optimizer, base.load_state_dict, saved, message)
    unmarked = message if unmarked is None else unmarked
    if unmarked:  # some older ones cannot be told apart
        check_refused(optimizer, optimizer.load_state_dict, without_marks(saved), unmarked)
    run(optimizer)


OWN_BASES = [("adam", "sam-adam"), ("adam", "asam-adam"), ("adamw", "sam-adamw"),
             ("sgd", "vasso-sgd"), ("rmsprop", "samar-rmsprop"), ("nadam", "sam-nadam"),
             ("adagrad_norm", "sam-adagrad_norm")]  # fmt: skip


@pytest.mark.parametrize(("maker", "receiver"), OWN_BASES)
def test_the_base_on_its_own_is_loaded(maker, receiver):
    """The method's own switches stay, and so does its own state."""
    plain = trained(maker)
    for load in ("optimizer", "base"):
        optimizer = trained(receiver, steps=1)
        own = {key: optimizer.param_groups[0][key] for key in ("rho", "adaptive", "eta")}
        owner = optimizer if load == "optimizer" else optimizer.base_optimizer
        owner.load_state_dict(through_disk(plain.state_dict()))
        group = optimizer.param_groups[0]
        assert {key: group[key] for key in own} == own and group["lr"] == 0.2
        assert optimizer.kept["t"] == 2
        for p, q in zip(params_of(optimizer), params_of(plain), strict=True):
            assert same(dict(optimizer.state[p]), dict(plain.state[q]))
        run(optimizer)
        assert optimizer.state_dict()["param_groups"][0]["fastsam_base"] == type(plain).__name__


@pytest.mark.parametrize(
    "name", [name for name in MAKERS if name not in ("sgd", "adam", "adamw", "rmsprop", "nadam")]
)
def test_older_state_dicts_are_loaded(name):
    """They do not say who made them, and go on all the same."""
    optimizer = trained(name)
    saved = without_marks(through_disk(optimizer.state_dict()))
    resumed = MAKERS[name](parameters())
    resumed.load_state_dict(saved)
    assert same(resumed.state_dict(), optimizer.state_dict())


class Renamed(fastsam.SAM):
    """A class of the user's that computes what its parent does."""


class Steeper(fastsam.SAM):
    """One with a rule of its own."""

    ascent = dataclasses.replace(fastsam.SAM.ascent, name="steeper")


def test_subclasses():
    saved = through_disk(trained("sam-adam").state_dict())
    mine = sam(cls=Renamed)(parameters())
    mine.load_state_dict(saved)
    back = MAKERS["sam-adam"](parameters())
    back.load_state_dict(through_disk(mine.state_dict()))
    other = sam(cls=Steeper)(parameters())
    check_refused(
        other, other.load_state_dict, saved, "made by SAM on Adam .* into Steeper on Adam"
    )


def test_marks_follow_copies_and_groups():
    optimizer = trained("sam-adam")
    extra = torch.nn.Parameter(torch.ones(2, device=DEVICE))
    optimizer.add_param_group({"params": [extra], "fastsam_method": "VaSSO"})
    for one in (optimizer, copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        for group in one.state_dict()["param_groups"]:
            assert (group["fastsam_method"], group["fastsam_base"]) == ("SAM", "Adam")


@pytest.mark.parametrize("name", ["sam-adam", "samar-rmsprop", "sam-adagrad_norm", "lightsam-1"])
def test_the_bases_own_state_dict_is_complete(name):
    """How checkpoints of the usual class are saved: with the present counts, not those at first."""
    optimizer = trained(name, steps=3)
    saved = through_disk(optimizer.base_optimizer.state_dict())
    assert saved["param_groups"][0]["fastsam_t"] == 4
    resumed = MAKERS[name](parameters())
    resumed.base_optimizer.load_state_dict(saved)
    assert same(resumed.state_dict(), optimizer.state_dict())


# --- damaged -------------------------------------------------------------------------------------

ABSENT = object()
TENSORS = {
    "missing": ABSENT,
    "int64": lambda x: x.long(),
    "bool": lambda x: x.bool(),
    "numpy": lambda x: x.cpu().numpy(),
    "list": lambda x: x.tolist(),
    "shape": lambda x: x.new_zeros(7),
    "transposed": lambda x: x.new_zeros(x.shape[::-1] if x.dim() > 1 else (1, *x.shape)),
    "meta": lambda x: x.to("meta"),
    "sparse": lambda x: x.to_sparse(),
    "complex": lambda x: x.cfloat(),
}
COUNTS = [NAN, "3", -1, 1.5, INF, True, None, torch.tensor([1.0, 2.0]), np.array(3.0),
          torch.tensor(NAN), torch.tensor(True), 10**400]  # fmt: skip
SCALARS = [INF, "x", True, None, torch.ones(2), torch.tensor(INF), np.array(1.0), [1.0]]
NUMBERS = [-1.0, NAN, "x", torch.tensor(-1.0), torch.tensor(NAN), [1.0]]
GROUPS = {
    "lr": NUMBERS,
    "rho": [*NUMBERS, INF, None, torch.ones(2)],
    "eta": [*NUMBERS, INF],
    "theta": NUMBERS,
    "momentum": NUMBERS,
    "weight_decay": NUMBERS,
    "eps": [-1.0, NAN, "x"],
    "betas": [(2.0, 0.9), (0.9,), "x", None, 0.9],
    "amsgrad": ["no", None, np.True_],
    "nesterov": ["no", None],
    "alpha": [-1.0, "x"],
}


def damages(saved):
    """Every field of a state dict replaced by what it may not be: (name, put it there)."""
    for key, entry in saved["state"].items():
        for name, value in entry.items():
            if name == "step":
                bad = [ABSENT, *COUNTS]
            elif value.dim():
                bad = [x if x is ABSENT else x(value) for x in TENSORS.values()]
            else:
                continue  # mu_product, of which torch alone knows
            for x in bad if key == 1 else bad[:2]:
                if x is ABSENT and name in ("momentum_buffer", "ascent_ema") and len(entry) < 3:
                    continue  # all that there is: not begun
                yield f"state '{name}'", ("state", key, name), x
    for name in saved["param_groups"][0]:
        if name in ("fastsam_t", "fastsam_rounding_step"):
            bad = [ABSENT, *COUNTS]
        elif name in ("fastsam_method", "fastsam_base"):
            bad = []
        elif name.startswith("fastsam_"):
            bad = [ABSENT, *SCALARS] + [NAN, -1.0] * (name != "fastsam_sharpness")
        else:
            bad = GROUPS.get(name, [])
        for x in bad:
            yield name, ("param_groups", 0, name), x


def put(given, path, value):
    *where, last = path
    for key in where:
        given = given[key]
    if value is ABSENT:
        del given[last]
    else:
        given[last] = value


FUZZED = ["sam-sgd", "sam-adam", "sam-nadam", "sam-adagrad_norm", "vasso-sgd", "samar-rmsprop",
          "lightsam-1", "lightsam-3", "adasam"]  # fmt: skip


@pytest.mark.parametrize("name", FUZZED)
def test_every_damaged_field_is_named_and_nothing_changes(name):
    """By whichever way it is loaded; the same state dict with its field as it was is loaded."""
    saved = trained(name, steps=3).state_dict()
    optimizer = trained(name, steps=1)
    tried = 0
    for field, path, value in damages(saved):
        given = copy.deepcopy(saved)
        put(given, path, value)
        owner = (optimizer, optimizer.base_optimizer)[tried % 2]
        check_refused(optimizer, owner.load_state_dict, given, field)
        tried += 1
    assert tried > 30
    optimizer.load_state_dict(copy.deepcopy(saved))
    assert same(optimizer.state_dict(), saved)
    run(optimizer)


WHOLE = {
    "no state": (lambda d: d.pop("state"), "'state' is missing"),
    "no groups": (lambda d: d.pop("param_groups"), "'param_groups' is missing"),
    "state": (lambda d: d.update(state=[]), "state of a state dict must be a dict"),
    "groups": (lambda d: d.update(param_groups={}), "param_groups of a state dict must be a list"),
    "group": (lambda d: d["param_groups"].__setitem__(0, None), "must be a list of dicts"),
    "params": (lambda d: d["param_groups"][0].pop("params"), "a list of 'params'"),
    "fewer": (lambda d: d["param_groups"][0]["params"].pop(), "doesn't match the size"),
    "more": (lambda d: d["param_groups"].append(d["param_groups"][0]), "number of parameter gr"),
    "entry": (lambda d: d["state"].update({0: [1]}), "state of parameter 0 .* must be a dict"),
    "by name": (lambda d: d.update(state={str(k): x for k, x in d["state"].items()}),
                "an entry for '0', which is in none of its groups"),
}  # fmt: skip


@pytest.mark.parametrize("damage", WHOLE)
@pytest.mark.parametrize("name", ["sam-adam", "sam-nadam", "lets-adam"])
def test_state_dicts_in_pieces(name, damage):
    optimizer, given = trained(name), copy.deepcopy(trained(name).state_dict())
    spoil, message = WHOLE[damage]
    spoil(given)
    check_refused(optimizer, optimizer.load_state_dict, given, message)


def test_groups_that_disagree():
    optimizer = sam(SGD)([{"params": [p]} for p in parameters()])
    run(optimizer)
    given = copy.deepcopy(optimizer.state_dict())
    given["param_groups"][1]["fastsam_t"] = 7
    message = "'fastsam_t' must be the same in every group"
    check_refused(optimizer, optimizer.load_state_dict, given, message)


def test_a_parameter_that_has_not_begun_is_no_damage():
    """One without a gradient has no state, or the ascent's alone; and momentum may be new."""
    for name in ("sam-adam", "sam-nadam", "lightsam-3"):
        saved = copy.deepcopy(trained(name).state_dict())
        del saved["state"][1]
        optimizer = trained(name)
        optimizer.load_state_dict(saved)
        assert not optimizer.state.get(params_of(optimizer)[1])
        run(optimizer)
    saved = copy.deepcopy(trained("vasso-sgd").state_dict())
    del saved["state"][0]["momentum_buffer"]
    optimizer = trained("vasso-sgd")
    optimizer.load_state_dict(saved)
    run(optimizer)
    assert optimizer.state[params_of(optimizer)[0]].keys() == {"ascent_ema", "momentum_buffer"}


@pytest.mark.parametrize("count", [3, 3.0, torch.tensor(3), torch.tensor([3.0])])
def test_counts_of_other_types_are_loaded(count):
    optimizer, saved = trained("sam-adam"), copy.deepcopy(trained("sam-adam").state_dict())
    saved["state"][0]["step"] = count
    saved["param_groups"][0]["fastsam_t"] = count
    optimizer.load_state_dict(saved)
    assert type(optimizer.kept["t"]) is int and optimizer.kept["t"] == 3
    run(optimizer, 1)
    assert optimizer.state[params_of(optimizer)[0]]["step"] == 4 and optimizer.kept["t"] == 4


# --- LETS ----------------------------------------------------------------------------------------

LEARNED = {
    ("log_rho",): [ABSENT, NAN, INF, 800.0, -800.0, "x", None, torch.ones(2), torch.tensor(NAN)],
    ("ratios",): [ABSENT, [], [1.0, 2.0], [NAN], [-1.0], ["x"], None, 1.0],
    ("steps",): [ABSENT, *COUNTS],
    ("optimizer",): [ABSENT, None, {}, {"state": {}}],
    ("optimizer", "state", 0, "exp_avg"): [ABSENT, torch.ones(2), torch.tensor(1), np.array(1.0)],
    ("optimizer", "state", 0, "step"): [ABSENT, *COUNTS],
    ("optimizer", "param_groups", 0, "lr"): NUMBERS,
    ("optimizer", "param_groups", 0, "betas"): GROUPS["betas"],
}


def test_every_damaged_field_of_the_learned_radius():
    saved, optimizer = trained("lets-adam", 3).state_dict(), trained("lets-adam", 1)
    for path, values in LEARNED.items():
        for value in values:
            given = copy.deepcopy(saved)
            put(given, ("lets", *path), value)
            check_refused(optimizer, optimizer.load_state_dict, given, f"{path[-1]}|'lets'")
    for _, path, value in damages(saved):  # of the wrapped optimizer
        given = copy.deepcopy(saved)
        put(given, path, value)
        check_refused(optimizer, optimizer.load_state_dict, given, str(path[-1]))
    for value in (0.0, NAN, "x", None, torch.ones(2), torch.tensor(-1.0)):
        given = copy.deepcopy(saved)
        del given["lets"]
        given["param_groups"][0]["rho"] = value
        check_refused(optimizer, optimizer.load_state_dict, given, "rho must be above 0")
    optimizer.load_state_dict(copy.deepcopy(saved))
    assert same(optimizer.state_dict(), saved)
    run(optimizer)


# --- whatever fails ------------------------------------------------------------------------------


class Refusing(RMSprop):
    """A base that takes no state, in the middle of being given it."""

    def __setstate__(self, state):
        super().__setstate__(state)
        if getattr(self, "refuses", False):
            raise ValueError("not this time")


@pytest.mark.parametrize("name", ["base", "hook"])
@pytest.mark.parametrize("around", [False, True])
def test_a_load_that_fails_on_the_way(name, around):
    """In the base's own code, or in a user's hook: all is put back."""
    optimizer = run(sam(Refusing)(parameters()))
    if around:
        optimizer = run(fastsam.LETS(optimizer, 0.1))
    saved = copy.deepcopy(run(optimizer).state_dict())

    def fail(_):
        raise ValueError("not this time")

    inner = getattr(optimizer, "optimizer", optimizer)
    if name == "base":
        inner.base_optimizer.refuses = True
    else:
        handle = optimizer.register_load_state_dict_post_hook(fail)
    run(optimizer)
    check_refused(optimizer, optimizer.load_state_dict, saved, "not this time")
    if name == "base":
        check_refused(optimizer, inner.base_optimizer.load_state_dict, saved, "not this time")
    if name == "base":
        inner.base_optimizer.refuses = False
    else:
        handle.remove()
    run(optimizer)
    optimizer.load_state_dict(saved)
    assert same(optimizer.state_dict(), saved)


# --- dtypes --------------------------------------------------------------------------------------

CAST = ["sam-sgd", "sam-adam", "sam-nadam", "vasso-sgd", "samar-rmsprop", "lightsam-3", "adasam"]
SIXTEEN = pytest.mark.filterwarnings("ignore:some parameters are")


@SIXTEEN
@pytest.mark.parametrize("way", ["cast", "loaded"])
@pytest.mark.parametrize(
    ("before", "after"),
    [(torch.float32, torch.float64), (torch.float64, torch.float32),
     (torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)],
)  # fmt: skip
@pytest.mark.parametrize("name", CAST)
def test_state_follows_a_cast(name, before, after, way):
    """Of the model in mid-run, or on loading, and goes on as in float64 from the same numbers."""
    optimizer = run(MAKERS[name](parameters(before), backend="torch"))
    exact = MAKERS[name]([torch.nn.Parameter(p.detach().double()) for p in params_of(optimizer)],
                         backend="reference")  # fmt: skip
    exact.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    if way == "loaded":
        saved = through_disk(optimizer.state_dict())
        params = [torch.nn.Parameter(p.detach().to(after)) for p in params_of(optimizer)]
        optimizer = MAKERS[name](params, backend="torch")
        optimizer.load_state_dict(saved)
    else:
        for p in params_of(optimizer):
            p.grad = None
            p.data = p.data.to(after)
    run(optimizer), run(exact)
    narrow = torch.bfloat16 in (before, after)
    for p, q in zip(params_of(optimizer), params_of(exact), strict=True):
        assert p.dtype == after
        error = float((p.detach().double() - q.detach()).abs().max())
        assert error < (0.1 if narrow else 1e-5)
        for key, x in optimizer.state[p].items():
            if x.shape == p.shape:
                assert (x.dtype == torch.float64) == (after == torch.float64), key


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_cast_on_every_backend(backend):
    optimizer = run(MAKERS["sam-adam"](parameters(), backend=backend), 1)
    twin = copy.deepcopy(optimizer)
    for p in params_of(optimizer):
        p.grad = None
        p.data = p.data.double()
    run(optimizer, 1), run(twin, 1)
    for p, q in zip(params_of(optimizer), params_of(twin), strict=True):
        assert {optimizer.state[p][key].dtype for key in ("exp_avg", "exp_avg_sq")} == {p.dtype}
        torch.testing.assert_close(p.detach(), q.detach().double(), rtol=1e-4, atol=1e-5)


def test_numbers_of_no_parameters_shape_keep_their_dtype():
    """NAdam's product of momenta, which torch makes in float32 whatever the parameter is."""
    saved = through_disk(trained("sam-nadam").state_dict())
    optimizer = MAKERS["sam-nadam"](parameters(torch.float64))
    optimizer.load_state_dict(saved)
    assert all(optimizer.state[p]["mu_product"].dtype == torch.float32
               for p in params_of(optimizer))  # fmt: skip
