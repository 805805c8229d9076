"""Several base optimizers in one: a group key says which is the group's."""

import copy
import functools
import io
import pickle

import pytest
import torch

import fastsam
from fastsam.backends.devices import SeveralDevices
from fastsam.step import collect

from conftest import DEVICE
from registry import BACKENDS

RHO = 0.1
NAN, INF = float("nan"), float("inf")
MUON = (torch.optim.Muon, {"lr": 0.02})  # not fused
RMSPROP = (torch.optim.RMSprop, {"lr": 0.01, "eps": 1e-3})  # not fused
SGD = (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9})
ADAMW = (torch.optim.AdamW, {"lr": 0.02, "eps": 1e-3, "weight_decay": 0.1})
ADAGRAD = (torch.optim.Adagrad, {"lr": 0.05, "initial_accumulator_value": 0.1})
#: The base of the first group, and of the second and third: unfused and fused, fused, unfused.
PAIRS = {"mixed": (MUON, ADAMW), "fused": (SGD, ADAGRAD), "unfused": (MUON, RMSPROP)}
#: In two groups of one base and one of the other, between them.
SHAPES = [[(3, 4), (4, 5)], [(7,), ()], [(33, 2)]]


def parameters(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [
        [
            torch.nn.Parameter(torch.randn(shape, generator=generator).to(DEVICE, dtype))
            for shape in shapes
        ]
        for shapes in SHAPES
    ]


def groups_of(params, pair, **more):
    """The second group names no base; the third is the first one's, with another rate."""
    (cls, kwargs), _ = pair
    first = {"params": params[0], "base_optimizer": cls, **kwargs}
    return [first, {"params": params[1], **more}, first | {"params": params[2], "lr": 0.03}]


def create(pair="mixed", method=fastsam.SAM, dtype=torch.float64, **kwargs):
    pair = PAIRS[pair] if isinstance(pair, str) else pair
    cls, own = pair[1]
    kwargs = {"rho": RHO, "backend": "reference"} | kwargs
    return method(groups_of(parameters(dtype), pair), cls, **own, **kwargs)


def params_of(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


def give_gradients(params, scale=1.0):
    for p in params:
        p.grad = scale * torch.sin(3 * p.detach())


def step(optimizer, **kwargs):
    for half in (optimizer.first_step, optimizer.second_step):
        give_gradients(params_of(optimizer))
        half(**kwargs)


def snapshot(optimizer):
    params = params_of(optimizer)
    held = [p.detach().clone() for p in params]
    state = {
        (i, name): x.clone()
        for i, p in enumerate(params)
        for name, x in optimizer.state.get(p, {}).items()
        if isinstance(x, torch.Tensor)
    }
    return held, state


def same(xs, ys):
    """Of two snapshots."""
    return all(map(torch.equal, xs[0], ys[0])) and (
        xs[1].keys() == ys[1].keys() and all(torch.equal(x, ys[1][k]) for k, x in xs[1].items())
    )


def close(xs, ys, atol=1e-12):
    for x, y in zip(xs, ys, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=atol, check_device=False)


# --- against optimizers of torch's, stepped by hand ---


class ByHand:
    """Two torch optimizers, each on its groups, and SAM's equations over all of them in float64."""

    def __init__(self, pair, **options):
        self.params, self.options = parameters(), options
        (first, kwargs), (second, more) = pair
        own = [{"params": self.params[0]}, {"params": self.params[2], "lr": 0.03}]
        self.members = [first(own, **kwargs), second(self.params[1], **more)]

    @torch.no_grad()
    def step(self):
        params = sum(self.params, [])
        give_gradients(params)
        before, firsts = [p.clone() for p in params], [p.grad for p in params]
        norm = torch.cat([g.flatten() for g in firsts]).norm()
        for p, g in zip(params, firsts, strict=True):
            p += RHO * g / (norm + 1e-12)
        give_gradients(params)
        for p, w, g in zip(params, before, firsts, strict=True):
            p.copy_(w)
            lam = self.options.get("lam", 1.0)
            p.grad = (1 - lam) * g + lam * p.grad
        whole = torch.cat([p.grad.flatten() for p in params]).norm()
        scale = 1.0
        if self.options.get("renormalize"):
            scale = norm / (whole + 1e-12)
        if "max_grad_norm" in self.options:
            scale = scale * min(1.0, float(self.options["max_grad_norm"] / (scale * whole + 1e-6)))
        for p in params:
            p.grad *= scale
        for member in self.members:
            member.step()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.5, "renormalize": True}])
