"""Bytes and launches of a whole step, counted in Triton's interpreter (``-s`` prints them)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from math import prod
from typing import Any

import pytest
import torch
import triton

import fastsam
from fastsam.kernels.layout import CHUNK

import launches
from registry import FixedLoss

pytestmark = pytest.mark.skipif(
    not triton.knobs.runtime.interpret, reason="counts in Triton's interpreter, not on a GPU"
)

#: Convolutions, normalisations and a classifier, as in a small ResNet.
SHAPES = [
    (64, 3, 7, 7), (64,), (64,), (64, 64, 3, 3), (64,), (128, 64, 3, 3), (128,), (128,),
    (128, 128, 3, 3), (256, 128, 3, 3), (256,), (256, 256, 1, 1), (1000, 512), (1000,),
]  # fmt: skip
#: Cases that are counted on all of them.
WHOLE = ("SAM + SGD",)
SGD = (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4})
ADAMW = (torch.optim.AdamW, {"lr": 1e-3, "weight_decay": 0.1})
STEP = ["reduce_kernel", "perturb_kernel", "update_kernel"]
TWO_NORMS = ["reduce_kernel", "perturb_kernel", "reduce_kernel", "update_kernel"]
NO_NORM = ["perturb_kernel", "update_kernel"]


@dataclass(frozen=True)
class Case:
    """A method with a base optimizer, the kernels of one step, and its least bytes per element."""

    method: type
    base: tuple[type, dict[str, Any]] | None = SGD
    kwargs: dict[str, Any] = field(default_factory=dict)
    kernels: list[str] = field(default_factory=lambda: STEP)
    floor: int = 40
    counters: int = 0  # what torch's operators may move besides, in bytes

    def build(self, groups: Sequence[dict[str, Any]]) -> torch.optim.Optimizer:
        base, kwargs = self.base or (None, {})
        bases = () if base is None else (base,)
        return self.method(groups, *bases, backend="triton", **kwargs, **self.kwargs)


LIGHT = {"lr": 0.1, "rho": 0.1}
TREND = {"rule": fastsam.SharpnessTrend()}
PRECONDITIONED = {"preconditioned": True, "by_hand": True}
CASES = {
    "SAM + SGD": Case(fastsam.SAM),
    "SAM + AdamW": Case(fastsam.SAM, ADAMW, floor=48),
    "SSAM + SGD": Case(fastsam.SSAM, kernels=TWO_NORMS, floor=44),
    "ASAM + SGD": Case(fastsam.ASAM, floor=44),
    # I: g | w, g, backup, w | g~ | backup, g~, w; II and III instead of the norms read and write
    # their state: a | b, and r, a | m, v
    "LightSAM I": Case(fastsam.LightSAM, None, LIGHT | {"rule": "adagrad_norm"}, TWO_NORMS, 36),
    "LightSAM II": Case(fastsam.LightSAM, None, LIGHT | {"rule": "adagrad"}, NO_NORM, 44),
    "LightSAM III": Case(fastsam.LightSAM, None, LIGHT, NO_NORM, 60),
    "AdaSAM": Case(fastsam.AdaSAM, None, LIGHT, floor=56),
    "VaSSO + SGD": Case(fastsam.VaSSO, floor=52),  # SAM's, and s: read, read, written
    "GSAM + SGD": Case(fastsam.GSAM, kernels=TWO_NORMS, floor=52),  # as SAMAR
    # the weights of the mixture are known when the update begins: g, read once more
    "WSAM + SGD": Case(fastsam.WSAM, floor=44),
    "LESAM + SGD": Case(fastsam.LESAM),
    "FriendlySAM + SGD": Case(fastsam.FriendlySAM, floor=52),  # as VaSSO
    # w, g~, g, v; v is written to where g was
    "LookSAM + SGD": Case(fastsam.LookSAM, kernels=TWO_NORMS, floor=56),
    # v instead of g, whose norm the update has left
    "MSAM + SGD": Case(fastsam.MSAM, kernels=NO_NORM, floor=36),
    "SAMAR + SGD": Case(fastsam.SAMAR, kernels=TWO_NORMS, floor=52),  # SAM's; g~ and g, and g again
    # SAM's without momentum, and both gradients once more
    "SAMSPS": Case(FixedLoss, None, {}, TWO_NORMS),
    # SAM's, and the variance: read, read, written; and the mean: read, written
    "PreconditionedSAM + SGD": Case(fastsam.PreconditionedSAM, floor=60),
    # w, backup, w | backup, g~, g, w, and the momentum: no gradient is read for the perturbation
    "TraceSAM + SGD": Case(fastsam.TraceSAM, kernels=NO_NORM, floor=36, counters=64),
    # SAM's on AdamW, and v twice
    "FunctionalSAM + AdamW": Case(fastsam.FunctionalSAM, ADAMW, PRECONDITIONED, floor=56),
}
#: In bfloat16 with half the bytes; the others keep state in float32.
HALVED = ["SAM + SGD", "SAM + AdamW", "SSAM + SGD", "ASAM + SGD", "LightSAM I", "SAMAR + SGD",
          "TraceSAM + SGD", "FunctionalSAM + AdamW"]  # fmt: skip
OTHER_CASES = {
    "USAM + SGD": Case(fastsam.USAM),
    "ASAM + SGD, p=inf": Case(fastsam.ASAM, SGD, {"p": float("inf")}, NO_NORM, 36),
    # all take part
    "ESAM + SGD": Case(fastsam.ESAM, SGD, {"beta": 1.0}),
    "UnifiedSAM + AdamW": Case(fastsam.UnifiedSAM, ADAMW, {"lam": "1/t"}, floor=48),
    "SAM + SGD, clipped": Case(fastsam.SAM, SGD, {"max_grad_norm": 1.0}, TWO_NORMS, 44),
    "SAM + SGD, skipping": Case(fastsam.SAM, SGD, {"skip_nonfinite": True}, TWO_NORMS, 44),
    # the state that a rejected step would need is looked at only then
    "VaSSO + SGD, skipping": Case(fastsam.VaSSO, SGD, {"skip_nonfinite": True}, TWO_NORMS, 56),
    "adaptive SAMAR + AdamW": Case(fastsam.SAMAR, ADAMW, {"adaptive": True}, TWO_NORMS, 68),
    "LightSAM III, clipped": Case(
        fastsam.LightSAM, None, LIGHT | {"max_grad_norm": 1.0}, NO_NORM[:1] + TWO_NORMS[2:], 64
    ),
    "WSAM + SGD, clipped": Case(fastsam.WSAM, SGD, {"max_grad_norm": 1.0}, TWO_NORMS, 52),
    "WSAM + AdamW, coupled": Case(fastsam.WSAM, ADAMW, {"decouple": False}, floor=52),
    "TraceSAM + SGD, clipped": Case(
        fastsam.TraceSAM, SGD, {"max_grad_norm": 1.0}, [*NO_NORM[:1], *TWO_NORMS[2:]], 44, 64
    ),
    "GNP + SGD": Case(fastsam.GNP, floor=44),
    "SAMAR by its trend": Case(fastsam.SAMAR, SGD, TREND, TWO_NORMS, 52),
    "SAM + SGD, amplified": Case(fastsam.SAM, SGD, {"amplify": 0.5}, floor=44),
    "MSAM + AdamW": Case(fastsam.MSAM, ADAMW, kernels=NO_NORM, floor=44),
    "GNP + SGD, unit": Case(fastsam.GNP, SGD, {"unit": True}, TWO_NORMS, 52),
    "PreconditionedSAM + AdamW": Case(
        fastsam.PreconditionedSAM,
        ADAMW,
        {"preconditioner": "second_moment", "form": "constraint"},
        floor=56,
    ),
    # the norm is that of g, which the reduction has; v is read once
    "FunctionalSAM + AdamW, not normalized": Case(
        fastsam.FunctionalSAM, ADAMW, PRECONDITIONED | {"normalize": False}, floor=52
    ),
    "SAM + AdaGradNorm": Case(fastsam.SAM, (fastsam.AdaGradNorm, {}), {}, TWO_NORMS, 36),
    # the clipped norm is that of u, the renormalised one that of T u
    "adaptive SSAM + SGD, clipped": Case(
        fastsam.SSAM, SGD, {"adaptive": True, "max_grad_norm": 1.0}, TWO_NORMS, 52
    ),
}


def parameters(shapes: Sequence[tuple[int, ...]], dtype=torch.float32) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.ones(shape, dtype=dtype)) for shape in shapes]


def gradients(params: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Of one pass after the other, made before anything is counted."""
    return iter([[torch.rand_like(p).sub_(0.5) for p in params] for _ in range(8)])


