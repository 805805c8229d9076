"""Steps whose micro-batches are perturbed one by one."""

import copy
import gc
import weakref

import numpy as np
import pytest
import torch

import fastsam

from networks import bits, closure_of, model_and_data, same
from registry import BACKENDS, BASES, DEVICE, METHODS, create, numpy

SGD = {"base_optimizer": torch.optim.SGD, "lr": 0.1, "momentum": 0.9}
SERVED = ["sam", "asam", "sam-clip", "usam", "unified-1/t", "unified-1-1/t", "unified-callable"]
OTHERS = ("adasam", "asam-max", "esam", "lesam", "functional-adam")
REFUSED = [name for name in METHODS if name not in (*SERVED, *OTHERS)]
FOREIGN = {"base_optimizer": torch.optim.RMSprop, "lr": 0.01, "eps": 1e-3}


class Regression:
    """A network's squared error, in float64; its last parameter only in some micro-batches."""

    def __init__(self, seed=4):
        torch.manual_seed(seed)
        kwargs = {"dtype": torch.float64, "device": DEVICE}
        self.x, self.y = torch.randn(12, 4, **kwargs), torch.randn(12, 3, **kwargs)
        shapes = ((4, 5), (5,), (5, 3), (3,), (2,))
        self.start = [0.5 * torch.randn(*shape, **kwargs) for shape in shapes]

    def params(self):
        return [torch.nn.Parameter(w.clone()) for w in self.start]

    def loss(self, params, rows, bias):
        w, b, v, c, _ = params  # the last one is in no micro-batch
        out = (self.x[rows] @ w + b).tanh() @ v + (c if bias else 0)
        return (out - self.y[rows]).square().sum(1).mean()

    #: Rows, and whether the bias takes part.
    PARTS = [(slice(0, 4), True), (slice(4, 8), False), (slice(8, 12), True)]

    def closures(self, params):
        return [closure_of(lambda part=part: self.loss(params, *part)) for part in self.PARTS]


def gradient(problem, params, part):
    grads = torch.autograd.grad(problem.loss(params, *part), params, allow_unused=True)
    return [None if g is None else g for g in grads]


def mean_gradient(problem, params, method, t, sign=1):
    """The mean of the micro-batches' gradients, each at ``w + e`` of its own; ``None`` for none.

    ``sign`` is -1 where the base maximizes, and the worst point is that of the lowest loss.
    """
    spec = METHODS[method]
    lam = spec.oracle.get("lam", 1.0)
    lam = lam(t) if callable(lam) else lam
    group = {"rho": 0.05, "eta": 0.0, "adaptive": False} | spec.group
    total = [None] * len(params)
    for part in problem.PARTS:
        grads = gradient(problem, params, part)
        scales = [p.detach().abs() + group["eta"] if group["adaptive"] else torch.ones_like(p)
                  for p in params]  # fmt: skip
        squares = sum(float((s * g).square().sum()) for s, g in zip(scales, grads, strict=True)
                      if g is not None)  # fmt: skip
        factor = sign * group["rho"] * (1 - lam + lam / (squares**0.5 + 1e-12))
        there = [
            (p.detach() + (0 if g is None else factor * s**2 * g)).requires_grad_()
            for p, g, s in zip(params, grads, scales, strict=True)
        ]
        for k, g in enumerate(gradient(problem, there, part)):
            if g is not None:
                share = g / len(problem.PARTS)
                total[k] = share if total[k] is None else total[k] + share
    return total


def expected_step(base, twins, method, problem, t):
    sign = -1 if base.defaults.get("maximize") else 1
    grads = mean_gradient(problem, twins, method, t, sign)
    for q, g in zip(twins, grads, strict=True):
        q.grad = None if g is None else g.clone()
    if "max_grad_norm" in METHODS[method].kwargs:
        torch.nn.utils.clip_grad_norm_(twins, METHODS[method].kwargs["max_grad_norm"])
    base.step()
    return grads


PAIRS = [("sam", base) for base in (*BASES, "rmsprop")] + [(name, "adamw") for name in SERVED[1:]]
ON_BACKENDS = [(*pair, backend) for pair in PAIRS for backend in BACKENDS
               if backend != "triton" or DEVICE != "cpu"
               or pair in (("sam", "sgd-dampening"), ("asam", "adamw"))]  # fmt: skip


