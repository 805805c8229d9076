"""Interrupted and resumed runs end in the bits of uninterrupted ones, however they are saved."""

import io
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

import fastsam

from faults import difference
from graphs import batches
from registry import BASES, DEVICE, METHODS, OWN_UPDATES, Base, build

NADAM = Base(torch.optim.NAdam, "", {"lr": 0.01})
CHOSEN = {name: BASES[name] for name in ("sgd-momentum", "adamw", "adagrad", "adagrad_norm")}
CHOSEN["nadam"] = NADAM
OWN = {name: OWN_UPDATES[method.bases[0]] for name, method in METHODS.items()
       if method.bases[0] in OWN_UPDATES}  # fmt: skip


class Run:
    """A training run: model, optimizer, scheduler, perhaps a scaler of the loss, and its data.

    Args:
        initial: Seed of the first weights, which a resumed run must not depend on.
        dtype: Of the parameters.
        lets: Arguments of LETS, to put it around.
        scaled: Whether the loss is scaled.
    """

    def __init__(self, method: str, base: str = "sgd-momentum", backend: str = "torch",
                 dtype: torch.dtype = torch.float32, lets: dict[str, Any] | None = None,
                 scaled: bool = False, initial: int = 1, **kwargs: Any):  # fmt: skip
        torch.manual_seed(initial)
        modules = [torch.nn.Linear(6, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3)]
        self.model = torch.nn.Sequential(*modules).to(DEVICE, dtype)
        groups = [{"params": [0, 2]}, {"params": [1, 3], "lr": 0.03}]
        chosen = OWN.get(method) or CHOSEN[base]
        params = list(self.model.parameters())
        self.optimizer: Any = build(METHODS[method], chosen, params, groups, backend, **kwargs)
        if lets is not None:
            self.optimizer = fastsam.LETS(self.optimizer, **lets)
        self.scheduler = torch.optim.lr_scheduler.ExponentialLR(self.optimizer, 0.8)
        self.scaler = torch.amp.GradScaler(
            DEVICE, enabled=scaled, init_scale=2.0**126, backoff_factor=2.0**-96, growth_interval=2
        )
        self.data = [x.to(DEVICE, dtype) for x in batches(9)]
        if scaled:
            self.data[0] *= 100
        self.taken = 0

    def closure(self, scale: float) -> Any:
        def closure():
            x = self.data[self.taken % len(self.data)]
            loss = scale * (self.model(x) - x[:, :3]).square().mean()
            self.scaler.scale(loss.float()).backward()
            return loss

        return closure

    def go(self, steps: int) -> "Run":
        for _ in range(steps):
            if isinstance(self.optimizer, fastsam.LETS):
                self.optimizer.step(self.closure(1.0), self.closure(1.5))
            elif self.scaler.is_enabled():
                self.optimizer.step(self.closure(1.0), grad_scaler=self.scaler)
                self.scaler.update()
            else:
                self.optimizer.step(self.closure(1.0))
            self.scheduler.step()
            self.taken += 1
        return self

    def state_dict(self) -> dict[str, Any]:
        return {"optimizer": self.optimizer.state_dict(), **self.rest()}

    def rest(self) -> dict[str, Any]:
        """Everything but the optimizer's state."""
        return {"model": self.model.state_dict(), "scheduler": self.scheduler.state_dict(),
                "scaler": self.scaler.state_dict(), "taken": self.taken}  # fmt: skip

    def load(self, saved: dict[str, Any]) -> "Run":
        self.model.load_state_dict(saved["model"])
        if "optimizer" in saved:
            self.optimizer.load_state_dict(saved["optimizer"])
        self.scheduler.load_state_dict(saved["scheduler"])
        self.scaler.load_state_dict(saved["scaler"])
        self.taken = saved["taken"]
        return self


def check(*args: Any, before: int = 3, after: int = 3, **kwargs: Any) -> None:
    """Through ``torch.save``, into a run of other weights."""
    run = Run(*args, **kwargs).go(before)
    buffer = io.BytesIO()
    torch.save(run.state_dict(), buffer)
    buffer.seek(0)
    resumed = Run(*args, initial=2, **kwargs).load(torch.load(buffer, weights_only=True))
    check_goes_on(run, resumed, after)


