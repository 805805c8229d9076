"""Lightning: automatic optimization, equal to a loop written by hand."""

import contextlib
import copy
import functools
import logging
import os
import sys

import pytest
import torch

import fastsam

pytest.importorskip("lightning")
# it warns of versions to come, of few workers, and of machines with or without a GPU
pytestmark = pytest.mark.filterwarnings("default")

import lightning.pytorch as pl  # noqa: E402
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset  # noqa: E402

import fastsam.lightning  # noqa: E402

from networks import bits, same  # noqa: E402

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

BATCH, STEPS = 8, 8  # two epochs
SGD = {"base_optimizer": torch.optim.SGD, "lr": 0.1, "momentum": 0.9}
ADAMW = {"base_optimizer": torch.optim.AdamW, "lr": 1e-2}
SAM = functools.partial(fastsam.SAM, **SGD)
Functional = functools.partial(fastsam.FunctionalSAM, rho=0.3, **SGD)


def network(dropout=0.2):
    torch.manual_seed(0)
    drop = torch.nn.Dropout(dropout)
    return torch.nn.Sequential(
        torch.nn.Linear(5, 16), torch.nn.Tanh(), drop, torch.nn.Linear(16, 3)
    )


def loader(batch_size):
    torch.manual_seed(1)
    data = TensorDataset(torch.randn(4 * BATCH, 5), torch.randint(3, (4 * BATCH,)))
    return DataLoader(data, batch_size)


class Module(pl.LightningModule):
    """Automatic optimization, with a scheduler that steps after every batch."""

    def __init__(self, make, dropout=0.2):
        super().__init__()
        self.net = network(dropout)
        self.make = make

    def training_step(self, batch, batch_idx):
        x, y = batch
        return torch.nn.functional.cross_entropy(self.net(x), y)

    def configure_optimizers(self):
        optimizer = self.make(self.parameters())
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.3, total_steps=STEPS)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


def trainer_of(**kwargs):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    defaults = {"max_epochs": 2, "accelerator": "cpu", "enable_checkpointing": False}
    return pl.Trainer(**defaults | quiet | kwargs)


def fit(module, trainer, batch_size=BATCH, **kwargs):
    batches = loader(batch_size)
    torch.manual_seed(2)  # dropout's
    trainer.fit(module, batches, **kwargs)
    return module


def by_hand(
    make, dtype=torch.float32, autocast=None, scaler=None, parts=1, dropout=0.2, marks=False
):
    """What ``fit`` does, in plain torch."""
    model, batches = network(dropout).to(dtype), loader(BATCH * parts)
    optimizer = make(model.parameters())
    if marks:
        optimizer.outputs_of(model)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.3, total_steps=STEPS)
    torch.manual_seed(2)
    for _ in range(2):
        for x, y in batches:

            def closure(x=x, y=y):
                for part, target in zip(x.chunk(parts), y.chunk(parts), strict=True):
                    cast = torch.autocast("cpu", autocast, cache_enabled=False)
                    with cast if autocast else contextlib.nullcontext():
                        out = model(part.to(dtype))
                        loss = torch.nn.functional.cross_entropy(out, target) / parts
                    (scaler.scale(loss) if scaler else loss).backward()

            optimizer.step(closure, grad_scaler=scaler)
            if scaler:
                scaler.update()
            scheduler.step()
    return model, optimizer


