"""GradScaler: an overflow in either pass is no step, and the scaler hears of it."""

import pytest
import torch

import fastsam

from networks import same
from registry import BACKENDS, BASES, DEVICE, DTYPES, parameters
from scaled import (
    FP32,
    FUSED,
    GROUPS,
    INF,
    NAN,
    PROBLEM,
    RMSPROP,
    assert_same,
    cases,
    create,
    give_grads,
    run,
    scaler_of,
    snapshot,
    step,
)


@pytest.mark.parametrize(("method", "base", "backend"), cases(("sgd-momentum",)))
@pytest.mark.parametrize("spoil", [(INF, None), (None, NAN), (-INF, INF)])
def test_overflow_skips_the_step(method, base, backend, spoil):
    params, optimizer = create(method, base, backend)
    scaler = scaler_of(2.0**10, growth_interval=2)
    run(optimizer, params, scaler, 1)
    before = snapshot(optimizer, params)
    step(optimizer, params, scaler, spoil)
    assert_same(snapshot(optimizer, params), before)
    assert float(optimizer.metrics["skipped"]) == 1
    scaler.update()
    assert scaler.get_scale() == 2.0**9
    run(optimizer, params, scaler, 1)  # the step before the overflow no longer counts
    assert scaler.get_scale() == 2.0**9
    assert not same(params, before["weights"])
    assert float(optimizer.metrics["skipped"]) == 1
    if backend != "triton":
        run(optimizer, params, scaler, 1)
        assert scaler.get_scale() == 2.0**10


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("base", [*FUSED, "rmsprop"])
@pytest.mark.parametrize("spoil", [(INF, None), (None, INF)])
def test_steps_after_an_overflow_go_on_as_if_there_was_none(base, backend, spoil):
    """Also after the very first one, which would have created the state."""
    params, optimizer = create("vasso-all", base, backend)
    plain = run(optimizer, params, None, 3)
    params, optimizer = create("vasso-all", base, backend)
    scaler = scaler_of()
    for at in range(3):
        if at != 1:
            step(optimizer, params, scaler, spoil)
            scaler.update()
        run(optimizer, params, scaler, 1)
    assert same(params, plain)
    assert float(optimizer.metrics["skipped"]) == 2
    assert scaler.get_scale() == 2.0**10


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("base", ["sgd-momentum", "adamw"])
def test_float16_that_overflows_on_purpose(base, backend):
    """Gradients near 1, times 2**18, are beyond float16: the scale falls until they fit.

    torch's ``unscale_`` refuses float16 gradients, and dividing them in place would lose those
    below 6e-5; here they are divided in float32.
    """
    dtypes = DTYPES["fp16"]
    params, optimizer = create("sam", base, backend, dtypes, master_weights=True)
    plain = run(optimizer, params, None, 2, dtypes)
    params, optimizer = create("sam", base, backend, dtypes, master_weights=True)
    scaler, skipped = scaler_of(2.0**18), 0
    start = [p.detach().clone() for p in params]
    give_grads(params, scaler, dtypes=dtypes)
    with pytest.raises(ValueError, match="FP16"):
        scaler.unscale_(optimizer)
    for _ in range(6):
        step(optimizer, params, scaler, dtypes=dtypes)
        scaler.update()
        if not same(params, start):
            break
        skipped += 1
    assert 1 <= skipped == float(optimizer.metrics["skipped"]) < 6
    assert scaler.get_scale() == 2.0 ** (18 - skipped)
    run(optimizer, params, scaler, 1, dtypes)
    assert same(params, plain)


@pytest.mark.parametrize("backend", BACKENDS)
def test_several_optimizers_on_one_scaler(backend):
    """One overflow skips its own optimizer only, and lowers the scale of all."""
    (a, first), (b, second), (c, _) = (create("sam", "adamw", backend) for _ in range(3))
    third, scaler = torch.optim.SGD(c, lr=0.1), scaler_of()
    before = snapshot(first, a)
    step(first, a, scaler, (None, INF))
    step(second, b, scaler)
    give_grads(c, scaler)
    scaler.step(third)
    scaler.update()
    assert scaler.get_scale() == 2.0**11
    after = snapshot(first, a)
    assert same(after["weights"], before["weights"])
    assert not same(b, a) and not same(c, a)
    assert float(first.metrics["skipped"]) == 1 and float(second.metrics["skipped"]) == 0
    step(first, a, scaler)
    step(second, b, scaler)
    scaler.update()
    assert scaler.get_scale() == 2.0**11 and not same(a, before["weights"])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.filterwarnings("ignore:.*no gradient")
