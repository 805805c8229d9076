"""A step as data: a :class:`StepSpec` has its rules, its parameter groups and its settings."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

# optimizers that earlier versions pickled look for the parts of their rules in this file
from .rule import (  # noqa: F401
    Ascent,
    Base,
    Descent,
    Group,
    _no_ascent_columns,
    _no_columns,
    _no_states,
    along_gradient,
)


def sign_of(group: Mapping[str, Any]) -> float:
    """-1 where the base maximizes, else 1: a rule is given the gradient of what is minimised."""
    return -1.0 if group.get("maximize") else 1.0


def is_perturbed(group: Mapping[str, Any]) -> bool:
    """Whether a group takes part in the perturbation and its norm: its key ``perturb``."""
    return bool(group.get("perturb", True))


@functools.cache
def share_of(ascents: int) -> float:
    """What of ``rho`` one of several ascents has; the same object, by which tables are compared."""
    return 1 / ascents


@dataclass(frozen=True, eq=False, slots=True)
class StepSpec:
    """One pass, as the backends see it.

    Attributes:
        groups: The optimizer's parameter groups.
        ascent: The rule of the perturbation.
        descent: The rule of ``u``; None is the second gradient itself.
        base: The fused base update; None leaves the update to a base that is not fused.
        bases: The same by group, where there are several; ``base`` is None then.
        perturbs: Whether the step has two passes.
        lam: Unified SAM's weight of normalisation in this step.
        share: What of ``rho`` one ascent has, where there are several.
        renormalize: Whether the second gradient is rescaled to the norm of the first (SSAM).
        max_grad_norm: Bound on the norm of ``u``.
        skip_nonfinite: Whether a non-finite second gradient leaves weights and state alone.
        skip_first: With that, whether a non-finite first gradient does as well.
        is_scaled: Whether gradients carry a loss scale, whose inverse is among the scalars.
        has_masters: Whether 16-bit parameters have float32 master weights.
        is_static: Whether the host decides nothing anew in every step.
        seed: Of random bits; None where the step needs none.
        stochastic: Whether bfloat16 parameters are rounded by them.
        choice_seed: Of an ascent that chooses at random.
        keeps_weights: Whether the copy of the weights is needed after the update (LETS).
        scratch: Whether parameters may point at scratch memory between the passes; "auto" is where
            that is known to be faster.
        norm: Over what the ascent's norm is: everything, each group or each parameter.
        adaptive: Whether some group has ASAM's element-wise scale.
        rescales: Whether ``u`` may differ from the second gradient.
        key: What launches are specialised for; equal for two passes that may share them.
    """

    groups: Sequence[Group]
    ascent: Ascent
    base: Base | None
    descent: Descent | None = None
    perturbs: bool = True
    lam: float = 1.0
    share: float = 1.0
    renormalize: bool = False
    max_grad_norm: float | None = None
    skip_nonfinite: bool = False
    skip_first: bool = False
    is_scaled: bool = False
    has_masters: bool = False
    is_static: bool = True
    seed: int | None = None
    stochastic: bool = False
    choice_seed: int = 0
    keeps_weights: bool = False
    scratch: bool | str = "auto"
    norm: str = "global"
    bases: Sequence[Base | None] | None = None
    adaptive: bool = field(init=False)
    rescales: bool = field(init=False)
    key: tuple[Any, ...] = field(init=False)

    def __post_init__(self) -> None:
        put = object.__setattr__
        clips = self.max_grad_norm is not None
        put(self, "adaptive", any([group["adaptive"] for group in self.groups]))
        put(
            self, "rescales", self.renormalize or self.is_scaled or clips
            or self.descent is not None,
        )  # fmt: skip
        put(self, "key", (
            self.ascent, self.descent, self.base, self.adaptive, self.renormalize, clips,
            self.skip_nonfinite, self.skip_first, self.is_scaled, self.stochastic, self.norm,
            self.bases,
        ))  # fmt: skip

    def base_of(self, i: int) -> Base | None:
        """The fused base update of a group, None where its base is not fused."""
        return self.base if self.bases is None else self.bases[i]

    @property
    def has_fused(self) -> bool:
        """Whether the base of some group is fused."""
        if self.bases is None:
            return self.base is not None
        return any(base is not None for base in self.bases)

    @property
    def has_unfused(self) -> bool:
        """Whether the base of some group is not fused."""
        return self.base is None if self.bases is None else None in self.bases

    @property
    def needs_ascent_norm(self) -> bool:
        rules = self.descent is not None and not self.descent.given
        return rules or self.ascent.norm is not None or self.renormalize or self.skip_first

    @property
    def needs_descent_norm(self) -> bool:
        needs_norm = self.base is not None and self.base.needs_norm
        if self.renormalize or self.is_scaled or self.skip_nonfinite or needs_norm:
            return True
        if self.max_grad_norm is not None or self.descent is None:
            return self.max_grad_norm is not None
        # else the first pass has seen whether all first gradients are finite
        if self.descent.given:
            return False
        return bool(self.descent.sums) or not all(map(is_perturbed, self.groups))

    @property
    def knows_momentum(self) -> bool:
        """Whether an update can leave the norm that the next perturbation is divided by.

        It is that of the momentum alone, of all that is perturbed.
        """
        rule = self.ascent
        return (
            bool(rule.momentum) and not rule.follows_last and rule.norm == "gradient"
            and self.descent is None and self.norm == "global" and self.has_fused
            and not (self.adaptive or self.renormalize or rule.chooses)
        )  # fmt: skip

    @property
    def reuses_by_norm(self) -> bool:
        """Whether ``u`` follows from the gradient's norm and that of what the step reuses.

        Clipping, and a base that takes the norm of ``u``, need their product as well.
        """
        if self.descent is None or not self.descent.reuses or self.max_grad_norm is not None:
            return False
        if self.descent.scalars or self.descent.fills:
            return False
        if self.base is not None and self.base.needs_norm:
            return False
        return {*self.descent.sums} <= {"first", "second"}

    @property
    def has_part_apart(self) -> bool:
        """Whether the update has a part that the base does not see."""
        return self.descent is not None and self.descent.apart

    @property
    def keeps(self) -> bool:
        """Whether a part of both gradients becomes state."""
        return self.descent is not None and self.descent.keeps
