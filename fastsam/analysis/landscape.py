"""The loss along one or two directions from given weights, as numbers and as a figure."""

import importlib.util
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from .directions import NORMALIZATIONS, check_directions, combine, draw, fit, label, normalize
from .flatness import Offsets, Probe

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False)
class Landscape:
    """A slice of the loss: ``losses[i, j]`` is that at ``w + c[i] * d[0] + c[j] * d[1]``.

    Attributes:
        coordinates: ``c``, shape ``(points,)``, float64; the same for both directions.
        losses: Shape ``(points,)`` or ``(points, points)``, float64.
        directions: ``d``: for each of the one or two, a tensor for every parameter of the model,
            in its order and each once, in float32 or float64; None where it stays. They can be
            given to :func:`loss_landscape` again, for another model to be compared.
        labels: What each direction is, for an axis.
        figure: The figure, if it was asked for.

    Example:
        >>> plane = fastsam.loss_landscape(
        ...     model, lambda: loss_fn(model(inputs), labels), ndim=2, points=5
        ... )
        >>> plane.losses.shape
        (5, 5)
    """

    coordinates: np.ndarray[Any, np.dtype[np.float64]]
    losses: np.ndarray[Any, np.dtype[np.float64]]
    directions: tuple[tuple[Tensor | None, ...], ...]
    labels: tuple[str, ...]
    figure: "Figure | None" = None

    def plot(self, axes: "Axes | None" = None, **options: Any) -> "Figure":
        """Draw a line, or filled contours with a cross at ``w``. Losses not finite are left out.

        Args:
            axes: Where to draw. Default None: a new figure, which pyplot does not know of.
            **options: For matplotlib's ``plot``, or ``contourf``.

        Returns:
            The figure; ``savefig`` writes it.

        Raises:
            ImportError: If matplotlib is not installed.
        """
        check_matplotlib()
        if axes is None:
            from matplotlib.figure import Figure

            axes = Figure(layout="constrained").subplots()
        x, z = self.coordinates, np.ma.masked_invalid(self.losses)
        if z.ndim == 1:
            axes.plot(x, z, **options)
            axes.set(xlabel=self.labels[0], ylabel="loss")
            axes.grid(alpha=0.3)
        else:
            image = axes.contourf(x, x, z.T, **({"levels": 20} | options))
            axes.plot(0, 0, "w+")
            axes.set(xlabel=self.labels[0], ylabel=self.labels[1])
            axes.figure.colorbar(image, ax=axes, label="loss")
        figure: Any = axes.figure
        return figure  # type: ignore[no-any-return]