def test_equal_to_two_optimizers(options, pair, backend):
    """One norm over all groups, for the radius, for rescaling and for clipping."""
    optimizer, hand = create(pair, backend=backend, **options), ByHand(PAIRS[pair], **options)
    for _ in range(3):
        step(optimizer)
        hand.step()
    first, second, third = hand.params
    close(params_of(optimizer), first + second + third)
    for member in hand.members:  # the base's state, too, under torch's names
        for p, state in member.state.items():
            place = [q is p for q in first + second + third].index(True)
            found = optimizer.state[params_of(optimizer)[place]]
            assert found.keys() == state.keys()
            close([x.double() for x in found.values()], [x.double() for x in state.values()])


@pytest.mark.parametrize("backend", BACKENDS)
def test_samar(backend):
    optimizer = create("mixed", fastsam.SAMAR, backend=backend, lam=0.3)
    hand = ByHand(PAIRS["mixed"], lam=0.3)
    step(optimizer)  # lam adapts from the second step on
    hand.step()
    close(params_of(optimizer), sum(hand.params, []))


def test_a_step_of_the_bases_alone():
    optimizer, twin = create(perturb_every=2, start=1), ByHand(PAIRS["mixed"])
    give_gradients(params_of(optimizer))
    optimizer.plain_step()
    give_gradients(sum(twin.params, []))
    for member in twin.members:
        member.step()
    close(params_of(optimizer), sum(twin.params, []))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pair", ["mixed", "fused"])
def test_gradients_that_are_missing(pair, backend):
    """In the first pass, in the second, in both, of either base; as on the reference backend."""
    results = []
    for name in ("reference", backend):
        optimizer = create(pair, backend=name, method=fastsam.VaSSO, max_grad_norm=1.0)
        for left_out in (((0,), (2,)), ((3,), (1,)), ((0, 2), (0, 2))):
            for half, missing in zip(
                (optimizer.first_step, optimizer.second_step), left_out, strict=True
            ):
                params = params_of(optimizer)
                give_gradients(params)
                for k in missing:
                    params[k].grad = None
                half()
        results.append(params_of(optimizer))
    close(*results)


@pytest.mark.parametrize("backend", BACKENDS[1:])
@pytest.mark.parametrize("options", [{"norm": "group"}, {"norm": "layer"}, {"ascent_steps": 2}])
def test_what_the_ascent_does_besides(options, backend):
    """Norms of parts, several steps, groups that are not perturbed: beside bases that differ."""
    results = []
    for name in ("reference", backend):
        optimizer = create("mixed", backend=name, **options)
        optimizer.param_groups[2]["perturb"] = False

        def closure(optimizer=optimizer):
            give_gradients(params_of(optimizer))

        for _ in range(2):
            optimizer.step(closure)
        results.append(params_of(optimizer))
    close(*results)


# --- all or nothing ---


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("place", [0, 2])
def test_a_gradient_that_is_not_finite(place, pair, backend):
    """In a parameter of either base: both keep weights and state, and the ascent's."""
    optimizer = create(pair, fastsam.VaSSO, backend=backend, skip_nonfinite=True)
    step(optimizer)
    before = snapshot(optimizer)
    give_gradients(params_of(optimizer))
    optimizer.first_step()
    give_gradients(params_of(optimizer))
    params_of(optimizer)[place].grad.view(-1)[0] = NAN
    optimizer.second_step()
    assert same(snapshot(optimizer), before)
    assert float(optimizer.metrics["skipped"]) == 1
    step(optimizer)
    assert not same(snapshot(optimizer), before)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("method", [fastsam.SAM, fastsam.SAMAR])