def test_update_of_the_scaler_always_has_its_check(backend):
    """torch raises "No inf checks were recorded" where an optimizer kept its finding to itself."""
    params, optimizer = create("sam", "sgd-momentum", backend)
    scaler = scaler_of(growth_interval=1)

    def closure():
        give_grads(params, scaler)

    def nothing():
        scaler.scale(torch.ones((), device=DEVICE))

    def plain_step():
        closure()
        optimizer.plain_step(grad_scaler=scaler)

    def without_radius():
        for group in optimizer.param_groups:
            group["rho"] = 0.0
        optimizer.step(closure, grad_scaler=scaler)

    steps = [
        lambda: optimizer.step(closure, grad_scaler=scaler),
        plain_step,
        lambda: optimizer.step(nothing, grad_scaler=scaler),
        without_radius,
    ]
    for i, take in enumerate(steps):
        take()
        scaler.update()
        assert scaler.get_scale() == 2.0 ** (12 + i + 1)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("base", ["adamw", "rmsprop"])
def test_plain_steps_and_steps_without_a_radius(base, backend):
    """One pass: the base optimizer's own step on unscaled gradients, skipped if they overflow."""
    for how in ("plain_step", "rho"):
        params, optimizer = create("sam", base, backend)
        named = BASES | {"rmsprop": RMSPROP}
        twins = parameters(PROBLEM.initial(), FP32)
        groups = [{"params": [twins[i] for i in g["params"]]} for g in GROUPS]
        twin = named[base].cls(groups, **named[base].kwargs)
        twin.param_groups[1]["lr"] = GROUPS[1]["lr"]
        scaler = scaler_of()
        for spoil in (None, INF, None):
            if how == "rho":
                for group in optimizer.param_groups:
                    group["rho"] = 0.0
                optimizer.step(
                    lambda p=params, s=scaler, b=spoil: give_grads(p, s, b), grad_scaler=scaler
                )
            else:
                give_grads(params, scaler, spoil)
                optimizer.plain_step(grad_scaler=scaler)
            scaler.update()
            if spoil is None:
                give_grads(twins)
                twin.step()
        assert float(optimizer.metrics["skipped"]) == 1 and scaler.get_scale() == 2.0**11
        for p, q in zip(params, twins, strict=True):  # two steps of a few roundings each
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


