"""A whole step in a CUDA graph, behind one call."""

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from .explicit import uncompiled
from .methods.lets import LETS
from .optimizer import SharpnessAwareOptimizer
from .step.arguments import Integer
from .step.caches import forget_weights
from .step.capture import check_decisions, refuse
from .step.closures import check_closure
from .step.flight import InFlight
from .step.hooks import run_observers
from .step.interrupts import uninterrupted
from .step.replay import Assumptions, detached, has_hooks, has_loss_scale, is_served
from .step.sharding import is_sharded


def graphed(optimizer: Optimizer, closure: Callable[[], Any], warmup: int = 3) -> Callable[[], Any]:
    """Capture a whole step in a CUDA graph, forward and backward passes included.

    Each call of the returned function is one step, the same as ``optimizer.step(closure)``. The
    first ``warmup`` calls are steps without a graph, on a separate stream. The next call captures a
    step and replays it. All later calls replay, at the cost of one launch on the host. The capture
    itself runs nothing, so every call is exactly one step.

    The closure reads its inputs from tensors that stay in place: write each batch into them, by
    ``copy_``, before the call. What Python decides in the closure is decided at the capture.
    Learning rate and radius are constants of the graph, unless they are tensors on the device;
    these may be written to between calls, as the schedulers of :mod:`torch.optim` do.

    The user guide's page on CUDA graphs has a complete example.

    Args:
        optimizer: One of fastsam's, with all its parameters on one GPU. It may have taken steps.
            Steps outside, by ``optimizer.step``, may come between calls.
        closure: As for ``optimizer.step``: computes the loss, calls ``backward`` and returns the
            loss, or tensors in tuples, lists and dicts. It must not wait for the GPU, as ``item``
            and printing do.
        warmup: Number of calls before the capture, at least 2: they create the state and the tables
            that the captured step uses. Default 3.

    Returns:
        A function without arguments. It returns what the closure returns in the first pass,
        detached. From the capture on this is the same memory in every call, and the next call
        overwrites it: use ``clone`` to keep it. ``.grad`` is memory of the graph, too.

    Raises:
        TypeError: If ``optimizer`` or ``closure`` is something else.
        ValueError: If ``warmup`` is out of range.
        RuntimeError: If there is no GPU to capture on, or the step cannot be captured, with the
            reason: parameters on several devices or sharded, ``LETS``, ``lam`` by schedule,
            ``perturb_every``, ``start``, ``stop``, ``repeat_random``, ``skip_nonfinite`` on a base
            that is not fused, a loss scale, step hooks. The returned function raises it if the
            capture fails, as with a closure that waits for the GPU; weights and state are then as
            before that call, and every later call raises it again. It also raises if a replay would
            no longer be the right step, because parameters, groups, hyper-parameters that are
            numbers, settings, state (``load_state_dict``) or the training mode of a module that the
            closure names have changed. Call ``graphed`` again after such a change.

    Example:
        >>> model, inputs, labels = model.cuda(), inputs.cuda(), labels.cuda()
        >>> optimizer = fastsam.SAM(model.parameters(), torch.optim.SGD, lr=0.1)
        >>> step = fastsam.graphed(optimizer, closure)
        >>> for _ in range(5):
        ...     loss = step()  # from the fourth call on a replay
    """
    if isinstance(optimizer, LETS):
        raise refuse("LETS", "it counts its steps on the host")
    if not isinstance(optimizer, SharpnessAwareOptimizer):
        raise TypeError(f"optimizer must be one of fastsam's, got {type(optimizer).__name__}")
    name = type(optimizer).__name__
    check_closure(f"graphed {name}", closure)
    Integer(2)("warmup", warmup)
    params = [param for group in optimizer.param_groups for param in group["params"]]
    if any(map(is_sharded, params)):
        raise refuse(name, "its parameters are sharded over processes")
    devices = {param.device for param in params if param.requires_grad}
    if len(devices) > 1:
        raise refuse(name, "its parameters lie on several devices")
    _check_host(optimizer)
    device = next(iter(devices), torch.device("cpu"))
    return GraphedStep(optimizer, closure, warmup, Recorder(name, device))


def _check_host(optimizer: SharpnessAwareOptimizer) -> None:
    """What the host has to do in every step.

    Raises:
        RuntimeError: If there is something.
    """
    name = type(optimizer).__name__
    check_decisions(name, optimizer._spec(InFlight(True)))
    if optimizer.repeat_random:
        raise refuse(name, "repeat_random sets generators on the host")
    if has_loss_scale(optimizer):
        raise refuse(name, "graphed does not support a loss scale (grad_scale and found_inf)")
    if has_hooks(optimizer):
        raise refuse(name, "it has step hooks, and a replay runs no Python")