def test_a_base_that_fails(method, backend, monkeypatch):
    """Before any fused update, in the middle of its own."""
    optimizer = create("mixed", method, backend=backend)
    step(optimizer)
    before, kept = snapshot(optimizer), {k: float(v) for k, v in optimizer.kept.items()}
    muon = optimizer.base_optimizer.members["Muon"]

    @torch.no_grad()
    def fails():
        params_of(muon)[0].add_(1)
        raise OSError("no")

    with monkeypatch.context() as patch:
        patch.setattr(muon, "step", fails)
        with pytest.raises(OSError, match="no"):
            step(optimizer)
    assert same(snapshot(optimizer), before) and not optimizer.between_passes
    assert {k: float(v) for k, v in optimizer.kept.items()} == kept
    other = create("mixed", method, backend=backend)
    step(other)
    for one in (optimizer, other):
        step(one)
    close(params_of(optimizer), params_of(other))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_loss_scale(backend):
    """Unscaled for all, and skipped by all."""
    optimizer, hand = create(backend=backend), ByHand(PAIRS["mixed"])
    scaler = torch.amp.GradScaler(DEVICE, init_scale=256.0)
    scaler.scale(torch.zeros((), device=DEVICE))  # which makes the scale
    for _ in range(2):
        for half in (optimizer.first_step, optimizer.second_step):
            give_gradients(params_of(optimizer), scale=scaler.get_scale())
            half(grad_scaler=scaler)
        scaler.update()
        hand.step()
    close(params_of(optimizer), sum(hand.params, []))
    before = snapshot(optimizer)
    for half in (optimizer.first_step, optimizer.second_step):
        give_gradients(params_of(optimizer), scale=scaler.get_scale())
        params_of(optimizer)[-1].grad.view(-1)[0] = INF
        half(grad_scaler=scaler)
    scaler.update()
    assert same(snapshot(optimizer), before) and scaler.get_scale() == 128


# --- precision ---


@pytest.mark.parametrize("backend", BACKENDS[1:])
@pytest.mark.parametrize("options", [{"master_weights": True}, {"rounding": "stochastic"}])
def test_sixteen_bits(options, backend):
    made = [
        create("fused", dtype=torch.bfloat16, backend=name, **options)
        for name in ("reference", backend)
    ]
    for optimizer in made:
        for _ in range(3):
            step(optimizer)
    for x, y in zip(params_of(made[0]), params_of(made[1]), strict=True):
        torch.testing.assert_close(x, y, rtol=2**-7, atol=1e-3)
    if "master_weights" in options:
        masters = [[one.state[p]["master_weight"] for p in params_of(one)] for one in made]
        for x, y in zip(*masters, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-3)


# --- devices, launches, LETS ---


@pytest.mark.skipif(DEVICE == "cuda", reason="a CPU's parameters are said to be on two")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pair", ["mixed", "fused"])
def test_on_several_devices(pair, backend, monkeypatch):
    """As on one, also where a base fails between the parts."""
    options = {"max_grad_norm": 0.5, "backend": backend}
    one, other = create(pair, **options), create(pair, **options)
    first = {id(p) for p in params_of(other)[::2]}
    place = torch.device("cpu", 1)
    monkeypatch.setattr(collect, "device_of", lambda p: place if id(p) in first else p.device)
    for optimizer in (one, other):
        step(optimizer)
    serving = other._passes.backends._serving.values()
    assert any(isinstance(x, SeveralDevices) for x in serving)
    if pair == "mixed":
        before = snapshot(other)
        with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
            patch.setattr(other.base_optimizer.members["Muon"], "step", lambda: 1 / 0)
            step(other)
        assert same(snapshot(other), before)
    for optimizer in (one, other):
        step(optimizer)
    close(params_of(one), params_of(other))


