"""The oracles' storage types against torch's own casts."""

import numpy as np
import pytest
import torch

from oracles import rounding, ulp


def bits(x):
    return np.asarray(x, dtype=np.float64).view(np.int64)


def assert_same_rounding(x, dtype):
    expected = torch.from_numpy(x).to(getattr(torch, dtype)).double().numpy()
    actual = rounding(dtype)(x)
    nan = np.isnan(expected)
    np.testing.assert_array_equal(np.isnan(actual), nan)
    np.testing.assert_array_equal(bits(actual)[~nan], bits(expected)[~nan])  # with zeros' signs


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_rounding_of_every_16_bit_number_and_the_ties_between(dtype):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(getattr(torch, dtype))
    every = every.double().numpy()  # inf, NaN, both zeros and the subnormals are among them
    assert_same_rounding(every, dtype)
    finite = np.unique(every[np.isfinite(every)])
    infinite = finite[-1] + ulp(finite[-1], dtype) / 2  # from here on
    ties = np.append((finite[1:] + finite[:-1]) / 2, [infinite, -infinite]).astype(np.float32)
    # Input that float32 holds, since torch rounds to float32 on the way.
    for x in (ties, np.nextafter(ties, np.float32(np.inf)), np.nextafter(ties, np.float32(0))):
        assert_same_rounding(x.astype(np.float64), dtype)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_rounding_of_random_bit_patterns(dtype):
    rng = np.random.default_rng(0)
    singles = rng.integers(0, 2**32, 100_000, dtype=np.uint32).view(np.float32)
    singles = singles[np.isfinite(singles)].astype(np.float64)
    singles = np.append(singles, [0.0, 2.0**-149, np.finfo(np.float32).max])
    ties = singles + np.copysign(ulp(singles, "float32") / 2, singles)
    doubles = rng.integers(0, 2**64, 100_000, dtype=np.uint64).view(np.float64)
    for x in (ties, -ties, np.nextafter(ties, np.inf), np.nextafter(ties, -np.inf), doubles):
        assert_same_rounding(x, dtype)


@pytest.mark.parametrize(("dtype", "p"), [("bfloat16", 8), ("float16", 11)])
def test_rounding_rounds_once(dtype, p):
    # Just above the tie between 1 and the number after it; in float32 it would be that tie.
    assert rounding(dtype)(1 + 2.0**-p + 2.0**-40) == 1 + 2.0 ** (1 - p)
    assert rounding(dtype)(1 + 2.0**-p) == 1.0


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_ulp_is_numpys_spacing(dtype):
    rng = np.random.default_rng(0)
    kind = np.dtype(dtype).type
    info = np.finfo(kind)
    span = rng.uniform(np.log2(float(info.smallest_subnormal)), np.log2(float(info.max)) - 1, 1000)
    x = np.append(rounding(dtype)(2.0**span), [0, info.smallest_subnormal, info.tiny, 1, 2])
    np.testing.assert_array_equal(ulp(-x, dtype), np.spacing(x.astype(kind)))


def test_ulp_of_bfloat16():
    x = [0.0, 2.0**-133, 2.0**-126, 0.99, 1.0, -1.99, 2.0, 2.0**127, np.inf, np.nan]
    unit = [2.0**-133] * 3 + [2.0**-8, 2.0**-7, 2.0**-7, 2.0**-6, 2.0**120, np.nan, np.nan]
    np.testing.assert_array_equal(ulp(np.array(x), "bfloat16"), unit)
