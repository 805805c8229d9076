"""Scalars of a step as Python's numbers, which they are on a CPU, and as 0-dim tensors."""

from contextlib import contextmanager

import pytest
import torch

from fastsam.backends import sums
from fastsam.backends.eager import norms

from registry import METHODS, create

SETTINGS = {
    "plain": {},
    "clips": {"max_grad_norm": 0.5},
    "skips": {"skip_nonfinite": True},
}


def trained(method, base, settings, gradients):
    params = [torch.nn.Parameter(torch.linspace(-1, 1, n)) for n in (1030, 15, 1)]
    optimizer = create(method, params, "reference", base, **settings)
    passes = iter(gradients)
    for _ in range(3):
        while optimizer.ascents_left:
            for p, g in zip(params, next(passes), strict=True):
                p.grad = g.clone()
            optimizer.first_step()
        for p, g in zip(params, next(passes), strict=True):
            p.grad = g.clone()
        optimizer.second_step()
    scalars = optimizer._passes.scalars.vector
    assert scalars is not None
    return [p.detach().clone() for p in params], scalars.clone()


@contextmanager
def as_tensors(scalars):
    yield scalars


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("method", METHODS)
def test_both_give_the_same_bits(method, settings, monkeypatch):
    """Both are IEEE's float64; the second of three steps has gradients that are not finite."""
    base = METHODS[method].bases[0]
    torch.manual_seed(0)
    gradients = [[torch.randn(n) for n in (1030, 15, 1)] for _ in range(12)]
    gradients[2][1][3] = torch.inf
    gradients[3][0][7] = torch.nan
    try:
        numbers = trained(method, base, SETTINGS[settings], gradients)
    except (TypeError, ValueError) as refusal:
        pytest.skip(str(refusal))
    monkeypatch.setattr(sums, "numbers", as_tensors)
    monkeypatch.setattr(sums, "_number", lambda x, scalars: x + torch.zeros_like(scalars[0]))
    tensors = trained(method, base, SETTINGS[settings], gradients)
    torch.testing.assert_close(tensors, numbers, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("squares", [False, True])
@pytest.mark.parametrize("count", [0, 1, norms.FEW, norms.FEW + 1])
def test_few_numbers_are_added_up_as_many(count, squares):
    values = torch.randn(count, generator=torch.Generator().manual_seed(0))
    found = norms.total(
        values.unbind() if count else [], torch.zeros((), dtype=torch.float64), squares
    )
    exact = values.double()
    expected = (exact.square() if squares else exact).sum()
    assert found.dtype == torch.float64 and found.dim() == 0
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=1e-14)


def test_vectors_and_other_dtypes_are_added_up_as_well():
    like = torch.zeros((), dtype=torch.float64)
    values = [torch.tensor(1.5), torch.tensor([2.0, 3.0]), torch.tensor(4.0, dtype=torch.float64)]
    assert norms.total(values, like, squares=True) == 1.5**2 + 4 + 9 + 16
    assert norms.total(values[::2], like) == 5.5
    infinite = norms.total([torch.tensor(torch.inf), torch.tensor(-torch.inf)], like)
    assert infinite.isnan()


def test_scalars_stay_if_the_block_fails():
    scalars = torch.arange(3.0, dtype=torch.float64)
    with pytest.raises(ZeroDivisionError), sums.numbers(scalars) as s:
        s[0] = 1 / 0
    assert scalars.tolist() == [0, 1, 2]