@pytest.mark.parametrize(("method", "base", "backend"), ON_BACKENDS)
def test_mean_of_gradients_at_perturbations_of_their_own(method, base, backend):
    problem = Regression()
    params, twins = problem.params(), problem.params()
    chosen = FOREIGN if base == "rmsprop" else (
        {"base_optimizer": BASES[base].cls} | BASES[base].kwargs
    )  # fmt: skip
    optimizer = METHODS[method].cls(params, backend=backend, **METHODS[method].kwargs | chosen)
    cls = chosen["base_optimizer"]
    other = cls(twins, **{key: x for key, x in chosen.items() if key != "base_optimizer"})
    for t in (1, 2, 3):
        exact = [problem.loss(params, *part).detach() for part in problem.PARTS]
        losses = optimizer.step_micro_batches(problem.closures(params))
        assert [loss.detach() for loss in losses] == exact  # the first calls', at w
        grads = expected_step(other, twins, method, problem, t)
        for p, q, g in zip(params, twins, grads, strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=1e-13)  # some ten roundings a step
            assert (p.grad is None) == (g is None)
            if g is not None and cls is not torch.optim.RMSprop:  # .grad is u, not clipped
                torch.testing.assert_close(p.grad, g, rtol=0, atol=1e-13)
        assert optimizer.metrics["perturbed"] == 1 and not optimizer.between_passes
    assert torch.equal(params[-1], problem.start[-1])  # no gradient: neither moved nor decayed


@pytest.mark.parametrize("backend", BACKENDS)
def test_adasam(backend):
    """It has SAM's ascent, and an update that torch has not."""
    problem = Regression()
    params, twins = problem.params(), problem.params()
    optimizer = fastsam.AdaSAM(params, lr=0.02, rho=0.05, eps=0.03, backend=backend)
    m = [torch.zeros_like(q) for q in twins]
    v, largest = ([torch.full_like(q, 0.03**2) for q in twins] for _ in range(2))
    for t in (1, 2):
        optimizer.step_micro_batches(problem.closures(params))
        for k, g in enumerate(mean_gradient(problem, twins, "sam", t)):
            if g is not None:
                m[k] = 0.9 * m[k] + 0.1 * g
                v[k] = 0.999 * v[k] + 0.001 * g**2
                largest[k] = torch.maximum(largest[k], v[k])
                twins[k].data -= 0.02 * m[k] / largest[k].sqrt()
        for p, q in zip(params, twins, strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=1e-13)  # some ten roundings a step


def test_it_is_not_the_step_of_one_big_batch():
    problem = Regression()
    params, twins = problem.params(), problem.params()
    fastsam.SAM(params, rho=0.5, **SGD).step_micro_batches(problem.closures(params))
    closures = problem.closures(twins)
    fastsam.SAM(twins, rho=0.5, **SGD).step(lambda: [closure() for closure in closures])
    twins = [w - (w - q) / 3 for w, q in zip(problem.start, twins, strict=True)]
    assert max((p - q).abs().max() for p, q in zip(params, twins, strict=True)) > 1e-3


def test_one_micro_batch_is_a_step():
    """Bit for bit, and the steps of either kind go on from each other."""
    results = []
    for micro in (False, True):
        model, loss_fn = model_and_data()
        optimizer, seen = fastsam.SAM(model.parameters(), perturb_every=1, stop=9, **SGD), []
        optimizer.register_step_pre_hook(lambda *_, seen=seen: seen.append("pre"))
        optimizer.register_step_post_hook(lambda *_, seen=seen: seen.append("post"))
        for k in range(4):
            if micro and k % 2 == 0:
                optimizer.step_micro_batches([closure_of(loss_fn)])
            else:
                optimizer.step(closure_of(loss_fn))
        results.append((bits(model), seen, optimizer.kept["t"]))
    assert same(results[0][0], results[1][0]) and results[0][1:] == results[1][1:]
    assert results[0][1] == ["pre", "post"] * 4 and results[0][2] == 5


@pytest.mark.parametrize("method", [*REFUSED, "sam with renormalize"])
def test_refused_methods(method):
    model, loss_fn = model_and_data()
    name, more = (method, {}) if method in METHODS else ("sam", {"renormalize": True})
    optimizer = create(name, model.parameters(), "torch", **more)
    before = bits(model)
    with pytest.raises(RuntimeError, match="does not support perturbations by micro-batch"):
        optimizer.step_micro_batches([closure_of(loss_fn)] * 2)
    assert same(bits(model), before)
    optimizer.step(closure_of(loss_fn))


