"""Stages that time whole steps: against peers, and in a CUDA graph."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import fastsam

from .clock import Clock
from .problems import release
from .stages import Context
from speed.contenders import (
    METHODS,
    SETS,
    Contender,
    Problem,
    compiled_contender,
    copy_contender,
    count,
    fastsam_contender,
    parameter_set,
    peer_contenders,
)
from speed.measure import alternate

#: Smallest first: where the time runs out, most is there.
BY_SIZE = sorted(SETS, key=lambda name: count(SETS[name]))
ROUNDS, TIMES = 5, 10
REPLAYS = 200


class SeededProblem(Problem):
    """A problem whose numbers come from torch's own generator.

    The stand-in for a GPU, on which this is rehearsed, has no others.
    """

    def _random(self, stream: int) -> list[torch.Tensor]:
        torch.manual_seed(2 * self.seed + stream)
        return [torch.randn(shape, device=self.device) for shape in self.shapes]


def peers(context: Context) -> None:
    """SAM on every set of parameters: fastsam, a copy, published packages, ``torch.compile``."""
    clock = Clock(context.device, context.rehearsal)
    names = ["uniform:2000:5"] if context.rehearsal else BY_SIZE
    rounds, times = (1, 1) if context.rehearsal else (ROUNDS, TIMES)
    for method in ("sam-sgd", "sam-adamw"):
        for name in names:
            release(context.device)
            shapes = parameter_set(name)
            problem = SeededProblem(shapes, context.device)
            floor = METHODS[method].floor(context.device)
            contenders = [fastsam_contender(problem, method), copy_contender(problem, floor)]
            contenders += peer_contenders(problem, method)
            if not context.rehearsal:  # a compiler that takes a minute for a large set
                contenders.append(compiled_contender(problem, method))
            what = {"set": name, "method": method, "tensors": len(shapes),
                    "parameters": count(shapes), "bytes_per_parameter": floor}  # fmt: skip
            able = [c for c in contenders if _runs(c, context, what)]
            found = alternate({c.name: clock.sample(c.step, times) for c in able}, rounds, steps=1)
            for contender in able:
                taken = found[contender.name]
                context.add(
                    **what, contender=contender.name, seconds=taken.median, lower=taken.lower,
                    upper=taken.upper, wall=_wall(contender.step, 2 if context.rehearsal else 20),
                )  # fmt: skip
            context.say(f"{name}: {METHODS[method].label}")


def _runs(contender: Contender, context: Context, what: dict[str, Any]) -> bool:
    """Whether a step of it works here; why not is among the results.

    Raises:
        Exception: What the step does, where it is fastsam's or the copy.
    """
    try:
        contender.step()
    except Exception as error:
        if contender.name == "fastsam" or contender.name.startswith("copy"):
            raise
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        context.add(**what, contender=contender.name, failed=why)
        context.say(f"{contender.name} was left out: {why}")
        return False
    return True


def _wall(step: Callable[[], Any], times: int) -> float:
    """Seconds of a step by the wall clock, in a loop that does nothing else."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(times):
        step()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / times


def graphs(context: Context) -> None:
    """Steps at ResNet-50's shapes, one by one and as replays, and whether both give the same bits.

    The closure has no network: it gives the parameters gradients that are there.

    Raises:
        RuntimeError: If the weights differ.
    """
    shapes = parameter_set("uniform:2000:5" if context.rehearsal else "resnet50")
    replays = 3 if context.rehearsal else REPLAYS
    for name, base in (("SAM + SGD", torch.optim.SGD), ("SAM + AdamW", torch.optim.AdamW)):
        problem = SeededProblem(shapes, context.device)
        weights = {}
        for way in ("eager", "graph"):
            params = problem.params()
            step = _stepper(params, problem.grads, base, graph=way == "graph")
            for _ in range(5):
                step()
            times = [_wall(step, replays) for _ in range(5)]
            weights[way] = [param.detach().clone() for param in params]
            context.add(
                method=name, way=way, tensors=len(shapes), parameters=count(shapes),
                wall=statistics.median(times), lower=min(times), upper=max(times),
            )  # fmt: skip
        same = all(map(torch.equal, weights["eager"], weights["graph"]))
        context.add(method=name, way="comparison", equal=same)
        context.say(f"{name}: weights are {'equal' if same else 'DIFFERENT'}")
        if not same:
            raise RuntimeError(f"replays of {name} give other weights than steps")


def _stepper(
    params: list[nn.Parameter], grads: list[torch.Tensor], base: Any, graph: bool
) -> Callable[[], Any]:
    momentum = {"momentum": 0.9} if base is torch.optim.SGD else {}
    optimizer = fastsam.SAM(params, base, lr=1e-3, backend="triton", **momentum)
    loss = torch.zeros((), device=params[0].device)

    def closure() -> torch.Tensor:
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        return loss

    if graph:
        return fastsam.graphed(optimizer, closure)
    return lambda: optimizer.step(closure)
