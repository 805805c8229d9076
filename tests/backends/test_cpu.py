"""The torch backend on a CPU: its numbers at the sizes where it changes its way."""

import math
from itertools import count, pairwise, product

import numpy as np
import pytest
import torch

import fastsam
from fastsam.backends import reference, sums
from fastsam.backends.eager import ascents, blocks, cpu, norms, scratch

import oracles
import registry
from registry import COMBINATIONS, DTYPES, METHODS, base_of, build, build_oracle, create, numpy

#: Every size at which something changes below, with more small tensors than one piece gathers.
SHAPES = [
    (131,), (7,), (8,), (15,), (16,), (), (9,), (15,), (14,), (0,),
    (65,), (3, 5), (63,), (64,), (17,), (1,),
]  # fmt: skip
BASES = registry.BASES | registry.OWN_UPDATES
#: Of 1 and of the value: up to four steps of a dozen roundings, each half an ulp at most, in
#: float32 or float64; the curvature, about 1, hardly enlarges them.
TOLERANCE = {"float32": 2e-6, "float64": 1e-14}


@pytest.fixture
def small_blocks(monkeypatch):
    """The limits of blocks and of scratch memory, at sizes that cost nothing."""
    for module, name, value in (
        (blocks, "BLOCK", 64), (scratch, "BLOCK", 64), (blocks, "LARGE", 16),
        (ascents, "LARGE", 16), (norms, "SPAN", 16), (blocks, "DOT_SPAN", 16),
        (cpu, "WORTHWHILE", 8),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, value)


def groups_of(method, mixed=True):
    """Groups of several hyper-parameters; where mixed, the last differs in more than numbers."""
    first, second = {"params": list(range(10))}, {"params": [10, 11, 12], "rho": 0.1, "lr": 0.03}
    third = {"params": [13, 14, 15], "lr": 0.01}
    if mixed and METHODS[method].cls is not fastsam.LightSAM:  # which is never adaptive
        third |= {"adaptive": not METHODS[method].group.get("adaptive", False), "eta": 0.1}
    return [first, second, third | ({"maximize": True} if mixed and base_of(method).cls else {})]


def both(method, base, groups, dtypes=DTYPES["fp32"], **kwargs):
    """A problem, the optimizer at its start, and the oracle."""
    problem = oracles.Problem(SHAPES, seed=0)
    # on the CPU, wherever the other tests run, and in memory of their own
    dtype = getattr(torch, dtypes.param)
    params = [torch.nn.Parameter(torch.tensor(a, dtype=dtype)) for a in problem.initial()]
    optimizer = build(METHODS[method], BASES[base], params, groups, "torch", **kwargs)
    oracle = build_oracle(METHODS[method], BASES[base], params, groups, dtypes)
    oracle._skip_nonfinite = optimizer.skip_nonfinite
    return problem, params, optimizer, oracle


def close(ours, exact, dtype="float32", what="weights"):
    for k, (a, b) in enumerate(zip(numpy(ours), exact, strict=True)):
        error = np.abs(a - b) / (1 + np.abs(b))
        assert (error <= TOLERANCE[dtype]).all(), f"{what} {k}: {error.max()}"


def step(problem, params, optimizer, oracle, spoil=lambda grads, half: None):
    """One step of both, compared after each pass; ``spoil`` may change the gradients."""
    dtype = str(params[0].dtype)[6:]
    for half in (0, 1):
        ours = problem.grad(numpy(params))
        exact = problem.grad(oracle.perturbed if half else oracle.weights)
        spoil(ours, half)
        spoil(exact, half)
        for p, g in zip(params, ours, strict=True):
            p.grad = torch.tensor(g, dtype=p.dtype)
        (optimizer.second_step if half else optimizer.first_step)()
        (oracle.descend if half else oracle.ascend)(exact)
        close(params, oracle.weights if half else oracle.perturbed, dtype)
    for k, (param, state) in enumerate(zip(params, oracle.state, strict=True)):
        for name, value in state.items():
            close([optimizer.state[param][name]], [np.array(value)], dtype, (name, k))


