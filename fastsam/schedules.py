"""Schedules of the radius, like those of :mod:`torch.optim.lr_scheduler` for the learning rate."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from .methods.lets import LETS
from .optimizer import SharpnessAwareOptimizer
from .step.arguments import Integer, Number, shown

RADIUS = Number(tensors=None)
FRACTION = Number(high=1.0, with_low=False, with_high=True, tensors=None)
RAMP = Number(high=1.0, with_high=True, tensors=None)


def _number(value: Any) -> float:
    return float(value.detach()) if isinstance(value, Tensor) else float(value)


class RhoScheduler:
    """Base class of schedules of the radius. Your own schedule defines :meth:`rho_of`.

    Args:
        optimizer: One of fastsam's, except :class:`LETS`, which learns its radius.
        key: The group key that is scheduled. Default ``"rho"``.

    Raises:
        TypeError: If ``optimizer`` is not one of fastsam's.
        ValueError: If a group has no such key, or the first radius is out of range.

    Example:
        >>> class Halving(fastsam.RhoScheduler):
        ...     def rho_of(self, initial, group, index):
        ...         return initial * 0.5**self.steps
        >>> optimizer = fastsam.SAM(model.parameters(), torch.optim.SGD, rho=0.4, lr=0.1)
        >>> radius = Halving(optimizer)
        >>> loss = optimizer.step(closure)
        >>> radius.step()
        >>> optimizer.param_groups[0]["rho"]
        0.2
    """

    def __init__(self, optimizer: SharpnessAwareOptimizer, key: str = "rho"):
        if isinstance(optimizer, LETS):
            raise TypeError("optimizer must have a radius that is given; LETS learns its own")
        if not isinstance(optimizer, SharpnessAwareOptimizer):
            raise TypeError(f"optimizer must be one of fastsam's, got {shown(optimizer)}")
        if not all(key in group for group in optimizer.param_groups):
            raise ValueError(f"key must be in every group of the optimizer, got {key!r}")
        self.optimizer, self.key = optimizer, key
        self.steps = 0
        self.initial: list[float] = []
        self._apply()

    def rho_of(self, initial: float, group: Mapping[str, Any], index: int) -> float | Tensor:
        """The radius of a group after ``self.steps`` steps.

        Args:
            initial: What it was when the schedule was made.
            group: The parameter group.
            index: Its place among the groups.
        """
        raise NotImplementedError(f"{type(self).__name__} must define rho_of")

    def step(self) -> None:
        """Count a step, and set the radii of the next one.

        Call it after ``optimizer.step``, and after that of a learning-rate schedule.

        Raises:
            ValueError: If a radius is out of range. Nothing has changed then.
        """
        self.steps += 1
        try:
            self._apply()
        except BaseException:
            self.steps -= 1
            raise

    def get_last_rho(self) -> list[Any]:
        """The present radius of each group."""
        return [group[self.key] for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """The count of steps, and the radii at the start."""
        return {"steps": self.steps, "initial": list(self.initial)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load the state of a schedule of the same kind. The radii are set at once.

        Raises:
            KeyError: If something is missing.
            ValueError: If it was saved of another number of groups.
        """
        steps, initial = int(state_dict["steps"]), [float(x) for x in state_dict["initial"]]
        groups = self.optimizer.param_groups
        if len(initial) != len(groups):
            raise ValueError(
                f"state_dict must have a radius for each of {len(groups)} groups, got "
                f"{len(initial)}"
            )
        before = self.steps, self.initial
        self.steps, self.initial = steps, initial
        try:
            self._apply()
        except BaseException:
            self.steps, self.initial = before
            raise

    def _apply(self) -> None:
        groups = self.optimizer.param_groups
        for group in groups[len(self.initial) :]:  # added since
            self.initial.append(_number(group[self.key]))
        radii = [
            self.rho_of(initial, group, i)
            for i, (initial, group) in enumerate(zip(self.initial, groups, strict=True))
        ]
        radii = [x if isinstance(x, Tensor) else RADIUS(self.key, x) for x in radii]
        for group, radius in zip(groups, radii, strict=True):
            held = group[self.key]
            if not isinstance(held, Tensor):
                group[self.key] = _number(radius)
            elif isinstance(radius, Tensor):
                held.copy_(radius)
            else:  # a copy from the host would wait for the device
                held.fill_(radius)


