"""Trajectories of the methods whose authors' code is public: numpy and float64, from the equations.

Nothing here is the library's, but for the numbers that stand in the place of random ones
(``oracle_noise``, and ESAM's choice): those are what it documents. As a script this writes
``tests/methods/trajectories.json``, which ``test_authors.py`` compares the library with.

What the authors' code does otherwise than the equations, where that was found by reading it:

- ASAM, SAM-ON: 1e-16 is added to the norm. A weight that is perturbed and has no second gradient
  stays where it was perturbed to. SAM-ON finds its layers by their names.
- GSAM: the cosine has 1e-12 in its denominator, and the projection once more.
- WSAM: each of both gradients is clipped to a norm of 1, unless told otherwise; gamma is 0.88.
- LookSAM (no authors' code; the one that is used): norms of each tensor, not of all.
- MSAM: weights rest perturbed between steps, so L2 decay is that of perturbed weights; AdamW decays
  after its update, not before. Both are here a second time, as theirs.
- bSAM: a batch may be cut in parts with a perturbation each; it is not, here.
- Trace-, Det-, Frob-SAM: as the equations. What is named after a sphere draws from N(0, 1).
- ESAM: draws at the end of a step which tensors get no first gradient in the next, so that all take
  part in the first; and of the chosen samples the last one is left out, as its loss is not above
  itself. 1e-7 is added to the norm.
- VaSSO: as the equations, with 1e-7.

Functional-SAM's code was not found: its equation is the paper's.
"""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

import oracle_noise
from oracle_noise import GOLDEN, scrambled

Arrays = list[np.ndarray]
FILE = Path(__file__).resolve().parents[1] / "methods" / "trajectories.json"
STEPS = 10
#: Four samples of two numbers, and their classes. The network is ``out . tanh(weight x + bias)``,
#: the loss the logistic one.
X = np.array([[1.0, -0.5], [0.3, 0.8], [-1.2, 0.4], [0.5, 1.5]])
Y = np.array([1.0, -1.0, 1.0, -1.0])
#: weight, bias, out.
START = [[[0.5, -0.3], [0.8, 0.2]], [0.1, -0.2], [0.7, -0.4]]
LR, MOMENTUM = 0.5, 0.9


def start() -> Arrays:
    return [np.array(w, dtype=np.float64) for w in START]


def outputs(ws: Arrays, rows: slice | list[int] = slice(None)) -> np.ndarray:
    weight, bias, out = ws
    return np.tanh(X[rows] @ weight.T + bias) @ out


def losses(ws: Arrays) -> np.ndarray:
    return np.logaddexp(0, -Y * outputs(ws))


def slopes(ws: Arrays, rows: slice | list[int] = slice(None)) -> np.ndarray:
    """The mean loss's derivative by each output."""
    y = Y[rows]
    return -y / (1 + np.exp(y * outputs(ws, rows))) / len(y)


def backward(ws: Arrays, r: np.ndarray, rows: slice | list[int] = slice(None)) -> Arrays:
    """The gradient of the sum of ``r_j F_j``."""
    weight, bias, out = ws
    hidden = np.tanh(X[rows] @ weight.T + bias)
    inside = r[:, None] * out * (1 - hidden**2)
    return [inside.T @ X[rows], inside.sum(0), hidden.T @ r]


def gradient(ws: Arrays, rows: slice | list[int] = slice(None)) -> Arrays:
    return backward(ws, slopes(ws, rows), rows)


def norm(gs: Arrays) -> float:
    return float(np.sqrt(sum((g**2).sum() for g in gs)))


def dot(a: Arrays, b: Arrays) -> float:
    return float(sum((x * y).sum() for x, y in zip(a, b, strict=True)))


def plus(a: Arrays, b: Arrays, scale: float = 1.0) -> Arrays:
    return [x + scale * y for x, y in zip(a, b, strict=True)]


def times(a: Arrays, scale: float) -> Arrays:
    return [scale * x for x in a]


