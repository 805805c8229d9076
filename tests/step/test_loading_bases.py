"""State dicts of every optimizer of torch's, fused or not: loaded by its own, refused by others."""

import copy
import inspect

import pytest
import torch

import fastsam
from fastsam.step.receiver import number_of
from fastsam.step.torch_state import NUMBER, shapes_of

from checkpoints import through_disk
from registry import DEVICE
from test_loading import check_refused, params_of, put, run, without_marks
from two_losses import same

#: Those that SAM serves; LBFGS wants closures, SparseAdam sparse gradients, Adadelta has a rho.
CLASSES = {
    name: cls
    for name, cls in vars(torch.optim).items()
    if inspect.isclass(cls) and issubclass(cls, torch.optim.Optimizer)
    and cls is not torch.optim.Optimizer and name not in ("LBFGS", "SparseAdam", "Adadelta")
}  # fmt: skip
SWITCHES = {"RMSprop": {"momentum": 0.5, "centered": True}}


def parameters(name=""):
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 4), (4, 2)] if name == "Muon" else [(3, 4), (5,), (2, 3, 4)]
    return [torch.nn.Parameter(torch.randn(s, generator=generator).to(DEVICE)) for s in shapes]


def made(name, cls=fastsam.SAM, shapes_for="", **kwargs):
    return cls(parameters(shapes_for or name), CLASSES[name], **kwargs)


def test_every_class_of_torchs_is_there():
    assert CLASSES.keys() >= {"Adafactor", "Adam", "AdamW", "Adamax", "ASGD", "Adagrad", "Muon",
                              "NAdam", "RAdam", "RMSprop", "Rprop", "SGD"}  # fmt: skip


@pytest.mark.parametrize("marked", [True, False])
@pytest.mark.parametrize("name", CLASSES)
def test_every_base_of_torchs_resumes_with_its_defaults(name, marked):
    """And with what gives it more state; step for step as the run that was not interrupted."""
    for kwargs in ({}, SWITCHES[name]) if name in SWITCHES else ({},):
        optimizer = run(made(name, **kwargs))
        saved = through_disk(optimizer.state_dict())
        resumed = made(name, **kwargs)
        with torch.no_grad():
            for p, q in zip(params_of(resumed), params_of(optimizer), strict=True):
                p.copy_(q)
        resumed.load_state_dict(saved if marked else without_marks(saved))
        run(resumed), run(optimizer)
        assert all(map(torch.equal, params_of(resumed), params_of(optimizer)))
        assert same(resumed.state_dict(), optimizer.state_dict())


@pytest.mark.filterwarnings("ignore:some parameters are float16 or bfloat16")
@pytest.mark.parametrize("cls", [fastsam.VaSSO, fastsam.FriendlySAM])
def test_state_of_the_ascent_keeps_its_dtype_on_a_base_that_is_not_fused(cls):
    """The base's own is in the parameter's bfloat16, an average of gradients in float32."""

    def made():
        params = [torch.nn.Parameter(p.detach().bfloat16()) for p in parameters()]
        return cls(params, torch.optim.RMSprop, lr=0.01, backend="torch")

    optimizer = run(made())
    resumed = made()
    resumed.load_state_dict(through_disk(optimizer.state_dict()))
    for p, q in zip(params_of(optimizer), params_of(resumed), strict=True):
        state, loaded = optimizer.state[p], resumed.state[q]
        (average,) = [name for name in state if name.startswith("ascent_")]
        assert loaded[average].dtype == torch.float32
        assert torch.equal(loaded[average], state[average])
        assert loaded["square_avg"].dtype == torch.bfloat16


UNFUSED = [name for name in CLASSES if name not in ("SGD", "Adam", "AdamW", "Adagrad")]


@pytest.mark.parametrize("name", [*UNFUSED, "Adadelta"])
def test_the_table_is_what_torch_keeps(name):
    for kwargs in ({}, SWITCHES.get(name, {})):
        optimizer = getattr(torch.optim, name)(parameters(name), **kwargs)
        run(optimizer, 1)
        for p in params_of(optimizer):
            held = {
                key: tuple(x.shape) if isinstance(x, torch.Tensor) and x.dim() else NUMBER
                for key, x in optimizer.state[p].items()
            }
            assert shapes_of(optimizer, optimizer.param_groups[0], p, number_of) == held


@pytest.mark.parametrize("receiver", CLASSES)
def test_no_base_takes_what_it_cannot_step_with(receiver):
    """What torch's optimizers save on their own: refused at once, or good for a step."""
    taken = set()
    for name in CLASSES:
        shapes = "Muon" if "Muon" in (name, receiver) else ""
        given = CLASSES[name](parameters(shapes))
        given = through_disk(run(given).state_dict())
        optimizer = run(made(receiver, shapes_for=shapes), 1)
        try:
            optimizer.load_state_dict(given)
        except ValueError as error:
            assert "in the state dict" in str(error) or "the state dict was" in str(error)
        else:
            taken.add(name)
            run(optimizer)
    assert taken == {receiver}