@pytest.mark.parametrize("make", [
    SAM,
    functools.partial(fastsam.VaSSO, perturb_every=3, **ADAMW),
    functools.partial(fastsam.SAMAR, rho=0.2, max_grad_norm=0.1, **SGD),
])  # fmt: skip
@pytest.mark.parametrize(
    ("precision", "dtype", "autocast"),
    [
        ("32-true", torch.float32, None),
        ("64-true", torch.float64, None),
        ("bf16-mixed", torch.float32, torch.bfloat16),
    ],
)
def test_automatic_optimization(make, precision, dtype, autocast):
    """Bit for bit, dropout and all; the module's code knows nothing of the optimizer."""
    trainer = trainer_of(precision=precision)
    module = fit(Module(make), trainer)
    assert trainer.global_step == STEPS
    model, optimizer = by_hand(make, dtype, autocast)
    assert same(bits(module), bits(model))
    assert module.net[0].weight.dtype == dtype
    once, _ = by_hand(lambda params: make(params, rho=0.0), dtype, autocast)
    assert not same(bits(model), bits(once))
    measured = trainer.optimizers[0].metrics
    assert {**measured} == {**optimizer.metrics}


@pytest.mark.parametrize("names_module", [False, True])
@pytest.mark.parametrize("half", [False, True])
def test_functional_sam(half, names_module):
    """The outputs are marked in the training step, or their module named where the optimizer is
    made; dropout repeats."""

    class Marking(Module):
        def training_step(self, batch, batch_idx):
            x, y = batch
            outputs = self.net(x)
            if not names_module:
                outputs = self.optimizers().optimizer.outputs(outputs)
            return torch.nn.functional.cross_entropy(outputs, y)

        def configure_optimizers(self):
            made = super().configure_optimizers()
            if names_module:
                made[0][0].outputs_of(self.net)
            return made

    plugin = fastsam.lightning.MixedPrecision("16-mixed", "cpu")
    module = fit(Marking(Functional), trainer_of(**{"plugins": plugin} if half else {}))
    args = {"autocast": torch.float16, "scaler": torch.amp.GradScaler("cpu")} if half else {}
    model, _ = by_hand(Functional, marks=True, **args)
    assert same(bits(module), bits(model))
    plain, _ = by_hand(functools.partial(SAM, rho=0.3), **args)
    assert not same(bits(model), bits(plain))


@pytest.mark.parametrize("scale", [2.0**10, 2.0**20])
def test_float16_with_a_loss_scale(scale):
    """With the larger scale the first steps overflow, and are skipped."""
    scalers = [torch.amp.GradScaler("cpu", init_scale=scale) for _ in range(2)]
    plugin = fastsam.lightning.MixedPrecision("16-mixed", "cpu", scalers[0])
    module = fit(Module(SAM), trainer_of(plugins=plugin))
    model, optimizer = by_hand(SAM, autocast=torch.float16, scaler=scalers[1])
    assert same(bits(module), bits(model))
    skipped = int(optimizer.metrics["skipped"])
    assert skipped == 0 if scale < 2**11 else 0 < skipped < STEPS
    assert scalers[0].get_scale() == scalers[1].get_scale() == scale / 2**skipped


def test_plugin_with_other_optimizers_and_precisions():
    """As Lightning's own."""

    def sgd(params):
        return torch.optim.SGD(params, lr=0.1)

    ours = fastsam.lightning.MixedPrecision("16-mixed", "cpu")
    theirs = pl.plugins.MixedPrecision("16-mixed", "cpu")
    assert same(*(bits(fit(Module(sgd), trainer_of(plugins=p))) for p in (ours, theirs)))
    ours = fastsam.lightning.MixedPrecision("bf16-mixed", "cpu")
    one, other = (fit(Module(SAM), trainer_of(**kw)) for kw in (
        {"plugins": ours}, {"precision": "bf16-mixed"}
    ))  # fmt: skip
    assert same(bits(one), bits(other))


def test_lightnings_own_plugin_for_float16_is_refused():
    plugin = pl.plugins.MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", 1024.0))
    module = Module(SAM)
    before = bits(module)
    with pytest.raises(RuntimeError, match="16-mixed, fastsam.lightning.MixedPrecision"):
        fit(module, trainer_of(plugins=plugin))
    assert same(bits(module), before)


