"""Hugging Face's Trainer and Accelerate: both passes, equal to a loop written by hand."""

import contextlib
import copy
import importlib.util
from types import SimpleNamespace

import pytest
import torch

import fastsam

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
# their imports and Trainers warn of versions to come, and of machines without a GPU
pytestmark = pytest.mark.filterwarnings("default")

from accelerate import Accelerator, DistributedType  # noqa: E402
from accelerate.state import AcceleratorState, GradientState  # noqa: E402
from transformers import (  # noqa: E402
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    get_scheduler,
)

import fastsam.huggingface  # noqa: E402
from fastsam.accelerate import AcceleratedSAM  # noqa: E402
from fastsam.huggingface import SAMTrainer  # noqa: E402

ADAMW = {"base_optimizer": torch.optim.AdamW, "lr": 1e-2}
SGD = {"base_optimizer": torch.optim.SGD, "lr": 0.1, "momentum": 0.9}
MICRO = 2  # micro-batches of a step


def network(dropout=0.0):
    torch.manual_seed(0)
    rates = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout)
    size = {"vocab_size": 24, "n_positions": 12, "n_embd": 16, "n_layer": 1, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(**size, **rates, bos_token_id=None, eos_token_id=None))


def sentences(count=40):
    """Counting upwards, with labels on parts of different lengths."""
    made = []
    for i in range(count):
        ids = (torch.arange(10) + i) % 24
        made.append(
            {"input_ids": ids, "labels": torch.where(torch.arange(10) < 3 + i % 7, ids, -100)}
        )
    return made


class Noting(SAMTrainer):
    """Keeps its batches, in the order of the steps."""

    def get_batch_samples(self, *args, **kwargs):
        batches, items = super().get_batch_samples(*args, **kwargs)
        self.seen = [*getattr(self, "seen", []), (copy.deepcopy(batches), items)]
        return batches, items


class Scaled(Noting):
    """A loss scale on a CPU, where Accelerate has none."""

    init_scale = 2.0**12

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=self.init_scale)
        self.accelerator.native_amp = True


def trainer_of(folder, method=fastsam.SAM, kwargs=ADAMW, cls=Noting, model=None, **args):
    defaults = {
        "max_steps": 5, "per_device_train_batch_size": 3, "gradient_accumulation_steps": MICRO,
        "weight_decay": 0.1, "max_grad_norm": 0.4, "warmup_steps": 2, "learning_rate": kwargs["lr"],
        "logging_steps": 1, "save_strategy": "no", "report_to": [], "disable_tqdm": True,
        "use_cpu": True,
    }  # fmt: skip
    return cls(
        model=model or network(),
        args=TrainingArguments(str(folder), **defaults | args),
        train_dataset=sentences(),
        optimizer_cls_and_kwargs=(method, dict(kwargs)),
    )


def groups_of(model):
    """Trainer's: biases and norms have no weight decay."""
    names = [name for name, _ in model.named_parameters()]
    plain = {name for name in names if name.endswith("bias") or ".ln_" in name}
    params = dict(model.named_parameters())
    return [
        {"params": [p for name, p in params.items() if name not in plain], "weight_decay": 0.1},
        {"params": [p for name, p in params.items() if name in plain], "weight_decay": 0.0},
    ]


def by_hand(seen, method, kwargs, autocast=None, scaler=None):
    """A plain loop over the same batches: model, losses of the first passes, optimizer, rates."""
    model = network()
    optimizer = method(groups_of(model), max_grad_norm=0.4, **kwargs)
    scheduler = get_scheduler("linear", optimizer, num_warmup_steps=2, num_training_steps=5)
    losses, rates = [], []
    for batches, items in seen:

        def closure(batches=batches, items=items):
            total = 0.0
            for batch in batches:
                with torch.autocast("cpu", autocast) if autocast else contextlib.nullcontext():
                    loss = model(**batch, num_items_in_batch=items).loss
                (scaler.scale(loss) if scaler else loss).backward()
                total += loss.detach()
            return total

        rates.append(optimizer.param_groups[0]["lr"])
        before = optimizer.metrics.get("skipped", 0)
        losses.append(float(optimizer.step(closure, grad_scaler=scaler)))
        if scaler:
            scaler.update()
        if not scaler or optimizer.metrics["skipped"] == before:
            scheduler.step()
    return model, losses, optimizer, rates


class Seeding(TrainerCallback):
    """Every step draws from a seed of its own."""

    def on_step_begin(self, args, state, control, **kwargs):
        torch.manual_seed(state.global_step)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize("method", [fastsam.FunctionalSAM, fastsam.SAM])