def give(params: Sequence[torch.Tensor], grads: list[torch.Tensor]) -> None:
    """As a backward pass does: nobody else has them."""
    for param in reversed(params):
        param.grad = grads.pop()


def count_step(case: Case, groups: Sequence[dict[str, Any]], execute: bool = True) -> launches.Log:
    """Record the second step, or the third: state and tables are as in a training loop."""
    optimizer = case.build(groups)
    params = [p for group in groups for p in group["params"]]
    grads = gradients(params)
    # the warm-up needs no values, and the interpreter's time is in the programs; MSAM's first step
    # perturbs nothing, and its second cannot know the norm of what is filled in below
    without = [False] * (2 if issubclass(case.method, fastsam.MSAM) else 1)
    for i, execute_now in enumerate((*without, execute)):
        with launches.record(execute_now) as log:
            firsts = [optimizer.first_step] * optimizer.ascent_steps
            for one_pass in (*firsts, optimizer.second_step):
                give(params, next(grads))
                one_pass(zero_grad=True)
        if i == 0:  # what was left out has not written to the state
            for x in chain.from_iterable(state.values() for state in optimizer.state.values()):
                x.fill_(1)
    return log


@pytest.mark.parametrize(
    ("hessian", "adaptive", "floor"),
    [("difference", False, 16), ("diag", False, 16), ("diag", True, 20)],
)
def test_lets_adds_one_reduction(hessian, adaptive, floor):
    """Of g, g~ and both gradients at the updated weights; T needs the old weights as well."""
    params = parameters([(256, 128), (1024,)])
    inner = fastsam.SAM(params, *SGD[:1], adaptive=adaptive, backend="triton", **SGD[1])
    lets = fastsam.LETS(inner, hessian=hessian, rho_optimizer=torch.optim.SGD)
    grads = iter([[torch.rand_like(p).sub_(0.5) for p in params] for _ in range(8)])

    def closure():
        give(params, next(grads))
        return 0.0

    for execute in (False, True):
        with launches.record(execute) as log:
            lets.step(closure, closure)
    assert log.kernels == [*STEP, "reduce_kernel"]
    last = log.launches[-1]
    traffic = (last.loaded + last.stored) / (256 * 128 + 1024)
    print(f"\nLETS, {hessian}{', adaptive' * adaptive}: {traffic:.2f} B per element")
    assert floor <= traffic <= floor + 0.5


