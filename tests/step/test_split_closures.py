"""The first pass on a part of the batch: ``fastsam.split_closures``."""

import collections

import numpy as np
import pytest
import torch

import fastsam

from conftest import DEVICE
from registry import BACKENDS

SGD = {"lr": 0.1, "momentum": 0.9}


def seen_by(batch, fraction=0.25):
    """What the two closures are called with."""
    seen = []
    first, second = fastsam.split_closures(seen.append, batch, fraction)
    first()
    second()
    return seen


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_against_its_equation(backend):
    """Linear least squares in float64: both gradients by hand."""
    torch.manual_seed(0)
    x = torch.randn(9, 4, dtype=torch.float64, device=DEVICE)
    y = torch.randn(9, dtype=torch.float64, device=DEVICE)
    w = torch.nn.Parameter(torch.randn(4, dtype=torch.float64, device=DEVICE))
    at_w = w.detach().clone()
    optimizer = fastsam.SAM([w], torch.optim.SGD, rho=0.3, lr=0.1, backend=backend)

    def closure(batch):
        x, y = batch
        loss = ((x @ w - y) ** 2).mean()
        loss.backward()
        return loss

    loss = optimizer.step(*fastsam.split_closures(closure, (x, y), ascent_fraction=0.3))

    def gradient(at, n):
        return 2 / n * x[:n].T @ (x[:n] @ at - y[:n])

    part = gradient(at_w, 3)  # 2.7 samples, rounded up
    expected = at_w - 0.1 * gradient(at_w + 0.3 * part / part.norm(), 9)
    # one norm and two sums of 9 in float64
    torch.testing.assert_close(w.detach(), expected, rtol=1e-13, atol=1e-14)
    assert loss.item() == pytest.approx(((x[:3] @ at_w - y[:3]) ** 2).mean().item(), rel=1e-13)


@pytest.mark.parametrize(
    ("n", "fraction", "count"),
    [
        (1, 0.25, 1),
        (2, 0.25, 1),
        (4, 0.25, 1),
        (5, 0.25, 2),
        (64, 0.25, 16),
        (7, 1.0, 7),
        (100, 0.07, 7),
    ],
)
def test_how_many_samples(n, fraction, count):
    part, whole = seen_by(torch.arange(n), fraction)
    assert part.tolist() == list(range(count)) and whole.tolist() == list(range(n))


Named = collections.namedtuple("Named", "x y")


@pytest.mark.parametrize(
    "make",
    [
        lambda x: (x, x),
        lambda x: [x, {"mask": x}],
        lambda x: {"ids": x, "kind": "text", "scale": torch.tensor(2.0), "none": None},
        lambda x: Named(x, x),
        lambda x: collections.OrderedDict(a=x),
        lambda x: collections.UserDict(a=x, b=(x,)),
        lambda x: collections.defaultdict(list, a=x),
    ],
    ids=["tuple", "list", "dict", "named", "ordered", "user", "default"],
)
def test_kinds_of_batches(make):
    x = torch.arange(8.0).view(8, 1)
    part, whole = seen_by(make(x))
    expected = make(x[:2])
    assert type(part) is type(expected) and repr(part) == repr(expected)
    assert repr(whole) == repr(make(x))


def test_nothing_is_copied():
    x = torch.randn(8, 3)
    part, whole = seen_by(x)
    assert part.data_ptr() == x.data_ptr() and whole is x


def test_in_steps_of_the_base_the_whole_batch_decides():
    torch.manual_seed(0)
    x = torch.randn(8, 3, dtype=torch.float64)
    w = torch.nn.Parameter(torch.randn(3, dtype=torch.float64))
    at_w = w.detach().clone()
    optimizer = fastsam.SAM([w], torch.optim.SGD, lr=0.1, start=5)

    def closure(x):
        loss = (x @ w).square().mean()
        loss.backward()
        return loss

    optimizer.step(*fastsam.split_closures(closure, x))
    torch.testing.assert_close(w.detach(), at_w - 0.1 * 2 / 8 * x.T @ (x @ at_w))


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((None, torch.ones(4)), TypeError, ["closure", "callable", "None"]),
        ((print, 3), TypeError, ["batch", "tensor", "3", "second_closure"]),
        ((print, {"a": torch.tensor(1.0)}), TypeError, ["batch", "dimension 0"]),
        ((print, (torch.ones(4), ["a"] * 4)), TypeError, ["batch", "'a'", "second_closure"]),
        ((print, (torch.ones(4), np.arange(4))), TypeError, ["batch", "array", "dimension 0"]),
        ((print, torch.nn.utils.rnn.pack_sequence([torch.ones(4)])), TypeError, ["Packed"]),
        ((print, (torch.ones(4), torch.ones(5))), ValueError, ["batch", "[4, 5]"]),
        ((print, torch.ones(0, 3)), ValueError, ["batch", "at least 1", "[0]"]),
        ((print, torch.ones(4), 0), ValueError, ["ascent_fraction", "(0, 1]", "0"]),
        ((print, torch.ones(4), 1.5), ValueError, ["ascent_fraction", "(0, 1]", "1.5"]),
        ((print, torch.ones(4), float("nan")), ValueError, ["ascent_fraction", "nan"]),
        ((print, torch.ones(4), "all"), ValueError, ["ascent_fraction", "'all'"]),
    ],
)  # fmt: skip
def test_errors_name_the_argument(arguments, error, words):
    with pytest.raises(error) as raised:
        fastsam.split_closures(*arguments)
    assert all(word in str(raised.value) for word in words), raised.value


def problem(cls=fastsam.SAM, **settings):
    torch.manual_seed(0)
    w = torch.nn.Parameter(torch.randn(3, dtype=torch.float64))
    optimizer = cls([w], torch.optim.SGD, rho=0.1, lr=0.1, **settings)

    def closure(x):
        loss = (x @ w).square().mean()
        loss.backward()
        return loss

    return w, optimizer, fastsam.split_closures(closure, torch.randn(8, 3, dtype=torch.float64))


def refused(w, error, words, step, *arguments):
    before = w.detach().clone()
    with pytest.raises(error) as raised:
        step(*arguments)
    assert all(word in str(raised.value) for word in words), raised.value
    assert torch.equal(w, before)


def test_where_the_second_closure_is_something_else():
    """Neither a validation batch, nor another micro-batch."""
    w, sam, closures = problem()
    words = ["split_closures", "step(*closures)"]
    refused(w, TypeError, ["LETS.step", *words], fastsam.LETS(sam, rho_lr=0.1).step, *closures)
    w, sam, closures = problem()
    refused(w, TypeError, ["step_micro_batches", *words], sam.step_micro_batches, closures)


def test_differences_between_batches_are_not_amplified():
    w, sam, closures = problem(perturb_every=3, amplify=True)
    refused(w, ValueError, ["amplify", "True", "second closure"], sam.step, *closures)
    sam.step(closures[1])


@pytest.mark.parametrize(
    ("cls", "error", "words"),
    [
        (fastsam.MSAM, TypeError, ["second_closure", "MSAM"]),
        (fastsam.DelayedSAM, TypeError, ["second_closure", "DelayedSAM"]),
        (fastsam.TraceSAM, RuntimeError, ["TraceSAM takes one closure"]),
    ],
)
def test_methods_that_take_one_closure(cls, error, words):
    settings = {"momentum": 0.9} if cls is fastsam.MSAM else {}
    w, optimizer, closures = problem(cls, **settings)
    refused(w, error, words, optimizer.step, *closures)