class LambdaRho(RhoScheduler):
    r"""The radius at the start, times a function of the number of steps.

    .. math:: \rho_t = \rho_0\, \lambda(t)

    It is what :class:`torch.optim.lr_scheduler.LambdaLR` is for the learning rate. Save its
    ``state_dict`` beside the optimizer's; the function is not saved.

    Args:
        optimizer: One of fastsam's, except :class:`LETS`, which learns its radius.
        rho_lambda: :math:`\lambda`, from the count of steps, 0 at first, to a factor of at least 0;
            or a list of such functions, one for each group.
        key: The group key that is scheduled. Default ``"rho"``; of :class:`LESAM` also
            ``"sigma"``.

    Raises:
        TypeError: If ``optimizer`` is another one, or ``rho_lambda`` cannot be called.
        ValueError: If there are not as many functions as groups, a group has no such key, or a
            radius is out of range.

    Example:
        >>> optimizer = fastsam.SAM(model.parameters(), torch.optim.SGD, rho=0.1, lr=0.1)
        >>> radius = fastsam.LambdaRho(optimizer, lambda t: min(1.0, (t + 1) / 4))  # a warm-up
        >>> for _ in range(2):
        ...     print(optimizer.param_groups[0]["rho"])
        ...     loss = optimizer.step(closure)
        ...     radius.step()
        0.025
        0.05
    """

    def __init__(
        self,
        optimizer: SharpnessAwareOptimizer,
        rho_lambda: Callable[[int], float] | list[Callable[[int], float]],
        key: str = "rho",
    ):
        several = rho_lambda if isinstance(rho_lambda, (list, tuple)) else None
        for function in [rho_lambda] if several is None else several:
            if not callable(function):
                raise TypeError(f"rho_lambda must be callable, got {shown(function)}")
        groups = getattr(optimizer, "param_groups", [])
        if several is not None and len(several) != len(groups):
            raise ValueError(
                f"rho_lambda must have a function for each of {len(groups)} groups, got "
                f"{len(several)}"
            )
        self.rho_lambda = rho_lambda
        super().__init__(optimizer, key)

    def rho_of(self, initial: float, group: Mapping[str, Any], index: int) -> float:
        """The radius of a group after ``self.steps`` steps."""
        functions = self.rho_lambda
        one = functions[index] if isinstance(functions, (list, tuple)) else functions
        return initial * float(one(self.steps))


