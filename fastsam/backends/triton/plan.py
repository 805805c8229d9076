"""The launches of a pass: what they are specialised for, and what a reduction adds up."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastsam.kernels import finish, sums
from fastsam.kernels.layout import Launch, Launches, Scalar, Task
from fastsam.step.rule import Base
from fastsam.step.sharding import Sharding, add_up
from fastsam.step.spec import StepSpec

from ..base import Pass
from .buckets import Bucket
from .functions import ASCENT, BASE, DESCENT, functions_of
from .launcher import Launched

NOTHING = nullcontext()
SUMS = slice(Scalar.SUM0, Scalar.SUM4 + 1)
#: How many that are.
SEVERAL = SUMS.stop - SUMS.start


@dataclass
class Reduction:
    """The launches of a reduction, by how their sums are sharded.

    The last finishes it, unless others have to be added first.
    """

    scalars: Tensor
    parts: dict[Sharding, list[Callable[[], Any]]] = field(default_factory=dict)
    finish: Callable[[], Any] | None = None
    squares: Tensor | None = None  # by segment

    def run(self) -> Pass[None]:
        if self.finish is None:
            with on(self.scalars.device):
                for launches in self.parts.values():
                    for launch in launches:
                        launch()
            return
        sums = {}
        with on(self.scalars.device):
            for sharding, launches in self.parts.items():
                for launch in launches:
                    launch()
                own = [] if self.squares is None else [self.squares]
                sums[sharding] = torch.cat([self.scalars[SUMS], *own])
        total = add_up(sums)
        yield total
        self.scalars[SUMS] = total[:SEVERAL]
        if self.squares is not None:
            self.squares.copy_(total[SEVERAL:])
        with on(self.scalars.device):
            self.finish()


@dataclass
class Plan:
    """A kind of pass over one layout: its buckets, and its launches as they were last prepared.

    They are run again as long as ``depends`` holds the same objects. Addresses are none of that,
    nor are hyper-parameters: those are on the device, in tables that stay where they are.
    """

    prepared: object
    buckets: list[Bucket]
    depends: list[Any] = field(default_factory=list)
    reduction: Reduction | None = None
    launches: list[Launched] = field(default_factory=list)


#: A reduction's functions where no rule has a part in it.
NO_RULE = dict.fromkeys(
    ("ADVANCE", "DIRECTION", "RADIUS", "ACCUMULATES", "COEFFICIENTS", "ADAPTED")
)


def states_of(spec: StepSpec) -> int:
    """Number of the ascent rule's state tensors."""
    return len(spec.ascent.states(spec.groups[0]))


def _scale_of(spec: StepSpec) -> int:
    """Whether the perturbation has ``T``: 2 where it has it once, True where it is squared."""
    return 2 if spec.adaptive and spec.ascent.scales_once else spec.adaptive


def perturb_constants(
    spec: StepSpec, backs_up: bool = True, moves: bool = False, known: int = 0
) -> dict[str, Any]:
    """What the perturbation is specialised for, but for dtypes.

    ``backs_up`` says whether it copies the weights: the first of several ascents does. ``moves``
    says whether some are not copied, as their parameters will point elsewhere. ``known`` says
    whether an update has left the norm: 1 of float32 alone, 2 with float64 among it.
    """
    rule = functions_of(spec.ascent, ASCENT)
    return {
        "ADVANCE": rule["advance"], "DIRECTION": rule["direction"], "RADIUS": rule["radius"],
        "USABLE": rule["usable"], "ACCUMULATES": rule["accumulate"], "STATES": states_of(spec),
        "FROM_OLD": spec.ascent.from_old, "NOISE": spec.ascent.noise,
        "ADAPTIVE": _scale_of(spec), "SEGMENTS": spec.norm != "global", "BACKS_UP": backs_up,
        "MOVES": moves, "CHOOSES": spec.ascent.chooses, "KNOWN": known,
    }  # fmt: skip