def test_failed_pass_leaves_a_usable_scaler():
    params, optimizer = create("sam", "adamw", "torch")
    scaler, calls = scaler_of(), []
    run(optimizer, params, scaler, 1)
    before = snapshot(optimizer, params)

    def failing():
        calls.append(1)
        give_grads(params, scaler)
        if len(calls) == 2:
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        optimizer.step(failing, grad_scaler=scaler)
    assert_same(snapshot(optimizer, params), before)
    run(optimizer, params, scaler, 1)
    assert not same(params, before["weights"]) and scaler.get_scale() == 2.0**12


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mended", [False, True])
def test_overflow_that_unscale_found(mended, backend):
    """Also where clipping by value has since made it finite: torch's own step is skipped then."""
    params, optimizer = create("sam", "adamw", backend)
    scaler = scaler_of()
    run(optimizer, params, scaler, 1)
    before = snapshot(optimizer, params)
    for bad, half in ((INF, optimizer.first_step), (None, optimizer.second_step)):
        give_grads(params, scaler, bad)
        if bad is not None:
            scaler.unscale_(optimizer)
            if mended:
                torch.nn.utils.clip_grad_value_(params, 1.0)
        half(grad_scaler=scaler)
    scaler.update()
    assert scaler.get_scale() == 2.0**11
    assert_same(snapshot(optimizer, params), before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_overflow_is_of_its_own_step(backend):
    """What was found in one step does not skip the next, whether that has one pass or two."""
    params, optimizer = create("sam", "sgd-momentum", backend, perturb_every=2)
    scaler = scaler_of()
    for k in range(4):

        def closure(spoil=None if k else INF):
            give_grads(params, scaler, spoil)
            scaler.unscale_(optimizer)

        optimizer.step(closure, grad_scaler=scaler)
        scaler.update()
        assert float(optimizer.metrics["skipped"]) == 1
        assert float(optimizer.metrics["perturbed"]) == (k % 2 == 0)


@pytest.mark.parametrize("method", ["sam-clip", "usam"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_steps_without_a_scaler_after_some_with(method, backend):
    """Neither the scale nor what was found stays behind."""
    results = []
    for scaled in (False, True):
        params, optimizer = create(method, "sgd-momentum", backend, skip_nonfinite=True)
        run(optimizer, params, scaler_of() if scaled else None, 1)
        if scaled:
            scaler = scaler_of()
            give_grads(params, scaler, INF)
            scaler.unscale_(optimizer)
            optimizer.first_step(grad_scaler=scaler)
            give_grads(params, scaler)
            optimizer.second_step(grad_scaler=scaler)
        run(optimizer, params, None, 2)
        results.append(params)
        assert float(optimizer.metrics["skipped"]) == scaled
    assert same(*results)


# --- what does not work without this -------------------------------------------------------------


class NaiveSAM(torch.optim.Optimizer):
    """The usual class: it knows nothing of a scaler."""

    def __init__(self, params):
        super().__init__(params, {"rho": 0.05})
        self.base = torch.optim.SGD(self.param_groups, lr=0.1)
        self.e = {}

    @torch.no_grad()
    def first_step(self):
        params = [p for group in self.param_groups for p in group["params"]]
        norm = torch.stack([p.grad.norm() for p in params]).norm()
        self.e = {p: 0.05 * p.grad / norm for p in params}
        for p, e in self.e.items():
            p.add_(e)

    @torch.no_grad()
    def step(self):
        for p, e in self.e.items():
            p.sub_(e)
        self.base.step()


def test_naive_recipes_fail():
    """A scaler serves one ``unscale_`` and one ``step`` an update; two passes need two."""
    params = parameters(PROBLEM.initial(), FP32)
    naive, scaler = NaiveSAM(params), scaler_of()
    give_grads(params, scaler)
    scaler.unscale_(naive)
    naive.first_step()
    give_grads(params, scaler)
    with pytest.raises(RuntimeError, match="already been called on this optimizer"):
        scaler.unscale_(naive)

    twice, scaler = torch.optim.SGD(params, lr=0.1), scaler_of()
    give_grads(params, scaler)
    scaler.step(twice)
    with pytest.raises(RuntimeError, match="step.* has already been called"):
        scaler.step(twice)

    unseen = scaler_of()  # scaled the loss, but never asked for its finding
    give_grads(params, unseen)
    with pytest.raises(AssertionError, match="No inf checks were recorded"):
        unseen.update()

    params, optimizer = create("sam", "sgd-momentum", "torch")
    before, scaler = [p.detach().clone() for p in params], scaler_of()
    give_grads(params, scaler)
    with pytest.raises(RuntimeError, match="closure"):
        scaler.step(optimizer)
    assert same(params, before)


def test_misuse_is_named():
    params, optimizer = create("sam", "sgd-momentum", "torch")
    before, scaler = [p.detach().clone() for p in params], scaler_of()
    give_grads(params)
    with pytest.raises(TypeError, match="grad_scaler must be a torch.amp.GradScaler"):
        optimizer.first_step(grad_scaler=2.0**16)
    for half in (optimizer.first_step, optimizer.plain_step):
        with pytest.raises(TypeError, match="grad_scaler must be given by its name"):
            half(scaler)
    with pytest.raises(RuntimeError, match="has scaled no loss yet"):
        optimizer.first_step(grad_scaler=scaler)
    with pytest.raises(RuntimeError, match="has scaled no loss yet"):
        optimizer.step(lambda: give_grads(params), grad_scaler=scaler)
    assert same(params, before)
    step(optimizer, params, scaler)
    before = [p.detach().clone() for p in params]
    with pytest.raises(RuntimeError, match=r"update\(\) has to be called"):
        step(optimizer, params, scaler)
    assert same(params, before)
    scaler.update()
    run(optimizer, params, scaler, 1)
    assert not same(params, before)


def test_learned_radius_takes_no_scaler():
    params, optimizer = create("sam", "sgd-momentum", "torch")
    learned = fastsam.LETS(optimizer, rho_lr=0.1)
    with pytest.raises(TypeError, match="grad_scaler"):
        learned.step(lambda: None, lambda: None, grad_scaler=scaler_of())
