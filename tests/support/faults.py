"""Faults put into a step on purpose: allocations that fail, Ctrl-C, and what to compare after them.

A :class:`Rig` is an optimizer with its parameters and its gradients, the same ones in every process
and for every copy: two rigs that took the same steps hold the same bits.
"""

import copy
import functools
import os
import signal
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from registry import ADAM, BASES, METHODS, OWN_UPDATES, Base, build
from signalling import PACKAGE, At

#: Whether to put a fault at every point, also where the tests take samples.
ALL = os.environ.get("FASTSAM_FAULTS") == "all"

FOREIGN = Base(torch.optim.RMSprop, "", {"lr": 0.01, "momentum": 0.9})
FAULT_BASES = {
    "sgd": BASES["sgd-dampening"],
    "adamw": Base(torch.optim.AdamW, "", ADAM | {"amsgrad": True}),
    "adagrad": BASES["adagrad"],
    "adagrad_norm": BASES["adagrad_norm"],
    "rmsprop": FOREIGN,
} | OWN_UPDATES


def bases_of(method: str) -> list[str]:
    own = [name for name in METHODS[method].bases if name in OWN_UPDATES]
    return own or [name for name in FAULT_BASES if name not in OWN_UPDATES]


#: Every method with every base, by names.
PAIRS = [(method, base) for method in METHODS for base in bases_of(method)]

# --- allocations ------------------------------------------------------------------------------


def _sizes(x: Any, found: dict[int, int]) -> dict[int, int]:
    """Bytes by storage, in nested arguments."""
    if isinstance(x, torch.Tensor):
        if x.device.type != "meta":
            storage = x.untyped_storage()
            found[storage._cdata] = storage.nbytes()
    elif isinstance(x, (list, tuple)):
        for y in x:
            _sizes(y, found)
    return found


class Allocations(TorchDispatchMode):
    """Counts the operators that allocate, and lets one of them fail.

    Args:
        at: Which one, from 0; None lets none fail.
        forever: Let the later ones fail, too, as they do where memory is really short.
    """

    def __init__(self, at: int | None = None, forever: bool = False):
        super().__init__()
        self.at, self.forever = at, forever
        self.count = 0
        self.failed = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = (args, tuple(kwargs.values()))
        before = _sizes(given, {})
        out = func(*args, **kwargs)
        after = _sizes((out, given), {})
        # What allocates returns new memory, and is as if it had not run; or it makes room in
        # memory that it was given to write to.
        if any(before.get(storage) != size for storage, size in after.items()):
            self.count += 1
            due = self.at is not None and self.count > self.at
            if due and (self.forever or not self.failed):
                self.failed = True
                raise torch.OutOfMemoryError(f"fault at allocation {self.count - 1}: {func}")
        return out


#: No faults inside the block: for what is the user's, or belongs to Triton's interpreter.
unharmed = _disable_current_modes


@contextmanager
def kernels(before: Callable[[str], None] = lambda name: None) -> Iterator[None]:
    """Call a function with a kernel's name before its launches; no fault is put into these."""
    try:
        from triton.runtime.interpreter import InterpretedFunction
    except ImportError:
        yield
        return
    run = InterpretedFunction.run

    def launch(self, *args, grid, warmup, **kwargs):
        before(f"compile {self.__name__}" if warmup else self.__name__)
        with unharmed():
            return run(self, *args, grid=grid, warmup=warmup, **kwargs)

    InterpretedFunction.run = launch
    try:
        yield
    finally:
        InterpretedFunction.run = run


# --- interrupts -------------------------------------------------------------------------------


class Interrupt(At):
    """Ctrl-C before the n-th line of the package that runs inside the block; None counts lines."""

    def __init__(self, at: int | None):
        super().__init__(at, (PACKAGE,), lambda: signal.raise_signal(signal.SIGINT))


# --- the rig ----------------------------------------------------------------------------------

#: Shape, dtype, and the pass in which there is no gradient.
Tensors = list[tuple[tuple[int, ...], torch.dtype, int | None]]
SMALL: Tensors = [
    ((5, 3), torch.float32, None),
    ((7,), torch.bfloat16, None),
    ((2, 2), torch.float64, None),
    ((3,), torch.float32, 2),
    ((2,), torch.float32, 1),
]
#: With one that is large enough to be moved to scratch memory on a CPU.
LARGE: Tensors = [*SMALL, ((129, 128), torch.float32, None)]
#: One of each arithmetic: two launches a pass.
TWO: Tensors = [((5,), torch.float32, None), ((2, 2), torch.float64, None)]
GRADIENTS = 3  # sets of them, in turn