def own_step(optimizer, params, gradient=lambda k, p: torch.sin(3 * p.detach())):
    """One step of the optimizer alone; the weights after each pass."""
    seen = []
    for half in (optimizer.first_step, optimizer.second_step):
        for k, p in enumerate(params):
            p.grad = gradient(k, p)
        half()
        seen.append([p.detach().clone() for p in params])
    return seen


@pytest.mark.parametrize("dtype", ["fp32", "fp64"])
@pytest.mark.parametrize(
    ("method", "base", "mixed"),
    # SAMAR has two ways to measure, one where no group is adaptive
    [(*pair, True) for pair in COMBINATIONS]
    + [(*pair, False) for pair in COMBINATIONS if pair[0].startswith("samar")],
)
def test_every_method_at_every_size(method, base, mixed, dtype, small_blocks):
    run = both(method, base, groups_of(method, mixed), DTYPES[dtype])
    for _ in range(3):
        step(*run)


@pytest.mark.parametrize("method", ["ssam-adaptive-clip", "samar", "lightsam-3-all"])
def test_true_sizes(method):
    """Against the reference in float64; a radius at which an element's perturbation counts."""
    large, piece, worth = blocks.LARGE, blocks.BLOCK, scratch.WORTHWHILE
    sizes = [worth - 1, worth, worth + 1, large - 1, large, large + 1, piece - 1, piece + 1]
    sizes += [3 * norms.SPAN - 1, 3 * norms.SPAN + 1, blocks.DOT_SPAN + 1]
    sizes += [piece, 2 * piece + 3] * (method == "samar")
    seen, rho = [], 0.01 if method == "lightsam-3-all" else 20.0
    for backend, dtype in (("torch", torch.float32), ("reference", torch.float64)):
        generator = torch.Generator().manual_seed(0)
        start = [torch.randn(n, generator=generator) for n in sizes]
        params = [torch.nn.Parameter(x.to(dtype)) for x in start]
        seen += own_step(create(method, params, backend, rho=rho), params)
    close(seen[0], numpy(seen[2]))
    close(seen[1], numpy(seen[3]))


def permuted(x, *order):
    """A copy in memory that is dense in another order of the dimensions."""
    return x.permute(order).contiguous().permute(np.argsort(order).tolist()).clone()


@pytest.mark.parametrize("method", [m for m in METHODS if not m.startswith("unified-1")])
@pytest.mark.filterwarnings("ignore:some parameters are float16 or bfloat16")
def test_layouts_and_tensors_that_the_operators_do_not_serve(method, small_blocks):
    x = torch.tensor(np.random.default_rng(2).standard_normal((4, 3, 5, 2)))
    last, turned = permuted(x, 0, 2, 3, 1), permuted(x, 3, 2, 1, 0)
    results = []
    for backend in ("torch", "reference"):
        datas = [x.float(), x.clone(), last.float(), last[:1, :1].float(), turned.float(),
                 turned.clone(), x.bfloat16(), x.half(), torch.zeros(4, 3, 5, 4)[..., ::2].copy_(x),
                 x.float()[:3], x.float(), x.float(), x.float()]  # fmt: skip
        # and gradients in another layout, another dtype, and of stride 0
        params = [torch.nn.Parameter(data) for data in datas]
        params[11].grad_dtype = torch.bfloat16
        before = [(p.stride(), p.data_ptr()) for p in params]
        passes = count()

        def gradient(k, p, passes=passes):
            g = torch.sin(3 * p.detach()).to(p.grad_dtype)
            if k == 10 and next(passes) % 3:  # in one pass, in the other, in both
                g = permuted(g, 0, 2, 3, 1)
            return g[:1, :1].expand_as(p) if k > 11 else g

        groups = [{"params": list(range(6))}, {"params": list(range(6, 13)), "lr": 0.01}]
        optimizer = build(METHODS[method], base_of(method, "adamw"), params, groups, backend)
        for _ in range(3):
            own_step(optimizer, params, gradient)
        assert [(p.stride(), p.data_ptr()) for p in params] == before
        results.append(params)
    for k, (a, b) in enumerate(zip(*results, strict=True)):
        # 16-bit values may round to the next one, and a gradient in bfloat16 with its weight
        ulp = {6: 2.0**-7, 7: 2.0**-10, 11: 1e-3}.get(k, 2e-6)
        torch.testing.assert_close(a, b, rtol=ulp, atol=ulp if k == 11 else 2e-6)