def check_traffic(
    name: str, log: launches.Log, case: Case, floor: float, elements: int, counters: int = 0
) -> None:
    """``counters`` is what torch's operators may move besides the case's, in bytes."""
    traffic = (log.loaded + log.stored) / elements
    passes = " + ".join(f"{(x.loaded + x.stored) / elements:.2f}" for x in log.launches)
    print(f"\n{name}: {traffic:.2f} B per element ({passes}), {len(log.launches)} launches")
    assert log.kernels == case.kernels
    assert floor <= traffic <= floor + 0.5  # what is above: tables, a row of numbers per program
    assert log.copied <= counters + case.counters


def test_traffic_of_steps_that_reuse():
    """LookSAM's others: g | w, g, v, momentum; the first of them reads v once more, by itself."""
    params = parameters([(256, 128), (1024,)])
    optimizer = CASES["LookSAM + SGD"].build([{"params": params}])
    grads, logs = gradients(params), []
    for one_pass in (optimizer.first_step, optimizer.second_step, *[optimizer.plain_step] * 3):
        with launches.record() as log:
            give(params, next(grads))
            one_pass(zero_grad=True)
        logs.append(log)
    first, *others = logs[2:]
    assert first.kernels == ["reduce_kernel", "reduce_kernel", "update_kernel"]
    assert [log.kernels for log in others] == [["reduce_kernel", "update_kernel"]] * 2
    traffic = [(log.loaded + log.stored) / (256 * 128 + 1024) for log in (first, *others)]
    print(f"\nLookSAM, reusing: {' and '.join(f'{x:.2f}' for x in traffic)} B per element")
    assert 32 <= traffic[0] <= 32.5 and all(28 <= x <= 28.5 for x in traffic[1:])
    assert not any(log.copied for log in others)


def test_traffic_along_the_last_gradient():
    """MSAM's, and a copy of the gradient by torch."""
    case, elements = Case(fastsam.DelayedSAM), 256 * 128 + 1024
    log = count_step(case, [{"params": parameters([(256, 128), (1024,)])}])
    # where a copy goes counts twice: as an argument, and as what is written
    check_traffic("DelayedSAM + SGD", log, case, 40, elements, counters=12 * elements)


