"""The closure that ``step`` is given, and what its first call says of the loop around it."""

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .guards import Warnings
from .rule import Group
from .sharding import is_sharded, local

#: Modules whose loops call ``step`` without a closure, once imported, and what serves there.
CLOSURELESS = {
    "lightning.pytorch": "in Lightning's 16-mixed, fastsam.lightning.MixedPrecision",
    "pytorch_lightning": "in Lightning's 16-mixed, fastsam.lightning.MixedPrecision",
    "transformers.trainer": "in Hugging Face's Trainer, fastsam.huggingface.SAMTrainer",
    "accelerate": "in Accelerate, fastsam.accelerate.AcceleratedSAM",
    "deepspeed": "instead of DeepSpeed's ZeRO, FSDP2 (torch.distributed.fsdp.fully_shard)",
}
#: The part of a gradient's norm by which the same one may differ when it is computed again.
TOLERANCE = 1e-4
#: Elements of a gradient that are looked at.
SAMPLE = 16
COMPUTED_TWICE = (
    "step() found gradients that the closure computed again: step zeroes gradients and calls the "
    "closure itself, so a backward() before it is one pass too many. Remove that backward(), or "
    "alternate first_step and second_step instead"
)
CUT_OFF = (
    "the gradients were parts of a larger tensor when step() was called, and no longer are: a step "
    "sets gradients to None before each pass, so that tensor no longer receives them. Use "
    "set_to_none=False, which zeroes gradients in place"
)


class SplitClosure:
    """One of the two that ``split_closures`` gives: a closure with its batch."""

    def __init__(self, closure: Callable[[Any], Any], batch: Any):
        self.closure, self.batch = closure, batch

    def __call__(self) -> Any:
        return self.closure(self.batch)


def refuse_split(name: str, closures: Iterable[Any]) -> None:
    """Raise where the closures of ``split_closures`` would be taken for something else.

    Raises:
        TypeError: If one is among them.
    """
    if any(isinstance(closure, SplitClosure) for closure in closures):
        raise TypeError(
            f"{name} cannot take the closures of split_closures: the first one's batch is a part "
            "of the second one's. Give them to step(*closures) of a sharpness-aware optimizer"
        )


def check_closure(name: str, closure: Any) -> None:
    """What ``step`` was given."""
    if closure is None:
        others = dict.fromkeys(use for module, use in CLOSURELESS.items() if module in sys.modules)
        raise RuntimeError(
            f"{name}.step needs a closure that computes the loss and calls backward; without one, "
            "alternate first_step and second_step; with a GradScaler, call step(closure, "
            f"grad_scaler=scaler) instead of scaler.step{''.join('; ' + use for use in others)}"
        )
    if not callable(closure):
        raise TypeError(
            f"closure must be a function that computes the loss, calls backward and returns the "
            f"loss, got {type(closure).__name__}"
        )
    # Lightning's closure has the last micro-batch alone; the others have been accumulated
    module = next(iter(getattr(closure, "args", None) or ()), None)
    micro_batches = getattr(getattr(module, "_trainer", None), "accumulate_grad_batches", 1)
    if isinstance(micro_batches, int) and micro_batches > 1:
        raise RuntimeError(
            "accumulate_grad_batches must be 1 with automatic optimization, which does not repeat "
            f"the micro-batches before the last one for the second pass, got {micro_batches}; use "
            "manual optimization, with a closure that runs all of them"
        )


def check_closures(name: str, closures: Any) -> list[Callable[[], Any]]:
    """What ``step_micro_batches`` was given, as a list.

    Raises:
        TypeError: If it is one function, or one of them is none, or is of ``split_closures``.
        ValueError: If there is none.
    """
    if callable(closures):
        raise TypeError("closures must be a sequence of functions, got a function")
    found = list(closures)
    if not found:
        raise ValueError("closures must be at least one, got none")
    refuse_split(f"{name}.step_micro_batches", found)
    for closure in found:
        check_closure(name, closure)
    return found


def asks_for_state(groups: Sequence[Mapping[str, Any]], state: Mapping[Any, Any]) -> bool:
    """Whether a step without a closure is ``torch.distributed.checkpoint``'s, that creates state.

    Before it calls, it sets every learning rate to 0 and gives a gradient of zeros to every
    parameter that can have one. A warm-up from 0 whose closure was forgotten has the rates, too,
    but gradients of a loss, or none.
    """
    rates = [group.get("lr") for group in groups]
    if state or not all(lr is not None and float(lr) == 0 for lr in rates):
        return False
    params = [p for group in groups for p in group["params"] if p.requires_grad]
    return all(p.grad is not None for p in params) and all(is_zero(p.grad) for p in params)