@pytest.mark.parametrize(
    ("first", "second", "where"),
    [
        (math.inf, None, (0, 100)), (-math.inf, None, (7, 3)), (math.nan, None, (13, 0)),
        (None, math.inf, (7, 3)), (None, math.nan, (0, 100)), (math.nan, math.nan, (0, 7)),
        (0, None, None), (None, 0, None), (0, 0, None),
    ],
)  # fmt: skip
@pytest.mark.parametrize(
    ("method", "base"),
    [
        (m, METHODS[m].bases[0] if METHODS[m].bases[0] in registry.OWN_UPDATES else "sgd-nesterov")
        for m in METHODS if not m.startswith("unified-1") and "-all" not in m
    ] + [("sam", base) for base in registry.BASES if base != "sgd-dampening"],
)  # fmt: skip
def test_odd_gradients(method, base, first, second, where, small_blocks):
    """Steps of them among others: skipped, perturbed not at all or but for one element."""
    groups = groups_of(method, mixed=False)
    problem, params, optimizer, oracle = both(method, base, groups, skip_nonfinite=True)

    def spoil(grads, half):
        value = (first, second)[half]
        for k, g in enumerate(grads):
            if value is not None and (where is None or k == where[0]):
                g[... if where is None else where[1]] = value

    def held():
        own = ("squared_norms", "ascent_squared_norms", "lam", "sharpness")
        scalars = [torch.as_tensor(optimizer.kept.get(key, 0)) for key in own]
        tensors = [x for p in params for _, x in sorted(optimizer.state[p].items())]
        return [x.detach().clone().nan_to_num(123) for x in (*params, *tensors, *scalars)]

    skips = second is not None and not math.isfinite(second)
    for number in range(4):
        before = held()
        step(problem, params, optimizer, oracle, **({} if number % 2 else {"spoil": spoil}))
        if number == 2 and skips:  # in the very first step state is made
            assert all(map(torch.equal, before, held()))
    assert optimizer.metrics["skipped"] == 2 * skips


TINY = {"eps": 1e-18, "betas": (0.9, 0.003), "lr": 1e-3}
SILENT = {
    "lightsam-1": {"eps": 1e-18}, "lightsam-2": {"eps": 1e-18}, "lightsam-3": TINY,
    "lightsam-3-all": TINY, "adasam": TINY, "sam": {"eps": 1e-30},
}  # fmt: skip


def silent_run(method, backend, groups, alias=False):
    """Weights, state and metrics of five steps; some tensors seldom have a gradient."""
    generator = torch.Generator().manual_seed(3)
    params = [torch.nn.Parameter(torch.randn(s, generator=generator)) for s in SHAPES]
    held = [p.detach() for p in params] if alias else params
    base = base_of(method, "adam" if method in SILENT else "sgd-nesterov")
    optimizer = build(METHODS[method], base, params, groups, backend, **SILENT.get(method, {}))
    seen = []
    for number, scale in enumerate((0.0, 1e-19, 0.0, 1.0, 0.0)):

        def gradient(k, p, scale=scale):
            return torch.randn(p.shape, generator=generator) * (scale if k in (0, 3, 12) else 1)

        seen += sum(own_step(optimizer, params, gradient), [])
        for name in ("sum", "ascent_sum") if method == "lightsam-2" and number == 0 else ():
            optimizer.state[params[3]][name].fill_(1e-40)  # as a checkpoint might have it
        assert [p.data_ptr() for p in params] == [p.data_ptr() for p in held]
        seen += [x.clone() for p in params for _, x in sorted(optimizer.state[p].items())]
        seen += [x for _, x in sorted(optimizer.metrics.items())]
    return [x for x in seen if x.numel()]


