"""The class behind every method: its parts, and the order of the passes of a step."""

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from itertools import chain
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from torch.optim.optimizer import Optimizer, ParamsT

from fastsam.kernels.layout import Scalar

from . import backends
from .agreement import Agreement
from .bases import find_base
from .bases.several import (
    Several,
    bases_of,
    check_together,
    complete,
    make_base,
    members_of,
    named_classes,
)
from .micro_batches import GradientMean, check_closures
from .passes import Passes
from .randomness import RepeatedRandom
from .replicas import is_distributed, replicas_of
from .step import hooks
from .step.arguments import (
    FLAG,
    OF_STATE,
    Choice,
    GroupArguments,
    Integer,
    Number,
    context,
    setting,
)
from .step.batch import Batch
from .step.caches import forget_parametrizations, forget_weights
from .step.checkpoint import Loading, SharedState, parts_of, read_kept, set_parts, write_kept
from .step.checks import (
    asks_for_state,
    check_ascent_steps,
    check_base,
    check_closure,
    check_keys,
    check_partitioned,
    check_perturb,
    check_states,
    check_stop,
    entered,
)
from .step.dtypes import Dtypes
from .step.first_look import FirstLook
from .step.flight import InFlight
from .step.gradients import zeroes_as_torch
from .step.guards import (
    NO_GRADIENTS,
    UNKNOWN_CONTEXT,
    Warnings,
    check_reduced,
    check_replicas,
    warn_of_stale_gradients,
)
from .step.interrupts import uninterrupted
from .step.loading import LEAST, Receiver, method_name, write_marks
from .step.precision import MASTER, ROUNDINGS, check_precision
from .step.recording import Recording
from .step.scalars import DeviceScalars
from .step.scaling import LossScale, check_same_scaler, check_scaler, find_scale
from .step.segments import check_norm
from .step.spec import Ascent, Base, Descent, StepSpec, is_perturbed, share_of
from .step.takeover import TakenOver, take_over, takes_base
from .unified import UNIFIED

if TYPE_CHECKING:
    from typing_extensions import Self

Function = TypeVar("Function", bound=Callable[..., Any])
#: Gives a context manager, for one pass.
Context = Callable[[], AbstractContextManager[Any]]


def uncompiled(function: Function) -> Function:
    """Make the function a graph break inside ``torch.compile``; what it calls is not traced.

    torch's own optimizers use the first of these, which imports the compiler when it is needed.
    """
    disable = getattr(torch, "_disable_dynamo", torch.compiler.disable)
    return cast(Function, disable(function))


def _check_ascents(optimizer: "SharpnessAwareOptimizer", ascent_steps: int) -> None:
    rounds = {
        "master_weights": optimizer.master_weights,
        "rounding='stochastic'": optimizer.rounding == "stochastic",
    }
    check_ascent_steps(
        ascent_steps, type(optimizer).__name__, optimizer.ascent, optimizer.descent, rounds
    )


def _check_served(optimizer: "SharpnessAwareOptimizer", backend: str) -> None:
    params = chain.from_iterable(group["params"] for group in optimizer.param_groups)
    first = next(params, None)
    backends.resolve(backend, torch.device("cpu") if first is None else first.device)


