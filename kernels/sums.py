"""What the reductions add up, element by element: up to five sums.

A reduction is given one of these functions, which all take the same arguments:

- ``here``: ASAM's ``T`` at the weights of this pass, where the sums have it, else 1.
- ``present``: this pass's gradient; ``d``: the direction, where its norm is taken, else the same.
- ``g``, ``e``, ``perturbed``: the first pass's gradient, the perturbation that was made of it,
  before it was rounded, and where both are; in the second pass.
- ``delta``: LETS's lr * coefficient * (validation gradient - training gradient).
"""

import triton
import triton.language as tl


@triton.jit
def of_ascent(here, present, d, g, e, perturbed, delta):
    """Squares of ``T`` times the direction, and times the gradient."""
    a = (here * d) * (here * d)
    b = (here * present) * (here * present)
    return a, b, b, b, b


@triton.jit
def of_descent(here, present, d, g, e, perturbed, delta):
    """Squares of ``T`` times the second gradient, and of that gradient."""
    a = (here * present) * (here * present)
    b = present * present
    return a, b, b, b, b


@triton.jit
def of_both(here, present, d, g, e, perturbed, delta):
    """``of_descent``'s two, and ``(g + g~) e``, ``g g~`` and ``g g``."""
    a = (here * present) * (here * present)
    return a, present * present, (g + present) * e, g * present, g * g


@triton.jit
def of_rise(here, present, d, g, e, perturbed, delta):
    """The same with ``g~ e`` in the place of the third."""
    a = (here * present) * (here * present)
    return a, present * present, present * e, g * present, g * g


@triton.jit
def of_diagonal(here, present, d, g, e, perturbed, delta):
    """LETS's hypergradient with ``g~^2`` for the Hessian's diagonal."""
    a = delta * (present * present * e)
    return a, a, a, a, a


@triton.jit
def of_difference(here, present, d, g, e, perturbed, delta):
    """LETS's hypergradient with ``g~ - g`` for the Hessian times ``e``."""
    a = delta * tl.where(perturbed, present - g, 0.0)
    return a, a, a, a, a