class ProportionalRho(RhoScheduler):
    r"""The radius follows the learning rate, linearly between two bounds.

    .. math:: \rho_t = \rho_{\min} + (\rho_{\max} - \rho_{\min})\,
              \frac{lr_t - lr_{\min}}{lr_{\max} - lr_{\min}}

    This is the schedule of :class:`GSAM`'s authors. With the defaults the radius is proportional to
    the learning rate. If the learning rate is outside of its bounds, as in a warm-up, the radius is
    at the bound. Call ``step`` after the learning rate's scheduler.

    Args:
        optimizer: One of fastsam's, except :class:`LETS`, which learns its radius.
        rho_min: :math:`\rho_{\min}`, at least 0. Default 0.
        rho_max: :math:`\rho_{\max}`, at least 0. Default None: each group's radius at the start.
        lr_min: :math:`lr_{\min}`, at least 0: where the learning rate's schedule ends. Default 0.
        lr_max: :math:`lr_{\max}`, above ``lr_min``. Default None: each group's ``initial_lr``, as a
            learning rate's schedule has put it there, or its ``lr``.

    Raises:
        TypeError: If ``optimizer`` is not one of fastsam's.
        ValueError: If a bound or a radius is out of range.

    Example:
        >>> optimizer = fastsam.GSAM(model.parameters(), torch.optim.SGD, rho=0.6, lr=0.1)
        >>> scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=100)
        >>> radius = fastsam.ProportionalRho(optimizer, rho_min=0.1)
        >>> for _ in range(3):
        ...     loss = optimizer.step(closure)
        ...     scheduler.step()
        ...     radius.step()

    Reference: Zhuang, Gong, Yuan, Cui, Adam, Dvornek, Tatikonda, Duncan and Liu, "Surrogate gap
    minimization improves sharpness-aware training", ICLR 2022, arXiv 2203.08065.
    """

    def __init__(
        self,
        optimizer: SharpnessAwareOptimizer,
        rho_min: float = 0.0,
        rho_max: float | None = None,
        lr_min: float = 0.0,
        lr_max: float | None = None,
    ):
        optional = Number(tensors=None, optional=True)
        self.rho_min = RADIUS("rho_min", rho_min)
        self.rho_max = optional("rho_max", rho_max)
        self.lr_min = RADIUS("lr_min", lr_min)
        self.lr_max = optional("lr_max", lr_max)
        self._tops: list[float] = []  # lr_max of each group
        super().__init__(optimizer)

    def _apply(self) -> None:
        groups = self.optimizer.param_groups
        for group in groups[len(self._tops) :]:
            top = self.lr_max
            if top is None:
                top = _number(group.get("initial_lr", group["lr"]))
            if not top > self.lr_min:
                raise ValueError(f"lr_max must be above lr_min={self.lr_min!r}, got {top!r}")
            self._tops.append(top)
        super()._apply()

    def rho_of(self, initial: float, group: Mapping[str, Any], index: int) -> float | Tensor:
        """The radius of a group at its present learning rate."""
        top = initial if self.rho_max is None else self.rho_max
        share = (group["lr"] - self.lr_min) / (self._tops[index] - self.lr_min)
        # a learning rate may be outside of its bounds, by rounding or in a warm-up
        share = share.clamp(0, 1) if isinstance(share, Tensor) else min(max(share, 0.0), 1.0)
        radius: float | Tensor = self.rho_min + (top - self.rho_min) * share
        return radius

    def state_dict(self) -> dict[str, Any]:
        """The count of steps, the radii at the start, and the highest learning rates."""
        return super().state_dict() | {"lr_max": list(self._tops)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on where such a schedule was saved, after the optimizer's state was loaded.

        Raises:
            KeyError, ValueError: As every schedule's of a radius.
        """
        before, self._tops = self._tops, [float(x) for x in state_dict["lr_max"]]
        try:
            super().load_state_dict(state_dict)
        except BaseException:
            self._tops = before
            raise


class _FollowsOptimizer(LambdaRho):
    """A schedule over the optimizer's own count of steps, also where that was resumed or skips."""

    def _apply(self) -> None:
        self.steps = self.optimizer.kept["t"] - 1
        super()._apply()


def tail(
    optimizer: SharpnessAwareOptimizer,
    total_steps: int,
    fraction: float = 0.3,
    ramp: float = 0.1,
) -> LambdaRho:
    r"""Make only the last part of training sharpness-aware.

    Steps from ``(1 - fraction) * total_steps`` on take two passes, so training costs
    ``1 + fraction`` times as much as the base. The radius rises linearly over the first steps of
    that part. It is meant for a learning rate that decays until the end of the same
    ``total_steps``::

        radius = fastsam.tail(optimizer, total_steps=10_000)
        for x, y in batches:
            optimizer.step(closure)
            scheduler.step()
            radius.step()

    It sets ``optimizer.start``, and ``optimizer.stop`` to None. Like every constructor argument
    these are not saved: in a resumed run call ``tail`` again, and load the state dicts of optimizer
    and schedule. Where the rise is follows from the optimizer's own count of steps (``kept["t"]``),
    wherever in the training ``tail`` is called. The schedule's state has the radii themselves:
    without it a run that is resumed within the rise takes the risen part for the whole.

    Args:
        optimizer: One of fastsam's, except :class:`LETS`.
        total_steps: Steps of the whole training, at least 1, counted as the optimizer's are.
        fraction: The share of the steps that is sharpness-aware, in (0, 1]. Default 0.3.
        ramp: The share of these steps over which the radius rises, in [0, 1]. Default 0.1. With 0
            the radius has its full value at once.

    Returns:
        The schedule of the radius, whose ``step`` is to be called after each of the optimizer's.

    Raises:
        TypeError: If ``optimizer`` is not one of fastsam's.
        ValueError: If a value is out of range.

    Example:
        >>> optimizer = fastsam.SAM(model.parameters(), torch.optim.SGD, lr=0.1)
        >>> radius = fastsam.tail(optimizer, total_steps=10, fraction=0.2)
        >>> for _ in range(10):
        ...     loss = optimizer.step(closure)  # calls it twice in the last two steps
        ...     radius.step()
    """
    Integer(1)("total_steps", total_steps)
    fraction = FRACTION("fraction", fraction)
    ramp = RAMP("ramp", ramp)
    length = max(1, round(fraction * total_steps))
    start = total_steps - length
    rise = max(1, round(ramp * length))

    def factor(t: int) -> float:
        return min(1.0, (t - start + 1) / rise) if t >= start else 1.0

    schedule = _FollowsOptimizer(optimizer, factor)
    optimizer.start = start
    optimizer.stop = None
    return schedule