@pytest.mark.parametrize("method", SILENT)
def test_averages_below_the_smallest_normal_number(method, small_blocks):
    groups = groups_of(method, mixed=False)
    ours, exact = (silent_run(method, backend, groups) for backend in ("torch", "reference"))
    for x, y in zip(ours, exact, strict=True):
        # what is averaged may cancel; and below 2^-126 numbers are multiples of 2^-149
        torch.testing.assert_close(x, y, rtol=2e-6, atol=2e-6 * float(y.abs().max()) + 3e-45)
    smallest = min(float(y[y > 0].min()) for y in exact if (y > 0).any())
    assert smallest < 2.0**-126 or "betas" not in SILENT[method]


@pytest.mark.parametrize("method", METHODS)
def test_groups_and_aliases_do_not_change_a_bit(method, small_blocks):
    """The same parameters in other groups, and perturbed in place because they are shared."""
    once = silent_run(method, "torch", [{"params": list(range(16))}])
    for ends, alias in (([0, 16], True), ([0, 1, 4, 9, 12, 16], False), (range(17), False)):
        groups = [{"params": list(range(a, b))} for a, b in pairwise(ends)]
        assert all(map(torch.equal, once, silent_run(method, "torch", groups, alias)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ssam_is_sam_where_the_norms_agree(dtype, small_blocks):
    """Also where only one of the passes has tensors that the operators do not serve."""
    torch.manual_seed(0)
    start = [torch.randn(s, dtype=dtype) for s in [(12, 11), (40,), (5,)]]
    results = []
    for transposed, cls in product((False, True), (fastsam.SAM, fastsam.SSAM)):
        params = [torch.nn.Parameter(x.clone()) for x in start]
        optimizer = cls(params, torch.optim.SGD, lr=0.1, momentum=0.9, backend="torch")
        buffer = torch.sin(start[0]).t().contiguous().t() if transposed else torch.sin(start[0])
        optimizer.state[params[0]]["momentum_buffer"] = buffer
        for _ in range(3):
            own_step(optimizer, params, lambda k, p: torch.cos(start[k]))
            assert cls is fastsam.SAM or optimizer.metrics["renormalization"] == 1.0
        results.append([p.detach() for p in params])
    assert all(map(torch.equal, results[0] + results[2], results[1] + results[3]))
    close(results[0], numpy(results[2]), str(dtype)[6:])


@pytest.mark.parametrize(("method", "base"), COMBINATIONS)
def test_the_fast_path_is_taken(method, base, small_blocks, monkeypatch):
    def refuse(*args):
        raise AssertionError("one tensor at a time")

    names = ["advance_one", "perturb_one", "update_one", "final_gradient", "scaled_norm"]
    for name in names:
        monkeypatch.setattr(reference, name, refuse)
    if method in ("samar", "samar-callable"):  # not adaptive
        monkeypatch.setattr(sums, "descent_sums", refuse)
    shapes = [(4, 4, 5, 2), (8,), (3, 2, 2, 2), (), (1, 3)]
    params = [torch.nn.Parameter(torch.ones(shape)) for shape in shapes]
    params[0].data = params[0].data.to(memory_format=torch.channels_last)
    groups = [{"params": [0, 1]}, {"params": [2, 3, 4], "lr": 0.01}]
    optimizer = build(METHODS[method], BASES[base], params, groups, "torch")

    def gradient(k, p):  # the last has another stride, which means nothing, in its first dimension
        g = torch.sin(3 * p.detach())
        return g.as_strided(p.shape, (1, 1)) if k == 4 else g

    for _ in range(2):
        own_step(optimizer, params, gradient)
    assert all((p != 1).all() for p in params)