@pytest.mark.parametrize("name", CASES)
def test_traffic(name):
    case = CASES[name]
    # a million elements take the interpreter nine seconds, and a tenth of them move as many each
    params = parameters(SHAPES if name in WHOLE else SHAPES[:6])
    elements = sum(p.numel() for p in params)
    assert elements >= (1_000_000 if name in WHOLE else 100_000)
    log = count_step(case, [{"params": params}])
    # a number on the device; a loss from the host
    kept = {fastsam.PreconditionedSAM: 24, FixedLoss: 32}.get(case.method, 0)
    check_traffic(name, log, case, case.floor, elements, kept)


def test_traffic_of_a_preconditioner_of_ones_own():
    """What the function gave is read twice; torch makes it, copies it and nothing else. So it is
    with ASAM's layer-wise scale."""
    given = {"preconditioner": lambda g, state: g}
    case, elements = Case(fastsam.PreconditionedSAM, SGD, given), 256 * 128 + 1024
    log = count_step(case, [{"params": parameters([(256, 128), (1024,)])}])
    check_traffic("PreconditionedSAM, a function", log, case, 48, elements, counters=24 * elements)
    case = Case(fastsam.ASAM, SGD, {"form": "layerwise"})
    log = count_step(case, [{"params": parameters([(256, 128), (1024,)])}])
    numbers = 512  # of each layer, and of the step
    check_traffic("ASAM, layer-wise", log, case, 48, elements, counters=12 * elements + numbers)


@pytest.mark.parametrize("name", OTHER_CASES)
def test_traffic_of_other_methods(name):
    case = OTHER_CASES[name]
    log = count_step(case, [{"params": parameters([(256, 128), (1024,)])}])
    counted = 16 if case.method is fastsam.ESAM else 0  # steps, on the device
    check_traffic(name, log, case, case.floor, 256 * 128 + 1024, counted)


#: A further ascent: g | w, g, w; the weights are copied by the first alone.
ASCENTS = {
    "SAM + SGD, three ascents": Case(
        fastsam.SAM, SGD, {"ascent_steps": 3}, STEP[:2] * 3 + STEP[2:], 40 + 2 * 16
    ),
    "ASAM + AdamW, two ascents": Case(
        fastsam.ASAM, ADAMW, {"ascent_steps": 2}, STEP[:2] * 2 + STEP[2:], 52 + 20
    ),
}


@pytest.mark.parametrize("name", ASCENTS)
def test_traffic_of_several_ascents(name):
    case = ASCENTS[name]
    log = count_step(case, [{"params": parameters([(256, 128), (1024,)])}])
    # each further one keeps the first norm, on the device
    further = 40 * (case.kwargs["ascent_steps"] - 1)
    check_traffic(name, log, case, case.floor, 256 * 128 + 1024, counters=further)
    many = [{"params": parameters([(1 + i % 9,) for i in range(50)])} for _ in range(3)]
    assert count_step(case, many, execute=False).kernels == case.kernels


def test_traffic_of_bsam():
    """w, s, backup, w + noise | w, g, s, backup, w + e | backup, g~, g, m, s, w, m, s.

    torch's operators take the noise away again.
    """
    params = parameters([(256, 128), (1024,)])
    optimizer = fastsam.BSAM(params, n=100, backend="triton")
    grads = gradients(params)
    elements = sum(p.numel() for p in params)
    for execute in (False, True):
        with launches.record(execute) as log:
            with optimizer.noise():
                give(params, next(grads))
            optimizer.first_step(zero_grad=True)
            give(params, next(grads))
            optimizer.second_step(zero_grad=True)
        if not execute:  # what was left out has not written to the state
            for x in chain.from_iterable(state.values() for state in optimizer.state.values()):
                x.fill_(1)
    case = Case(fastsam.BSAM, kernels=["perturb_kernel", *NO_NORM], counters=80)
    check_traffic("BSAM", log, case, 68, elements, counters=8 * elements)


@pytest.mark.parametrize("name", HALVED)
@pytest.mark.filterwarnings("ignore:some parameters are float16 or bfloat16")
def test_bf16_moves_half(name):
    case = CASES[name]
    log = count_step(case, [{"params": parameters([(256, 128), (1024,)], torch.bfloat16)}])
    check_traffic(f"{name}, bf16", log, case, case.floor / 2, 256 * 128 + 1024)