@pytest.mark.skipif(DEVICE == "cuda", reason="counts in Triton's interpreter")
@pytest.mark.parametrize(
    ("pair", "expected"),
    [
        ("mixed", ["reduce_kernel", "perturb_kernel", "update_kernel"]),
        ("fused", ["reduce_kernel", "perturb_kernel", "update_kernel", "update_kernel"]),
        ("unfused", ["reduce_kernel", "perturb_kernel"]),
        ((SGD, SGD), ["reduce_kernel", "perturb_kernel", "update_kernel"]),
    ],
)
def test_launches(pair, expected):
    """One update for each fused base; the first pass knows of none."""
    import launches

    optimizer = create(pair, backend="triton", dtype=torch.float32)
    step(optimizer)
    with launches.record() as log:
        step(optimizer)
    assert log.kernels == expected


@pytest.mark.parametrize("backend", BACKENDS)
def test_lets(backend):
    radii = []
    for name in ("reference", backend):
        optimizer = fastsam.LETS(create(backend=name), hessian="difference")

        def closure(optimizer=optimizer, scale=1.0):
            give_gradients(params_of(optimizer), scale)
            return scale

        for _ in range(2):
            optimizer.step(closure, functools.partial(closure, scale=1.5))
        radii.append(optimizer.metrics["rho"].cpu())
    torch.testing.assert_close(*radii, rtol=1e-9, atol=0)
    assert radii[0] != RHO


# --- groups, state dicts, copies ---


def test_who_has_what():
    optimizer = create()
    several = optimizer.base_optimizer
    muon, adamw = several.members["Muon"], several.members["AdamW"]
    assert muon.param_groups[0] is optimizer.param_groups[0]
    assert adamw.param_groups == [optimizer.param_groups[1]]
    assert muon.state is adamw.state is optimizer.state
    names = [group["base_optimizer"] for group in optimizer.param_groups]
    assert names == ["Muon", "AdamW", "Muon"]
    first, second, third = optimizer.param_groups
    assert (first["lr"], second["lr"], third["lr"]) == (0.02, 0.02, 0.03)
    # the constructor's arguments are the default base's; others have their own defaults
    assert second["weight_decay"] == 0.1 and "ns_steps" in first and "betas" not in first
    assert "base_optimizer: Muon" in repr(optimizer)


def test_a_state_dict_resumes_bit_for_bit():
    optimizer = create("mixed", fastsam.VaSSO)
    for _ in range(2):
        step(optimizer)
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    assert [g["base_optimizer"] for g in saved["param_groups"]] == ["Muon", "AdamW", "Muon"]
    for load_into in (lambda x: x, lambda x: x.base_optimizer):
        resumed = create("mixed", fastsam.VaSSO, rho=0.4)
        with torch.no_grad():
            for p, q in zip(params_of(resumed), params_of(optimizer), strict=True):
                p.copy_(q)
        load_into(resumed).load_state_dict(copy.deepcopy(saved))
        assert resumed.base_optimizer.members["Muon"].state is resumed.state
        twin = copy.deepcopy(optimizer)
        step(resumed)
        step(twin)
        assert same(snapshot(resumed), snapshot(twin)) and resumed.kept["t"] == 4


def test_state_dicts_of_other_bases():
    """Refused, and nothing has changed."""
    plain = fastsam.SAM(groups_of(parameters(), ((None, {}), ADAMW)), torch.optim.AdamW)
    assert "base_optimizer" not in plain.param_groups[0]
    many = {"mixed": create(), "fused": create("fused"), "plain": plain}
    for optimizer in many.values():
        step(optimizer)
    for name, optimizer in many.items():
        for other in many.keys() - {name}:
            before, groups = snapshot(optimizer), [dict(g) for g in optimizer.param_groups]
            with pytest.raises(ValueError, match="made by SAM on .* cannot be loaded into SAM on"):
                optimizer.load_state_dict(many[other].state_dict())
            assert same(snapshot(optimizer), before)
            assert all(
                g[k] is v
                for g, was in zip(optimizer.param_groups, groups, strict=True)
                for k, v in was.items()
                if k != "params" and not k.startswith("fastsam_")
            )


class OtherSGD(torch.optim.SGD):
    """Whose groups and state look like torch's."""