class Sgd:
    """With momentum, whose buffer starts as the first gradient."""

    def __init__(self, decay: float = 0.0):
        self.decay, self.buffers = decay, None

    def step(self, ws: Arrays, us: Arrays) -> Arrays:
        us = plus(us, ws, self.decay)
        self.buffers = us if self.buffers is None else plus(us, self.buffers, MOMENTUM)
        return plus(ws, self.buffers, -LR)


Step = Callable[[Arrays, int], Arrays]


def follow(step: Step) -> list[Arrays]:
    """The weights after each step, of which ``step`` computes one."""
    ws, found = start(), []
    for t in range(STEPS):
        ws = step(ws, t)
        found.append(ws)
    return found


def takes_part(place: int, beta: float, step: int) -> bool:
    """The library's choice in the place of the authors' random number, of 24 bits."""
    key = int(scrambled(int(scrambled(0)) ^ place * GOLDEN % 2**32)) ^ 0x5BD1E995
    bits = int(scrambled(key ^ int(scrambled(step)))) >> 8
    return bits / 2**24 < float(np.float32(beta))


# --- the methods ---


def sam_like(direction: Callable[[Arrays, Arrays, int], Arrays]) -> list[Arrays]:
    """Those whose update takes the second gradient; ``direction`` gives the perturbation."""
    base = Sgd()
    return follow(lambda ws, t: base.step(ws, gradient(plus(ws, direction(ws, gradient(ws), t)))))


def asam() -> list[Arrays]:
    def direction(ws: Arrays, gs: Arrays, t: int) -> Arrays:
        scales = [np.abs(w) + 0.01 if k != 1 else np.ones_like(w) for k, w in enumerate(ws)]
        tg = [s * g for s, g in zip(scales, gs, strict=True)]
        return [0.5 * s * x / (norm(tg) + 1e-16) for s, x in zip(scales, tg, strict=True)]

    return sam_like(direction)


def sam_on() -> list[Arrays]:
    """Of the bias and ``out``, as if they were the normalization's."""

    def direction(ws: Arrays, gs: Arrays, t: int) -> Arrays:
        n = norm(gs[1:]) + 1e-16
        return [0 * gs[0], 0.5 * gs[1] / n, 0.5 * gs[2] / n]

    return sam_like(direction)


def vasso() -> list[Arrays]:
    held: list[Arrays] = []

    def direction(ws: Arrays, gs: Arrays, t: int) -> Arrays:
        held[:] = [plus(times(held[0], 0.6), gs, 0.4) if held else gs]
        return times(held[0], 0.2 / (norm(held[0]) + 1e-7))

    return sam_like(direction)


def friendly() -> list[Arrays]:
    held: list[Arrays] = []

    def direction(ws: Arrays, gs: Arrays, t: int) -> Arrays:
        d = plus(gs, held[0], -1.0) if held else gs
        held[:] = [plus(times(held[0], 0.9), gs, 1 - 0.9) if held else gs]
        return times(d, 0.2 / (norm(d) + 1e-12))

    return sam_like(direction)


def both(mix: Callable[[Arrays, Arrays], Arrays]) -> list[Arrays]:
    """SAM's two gradients, mixed."""
    base = Sgd()

    def step(ws: Arrays, t: int) -> Arrays:
        gs = gradient(ws)
        second = gradient(plus(ws, gs, 0.2 / (norm(gs) + 1e-12)))
        return base.step(ws, mix(gs, second))

    return follow(step)


def gsam() -> list[Arrays]:
    def mix(gs: Arrays, second: Arrays) -> Arrays:
        vertical = plus(gs, second, -dot(gs, second) / norm(second) ** 2)
        return plus(second, vertical, -0.4)

    return both(mix)


def wsam_coupled() -> list[Arrays]:
    weight = 0.8 / (1 - 0.8)
    return both(lambda gs, second: plus(times(second, weight), gs, 1 - weight))


