"""What a rule declares: an :class:`Ascent`, a :class:`Descent` or a :class:`Base`.

A rule consists of a kernel file (``kernels/ascent/``, ``kernels/descent/``, ``kernels/base/``, or a
file of the user's) and a declaration of a class from here. Methods declare rules, backends run
them, and neither knows the other. Users find the three classes in ``fastsam.rules``.
"""

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from torch import Tensor

from fastsam.kernels.layout import ASCENT_STATES, BASE_STATES, DESCENT_GIVEN, DESCENT_SCALARS

from .arguments import Argument

Group = dict[str, Any]
#: Hyper-parameters of a rule by the names that its kernel file gives to columns.
Columns = dict[str, Any]
#: What a descent rule may ask for: sums over all elements, of squares of both gradients, of their
#: products, <g + g~, e> / 2 and <g~, e>; and the loss at w + e.
SUMS = ("first", "second", "product", "sharpness", "rise", "loss")

#: Numbers that an optimizer keeps of its own, and that no descent rule may call its scalars.
RESERVED = ("t", "squared_norms", "ascent_squared_norms", "rounding_step", "noise_step", "method",
            "base", "momentum_squared_norm")  # fmt: skip


# functions with names, not lambdas: an optimizer that holds them can be pickled


def _no_ascent_columns(group: Group, lam: float) -> Columns:
    return {}


def _no_columns(group: Group) -> Columns:
    return {}


def _no_states(group: Group) -> dict[str, float]:
    return {}


def along_gradient(g: Tensor, state: dict[str, Tensor], h: Columns) -> Tensor:
    """The direction of most rules: the gradient itself."""
    return g


class Rule:
    """What all rules have in common."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        """One that was pickled before a field was new has the field's default."""
        new = [x for x in fields(self) if x.name not in state]  # type: ignore[arg-type]
        for x in new:
            if x.default_factory is not MISSING:
                vars(self)[x.name] = x.default_factory()
            elif x.default is not MISSING:
                vars(self)[x.name] = x.default
        vars(self).update(state)


