"""Independent float64 formulas that the library is tested against.

Written from the equations of the papers, one array at a time, with none of the library's code.
Arithmetic is float64 throughout; only what the library stores is rounded to its storage type.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

Array = np.ndarray
Arrays = list[np.ndarray]
Grads = list[np.ndarray | None]
Rounding = Callable[[np.ndarray], np.ndarray]
State = dict[str, Any]
Group = dict[str, Any]

NORM_EPS = 1e-12  # added to a norm before dividing by it
CLIP_EPS = 1e-6  # the same in torch.nn.utils.clip_grad_norm_

# Significand bits (the implicit one included) and the exponent of the smallest normal number.
SINGLE, HALF, BRAIN = (24, -126), (11, -14), (8, -126)
FORMATS = {"float64": (53, -1022), "float32": SINGLE, "float16": HALF, "bfloat16": BRAIN}


def ulp(x: Array | float, dtype: str) -> Array:
    """Return the unit in the last place of |x| in `dtype`, never below its smallest subnormal.

    Above the largest finite number the exponent simply continues; inf and NaN give NaN.
    """
    bits, smallest = FORMATS[dtype]
    x = np.asarray(x, dtype=np.float64)
    _, exponent = np.frexp(x)  # |x| = m * 2**exponent with m in [1/2, 1)
    # frexp gives zero the exponent 0, which would make it look like 1/2.
    exponent = np.where(x == 0, smallest, np.maximum(exponent - 1, smallest))
    return np.where(np.isfinite(x), np.ldexp(1.0, exponent - (bits - 1)), np.nan)


def rounding(dtype: str) -> Rounding:
    """Return a function that rounds float64 values to `dtype`, to nearest, ties to even.

    It rounds once, where torch goes from float64 to the 16-bit types through float32, which can
    make a tie of a value just off one. Infinities, NaN, signed zeros and subnormals follow IEEE.
    """
    bits, smallest = FORMATS[dtype]
    if dtype == "float64":
        return lambda x: np.array(x, dtype=np.float64)
    largest = math.ldexp(2.0 - 2.0 ** (1 - bits), 1 - smallest)

    @np.errstate(over="ignore", invalid="ignore")  # float64's largest; signalling NaN
    def round_to(x: Array) -> Array:
        x = np.asarray(x, dtype=np.float64)
        unit = np.where(np.isfinite(x), ulp(x, dtype), 1.0)
        # The unit is a power of two: rint, which breaks ties to even, is the only rounding.
        rounded = np.rint(x / unit) * unit
        # IEEE 754 gives infinity from half a unit beyond the largest number, and so does this.
        return np.where(np.abs(rounded) > largest, np.copysign(np.inf, rounded), rounded)

    return round_to


# Base updates: (weight, descent direction u, state, hyper-parameters) -> (weight, new state).


def _sgd(w: Array, u: Array, state: State, h: Group) -> tuple[Array, State]:
    """d = u + wd w; buf = mu buf + (1 - damp) d, first buf = d; w -= lr (buf or d + mu buf)."""
    d = u + h["weight_decay"] * w
    if h["momentum"] == 0:
        return w - h["lr"] * d, {}
    old = state.get("momentum_buffer")
    buf = d if old is None else h["momentum"] * old + (1 - h["dampening"]) * d
    direction = d + h["momentum"] * buf if h["nesterov"] else buf
    return w - h["lr"] * direction, {"momentum_buffer": buf}


def _adam(w: Array, u: Array, state: State, h: Group) -> tuple[Array, State]:
    """m = b1 m + (1-b1) d; v = b2 v + (1-b2) d^2; w -= lr m^ / (sqrt(v^) + eps).

    m^ = m / (1 - b1^t), v^ = v / (1 - b2^t). Adam (Kingma & Ba 2015): d = u + wd w. AdamW
    (Loshchilov & Hutter 2019): d = u, and w first decays by lr wd. amsgrad (Reddi et al. 2018)
    has the maximum over t of v in the place of v, and corrects that maximum's bias.
    """
    b1, b2 = h["betas"]
    t = state.get("step", 0) + 1
    d, decayed = u + h["weight_decay"] * w, w
    if h["decoupled_weight_decay"]:
        d, decayed = u, (1 - h["lr"] * h["weight_decay"]) * w
    m = b1 * state.get("exp_avg", 0.0) + (1 - b1) * d
    v = b2 * state.get("exp_avg_sq", 0.0) + (1 - b2) * d * d
    new = {"step": t, "exp_avg": m, "exp_avg_sq": v}
    if h["amsgrad"]:
        v = new["max_exp_avg_sq"] = np.maximum(state.get("max_exp_avg_sq", 0.0), v)
    root = np.sqrt(v / _one_minus_power(b2, t))
    return decayed - h["lr"] * (m / _one_minus_power(b1, t)) / (root + h["eps"]), new


def _one_minus_power(beta: float, t: int) -> float:
    """1 - beta^t without cancellation, which costs three digits at beta = 0.999 and t = 1."""
    return -math.expm1(t * math.log(beta)) if beta > 0 else 1.0


def _adagrad(w: Array, u: Array, state: State, h: Group) -> tuple[Array, State]:
    """Duchi et al. 2011: d = u + wd w; sum += d^2; w -= lr/(1+(t-1)decay) d/(sqrt(sum)+eps)."""
    d = u + h["weight_decay"] * w
    t = state["step"] + 1
    total = state["sum"] + d * d
    lr = h["lr"] / (1 + (t - 1) * h["lr_decay"])
    return w - lr * d / (np.sqrt(total) + h["eps"]), {"step": t, "sum": total}


def _adagrad_norm(w: Array, u: Array, state: State, h: Group) -> tuple[Array, State]:
    """Ward, Wu & Bottou 2019; `Oracle.descend` has divided u by the square root of b2."""
    return w - h["lr"] * u, {}


_SGD = {"lr": 1e-3, "momentum": 0.0, "dampening": 0.0, "nesterov": False, "weight_decay": 0.0}
_ADAM = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "amsgrad": False}
_ADAGRAD = {"lr": 1e-2, "lr_decay": 0.0, "eps": 1e-10, "weight_decay": 0.0}
BASES: dict[str, tuple[Callable[..., tuple[Array, State]], Group]] = {
    "sgd": (_sgd, _SGD),
    "adam": (_adam, _ADAM | {"weight_decay": 0.0, "decoupled_weight_decay": False}),
    "adamw": (_adam, _ADAM | {"weight_decay": 1e-2, "decoupled_weight_decay": True}),
    "adagrad": (_adagrad, _ADAGRAD | {"initial_accumulator_value": 0.0}),
    "adagrad_norm": (_adagrad_norm, {"lr": 1e-2, "initial_accumulator_value": 0.0}),
}


class Oracle:
    """One optimizer over several weights, for the methods that share the Unified SAM ascent.

    Ascent: e = rho (1 - lam_t + lam_t / (n + eps)) T^2 g, n = ||T g|| over all groups,
    T = |w| + eta in adaptive groups, else 1. lam = 1 is SAM (Foret et al. 2021), with T ASAM
    (Kwon et al. 2021); lam = 0 is USAM (Andriushchenko & Flammarion 2022); between them lies
    Unified SAM (Oikonomou & Loizou 2025). Descent: u = gamma g~, gamma = 1 or SSAM's
    n / (n~ + eps) (Tan et al. 2025); then clipping; then the base update.

    Args:
        weights: Initial weights; rounded to the storage type.
        groups: Dicts with `params` (indices into `weights`), `rho`, `adaptive`, `eta` and the
            base's hyper-parameters under torch's names, defaults filled in. To be changed
            between steps through `self.groups`.
        base: A key of `BASES`.
        lam: A number or a function of the step t = 1, 2, ...
        renormalize, max_grad_norm: Use SSAM's gamma; clip u to this plain norm.
        skip_nonfinite: Leave weights and state alone when a second gradient is not finite.
        storage, grad_storage, state_storage: Roundings of weights (perturbed ones too), gradients
            and state tensors (as weights by default). The scalars `step` and `b2` stay float64.

    Attributes:
        weights, perturbed: Unperturbed weights, and those of the last second pass.
        state: A dict per weight, with torch's names, made when torch makes it.
        b2, t: AdaGrad-Norm's accumulator; number of ascents, those of skipped steps included.
        metrics: `grad_norm` n, `perturbed_grad_norm` n~ (both with T), `renormalization` gamma,
            `skipped` (number of steps).
    """

    def __init__(
        self,
        weights: Arrays,
        groups: list[Group],
        base: str,
        *,
        lam: float | Callable[[int], float] = 1.0,
        renormalize: bool = False,
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = False,
        storage: Rounding = np.array,
        grad_storage: Rounding = np.array,
        state_storage: Rounding | None = None,
    ) -> None:
        self._update, defaults = BASES[base]
        defaults = {"rho": 0.05, "adaptive": False, "eta": 0.0, "maximize": False} | defaults
        for group in groups:
            if unknown := group.keys() - defaults.keys() - {"params"}:
                raise ValueError(f"{base} has no {sorted(unknown)}")
        self.groups: list[Group] = [defaults | group for group in groups]
        self._group = {i: group for group in self.groups for i in group["params"]}
        self._lam, self._renormalize = lam, renormalize
        self._max_grad_norm, self._skip_nonfinite = max_grad_norm, skip_nonfinite
        self._store, self._store_grad = storage, grad_storage
        self._store_state = state_storage or storage
        self.weights = [storage(np.asarray(w, dtype=np.float64)) for w in weights]
        self.perturbed = list(self.weights)
        self.state: list[State] = [{} for _ in weights]
        self.t = 0
        self.metrics: dict[str, float] = {"skipped": 0}
        self.b2 = float(self.groups[0].get("initial_accumulator_value", 0.0))
        if base == "adagrad":  # the one base whose state torch makes before the first step
            for i, h in self._group.items():
                total = np.full_like(self.weights[i], h["initial_accumulator_value"])
                self.state[i] = {"step": 0, "sum": self._store_state(total)}

    def _present(self, grads: Grads) -> dict[int, Array]:
        return {i: self._store_grad(g) for i, g in enumerate(grads) if g is not None}

    def _scaled_norm(self, weights: Arrays, grads: dict[int, Array]) -> float:
        return _norm(_scale(weights[i], self._group[i]) * g for i, g in grads.items())

    @np.errstate(all="ignore")  # infinities and NaN are among the inputs
    def ascend(self, grads: Grads) -> Arrays:
        """First pass: returns w + e and keeps it in `perturbed`; `weights` stay w."""
        gs = self._present(grads)
        self.t += 1
        lam = self._lam(self.t) if callable(self._lam) else self._lam
        n = self._scaled_norm(self.weights, gs)
        self.metrics["grad_norm"] = n
        self.perturbed = list(self.weights)
        if n == 0 or not np.isfinite(n):  # no direction to go, so e = 0
            return self.perturbed
        for i, g in gs.items():
            w, h = self.weights[i], self._group[i]
            e = h["rho"] * (1 - lam + lam / (n + NORM_EPS)) * _scale(w, h) ** 2 * g
            self.perturbed[i] = self._store(w + e)
        return self.perturbed

    @np.errstate(all="ignore")
    def descend(self, grads: Grads) -> None:
        """Second pass: one base update along u, from w (never from `perturbed`)."""
        gs = self._present(grads)
        n, n_perturbed = self.metrics["grad_norm"], self._scaled_norm(self.perturbed, gs)
        gamma = 1.0
        # with equal norms SSAM is SAM, bit for bit; a norm that is not finite perturbed nothing
        if self._renormalize and n != n_perturbed and np.isfinite(n):
            gamma = n / (n_perturbed + NORM_EPS)
        self.metrics |= {"perturbed_grad_norm": n_perturbed, "renormalization": gamma}
        if self._skip_nonfinite and not all(np.isfinite(g).all() for g in gs.values()):
            self.metrics["skipped"] += 1
            return

        us = {i: gamma * g for i, g in gs.items()}
        if self._max_grad_norm is not None:
            clip = np.minimum(1.0, self._max_grad_norm / (_norm(us.values()) + CLIP_EPS))
            us = {i: clip * u for i, u in us.items()}
        if self._update is _adagrad_norm:
            self.b2 += _norm(us.values()) ** 2
            if self.b2 == 0:  # every u so far was zero: 0/0
                return
            us = {i: u / math.sqrt(self.b2) for i, u in us.items()}
        for i, u in us.items():
            h = self._group[i]
            w, state = self._update(self.weights[i], -u if h["maximize"] else u, self.state[i], h)
            self.weights[i] = self._store(w)
            for name, x in state.items():
                self.state[i][name] = x if name == "step" else self._store_state(x)

    def step(self, grad_fn: Callable[[Arrays], Grads]) -> None:
        """Both passes, with `grad_fn` giving the gradients at the weights it is handed."""
        self.descend(grad_fn(self.ascend(grad_fn(self.weights))))


def _scale(w: Array, group: Group) -> Array | float:
    return np.abs(w) + group["eta"] if group["adaptive"] else 1.0


def _norm(arrays: Iterable[Array]) -> float:
    return float(np.sqrt(sum(np.sum(np.square(x)) for x in arrays)))


class Problem:
    """f(x) = sum_k c_k sin(<a_k, x> + b_k) + WELL/4 sum_i x_i^4, x being all tensors end to end.

    The sines couple every element with every other and make f non-convex; the quartic keeps the
    iterates in. With N elements, a ~ 1/N and c ~ N, so that for every N an element's gradient is
    of order 0.1 to 1 and the curvature of order 1: errors grow slowly along a trajectory.
    """

    SINES, FREQUENCY, WELL = 6, 4.0, 0.2

    def __init__(self, shapes: list[tuple[int, ...]], seed: int) -> None:
        rng = np.random.default_rng(seed)
        self._shapes = shapes
        *self._ends, size = np.cumsum([math.prod(shape) for shape in shapes])
        self._a = rng.standard_normal((self.SINES, size)) * self.FREQUENCY / size
        self._b = rng.uniform(0, 2 * np.pi, self.SINES)
        self._c = rng.uniform(0.5, 1.5, self.SINES) * size / (2 * self.FREQUENCY)
        self._start = 0.8 * rng.standard_normal(size)

    def initial(self) -> Arrays:
        """Return fresh arrays, the same ones every time."""
        return self._split(self._start.copy())

    def loss(self, weights: Arrays) -> float:
        x = np.concatenate([np.ravel(w) for w in weights])
        return float(self._c @ np.sin(self._a @ x + self._b) + self.WELL / 4 * np.sum(x**4))

    def grad(self, weights: Arrays) -> Arrays:
        """sum_k c_k cos(<a_k, x> + b_k) a_k + WELL x^3."""
        x = np.concatenate([np.ravel(w) for w in weights])
        return self._split((self._c * np.cos(self._a @ x + self._b)) @ self._a + self.WELL * x**3)

    def _split(self, x: Array) -> Arrays:
        parts = np.split(x, self._ends)
        return [part.reshape(shape) for part, shape in zip(parts, self._shapes, strict=True)]