def wsam() -> list[Arrays]:
    base, weight = Sgd(), 0.8 / (1 - 0.8)

    def step(ws: Arrays, t: int) -> Arrays:
        gs = gradient(ws)
        second = gradient(plus(ws, gs, 0.2 / (norm(gs) + 1e-12)))
        return plus(base.step(ws, gs), plus(second, gs, -1.0), -LR * weight)

    return follow(step)


def looksam(by_tensor: bool = False) -> list[Arrays]:
    """SAM every third step; its norms over all tensors, or of each."""
    base, held = Sgd(), []

    def parts(xs: Arrays) -> list[Arrays]:
        return [[x] for x in xs] if by_tensor else [xs]

    def step(ws: Arrays, t: int) -> Arrays:
        gs = gradient(ws)
        if t % 3 == 0:
            second = gradient(plus(ws, gs, 0.2 / (norm(gs) + 1e-12)))
            held[:] = [
                plus(s, g, -dot(g, s) / norm(g) ** 2)
                for g, s in zip(parts(gs), parts(second), strict=True)
            ]
            return base.step(ws, second)
        us = [
            x for g, v in zip(parts(gs), held, strict=True)
            for x in plus(g, v, 0.7 * norm(g) / norm(v))
        ]  # fmt: skip
        return base.step(ws, us)

    return follow(step)


def msam(decay: float = 0.0, theirs: bool = False) -> list[Arrays]:
    base = Sgd(decay)

    def step(ws: Arrays, t: int) -> Arrays:
        perturbed = ws
        if base.buffers is not None:
            perturbed = plus(ws, base.buffers, -0.3 / (norm(base.buffers) + 1e-12))
        gs = gradient(perturbed)
        if theirs:  # L2 of the perturbed weights
            gs = plus(gs, plus(perturbed, ws, -1.0), decay)
        return base.step(ws, gs)

    return follow(step)


def msam_adamw(theirs: bool = False) -> list[Arrays]:
    b1, b2, lr, decay = 0.9, 0.99, 0.05, 0.1
    m, v = ([0 * w for w in start()] for _ in range(2))

    def step(ws: Arrays, t: int) -> Arrays:
        nonlocal m, v
        gs = gradient(plus(ws, m, -0.3 / norm(m)) if t else ws)
        m = plus(times(m, b1), gs, 1 - b1)
        v = plus(times(v, b2), [g**2 for g in gs], 1 - b2)
        one, two = 1 - b1 ** (t + 1), 1 - b2 ** (t + 1)
        change = [lr * x / one / (np.sqrt(y / two) + 1e-8) for x, y in zip(m, v, strict=True)]
        if theirs:
            return times(plus(ws, change, -1.0), 1 - lr * decay)
        return plus(times(ws, 1 - lr * decay), change, -1.0)

    return follow(step)


def bsam() -> list[Arrays]:
    n, prior, b1, b2, damping, rho, lr = 50.0, 2.0 / 50.0, 0.8, 0.9, 0.2, 0.1, 0.3
    m, s = [0 * w for w in start()], [np.ones_like(w) for w in start()]

    def step(ws: Arrays, t: int) -> Arrays:
        nonlocal m, s
        zs = [oracle_noise.normal(0, k, t, 0, w.shape) for k, w in enumerate(ws)]
        gs = gradient([w + z / np.sqrt(n * x) for w, z, x in zip(ws, zs, s, strict=True)])
        second = gradient([w + rho * g / x for w, g, x in zip(ws, gs, s, strict=True)])
        m = plus(times(m, b1), plus(second, ws, prior), 1 - b1)
        ws = [w - lr * x / y for w, x, y in zip(ws, m, s, strict=True)]
        size = [np.sqrt(x) * np.abs(g) + damping + prior for g, x in zip(gs, s, strict=True)]
        s = plus(times(s, b2), size, 1 - b2)
        return ws

    return follow(step)