@dataclass(frozen=True, eq=False)
class Ascent(Rule):
    r"""How the perturbation follows from the first gradient: :math:`e = r\, T^2 d`.

    The equations work on any number of elements, in float32 or float64, and change nothing in
    place. ``g`` is the gradient of the minimised objective: in groups with ``maximize`` its sign
    has been changed. ``h`` is what ``columns`` returns, and ``state`` has the state tensors by
    name.

    Args:
        name: Of the rule, for messages.
        kernel: Module with its Triton functions (``fastsam.kernels.ascent`` lists them); imported
            when the triton backend first needs it.
        radius: ``(rho, norm, total, h)`` to :math:`r`. Numbers or 0-dim tensors: ``norm`` is the
            norm that the argument ``norm`` selects, and ``total`` is the accumulator including this
            step's norm.
        direction: ``(g, state, h)`` to :math:`d`. Default: the gradient.
        measured: ``(g, state, h)`` to that of which the norm is taken where ``norm`` is
            ``"direction"``. Default: the direction.
        from_old: Whether the direction gets the state of before this gradient, and not the new one.
        direction_states: With ``from_old``, how many of the state tensors the direction uses,
            counted from the first. The others are not read for its norm. Default: all.
        advance: ``(g, state, h)`` to the state after this gradient. With state.
        usable: ``(state, norm)`` to whether the new state may replace the old. With state.
        accumulate: ``(total, norm)`` to the accumulator after this step.
        accumulator: Where the accumulator starts, from the first group. None: there is none.
        sees_accumulator: Whether ``direction`` and ``measured`` get the accumulator of before this
            gradient, as ``state["accumulated"]``, a 0-dim tensor in float64.
        columns: ``(group, lam)`` to the rule's hyper-parameters, at most three; ``lam`` is what
            the optimizer's ``_next_lam`` gave for this step.
        states: ``(group)`` to the names of state tensors, at most two, each with what it holds
            before the first gradient. They are in float32, or float64 for float64 parameters.
            Names begin with ``ascent_``, so that no base optimizer has them.
        base_state: Name of a state tensor of the base optimizer that ``direction`` also gets in
            ``state``, as it is after the last step, in the dtype of the arithmetic. It is read in
            place, and is NaN for a parameter that has none. Default: none.
        computes: ``(g, state)`` to a tensor that ``direction`` gets instead of a state tensor of
            the base, under the name ``base_state``: of the shape of ``g``, or of no dimension.
            ``state`` is the base's state of the parameter. It runs in torch on every backend.
            Default: none.
        momentum: Name of a state tensor of the base optimizer that is used instead of the gradient:
            ``g`` and both norms are of it, and a parameter that has none is not perturbed. The step
            then has one pass, which begins with the perturbation, and gradients at ``w`` are not
            used. ``g`` has its sign changed as a gradient's is where a group maximizes, though a
            momentum is of what is minimised already. Default: none. The name of ``keeps`` stands
            for the gradient of the step before, which is kept as that.
        layer_scale: ``(norm, group)`` to a number in the same way, one for a whole parameter: of
            the norm of its weights, a 0-dim tensor.
        keeps: Name of a state tensor that is none of the rule's own: what the descent rule
            ``keeps``, or the step's gradient. Begins with ``ascent_``. Default: none.
        norm: ``"gradient"`` or ``"direction"``: of which the global norm is taken, with ``T``.
            None: none is needed. A direction whose norm is taken is 0 where gradient and state of
            the ascent are.
        noise: Whether ``direction`` gets random numbers instead of the gradient, which is not read:
            uniform in (-1, 1), one for each element, different in every step and every perturbation
            of a step, and the same on every backend.
        chooses: Whether parameters are chosen at random, with the first column as probability. The
            others count as having no gradient.
        scales: Whether ASAM's element-wise scale is defined for it.
        scales_once: Whether the perturbation has the scale once, :math:`e = r\, T d`, not squared.
        arguments: What the hyper-parameters may be, by group key (``fastsam.rules.Number`` and
            ``Flag``): checked where they are given, and in a step where they have changed.
        check: Raises ValueError for a group whose hyper-parameters are out of range, in what
            ``arguments`` does not say. Called in every step.
        eager: For torch's operators on a CPU, ``"module:name"`` of a fast path. Default: none, the
            equations run piece by piece.

    Raises:
        ValueError: If something is missing, or there is too much of it.
    """

    name: str
    kernel: str
    radius: Callable[[Any, Any, Any, Columns], Any]
    direction: Callable[[Tensor, dict[str, Tensor], Columns], Tensor] = along_gradient
    measured: Callable[[Tensor, dict[str, Tensor], Columns], Tensor] | None = None
    from_old: bool = False
    direction_states: int | None = None
    advance: Callable[[Tensor, dict[str, Tensor], Columns], dict[str, Tensor]] | None = None
    usable: Callable[[dict[str, Tensor], Tensor], Tensor] | None = None
    accumulate: Callable[[Tensor, Tensor], Tensor] | None = None
    accumulator: Callable[[Group], float] | None = None
    sees_accumulator: bool = False
    columns: Callable[[Group, float], Columns] = _no_ascent_columns
    states: Callable[[Group], dict[str, float]] = _no_states
    base_state: str = ""
    computes: Callable[[Tensor, dict[str, Any]], Any] | None = None
    layer_scale: Callable[[Tensor, Group], Any] | None = None
    momentum: str = ""
    keeps: str = ""
    norm: str | None = "gradient"
    noise: bool = False
    chooses: bool = False
    scales: bool = True
    scales_once: bool = False
    arguments: Mapping[str, Argument] = field(default_factory=dict)
    check: Callable[[Mapping[str, Any]], None] | None = None
    eager: str = ""

    def __post_init__(self) -> None:
        _check_kernel(self)
        if self.norm not in ("gradient", "direction", None):
            raise ValueError(
                f"norm of ascent {self.name!r} must be 'gradient', 'direction' or None, got "
                f"{self.norm!r}"
            )
        if self.noise and (self.norm is not None or self.scales or self.advance is not None):
            raise ValueError(
                f"ascent {self.name!r} has noise, and needs norm=None, scales=False and no state"
            )
        together = ("advance", "usable"), ("accumulate", "accumulator")
        for first, second in together:
            for has, lacks in ((first, second), (second, first)):
                if getattr(self, has) is not None and getattr(self, lacks) is None:
                    raise ValueError(f"ascent {self.name!r} has {has} and needs {lacks} with it")
        if self.states is not _no_states and self.advance is None:
            raise ValueError(f"ascent {self.name!r} has states and needs advance with them")
        if self.measured is not None and self.norm != "direction":
            raise ValueError(
                f"ascent {self.name!r} has measured and needs norm='direction' with it"
            )
        if self.direction_states is not None and not self.from_old:
            raise ValueError(
                f"ascent {self.name!r} has direction_states and needs from_old=True with it"
            )
        if self.sees_accumulator and self.accumulate is None:
            raise ValueError(
                f"ascent {self.name!r} has sees_accumulator and needs accumulate with it"
            )
        if self.is_computed and not self.base_state:
            raise ValueError(
                f"ascent {self.name!r} has computes or layer_scale and needs base_state with it"
            )
        if not isinstance(self.base_state, str) or self.base_state.startswith("ascent_"):
            raise ValueError(
                f"base_state of ascent {self.name!r} must name a state of the base optimizer, got "
                f"{self.base_state!r}"
            )
        if self.momentum and (self.base_state or self.advance or self.accumulate):
            raise ValueError(
                f"ascent {self.name!r} follows the base's {self.momentum!r}, and may have no "
                "base_state, advance or accumulate"
            )

    @property
    def is_computed(self) -> bool:
        """Whether what the direction reads is computed in every step, and none of the base's."""
        return self.computes is not None or self.layer_scale is not None

    @property
    def follows_last(self) -> bool:
        """Whether the gradient of the step before stands in the place of the first one."""
        return bool(self.momentum) and self.momentum == self.keeps

    @property
    def divides(self) -> bool:
        """Whether the perturbation is divided by the norm of one gradient or direction."""
        if self.norm is None:
            return False
        return self.accumulate is None or self.norm == "direction"

    @property
    def sees_past(self) -> bool:
        """Whether the direction follows from what the update changes."""
        return bool(self.base_state) or self.sees_accumulator or self.chooses

    def state_names(self, group: Group) -> dict[str, float]:
        """The state of a group's parameters, checked.

        Raises:
            ValueError: If there is more than the tables have rows for, or a name is not allowed.
        """
        names = self.states(group)
        if self.keeps:
            names = {**names, self.keeps: 0.0}
        if len(names) > ASCENT_STATES:
            raise ValueError(
                f"ascent {self.name!r} may have {ASCENT_STATES} states, got {', '.join(names)}"
            )
        if wrong := [name for name in names if not name.startswith("ascent_")]:
            raise ValueError(
                f"states of ascent {self.name!r} must have names that begin with 'ascent_', got "
                f"{wrong[0]!r}"
            )
        if names.keys() - {self.keeps} and self.advance is None:
            raise ValueError(f"ascent {self.name!r} has states and needs advance with them")
        return names


