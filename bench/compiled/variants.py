"""Every kernel variant that the library launches.

A rule of the library's is compiled with every combination of dtypes and settings that a step may
have it with. Constants and launch options are those that the triton backend itself gives.
"""

import importlib
import itertools
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import triton.language as tl

from fastsam.backends.triton.plan import (
    Sums,
    ascent_sums,
    descent_sums,
    hypergradient_sums,
    kept_sums,
    perturb_constants,
    perturb_launch,
    reduce_launch,
    update_constants,
)
from fastsam.kernels.layout import Launch, Launches
from fastsam.step.rule import Ascent, Base, Descent, declared
from fastsam.step.spec import StepSpec
from fastsam.unified import UNIFIED

LAUNCHES = Launches()
#: Dtypes of parameter, gradient and state.
TYPES = [
    ("fp32", "fp32", "fp32"), ("bf16", "bf16", "bf16"), ("fp16", "fp16", "fp16"),
    ("fp64", "fp64", "fp64"), ("bf16", "fp32", "fp32"), ("bf16", "fp32", "bf16"),
    ("bf16", "bf16", "fp32"), ("fp32", "bf16", "fp32"), ("fp32", "bf16", "bf16"),
    ("fp16", "fp16", "fp32"),
]  # fmt: skip
#: Hyper-parameters with which every state that a rule may have is there, and with which none is.
GROUPS = [defaultdict(int), defaultdict(lambda: 1)]


@dataclass(frozen=True)
class Variant:
    """All that a compiled kernel depends on, but for the target: pairs of a name and a value.

    Attributes:
        kernel: Name of the kernel.
        constants: Its ``constexpr`` arguments, dtypes and functions by name.
        arguments: Types of its other arguments, in Triton's notation.
        options: Launch options.
    """

    kernel: str
    constants: tuple[tuple[str, Any], ...]
    arguments: tuple[tuple[str, str], ...]
    options: tuple[tuple[str, Any], ...]

    @classmethod
    def create(cls, kernel: str, *parts: Mapping[str, Any]) -> "Variant":
        """From mappings in any order: constants, which may hold dtypes and functions, and so on."""
        constants, arguments, options = (tuple(sorted(part.items())) for part in parts)
        return cls(kernel, tuple((k, _name(v)) for k, v in constants), arguments, options)

    def __getitem__(self, constant: str) -> Any:
        return dict(self.constants)[constant]

    @property
    def family(self) -> str:
        """Kernel, what a reduction adds up, and the rules."""
        constants, names = dict(self.constants), [self.kernel]
        if "TERMS" in constants:
            names.append(constants["TERMS"].partition(":")[2])
        for role in ("COEFFICIENTS", "DIRECTION", "ACCUMULATES", "UPDATE"):
            if constants.get(role) is not None:
                names.append(constants[role].partition(":")[0].rpartition(".")[2])
        return " ".join(dict.fromkeys(names))

    def __str__(self) -> str:
        constants = dict(self.constants)
        found = (constants.pop(name, None) for name in (*"PGS", "READ"))
        types = "/".join(name for name in found if name is not None)
        flags = (f"{k.lower()}={int(x)}" for k, x in constants.items()
                 if isinstance(x, int) and k not in ("CHUNK", "LANES"))  # fmt: skip
        return " ".join((self.family, types, *flags))


def _name(constant: Any) -> Any:
    """A constant's value, or what stands for a dtype or a function."""
    if isinstance(constant, tl.dtype):
        return constant.name
    function = getattr(constant, "fn", None)  # of a Triton function, compiled or interpreted
    return constant if function is None else f"{function.__module__}:{function.__name__}"


def value_of(name: Any) -> Any:
    """The inverse of ``_name``."""
    if name in set(itertools.chain(*TYPES)):
        return tl.dtype(name)
    if isinstance(name, str) and ":" in name:
        module, _, function = name.partition(":")
        return getattr(importlib.import_module(module), function)
    return name


def rules() -> list[Any]:
    """The library's own rules."""
    return [rule for rule in declared() if rule.kernel.startswith("fastsam.")]


