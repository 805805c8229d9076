"""Independent float64 formulas that the library is tested against.

Written from the equations of the papers, one array at a time, with none of the library's code.
Arithmetic is float64 throughout; only what the library stores is rounded to its storage type.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from oracle_bases import BASES, BY_NORM, Array, Group, State, over_root
from oracle_noise import normal
from oracle_rounding import FORMATS, Rounding, rounding, ulp

__all__ = ["BASES", "FORMATS", "Oracle", "Problem", "Ratio", "rounding", "ulp"]

Arrays = list[np.ndarray]
Grads = list[np.ndarray | None]

NORM_EPS = 1e-12  # added to a norm before dividing by it
VASSO_EPS = 1e-7  # the same in VaSSO's ascent
CLIP_EPS = 1e-6  # the same in torch.nn.utils.clip_grad_norm_

# The ascent and the descent rules, and what they ask of a group beyond rho.
ASCENTS: dict[str, Group] = {
    "unified": {},
    "vasso": {"theta": 0.9},
    "lesam": {"sigma": 0.35},
    "sign": {},
    "esam": {"beta": 0.6},
    "friendly": {"sigma": 1.0, "lmbda": 0.9},
    "adagrad_norm": {"eps": 1e-8},
    "adagrad": {"eps": 1e-8},
    "adam": {"eps": 1e-8, "betas": (0.9, 0.999)},
    "second_moment": {},
    "variance": {"beta": 0.9, "damping": 0.1},
    "diagonal": {},
    "momentum": {},
    "normal": {},
}
DESCENTS: dict[str, Group] = {
    "": {},
    "gsam": {"alpha": 0.4},
    "gsam-first": {"alpha": 0.4},
    "wsam": {"gamma": 0.9},
    "wsam-coupled": {"gamma": 0.9},
    "gnp": {"alpha": 0.8},
    "gnp-unit": {"alpha": 0.8},
    "trace": {"weight": 1.0},
}


@dataclass(frozen=True)
class Ratio:
    """SAMAR's rule: lam_{k+1} = clip(lam_k clip(q, 1/c, c), lam_min, lam_max).

    q = S_k / S_{k-1}, where S_k = smoothing S_{k-1} + (1 - smoothing) s_k and S_1 = s_1. Without
    a positive S_{k-1}, q is c if S_k is positive and 1 if not. `lam` is the first step's.
    """

    lam: float = 1.0
    c: float = 1.1
    lam_min: float = 0.1
    lam_max: float = 2.0
    smoothing: float = 0.0

    def __call__(self, lam: float, sharpness: float, previous: float) -> float:
        if previous > 0:
            q = sharpness / previous
        else:
            q = self.c if sharpness > 0 else 1.0
        q = min(max(q, 1 / self.c), self.c)
        return min(max(lam * q, self.lam_min), self.lam_max)


@dataclass(frozen=True)
class Trend:
    """SAMAR's other rule: lam_{k+1} = lam clip(a_k / b_k, 1/c, c).

    a_k = fast a_{k-1} + (1 - fast) s_k and b_k = slow b_{k-1} + (1 - slow) s_k, which start at the
    first sharpness; that leaves lam as it is. Without a positive b_k, the ratio is c if a_k is
    positive and 1 if not. `lam` is the first step's.
    """

    lam: float = 1.0
    c: float = 2.0
    fast: float = 0.9
    slow: float = 0.99

    def __call__(self, a: float, b: float) -> float:
        ratio = a / b if b > 0 else self.c if a > 0 else 1.0
        return self.lam * min(max(ratio, 1 / self.c), self.c)


class Oracle:
    """One optimizer over several weights: an ascent rule, a descent rule and a base update.

    Norms are over all groups; T = |w| + eta in adaptive groups, else 1. Where a group maximizes, g
    and g~ are the negatives of the gradients given, which makes its objective one to minimise. The
    ascent rules:

    - "unified": e = rho (1 - lam_t + lam_t / (n + eps)) T^2 g, n = ||T g||. lam = 1 is SAM (Foret
      et al. 2021), with T ASAM (Kwon et al. 2021); lam = 0 is USAM (Andriushchenko & Flammarion
      2022); between them lies Unified SAM (Oikonomou & Loizou 2025).
    - "vasso" (Li & Giannakis 2023): s = (1-theta) s + theta g, where a weight's first s is its
      first g; e = rho T^2 s / (||T s|| + 1e-7).
    - "lesam" (Wang et al. 2026): e = min(sigma / n, rho) T^2 g / n, n = ||T g||.
    - "sign" (ASAM with p = inf): e = rho T sign(g), 0 where g is not finite.
    - "esam" (Du et al. 2022): e = rho / beta T^2 z g / (||z T g|| + eps), with z = 1 for the
      weights that take part in the step and z = 0 for the others.
    - "friendly" (Li et al. 2024): d = g - sigma m, e = rho T^2 d / ||T d||, then
      m = lmbda m + (1-lmbda) g. A weight's first d and first m are its first g.
    - LightSAM (arXiv 2505.24399), where T = 1, a starts at eps^2 and r at 0:
      "adagrad_norm" (I) has the scalar a += ||g||^2; e = rho g / sqrt(a);
      "adagrad" (II) has a += g^2, element by element; e = rho g / sqrt(a);
      "adam" (III) has r = b1 r + (1-b1) g; a = b2 a + (1-b2) g^2; e = rho r / sqrt(a).
    - "second_moment" (preconditioned Functional-SAM): e = rho T^2 P g / (||T P g|| + eps), with
      P = 1 / (sqrt(v) + 1e-8) and v Adam's exp_avg_sq of the step before; P = 1 in the first
      `warmup` steps and where there is no v. Not `normalized`: e = rho T^2 P g / (||T g|| + eps).
    - Preconditioned SAM (Zhang, Li & Giannakis 2025): e = rho T^2 D g / (||T D g|| + eps), or
      `constrained` e = rho T^2 D^2 g / (||T D g|| + eps). With "second_moment" D is P above, with
      "diagonal" what the function `diagonal` of the gradient gives; with "variance" it is
      D = f / (s + f), f = damping * v / (number of elements), of the averages before the step:
      s = beta s + (1-beta) (g - m)^2 with the old m, m = beta m + (1-beta) g, and
      v = 0.9 v + 0.1 ||T g||^2. s and v start at 0, m at the first g; D = 1 where f = 0.
    - "normal" (Trace-SAM with one perturbation): e = rho z, z from N(0, 1) (`oracle_noise`).
    - "momentum" (MSAM, Becker et al. 2024): e = -rho T^2 v / (||T v|| + eps), where v is the base's
      momentum as the step before has left it; the gradients at w are not looked at.

    Descent: u = gamma g~, gamma = 1 or SSAM's n / (n~ + eps), n = ||T g|| (Tan et al. 2025); or
    SAMAR's u = (1 - lam_k) g + lam_k gamma g~ (Zou, Deng & Sun 2024), or one of the descent rules
    below, each with gamma g~ for g~, or gamma g~ alone where n is not finite; then clipping; then
    the base update. The ascent's state and SAMAR's change when a step is completed, not before.
    The descent rules:

    - "gsam" (Zhuang et al. 2022): u = g~ - alpha (the part of g that is orthogonal to g~);
      "gsam-first": u = g + alpha (the part of g~ that is orthogonal to g). All of a vector is
      orthogonal to one of zeros.
    - "wsam-coupled" (Yue et al. 2023), with a = gamma / (1 - gamma): u = a g~ + (1 - a) g; "wsam":
      u = g, and then w = base(w, u) - lr a (g~ - g), where clipping leaves the last part alone.
    - "gnp" (Zhao et al. 2022): u = (1 - alpha) g + alpha g~; "gnp-unit": with g / ||g|| for g.
    - "trace" (Tahmasebi et al. 2024): u = g + weight (g~ - g), where g may be of any size.

    Args:
        weights: Initial weights; rounded to the storage type.
        groups: Dicts with `params` (indices into `weights`), `rho`, `adaptive`, `eta`, what the
            ascent asks for and the base's hyper-parameters under torch's names, defaults filled
            in. To be changed between steps through `self.groups`.
        base: A key of `BASES`.
        ascent, descent: Keys of `ASCENTS` and `DESCENTS`. A descent's group keys are the first's.
        lam: Unified SAM's, a number or a function of the step t = 1, 2, ...
        warmup, normalized: Of "second_moment".
        constrained, diagonal: Of the preconditioned ascents.
        takes_part: Of "esam": of a weight's place in the groups, beta and the number of steps so
            far, whether it takes part.
        loss: At w + e, of the base "sps", whose step size is, for min(size, lr) to be taken,
            [loss - loss_min - <e, u>]+ / ||u||^2, 0 where that is NaN (Oikonomou & Loizou 2026).
        mix: SAMAR's rule for its lam: a `Ratio` or a `Trend`, or any function of lam_k, s_k and
            s_{k-1}. It is asked from the second sharpness on; the first lam is its `lam`, or 1.
        renormalize, max_grad_norm: Use SSAM's gamma; clip u to this plain norm.
        skip_nonfinite: Leave weights and state alone when a second gradient is not finite.
        storage, grad_storage, state_storage: Roundings of weights (perturbed ones too), gradients
            and the base's state tensors (as weights by default). The scalars `step`, `a2` and `b2`
            stay float64.
        ascent_storage: Rounding of the ascent's state tensors, never to 16 bits.

    Attributes:
        weights, perturbed: Unperturbed weights, and those of the last second pass.
        state: A dict per weight, with torch's names, made when torch makes it. The ascent's are
            `ascent_ema`, or `ascent_sum`, or `ascent_exp_avg` and `ascent_exp_avg_sq`, or
            `ascent_variance` and `ascent_mean`.
        a2, b2: The scalar accumulators of the ascent and of the base.
        t: Number of ascents, those of skipped steps included.
        draws: Number of ascents by noise.
        lam, sharpness, slow: SAMAR's for the next step: lam, the (smoothed) s_k or the fast
            average, and the slow one; None at first.
        of_second: The weight that g~ had in the last step, past the base as well, SAMAR's aside.
        terms: With a descent rule, the sizes of what it has added to each weight, times lr.
        e: The perturbations of the last step, unrounded; none where nothing is perturbed.
        metrics: `grad_norm` ||T g||;
            `perturbed_grad_norm` n~ (with T), `renormalization` gamma, `skipped` (number of
            steps); SAMAR's `lam` and s_k = <g + g~, e> / 2 as `sharpness`.
    """

    def __init__(
        self,
        weights: Arrays,
        groups: list[Group],
        base: str,
        *,
        ascent: str = "unified",
        descent: str = "",
        lam: float | Callable[[int], float] = 1.0,
        warmup: int = 0,
        normalized: bool = True,
        constrained: bool = False,
        diagonal: Callable[[Array], Array] | None = None,
        takes_part: Callable[[int, float, int], bool] | None = None,
        loss: float | None = None,
        mix: Callable[[float, float, float], float] | None = None,
        renormalize: bool = False,
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = False,
        storage: Rounding = np.array,
        grad_storage: Rounding = np.array,
        state_storage: Rounding | None = None,
        ascent_storage: Rounding = np.array,
    ) -> None:
        self._update, defaults = BASES[base]
        common = {"rho": 0.05, "adaptive": False, "eta": 0.0, "maximize": False}
        defaults = common | ASCENTS[ascent] | DESCENTS[descent] | defaults
        for group in groups:
            if unknown := group.keys() - defaults.keys() - {"params"}:
                raise ValueError(f"{base} has no {sorted(unknown)}")
        self.groups: list[Group] = [defaults | group for group in groups]
        self._group = {i: group for group in self.groups for i in group["params"]}
        self._ascent, self._unified_lam, self._mix = ascent, lam, mix
        self._descent, self.loss = descent, loss
        self.of_second, self.terms, self.ascent_terms = 1.0, {}, {}
        self._warmup, self._normalized = warmup, normalized
        self._constrained, self._diagonal, self._takes_part = constrained, diagonal, takes_part
        self._renormalize, self._by_norm = renormalize, base in BY_NORM
        self._max_grad_norm, self._skip_nonfinite = max_grad_norm, skip_nonfinite
        self._store, self._store_grad = storage, grad_storage
        self._store_state, self._store_ascent = state_storage or storage, ascent_storage
        self.weights = [storage(np.asarray(w, dtype=np.float64)) for w in weights]
        self.perturbed = list(self.weights)
        self.state: list[State] = [{} for _ in weights]
        self.t = 0
        self.draws = 0
        self.lam, self.sharpness = float(getattr(mix, "lam", 1.0)), None
        self.slow: float | None = None
        self.metrics: dict[str, float] = {"skipped": 0}
        start = self.groups[0].get("eps", 0.0) ** 2
        self.a2 = 0.0 if ascent == "variance" else start
        self.b2 = float(self.groups[0].get("initial_accumulator_value", start))
        if base == "adagrad":  # the one base whose state torch makes before the first step
            for i, h in self._group.items():
                total = np.full_like(self.weights[i], h["initial_accumulator_value"])
                self.state[i] = {"step": 0, "sum": self._store_state(total)}

    def _present(self, grads: Grads) -> dict[int, Array]:
        signs = {i: -1.0 if h["maximize"] else 1.0 for i, h in self._group.items()}
        return {i: signs[i] * self._store_grad(g) for i, g in enumerate(grads) if g is not None}

    def _scale(self, w: Array, i: int) -> Array | float:
        """T of the i-th weight at w."""
        scaled = self._ascent not in ("adagrad_norm", "adagrad", "adam")
        h = self._group[i]
        return np.abs(w) + h["eta"] if h["adaptive"] and scaled else 1.0

    def _scaled_norm(self, weights: Arrays, xs: dict[int, Array]) -> float:
        return _norm(self._scale(weights[i], i) * x for i, x in xs.items())

    @np.errstate(all="ignore")  # infinities and NaN are among the inputs
    def ascend(self, grads: Grads) -> Arrays:
        """First pass: returns w + e and keeps it in `perturbed`; `weights` stay w."""
        gs = self._first = self._present(grads)
        self.t += 1
        self._new_state: dict[int, State] = {}
        self._new_a2 = self.a2
        self._n = self.metrics["grad_norm"] = self._scaled_norm(self.weights, gs)
        rules = {"unified": self._unified, "vasso": self._vasso, "adagrad_norm": self._light_norm,
                 "lesam": self._lesam, "friendly": self._friendly, "sign": self._sign,
                 "esam": self._esam,
                 "second_moment": self._second_moment, "variance": self._variance,
                 "diagonal": self._by_diagonal, "momentum": self._momentum,
                 "normal": self._normal}  # fmt: skip
        self.e = rules.get(self._ascent, self._light)(gs)
        self.perturbed = list(self.weights)
        for i, e in self.e.items():
            self.perturbed[i] = self._store(self.weights[i] + e)
        return self.perturbed

    # The ascent rules return e, or nothing where e = 0, and leave new state in `_new_...`.

    def _unified(self, gs: dict[int, Array]) -> dict[int, Array]:
        lam = self._unified_lam(self.t) if callable(self._unified_lam) else self._unified_lam
        if self._n == 0 or not np.isfinite(self._n):  # no direction to go
            return {}
        factor = 1 - lam + lam / (self._n + NORM_EPS)
        squares = {i: self._scale(self.weights[i], i) ** 2 for i in gs}
        return {i: self._group[i]["rho"] * factor * squares[i] * g for i, g in gs.items()}

    def _vasso(self, gs: dict[int, Array]) -> dict[int, Array]:
        ss = {}
        for i, g in gs.items():
            theta, old = self._group[i]["theta"], self.state[i].get("ascent_ema")
            ss[i] = g if old is None else (1 - theta) * old + theta * g
        n = self._scaled_norm(self.weights, ss)
        if not np.isfinite(n):  # one bad gradient would stay in s for good
            return {}
        self._new_state = {i: {"ascent_ema": self._store_ascent(s)} for i, s in ss.items()}
        squares = {i: self._scale(self.weights[i], i) ** 2 for i in ss}
        return {i: self._group[i]["rho"] * squares[i] * s / (n + VASSO_EPS) for i, s in ss.items()}

    def _lesam(self, gs: dict[int, Array]) -> dict[int, Array]:
        if self._n == 0 or not np.isfinite(self._n):
            return {}
        n = self._n + NORM_EPS
        lengths = {i: min(self._group[i]["sigma"] / n, self._group[i]["rho"]) for i in gs}
        squares = {i: self._scale(self.weights[i], i) ** 2 for i in gs}
        return {i: lengths[i] * squares[i] * g / n for i, g in gs.items()}

    def _sign(self, gs: dict[int, Array]) -> dict[int, Array]:
        ts = {i: self._scale(self.weights[i], i) for i in gs}
        signs = {i: np.where(np.isfinite(g), np.sign(g), 0.0) for i, g in gs.items()}
        return {i: self._group[i]["rho"] * ts[i] * sign for i, sign in signs.items()}

    def _esam(self, gs: dict[int, Array]) -> dict[int, Array]:
        assert self._takes_part is not None
        places = {i: place for place, i in enumerate(self._group)}
        part = {
            i: g for i, g in gs.items()
            if self._takes_part(places[i], self._group[i]["beta"], self.t - 1)
        }  # fmt: skip
        n = self._n = self.metrics["grad_norm"] = self._scaled_norm(self.weights, part)
        if n == 0 or not np.isfinite(n):
            return {}
        hs = {i: self._group[i]["rho"] / self._group[i]["beta"] / (n + NORM_EPS) for i in part}
        return {i: hs[i] * self._scale(self.weights[i], i) ** 2 * g for i, g in part.items()}

    def _friendly(self, gs: dict[int, Array]) -> dict[int, Array]:
        ds, ms = {}, {}
        for i, g in gs.items():
            h, old = self._group[i], self.state[i].get("ascent_ema")
            ds[i] = g if old is None else g - h["sigma"] * old
            ms[i] = g if old is None else h["lmbda"] * old + (1 - h["lmbda"]) * g
        n = self._scaled_norm(self.weights, ds)
        if not np.isfinite(n):
            return {}
        self._new_state = {i: {"ascent_ema": self._store_ascent(m)} for i, m in ms.items()}
        if n == 0:
            return {}
        squares = {i: self._scale(self.weights[i], i) ** 2 for i in ds}
        times = {i: self._group[i]["rho"] * squares[i] / (n + NORM_EPS) for i in ds}
        for i, g in gs.items():  # which cancel
            old = self.state[i].get("ascent_ema", 0.0)
            self.ascent_terms[i] = times[i] * (np.abs(g) + self._group[i]["sigma"] * np.abs(old))
        return {i: times[i] * d for i, d in ds.items()}

    def _second_moment(self, gs: dict[int, Array]) -> dict[int, Array]:
        ds = {}
        for i, g in gs.items():
            v = self.state[i].get("exp_avg_sq") if self.t > self._warmup else None
            ds[i] = np.ones_like(g) if v is None else 1 / (np.sqrt(v) + 1e-8)
        return self._preconditioned(gs, ds, None if self._normalized else self._n)

    def _variance(self, gs: dict[int, Array]) -> dict[int, Array]:
        size = sum(self.weights[i].size for i in self._group)
        ds, new = {}, {}
        for i, g in gs.items():
            h, old = self._group[i], self.state[i]
            s, m = old.get("ascent_variance", np.zeros_like(g)), old.get("ascent_mean", g)
            f = h["damping"] * self.a2 / size
            ds[i] = f / (s + f) if f > 0 else np.ones_like(g)
            s = h["beta"] * s + (1 - h["beta"]) * (g - m) ** 2
            m = h["beta"] * m + (1 - h["beta"]) * g
            state = {"ascent_variance": s, "ascent_mean": m}
            new[i] = {name: self._store_ascent(x) for name, x in state.items()}
        es = self._preconditioned(gs, ds)
        if np.isfinite(self._n):
            self._new_state, self._new_a2 = new, 0.9 * self.a2 + 0.1 * self._n**2
        return es

    def _by_diagonal(self, gs: dict[int, Array]) -> dict[int, Array]:
        assert self._diagonal is not None
        return self._preconditioned(gs, {i: self._diagonal(g) for i, g in gs.items()})

    def _preconditioned(
        self, gs: dict[int, Array], ds: dict[int, Array], n: float | None = None
    ) -> dict[int, Array]:
        xs = {i: ds[i] * g for i, g in gs.items()}
        n = self._scaled_norm(self.weights, xs) if n is None else n
        if n == 0 or not np.isfinite(n):
            return {}
        if self._constrained:
            xs = {i: ds[i] * x for i, x in xs.items()}
        squares = {i: self._scale(self.weights[i], i) ** 2 for i in xs}
        return {i: self._group[i]["rho"] * squares[i] * x / (n + NORM_EPS) for i, x in xs.items()}

    def _momentum(self, gs: dict[int, Array]) -> dict[int, Array]:
        names = ("momentum_buffer", "exp_avg")
        held = {i: [s[x] for x in names if x in s] for i, s in enumerate(self.state)}
        vs = {i: found[0] for i, found in held.items() if found}
        n = self.metrics["momentum_norm"] = self._scaled_norm(self.weights, vs)
        if n == 0 or not np.isfinite(n):
            return {}
        squares = {i: self._scale(self.weights[i], i) ** 2 for i in vs}
        return {i: -self._group[i]["rho"] * squares[i] * v / (n + NORM_EPS) for i, v in vs.items()}

    def _normal(self, gs: dict[int, Array]) -> dict[int, Array]:
        places = [i for h in self.groups for i in h["params"]]
        zs = {i: normal(0, places.index(i), self.draws, 0, self.weights[i].shape) for i in gs}
        self.draws += 1
        return {i: self._group[i]["rho"] * z for i, z in zs.items()}

    def _light_norm(self, gs: dict[int, Array]) -> dict[int, Array]:
        a2 = self.a2 + self._n**2
        if not np.isfinite(self._store_ascent(a2)):
            return {}
        self._new_a2 = a2
        return {i: self._group[i]["rho"] * g / math.sqrt(a2) for i, g in gs.items()}

    def _light(self, gs: dict[int, Array]) -> dict[int, Array]:
        es = {}
        for i, g in gs.items():
            h, old = self._group[i], self.state[i]
            start = np.full_like(g, h["eps"] ** 2)
            if self._ascent == "adagrad":
                old = {"ascent_sum": start} | old
                r, a = g, old["ascent_sum"] + g * g
                new = {"ascent_sum": a}
            else:
                b1, b2 = h["betas"]
                old = {"ascent_exp_avg": np.zeros_like(g), "ascent_exp_avg_sq": start} | old
                r = b1 * old["ascent_exp_avg"] + (1 - b1) * g
                a = b2 * old["ascent_exp_avg_sq"] + (1 - b2) * g * g
                new = {"ascent_exp_avg": r, "ascent_exp_avg_sq": a}
            # Every element is on its own: where one is not finite, only that one stays.
            good = np.isfinite(self._store_ascent(a))
            es[i] = np.where(good, h["rho"] * over_root(r, a), 0.0)
            self._new_state[i] = {
                name: self._store_ascent(np.where(good, x, old[name])) for name, x in new.items()
            }
        return es

    @np.errstate(all="ignore")
    def descend(self, grads: Grads) -> None:
        """Second pass: one base update along u, from w (never from `perturbed`)."""
        gs = self._present(grads)
        n, n_perturbed = self._n, self._scaled_norm(self.perturbed, gs)
        gamma = 1.0
        # with equal norms SSAM is SAM, bit for bit; a norm that is not finite perturbed nothing
        if self._renormalize and n != n_perturbed and np.isfinite(n):
            gamma = n / (n_perturbed + NORM_EPS)
        self.metrics |= {"perturbed_grad_norm": n_perturbed, "renormalization": gamma}
        if self._mix is not None:
            products = ((self._first.get(i, 0.0) + g) * self.e.get(i, 0.0) for i, g in gs.items())
            sharpness = float(sum(np.sum(x) for x in products)) / 2
            self.metrics |= {"lam": self.lam, "sharpness": sharpness}
        if self._skip_nonfinite and not all(np.isfinite(g).all() for g in gs.values()):
            self.metrics["skipped"] += 1
            return

        for i, state in self._new_state.items():
            self.state[i] |= state
        self.a2 = self._new_a2
        us = {i: gamma * g for i, g in gs.items()}
        if self._mix is not None:
            lam, first = self.lam, self._first
            if not np.isfinite(n):  # what perturbed nothing stays out of u, too
                lam, first = 1.0, {}
            us = {i: (1 - lam) * first.get(i, 0.0) + lam * u for i, u in us.items()}
            if gs:
                self._adapt(sharpness)
        past: dict[int, Array] = {}  # the base
        self.of_second, self.terms = gamma, {}
        if self._descent and np.isfinite(n):
            second, first = us, {i: self._first.get(i, np.zeros_like(u)) for i, u in us.items()}
            c, c1, a = self._mixture(first, second)
            us = {i: c * x + c1 * first[i] for i, x in second.items()}
            past = {i: a * (x - first[i]) for i, x in second.items()}
            self.of_second = c * gamma
            k, k1 = abs(c) + abs(a), abs(c1) + abs(a)
            self.terms = {
                i: self._group[i]["lr"] * (k * np.abs(x) + k1 * np.abs(first[i]))
                for i, x in second.items()
            }
        rate = {}
        if self.loss is not None:
            rise = sum(float(np.sum(self.e.get(i, 0.0) * u)) for i, u in us.items())
            gap = np.maximum(self.loss - self.groups[0]["loss_min"] - rise, 0.0)
            size = gap / np.square(_norm(us.values()))
            rate = {"rate": 0.0 if np.isnan(size) else float(size)}
        if self._max_grad_norm is not None:
            clip = np.minimum(1.0, self._max_grad_norm / (_norm(us.values()) + CLIP_EPS))
            us = {i: clip * u for i, u in us.items()}
            self.of_second *= clip
        if past:
            self.of_second += a * gamma
        if self._by_norm:
            self.b2 += _norm(us.values()) ** 2
            if self.b2 == 0:  # every u so far was zero: 0/0
                return
            us = {i: u / math.sqrt(self.b2) for i, u in us.items()}
        for i, u in us.items():
            h = self._group[i] | rate
            w, state = self._update(self.weights[i], u, self.state[i], h)
            w = w - h["lr"] * past.get(i, 0.0)
            self.weights[i] = self._store(w)
            for name, x in state.items():
                self.state[i][name] = x if name == "step" else self._store_state(x)

    def _mixture(
        self, first: dict[int, Array], second: dict[int, Array]
    ) -> tuple[float, float, float]:
        """Of a descent rule c, c1 and a: u = c g~ + c1 g, and lr a (g~ - g) past the base."""
        h = self.groups[0]
        if self._descent.startswith("gsam"):
            kept, other = second, first
            if self._descent == "gsam-first":
                kept, other = first, second
            length = _norm(kept.values())
            along = sum(float(np.sum(x / length * other[i])) for i, x in kept.items())
            of_kept = h["alpha"] * along / length if length > 0 else 0.0
            if self._descent == "gsam-first":
                return h["alpha"], 1 - of_kept, 0.0
            return 1 + of_kept, -h["alpha"], 0.0
        if self._descent == "gnp-unit":
            return h["alpha"], (1 - h["alpha"]) / (_norm(first.values()) or 1.0), 0.0
        if self._descent == "trace":
            return h["weight"], 1 - h["weight"], 0.0
        a = h["gamma"] / (1 - h["gamma"]) if "gamma" in h else h["alpha"]
        return (0.0, 1.0, a) if self._descent == "wsam" else (a, 1 - a, 0.0)

    def _adapt(self, sharpness: float) -> None:
        """SAMAR's lam for the next step; all stays where this one measured nothing."""
        n, previous = self._n, self.sharpness
        if sharpness == 0 or not np.isfinite(n) or not np.isfinite(sharpness):
            return
        if previous is None:
            self.sharpness = self.slow = sharpness
            return
        if isinstance(self._mix, Trend):
            fast, slow = self._mix.fast, self._mix.slow
            self.sharpness = fast * previous + (1 - fast) * sharpness
            self.slow = slow * self.slow + (1 - slow) * sharpness
            self.lam = self._mix(self.sharpness, self.slow)
            return
        smoothing = getattr(self._mix, "smoothing", 0.0)
        self.sharpness = smoothing * previous + (1 - smoothing) * sharpness
        self.lam = self._mix(self.lam, self.sharpness, previous)

    def step(self, grad_fn: Callable[[Arrays], Grads]) -> None:
        """Both passes, with `grad_fn` giving the gradients at the weights it is handed."""
        self.descend(grad_fn(self.ascend(grad_fn(self.weights))))


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
        *self.ends, size = np.cumsum([math.prod(shape) for shape in shapes])
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
        parts = np.split(x, self.ends)
        return [part.reshape(shape) for part, shape in zip(parts, self._shapes, strict=True)]