def universal(kind: str) -> list[Arrays]:
    settings = {"trace": (1, 0.1, 0.7), "det": (2, 1.0, 0.5), "frob": (2, 0.1, 0.02)}
    count, rho, weight = settings[kind]
    base = Sgd()

    def step(ws: Arrays, t: int) -> Arrays:
        g, at_w = gradient(ws), losses(ws).mean()
        gs, xs = [], []
        for sample in range(count):
            if kind == "det":  # uniform in (-h, h)
                vs = [0.2 * oracle_noise.uniform(0, k, t, sample, w.shape)
                      for k, w in enumerate(ws)]  # fmt: skip
            else:
                vs = [oracle_noise.normal(0, k, t, sample, w.shape) for k, w in enumerate(ws)]
            there = plus(ws, vs, rho)
            gs.append(gradient(there))
            xs.append((losses(there).mean() - at_w) / rho**2)
        if kind == "trace":
            return base.step(ws, plus(g, plus(gs[0], g, -1.0), weight))
        if kind == "frob":
            return base.step(ws, plus(g, plus(gs[0], gs[1], -1.0), weight / 2 * (xs[0] - xs[1])))
        mean = np.mean([np.exp(-x / 2) for x in xs])
        u = g  # phi' = -2 m^-3, psi' = -exp(-x / 2) / 2
        for x, gi in zip(xs, gs, strict=True):
            u = plus(u, plus(gi, g, -1.0), weight * mean**-3 * np.exp(-x / 2) / count)
        return base.step(ws, u)

    return follow(step)


def functional() -> list[Arrays]:
    base = Sgd()

    def step(ws: Arrays, t: int) -> Arrays:
        gs = gradient(ws)
        perturbed = plus(ws, gs, 0.4 / (norm(gs) + 1e-12))
        return base.step(ws, backward(perturbed, slopes(ws)))

    return follow(step)


def esam(theirs: bool = False) -> list[Arrays]:
    """Each tensor with a probability of 0.6, and the three samples of four that rise most."""
    base = Sgd()

    def step(ws: Arrays, t: int) -> Arrays:
        gs = gradient(ws)
        chosen = [g if takes_part(k, 0.6, t) else 0 * g for k, g in enumerate(gs)]
        eps = 1e-7 if theirs else 1e-12
        perturbed = plus(ws, chosen, 0.2 / 0.6 / (norm(chosen) + eps))
        rises = losses(perturbed) - losses(ws)
        rows = sorted(np.argsort(rises)[-2 if theirs else -3 :].tolist())
        return base.step(ws, gradient(perturbed, rows))

    return follow(step)


TRAJECTORIES: dict[str, Callable[[], list[Arrays]]] = {
    "asam": asam,
    "sam-on": sam_on,
    "vasso": vasso,
    "friendly": friendly,
    "gsam": gsam,
    "wsam": wsam,
    "wsam-coupled": wsam_coupled,
    "looksam": looksam,
    "looksam, theirs": lambda: looksam(by_tensor=True),
    "msam": msam,
    "msam-decay": lambda: msam(0.05),
    "msam-decay, theirs": lambda: msam(0.05, theirs=True),
    "msam-adamw": msam_adamw,
    "msam-adamw, theirs": lambda: msam_adamw(theirs=True),
    "bsam": bsam,
    "trace": lambda: universal("trace"),
    "det": lambda: universal("det"),
    "frob": lambda: universal("frob"),
    "functional": functional,
    "esam": esam,
    "esam, theirs": lambda: esam(theirs=True),
}


def recomputed(name: str) -> list[list[float]]:
    """The weights after each step, end to end."""
    return [np.concatenate([w.ravel() for w in ws]).tolist() for ws in TRAJECTORIES[name]()]


def main() -> None:
    """Write the numbers, with twelve digits: a line for each step."""
    parts = []
    for name in TRAJECTORIES:
        lines = ["    [" + ", ".join(f"{x:.12g}" for x in ws) + "]" for ws in recomputed(name)]
        parts.append(f"  {json.dumps(name)}: [\n" + ",\n".join(lines) + "\n  ]")
    FILE.write_text("{\n" + ",\n".join(parts) + "\n}\n")


if __name__ == "__main__":
    main()