def variants() -> list[Variant]:
    """Every variant of the rules that the library declares, on tensors of dtypes in ``TYPES``."""
    ascents = [rule for rule in rules() if isinstance(rule, Ascent)]
    found: list[Variant] = []
    for ascent, adaptive in itertools.product(ascents, (False, True)):
        for param, grad, state in TYPES:
            if not adaptive or ascent.scales:
                types = param, state if ascent.momentum else grad
                found += _of_ascent(types, _spec(ascent, adaptive))
    for types in dict.fromkeys((param, grad) for param, grad, _ in TYPES):
        found += _of_descent(types)
    for base, group in itertools.product(rules(), GROUPS):
        if isinstance(base, Base):
            for types in TYPES:
                found += _of_base(types, base, group)
    return list(dict.fromkeys(found))


def _spec(ascent: Ascent, adaptive: bool, **more: Any) -> StepSpec:
    return StepSpec([GROUPS[1] | {"adaptive": adaptive}], ascent, **({"base": None} | more))


def _of_ascent(types: Sequence[str], spec: StepSpec) -> Iterator[Variant]:
    # neither noise nor what follows from the base's state, or from the accumulator, serves what
    # makes the perturbation once more
    again = not (spec.ascent.sees_past or spec.ascent.momentum or spec.ascent.noise)
    # an update may have left the norm
    known = (1 + (types[0] == "fp64")) * (bool(spec.ascent.momentum) and not spec.adaptive)
    for storage in _storages(types):
        for read in _reads(spec.ascent, types, storage):
            yield _perturbation(types, perturb_constants(spec), read, **storage)
            if known:
                constants = perturb_constants(spec, known=known)
                yield _perturbation(types, constants, read, **storage)
    if again:
        yield _reduction(types, hypergradient_sums(spec, "diag"), False)
    storage = next(iter(_storages(types)))
    for read in _reads(spec.ascent, types, storage):
        yield _perturbation(types, perturb_constants(spec, moves=True), read, **storage)
        if known:
            constants = perturb_constants(spec, moves=True, known=known)
            yield _perturbation(types, constants, read, **storage)
        if spec.ascent.divides:
            by_layer = replace(spec, norm="layer")
            yield _perturbation(types, perturb_constants(by_layer), read, **storage)
            if again:
                yield _reduction(types, hypergradient_sums(by_layer, "diag"), False)
        rule = spec.ascent
        if rule.advance is None and rule.accumulate is None and not rule.momentum:
            # it may come several times
            yield _perturbation(types, perturb_constants(spec, False), read, **storage)
    if spec.ascent.norm is not None:
        for master in _masters(types, spec.adaptive):
            for read in _reads(spec.ascent, types, master):
                along = spec.ascent.norm == "direction"
                yield _reduction(types, ascent_sums(spec), read=read if along else None, **master)


def _reads(
    ascent: Ascent, types: Sequence[str], storage: Mapping[str, bool]
) -> Sequence[str | None]:
    """Dtypes of the base's state that the rule reads, with these of parameter and gradient."""
    if not ascent.base_state:
        return [None]
    if ascent.is_computed:
        return ["fp64" if types[0] == "fp64" else "fp32"]
    if storage["HAS_MASTER"]:
        return ["fp32"]
    return [state for *others, state in TYPES if tuple(others) == tuple(types)]


def _of_descent(types: Sequence[str]) -> Iterator[Variant]:
    descents = [rule for rule in rules() if isinstance(rule, Descent)]
    flags = (False, True)
    for rule, adaptive, scaled, clips in itertools.product((None, *descents), flags, flags, flags):
        spec = _spec(
            UNIFIED, adaptive, descent=rule, renormalize=scaled,
            max_grad_norm=1.0 if clips else None,
        )  # fmt: skip
        sums = descent_sums(spec)
        for master in _masters(types, sums.constants["ADAPTIVE"]):
            yield _reduction(types, sums, **master)
        if spec.reuses_by_norm and not scaled:
            yield _reduction(types, descent_sums(spec, kept_is_known=True), False)
            yield _reduction(types, kept_sums(), False)
        if rule is not None and not rule.sums and not scaled and not clips:  # known at once
            for master in _masters(types, adaptive):
                yield _reduction(types, ascent_sums(spec), **master)
    yield _reduction(types, hypergradient_sums(_spec(UNIFIED, False), "difference"), False)