def loss_landscape(
    model: nn.Module | Iterable[Tensor],
    loss_closure: Callable[[], Tensor | float],
    directions: str | Sequence[Offsets] = "random",
    *,
    ndim: int | None = None,
    points: int = 21,
    span: float = 1.0,
    normalization: str | None = "auto",
    biases: bool = False,
    seed: int = 0,
    figure: bool = False,
) -> Landscape:
    r"""The loss on a line or a plane through the present weights :math:`w`.

    .. math:: L(w + a\, d_0), \qquad L(w + a\, d_0 + b\, d_1)

    where :math:`a` and :math:`b` take ``points`` equidistant values from ``-span`` to ``span``.
    The directions are

    - ``"random"``: drawn from a normal distribution, independently: only nearly orthogonal;
    - ``"gradient"``: :math:`d_0` is the gradient of the loss at :math:`w`, so that SAM's
      perturbation is the point :math:`a = \rho` (at unit length); :math:`d_1` is drawn as above,
      less its component along the gradient;
    - given: one or two lists with a tensor for each parameter, or None for one that stays.
      The difference of two models' weights leads from one to the other.

    ``normalization`` then scales each:

    - ``"filter"``: :math:`d_f \leftarrow d_f\, \|w_f\| / \|d_f\|` for every filter :math:`f`, that
      is, for every slice ``w[i]`` of a parameter with two dimensions or more (a convolution's
      filter, a linear layer's row), 0 where :math:`\|d_f\|` is. Parameters of fewer dimensions
      (biases, and the weights of normalisation layers) stay, as in the authors' examples, or count
      as one filter each if ``biases``. Slices of networks whose weights are scaled differently can
      then be compared;
    - ``"layer"``: the same with whole parameters in the place of filters;
    - ``"unit"``: the whole direction to length 1, so that coordinates are distances from
      :math:`w`, over every weight, those of biases too;
    - None: not at all;
    - ``"auto"``: ``"filter"`` for random directions, ``"unit"`` along the gradient, none for given.

    In the plane of the gradient :math:`d_1` is orthogonal to :math:`d_0` before it is scaled;
    after filter and layer normalisation only approximately.

    As with :func:`sharpness` everything is restored afterwards, and every evaluation starts from
    the same state. Only the gradient for a direction is computed. Random directions come from the
    CPU, so they are the same on every device.

    Cost: one evaluation for each point (``points ** 2`` in a plane), one more with its backward
    pass for the gradient; a copy of the weights and one for each direction. The host waits for a
    GPU where directions are copied to it, and once at the end.

    Args:
        model: The module, or its parameters, as for :func:`sharpness`. Parameters that need no
            gradient stay, unless a given direction moves them.
        loss_closure: Returns the loss at the present weights and does not call ``backward``: a
            tensor of one element, or a number if no gradient is needed. Use a fixed batch, as the
            losses of many points are compared.
        directions: ``"random"``, ``"gradient"``, or a sequence of one or two lists of tensors.
            Default ``"random"``.
        ndim: 1 for a line, 2 for a plane. Default None: as many as there are given directions,
            else 1.
        points: Points along a direction, at least 2; an odd number has one at :math:`w`.
            Default 21.
        span: The largest coordinate, above 0. Default 1.
        normalization: See above. Default ``"auto"``.
        biases: Whether ``"filter"`` and ``"layer"`` move parameters of fewer than two dimensions.
            Default False.
        seed: Of random directions, at least 0. Default 0; torch's own random state is not used.
        figure: Whether to draw the figure, for which matplotlib has to be installed. Default False;
            :meth:`Landscape.plot` draws it later.

    Returns:
        The coordinates, losses and directions. Losses that are not finite are kept.

    Raises:
        TypeError: If ``model`` is not a module or an iterable of tensors, ``loss_closure`` not
            callable, or ``directions`` none of the above.
        ValueError: If an argument is out of range, a direction does not fit the parameters or
            ``normalization`` leaves nothing of it.
        RuntimeError: As :func:`sharpness`.
        ImportError: If ``figure`` and matplotlib is not installed.

    Example:
        >>> line = fastsam.loss_landscape(
        ...     model, lambda: loss_fn(model(inputs), labels), "gradient", points=5, span=0.2
        ... )
        >>> line.coordinates.tolist()
        [-0.2, -0.1, 0.0, 0.1, 0.2]
        >>> bool(line.losses[0] < line.losses[2] < line.losses[4])  # up along the gradient
        True

    Reference: Li, Xu, Taylor, Studer and Goldstein, "Visualizing the loss landscape of neural
    nets", NeurIPS 2018.
    """
    count = check_directions(directions, ndim)
    if isinstance(points, bool) or not (isinstance(points, int) and points >= 2):
        raise ValueError(f"points must be an integer of at least 2, got {points!r}")
    if not (isinstance(span, Real) and 0 < span < math.inf):
        raise ValueError(f"span must be above 0 and finite, got {span!r}")
    if normalization not in (*NORMALIZATIONS, "auto"):
        allowed = ", ".join(map(repr, ("auto", *NORMALIZATIONS)))
        raise ValueError(f"normalization must be one of {allowed}, got {normalization!r}")
    if isinstance(seed, bool) or not (isinstance(seed, int) and 0 <= seed < 2**63):
        raise ValueError(f"seed must be an integer from 0 to 2**63 - 1, got {seed!r}")
    if figure:
        check_matplotlib()
    probe = Probe(model, loss_closure, "loss_landscape")
    if normalization == "auto":
        auto = {"random": "filter", "gradient": "unit"}
        normalization = auto[directions] if isinstance(directions, str) else None
    if isinstance(directions, str):
        names = [directions, "random"][:count]
        axes = draw(probe, directions, count, torch.Generator("cpu").manual_seed(seed))
    else:
        names = [f"directions[{i}]" for i in range(count)]
        axes = [fit(d, probe.params, name) for d, name in zip(directions, names, strict=True)]
    axes = [normalize(probe, d, normalization, biases) for d in axes]
    for d, name in zip(axes, names, strict=True):
        if all(x is None for x in d):
            raise ValueError(
                f"normalization {normalization!r} with biases={biases} leaves no parameter that "
                f"{name} moves; 'unit' moves all"
            )
    steps = 2 * np.arange(points) / (points - 1) - 1  # exactly 0 in the middle
    coordinates = float(span) * steps
    grid = itertools.product(coordinates.tolist(), repeat=count)
    losses = torch.stack([probe.loss(combine(axes, place)) for place in grid])
    result = Landscape(
        coordinates,
        losses.cpu().double().reshape([points] * count).numpy(),
        tuple(map(tuple, axes)),
        tuple(label(name, normalization) for name in names),
    )
    return replace(result, figure=result.plot()) if figure else result


def check_matplotlib() -> None:
    """A figure can be drawn.

    Raises:
        ImportError: If not.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError("a figure needs the package matplotlib: pip install 'fastsam[bench]'")