def check_equal(run: Run, resumed: Run) -> None:
    """All state; torch gives a parameter without any an empty entry, or none."""
    states = [resumed.state_dict(), run.state_dict()]
    for state in states:
        held = state["optimizer"]["state"]
        state["optimizer"]["state"] = {key: entry for key, entry in held.items() if entry}
    assert difference(*states) is None


def check_goes_on(run: Run, resumed: Run, after: int = 3) -> None:
    check_equal(run, resumed)
    start = [p.detach().clone() for p in run.model.parameters()]
    for _ in range(after):
        run.go(1), resumed.go(1)
        check_equal(run, resumed)
    moved = [not torch.equal(p, w) for p, w in zip(run.model.parameters(), start, strict=True)]
    assert all(moved)


COMBINATIONS = [(method, base) for method in METHODS for base in CHOSEN if method not in OWN]
COMBINATIONS += [(method, "") for method in OWN]
#: Every method with one base, and one method with every base.
ONCE = [(m, b) for m, b in COMBINATIONS if m in ("sam", *OWN) or b == "adamw"]
#: In Triton's interpreter.
FEW = [("unified-callable", "nadam"), ("vasso-all", "adamw"), ("samar-all", "adagrad_norm"),
       ("lightsam-1", "")]  # fmt: skip
EVERYWHERE = [(*pair, "torch") for pair in COMBINATIONS]
EVERYWHERE += [(*pair, "reference") for pair in ONCE] + [(*pair, "triton") for pair in FEW]


@pytest.mark.parametrize(("method", "base", "backend"), EVERYWHERE)
def test_every_method(method, base, backend):
    check(method, base, backend)


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
@pytest.mark.parametrize("method", METHODS)
def test_schedule(method, steps):
    """Of steps of the base alone: it goes on where it was, wherever that is."""
    check(method, before=steps, after=4, perturb_every=2, start=1, stop=6)


@pytest.mark.parametrize(
    ("method", "base"),
    [(method, base) for method, base in COMBINATIONS if base in ("", "adamw", "adagrad_norm")],
)
def test_master_weights(method, base):
    dtype = torch.float16 if base == "adagrad_norm" else torch.bfloat16
    check(method, base, dtype=dtype, master_weights=True, perturb_every=2)


@pytest.mark.parametrize(("method", "base"), ONCE)
def test_stochastic_rounding(method, base):
    check(method, base, dtype=torch.bfloat16, rounding="stochastic", seed=1, perturb_every=3)


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("options", [{"master_weights": True}, {"rounding": "stochastic"}])
def test_sixteen_bits_on_other_backends(options, backend):
    check("vasso", "adamw", backend, dtype=torch.bfloat16, before=2, after=2, **options)


@pytest.mark.parametrize("method", METHODS)
def test_loss_scale(method):
    """Right after an overflow, in the first step; the scaler's state is part of the run."""
    run = Run(method, "adamw", scaled=True).go(1)
    assert run.optimizer.metrics["skipped"] == 1 and run.scaler.get_scale() == 2.0**30
    check(method, "adamw", before=1, after=4, scaled=True)


LEARNING = {"rho_lr": 0.1, "interval": 2}


@pytest.mark.parametrize("hessian", ["diag", "difference"])
@pytest.mark.parametrize(
    ("method", "options"),
    [("sam", {}), ("unified-1/t", {"perturb_every": 3}), ("vasso", {"rounding": "stochastic"}),
     ("samar", {"perturb_every": 3, "start": 1}), ("lightsam-2", {}), ("adasam", {})],
)  # fmt: skip
@pytest.mark.parametrize("before", [3, 4])
def test_learned_radius(method, options, hessian, before):
    dtype = torch.bfloat16 if "rounding" in options else torch.float32
    lets = LEARNING | {"hessian": hessian}
    check(method, "adamw", before=before, after=4, dtype=dtype, lets=lets, **options)


# --- torch.distributed.checkpoint -----------------------------------------------------------------

alone = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
OPTIONS = {"nested": None, "flat": StateDictOptions(flatten_optimizer_state_dict=True)}
SIXTEEN = {
    "": {},
    "master weights": {"dtype": torch.bfloat16, "master_weights": True},
    "stochastic rounding": {"dtype": torch.bfloat16, "rounding": "stochastic"},
}
KINDS = [(method, base, "") for method, base in ONCE]
KINDS += [("vasso", "adamw", kind) for kind in SIXTEEN if kind]
KINDS += [("samar", "adagrad_norm", kind) for kind in SIXTEEN]
#: torch's Adagrad has state from the start; were it so here, torch would not ask for the rest.
EARLY = [("vasso", "adagrad", ""), ("samar", "adagrad", ""), ("sam", "adagrad", "master weights"),
         ("sam", "adagrad", "stochastic rounding")]  # fmt: skip