@pytest.mark.parametrize(("maker", "receiver", "lacks"), [
    ("Adam", "Adamax", "exp_inf"), ("AdamW", "Adamax", "exp_inf"), ("RAdam", "Adamax", "exp_inf"),
    ("Adamax", "RAdam", "exp_avg_sq"),
])  # fmt: skip
def test_another_bases_state_is_named(maker, receiver, lacks):
    optimizer = run(made(receiver))
    given = run(CLASSES[maker](parameters())).state_dict()
    check_refused(
        optimizer, optimizer.load_state_dict, through_disk(given), f"made by (.*'{lacks}'|{maker} )"
    )
    run(optimizer)


# --- damaged -------------------------------------------------------------------------------------

INF, HUGE = float("inf"), 10**400
DAMAGES = [
    ("RMSprop", "momentum", [INF, HUGE, torch.tensor(INF)]),
    ("RMSprop", "alpha", [1.5, INF, HUGE, -0.5]),
    ("RMSprop", "weight_decay", [INF, HUGE]),
    ("RMSprop", "lr", [INF, HUGE]),
    ("RMSprop", "foreach", [torch.tensor([True, False]), "yes", 1]),
    ("RMSprop", "capturable", [torch.tensor([True, False]), None]),
    ("Adam", "fused", [torch.ones(2), "yes"]),
    ("Adam", "lr", [INF, HUGE]),
    ("Adam", "rho", [INF, HUGE]),
    ("NAdam", "momentum_decay", [INF, HUGE]),
    ("Adamax", "eps", [INF, HUGE]),
    ("Adafactor", "eps", [(None, None), (None,), (1e-3, INF), (None, float("nan")), None]),
    ("Muon", "ns_coefficients", [(1.0, 2.0), (1.0, 2.0, INF), (None, 1.0, 2.0)]),
    ("Adamax", "fastsam_method", [torch.ones(2), 1]),
    ("Adamax", "fastsam_base", [torch.ones(2), ["Adamax"]]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "key", "values"), DAMAGES)
def test_damaged_hyperparameters(name, key, values):
    optimizer = run(made(name), 1)
    saved = optimizer.state_dict()
    for value in values:
        given = copy.deepcopy(saved)
        put(given, ("param_groups", 0, key), value)
        check_refused(optimizer, optimizer.load_state_dict, given, key)
    optimizer.load_state_dict(saved)
    run(optimizer)


@pytest.mark.parametrize("name", UNFUSED)
def test_damaged_state(name):
    """None, or of another shape: torch's own steps would fail, each of them."""
    optimizer = run(made(name), 1)
    saved = optimizer.state_dict()
    for key in saved["state"][0]:
        for value in (None, torch.ones(7), "x"):
            given = copy.deepcopy(saved)
            put(given, ("state", 0, key), value)
            check_refused(optimizer, optimizer.load_state_dict, given, f"state '{key}' of param")
        given = copy.deepcopy(saved)
        del given["state"][0][key]
        if not given["state"][0]:  # all that there is: not begun
            continue
        check_refused(optimizer, optimizer.load_state_dict, given, f"state '{key}' of param")
    run(optimizer)


@pytest.mark.parametrize("name", ["Adam", "RMSprop"])
def test_parameters_that_are_no_keys(name):
    optimizer = run(made(name), 1)
    given = copy.deepcopy(optimizer.state_dict())
    given["param_groups"][0]["params"][0] = [0]
    check_refused(optimizer, optimizer.load_state_dict, given, r"keys of its state, got \[0\]")


def test_what_may_be_infinite():
    """Where infinity says that something never comes."""
    for name, key, value in [("ASGD", "t0", INF), ("Rprop", "step_sizes", (1e-6, INF)),
                             ("Adafactor", "d", INF)]:  # fmt: skip
        optimizer = run(made(name, **{key: value}))
        optimizer.load_state_dict(through_disk(optimizer.state_dict()))
        run(optimizer)
        assert all(p.isfinite().all() for p in params_of(optimizer))


# --- older ones ----------------------------------------------------------------------------------

METHODS = [fastsam.SAM, fastsam.USAM, fastsam.UnifiedSAM, fastsam.SSAM]


@pytest.mark.parametrize("receiver", [fastsam.VaSSO, fastsam.SAMAR])
def test_older_state_dicts_of_methods_without_numbers_of_their_own(receiver):
    """Such a method's are told from VaSSO's and SAMAR's; among themselves they are alike."""
    lacks = "'theta'" if receiver is fastsam.VaSSO else "'fastsam_lam'"
    for cls in (*METHODS, fastsam.VaSSO, fastsam.SAMAR):
        if cls is receiver:
            continue
        given = without_marks(through_disk(run(made("AdamW", cls)).state_dict()))
        optimizer = run(made("AdamW", receiver))
        match = lacks if cls in METHODS else "another method"
        check_refused(optimizer, optimizer.load_state_dict, given, match)
        for one in METHODS if cls in METHODS else ():
            made("AdamW", one).load_state_dict(given)