def update_constants(
    spec: StepSpec,
    ascent_states: int,
    starts: bool,
    base: Base | None = None,
    squares: int | None = None,
) -> dict[str, Any]:
    """What the update is specialised for, but for dtypes and the base's states.

    Args:
        spec: The pass.
        ascent_states: Number of the ascent's state tensors, where they may have to be put back.
        starts: Whether a state that starts from the gradient is among the base's.
        base: The bucket's. Default: the only one.
        squares: Which of the base's states it leaves the squared norm of.
    """
    base = base or spec.base
    assert base is not None
    return {
        "UPDATE": functions_of(base, BASE)["update"], "COUNTS": base.counts_steps,
        "STARTS": starts, "SCALE": spec.rescales,
        "MIX": spec.descent is not None and spec.descent.mixes,
        "BESIDE": spec.has_part_apart, "KEEPS": spec.keeps, "SKIP": spec.skip_nonfinite,
        "BY_NORM": base.needs_norm, "BY_RATE": base.takes_rate, "FIRST": base.takes_first,
        "ASCENT_STATES": ascent_states, "SQUARES": squares,
    }  # fmt: skip


@dataclass
class Sums:
    """A reduction's constants and tasks, and whether it reads more than two streams."""

    constants: dict[str, Any]
    tasks: int = 0
    several: bool = True


def ascent_sums(spec: StepSpec) -> Sums:
    """The first gradient's norm, and the direction's where the rule asks for that."""
    rule = functions_of(spec.ascent, ASCENT)
    along = spec.ascent.norm == "direction"
    states = spec.ascent.direction_states or states_of(spec)
    own: dict[str, Any] = {"ACCUMULATES": rule["accumulate"]}
    if along:
        measured = rule["measured"] or rule["direction"]
        own |= {"ADVANCE": rule["advance"], "DIRECTION": measured}
    if spec.descent is not None and not (spec.descent.sums or spec.descent.given):  # it is known
        own["COEFFICIENTS"] = functions_of(spec.descent, DESCENT)["coefficients"]
    return Sums(
        NO_RULE | own | {
            "TERMS": sums.of_ascent, "FINISH": finish.finish_ascent, "ASCENDS": True,
            "BOTH": False, "LETS": False, "SCALED": spec.adaptive, "ADAPTIVE": False,
            "SEGMENTS": False,
            "STATES": states if along else 0, "FROM_OLD": along and spec.ascent.from_old,
            "SUMS": 2 if along else 1,
            "CHOOSES": spec.ascent.chooses,
        },
        int(Task.AGREE * spec.knows_momentum), several=along,
    )  # fmt: skip


def kept_sums() -> Sums:
    """The norm of what a descent rule has kept, in the place of gradients; it carries no scale."""
    own: dict[str, Any] = {
        "TERMS": sums.of_descent, "FINISH": finish.finish_kept, "ASCENDS": True, "BOTH": False,
        "LETS": False, "SCALED": False, "CHOOSES": False, "ADAPTIVE": False, "SEGMENTS": False,
        "STATES": 0, "FROM_OLD": False, "SUMS": 1,
    }  # fmt: skip
    return Sums(NO_RULE | own, several=False)


