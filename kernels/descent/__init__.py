"""Descent rules, one a file: ``u = c * g~ + c1 * g``.

A file has ``Columns``, the rule's hyper-parameters as its declaration names them, at most four,
and these functions, which one thread runs in float64 when the sums are known. ``state`` is a tuple
of the rule's scalars, in the order of their declaration: of three where it has three, else of two.

| function | gives | needed |
| --- | --- | --- |
| ``coefficients(state, first, second, product, h)`` | ``c, c1`` (and ``a, a1``) | always |
| ``adapt(state, sharpness, h)`` | the scalars after this step, as many | with ``adapt`` |

``coefficients`` finds the loss at ``w + e`` in ``state`` after these, where the declaration asks
for it, and ``<g~, e>`` in the place of ``product``, where it asks for ``"rise"``. With
``rate`` it gives a third number, the step size.

``first`` is the first gradient's squared norm, ``second`` the second's, after SSAM's rescaling if
that is asked for, and ``product`` their dot product. ``sharpness`` is ``<g + g~, e> / 2``. Of a
rule that is ``apart``, ``lr * (a * g~ + a1 * g)`` is taken away beside what the base does; of one
that ``keeps``, ``a * g~ + a1 * g`` is written to where the first gradient was. One that ``reuses``
has that in the place of the first gradient, in a step of one pass. A rule with ``given`` numbers
finds these in ``state``.
"""
