"""Ascent rules, one a file: ``e = radius * T^2 * direction``.

A file has ``Columns``, the rule's hyper-parameters as its declaration names them, at most three,
and these functions. Elements are in the dtype of the arithmetic; ``state`` is a tuple of the rule's
state tensors in the order of their declaration, and ``h`` points to the hyper-parameters.

| function | gives | needed |
| --- | --- | --- |
| ``direction(g, state, h)`` | the direction, from the new state (``from_old``: the old) | always |
| ``measured(g, state, h)`` | what the norm is taken of, if not the direction | if declared |
| ``radius(rho, norm, total, h)`` | what the direction is multiplied by | always |
| ``advance(g, state, h)`` | the state after gradient ``g``, a tuple | with state |
| ``usable(state, norm)`` | whether the new state may replace the old | with state |
| ``accumulate(total, squared_norm)`` | the accumulator after this step | with an accumulator |

A rule whose declaration names a ``base_state`` finds it in ``direction``, after its own state: what
the base optimizer has kept of the step before, NaN in a tensor that has none yet. Elements where
the gradient is 0 and there is no state of the rule's own have to have the direction 0.

Of a rule with an accumulator the first entry of ``state`` in ``direction`` and ``measured`` is that
of the steps before, in float64, and the others follow it.

A rule whose declaration has ``noise=True`` is given numbers in ``g`` that are uniform in (-1, 1),
one for each element and others in every step (``noise.py``).

``norm`` is the norm that the declaration asks for. ``total`` is the accumulator with this step's
norm, in float64; 0 for a rule that has none.
"""
