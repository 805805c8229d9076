"""What an optimizer is made of (settings, a base optimizer, groups), and how that is saved."""

import weakref
from collections.abc import Iterable, Mapping
from itertools import chain
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from fastsam.kernels.layout import Scalar

from . import backends
from .amplified import amplified
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
from .passes import Passes
from .step.arguments import (
    FLAG,
    Choice,
    Context,
    FlagOr,
    FlagOrNumber,
    Integer,
    Number,
    Policy,
    context,
    policy,
    shown,
)
from .step.checkpoint import Loading, SharedState, parts_of, read_kept, set_parts, write_kept
from .step.checks import (
    check_amplify,
    check_ascent_steps,
    check_base,
    check_base_state,
    check_keys,
    check_partitioned,
    check_perturb,
    check_rules,
    check_states,
    check_stop,
)
from .step.dtypes import Dtypes
from .step.flight import InFlight
from .step.group_arguments import GroupArguments
from .step.hooks import Notice
from .step.interrupts import uninterrupted
from .step.makers import method_name, write_marks
from .step.precision import MASTER, ROUNDINGS, check_precision
from .step.receiver import LEAST, Receiver
from .step.rule import Ascent, Base, Descent
from .step.scalars import DeviceScalars
from .step.segments import NORMS, check_norm
from .step.settings import OF_STATE, OF_TABLES, complete_settings, setting
from .step.takeover import TakenOver, put_guard, take_over, takes_base

if TYPE_CHECKING:
    from typing_extensions import Self


def _check_ascents(optimizer: "Configured", ascent_steps: int) -> None:
    check_amplify(optimizer, optimizer.amplify, ascent_steps)
    rounds = {
        "master_weights": optimizer.master_weights,
        "rounding='stochastic'": optimizer.rounding == "stochastic",
    }
    check_ascent_steps(
        ascent_steps, type(optimizer).__name__, optimizer.ascent, optimizer.descent, rounds
    )


def _check_amplify(optimizer: "Configured", amplify: bool | float) -> None:
    check_amplify(optimizer, amplify, vars(optimizer).get("ascent_steps", 1))


def _check_policy(optimizer: "Configured", perturb_when: Policy | None) -> None:
    if perturb_when is not None and vars(optimizer).get("amplify"):
        raise ValueError(
            f"perturb_when must be None with amplify={optimizer.amplify!r}, which counts steps by "
            f"perturb_every; got {shown(perturb_when)}"
        )


def _check_norm(optimizer: "Configured", norm: str) -> None:
    name, lam = type(optimizer).__name__, getattr(optimizer, "lam", None)
    check_norm(norm, name, optimizer.ascent, lam)


def _check_served(optimizer: "Configured", backend: str) -> None:
    params = chain.from_iterable(group["params"] for group in optimizer.param_groups)
    first = next(params, None)
    backends.resolve(backend, torch.device("cpu") if first is None else first.device)