def test_functional_sam_and_repeated_dropout(method, autocast, tmp_path):
    """Logits are marked where a language model makes them; both passes draw the same."""
    kwargs = {**ADAMW, "rho": 0.3, "repeat_random": True}
    trainer = trainer_of(tmp_path, method, kwargs, model=network(0.5), bf16=autocast is not None)
    trainer.add_callback(Seeding())
    trainer.train()
    model = network(0.5)
    optimizer = method(groups_of(model), max_grad_norm=0.4, **kwargs)
    scheduler = get_scheduler("linear", optimizer, num_warmup_steps=2, num_training_steps=5)
    if method is fastsam.FunctionalSAM:
        optimizer.outputs_of(model.lm_head)
    for step, (batches, items) in enumerate(trainer.seen):

        def closure(batches=batches, items=items):
            for batch in batches:
                with torch.autocast("cpu", autocast) if autocast else contextlib.nullcontext():
                    loss = model(**batch, num_items_in_batch=items).loss
                loss.backward()

        torch.manual_seed(step)
        optimizer.step(closure)
        scheduler.step()
    assert_same_weights(trainer.model, model)


def test_functional_sam_of_a_model_whose_outputs_are_not_known(tmp_path):
    model = network()
    model.get_output_embeddings = lambda: None
    trainer = trainer_of(tmp_path, fastsam.FunctionalSAM, ADAMW, model=model)
    with pytest.raises(RuntimeError, match="needs the model's outputs"):
        trainer.train()
    assert_same_weights(model, network())
    trainer = trainer_of(tmp_path, fastsam.FunctionalSAM, ADAMW, model=model)
    trainer.create_optimizer().optimizer.outputs_of(model.lm_head)
    trainer.train()


def assert_same_weights(model, other):
    for (name, x), y in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(x, y), name


def logged(trainer, key):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


@pytest.mark.parametrize(
    ("method", "kwargs", "autocast"),
    [
        (fastsam.SAM, ADAMW, None),
        (fastsam.SAM, ADAMW, torch.bfloat16),
        (fastsam.SSAM, SGD | {"rho": 0.2}, None),  # clipped after its rescaling
        (fastsam.VaSSO, ADAMW | {"perturb_every": 2, "start": 1}, None),
        (fastsam.MSAM, ADAMW, None),
    ],
)
def test_trainer_equals_a_loop_by_hand(method, kwargs, autocast, tmp_path):
    """Bit for bit, with accumulation over micro-batches of unequal numbers of labels."""
    trainer = trainer_of(tmp_path, method, kwargs, bf16=autocast is not None)
    trainer.train()
    model, losses, optimizer, rates = by_hand(trainer.seen, method, kwargs, autocast)
    assert_same_weights(trainer.model, model)
    assert logged(trainer, "learning_rate") == rates
    assert logged(trainer, "loss") == pytest.approx(losses, rel=1e-6)  # summed in another order
    norm = float(optimizer.metrics["perturbed_grad_norm"])
    assert logged(trainer, "grad_norm")[-1] == pytest.approx(norm, rel=1e-5)
    assert norm > 0.4 or method is not fastsam.SAM  # it did clip
    # and the second pass matters
    plain, *_ = by_hand(trainer.seen, method, kwargs | {"rho": 0.0}, autocast)
    assert not torch.equal(plain.lm_head.weight, model.lm_head.weight)


def test_loss_scale_and_overflow(tmp_path):
    """Steps that overflow change nothing but the scale; the scheduler waits for them."""
    Scaled.init_scale = 2.0**21
    trainer = trainer_of(tmp_path, cls=Scaled, fp16=True)
    trainer.train()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**21)
    model, _, optimizer, rates = by_hand(trainer.seen, fastsam.SAM, ADAMW, torch.float16, scaler)
    skipped = int(optimizer.metrics["skipped"])
    assert 0 < skipped < 5
    assert trainer.accelerator.scaler.get_scale() == scaler.get_scale() == 2.0 ** (21 - skipped)
    assert_same_weights(trainer.model, model)
    assert logged(trainer, "learning_rate") == rates


@pytest.mark.gpu
def test_loss_scale_on_a_gpu(tmp_path):
    trainer = trainer_of(tmp_path, fp16=True, use_cpu=False)
    before = copy.deepcopy(trainer.model.state_dict())
    trainer.train()
    assert trainer.accelerator.scaler is not None
    assert any(not torch.equal(x, before[k]) for k, x in trainer.model.state_dict().items())
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