def test_a_state_dict_of_one_of_them_alone():
    """It says of no group whose it is."""
    optimizer = create((SGD, (OtherSGD, SGD[1])))
    groups = [{"params": group["params"]} for group in optimizer.param_groups]
    alone = torch.optim.SGD(groups, **SGD[1])
    with pytest.raises(ValueError, match="group 0 has base_optimizer None, here it is 'SGD'"):
        optimizer.load_state_dict(alone.state_dict())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
@pytest.mark.parametrize("pair", PAIRS)
def test_copies(pair, copied):
    optimizer = create(pair)
    step(optimizer)
    twin = copied(optimizer)
    several = twin.base_optimizer
    assert all(member.state is twin.state for member in several.members.values())
    for one in (twin, optimizer):
        step(one)
    assert same(snapshot(twin), snapshot(optimizer))
    bare = copied(several)
    give_gradients(params_of(bare))
    bare.step()
    twin.add_param_group({"params": [torch.nn.Parameter(torch.ones(2, 2).double())]})
    assert twin.param_groups[-1]["base_optimizer"] == PAIRS[pair][1][0].__name__


def test_stepping_all_of_them():
    """The base on its own is both optimizers."""
    optimizer, hand = create(), ByHand(PAIRS["mixed"])
    give_gradients(params_of(optimizer))
    assert optimizer.base_optimizer.step(lambda: 3.0) == 3.0
    give_gradients(sum(hand.params, []))
    for member in hand.members:
        member.step()
    close(params_of(optimizer), sum(hand.params, []))


def test_more_groups():
    optimizer = create()
    step(optimizer)
    ones = torch.ones(4, 3, dtype=torch.float64, device=DEVICE)
    new = [torch.nn.Parameter(ones.clone()) for _ in range(3)]
    optimizer.add_param_group({"params": new[0], "base_optimizer": torch.optim.Muon, "rho": 0.2})
    optimizer.add_param_group({"params": new[1:2], "base_optimizer": "AdamW"})
    optimizer.base_optimizer.add_param_group({"params": iter(new[2:])})
    muon, adamw, last = optimizer.param_groups[-3:]
    assert muon["lr"] == 1e-3 and "ns_steps" in muon and muon["rho"] == 0.2
    assert adamw["lr"] == 0.02 == last["lr"] and adamw["weight_decay"] == 0.1
    before = [p.detach().clone() for p in new]
    step(optimizer)
    assert not any(map(torch.equal, before, new))
    assert "exp_avg" in optimizer.state[new[1]] and "exp_avg" not in optimizer.state[new[0]]
    for group, error, match in (
        (
            {"base_optimizer": torch.optim.SGD},
            ValueError,
            "Muon, .*got 'SGD'|AdamW, Muon, got 'SGD'",
        ),
        ({"base_optimizer": "Muon", "lr": -1.0}, ValueError, "lr must be at least 0"),
        ({"lr": -1.0}, ValueError, "lr must be at least 0 and finite"),
    ):
        with pytest.raises(error, match=match):
            optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2, 2))], **group})
    assert len(optimizer.param_groups) == 6


def test_hooks():
    optimizer, seen = create(), []
    several = optimizer.base_optimizer
    ones = {"both": several, **several.members}
    for name, one in ones.items():
        one.register_step_pre_hook(lambda *_, name=name: seen.append(f"before {name}"))
        one.register_step_post_hook(lambda *_, name=name: seen.append(f"after {name}"))
    step(optimizer)
    assert sorted(seen) == sorted(f"{when} {name}" for when in ("before", "after") for name in ones)
    assert seen[0] == "before both"


def test_schedules():
    optimizer = create()
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    step(optimizer)
    scheduler.step()
    assert [g["lr"] for g in optimizer.param_groups] == [0.01, 0.01, 0.015]
    with pytest.raises(ValueError, match="momentum"):  # one has momentum, the other betas
        torch.optim.lr_scheduler.OneCycleLR(create(), 0.1, total_steps=5)
    torch.optim.lr_scheduler.OneCycleLR(create(), 0.1, total_steps=5, cycle_momentum=False)


class TwoModes(torch.optim.SGD):
    mode = None

    def train(self):
        self.mode = "train"

    def eval(self):
        self.mode = "eval"


