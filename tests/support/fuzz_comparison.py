"""How closely the sides of ``test_fuzz.py`` have to agree after an action.

How far two sides may differ in one action: 4 units in the last place, and 32 times the epsilon of
the arithmetic on what has changed, which is all that a few operations in another order can do;
where a norm was taken over more than 1,024 elements, the root of their number in the place of 32.

Where that is not enough, because something cancelled or was divided by next to nothing, the model's
own sensitivity decides: the action is repeated on copies of the model (its *shadows*) in each of
which one of ``STREAMS`` has moved by 4 units in the last place, and norms by as much as above; a
result may be off by 16 times the sum of what that does. So it passes if it is the exact one for
inputs that nearly are those given: the usual meaning of a stable computation.

A number that is stored in fewer bits than it is computed in may fall to the other side of a tie,
one unit of storage away. The chance of it is the distance between the sides in units of storage:
for bfloat16 some 1 in 1,000. One element of 64 may, and twice as many as the tolerance makes
likely.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastsam.step.precision import MASTER

from fuzzing import SEEN, Side, same_bits

#: Times the distance between the shadows' results.
FACTOR = 16
#: Below which float32 has no numbers; a unit or two of it are rounding.
TINIEST = 2.0**-147

Numbers = dict[str, Any]


class Comparison:
    """Whether results are within rounding of the model's."""

    def __init__(self, before: Numbers, model: Side, shadows: Callable[[], list[Numbers]]):
        self.before, self.model = before, model.numbers()
        self.dtypes, self.is_fused = [p.dtype for p in model.params], model.config.is_fused
        self.grad_dtypes = [spec.grad_dtype or p.dtype
                            for spec, p in zip(model.specs, model.params, strict=True)]  # fmt: skip
        # the norm, which decides how far everything moves, is that of the narrowest
        coarse = self._arithmetic("norm")
        self.slack = coarse * max([32.0, *(math.sqrt(p.numel()) for p in model.params)])
        self._make, self._shadows = shadows, None

    @property
    def shadows(self) -> list[Numbers]:
        if self._shadows is None:
            SEEN["actions measured with shadows"] += 1
            self._shadows = self._make()
        return self._shadows

    def check(self, name: str, numbers: Numbers) -> None:
        assert numbers.keys() == self.model.keys(), (
            f"{name} differs in {sorted(numbers.keys() ^ self.model.keys())}"
        )
        for key, b in self.model.items():
            found = self._difference(key, numbers[key], b)
            assert found is None, f"{name}: {key}: {found}"

    def _arithmetic(self, key: str) -> float:
        """The epsilon of what the number was computed in."""
        kind, *rest = key.split()
        if kind in ("weight", "state") and not self.is_fused:  # torch's own, as it is stored
            return torch.finfo(self.dtypes[int(rest[0])]).eps
        if kind in ("weight", "state"):
            wide = self.dtypes[int(rest[0])] == torch.float64
        elif kind == "pass":
            wide = self.dtypes[int(rest[1])] == torch.float64
        else:
            wide = {torch.float64}.issuperset(self.dtypes + self.grad_dtypes)
        return 2.0**-52 if wide else 2.0**-23

    def _difference(self, key: str, a: Any, b: Any) -> str | None:
        if not (isinstance(b, Tensor) and b.is_floating_point()):
            return None if same_bits(a, b) else f"{a} is not {b}"
        if not isinstance(a, Tensor) or a.dtype != b.dtype or a.shape != b.shape:
            return f"{a} is not like {b}"
        if same_bits(a, b):
            return None
        if key.endswith(" step") or "rounding_step" in key:
            return f"{a} is not {b}"
        x, y = a.double(), b.double()
        alike = (x == y) | (x.isnan() & y.isnan())
        if key.startswith("metric"):  # a norm that is not finite is infinite or NaN
            alike |= ~x.isfinite() & ~y.isfinite()
        if key.endswith("max_exp_avg_sq"):  # torch's fused Adam leaves NaN out of it
            alike |= y.isnan()
        error = torch.where(alike, 0.0, (x - y).abs().nan_to_num(math.inf, math.inf))
        eps = self._arithmetic(key)
        start = self.before.get(_origin(key), self.before.get(_weight_of(key)))
        start = start.double() if isinstance(start, Tensor) else torch.zeros_like(y)
        moved = (y - start).abs().nan_to_num(0.0, 0.0)
        size = torch.maximum(y.abs(), start.abs()).nan_to_num(0.0, 0.0)
        tolerance = 4 * eps * size + self.slack * moved + TINIEST
        if (error <= tolerance).all():
            return None
        still, *others = (self._unrounded(numbers, key) for numbers in self.shadows)
        for z in others:
            far = torch.where((z == still) | (z.isnan() & still.isnan()), 0.0, (z - still).abs())
            tolerance += FACTOR * far.nan_to_num(math.inf, math.inf)
        beyond = error > tolerance
        if not beyond.any():
            return None
        info = torch.finfo(b.dtype)
        if info.eps > eps:  # stored in fewer bits
            unit = (info.eps * torch.maximum(x.abs(), y.abs())).clamp(
                min=info.smallest_normal * info.eps
            )
            unit *= 1 + key.startswith("pass")  # one that was written to has been rounded twice
            likely = 2 * (tolerance / unit).clamp(max=1).sum()
            if (error <= tolerance + unit).all() and beyond.sum() <= 2 + y.numel() / 64 + likely:
                SEEN["elements on the other side of a tie"] += int(beyond.sum())
                return None
        worst = (error - tolerance).flatten().argmax()
        at = [z.flatten()[worst].item() for z in (x, y, moved, error, tolerance)]
        return (
            f"{int(beyond.sum())} of {y.numel()} differ; at {int(worst)}: {at[0]!r} is not "
            f"{at[1]!r} (moved by {at[2]:.3g}; off by {at[3]:.3g}, allowed {at[4]:.3g})"
        )

    @staticmethod
    def _unrounded(numbers: Numbers, key: str) -> Tensor:
        return numbers[key if key in numbers else _weight_of(key)].double()


def _origin(key: str) -> str:
    kind, *rest = key.split()
    return f"weight {rest[1]}" if kind == "pass" else key


def _weight_of(key: str) -> str:
    return f"weight {key.split()[1]}" if key.endswith(MASTER) else ""


def first_change(before: Numbers, after: Numbers) -> str | None:
    """What differs in a bit; state that has been created, and has not changed yet, may be new."""
    for key, x in before.items():
        if key not in after or not same_bits(x, after[key]):
            return f"{key}: {after.get(key)} is not {x}"
    added = [key for key in after if key not in before and not key.startswith("state")]
    return f"new: {added}" if added else None
