"""How close a step has to come to the oracle, and how an oracle takes up where the library is."""

import numpy as np

import oracles
from registry import numpy

EPS = {"float64": 2.0**-53, "float32": 2.0**-24}
#: Roundings of the arithmetic that one step may add up: some ten operations, and the norm's.
OPERATIONS = 24
#: torch takes Adam's 1 - beta2^t as it stands, which at beta2 = 0.999 and t = 1 costs three digits
#: of float64; the reference has torch's bits, the oracle and the kernels do not cancel.
CANCELLATION = 1000 * 2.0**-53


def check_close(name: str, ours, exact, before, dtype: str, eps: float, terms=0.0) -> float:
    """Within one rounding of the storage and ``OPERATIONS`` of the arithmetic.

    The arithmetic's roundings are relative to the old value, the new one, and to ``terms`` that
    were added on the way and may have cancelled. Returns the largest error in units in the last
    place of the larger of the old and the new value.
    """
    scale = np.abs(before) + np.abs(exact) + np.abs(exact - before) + terms
    unit = oracles.ulp(exact, dtype)
    excess = np.abs(ours - exact)
    allowed = unit + OPERATIONS * eps * scale + CANCELLATION * np.abs(exact - before)
    worst = np.argmax(excess / allowed) if excess.size else 0
    assert (excess <= allowed).all(), (
        f"{name}: {ours.flat[worst]!r} should be {exact.flat[worst]!r} from "
        f"{before.flat[worst]!r}; off by {excess.flat[worst] / unit.flat[worst]:.2f} ulp"
    )
    larger = np.maximum(np.abs(before), np.abs(exact))
    return float((excess / oracles.ulp(larger, dtype)).max()) if excess.size else 0.0


def adopt(oracle: oracles.Oracle, params, optimizer, step: int) -> None:
    """Let the oracle continue from the library's weights and state."""
    oracle.weights = numpy(params)
    for i, param in enumerate(params):
        for name, value in optimizer.state.get(param, {}).items():
            value = value.double().cpu().numpy()
            if not np.isnan(value).any():  # as an average is before its first gradient
                oracle.state[i][name] = int(value) if name == "step" else value.copy()
    oracle.t = step
    scalars = optimizer.kept
    if "squared_norms" in scalars:
        oracle.b2 = float(scalars["squared_norms"])
    if "ascent_squared_norms" in scalars:
        oracle.a2 = float(scalars["ascent_squared_norms"])
    if "sharpness" in scalars:
        oracle.lam, sharpness = float(scalars["lam"]), float(scalars["sharpness"])
        oracle.sharpness = None if np.isnan(sharpness) else sharpness