class SharpnessAwareOptimizer(SharedState):
    r"""Base class of fastsam's optimizers; use one of its subclasses, or write one.

    A step is two passes. The first gradient ``g`` decides the perturbation: ``w <- w + e``. The
    second, ``g~``, is taken there; then the weights are restored bit for bit and the base
    optimizer takes its step with it. Either give :meth:`step` a closure, or alternate
    :meth:`first_step` and :meth:`second_step`. Between the two passes ``model.state_dict()``
    holds perturbed weights; ``state_dict()`` of the optimizer is allowed there and complete.

    Where the second gradient of a parameter is missing it is only restored; where its first is
    missing it is updated but not perturbed. A first gradient whose norm is not finite perturbs
    nothing (in LightSAM II and III, which take no norm, that goes for single elements). What a step
    adds to the state becomes the state when the step is complete.

    In the equations of the subclasses :math:`g` is the gradient at :math:`w`, :math:`\tilde g` the
    one at :math:`w + e`, and :math:`\|\cdot\|` the norm over every element of every group. A step
    costs two forward and backward passes, one copy of the weights between them, and the bytes that
    a class gives for itself. In groups with ``maximize`` both count as gradients of the negative
    objective, which is minimised: the perturbation goes to where the objective is lower.

    Attributes:
        ascent: The rule of the perturbation; a subclass sets its own.
        descent: The rule of ``u``; None is the second gradient. The same.
        base_optimizer: An instance of the base. ``state`` and ``param_groups`` are its own: whoever
            loads into it or assigns to them changes both.
        kept: The optimizer's own numbers: ``t``, which counts steps from 1, and what norms and
            rules accumulate. A state dict has them in every group, as ``fastsam_t`` and so on.
    """

    ascent: Ascent = UNIFIED
    descent: Descent | None = None

    #: What ``_start`` makes: it lives only as long as this process, and nothing of it is saved.
    _TRANSIENT = ("_owner", "_several", "_passes", "_flight", "_last", "_warnings", "_first_look",
                  "_loading",
                  "_replicas", "_agreement", "_inside_step", "_inside_closure", "_mode", "_random",
                  "_unperturbed", "_arguments", "_dtypes")  # fmt: skip

    renormalize: bool = setting(FLAG)
    max_grad_norm: float | None = setting(
        Number(with_low=False, with_high=True, tensors=None, optional=True)
    )
    skip_nonfinite: bool = setting(FLAG)
    perturb_every: int = setting(Integer(1))
    start: int = setting(Integer(0))
    stop: int | None = setting(Integer(1, optional=True))
    master_weights: bool = setting(FLAG, fixed=OF_STATE)
    rounding: str = setting(Choice(ROUNDINGS), fixed=OF_STATE)
    seed: int = setting(Integer(0, 2**32))
    ascent_steps: int = setting(Integer(1), then=_check_ascents)
    ascent_context: Context | None = setting(context)
    descent_context: Context | None = setting(context)
    repeat_random: bool = setting(FLAG)
    set_to_none: bool = setting(FLAG)
    backend: str = setting(Choice(backends.NAMES), then=_check_served)

    def __init__(
        self,
        params: ParamsT,
        base_optimizer: type[Optimizer],
        *,
        rho: float | Tensor,
        adaptive: bool = False,
        eta: float = 0.0,
        renormalize: bool = False,
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = False,
        norm: str = "global",
        perturb_every: int = 1,
        start: int = 0,
        stop: int | None = None,
        master_weights: bool = False,
        rounding: str = "nearest",
        seed: int = 0,
        repeat_random: bool = False,
        ascent_steps: int = 1,
        ascent_context: Context | None = None,
        descent_context: Context | None = None,
        set_to_none: bool = True,
        backend: str = "auto",
        own: Mapping[str, Any] | None = None,
        **base_kwargs: Any,
    ):
        """``own`` holds a subclass's further group keys and their defaults."""
        taken = base_optimizer if isinstance(base_optimizer, TakenOver) else None
        cls = base_optimizer if taken is None else type(taken.optimizer)
        check = partial(check_base, not_below=SharpnessAwareOptimizer)
        check(cls)
        classes = {cls.__name__: cls}
        if taken is None:
            params, classes = named_classes(params, cls, check)
        check_norm(norm, self.ascent)
        self._norm = norm
        self.renormalize = renormalize
        self.max_grad_norm = max_grad_norm
        self.skip_nonfinite = skip_nonfinite
        self.perturb_every, self.start, self.stop = perturb_every, start, stop
        self.master_weights = master_weights
        self.rounding, self.seed = rounding, seed
        self.repeat_random = repeat_random
        self.ascent_steps = ascent_steps
        self.ascent_context, self.descent_context = ascent_context, descent_context
        self.set_to_none = set_to_none
        check_stop(self.start, self.stop)
        has_own = not takes_base(type(self))
        check_together(type(self).__name__, has_own, classes, self.master_weights)
        first = find_base(cls)
        self._base = first if len(classes) == 1 else None
        fused = first is not None or len(classes) > 1
        check_precision(self.master_weights, self.rounding, fused)
        own = {"rho": rho, "adaptive": adaptive, "eta": eta, "perturb": True, **(own or {})}
        self._make_checks()
        given = own | base_kwargs
        self._arguments.check(given, first, complete=False)
        own, base_kwargs = ({key: given[key] for key in keys} for keys in (own, base_kwargs))
        self._owner = SimpleNamespace()  # until the base is there
        super().__init__(params, own)
        # The base validates its own arguments and completes the groups, which are its own then.
        # A fused base is never stepped; its mathematics runs in the update pass.
        self.base_optimizer = make_base(base_optimizer, classes, self.param_groups, base_kwargs)
        for member in members_of(self.base_optimizer):
            check_keys(member, tuple(own))
        self._own_base(self.base_optimizer)
        self.defaults.update(self.base_optimizer.defaults)
        self._check_groups()  # now that they are complete
        for group in self.param_groups:
            if (base := self._base_of(group)) is None:
                continue
            # Adagrad's begins here; ours where it is needed, all at once
            for param in group["params"] if taken is None else ():
                self.state.pop(param, None)
            check_states(base, self.ascent, (MASTER,), [group])
        self.kept: dict[str, Any] = {"t": 1}
        self._slots = self._find_slots()
        if taken is not None:  # it may have loaded a state dict of ours
            read_kept(taken.groups, self.kept)
            self.kept |= getattr(self.base_optimizer, "kept", {})
        self._write_own(self.param_groups)
        self._start()
        self.backend = backend

    @classmethod
    def from_optimizer(cls, optimizer: Optimizer, *args: Any, **kwargs: Any) -> "Self":
        """Make one of an optimizer that exists, as a factory gives it or a resumed run has it.

        ``SAM.from_optimizer(optimizer, rho=0.05)`` steps with that optimizer's groups, with all
        their keys, and goes on with its state. Nothing is copied: the optimizer becomes
        ``base_optimizer``. LR schedulers and hooks that it has keep working; its own ``step``
        raises from then on. It is fused where its class is.

        Args:
            optimizer: An instance of a ``torch.optim.Optimizer``. Keys of its groups count before
                arguments: a group that has a ``rho`` keeps it.
            *args: Of the constructor, after ``base_optimizer``.
            **kwargs: The constructor's, but for the base optimizer's own.

        Raises:
            TypeError: For an argument of the base optimizer's; if ``optimizer`` is something else
                or one of fastsam's; for classes with an update of their own (``AdaSAM``,
                ``LightSAM``).
            ValueError: If ``optimizer`` is the base of another of fastsam's already. The others
                are the constructor's. The optimizer is as it was then.
        """
        return take_over(cls, optimizer, args, kwargs)

    def _find_slots(self) -> dict[str, Scalar]:
        """Begin the optimizer's own numbers that live on the device; their slots, by name."""
        slots: dict[str, Scalar] = {}
        group = self.param_groups[0] if self.param_groups else {}
        if self._base is not None and self._base.accumulator is not None:
            slots["squared_norms"] = Scalar.SQUARED_NORMS
            self.kept["squared_norms"] = self._base.accumulator(group)
            self.kept |= getattr(self.base_optimizer, "kept", {})  # where it was told to start
        if self.ascent.accumulator is not None:
            slots["ascent_squared_norms"] = Scalar.ACCUMULATED
            self.kept["ascent_squared_norms"] = self.ascent.accumulator(group)
        if self.descent is not None:
            names = zip(self.descent.scalars, (Scalar.DESCENT0, Scalar.DESCENT1), strict=False)
            slots |= dict(names)
            self.kept |= self.descent.scalars
        if self.rounding == "stochastic":
            slots["rounding_step"] = Scalar.ROUNDING_STEP
            self.kept["rounding_step"] = 0.0
        return slots

    def _make_checks(self, warned: Iterable[Tensor] = ()) -> None:
        """Make what looks at groups and at dtypes; of ``warned`` the user knows the latter."""
        self._arguments = GroupArguments(self.ascent, self.descent)
        self._dtypes = Dtypes(self.rounding, self.master_weights, warned)

    def _start(self) -> None:
        """Make the parts that live only as long as this process."""
        self._own_base(self.base_optimizer)
        if isinstance(getattr(self._owner, "kept", None), dict):  # it keeps numbers of its own
            self._owner.kept = self.kept
        scalars = DeviceScalars(self.kept, self._slots)
        self._passes = Passes(type(self).__name__, scalars, self._dtypes)
        self._flight: InFlight | None = None  # None between two steps
        self._last: StepSpec | None = None  # of the present step, or the last
        self._warnings, self._first_look = Warnings(), FirstLook()
        self._random = RepeatedRandom(type(self).__name__)
        self._agreement = Agreement()
        self._inside_step = self._inside_closure = False
        self._unperturbed = 0  # blocks of ``unperturbed`` that are open
        self._mode = ""  # that ``train`` or ``eval`` has set last
        self._replicas: Any = None  # that ``step`` found for the pass that comes
        this = weakref.ref(self)  # no cycle, so that an optimizer is gone when it is dropped
        self._loading = Loading(self.kept, lambda: _receiver(this()), self._passes.collector.forget)
        self._loading.stay(self.base_optimizer)
        # who saves the base's state dict finds the present counts in it, too
        self.base_optimizer.register_state_dict_pre_hook(lambda _: _write_own(this()))

    def _own_base(self, base: Optimizer) -> None:
        self._owner = base
        self._several = base if isinstance(base, Several) else None

    def _base_of(self, group: Mapping[str, Any]) -> Base | None:
        """The fused base of a group."""
        return self._base if self._several is None else self._several.base_of(group)

    # --- steps by closure ---

    @uncompiled
    @torch.no_grad()
    def step(
        self,
        closure: Callable[[], Any] | None = None,
        *,
        grad_scaler: GradScaler | None = None,
    ) -> Any:
        """Take one step: sharpness-aware, or the base's where ``perturb_every`` says so.

        Args:
            closure: Computes the loss, calls ``backward`` and returns the loss (the contract of
                ``torch.optim.LBFGS``). It may run several micro-batches, if it runs the same in
                both calls. It is called twice; once in a step of the base, and where every ``rho``
                is 0, unless the first pass has state to keep. Gradients are zeroed before each
                call, as ``set_to_none`` says. With ``ascent_steps`` it is called once more for each
                above 1. One that leaves no gradient is warned of, once.
            grad_scaler: A ``torch.amp.GradScaler`` with which the closure scales the loss that it
                calls ``backward`` on. A gradient that is not finite in either pass restores the
                weights and skips the step; ``grad_scaler.update()`` is to be called after it, and
                ``grad_scaler.step`` and ``unscale_`` are not.

        Returns:
            What the first call returned: the loss at ``w``.

        Raises:
            RuntimeError: Without a closure; between ``first_step`` and ``second_step``; inside a
                closure; for gradients that are sparse or complex. An exception in the closure
                leaves weights and state as they were before the step, and propagates.
            TypeError: If an argument is something else.
        """
        if closure is None and self.creates_state_only:
            self.create_state()
            return None
        check_closure(type(self).__name__, closure)
        self._expect("first_step", "step")
        self._check_groups()
        self._check_ranks()
        self._inside_step = True
        try:
            perturbs = self._needs_two_passes
            # a gradient that the base takes as it is has to be synchronised, for one
            repeats = self.repeat_random and perturbs
            context = self.ascent_context if perturbs else None
            if self._last is None:
                self._first_look.before(self.param_groups)
            loss = self._call(closure, context, repeats)
            self._first_look.after(self._warnings, whole=context is None)
            if not perturbs:
                self.plain_step(grad_scaler=grad_scaler)
                return loss
            self.first_step(zero_grad=True, grad_scaler=grad_scaler)
            self._ascend_on(closure, repeats, grad_scaler)
            self._call(closure, self.descent_context, repeats)
            self._first_look.after(self._warnings)
            self.second_step(grad_scaler=grad_scaler)
        except BaseException as error:
            try:
                self.restore()
            finally:  # handlers of further signals may have kept it from beginning
                try:
                    self.restore()
                finally:
                    self.restore()
            self._agreement.note(self, error)
            raise
        finally:
            self._inside_step = False
        return loss

    @uncompiled
    @torch.no_grad()
    def step_micro_batches(
        self, closures: Iterable[Callable[[], Any]], *, grad_scaler: GradScaler | None = None
    ) -> list[Any]:
        r"""Take one step in which every micro-batch has a perturbation of its own.

        .. math:: u = \frac1m \sum_{i=1}^m \nabla L_i(w + e_i)

        with :math:`e_i` along :math:`\nabla L_i(w)`: m-sharpness, with the memory of one more
        gradient. In :meth:`step` a closure that runs all micro-batches perturbs along their sum.
        Where the step is the base's (``perturb_every``, ``start``, ``stop``) :math:`e_i = 0`.

        Args:
            closures: One for each micro-batch, at least one. Each computes the loss of its own,
                not divided by their number, calls ``backward`` and returns the loss; each is
                called twice, or once in a step of the base. ``.grad`` is :math:`u` afterwards.
            grad_scaler: The scaler of the losses that the closures call ``backward`` on, as in
                :meth:`step`: a gradient that is not finite in any pass of any micro-batch skips the
                whole step, and ``.grad`` is :math:`u` times the scale.

        Returns:
            What the first calls returned.

        Raises:
            RuntimeError: For methods whose steps are more than a perturbation and the base's
                update: with ``renormalize``, a descent rule (SAMAR), and those with state in the
                ascent. An exception in a closure leaves weights and state as they were before the
                step.
            TypeError, ValueError: If ``closures`` are not callable, or there is none; if
                ``grad_scaler`` is something else.
        """
        name = type(self).__name__
        if self.renormalize or self.descent is not None or not self._is_memoryless:
            raise RuntimeError(f"{name} does not serve perturbations by micro-batch")
        closures = check_closures(closures, lambda closure: check_closure(name, closure))
        self._expect("first_step", "step_micro_batches")
        scaler = check_scaler(grad_scaler, self)
        self._check_groups()
        self._check_ranks()
        hooks.run_own(self, "pre")
        perturbs = self._needs_two_passes
        repeats = self.repeat_random and perturbs
        self._inside_step = True
        losses: list[Any] = []
        mean = GradientMean(self.param_groups, len(closures))
        scale: LossScale | None = None
        try:
            for closure in closures:
                context = self.ascent_context if perturbs else None
                losses.append(self._call(closure, context, repeats))
                scale = scale or find_scale(self, scaler)
                if perturbs:
                    self.first_step(zero_grad=True, grad_scaler=scaler)
                    self._ascend_on(closure, repeats, scaler)
                    if scale is not None and self._passes.scalars.vector is not None:
                        scale.keep_first(self._passes.scalars.vector)
                    self._call(closure, self.descent_context, repeats)
                    assert self._flight is not None
                    spec = self._spec(self._flight)
                    check_reduced(  # by no name, which would keep the gradients
                        self._passes.collect_second(spec, self.state),
                        self._flight,
                        self.param_groups,
                    )
                mean.add(None if scale is None else scale.keep_last())
                self.restore()
            self._zero_gradients()
            mean.leave()
            self._plain(scale)
            if perturbs:  # the gradients were those of perturbed weights
                self._last = self._spec(InFlight(True, scale=scale))
        except BaseException as error:
            try:
                self.restore()
            finally:  # the same
                try:
                    self.restore()
                finally:
                    self.restore()
            self._agreement.note(self, error)
            raise
        finally:
            self._inside_step = False
        hooks.run_own(self, "post")
        return losses

    @property
    def perturbs_next(self) -> bool:
        """Whether ``perturb_every``, ``start`` and ``stop`` make the next step sharpness-aware."""
        if not self._has_schedule:
            return True
        since = self.kept["t"] - 1 - self.start
        ended = self.stop is not None and since >= self.stop - self.start
        return since >= 0 and not ended and bool(since % self.perturb_every == 0)

    @property
    def between_passes(self) -> bool:
        """Whether ``second_step`` is due: the model holds perturbed weights."""
        return self._flight is not None

    @property
    def ascents_left(self) -> int:
        """How many calls of ``first_step`` are due before ``second_step``: at first, all.

        That is ``ascent_steps``, which is 1 unless it was given.
        """
        return self.ascent_steps if self._flight is None else self._flight.ascents_left

    @contextmanager
    def unperturbed(self) -> Iterator[None]:
        """Have the weights ``w`` in the model inside the block, between the passes of a step.

        For whoever saves or evaluates in the middle of a step, as in the second call of a closure.
        At the end of the block, also where an exception ends it, the perturbed weights are there
        again, bit for bit, and what was written to weights inside is gone. At other times the
        block does nothing. Blocks nest.

        Put neither a backward pass inside, which would add to the gradients, nor the block between
        a forward pass and its backward pass, which autograd refuses. ``between_passes`` stays as it
        is. :meth:`restore` undoes the step here, too; the block then ends with ``w``.

        Cost: one more copy of the weights for as long as it lasts, and two copies back and forth.
        The device is not waited for.

        Raises:
            RuntimeError: By ``step``, ``first_step`` and the others, if they are called inside.
        """
        flight = self._flight
        swaps = flight is not None and self._unperturbed == 0
        self._unperturbed += 1
        try:
            if flight is not None and swaps:
                with uninterrupted(), torch.no_grad():
                    flight.suspend()
            yield
        finally:
            with uninterrupted(insists=True), torch.no_grad():
                self._unperturbed -= 1
                if flight is not None and swaps and self._flight is flight:
                    flight.resume()

    def repeated_random(self) -> AbstractContextManager[None]:
        """Equal random numbers in all passes of a step, for loops that call ``backward``.

        To be put around forward and backward of each pass, all its micro-batches together::

            with optimizer.repeated_random():
                loss_fn(model(x), y).backward()
            optimizer.first_step(zero_grad=True)
            with optimizer.repeated_random():
                loss_fn(model(x), y).backward()
            optimizer.second_step(zero_grad=True)

        In the first pass it notes where the generators stand. In the others it sets them there, and
        at its end, also where an exception ends it, to where they stood before. Which generators,
        and what else there is to know, is said at ``repeat_random`` of ``SAM``, which does
        this in ``step``.

        Raises:
            RuntimeError: On entry, if it was not around the first pass of this step, or has been
                around this pass already; under capture in a CUDA graph.
        """
        return self._repeated("repeated_random()")

    # --- explicit passes ---

    @uncompiled
    @torch.no_grad()
    def first_step(self, zero_grad: bool = False, *, grad_scaler: GradScaler | None = None) -> None:
        """Perturb the weights along the present gradients: ``w <- w + e``.

        With ``ascent_steps`` it is called so many times, with new gradients each time;
        ``ascents_left`` says how often still.

        Args:
            zero_grad: Zero the gradients afterwards.
            grad_scaler: The scaler of the loss that they, and those of the second pass, are of.

        Raises:
            RuntimeError: If ``second_step`` is due; if a gradient is sparse or complex, or the
                parameters lie on several types of device. Nothing has changed then.
            ValueError: If a group's hyper-parameter has been set out of range.
            TypeError: If ``grad_scaler`` is something else, or not given by its name.
        """
        self._expect("first_step")
        scaler = check_scaler(grad_scaler, self, zero_grad)
        if self._flight is not None:  # one of several
            check_same_scaler(self._flight.scale, grad_scaler, self, zero_grad)
            warn_of_stale_gradients(self._flight, self._warnings, "first_step")
        elif not self._inside_step:  # which has done both
            hooks.run_own(self, "pre")
            self._check_groups()
            self._check_ranks()
        flight = self._flight or self._begin(True, find_scale(self, scaler))
        spec = self._last = self._spec(flight)
        try:
            with uninterrupted():  # nothing may come between perturbing and remembering it
                batch = self._passes.first(
                    spec, flight, self.state, self.backend, zero_grad and self._sets_to_none
                )
                self._flight = flight
            if flight.replicas is not None and not flight.ascents_left:
                self._passes.agree(spec, flight)
            if not batch.params and self._inside_step:
                self._warnings.once("no gradients", NO_GRADIENTS)
            if zero_grad:
                self._zero_gradients()
            elif not self._inside_step and "stale gradients" not in self._warnings.given:
                flight.note_gradients(batch)
        except BaseException:
            self.restore()
            raise

    @uncompiled
    @torch.no_grad()
    def second_step(
        self, zero_grad: bool = False, *, grad_scaler: GradScaler | None = None
    ) -> None:
        """Restore the weights and update them with the gradients taken at ``w + e``.

        Warns once where there are no gradients, or they are still those of the first pass, or were
        added to them.

        Args:
            zero_grad: Zero the gradients afterwards.
            grad_scaler: The same, or None, as in :meth:`first_step`. ``grad_scaler.update()`` is to
                be called after this. A gradient that is not finite in either pass skips the step.

        Raises:
            RuntimeError: If ``first_step`` is due; if a gradient is sparse or complex; if
                ``grad_scaler`` is another than in the first pass. The weights have been restored
                then, and the step is over without an update.
        """
        self._expect("second_step")
        flight = self._flight
        assert flight is not None
        try:
            check_same_scaler(flight.scale, grad_scaler, self, zero_grad)
            warn_of_stale_gradients(flight, self._warnings)
            self._run_base_hooks("pre")
            spec = self._last = self._spec(flight)
            batch = self._passes.collect_second(spec, self.state)
            if flight.backup is not None and not batch.params:
                self._warnings.once(
                    "no second gradients",
                    "the second pass left no gradients: backward has to be called on the loss at "
                    "the perturbed weights as well; the step changes nothing",
                )
            check_reduced(batch, flight, self.param_groups)
            self._finish(batch, spec, flight)
        except BaseException:
            self.restore()
            raise
        self._after_step(zero_grad)

    @uncompiled
    @torch.no_grad()
    def plain_step(self, zero_grad: bool = False, *, grad_scaler: GradScaler | None = None) -> None:
        """The base optimizer's step with the present gradients: one pass, nothing perturbed.

        For loops that take turns between the two kinds of step; ``perturbs_next`` says which is
        due by ``perturb_every``, ``start`` and ``stop``.

        Args:
            zero_grad: Zero the gradients afterwards.
            grad_scaler: As in :meth:`second_step`.

        Raises:
            RuntimeError: If ``second_step`` is due; if a gradient is sparse or complex.
            ValueError: If a group's hyper-parameter has been set out of range.
        """
        self._expect("first_step", "plain_step")
        scaler = check_scaler(grad_scaler, self, zero_grad)
        if not self._inside_step:  # which has done both
            hooks.run_own(self, "pre")
            self._check_groups()
            self._check_ranks()
        self._plain(find_scale(self, scaler))
        self._after_step(zero_grad)

    def restore(self) -> None:
        """Undo ``first_step``: for a loop whose second pass failed. Does nothing otherwise."""
        with uninterrupted(insists=True), torch.no_grad():
            flight, self._flight = self._flight, None
            self._inside_closure = False
            if flight is not None:
                flight.undo()
            else:
                forget_weights()

    # --- modes ---

    def train(self) -> None:
        """Let the base show the weights to train, where it has two kinds (schedule-free ones do).

        Other bases are left alone. In a step that is under way a loop may call it once more, as
        Hugging Face's does before every pass.

        Raises:
            RuntimeError: If it changes the mode between ``first_step`` and ``second_step`` or
                inside a closure.
        """
        self._set_mode("train")

    def eval(self) -> None:
        """Let the base show the weights to evaluate and save; the other side of ``train``.

        Raises:
            RuntimeError: Between ``first_step`` and ``second_step`` or inside a closure.
        """
        self._set_mode("eval")

    def _set_mode(self, mode: str) -> None:
        change = getattr(self.base_optimizer, mode, None)
        if mode == "train" and (change is None or self._mode == mode):
            if self._flight is not None or self._inside_closure:
                return  # nothing would change
        self._expect("first_step", mode)
        if change is not None:
            change()
        self._mode = mode

    # --- parts of a step ---

    def _begin(self, perturbs: bool, scale: LossScale | None) -> InFlight:
        """Decide on the host what the step will be."""
        replicas = self._find_replicas() if perturbs else None
        if replicas is not None:
            name = type(self).__name__
            check_replicas(name, self.descent, self.renormalize, self.param_groups)
        flight = InFlight(
            perturbs, self._next_lam(), self.ascent_steps, scale=scale, replicas=replicas
        )
        if perturbs and replicas is None and self.ascent_context is not None:
            # replicas would drift apart if this context is one that keeps gradients apart
            matters = self.renormalize or self.descent is not None or flight.scale is not None
            if matters and is_distributed():
                self._warnings.once("unknown context", UNKNOWN_CONTEXT)
        return flight

    def _plain(self, scale: LossScale | None) -> None:
        """A step of the base alone."""
        self._run_base_hooks("pre")
        flight = self._begin(False, scale)
        spec = self._last = self._spec(flight)
        try:
            batch = self._passes.collect_second(spec, self.state)
            if not batch.params and self._inside_step:
                self._warnings.once("no gradients", NO_GRADIENTS)
            self._finish(batch, spec, flight)
        except BaseException:
            self.restore()
            raise

    def _finish(self, batch: Batch, spec: StepSpec, flight: InFlight) -> None:
        """The second half of a step, or all of a plain one."""
        with uninterrupted():
            self._passes.second(batch, spec, flight, self.state, self.backend, self.base_optimizer)
            self._flight = None
            self._inside_closure = False
            self.kept["t"] += 1
        # what LR schedulers look at, to warn where no step came first
        self._opt_called = self.base_optimizer._opt_called = True  # type: ignore[attr-defined]
        self._run_base_hooks("post")

    def _next_lam(self) -> float:
        """Unified SAM's weight of normalisation in the step that begins; 1 is SAM."""
        return 1.0

    @property
    def _is_static(self) -> bool:
        """Whether the host decides nothing anew in every step."""
        return not self._has_schedule

    @property
    def _has_schedule(self) -> bool:
        return (self.perturb_every, self.start, self.stop) != (1, 0, None)

    @property
    def _is_memoryless(self) -> bool:
        """Whether the ascent keeps nothing from step to step."""
        states = any(self.ascent.states(group) for group in self.param_groups)
        return not states and self.ascent.accumulate is None

    @property
    def _needs_two_passes(self) -> bool:
        if self._has_schedule and not self.perturbs_next:
            return False
        perturbed = [group for group in self.param_groups if is_perturbed(group)]
        for group in perturbed:
            if isinstance(group["rho"], Tensor) or group["rho"] != 0:
                return True
        return bool(perturbed) and not self._is_memoryless

    def _spec(self, flight: InFlight) -> StepSpec:
        perturbs, is_scaled = flight.perturbs, flight.scale is not None
        recording = self._passes.recording
        return StepSpec(
            groups=self.param_groups,
            ascent=self.ascent,
            base=self._base,
            descent=self.descent if perturbs else None,
            perturbs=perturbs,
            lam=flight.lam,
            share=share_of(flight.ascents),
            renormalize=self.renormalize and perturbs,
            max_grad_norm=self.max_grad_norm,
            skip_nonfinite=self.skip_nonfinite or is_scaled,
            skip_first=is_scaled and perturbs,
            is_scaled=is_scaled,
            has_masters=self.master_weights,
            is_static=self._is_static,
            seed=self.seed if self.rounding == "stochastic" else None,
            norm=self._norm,
            keeps_weights=recording is not None and recording.hessian == "diag",
            bases=None if self._several is None else self._several.bases,
        )

    # --- closures and hooks ---

    def _ascend_on(self, closure: Any, repeats: bool, scaler: GradScaler | None) -> None:
        """The further first passes of a step that has several.

        Their gradients perturb, and are taken at perturbed weights: they have both contexts.
        """
        while self.ascents_left:
            self._call(closure, self.ascent_context, repeats, self.descent_context)
            self.first_step(zero_grad=True, grad_scaler=scaler)

    def _repeated(self, call: str) -> AbstractContextManager[None]:
        number = 0 if self._flight is None else self._flight.taken
        return self._random.around(self.param_groups, self.kept["t"], number, call)

    def _call(
        self, closure: Any, context: Context | None, repeats: bool = False,
        inner: Context | None = None,
    ) -> Any:  # fmt: skip
        """What the closure returns, called as one pass, in one context or two.

        ``repeats`` says whether it draws the random numbers of the step's first pass.
        """
        self._zero_gradients()
        forget_parametrizations()
        manager = nullcontext() if context is None else entered(context)
        if context is self.ascent_context:
            self._replicas = None if context is None else replicas_of(manager)
        try:
            self._inside_closure = True
            random = self._repeated("repeat_random") if repeats else nullcontext()
            second = nullcontext() if inner is None else entered(inner)
            with manager, second, random, torch.enable_grad():
                return closure()
        finally:
            self._inside_closure = False

    def _zero_gradients(self) -> None:
        """Zero the gradients as a part of the step."""
        if self.set_to_none:
            self.zero_grad()  # a subclass's may do otherwise, and take no argument
        else:
            self.zero_grad(set_to_none=False)

    @property
    def _sets_to_none(self) -> bool:
        """Whether what zeroes the gradients leaves them to whoever has them otherwise."""
        return self.set_to_none and zeroes_as_torch(self)

    def _find_replicas(self) -> Any:
        """The process group of the replicas whose gradients ``ascent_context`` keeps apart."""
        context = self.ascent_context
        if self._inside_step:
            return self._replicas
        if context is None:
            return None
        found = replicas_of(context)
        if found is None and is_distributed():
            found = replicas_of(entered(context))  # what it gives says more than it
        return found

    def _expect(self, due: str, call: str = "") -> None:
        """Calls come in order.

        Raises:
            RuntimeError: If ``due`` is not what comes next, or inside a closure.
        """
        call = call or due
        if self._inside_closure:
            raise RuntimeError(f"{call} cannot be called from inside a closure given to step")
        if self._unperturbed:
            raise RuntimeError(
                f"{call} cannot be called inside unperturbed(): end that block first"
            )
        left = 0 if self._flight is None else self._flight.ascents_left
        if left and call == "first_step":
            return
        if left:
            raise RuntimeError(
                f"expected first_step, which has to come before another {call}: with ascent_steps "
                f"it comes several times before second_step, {left} more in this step"
            )
        if (due == "second_step") != (self._flight is not None):
            due, undo = "first_step", ""
            if self._flight is not None:
                due, undo = "second_step", "; where what comes between failed, call restore() first"
            raise RuntimeError(
                f"expected {due}, which has to come before another {call}: first_step and "
                f"second_step alternate{undo}"
            )

    def _run_base_hooks(self, when: str) -> None:
        """Run a fused base's around its part of the step; others run their own."""
        if self._base is not None or self._several is not None:
            hooks.run_of_base(self.base_optimizer, when)

    def _after_step(self, zero_grad: bool) -> None:
        if zero_grad:
            self._zero_gradients()
        if not self._inside_step:  # where torch runs them
            hooks.run_own(self, "post")

    # --- groups and checkpoints ---

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group, as in ``torch.optim``; its missing keys take the defaults.

        Raises:
            ValueError: If a hyper-parameter is out of range; nothing has been added then.
            RuntimeError: If DeepSpeed has partitioned a parameter (ZeRO, stage 3); the same.
        """
        if isinstance(param_group, dict):  # else torch says so
            self._arguments.check(dict(param_group), None, complete=False)
            if hasattr(self, "base_optimizer"):
                complete(self.base_optimizer, param_group)
            group = self.defaults | param_group
            self._check_group(group)
            param_group.update([(key, group[key]) for key in param_group])
        with uninterrupted():
            super().add_param_group(param_group)
            try:
                check_partitioned(self.param_groups[-1]["params"])
                self._dtypes.check(self.param_groups[-1]["params"])
            except Exception:  # a warning, too, where the user makes errors of them
                self.param_groups.pop()
                raise
            if hasattr(self, "kept"):
                self._write_own(self.param_groups[-1:])

    def _write_own(self, groups: list[dict[str, Any]]) -> None:
        """What a state dict has beyond the base's: who made it, and the optimizer's own numbers."""
        bases = bases_of(self.base_optimizer, groups)
        write_marks(groups, method_name(type(self)), bases)
        write_kept(groups, self.kept)

    def _check_groups(self) -> None:
        """In a step: what has been set since the last one."""
        if self.stop is not None:
            check_stop(self.start, self.stop)
        if self.renormalize:
            check_perturb(self.param_groups)
        self._arguments.check_again(self.param_groups, self._base_of, self.defaults)

    def _check_ranks(self) -> None:
        if self._agreement.needed:
            self._agreement.check(self)

    def _check_group(self, group: dict[str, Any]) -> None:
        """A group that is new, with the values of tensors; floats and bools replace their like."""
        # the base will complete the first ones
        whole = hasattr(self, "base_optimizer")
        self._arguments.check(group, self._base_of(group) if whole else self._base, whole)
        if self.renormalize:
            check_perturb([group])

    def state_dict(self) -> dict[str, Any]:
        """As in ``torch.optim``, with everything that a resumed run needs."""
        self._write_own(self.param_groups)
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of this class, or of the ``torch.optim`` base on its own.

        State tensors keep the dtype in which they were saved, so that a resumed run goes on
        exactly, but float64 goes with float64 parameters alone and is cast in both directions.
        Group keys that the saved groups lack keep their present values.
        ``base_optimizer.load_state_dict`` does the same.

        Raises:
            RuntimeError: Between ``first_step`` and ``second_step``.
            ValueError: If another method or base made the state dict; if the groups or the shapes
                do not match; if state of a parameter is missing in part, no tensor or of no
                floating dtype; if a count is no whole number, or another number out of range.
                Nothing has changed then.
        """
        with uninterrupted(), self._loading.around(self):
            super().load_state_dict(state_dict)

    @property
    def creates_state_only(self) -> bool:
        """Whether a call of ``step`` without a closure asks for the state that a step creates.

        ``torch.distributed.checkpoint`` does, before any step, with every learning rate 0 and a
        gradient of zeros in every parameter.
        """
        return asks_for_state(self.param_groups, self.state)

    def create_state(self) -> None:
        """Create what a first step would."""
        spec = self._spec(InFlight(False))
        with uninterrupted():
            self._passes.create_state(spec, self.state, self.base_optimizer)

    def __getstate__(self) -> dict[str, Any]:
        if self._flight is not None:
            raise RuntimeError(
                "expected second_step: an optimizer cannot be copied or pickled between passes"
            )
        # hooks stay behind as in torch, and so does the wrapper that an LR scheduler puts on step
        left = (*self._TRANSIENT, "step", "base_optimizer", "_base")
        kept = {k: x for k, x in self.__dict__.items() if k not in left and k[-6:] != "_hooks"}
        return kept | {"_base_parts": parts_of(self.base_optimizer)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        base, parts = state.pop("_base_parts", (None, {}))
        parts = {**parts, **{k: state.pop(k) for k in ("state", "param_groups") if k in state}}
        if base is not None:  # a copy, not load_state_dict
            self.base_optimizer = self._owner = base.__new__(base)
            self._base = find_base(base)
        super().__setstate__(state)
        groups = (self.defaults | group for group in parts.get("param_groups", ()))
        own = {MASTER}.union(*map(self.ascent.states, groups))
        set_parts(self.base_optimizer, parts, own)
        if base is not None:
            self._make_checks(p for group in self.param_groups for p in group["params"])
            self._start()

    # --- what a step measured ---

    @contextmanager
    def recording(self, hessian: str | None) -> Iterator[Recording | None]:
        """For LETS: take in what the step inside the block sees, to measure more afterwards.

        Args:
            hessian: The approximation that it is for; None takes in nothing.
        """
        if hessian is None:
            yield None
            return
        if self.ascent_steps != 1:
            raise RuntimeError(f"LETS needs ascent_steps=1, got {self.ascent_steps}")
        passes, spec = self._passes, self._spec(InFlight(True))
        passes.recording = Recording(
            hessian,
            run=lambda closure: self._call(closure, self.descent_context),
            collect=lambda: passes.collect_other(spec, self.state),
            hypergradient=partial(passes.hypergradient, self.backend),
            clear=self._zero_gradients,
            cleared=self._sets_to_none,
        )
        try:
            yield passes.recording
        finally:
            passes.recording = None

    @property
    def metrics(self) -> Mapping[str, Tensor]:
        """What the last step measured, as 0-dim tensors on the parameters' device.

        ``grad_norm`` is the first gradient's norm (of ``T g`` in adaptive groups), where the step
        needs it, and ``rho`` the first group's radius. ``perturbed_grad_norm``, the second
        gradient's norm, is there where the step needs it; with ``renormalize`` so is
        ``renormalization`` (gamma, and both norms are then of ``T g``), with ``skip_nonfinite``
        so is ``skipped``, the number of steps skipped so far (under a loss scale, too, without
        which all norms are given). ``perturbed`` is 1, or 0 after a step of the base alone, which
        measures nothing of a first pass. Reading a value synchronises with the device; making the
        mapping does not. Empty before the first step.
        """
        scalars = self._passes.scalars
        if scalars.vector is None:
            return {}
        return scalars.measured(self._last or self._spec(InFlight(True)))


def _receiver(optimizer: SharpnessAwareOptimizer | None) -> Receiver | None:
    """What a state dict has to fit to be loaded, if the optimizer is still there."""
    if optimizer is None:
        return None
    if optimizer.between_passes:
        raise RuntimeError("expected second_step: load_state_dict cannot come between passes")
    descent = optimizer.descent
    starts = {} if descent is None else descent.scalars
    return Receiver(
        method=method_name(type(optimizer)),
        groups=optimizer.param_groups,
        bases=bases_of(optimizer.base_optimizer, optimizer.param_groups),
        rules=list(map(optimizer._base_of, optimizer.param_groups)),
        ascent=optimizer.ascent,
        kept=optimizer.kept,
        least={**LEAST, **({} if descent is None else descent.least)},
        unmeasured=[name for name, start in starts.items() if start != start],
        check_group=optimizer._check_group,
    )


def _write_own(optimizer: SharpnessAwareOptimizer | None) -> None:
    if optimizer is not None:
        optimizer._write_own(optimizer.param_groups)