def descent_sums(spec: StepSpec, kept_is_known: int = 0) -> Sums:
    """The second gradient's norm, and a descent rule's sums over both gradients.

    Or that norm alone, where the rule reuses something whose norm is known.
    """
    scaled = spec.adaptive and spec.renormalize  # whether the norm is that of T g~
    tasks = (
        Task.RENORMALIZE * spec.renormalize
        | Task.CLIP * (spec.max_grad_norm is not None)
        | Task.SKIP * spec.skip_nonfinite
        | Task.SKIP_FIRST * spec.skip_first
        | Task.ACCUMULATE * (spec.base is not None and spec.base.needs_norm)
        | Task.COMMIT * (spec.ascent.accumulate is not None)
    )
    common = {
        "FINISH": finish.finish_descent, "ASCENDS": False, "BOTH": spec.descent is not None,
        "LETS": False, "SCALED": scaled, "CHOOSES": False, "ADAPTIVE": False, "SEGMENTS": False,
        "STATES": 0, "FROM_OLD": False,
    }  # fmt: skip
    if spec.descent is None:
        # the plain norm is a sum of its own only where T makes the other one different
        needs_plain = Task.CLIP | Task.SKIP | Task.ACCUMULATE
        number = 2 if scaled and tasks & needs_plain else 1
        own: dict[str, Any] = {"TERMS": sums.of_descent, "SUMS": number}
        return Sums(NO_RULE | common | own, int(tasks), several=False)
    rule = functions_of(spec.descent, DESCENT)
    if kept_is_known:
        common |= {"FINISH": finish.finish_reused, "BOTH": False}
        own = {"TERMS": sums.of_descent, "SUMS": 1, "COEFFICIENTS": rule["coefficients"]}
        return Sums(NO_RULE | common | own, int(tasks), several=False)
    rises = "rise" in spec.descent.sums
    if rises:
        common["FINISH"] = finish.finish_rise
    elif len(spec.descent.scalars) > 2:
        common["FINISH"] = finish.finish_three
    own = {
        "TERMS": sums.of_rise if rises else sums.of_both, "SUMS": 5,
        "COEFFICIENTS": rule["coefficients"], "ADAPTED": rule["adapt"],
    }  # fmt: skip
    if spec.descent.needs_perturbation:
        own |= _perturbation(spec)
    if spec.descent.adapt is not None and not spec.descent.adapts_on_host:
        tasks |= Task.ADAPT
    return Sums(NO_RULE | common | own, int(tasks))


def hypergradient_sums(spec: StepSpec, hessian: str) -> Sums:
    """LETS's sum, by the approximation of the Hessian."""
    common = {
        "FINISH": finish.finish_hypergradient, "ASCENDS": False, "BOTH": True, "LETS": True,
        "SCALED": False, "CHOOSES": False, "ADAPTIVE": False, "SEGMENTS": False, "STATES": 0,
        "SUMS": 1, "FROM_OLD": False,
    }  # fmt: skip
    if hessian == "diag":
        return Sums(NO_RULE | common | {"TERMS": sums.of_diagonal} | _perturbation(spec))
    return Sums(NO_RULE | common | {"TERMS": sums.of_difference})


def _perturbation(spec: StepSpec) -> dict[str, Any]:
    """What makes the perturbation once more."""
    rule = functions_of(spec.ascent, ASCENT)
    return {
        "DIRECTION": rule["direction"], "RADIUS": rule["radius"],
        "ACCUMULATES": rule["accumulate"], "STATES": states_of(spec), "ADAPTIVE": _scale_of(spec),
        "SEGMENTS": spec.norm != "global", "FROM_OLD": spec.ascent.from_old,
    }  # fmt: skip


def reduce_launch(
    launches: Launches,
    sums: Sums,
    has_master: bool,
    P: Any,
    G: Any,  # noqa: N803
) -> Launch:
    """How a reduction is launched, on parameters and gradients of these dtypes."""
    if sums.several:
        return launches.reduce_streams
    if sums.constants["SCALED"]:
        return launches.reduce_scaled.on(_are_halves(P, G) and not has_master)
    return launches.reduce.on(_are_halves(G))


def perturb_launch(
    launches: Launches,
    states: int,
    has_master: bool,
    P: Any,
    G: Any,  # noqa: N803
    read: Any = None,
) -> Launch:
    """How a perturbation is launched. The ascent's state and master weights are never halves.

    ``read`` is the dtype of the base's state that the ascent reads; None where it reads none.
    """
    streams = (P, G) if read is None else (P, G, read)
    return launches.perturb.on(_are_halves(*streams) and not states and not has_master)


def _are_halves(*dtypes: Any) -> bool:
    """Whether all have 16 bits; Triton's dtypes, or their names."""
    return all(str(dtype) in ("fp16", "bf16") for dtype in dtypes)


def on(device: torch.device) -> AbstractContextManager[Any]:
    """With the device as the present one, where launches ask for that."""
    if device.type != "cuda" or torch.cuda.current_device() == device.index:
        return NOTHING
    return torch.cuda.device(device)
