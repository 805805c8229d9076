"""Base updates, one a file, each with the semantics of its ``torch.optim`` namesake.

A file has ``Columns``, the hyper-parameters as its declaration names them, at most twelve, and

    ``update(w, u, state, h, step, fresh, squared_norms)``

which gives the new weight and the new state. ``w`` is the restored weight, ``u`` the gradient,
``state`` a tuple of the state tensors in the order of their declaration, all in the dtype of the
arithmetic; ``h`` points to the group's hyper-parameters. The last three are for updates that
declare them: the step count from 1, whether the momentum buffer is new, and the sum of the squared
norms of ``u`` so far, in float64. An update that ``takes_first`` is given the first gradient after
these, zeros where there is none.
"""
