"""Stochastic rounding to bfloat16: to a neighbour, right on average, the same bits everywhere.

With w = 0 and a radius of 1, USAM stores w + g; with a learning rate of 1, SGD stores w - g: so a
gradient in float32 is what is rounded, in either pass, with no arithmetic before it.
"""

import numpy as np
import pytest
import torch

import fastsam

from networks import same
from registry import BACKENDS, DEVICE

INF = float("inf")
BRAIN = torch.bfloat16


def zeros(*shapes):
    params = [torch.nn.Parameter(torch.zeros(s, dtype=BRAIN, device=DEVICE)) for s in shapes]
    for p in params:
        p.grad_dtype = torch.float32
    return params


def usam(params, backend="torch", seed=0, lr=1.0, **kwargs):
    kwargs = {"base_optimizer": torch.optim.SGD, "rho": 1.0} | kwargs
    return fastsam.USAM(params, lr=lr, backend=backend, rounding="stochastic", seed=seed, **kwargs)


def give(params, values):
    for p, x in zip(params, values, strict=True):
        p.grad = x


def rounded(values, backend="torch", seed=0, half="first", steps=1, groups=None):
    """What parameters hold that are given these values, in the last of some steps."""
    params = zeros(*(x.shape for x in values))
    optimizer = usam(groups(params) if groups else params, backend, seed)
    for step in range(steps):
        with torch.no_grad():
            for p in params:
                p.zero_()
        give(params, [x if half == "first" else torch.zeros_like(x) for x in values])
        optimizer.first_step()
        if half == "first" and step == steps - 1:
            result = [p.detach().clone() for p in params]
            optimizer.restore()
            return result
        give(params, [-x for x in values])
        optimizer.second_step()
    return [p.detach().clone() for p in params]


def neighbours(x):
    """The bfloat16 numbers below and above, as float64; equal where x is one. In exact integers."""
    bits = np.abs(x).astype(np.float32).view(np.uint32)
    below = (bits & 0xFFFF0000).view(np.float32).astype(np.float64)
    with np.errstate(over="ignore"):
        above = np.where(bits & 0xFFFF, (bits & 0xFFFF0000) + 0x10000, bits & 0xFFFF0000)
    above = above.astype(np.uint32).view(np.float32).astype(np.float64)
    sign = np.where(np.signbit(x), -1.0, 1.0)
    low, high = sign * below, sign * above
    return np.minimum(low, high), np.maximum(low, high)


def probability(x):
    """Of going up."""
    low, high = neighbours(x)
    gap = np.where(high > low, high - low, 1.0)
    return (x.astype(np.float64) - low) / gap


def tensor(x):
    return torch.from_numpy(np.asarray(x, dtype=np.float32)).to(DEVICE)


def numpy(x):
    return x.detach().cpu().double().numpy()


def values_of(size, seed=0):
    """float32 numbers of all magnitudes whose squares are numbers, too, of both signs."""
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(size) * 2.0 ** rng.integers(-60, 50, size)).astype(np.float32)


# --- one rounding --------------------------------------------------------------------------------


