"""The loss's derivative by a model's outputs, kept from a step's first pass to its second."""

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

#: What the outputs are that can be marked.
Outputs = Tensor | list[Tensor] | tuple[Tensor, ...]

UNMARKED = (
    "{name} needs the model's outputs, to keep the derivative of the loss with respect to them: "
    "mark them, loss_fn(optimizer.outputs(model(x)), y), or name the module that computes them, "
    "optimizer.outputs_of(module), or give step two closures; with by_hand=True the loop keeps the "
    "derivative itself"
)
NOT_REACHED = (
    "{name} found no derivative of the loss with respect to the marked outputs: the loss has to be "
    "computed from them, and not from a copy. Some wrappers (mixed precision) convert the outputs "
    "of a model; name the module that computes them, optimizer.outputs_of(module)"
)
ANOTHER_BATCH = "both passes have to run the same micro-batches in the same order"


@dataclass(eq=False)
class Marked:
    """An output of one forward pass.

    Attributes:
        kind: Its shape and dtype.
        found: The derivatives by it, one for each backward pass, with the versions they had then.
        used: How many of them the second pass has used.
    """

    kind: tuple[Any, ...]
    found: list[tuple[Tensor, int]] = field(default_factory=list)
    used: int = 0

    def keep(self, grad: Tensor) -> None:
        """A hook of the first pass's output."""
        self.found.append((grad, grad._version))

    def repeat(self, grad: Tensor) -> Tensor:
        """A hook of the second pass's output: what flows on into the model is what was kept.

        Raises:
            RuntimeError: If there is no such derivative, or it has been written to.
        """
        if self.used == len(self.found):
            raise RuntimeError(
                f"outputs of shape {tuple(self.kind[0])} get {self.used + 1} derivatives in the "
                f"second pass and got {self.used} in the first: {ANOTHER_BATCH}"
            )
        kept, version = self.found[self.used]
        if kept._version != version:
            raise RuntimeError(
                f"the derivative by outputs of shape {tuple(self.kind[0])} has been written to "
                "between the passes"
            )
        self.used += 1
        return kept


class Derivatives:
    """Those of the micro-batches of a step.

    Args:
        name: The optimizer's, for messages.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._first: list[Marked] = []  # of the pass that is running
        self._kept: list[Marked] = []  # of the first pass, when it is over
        self._again = 0  # how many the second has marked

    def mark(self, outputs: Outputs, second: bool) -> None:
        """Let the backward pass keep, or repeat, the derivatives by these outputs.

        Raises:
            TypeError: If they are no tensors.
            RuntimeError: In the second pass, if they are not those of the first.
        """
        tensors = [outputs] if isinstance(outputs, Tensor) else outputs
        if not isinstance(tensors, (list, tuple)) or not all(
            isinstance(x, Tensor) for x in tensors
        ):
            raise TypeError(
                "outputs must be a tensor that the loss is computed from, or a list of such "
                f"tensors, none of which depends on another, got {_shown(outputs)}"
            )
        for x in tensors:
            if x.requires_grad:
                kind = x.shape, x.dtype
                hook = self._find(kind).repeat if second else self._begin(kind).keep
                x.register_hook(hook)  # type: ignore[no-untyped-call]

    def _begin(self, kind: tuple[Any, ...]) -> Marked:
        self._first.append(Marked(kind))
        return self._first[-1]

    def _find(self, kind: tuple[Any, ...]) -> Marked:
        if self._again == len(self._kept):
            raise RuntimeError(
                f"the second pass marks more outputs than the first, which marked "
                f"{len(self._kept)}: {ANOTHER_BATCH}"
            )
        found = self._kept[self._again]
        if found.kind != kind:
            shapes = [f"{tuple(shape)} of {dtype}" for shape, dtype in (kind, found.kind)]
            raise RuntimeError(
                f"outputs in the second pass have shape {shapes[0]}, and in the first "
                f"{shapes[1]}: {ANOTHER_BATCH}"
            )
        self._again += 1
        return found

    def close(self, needed: bool = True) -> None:
        """The first pass is over.

        Raises:
            RuntimeError: If it is ``needed`` and has kept nothing.
        """
        if needed and not any(marked.found for marked in self._first):
            raise RuntimeError((NOT_REACHED if self._first else UNMARKED).format(name=self._name))
        self._kept, self._first, self._again = self._first, [], 0

    def check_all_used(self) -> None:
        """The second pass is over.

        Raises:
            RuntimeError: If it has not repeated all of the first's.
        """
        marked = self._again, len(self._kept)
        used = sum(x.used for x in self._kept), sum(len(x.found) for x in self._kept)
        for what, (now, before) in (("marked", marked), ("went back through", used)):
            if now != before:
                raise RuntimeError(
                    f"the second pass {what} {now} of the model's outputs, and the first {before}: "
                    f"{ANOTHER_BATCH}, and call backward"
                )

    def begin_again(self) -> None:
        """The gradients of the pass that is running have been zeroed, and it begins anew."""
        self._first, self._again = [], 0
        for marked in self._kept:
            marked.used = 0

    def forget(self) -> None:
        """The step is over."""
        self._first, self._kept, self._again = [], [], 0


def _shown(outputs: Any) -> str:
    if isinstance(outputs, (list, tuple)):
        return f"{type(outputs).__name__} of {', '.join(type(x).__name__ for x in outputs)}"
    return type(outputs).__name__


class MarksOutputs:
    """A forward hook that marks what a module gives.

    It holds no optimizer, so that a copy or a pickle of the model is none of that.

    Args:
        mark: A bound method that takes the outputs.
    """

    def __init__(self, mark: Callable[[Any], Any]) -> None:
        self._mark: Any = weakref.WeakMethod(mark)

    def __call__(self, module: Any, inputs: Any, outputs: Any) -> None:
        mark = self._mark()
        if mark is not None:
            mark(outputs)

    def __reduce__(self) -> tuple[Any, ...]:
        return _marks_nothing, ()


def _nothing() -> None:
    return None


def _marks_nothing() -> MarksOutputs:
    """What a copy of the hook is."""
    hook = MarksOutputs.__new__(MarksOutputs)
    hook._mark = _nothing
    return hook


def go_back(outputs: Outputs) -> None:
    """Backward from marked outputs, whose derivatives are put in on the way."""
    tensors = [outputs] if isinstance(outputs, Tensor) else outputs
    tensors = [x for x in tensors if x.requires_grad]
    # anything of their shape, without memory
    torch.autograd.backward(tensors, [x.detach().new_zeros(()).expand_as(x) for x in tensors])