@pytest.mark.parametrize("scaled", [False, True])
def test_resumed_run_is_the_uninterrupted_one(scaled, tmp_path):
    """With dropout, state of the ascent, a schedule that counts steps, and in mid-epoch."""
    Scaled.init_scale = 2.0**12
    kwargs = ADAMW | {"perturb_every": 2}
    args = {"save_strategy": "steps", "save_steps": 3, "max_steps": 7} | {"fp16": scaled}
    make = {"method": fastsam.VaSSO, "kwargs": kwargs, "cls": Scaled if scaled else Noting} | args
    whole = trainer_of(tmp_path / "whole", model=network(0.2), **make)
    whole.train()
    resumed = trainer_of(tmp_path / "resumed", model=network(0.2), **make)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert len(resumed.seen) == 4
    assert_same_weights(resumed.model, whole.model)
    states = [trainer.optimizer.state_dict() for trainer in (whole, resumed)]
    assert states[0]["param_groups"] == states[1]["param_groups"]
    for key, state in states[0]["state"].items():
        assert {"exp_avg", "exp_avg_sq", "ascent_ema"} <= state.keys()
        for name, x in state.items():
            assert torch.equal(x, states[1]["state"][key][name]), name


def test_fine_tuning(tmp_path):
    """A tiny transformer learns to count; `optimizers` and evaluation work as ever."""
    model = network()
    optimizer = fastsam.SAM(model.parameters(), torch.optim.AdamW, lr=3e-2, rho=0.05)
    args = TrainingArguments(
        str(tmp_path), num_train_epochs=16, per_device_train_batch_size=8, save_strategy="no",
        report_to=[], disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    trainer = SAMTrainer(
        model=model, args=args, train_dataset=sentences(24), eval_dataset=sentences(24),
        optimizers=(optimizer, None),
    )  # fmt: skip
    assert trainer.evaluate()["eval_loss"] > 2.5
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.5
    assert trainer.optimizer.optimizer is optimizer and optimizer.max_grad_norm == 1.0
    trainer.train()  # once more, with the same optimizer
    assert trainer.optimizer.optimizer is optimizer


def test_contexts(tmp_path):
    """The first is entered for every micro-batch, the second once; neither in plain steps."""
    log = []

    @contextlib.contextmanager
    def noted(name):
        log.append(f"+{name}")
        yield
        log.append(f"-{name}")

    contexts = {f"{name}_context": lambda name=name: noted(name) for name in ("ascent", "descent")}
    trainer = trainer_of(tmp_path, kwargs=ADAMW | contexts | {"perturb_every": 2}, max_steps=2)
    compute = trainer.compute_loss
    trainer.compute_loss = lambda *args, **kw: (log.append("pass"), compute(*args, **kw))[1]
    trainer.train()
    first = ["+ascent", "pass", "-ascent"] * MICRO
    assert log == [*first, "+descent", *["pass"] * MICRO, "-descent", *["pass"] * MICRO]


def test_no_failure_leaves_perturbed_weights(tmp_path):
    """In the second pass, and between it and the step."""

    class Failing(TrainerCallback):
        def on_pre_optimizer_step(self, *args, **kwargs):
            raise KeyboardInterrupt

    trainer = trainer_of(tmp_path, max_steps=2)
    before = copy.deepcopy(trainer.model)
    compute, calls = trainer.compute_loss, []

    def failing(*args, **kwargs):
        calls.append(None)
        if len(calls) == 2 * MICRO:
            raise MemoryError
        return compute(*args, **kwargs)

    trainer.compute_loss = failing
    with pytest.raises(MemoryError):
        trainer.train()
    assert_same_weights(trainer.model, before)
    trainer.compute_loss = compute
    trainer.add_callback(Failing)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert_same_weights(trainer.model, before)
    trainer.remove_callback(Failing)
    trainer.train()
    assert not torch.equal(trainer.model.lm_head.weight, before.lm_head.weight)


def test_what_is_refused(tmp_path, monkeypatch):
    with pytest.raises(TypeError, match="one of fastsam's with two passes.* got AdamW"):
        trainer_of(tmp_path, torch.optim.AdamW, {"lr": 0.1}).train()
    model = network()
    sam = fastsam.SAM(model.parameters(), **ADAMW)
    with pytest.raises(TypeError, match="two passes.* got LETS"):
        AcceleratedSAM(fastsam.LETS(sam), Accelerator(cpu=True))
    deepspeed = SimpleNamespace(distributed_type=DistributedType.DEEPSPEED)
    with pytest.raises(RuntimeError, match="DeepSpeed's ZeRO.* use FSDP2"):
        AcceleratedSAM(sam, deepspeed)
    # the plain Trainer steps without a closure
    plain = trainer_of(tmp_path, cls=Trainer)
    with pytest.raises(RuntimeError, match="in Hugging Face's Trainer, fastsam.huggingface.SAMTr"):
        plain.train()
    monkeypatch.delattr(Trainer, "get_batch_samples")
    spec = importlib.util.find_spec("fastsam.huggingface")
    with pytest.raises(
        ImportError, match="needs Trainer.get_batch_samples, which transformers .* 5.23"
    ):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


# --- Accelerate alone ---


@pytest.fixture
def fresh_accelerate():
    """Its state is global, and so is what a Trainer has left of it."""
    _reset()
    yield
    _reset()


def _reset():
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def run_accelerated(steps, folder=None, resume=False, wrapped=True, scaler=None):
    """The documented loop. Saves after the first step where there is a folder, or goes on there."""
    _reset()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=MICRO)
    model = network()
    optimizer = fastsam.VaSSO(model.parameters(), **ADAMW)
    if scaler is not None:
        accelerator.scaler = scaler
    if wrapped:
        optimizer = AcceleratedSAM(optimizer, accelerator)
    scheduler = get_scheduler("linear", optimizer, num_warmup_steps=0, num_training_steps=10)
    loader = torch.utils.data.DataLoader(sentences(), batch_size=3)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    if resume:
        accelerator.load_state(folder)
        loader = accelerator.skip_first_batches(loader, MICRO)
    batches, losses = [], []
    for batch in loader:
        batches.append(batch)
        with accelerator.accumulate(model):

            def closure(batches=batches):
                for batch in batches:
                    with torch.autocast("cpu", torch.float16, enabled=scaler is not None):
                        loss = model(**batch).loss
                    accelerator.backward(loss)
                return loss

            loss = optimizer.step(closure)
            scheduler.step()
            if accelerator.sync_gradients:
                batches = []
                losses.append(loss)
                if folder and not resume and len(losses) == 1:
                    accelerator.save_state(folder)
                if len(losses) == steps:
                    break
    return model, optimizer, losses


