"""Leaving a saddle, by the real optimizers: f(x, y) = x^2 - y^2, on which SAM is known to stay.

The function is that of Kim et al., "Stability analysis of sharpness-aware minimization"
(arXiv 2301.06308). A minibatch is modelled by a random linear term, drawn anew at each step and
the same in both of its passes. With e = r g, where r is rho / ||g|| for SAM and rho for USAM, the
second gradient is

    g~ = ((1 + 2 r) g_x, (1 - 2 r) g_y)

so descent turns back towards the saddle along y wherever r > 1/2: for SAM where ||g|| < 2 rho, so
without noise in the disc of radius rho around the saddle, which it never leaves at a small learning
rate; for USAM everywhere if rho > 1/2, and else it leaves, slower than SGD by the factor 1 - 2 rho
in its rate. SSAM multiplies g~ by a positive number, which changes the speed and cannot turn it
round: without noise SSAM has to stay wherever SAM stays. What it can change is the speed, and with
it the fate under noise.
"""

from __future__ import annotations

import math
import time

import torch
import torch.nn.functional as F

from .study_core import Result, Run
from .study_training import METHODS

LR = 0.05
RADII = (0.05, 0.1, 0.2, 0.4, 0.8)
NOISES = (0.0, 0.1, 0.3)  # standard deviation of each component of the random linear term
STARTS = 5
START_DISTANCE = 0.01  # from the saddle, in a random direction
STEPS = 1000  # about 15 times what SGD needs
LEFT = 1.0  # |y| that counts as having left
PAIRS = (("sam", "ssam"), ("usam", "ssam-usam"))  # a method, and SSAM on its ascent


def make_runs() -> list[Run]:
    runs = []
    for noise in NOISES:
        cells = [("sgd", {"lr": LR, "gradient_noise": noise})]
        for method in (name for pair in PAIRS for name in pair):
            cells += [(method, {"lr": LR, "gradient_noise": noise, "rho": r}) for r in RADII]
        runs += [
            Run(method, settings, start, epochs=0, data="saddle")
            for method, settings in cells
            for start in range(STARTS)
        ]
    return runs


def descend(run: Run) -> Result:
    """Step until |y| exceeds LEFT; ``steps_to_leave`` is STEPS where it stays."""
    settings = dict(run.settings)
    noise = settings.pop("gradient_noise")
    generator = torch.Generator().manual_seed(run.seed)
    direction = torch.randn(2, generator=generator, dtype=torch.float64)
    w = (START_DISTANCE * F.normalize(direction, dim=0)).requires_grad_()
    optimizer = METHODS[run.method]([w], **settings)
    began = time.perf_counter()
    steps = 0
    while steps < STEPS and abs(w[1].item()) <= LEFT:
        tilt = noise * torch.randn(2, generator=generator, dtype=torch.float64)

        def closure(tilt: torch.Tensor = tilt) -> torch.Tensor:
            optimizer.zero_grad()
            loss = w[0] ** 2 - w[1] ** 2 + tilt @ w
            loss.backward()
            return loss

        optimizer.step(closure)
        steps += 1
    y = w[1].item()
    left = abs(y) > LEFT
    return Result(
        run,
        {"steps_to_leave": steps, "left": int(left)},
        diverged=not math.isfinite(y),
        seconds=time.perf_counter() - began,
    )


def stays(results: list[Result]) -> bool:
    """Whether at least half of the starts have not left within STEPS."""
    return 2 * sum(r.measured["left"] for r in results) <= len(results)