@pytest.mark.parametrize(
    ("call", "error", "backend"),
    [(call, error, backend) for call in (1, 2, 3, 6) for error in (ValueError, KeyboardInterrupt)
     for backend in ("reference", "torch")] + [(4, ValueError, "triton")],
)  # fmt: skip
def test_failing_closure_undoes_the_step(call, error, backend):
    problem, calls = Regression(), []
    params, twins = problem.params(), problem.params()
    optimizer = fastsam.UnifiedSAM(params, lam="1/t", backend=backend, **SGD)
    other = fastsam.UnifiedSAM(twins, lam="1/t", backend=backend, **SGD)

    def failing(closure):
        calls.append(1)
        loss = closure()
        if len(calls) == call:
            raise error("no")
        return loss

    optimizer.step_micro_batches(problem.closures(params))
    before, state = numpy(params), copy.deepcopy(optimizer.state_dict())
    with pytest.raises(error, match="no"):
        optimizer.step_micro_batches([lambda f=f: failing(f) for f in problem.closures(params)])
    assert all(map(np.array_equal, numpy(params), before))
    assert str(optimizer.state_dict()) == str(state)
    optimizer.step_micro_batches(problem.closures(params))
    for _ in range(2):
        other.step_micro_batches(problem.closures(twins))
    assert all(map(np.array_equal, numpy(params), numpy(twins)))


@pytest.mark.parametrize("kwargs", [{"perturb_every": 2, "start": 1}, {"rho": 0.0}])
def test_steps_of_the_base(kwargs):
    """One call of each closure, and the base's step with the mean of the gradients."""
    problem = Regression()
    params, twins = problem.params(), problem.params()
    optimizer = fastsam.SAM(params, torch.optim.AdamW, lr=0.01, **kwargs)
    twin, base = fastsam.SAM(twins, torch.optim.AdamW, lr=0.01), torch.optim.AdamW(twins, lr=0.01)
    for k in range(4):
        perturbs = k % 2 == 1 and "rho" not in kwargs
        if perturbs:
            twin.load_state_dict(base.state_dict())
            twin.step_micro_batches(problem.closures(twins))
            base.load_state_dict(twin.state_dict())
        else:
            base.zero_grad()
            for closure in problem.closures(twins):
                closure()
            for p in twins:
                p.grad = None if p.grad is None else p.grad / 3
            base.step()
        calls = []
        closures = [lambda f=f, calls=calls: (calls.append(1), f())[1]
                    for f in problem.closures(params)]  # fmt: skip
        assert optimizer.perturbs_next == (k % 2 == 1 or "rho" in kwargs)
        optimizer.step_micro_batches(closures)
        assert len(calls) == (6 if perturbs else 3)
        assert optimizer.metrics["perturbed"] == perturbs
        for ours, exact in zip(numpy(params), numpy(twins), strict=True):
            np.testing.assert_allclose(ours, exact, rtol=1e-12, atol=1e-13)


def test_what_is_not_a_list_of_closures():
    model, loss_fn = model_and_data()
    optimizer, closure = fastsam.SAM(model.parameters(), **SGD), closure_of(loss_fn)
    before = bits(model)
    with pytest.raises(ValueError, match="closures must be at least one"):
        optimizer.step_micro_batches([])
    with pytest.raises(TypeError, match="closures must be a sequence of functions"):
        optimizer.step_micro_batches(closure)
    with pytest.raises(TypeError, match="closure must be a function .* got Tensor"):
        optimizer.step_micro_batches([closure, loss_fn()])
    with pytest.raises(RuntimeError, match="inside a closure"):
        optimizer.step_micro_batches([lambda: optimizer.step_micro_batches([closure])])
    loss_fn().backward()
    optimizer.first_step()
    with pytest.raises(RuntimeError, match="expected second_step"):
        optimizer.step_micro_batches([closure])
    optimizer.restore()
    assert same(bits(model), before)
    losses = optimizer.step_micro_batches(closure for _ in range(3))  # any iterable
    assert len(losses) == 3 and not same(bits(model), before)


def test_nothing_is_held_after_the_step():
    """Of each micro-batch one gradient is there at a time, and after the step their mean alone."""
    problem = Regression()
    params = problem.params()
    optimizer = fastsam.SAM(params, **SGD)
    held: list = []

    def closure(part):
        assert sum(grad() is not None for grad in held) == 0
        problem.loss(params, *part).backward()
        held[:] = [weakref.ref(p.grad) for p in params if p.grad is not None]

    optimizer.step_micro_batches([lambda part=part: closure(part) for part in problem.PARTS])
    gc.collect()
    assert all(grad() is None for grad in held)
    assert not optimizer.between_passes


def test_small_gradients_in_half_precision():
    """The mean is taken without losing what each of many micro-batches contributes."""
    param = torch.nn.Parameter(torch.zeros(4, dtype=torch.bfloat16, device=DEVICE))
    optimizer = fastsam.SAM([param], torch.optim.SGD, lr=1.0, master_weights=True)
    count = 512

    def closure():
        param.grad = torch.ones_like(param)

    optimizer.step_micro_batches([closure] * count)
    assert param.grad.float().tolist() == [1.0] * 4