def accelerated_by_hand(steps, scaler=None):
    model = network()
    optimizer = fastsam.VaSSO(model.parameters(), **ADAMW)
    scheduler = get_scheduler("linear", optimizer, num_warmup_steps=0, num_training_steps=10)
    batches = list(torch.utils.data.DataLoader(sentences(), batch_size=3))
    for k in range(steps):

        def closure(k=k):
            for batch in batches[k * MICRO : (k + 1) * MICRO]:
                with torch.autocast("cpu", torch.float16, enabled=scaler is not None):
                    loss = model(**batch).loss / MICRO
                (scaler.scale(loss) if scaler else loss).backward()

        before = optimizer.metrics.get("skipped", 0)
        optimizer.step(closure, grad_scaler=scaler)
        if scaler:
            scaler.update()
        if not scaler or optimizer.metrics["skipped"] == before:
            scheduler.step()
    return model


@pytest.mark.parametrize("wrapped", [True, False], ids=["AcceleratedSAM", "Accelerate's wrapper"])
def test_accelerate(wrapped, fresh_accelerate):
    model, optimizer, losses = run_accelerated(3, wrapped=wrapped)
    assert_same_weights(model, accelerated_by_hand(3))
    assert isinstance(optimizer, AcceleratedSAM) is wrapped
    if wrapped:
        assert all(torch.isfinite(loss) for loss in losses)


def test_accelerate_with_a_loss_scale(fresh_accelerate):
    """Of a step that overflows the scheduler knows."""
    scalers = [torch.amp.GradScaler("cpu", init_scale=2.0**21) for _ in range(2)]
    model, optimizer, _ = run_accelerated(6, scaler=scalers[0])
    other = accelerated_by_hand(6, scaler=scalers[1])
    assert_same_weights(model, other)
    assert not optimizer.step_was_skipped
    assert scalers[0].get_scale() == scalers[1].get_scale() < 2.0**21


def test_accelerate_resumes(tmp_path, fresh_accelerate):
    whole, *_ = run_accelerated(4, folder=str(tmp_path))
    resumed, *_ = run_accelerated(3, folder=str(tmp_path), resume=True)
    assert_same_weights(resumed, whole)


def test_accelerate_without_a_closure(fresh_accelerate):
    """Allowed for a second pass and for a step of the base; a first pass cannot be left out."""
    accelerator = Accelerator(cpu=True)
    param = torch.nn.Parameter(torch.ones(2))
    sam = fastsam.SAM([param], torch.optim.SGD, lr=1.0, perturb_every=2, rho=0.1)
    optimizer = accelerator.prepare(AcceleratedSAM(sam, accelerator))
    param.grad = torch.tensor([3.0, 4.0])
    with pytest.raises(RuntimeError, match="in Accelerate, fastsam.accelerate.AcceleratedSAM"):
        optimizer.step()
    sam.first_step()
    assert param.tolist() == pytest.approx([1.06, 1.08])
    param.grad = torch.tensor([1.0, 2.0])
    optimizer.step()
    assert param.tolist() == [0.0, -1.0]
    optimizer.step()
    assert param.tolist() == [-1.0, -3.0]
    with pytest.raises(RuntimeError, match="needs a closure"):  # the next perturbs again
        optimizer.step()