@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
def test_gradient_clip_val(precision):
    """It clips both gradients. SAM's perturbation has none of the first one's length, so that
    this is ``max_grad_norm``, but for the 1e-6 that torch adds to norms."""
    half = precision == "16-mixed"
    kwargs = {"plugins": fastsam.lightning.MixedPrecision(precision, "cpu")} if half else {}
    module = fit(Module(SAM), trainer_of(gradient_clip_val=0.1, **kwargs))
    args = {"autocast": torch.float16, "scaler": torch.amp.GradScaler("cpu")} if half else {}
    model, _ = by_hand(functools.partial(SAM, max_grad_norm=0.1), **args)
    unclipped, _ = by_hand(SAM, **args)
    for x, y, z in zip(bits(module), bits(model), bits(unclipped), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(y, z, rtol=1e-2, atol=1e-3)


def test_accumulation_is_refused():
    """Lightning would repeat the last micro-batch alone, and the others' gradients be lost."""
    module = Module(SAM)
    before = bits(module)
    with pytest.raises(
        RuntimeError, match="accumulate_grad_batches must be 1 .* got 2; use manual"
    ):
        fit(module, trainer_of(accumulate_grad_batches=2))
    assert same(bits(module), before)


class Manual(Module):
    """The documented way to accumulate: the loader's batch is that of the step."""

    micro_batches = 2

    def __init__(self, make):
        super().__init__(make)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        parts = list(zip(*(x.chunk(self.micro_batches) for x in batch), strict=True))

        def closure():
            for x, y in parts:
                loss = torch.nn.functional.cross_entropy(self.net(x), y) / len(parts)
                self.manual_backward(loss)
            return loss

        self.optimizers().step(closure)
        self.lr_schedulers().step()


@pytest.mark.parametrize("half", [False, True])
def test_accumulation_by_hand(half):
    plugin = fastsam.lightning.MixedPrecision("16-mixed", "cpu")
    module = fit(Manual(SAM), trainer_of(**{"plugins": plugin} if half else {}), 2 * BATCH)
    args = {"autocast": torch.float16, "scaler": torch.amp.GradScaler("cpu")} if half else {}
    assert same(bits(module), bits(by_hand(SAM, parts=2, **args)[0]))


def test_what_callbacks_see():
    """Hooks around a pass come twice; the loss of the batch is the second pass's."""

    class Noting(pl.Callback):
        def __init__(self):
            self.calls, self.losses = [], []

        def on_after_backward(self, *args):
            self.calls.append("backward")

        def on_before_optimizer_step(self, *args):
            self.calls.append("before step")

        def on_train_batch_end(self, trainer, module, outputs, *args):
            self.calls.append("end")
            self.losses.append(float(outputs["loss"]))

    module = Module(SAM, dropout=0.0)
    noting, twin = Noting(), copy.deepcopy(module.net)
    fit(module, trainer_of(callbacks=noting, max_steps=1))
    assert noting.calls == ["backward", "before step"] * 2 + ["end"]
    x, y = next(iter(loader(BATCH)))
    optimizer = SAM(twin.parameters())
    torch.nn.functional.cross_entropy(twin(x), y).backward()
    optimizer.first_step()
    with torch.no_grad():
        assert noting.losses == [float(torch.nn.functional.cross_entropy(twin(x), y))]


@pytest.mark.parametrize("half", [False, True])
def test_resumed_run_is_the_uninterrupted_one(half, tmp_path):
    """With state of the ascent, a schedule that is in mid-turn, and a loss scale."""
    make = functools.partial(fastsam.VaSSO, perturb_every=3, **ADAMW)
    plugin = fastsam.lightning.MixedPrecision
    saving = pl.callbacks.ModelCheckpoint(tmp_path, "{epoch}", every_n_epochs=1, save_top_k=-1)
    whole, resumed = (
        trainer_of(**kwargs | ({"plugins": plugin("16-mixed", "cpu")} if half else {}))
        for kwargs in ({"callbacks": saving, "enable_checkpointing": True}, {})
    )
    modules = [Module(make, dropout=0.0) for _ in range(2)]  # Lightning saves no random state
    fit(modules[0], whole)
    fit(modules[1], resumed, ckpt_path=tmp_path / "epoch=0.ckpt")
    assert resumed.global_step == STEPS
    assert same(bits(modules[0]), bits(modules[1]))
    states = [trainer.optimizers[0].state_dict() for trainer in (whole, resumed)]
    assert states[0]["param_groups"] == states[1]["param_groups"]
    for key, state in states[0]["state"].items():
        assert {"exp_avg", "exp_avg_sq", "ascent_ema"} <= state.keys()
        assert same(state.values(), [states[1]["state"][key][name] for name in state])
    if half:
        scales = [trainer.precision_plugin.scaler.state_dict() for trainer in (whole, resumed)]
        assert scales[0] == scales[1] and scales[0]["_growth_tracker"] > 0


# --- two processes ---


@pytest.fixture
def connected(monkeypatch, tmp_path):
    """Processes meet in a file: another process may take the free port that Lightning has found."""
    init = torch.distributed.init_process_group
    monkeypatch.setattr(
        torch.distributed, "init_process_group",
        functools.partial(init, init_method=f"file://{tmp_path}/store"),
    )  # fmt: skip
    if sys.platform == "linux":
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")


class Shared(Module):
    """Each process perturbs along the gradient of its own half of the batch, if asked to."""

    def __init__(self, folder, local, make=SAM):
        super().__init__(make, dropout=0.0)
        self.folder, self.local = folder, local

    def configure_optimizers(self):
        optimizers, schedulers = super().configure_optimizers()
        if self.local:
            optimizers[0].ascent_context = self.trainer.strategy.block_backward_sync
        return optimizers, schedulers

    def train_dataloader(self):
        data = loader(BATCH).dataset
        own = DistributedSampler(data, num_replicas=2, rank=self.global_rank, shuffle=False)
        return DataLoader(data, BATCH // 2, sampler=own)

    def on_train_end(self):
        torch.save(self.net.state_dict(), os.path.join(self.folder, f"{self.global_rank}.pt"))


def locally_by_hand():
    """In one process, a perturbation for each half of every batch."""
    model = network(dropout=0.0).double()
    optimizer = SAM(model.parameters())
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.3, total_steps=STEPS)
    for x, y in list(loader(BATCH)) * 2:

        def closure_of(x, y):
            return lambda: torch.nn.functional.cross_entropy(model(x), y).backward()

        halves = [closure_of(x[i::2].double(), y[i::2]) for i in range(2)]
        optimizer.step_micro_batches(halves)
        scheduler.step()
    return model


@pytest.mark.parametrize("local", [False, True], ids=["same perturbation", "each its own"])
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_two_processes(local, tmp_path, connected):
    """DDP, each process with every other sample of a batch: as one process with all of them."""
    trainer = trainer_of(strategy="ddp_fork", devices=2, precision="64-true")
    trainer.fit(Shared(str(tmp_path), local))
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert same(ranks[0].values(), ranks[1].values())
    together = by_hand(SAM, torch.float64, dropout=0.0)[0].state_dict()
    expected = locally_by_hand().state_dict() if local else together
    for key, x in ranks[0].items():
        # sums over halves have other roundings than sums over a batch
        torch.testing.assert_close(x, expected[key], rtol=1e-12, atol=1e-13)
        assert local == (not torch.allclose(x, together[key], rtol=1e-6))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_renormalized_steps_are_the_same_on_every_process(tmp_path, connected):
    """SSAM takes the first gradient's norm, on which processes with their own have to agree."""
    make = functools.partial(fastsam.SSAM, base_optimizer=torch.optim.SGD, lr=0.1)
    trainer = trainer_of(strategy="ddp_fork", devices=2, precision="64-true")
    trainer.fit(Shared(str(tmp_path), True, make))
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert same(ranks[0].values(), ranks[1].values())