def through(path, state: dict[str, Any], into: dict[str, Any]) -> dict[str, Any]:
    dcp.save(state, checkpoint_id=path)
    dcp.load(into, checkpoint_id=path)
    return into


@alone
@pytest.mark.parametrize(("method", "base", "kind"), KINDS + EARLY)
def test_plain_distributed_checkpoint(method, base, kind, tmp_path):
    """It is loaded into the state that is there, which one step, or any other, has made."""
    run = Run(method, base, perturb_every=3, **SIXTEEN[kind]).go(3)
    resumed = Run(method, base, perturb_every=3, initial=2, **SIXTEEN[kind]).go(1)
    resumed.load(through(tmp_path, run.state_dict(), resumed.state_dict()))
    check_goes_on(run, resumed)


@alone
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(("method", "base", "kind"), KINDS + EARLY)
def test_state_dict_by_names(method, base, kind, options, tmp_path):
    """Into an optimizer that has taken no step: torch asks it to create its state."""
    chosen = OPTIONS[options]
    run = Run(method, base, perturb_every=3, **SIXTEEN[kind]).go(3)
    saved = run.rest() | {"optimizer": get_optimizer_state_dict(run.model, run.optimizer,
                                                                options=chosen)}  # fmt: skip
    resumed = Run(method, base, perturb_every=3, initial=2, **SIXTEEN[kind])
    before = [p.detach().clone() for p in resumed.model.parameters()]
    lrs = [group["lr"] for group in resumed.optimizer.param_groups]
    into = get_optimizer_state_dict(resumed.model, resumed.optimizer, options=chosen)
    assert [group["lr"] for group in resumed.optimizer.param_groups] == lrs
    for p, w in zip(resumed.model.parameters(), before, strict=True):
        assert torch.equal(p, w)  # to be asked changed nothing
    loaded = through(tmp_path, saved, resumed.rest() | {"optimizer": into})
    set_optimizer_state_dict(resumed.model, resumed.optimizer, loaded.pop("optimizer"),
                             options=chosen)  # fmt: skip
    check_goes_on(run, resumed.load(loaded))


@alone
@pytest.mark.parametrize("method", ["sam", "vasso", "lightsam-1"])
def test_being_asked_for_state_costs_nothing(method):
    """A run whose state was asked for before its first step goes on as if it was not."""
    run, asked = Run(method, "sgd-momentum"), Run(method, "sgd-momentum")
    get_optimizer_state_dict(asked.model, asked.optimizer)
    run.go(2), asked.go(2)
    check_equal(run, asked)


@alone
def test_learned_radius_in_a_distributed_checkpoint(tmp_path):
    run = Run("vasso", "adamw", lets=LEARNING).go(3)
    resumed = Run("vasso", "adamw", lets=LEARNING, initial=2).go(2)
    resumed.load(through(tmp_path, run.state_dict(), resumed.state_dict()))
    check_goes_on(run, resumed)


@alone
def test_learned_radius_by_names():
    """torch takes what its own optimizers have: the radius, and the wrapped optimizer's state."""
    run = Run("vasso", "adamw", lets=LEARNING).go(3)
    resumed = Run("vasso", "adamw", lets=LEARNING, initial=2)
    before = [p.detach().clone() for p in resumed.model.parameters()]
    saved = get_optimizer_state_dict(run.model, run.optimizer)
    set_optimizer_state_dict(resumed.model, resumed.optimizer, saved)
    for p, w in zip(resumed.model.parameters(), before, strict=True):
        assert torch.equal(p, w)
    assert resumed.optimizer.metrics["rho"] == run.optimizer.metrics["rho"] != 0.05
    for p, q in zip(run.model.parameters(), resumed.model.parameters(), strict=True):
        for name, x in run.optimizer.state[p].items():
            assert torch.equal(resumed.optimizer.state[q][name], x)
    with pytest.raises(RuntimeError, match="needs a closure and a val_closure"):
        run.optimizer.step()