@dataclass(frozen=True, eq=False)
class Descent(Rule):
    r"""What the base update takes: :math:`u = c\, \tilde g + c_1\, g`.

    A rule may also have a part that the base does not see:
    :math:`w \leftarrow \mathrm{base}(w, u) - lr\,(a\, \tilde g + a_1\, g)`.

    The equations work on 0-dim tensors. ``state`` and ``sums`` are dicts by name, ``h`` is what
    ``columns`` gives.

    Args:
        name: Of the rule, for messages.
        kernel: Module with its Triton functions (``fastsam.kernels.descent`` lists them).
        coefficients: ``(state, sums, h)`` to :math:`c` and :math:`c_1`, tensors or numbers; with
            ``apart`` to :math:`c, c_1, a` and :math:`a_1`. If the first gradient is not finite they
            are not used, and :math:`u = \tilde g`.
        sums: Which of ``SUMS`` the rule is given: ``"first"``, ``"second"`` and ``"product"`` for
            the coefficients, or ``"rise"`` without ``"product"``, and ``"loss"``; ``"sharpness"``
            for ``adapt``. :math:`\tilde g` counts as rescaled
            where ``renormalize`` asks for that. Of a rule without sums the coefficients are known
            after the first pass, and no gradient is read for them.
        apart: Whether it has a part that bypasses the base. That part is not clipped.
        mixes: Whether :math:`c_1` may differ from 0. If not, the update does not read the first
            gradient.
        rate: Whether ``coefficients`` gives a third number, the step size that the base takes.
        keeps: Whether :math:`a\, \tilde g + a_1\, g`, of further coefficients :math:`a` and
            :math:`a_1`, is kept in the memory of the first gradient: as the state that the ascent
            names as ``keeps``. A step that is rejected leaves that as it was.
        reuses: Whether that state is used instead of the first gradient, in a step of one pass.
        fills: Whether the second gradient is used for a parameter without a first one:
            :math:`u = (c + c_1)\, \tilde g` there. Default: the first gradient counts as zero.
        columns: ``(group)``, of the first group, to the rule's hyper-parameters, at most four.
        scalars: Numbers that the rule keeps from step to step, each with its start: at most two, or
            with ``adapt`` three.
        given: Instead of scalars, at most two numbers that the optimizer's class sets in every
            step, before the reduction of the second pass. They are not kept.
        least: What some of them are at least. A state dict with less, or with a number that is not
            finite, is refused; NaN is not where it is the start.
        adapt: ``(state, sharpness, h)`` to the scalars after this step. They do not change if the
            step was rejected or nothing was perturbed.
        adapts_on_host: Whether ``adapt`` runs in torch on every backend, as a user's function does.
        arguments: What the hyper-parameters may be, by group key (``fastsam.rules.Number`` and
            ``Flag``): checked where they are given, and in a step where they have changed.
        check: Raises ValueError for a group whose hyper-parameters are out of range, in what
            ``arguments`` does not say. Called in every step.

    Raises:
        ValueError: If something is missing or unknown, or there is too much of it.
    """

    name: str
    kernel: str
    coefficients: Callable[[dict[str, Tensor], dict[str, Tensor], Columns], tuple[Any, Any]]
    sums: Sequence[str] = ()
    apart: bool = False
    mixes: bool = True
    rate: bool = False
    keeps: bool = False
    reuses: bool = False
    fills: bool = False
    columns: Callable[[Group], Columns] = _no_columns
    scalars: Mapping[str, float] = field(default_factory=dict)
    given: Sequence[str] = ()
    least: Mapping[str, float] = field(default_factory=dict)
    adapt: Callable[[dict[str, Tensor], Tensor, Columns], dict[str, Any]] | None = None
    adapts_on_host: bool = False
    arguments: Mapping[str, Argument] = field(default_factory=dict)
    check: Callable[[Mapping[str, Any]], None] | None = None

    def __post_init__(self) -> None:
        _check_kernel(self)
        if unknown := [name for name in self.sums if name not in SUMS]:
            raise ValueError(
                f"sums of descent {self.name!r} must be among {', '.join(map(repr, SUMS))}, got "
                f"{unknown[0]!r}"
            )
        if "rise" in self.sums and {"product", "sharpness"} & set(self.sums):
            raise ValueError(
                f"descent {self.name!r} must not ask for 'rise' and for 'product' or 'sharpness'"
            )
        if self.keeps and self.fills:
            raise ValueError(f"descent {self.name!r} must not have both keeps and fills")
        if self.rate and (self.apart or not self.sums):
            raise ValueError(f"descent {self.name!r} has rate and needs sums, and not apart")
        if len(self.scalars) > DESCENT_SCALARS:
            raise ValueError(
                f"descent {self.name!r} may have {DESCENT_SCALARS} scalars, got "
                f"{', '.join(self.scalars)}"
            )
        if len(self.scalars) > 2 and self.adapt is None:
            raise ValueError(f"descent {self.name!r} has three scalars and needs adapt with them")
        if self.given and (self.scalars or self.sums or len(self.given) > DESCENT_GIVEN):
            raise ValueError(
                f"descent {self.name!r} has given numbers and may have {DESCENT_GIVEN} of them, "
                "and neither scalars nor sums"
            )
        if clash := [name for name in self.scalars if name in RESERVED]:
            raise ValueError(
                f"scalars of descent {self.name!r} must have none of the names "
                f"{', '.join(RESERVED)}, got {clash[0]!r}"
            )
        if self.adapt is not None and not (self.scalars and "sharpness" in self.sums):
            raise ValueError(
                f"descent {self.name!r} has adapt and needs scalars, and 'sharpness' among its sums"
            )

    @property
    def needs_perturbation(self) -> bool:
        """Whether its sums need the perturbation once more."""
        return bool({"sharpness", "rise"} & set(self.sums))


