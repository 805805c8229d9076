"""Hugging Face's Trainer, with both passes of a step."""

from contextlib import nullcontext
from typing import Any

import transformers
from torch.optim.optimizer import Optimizer
from transformers import Trainer

from .accelerate import AcceleratedSAM
from .methods.functional import FunctionalSAM
from .methods.momentum import MSAM

#: Methods of ``Trainer`` that are overridden or called here.
NEEDED = (
    "create_optimizer", "get_batch_samples", "training_step", "_clip_grad_norm", "_get_grad_norm"
)  # fmt: skip
for _name in NEEDED:
    if not hasattr(Trainer, _name):
        raise ImportError(
            f"SAMTrainer needs Trainer.{_name}, which transformers {transformers.__version__} does "
            "not have; those from 5.10 to 5.23 do"
        )


class SAMTrainerMixin:
    """Adds the second pass to a Trainer's steps; name it before the Trainer's class::

        class SAMSeq2SeqTrainer(SAMTrainerMixin, Seq2SeqTrainer):
            pass

    The Trainer's loop is unchanged. The gradients that it accumulates over its micro-batches are
    those of the first pass. After the last micro-batch the weights are perturbed along the sum of
    the gradients, all micro-batches run again at the perturbed weights, and the loop's call of
    ``optimizer.step()`` is the second step. Callbacks between the two (``on_pre_optimizer_step``)
    see perturbed weights. The logged ``loss`` is the one at the unperturbed weights, and
    ``grad_norm`` is the norm of the second gradient before clipping.

    Give it the optimizer as to any Trainer: by ``optimizer_cls_and_kwargs``, which makes groups
    with and without weight decay, by ``optimizers=(optimizer, None)`` or in ``create_optimizer``.

    Of the ``TrainingArguments``:

    - ``gradient_accumulation_steps``: one perturbation for all micro-batches of a step.
    - ``max_grad_norm`` becomes that of the optimizer, if it has none: it clips the final gradient.
    - ``bf16``, ``fp16``: an overflow in either pass skips the step and the scheduler's step.
    - schedulers and ``resume_from_checkpoint``: unchanged, bit for bit.
    - ``deepspeed`` is refused.

    ``perturb_every``, ``start``, ``stop``, ``ascent_context`` (entered for each micro-batch),
    ``descent_context`` and ``repeat_random`` are supported, and an exception restores the weights.
    ``LETS`` is refused: it needs a second batch. ``FunctionalSAM`` marks the result of the model's
    output embeddings (``get_output_embeddings``: the logits of a language model), unless
    ``outputs_of`` has named another module. A model without output embeddings needs ``outputs_of``,
    or the first step raises an error. ``MSAM`` runs every micro-batch once.
    """

    args: Any
    accelerator: Any
    optimizer: Any

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Optimizer:
        """Create the optimizer, if there is none, in Accelerate's wrapper for two passes.

        Raises:
            TypeError: If it is none of fastsam's.
            RuntimeError: With DeepSpeed.
        """
        super().create_optimizer(*args, **kwargs)  # type: ignore[misc]
        if not isinstance(self.optimizer, AcceleratedSAM):
            self.optimizer = AcceleratedSAM(self.optimizer, self.accelerator)
        sam = self.optimizer.optimizer
        if isinstance(sam, FunctionalSAM) and not sam.has_outputs:
            find = getattr(self.model, "get_output_embeddings", None)  # type: ignore[attr-defined]
            head = None if find is None else find()
            if head is not None:
                sam.outputs_of(head)
        if sam.max_grad_norm is None and self.args.max_grad_norm:
            sam.max_grad_norm = self.args.max_grad_norm
        return self.optimizer

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """The micro-batches of a step, which are kept for the second pass."""
        batches, items = super().get_batch_samples(*args, **kwargs)  # type: ignore[misc]
        self._batches, self._opens_step = batches, True
        return batches, items

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Forward and backward of a micro-batch; after a step's last one, the second pass."""
        run = super().training_step  # type: ignore[misc]
        sam = self.optimizer.optimizer
        if not sam.perturbs_next:
            return run(model, inputs, *args, **kwargs)
        if isinstance(sam, MSAM):  # whose one pass begins with the perturbation
            opens, self._opens_step = self._opens_step, False
            try:
                if opens:
                    sam.first_step()
                return run(model, inputs, *args, **kwargs)
            except BaseException:
                sam.restore()
                raise
        repeats = sam.repeated_random if sam.repeat_random else nullcontext
        opens, self._opens_step = self._opens_step, False  # where random numbers are noted
        with (sam.ascent_context or nullcontext)(), repeats() if opens else nullcontext():
            loss = run(model, inputs, *args, **kwargs)
        if not self.accelerator.sync_gradients:
            return loss
        try:
            sam.first_step(zero_grad=True, grad_scaler=self.optimizer.scaler)
            with (sam.descent_context or nullcontext)(), repeats():
                for batch in self._batches[:-1]:
                    with self.accelerator.no_sync(model):
                        run(model, batch, *args, **kwargs)
                run(model, inputs, *args, **kwargs)
        except BaseException:
            sam.restore()
            raise
        return loss

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train, as the Trainer does. Whatever ends it, the weights are not left perturbed."""
        try:
            return super().train(*args, **kwargs)  # type: ignore[misc]
        finally:
            if isinstance(self.optimizer, AcceleratedSAM):
                self.optimizer.optimizer.restore()

    def _clip_grad_norm(self, model: Any) -> Any:
        """The gradient's norm, for the log: clipping it is part of the optimizer's step."""
        return self._get_grad_norm(model)  # type: ignore[attr-defined]


class SAMTrainer(SAMTrainerMixin, Trainer):  # type: ignore[misc,unused-ignore]
    """Hugging Face's ``Trainer`` with one of fastsam's optimizers; see :class:`SAMTrainerMixin`.

    ::

        trainer = SAMTrainer(
            model=model,
            args=TrainingArguments("out", learning_rate=1e-4, gradient_accumulation_steps=4),
            train_dataset=dataset,
            optimizer_cls_and_kwargs=(
                fastsam.SAM, dict(base_optimizer=torch.optim.AdamW, lr=1e-4, rho=0.05)
            ),
        )
        trainer.train()
    """