MOVES = {"scratch": True}
#: w + e goes to scratch memory, and w to nowhere: one store less.
MOVED = {
    "SAM + SGD": Case(fastsam.SAM, SGD, MOVES, floor=36),
    "SAM + AdamW": Case(fastsam.SAM, ADAMW, MOVES, floor=44),
    "SSAM + SGD": Case(fastsam.SSAM, SGD, MOVES, TWO_NORMS, 40),
    "ASAM + SGD": Case(fastsam.ASAM, SGD, MOVES, floor=40),
    "LightSAM III": Case(fastsam.LightSAM, None, LIGHT | MOVES, NO_NORM, 56),
    "VaSSO + SGD": Case(fastsam.VaSSO, SGD, MOVES, floor=48),
    "SAMAR + SGD": Case(fastsam.SAMAR, SGD, MOVES, TWO_NORMS, 48),
    "SAM + SGD, three ascents": Case(
        fastsam.SAM, SGD, MOVES | {"ascent_steps": 3}, STEP[:2] * 3 + STEP[2:], 36 + 2 * 16
    ),
}


@pytest.mark.parametrize("name", MOVED)
def test_traffic_with_scratch_memory(name):
    case = MOVED[name]
    log = count_step(case, [{"params": parameters([(256, 128), (1024,)])}])
    further = 40 * (case.kwargs.get("ascent_steps", 1) - 1)
    check_traffic(f"{name}, scratch", log, case, case.floor, 256 * 128 + 1024, counters=further)


def test_traffic_where_a_parameter_cannot_move():
    """It is copied, in the same launches."""
    case, params = MOVED["SAM + SGD"], parameters([(256, 128), (256, 128)])
    view = params[0].detach()
    log = count_step(case, [{"params": params}])
    check_traffic("SAM + SGD, one of two in scratch", log, case, 38, 2 * view.numel())


@pytest.mark.filterwarnings("ignore:some parameters are float16 or bfloat16")
def test_bf16_with_scratch_memory():
    case = MOVED["SAM + AdamW"]
    log = count_step(case, [{"params": parameters([(256, 128), (1024,)], torch.bfloat16)}])
    check_traffic("SAM + AdamW, bf16, scratch", log, case, 22, 256 * 128 + 1024)


MASTERS = {"master_weights": True}
#: g | master, w, g, w | master, g, master, w, and state in float32
SIXTEEN_BITS = {
    "SAM + SGD, master weights": Case(fastsam.SAM, SGD, MASTERS, floor=32),
    "SAM + AdamW, master weights": Case(fastsam.SAM, ADAMW, MASTERS, floor=40),
    "ASAM + SGD, master weights": Case(fastsam.ASAM, SGD, MASTERS, floor=38),
    "SAM + SGD, stochastic rounding": Case(fastsam.SAM, SGD, {"rounding": "stochastic"}, floor=20),
}


@pytest.mark.parametrize("name", SIXTEEN_BITS)
def test_traffic_of_bf16_weights(name):
    case = SIXTEEN_BITS[name]
    log = count_step(case, [{"params": parameters([(256, 128), (1024,)], torch.bfloat16)}])
    # the steps that were rounded are counted on the device
    check_traffic(name, log, case, case.floor, 256 * 128 + 1024, counters=64)


@pytest.mark.parametrize("name", CASES | OTHER_CASES)
def test_launches_do_not_grow_with_tensors_and_groups(name):
    case = (CASES | OTHER_CASES)[name]
    few = count_step(case, [{"params": parameters([(3,), (5, 7), (1,)])}], execute=False)
    many = [{"params": parameters([(1 + i % 9,) for i in range(200)])} for _ in range(5)]
    assert sum(len(group["params"]) for group in many) == 1000
    assert few.kernels == count_step(case, many, execute=False).kernels == case.kernels


def test_groups_share_their_launches():
    """Adaptive or not, whatever the radius and the learning rate."""
    settings = [{}, {"adaptive": True, "eta": 0.01}, {"lr": 0.2}, {"rho": 0.1, "momentum": 0.5}]
    groups = [setting | {"params": parameters([(40, 50), (50,)])} for setting in settings]
    log = count_step(CASES["SAM + SGD"], groups)
    assert log.kernels == STEP
    programs = sum(-(-prod(shape) // CHUNK) for shape in ((40, 50), (50,)) * 4)
    assert [launch.grid for launch in log.launches[1:]] == [(programs,)] * 2


def test_copies_by_torch_are_counted():
    """A parameter with gaps cannot be walked in place: its backend copies it there and back."""
    gapped = torch.nn.Parameter(torch.ones(8, 16)[:, ::2])
    log = count_step(CASES["SAM + SGD"], [{"params": [gapped]}])
    assert log.copied > 0