@pytest.mark.parametrize("half", ["first", "second"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_to_one_of_the_neighbours(backend, half):
    x = values_of(3000)
    x[::7] = tensor(x[::7]).to(BRAIN).float().cpu().numpy()  # what bfloat16 holds stays
    ours = numpy(rounded([tensor(x)], backend, half=half)[0])
    low, high = neighbours(x)
    assert ((ours == low) | (ours == high)).all()
    assert (ours[::7] == x[::7]).all()
    inexact = low < high
    assert 0.4 < (ours == high)[inexact].mean() < 0.6  # both, and neither always


@pytest.mark.parametrize("half", ["first", "second"])
def test_unbiased_over_elements(half):
    """Means over 2**16 elements of the same value, within 4 standard errors."""
    exact = [1.0 + 2.0**-8 * q for q in (0.5, 2.0**-9, 1 - 2.0**-9, 0.75)]
    exact += [-0.3, np.pi, -np.e * 2.0**-40, 1e10 / 3]
    for x in np.float32(exact):
        ours = numpy(rounded([tensor(np.full(2**16, x))], half=half)[0])
        low, high = neighbours(x)
        p = probability(x)
        assert set(ours) <= {float(low), float(high)}
        error = (ours.mean() - float(x)) / (high - low)
        assert abs(error) <= 4 * np.sqrt(p * (1 - p) / ours.size), x


@pytest.mark.parametrize("half", ["first", "second"])
def test_unbiased_over_seeds(half):
    """Element by element, over 400 seeds; of 130 elements, one in 120 tests would be beyond 4."""
    x, seeds = values_of(130, seed=1), 400
    ups = np.zeros(x.shape)
    low, high = neighbours(x)
    for seed in range(seeds):
        ups += numpy(rounded([tensor(x)], seed=seed, half=half)[0]) == high
    p = probability(x)
    assert (low < high).all()
    assert (np.abs(ups / seeds - p) <= 4 * np.sqrt(p * (1 - p) / seeds)).all()


def test_unbiased_over_steps():
    """What a weight takes up in many small updates, each far below its resolution."""
    params = zeros((2000,))
    with torch.no_grad():
        params[0].fill_(1.0)
    optimizer, update, steps = usam(params, rho=0.0), 2.0**-12, 64
    for _ in range(steps):
        optimizer.step(lambda: give(params, [torch.full((2000,), -update, device=DEVICE)]))
    moved = numpy(params[0]) - 1
    gap = 2.0**-7
    deviation = np.sqrt(steps * update * (gap - update) / 2000)
    assert abs(moved.mean() - steps * update) < 4 * deviation
    assert torch.full((), 1 + update).to(BRAIN) == 1  # to nearest nothing would ever happen


def test_bits_are_independent():
    """Neighbours in memory, steps, passes, parameters and seeds: agreement is a fair coin's."""
    n, half_way = 2**14, 1 + 2.0**-8
    x = tensor(np.full(n, half_way))
    runs = {
        "first": rounded([x, x]),
        "second": rounded([x, x], half="second"),
        "next step": rounded([x, x], steps=2),
        "third": rounded([x, x], steps=3),
        "seed 1": rounded([x, x], seed=1),
        "seed 2**31": rounded([x, x], seed=2**31),
    }
    ups = {(name, k): numpy(y) > half_way for name, ys in runs.items() for k, y in enumerate(ys)}
    ups |= {(f"shifted by {k}", 0): np.roll(ups["first", 0], k) for k in (1, 2, 4, 32, 1024)}
    names = list(ups)
    for i, a in enumerate(names):
        assert abs(ups[a].mean() - 0.5) < 4 * 0.5 / np.sqrt(n)
        for b in names[:i]:
            agreement = (ups[a] == ups[b]).mean()
            assert abs(agreement - 0.5) < 4 * 0.5 / np.sqrt(n), (a, b)


# --- odd numbers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_infinities_nan_and_zeros(backend):
    (param,) = zeros((2000,))
    odd = torch.tensor([INF, -INF, float("nan"), 0.0, -0.0], device=DEVICE).repeat(400)
    with torch.no_grad():
        param.copy_(odd)
    optimizer = usam([param], backend, lr=0.0)
    give([param], [torch.where(odd == 0, 0.0, 1.0)])
    optimizer.first_step()
    torch.testing.assert_close(param.float(), odd, rtol=0, atol=0, equal_nan=True)
    give([param], [torch.where(odd == 0, 0.0, 1.0)])
    optimizer.second_step()
    torch.testing.assert_close(param.float(), odd, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("backend", BACKENDS)
def test_subnormals(backend, sign):
    """bfloat16's are multiples of 2**-133; float32's of 2**-149."""
    x = (
        sign
        * np.float32([0.25, 0.5, 1.5, 3.125, 100.75, 126.5, 127.5] * 300)
        * np.float32(2.0**-133)
    )
    ours = numpy(rounded([tensor(x)], backend, half="second")[0])  # no norm, which would be 0
    low, high = neighbours(x)
    assert ((ours == low) | (ours == high)).all()
    p, n = probability(x), x.size
    deviation = np.sqrt((p * (1 - p)).sum()) / n
    assert abs(((ours - x.astype(np.float64)) * 2.0**133).mean()) < 4 * deviation


@pytest.mark.parametrize("backend", BACKENDS)
def test_largest_numbers(backend):
    """The largest stays; beyond it there is infinity, as there is for the nearest."""
    largest = float(torch.finfo(BRAIN).max)
    beyond = np.float32(largest * (1 + 2.0**-10))
    x = np.float32([largest, -largest, beyond, -beyond, largest * (1 - 2.0**-10)] * 100)
    ours = numpy(rounded([tensor(x)], backend, half="second")[0]).reshape(100, 5).T
    assert (ours[0] == largest).all() and (ours[1] == -largest).all()
    assert set(ours[2]) <= {largest, INF} and set(ours[3]) <= {-largest, -INF}
    assert set(ours[4]) == {largest, float(neighbours(x)[0][4])}


# --- the same bits -------------------------------------------------------------------------------


SHAPES = [(2500,), (), (0,), (9, 13), (1,)]


@pytest.mark.parametrize("half", ["first", "second"])
def test_backends_agree(half):
    values = [tensor(values_of(int(np.prod(s)), seed=2).reshape(s)) for s in SHAPES]
    results = [rounded(values, backend, 7, half, steps=2) for backend in BACKENDS]
    assert same(results[0], results[1]) and same(results[0], results[2])
    assert same(rounded(values, "torch", 7, half, steps=2), results[1])  # and again
    assert not same(rounded(values, "torch", 8, half, steps=2), results[1])
    assert not same(rounded(values, "torch", 7, half, steps=1), results[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_grouping_changes_nothing(backend):
    """One group, one for each parameter, or something in between; with or without a neighbour."""
    values = [tensor(values_of(700, seed=k)) for k in range(4)]
    one = rounded(values, backend)
    each = rounded(values, backend, groups=lambda ps: [{"params": [p]} for p in ps])
    some = rounded(values, backend, groups=lambda ps: [{"params": ps[:1]}, {"params": ps[1:]}])
    assert same(one, each) and same(one, some)
    assert not torch.equal(one[0], rounded(values[:1] * 2, backend)[1])  # another place

    for half in ("first_step", "second_step"):
        params = zeros(*(x.shape for x in values))
        optimizer = usam(params, backend)
        give(params, values if half == "first_step" else [torch.zeros_like(x) for x in values])
        if half == "first_step":
            params[1].grad = None
        optimizer.first_step()
        if half == "second_step":
            give(params, [-x for x in values])
            params[1].grad = None
            optimizer.second_step()
            one = rounded(values, backend, half="second")
        assert not params[1].any()
        assert same(params[:1] + params[2:], one[:1] + one[2:])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["column-major", "strided", "misaligned"])
def test_elements_count_in_memory_order(kind, backend):
    x = tensor(values_of(117).reshape(9, 13))
    memory = {
        "column-major": torch.zeros(13, 9, device=DEVICE, dtype=BRAIN).t(),
        "strided": torch.zeros(9, 26, device=DEVICE, dtype=BRAIN)[:, ::2],
        "misaligned": torch.zeros(118, device=DEVICE, dtype=BRAIN)[1:].view(9, 13),
    }[kind]
    expected = rounded([x.t().contiguous()])[0].t() if kind == "column-major" else rounded([x])[0]
    param = torch.nn.Parameter(memory)
    param.grad_dtype = torch.float32
    optimizer = usam([param], backend)
    give([param], [x])
    optimizer.first_step()
    assert torch.equal(param, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_float64_gradients_take_the_same_bits(backend):
    values = [tensor(values_of(1025)), tensor(values_of(1))[0]]  # exact in float32
    params = zeros(*(x.shape for x in values))
    for p in params:
        p.grad_dtype = torch.float64
    optimizer = usam(params, backend)
    give(params, [x.double() for x in values])
    optimizer.first_step()
    assert same(params, rounded(values))