def is_zero(grad: Tensor) -> bool:
    """Whether all of it, or of this rank's shard, is 0; of a tensor without data yes."""
    grad = local(grad)
    return grad.is_meta or (grad.layout == torch.strided and not bool(grad.any()))


@dataclass
class Found:
    """A gradient that was there: its first elements, and the buffer that it was a part of."""

    param: Tensor
    copy: Tensor
    buffer: int | None


class FirstLook:
    """Looks at the first and the last parameter that have a gradient, once in its life.

    That there are gradients says little: another optimizer's backward may have left them, as a
    generator's does in the discriminator. So they are compared with those of the closure's first
    two calls. Those that are equal to the first and not to the second are of the same batch at the
    same weights. Nothing waits for a GPU: what it finds is read in the first pass after it is
    there.
    """

    def __init__(self) -> None:
        self._is_due = True
        self._found: list[Found] = []
        self._first: Tensor | None = None  # whether they were equal to those of the first call
        self._result: Any = None  # on the host, and an event that says when it is true

    def before(self, groups: Iterable[Group]) -> None:
        """Look at what there is before it is zeroed."""
        self._found, self._first = [], None
        if not self._is_due:  # a closure has failed, and left gradients
            return
        self._is_due = False
        params = [p for group in groups for p in group["params"] if _is_plain(p)]
        ends = [*params[:1], *params[1:][-1:]]
        copies = [_sample(param).clone() for param in ends]
        self._found = list(map(Found, ends, copies, map(_buffer_of, ends)))

    def after(self, given: Warnings, whole: bool = False) -> None:
        """Compare it with what a call of the closure has left.

        Args:
            given: The optimizer's warnings.
            whole: Whether DDP, if there is one, has put its buckets back into ``.grad``.
        """
        if self._found:
            found, first = self._found, self._first
            if first is None and whole and _are_cut_off(found):
                given.once("cut off", CUT_OFF)
            equal = _are_equal(found)
            if first is not None:
                self._first = None
                self._result = None if equal is None else _on_host(first & ~equal)
            elif equal is not None and (equal.is_cuda or equal):
                self._first = equal
            if self._first is None:
                self._found = []
        if self._result is not None:
            result, event = self._result
            # to ask for an event would end the capture of a graph
            if event is None or (not torch.cuda.is_current_stream_capturing() and event.query()):
                self._result = None
                if result:
                    given.once("computed twice", COMPUTED_TWICE)


def _is_plain(param: Tensor) -> bool:
    """Whether there is a gradient, of a kind that can be compared here without waiting."""
    grad = local(param.grad)
    return (
        type(grad) is Tensor
        and grad.layout is torch.strided
        and grad.device.type in ("cpu", "cuda")
        and grad.numel() > 0
        and not (grad.is_cuda and torch.cuda.is_current_stream_capturing())
    )


def _sample(param: Tensor) -> Tensor:
    """The first elements of the gradient."""
    sample: Tensor = local(param.grad).detach().flatten()[:SAMPLE]
    return sample


def _buffer_of(param: Tensor) -> int | None:
    """Where the memory begins that the gradient is a part of; None where it fills it."""
    grad = param.grad
    if grad is None or is_sharded(grad) or not grad._is_view():
        return None
    storage = grad.untyped_storage()
    is_part = storage.nbytes() > grad.numel() * grad.element_size()
    return storage.data_ptr() if is_part else None


def _are_cut_off(found: list[Found]) -> bool:
    """Whether they were parts of one buffer, and are not any more."""
    buffers = {one.buffer for one in found}
    if len(buffers) != 1 or None in buffers:
        return False
    present = [one.param for one in found if one.param.grad is not None]
    return bool(present) and all(_buffer_of(param) is None for param in present)


def _are_equal(found: list[Found]) -> Tensor | None:
    """Whether the gradients are the same again and not zero; None where it cannot be said."""
    results = []
    for one in found:
        if not _is_plain(one.param):
            return None
        again = _sample(one.param)
        if again.shape != one.copy.shape:
            return None
        wide = torch.promote_types(again.dtype, torch.float32)
        before = one.copy.to(again.device, wide)
        difference, norm = map(torch.linalg.vector_norm, (again.to(wide) - before, before))
        results.append((difference <= TOLERANCE * norm) & (norm > 0))
    return torch.stack([x.to(results[0].device) for x in results]).all()


def _on_host(result: Tensor) -> tuple[Tensor, Any]:
    """The result on the host, and the event after which it is there; None for at once."""
    if result.device.type == "cpu":
        return result, None
    on_host = torch.empty((), dtype=torch.bool, device="cpu", pin_memory=True)
    on_host.copy_(result, non_blocking=True)
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(result.device))
    return on_host, event