class Configured(SharedState):
    """A sharpness-aware optimizer without its steps: what it was given, and what is saved of it.

    The steps are its subclasses', ``ExplicitPasses`` and ``SharpnessAwareOptimizer``; what there is
    to be known about its attributes is said at the latter.
    """

    ascent: Ascent
    descent: Descent | None

    _TRANSIENT: tuple[str, ...] = (
        "base_optimizer", "_base", "_owner", "_several", "_arguments", "_dtypes", "_passes",
        "_flight", "_loading",
    )  # fmt: skip

    renormalize: bool = setting(FLAG)
    max_grad_norm: float | None = setting(
        Number(with_low=False, with_high=True, tensors=None, optional=True)
    )
    skip_nonfinite: bool = setting(FLAG)
    norm: str = setting(Choice(NORMS), fixed=OF_TABLES, then=_check_norm)
    perturb_every: int = setting(Integer(1))
    start: int = setting(Integer(0))
    stop: int | None = setting(Integer(1, optional=True))
    perturb_when: Policy | None = setting(policy, then=_check_policy)
    amplify: bool | float = setting(
        FlagOrNumber(Number(with_low=False, tensors=None)), then=_check_amplify
    )
    master_weights: bool = setting(FLAG, fixed=OF_STATE)
    rounding: str = setting(Choice(ROUNDINGS), fixed=OF_STATE)
    seed: int = setting(Integer(0, 2**32))
    ascent_steps: int = setting(Integer(1), then=_check_ascents)
    ascent_context: Context | None = setting(context)
    descent_context: Context | None = setting(context)
    repeat_random: bool = setting(FLAG)
    set_to_none: bool = setting(FLAG)
    scratch: bool | str = setting(FlagOr(("auto",)))
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
        perturb_when: Policy | None = None,
        amplify: bool | float = False,
        master_weights: bool = False,
        rounding: str = "nearest",
        seed: int = 0,
        repeat_random: bool = False,
        ascent_steps: int = 1,
        ascent_context: Context | None = None,
        descent_context: Context | None = None,
        set_to_none: bool = True,
        scratch: bool | str = "auto",
        backend: str = "auto",
        own: Mapping[str, Any] | None = None,
        **base_kwargs: Any,
    ):
        """``own`` holds a subclass's further group keys and their defaults."""
        taken = base_optimizer if isinstance(base_optimizer, TakenOver) else None
        cls = base_optimizer if taken is None else type(taken.optimizer)
        check_base(cls)
        classes = {cls.__name__: cls}
        if taken is None:
            params, classes = named_classes(params, cls, check_base)
        self.norm = norm
        self.renormalize = renormalize
        self.max_grad_norm = max_grad_norm
        self.skip_nonfinite = skip_nonfinite
        self.perturb_every, self.start, self.stop = perturb_every, start, stop
        self.perturb_when = perturb_when
        self.amplify = amplify
        self.master_weights = master_weights
        self.rounding, self.seed = rounding, seed
        self.repeat_random = repeat_random
        self.ascent_steps = ascent_steps
        self.ascent_context, self.descent_context = ascent_context, descent_context
        self.set_to_none, self.scratch = set_to_none, scratch
        check_stop(self.start, self.stop)
        check_rules(self.ascent, self.descent)
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
        # the groups again, now that they are complete
        self._arguments.check_again(self.param_groups, self._base_of, self.defaults)
        for group in self.param_groups:
            base = self._base_of(group)
            self._check_base_state(group, base)
            if base is None:
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
        """Put this method around an existing optimizer, as from a factory or a resumed run.

        ``SAM.from_optimizer(optimizer, rho=0.05)`` uses that optimizer's groups, with all their
        keys, and its state. Nothing is copied: the optimizer becomes ``base_optimizer``. Its LR
        schedulers and hooks keep working; its own ``step`` raises an error from then on. It is
        fused if its class is.

        Args:
            optimizer: An instance of a :class:`torch.optim.Optimizer`. Keys of its groups take
                precedence over arguments: a group that has a ``rho`` keeps it.
            *args: Arguments of the constructor after ``base_optimizer``.
            **kwargs: Keyword arguments of the constructor, except those of the base optimizer.

        Raises:
            TypeError: For an argument of the base optimizer's; if ``optimizer`` is something else
                or one of fastsam's; for classes with an update of their own (``AdaSAM``,
                ``LightSAM``).
            ValueError: If ``optimizer`` is the base of another of fastsam's already, or has loaded
                a state dict of another method; otherwise as the constructor. The optimizer has not
                changed then.
        """
        return take_over(cls, optimizer, args, kwargs)

    # --- parts ---

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
            places = Scalar.DESCENT0, Scalar.DESCENT1, Scalar.DESCENT2
            slots |= dict(zip(self.descent.scalars, places, strict=False))
            self.kept |= self.descent.scalars
        if self.rounding == "stochastic" or self.ascent.chooses:
            slots["rounding_step"] = Scalar.ROUNDING_STEP
            self.kept["rounding_step"] = 0.0
        if self.ascent.momentum and not self.ascent.follows_last:
            slots["momentum_squared_norm"] = Scalar.KEPT
            self.kept["momentum_squared_norm"] = 0.0
        if self.ascent.noise:
            slots["noise_step"] = Scalar.NOISE_STEP
            self.kept["noise_step"] = 0.0
        return slots

    def _make_checks(self, warned: Iterable[Tensor] = ()) -> None:
        """Make what looks at groups and at dtypes; of ``warned`` the user knows the latter."""
        self._arguments = GroupArguments(self.ascent, self.descent)
        self._dtypes = Dtypes(self.rounding, self.master_weights, warned)

    def _start(self) -> None:
        """Make the parts that live only as long as this process. Subclasses add theirs."""
        self._own_base(self.base_optimizer)
        if isinstance(getattr(self._owner, "kept", None), dict):  # it keeps numbers of its own
            self._owner.kept = self.kept
        scalars = DeviceScalars(self.kept, self._slots)
        self._passes = Passes(type(self).__name__, scalars, self._dtypes)
        self._flight: InFlight | None = None  # None between two steps
        this = weakref.ref(self)  # no cycle, so that an optimizer is gone when it is dropped

        def receiver() -> Receiver | None:
            one = this()
            return None if one is None else one._receiver()

        def write_own(_: Optimizer) -> None:
            if (one := this()) is not None:
                one._write_own(one.param_groups)

        self._loading = Loading(self.kept, receiver, self._passes.loaded)
        self._loading.stay(self.base_optimizer)
        # a state dict of the base has the present counts in it, too
        self.base_optimizer.register_state_dict_pre_hook(write_own)
        if self.ascent.momentum or self.ascent.keeps:  # norms are known from step to step
            for base in members_of(self.base_optimizer):
                base.register_step_pre_hook(Notice(self._passes.norms.base_steps))

    def _own_base(self, base: Optimizer) -> None:
        self._owner = base
        self._several = base if isinstance(base, Several) else None

    def _base_of(self, group: Mapping[str, Any]) -> Base | None:
        """The fused base of a group."""
        return self._base if self._several is None else self._several.base_of(group)

    @property
    def _mixing(self) -> Descent | None:
        """The descent rule of a sharpness-aware step: the class's, or that of ``amplify``."""
        if self.descent is not None or not self.amplify:
            return self.descent
        factor = float(self.amplify) * self.perturb_every
        return None if factor == 1 else amplified(factor)

    # --- groups ---

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group, as in :mod:`torch.optim`; its missing keys take the defaults.

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

    def _check_group(self, group: dict[str, Any]) -> None:
        """A group that is new, with the values of tensors; floats and bools replace their like."""
        # the base will complete the first ones
        whole = hasattr(self, "base_optimizer")
        self._arguments.check(group, self._base_of(group) if whole else self._base, whole)
        if whole:
            self._check_base_state(group, self._base_of(group))
        if self.renormalize:
            check_perturb([group])

    def _check_base_state(self, group: dict[str, Any], base: Base | None) -> None:
        owner = bases_of(self.base_optimizer, [group])[0]
        check_base_state(self.ascent, base, type(owner).__name__, group)

    # --- state dicts and copies ---

    def state_dict(self) -> dict[str, Any]:
        """As in :mod:`torch.optim`, with everything that a resumed run needs."""
        self._write_own(self.param_groups)
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of this class, or of the :mod:`torch.optim` base on its own.

        State tensors keep the dtype in which they were saved, so that a resumed run goes on
        exactly. float64 state is only for float64 parameters, and is cast in both directions.
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

    def _write_own(self, groups: list[dict[str, Any]]) -> None:
        """What a state dict has beyond the base's: who made it, and the optimizer's own numbers."""
        bases = bases_of(self.base_optimizer, groups)
        write_marks(groups, method_name(type(self)), bases)
        if hasattr(self, "_passes"):
            self._passes.settle()
        write_kept(groups, self.kept)

    def _receiver(self) -> Receiver:
        """What a state dict has to fit to be loaded."""
        if self._flight is not None:
            raise RuntimeError("expected second_step: load_state_dict cannot come between passes")
        starts = {} if self.descent is None else self.descent.scalars
        return Receiver(
            method=method_name(type(self)),
            groups=self.param_groups,
            bases=bases_of(self.base_optimizer, self.param_groups),
            rules=list(map(self._base_of, self.param_groups)),
            ascent=self.ascent,
            kept=self.kept,
            least={**LEAST, **({} if self.descent is None else self.descent.least)},
            unmeasured=[name for name, start in starts.items() if start != start],
            check_group=self._check_group,
        )

    def __getstate__(self) -> dict[str, Any]:
        if self._flight is not None:
            raise RuntimeError(
                "expected second_step: an optimizer cannot be copied or pickled between passes"
            )
        self._passes.settle()
        return super().__getstate__() | {"_base_parts": parts_of(self.base_optimizer)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        base, parts = state.pop("_base_parts", (None, {}))
        parts = {**parts, **{k: state.pop(k) for k in ("state", "param_groups") if k in state}}
        if base is not None:  # a copy, not load_state_dict
            self.base_optimizer = self._owner = base.__new__(base)
            self._base = find_base(base)
        super().__setstate__(state)
        complete_settings(self)
        groups = (self.defaults | group for group in parts.get("param_groups", ()))
        own = {MASTER}.union(*map(self.ascent.state_names, groups))
        set_parts(self.base_optimizer, parts, own)
        if base is not None:
            self._make_checks(p for group in self.param_groups for p in group["params"])
            self._start()
            put_guard(self)
