"""Sums on paper against an oracle: arrays, tolerances, and an oracle of one group."""

import inspect

import numpy as np

from oracles import Oracle

SHAPES = [(3, 5), (7,), (), (1,), (2, 1, 3)]
STEPS = 20
# The sums on paper leave out the 1e-12 beside norms of 5 or more: at most 2e-13 of a term, and the
# weights are sums of a few terms.
PAPER = 1e-11


def assert_near(actual, expected, tolerance):
    """Relative to the largest element: near zero, cancellation leaves an error of that scale."""
    expected = np.asarray(expected)
    scale = np.max(np.abs(expected), initial=0.0)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * scale)


def oracle(w, *, base="sgd", lr=0.1, **kwargs):
    """All weights in one group; group keys and the oracle's own arguments in one list."""
    own = inspect.signature(Oracle).parameters.keys()
    group = {"params": range(len(w)), "lr": lr, **{k: kwargs[k] for k in kwargs.keys() - own}}
    return Oracle(arrays(*w), [group], base, **{k: kwargs[k] for k in kwargs.keys() & own})


def arrays(*values):
    return [None if v is None else np.array(v, dtype=np.float64) for v in values]


def flat(values):
    return np.concatenate([np.ravel(v) for v in values])
