"""Checks for your own methods: those of fastsam's tests.

``check_method(GSAM, torch.optim.SGD, lr=0.1, momentum=0.9)`` raises AssertionError if a check
fails. It needs no test framework. Without a GPU, ``TRITON_INTERPRET=1`` in the environment, set
before Triton is imported, runs the Triton functions in Triton's interpreter.
"""

import itertools
import warnings
from collections.abc import Sequence
from typing import Any

import torch

from fastsam.backends import resolve
from fastsam.optimizer import SharpnessAwareOptimizer

from .checks import CHECKS
from .runs import Formula, Method, Run

__all__ = ["check_method"]


def check_method(
    cls: type[SharpnessAwareOptimizer],
    *args: Any,
    backends: Sequence[str] | None = None,
    formula: Formula | None = None,
    **kwargs: Any,
) -> None:
    """Check a method on small problems: in a second, or in twenty in Triton's interpreter.

    - Backends agree within rounding, in float32 and float64: on tensors of odd shapes and layouts,
      in several groups, with gradients that are missing in one of the passes.
    - Gradients are only read.
    - A step that fails, or is undone, leaves weights and state as they were, bit for bit.
    - An optimizer that is resumed, copied or pickled continues bit for bit.
    - First gradients that are zero or not finite do no harm.
    - Changes in the groups take effect in the next step.
    - ``skip_nonfinite``, a :class:`torch.amp.GradScaler`, ``master_weights`` and
      ``rounding="stochastic"`` work as documented; so do CUDA graphs if there is a GPU, and
      parameters on two GPUs if there are two.

    Options that the class refuses with ValueError are not checked. Not for ascents with ``noise``:
    it depends on the order of the parameters, which some checks change.

    Args:
        cls: A subclass of ``fastsam.rules.SharpnessAwareOptimizer``.
        *args, **kwargs: Its arguments after ``params``, except ``backend``.
        backends: The backends to check. Default: ``"reference"``, ``"torch"``, and ``"triton"`` if
            there is a GPU or the environment has ``TRITON_INTERPRET=1``.
        formula: The method written again, without its code. It takes the weights, a function that
            returns their gradients, and a number of steps, and returns the weights after these
            steps. Weights and gradients are lists of float64 tensors. There is one group, with the
            values of ``kwargs``. Default None.

    Raises:
        AssertionError: If a check fails. Names the class, the backend, the check and what differs.
        TypeError: If ``cls`` is no such class, or does not take the arguments.
        ValueError, ImportError, RuntimeError: If a backend is unknown or does not run here; if the
            class refuses its arguments.

    Example:
        >>> fastsam.testing.check_method(
        ...     fastsam.GSAM, torch.optim.SGD, lr=0.1, alpha=0.3, backends=["torch"]
        ... )
    """
    if not (isinstance(cls, type) and issubclass(cls, SharpnessAwareOptimizer)):
        raise TypeError(f"cls must be a subclass of SharpnessAwareOptimizer, got {cls!r}")
    if "backend" in kwargs:
        raise TypeError("backend must not be among the arguments of cls; use backends=[...]")
    device = torch.device("cpu")
    if torch.cuda.is_available() and not _serves("triton", device):  # there it is interpreted
        device = torch.device("cuda")
    if backends is None:
        backends = ["reference", "torch"] + ["triton"] * _serves("triton", device)
    for backend in backends:
        resolve(backend, device)
    method = Method(cls, args, kwargs, formula, device)
    Run(method, "reference")  # the arguments are wrong if this raises, and not the method
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "some parameters are float16 or bfloat16")
        warnings.filterwarnings("ignore", ".*encountered in", RuntimeWarning)  # when interpreted
        for check, backend in itertools.product(CHECKS, backends):
            try:
                check(method, backend)
            except Exception as error:
                name = check.__name__.strip("_").replace("_", " ")
                kind = "" if type(error) is AssertionError else f"{type(error).__name__}: "
                raise AssertionError(
                    f"{cls.__name__} on backend {backend!r}: {name}: {kind}{error}"
                ) from error


def _serves(backend: str, device: torch.device) -> bool:
    try:
        return bool(resolve(backend, device))
    except (ImportError, RuntimeError):
        return False