def test_modes():
    optimizer = create(((TwoModes, {"lr": 0.1}), ADAMW))
    member = optimizer.base_optimizer.members["TwoModes"]
    optimizer.eval()
    assert member.mode == "eval"
    optimizer.train()
    assert member.mode == "train"


# --- one base, as ever ---


@pytest.mark.parametrize("named", [True, False])
def test_a_single_base_is_itself(named):
    params = parameters()
    groups = groups_of(params, ((torch.optim.AdamW if named else None, {}), ADAMW))
    optimizer = fastsam.SAM(groups, torch.optim.AdamW, lr=0.02)
    assert type(optimizer.base_optimizer) is torch.optim.AdamW
    step(optimizer)
    assert all("base_optimizer" not in g for g in optimizer.state_dict()["param_groups"])
    new = {"params": [torch.nn.Parameter(torch.ones(2))]}
    with pytest.raises(ValueError, match="made with, AdamW, got 'Muon'"):
        optimizer.add_param_group(new | {"base_optimizer": torch.optim.Muon})
    optimizer.add_param_group(new | {"base_optimizer": torch.optim.AdamW})
    assert "base_optimizer" not in optimizer.param_groups[-1]


class Muon(torch.optim.SGD):
    """Another of that name."""


def refused(params, base=torch.optim.AdamW, method=fastsam.SAM, first=torch.optim.Muon, **kwargs):
    group = {"params": params[0], "base_optimizer": first, **kwargs.pop("group", {})}
    others = [{"params": [p], **kwargs.pop("other", {})} for p in params[1]]
    return method([group, *others], base, **kwargs)


@pytest.mark.parametrize(
    ("kwargs", "error", "match"),
    [
        ({"master_weights": True}, ValueError, "master_weights must be False.*as Muon is not"),
        ({"first": fastsam.AdaGradNorm}, ValueError, "must not be AdaGradNorm in some groups"),
        ({"base": fastsam.AdaGradNorm}, ValueError, "must not be AdaGradNorm in some groups"),
        ({"first": torch.optim.Adadelta}, TypeError, "Adadelta has rho"),
        ({"first": torch.optim.LBFGS}, TypeError, "LBFGS needs one"),
        ({"first": fastsam.SAM}, TypeError, "sharpness-aware itself"),
        ({"first": "Muon"}, TypeError, r"base_optimizer must be a subclass.*got 'Muon'"),
        ({"other": {"base_optimizer": Muon}}, ValueError, "two classes Muon"),
        ({"group": {"lr": -1.0}}, ValueError, "lr must be at least 0"),
        ({"group": {"rho": -1.0}}, ValueError, "rho must be"),
        ({"first": torch.optim.SGD, "group": {"differentiable": True}}, ValueError,
         "differentiable must be False"),
        ({"other": {"base_optimizer": torch.optim.Muon}}, ValueError, "2D"),
        ({"lr": -1.0}, ValueError, "lr must be at least 0 and finite"),
        ({"method": lambda groups, base, **k: fastsam.AdaSAM(groups, lr=0.1, rho=0.1)}, TypeError,
         "AdaSAM has an update of its own"),
    ],
)  # fmt: skip
def test_refused(kwargs, error, match):
    with pytest.raises(error, match=match):
        refused(parameters(), **kwargs)


def test_names_that_are_set_later():
    optimizer = create()
    step(optimizer)
    before = snapshot(optimizer)
    optimizer.param_groups[0]["base_optimizer"] = "RMSprop"
    give_gradients(params_of(optimizer))
    with pytest.raises(ValueError, match="AdamW, Muon, got 'RMSprop'"):
        optimizer.first_step()
    assert same(snapshot(optimizer), before)


def test_an_optimizer_that_is_taken_over_has_one():
    (first, _, _), plain = parameters(), None
    plain = torch.optim.SGD([{"params": first, "base_optimizer": torch.optim.Muon}], lr=0.1)
    with pytest.raises(ValueError, match="no base_optimizer"):
        fastsam.SAM.from_optimizer(plain)