def _of_base(types: Sequence[str], base: Base, group: dict[str, Any]) -> Iterator[Variant]:
    states = len(base.states(group))
    wide = "fp64" if types[0] == "fp64" else "fp32"
    if states == 0 and types[2] != types[0]:
        return  # without state, its dtype counts as the parameter's
    if base.wide and states and types[2] != wide:
        return  # their state has the dtype of the arithmetic
    starts = bool(base.starts_from_gradient) and states > 0
    flags = (False, True)
    for scale, skip, storage in itertools.product(flags, flags, _storages(types)):
        spec = _spec(
            UNIFIED, False, base=base, max_grad_norm=1.0 if scale else None, skip_nonfinite=skip
        )
        for of_ascent in range(1 + skip * 2):
            rule = update_constants(spec, of_ascent, starts) | storage
            if base.takes_first:
                rule |= {"SCALE": True, "MIX": True}  # as a descent rule has it
                yield _variant("update_kernel", types, LAUNCHES.update, STATES=states, **rule)
                continue
            yield _variant("update_kernel", types, LAUNCHES.update, STATES=states, **rule)
            names = list(base.states(group))[:1]
            if names in (["momentum_buffer"], ["exp_avg"]) and of_ascent == 0:  # MSAM's
                leaves = rule | {"SQUARES": 0}
                yield _variant("update_kernel", types, LAUNCHES.update, STATES=states, **leaves)
            if scale and not base.wide and of_ascent == 0:
                for beside, keeps in ((False, False), (True, False), (False, True)):
                    mixed = rule | {"MIX": True, "BESIDE": beside, "KEEPS": keeps}
                    yield _variant("update_kernel", types, LAUNCHES.update, STATES=states, **mixed)


def _reduction(
    types: Sequence[str], sums: Sums, HAS_MASTER: bool, read: str | None = None  # noqa: N803
) -> Variant:  # fmt: skip
    launch = reduce_launch(LAUNCHES, sums, HAS_MASTER, *types[:2])
    more = {"HAS_MASTER": HAS_MASTER, "READ": read}
    return _variant("reduce_kernel", types, launch, **more, **sums.constants)


def _perturbation(
    types: Sequence[str], constants: Mapping[str, Any], read: str | None, **storage: bool
) -> Variant:
    master = storage["HAS_MASTER"]
    launch = perturb_launch(LAUNCHES, constants["STATES"], master, *types[:2], read)
    return _variant("perturb_kernel", types, launch, READ=read, **storage, **constants)


def _masters(types: Sequence[str], matter: bool) -> list[dict[str, bool]]:
    half = types[0] in ("bf16", "fp16")
    return [{"HAS_MASTER": master} for master in (False, True)[: 1 + (half and matter)]]


def _storages(types: Sequence[str]) -> list[dict[str, bool]]:
    """How weights are stored: as they are; behind them master weights; rounded stochastically."""
    found = [{**master, "STOCHASTIC": False} for master in _masters(types, True)]
    if types[0] == "bf16":
        found.append({"HAS_MASTER": False, "STOCHASTIC": True})
    return found


def _variant(kernel: str, types: Sequence[str], launch: Launch, **constants: Any) -> Variant:
    wide = "fp64" if types[0] == "fp64" else "fp32"
    arguments = {"table": "*i64", "chunks": "*i64", "columns": "i32", "hyper": f"*{wide}",
                 "scalars": "*fp64", "origin": "i64"}  # fmt: skip
    if kernel != "perturb_kernel":
        arguments["arrivals"] = "*i32"
    if kernel == "reduce_kernel":
        arguments |= {"partials": "*fp64", "tasks": "i32"}
    constants |= dict(zip("PGS", types, strict=False), ACC=wide)
    constants |= {"CHUNK": launch.chunk, "LANES": launch.lanes}
    options = {"num_warps": launch.lanes // 32, "enable_fp_fusion": True}
    return Variant.create(kernel, constants, arguments, options)