@dataclass(frozen=True, eq=False)
class Base(Rule):
    """A base optimizer whose update runs inside fastsam's own update pass.

    Args:
        name: Of the rule, for messages.
        kernel: Module with its Triton function ``update`` (``fastsam.kernels.base`` describes it).
        update: ``(w, u, state, group, step, fresh, squared_norms)``: changes ``w`` and the tensors
            in ``state`` in place, in the dtype of the arithmetic. ``step`` is the count from 1,
            ``fresh`` whether ``starts_from_gradient`` is new, ``squared_norms`` the sum of the
            squared norms of ``u`` so far, or with ``takes_rate`` the descent rule's step size; each
            for updates that declare it.
        columns: ``(group)`` to its hyper-parameters, at most twelve.
        states: ``(group)`` to the names of state tensors, at most three, each with its start, named
            as ``torch.optim`` does.
        starts_from_gradient: The state that starts as the first gradient and has its dtype, like
            torch's momentum buffer.
        counts_steps: Whether parameters carry torch's ``step`` count.
        accumulator: Where the sum of the squared norms of ``u`` starts, if the update takes it:
            ``(group)``, of the first group, to a number.
        takes_rate: Whether the update gets a step size from the descent rule.
        wide: Whether state is in float32 whatever the parameter's dtype (float64 for float64).
        takes_first: Whether the update also gets the first gradient, as its last argument: zeros if
            there is none. The optimizer needs a descent rule.
        arguments: What the hyper-parameters may be, by group key (``fastsam.rules.Number`` and
            ``Flag``): checked where they are given, and in a step where they have changed.
        check: Raises ValueError for a group whose hyper-parameters are out of range, in what
            ``arguments`` does not say. Called in every step.
        eager: For torch's operators on a CPU, ``"module:name"`` of a fast path. Default: none, the
            equation runs tensor by tensor.

    Raises:
        ValueError: If something is missing.
    """

    name: str
    kernel: str
    update: Callable[..., None]
    columns: Callable[[Group], Columns] = _no_columns
    states: Callable[[Group], dict[str, float]] = _no_states
    starts_from_gradient: str = ""
    counts_steps: bool = False
    accumulator: Callable[[Group], float] | None = None
    takes_rate: bool = False
    wide: bool = False
    takes_first: bool = False
    arguments: Mapping[str, Argument] = field(default_factory=dict)
    check: Callable[[Mapping[str, Any]], None] | None = None
    eager: str = ""

    def __post_init__(self) -> None:
        _check_kernel(self)

    def state_names(self, group: Group) -> dict[str, float]:
        """The state of a group's parameters, checked.

        Raises:
            ValueError: If there is more than the tables have rows for.
        """
        names = self.states(group)
        if len(names) > BASE_STATES:
            raise ValueError(
                f"base {self.name!r} may have {BASE_STATES} states, got {', '.join(names)}"
            )
        if "step" in names:
            raise ValueError(
                f"base {self.name!r} must have no state 'step', which counts_steps gives it"
            )
        return names

    @property
    def needs_norm(self) -> bool:
        """Whether the update uses the global norm of ``u``."""
        return self.accumulator is not None


_DECLARED: "weakref.WeakSet[Ascent | Descent | Base]" = weakref.WeakSet()


def declared() -> "list[Ascent | Descent | Base]":
    """Every rule that has been declared and is still there, the library's and others, by name."""
    return sorted(_DECLARED, key=lambda rule: (type(rule).__name__, rule.name, rule.kernel))


def _check_kernel(rule: Ascent | Descent | Base) -> None:
    for key in ("name", "kernel"):
        value = getattr(rule, key)
        if not (isinstance(value, str) and value):
            raise ValueError(f"{key} of a rule must be a string, got {value!r}")
    _DECLARED.add(rule)