@functools.cache
def _gradients(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


class Rig:
    """An optimizer with everything that a step of it needs."""

    def __init__(
        self, method: str, base: str, backend: str, tensors: Tensors = SMALL, **kwargs: Any
    ):
        self.name = f"{method} {base} {backend}"
        self.tensors = tensors
        self.params = [
            torch.nn.Parameter(_gradients(shape, dtype, -1 - k))
            for k, (shape, dtype, _) in enumerate(tensors)
        ]
        self.params = [torch.nn.Parameter(p.detach().clone()) for p in self.params]
        groups = [{"params": list(range(0, len(tensors), 2))},
                  {"params": list(range(1, len(tensors), 2)), "lr": 0.03}]  # fmt: skip
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of 16-bit parameters
            self.optimizer = build(
                METHODS[method], FAULT_BASES[base], self.params, groups, backend, **kwargs
            )
        if self.optimizer._base is None:  # whose step is its own, and its failures
            self.optimizer.base_optimizer.step = self._step_foreign
        self.taken = 0  # steps
        self.calls = 0  # of the closure in this step

    def _step_foreign(self) -> None:
        with unharmed():
            type(self.optimizer.base_optimizer).step(self.optimizer.base_optimizer)

    def closure(self) -> float:
        """Gradients by plain assignment, so that no fault is spent on autograd."""
        self.calls += 1
        with unharmed():
            for k, (p, (shape, dtype, missing)) in enumerate(
                zip(self.params, self.tensors, strict=True)
            ):
                seed = 1000 * (self.taken % GRADIENTS) + 100 * self.calls + k
                grad = _gradients(shape, dtype, seed)
                p.grad = None if missing == self.calls else grad.clone()
        return 1.0

    def step(self, explicit: bool = False) -> None:
        """One step; if it fails it has not been taken."""
        self.calls = 0
        if explicit:
            self.closure()
            self.optimizer.first_step(zero_grad=True)
            self.closure()
            self.optimizer.second_step(zero_grad=True)
        else:
            self.optimizer.step(self.closure)
        self.taken += 1

    def steps(self, count: int) -> "Rig":
        for _ in range(count):
            self.step()
        return self

    def snapshot(self) -> dict[str, Any]:
        """Everything that a failed step has to leave alone."""
        saved = copy.deepcopy(self.optimizer.state_dict())
        weights = [p.detach().clone() for p in self.params]
        skipped = self.optimizer.metrics.get("skipped", torch.zeros(()))
        return {"weights": weights, "skipped": skipped.double(), **saved}


def difference(a: Any, b: Any, where: str = "") -> str | None:
    """Where two snapshots differ in a bit; None where they are equal."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        same = a.dtype == b.dtype and a.shape == b.shape
        same = same and torch.equal(_bytes(a), _bytes(b))
        return None if same else f"{where}: {a} is not {b}"
    if isinstance(a, dict) and isinstance(b, dict):
        if a.keys() != b.keys():
            return f"{where}: {list(a)} is not {list(b)}"
        pairs = [(a[key], b[key], f"{where}/{key}") for key in a]
    elif isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
        pairs = [(x, y, f"{where}/{k}") for k, (x, y) in enumerate(zip(a, b, strict=True))]
    else:
        # a number that has become a device scalar is the same number
        same = a is b or a == b or (a != a and b != b)
        return None if same else f"{where}: {a} is not {b}"
    return next((found for pair in pairs if (found := difference(*pair))), None)


def _bytes(x: torch.Tensor) -> torch.Tensor:
    return x.detach().contiguous().reshape(-1).view(torch.uint8)


def spread(count: int, samples: int, salt: str) -> list[int]:
    """So many of ``range(count)``, evenly, other ones for every test; all of it on demand."""
    if ALL or samples >= count:
        return list(range(count))
    shift = sum(map(ord, salt)) % 97 / 97
    return sorted({int((k + shift) * count / samples) for k in range(samples)})