class Recorder:
    """Warm-up and capture on a stream of their own.

    Args:
        name: The optimizer's.
        device: Where its parameters are.

    Raises:
        RuntimeError: If that is no GPU.
    """

    def __init__(self, name: str, device: torch.device) -> None:
        if device.type != "cuda":
            raise RuntimeError(
                f"graphed needs a GPU to capture on: the parameters of {name} are on {device}"
            )
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Run what is inside on the other stream, after what is due here and before what comes."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            current.wait_stream(self._stream)

    def record(self, take: Callable[[], None]) -> Callable[[], None]:
        """Capture what ``take`` launches; what is returned runs it."""
        graph = torch.cuda.CUDAGraph()
        current = torch.cuda.current_stream(self._device)
        failure: BaseException | None = None
        try:
            # Only calls of this thread may end the capture: others load data meanwhile, or watch
            # over collectives.
            with torch.cuda.graph(
                graph, stream=self._stream, capture_error_mode="thread_local"
            ):  # fmt: skip
                try:
                    take()
                except BaseException as error:
                    failure = error
                    raise
        except BaseException:
            torch.cuda.set_stream(current)  # torch leaves its own where it cannot end the capture
            if failure is None:
                raise
        if failure is not None:  # and raises what follows from it
            raise failure
        return graph.replay


class GraphedStep:
    """What :func:`graphed` returns.

    Args:
        optimizer, closure, warmup: Its arguments.
        recorder: Of the parameters' device.
    """

    def __init__(
        self,
        optimizer: SharpnessAwareOptimizer,
        closure: Callable[[], Any],
        warmup: int,
        recorder: Recorder,
    ) -> None:
        self._optimizer = optimizer
        optimizer._passes.scratch = False  # a graph holds the parameters' addresses
        self._closure = closure
        self._left = warmup  # steps before the capture
        self._recorder = recorder
        self._replay: Callable[[], None] | None = None
        self._assumptions: Assumptions | None = None
        self._result: Any = None
        self._grads: list[tuple[Tensor, Tensor | None]] = []
        self._spec: Any = None
        self._failure = ""

    @property
    def is_captured(self) -> bool:
        """Whether the next call replays."""
        return self._replay is not None

    @uncompiled
    def __call__(self) -> Any:
        """Take one step; see :func:`graphed`."""
        optimizer = self._optimizer
        optimizer._expect("first_step", "graphed step")
        if self._failure:  # another try would lack what the first one has used up
            raise RuntimeError(f"{self._failure}. After a change, call fastsam.graphed again")
        if self._left:
            _check_host(optimizer)
            with self._recorder.aside():
                result = optimizer.step(self._pass)
            self._left -= 1
            return result
        if self._assumptions is None:
            _check_host(optimizer)
            self._capture()
            steps = 0  # the capture has counted it
        else:
            self._assumptions.check(optimizer)
            steps = 1
        assert self._replay is not None
        with uninterrupted():
            self._replay()
            optimizer.kept["t"] += steps
            optimizer._last = self._spec
            for param, grad in self._grads:
                if param.grad is not grad:
                    param.grad = grad
        forget_weights()
        run_observers(optimizer)
        return self._result

    def _pass(self) -> Any:
        """The closure, in one of a step's passes."""
        result = self._closure()
        if not is_served(result):
            raise RuntimeError(
                "closure must return tensors for a graphed step, alone or in tuples, lists and "
                f"dicts, got {type(result).__name__}: other results would not change in a replay"
            )
        return detached(result)

    def _capture(self) -> None:
        """Capture a step, which is counted and not run.

        Raises:
            RuntimeError: If that fails; everything is as before then.
        """
        optimizer = self._optimizer
        name = type(optimizer).__name__
        assumptions = Assumptions(optimizer, modules_of(self._closure))
        params = [param for group in optimizer.param_groups for param in group["params"]]
        grads = [param.grad for param in params]

        def take() -> None:
            self._result = optimizer.step(self._pass)

        try:
            replay = self._recorder.record(take)
            if change := assumptions.changed(optimizer):
                raise refuse(name, f"{change[0]} on the host during the step")
        except BaseException as error:
            with uninterrupted(insists=True):
                self._result = None
                optimizer._passes.forget()
                assumptions.put_back(optimizer)
                for param, grad in zip(params, grads, strict=True):
                    param.grad = grad
            refused = "captured" in str(error)
            why = error if refused else refuse(name, f"{type(error).__name__}: {error}")
            self._failure = str(why).rstrip(".")
            if isinstance(error, torch.OutOfMemoryError) or not isinstance(error, Exception):
                raise
            raise why from (None if refused else error)
        self._spec = optimizer._last
        self._grads = [(param, param.grad) for param in params]
        self._assumptions, self._replay = assumptions, replay


def modules_of(function: Any) -> list[nn.Module]:
    """The modules that a closure refers to by a name of its own, and those inside them."""
    found: list[Any] = []
    while isinstance(function, functools.partial):
        found += [*function.args, *function.keywords.values()]
        function = function.func
    found += [function, getattr(function, "__self__", None)]
    function = getattr(function, "__func__", function)
    if inspect.isfunction(function):
        try:
            names = inspect.getclosurevars(function)
        except ValueError:  # a variable without a value yet
            names = inspect.ClosureVars({}, {}, {}, set())
        found += [*names.nonlocals.values(), *names.globals.values()]
    roots = [x for x in found if isinstance(x, nn.Module)]
    return list(dict.fromkeys(module for root in roots for module in root.modules()))
