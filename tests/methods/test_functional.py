"""Functional-SAM: against whole Jacobians in float64, and what it says of loops that go wrong."""

import contextlib
import copy
import functools
import pickle

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

import fastsam

from networks import bits, same
from registry import BACKENDS, DEVICE

SGD = {"base_optimizer": torch.optim.SGD, "lr": 0.1}
ADAMW = {"base_optimizer": torch.optim.AdamW, "lr": 0.02, "eps": 1e-3, "weight_decay": 0.1}
Plain = functools.partial(fastsam.FunctionalSAM, rho=0.4, **SGD)
Adam = functools.partial(fastsam.FunctionalSAM, rho=0.4, preconditioned=True, warmup=0, **ADAMW)


def network(dropout=0.0, dtype=torch.float32):
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Dropout(dropout), torch.nn.Linear(6, 3)
    )
    return model.to(DEVICE, dtype)


def batch(size=8, dtype=torch.float32, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 4, generator=generator)
    y = torch.randint(3, (size,), generator=generator)
    return x.to(DEVICE, dtype), y.to(DEVICE)


def marking(optimizer, model, batches, extra=None, scaler=None):
    """A closure over micro-batches, as the documents have it."""

    def closure():
        total = 0.0
        for x, y in batches:
            loss = cross_entropy(optimizer.outputs(model(x)), y) / len(batches)
            if extra is not None:
                loss = loss + extra(model) / len(batches)
            (loss if scaler is None else scaler.scale(loss)).backward()
            total += loss.detach()
        return total

    return closure


class Jacobians:
    """The method by its definition: whole Jacobians of the outputs, and formulas in float64.

    Cross-entropy's derivative by the outputs is written out: (softmax - one-hot) / count, and 0
    where the label is -100.
    """

    def __init__(self, model, rho, extra=0.0):
        self.model = copy.deepcopy(model).double().cpu()
        self.names = [name for name, _ in self.model.named_parameters()]
        self.w = [p.detach().clone() for p in self.model.parameters()]
        self.rho, self.extra, self.state, self.t = rho, extra, {}, 0

    def outputs(self, w, x):
        return torch.func.functional_call(
            self.model, dict(zip(self.names, w, strict=True)), (x.double().cpu(),)
        )

    def derivative(self, w, x, y):
        y = y.cpu()
        p = torch.softmax(self.outputs(w, x), -1)
        kept = y != -100
        p[torch.arange(len(y)), y.clamp(min=0)] -= 1
        return p * kept[:, None] / kept.sum()

    def pull_back(self, w, x, r):
        """J_F(w)^T r, by all of J."""
        by_all = torch.func.jacrev(lambda *w: self.outputs(w, x), tuple(range(len(w))))
        return [torch.tensordot(r, jacobian, 2) for jacobian in by_all(*w)]

    def gradients(self, w, batches, derivatives):
        """Of the mean over micro-batches, and of extra / 2 |w|^2, which is none of the outputs."""
        total = [self.extra * p for p in w]
        for (x, _), r in zip(batches, derivatives, strict=True):
            found = self.pull_back(w, x, r)
            total = [a + b / len(batches) for a, b in zip(total, found, strict=True)]
        return total

    def final(self, batches, directions=None):
        rs = [self.derivative(self.w, x, y) for x, y in batches]
        g = self.gradients(self.w, batches, rs)
        d = g if directions is None else directions(g)
        n = torch.cat([x.flatten() for x in d]).norm()
        perturbed = [w + self.rho * x / n for w, x in zip(self.w, d, strict=True)]
        return self.gradients(perturbed, batches, rs)

    def sgd(self, batches, lr=0.1):
        self.w = [w - lr * u for w, u in zip(self.w, self.final(batches), strict=True)]

    def adamw(self, batches, warmup=0, lr=0.02, eps=1e-3, decay=0.1, b1=0.9, b2=0.999):
        self.t += 1
        m, v = self.state.get("m"), self.state.get("v")
        precondition = None
        if v is not None and self.t > warmup:

            def precondition(g):
                return [x / (s.sqrt() + 1e-8) for x, s in zip(g, v, strict=True)]

        u = self.final(batches, precondition)
        m = [(1 - b1) * x + b1 * (0 if m is None else m[k]) for k, x in enumerate(u)]
        v = [(1 - b2) * x * x + b2 * (0 if v is None else v[k]) for k, x in enumerate(u)]
        self.state = {"m": m, "v": v}
        c1, c2 = 1 - b1**self.t, 1 - b2**self.t
        self.w = [
            w * (1 - lr * decay) - lr * (a / c1) / ((s / c2).sqrt() + eps)
            for w, a, s in zip(self.w, m, v, strict=True)
        ]


def assert_close(model, oracle, tolerance=1e-11):
    for p, w in zip(model.parameters(), oracle.w, strict=True):
        np.testing.assert_allclose(p.detach().cpu().double(), w, rtol=tolerance, atol=tolerance)


def step_explicitly(optimizer, model, x, y, cheaply=True):
    with optimizer.repeated_random():
        cross_entropy(optimizer.outputs(model(x)), y).backward()
    optimizer.first_step(zero_grad=True)
    with optimizer.repeated_random():
        if cheaply:
            optimizer.backward(model(x))
        else:
            cross_entropy(optimizer.outputs(model(x)), y).backward()
    optimizer.second_step(zero_grad=True)


def step_by_hand(optimizer, model, x, y):
    outputs = model(x)
    outputs.retain_grad()
    cross_entropy(outputs, y).backward()
    optimizer.first_step(zero_grad=True)
    model(x).backward(gradient=outputs.grad)
    optimizer.second_step(zero_grad=True)


KINDS = {
    "closure": lambda o, m, x, y: o.step(marking(o, m, [(x, y)])),
    "two closures": lambda o, m, x, y: o.step(*fastsam.functional_closures(m, cross_entropy, x, y)),
    "explicit": step_explicitly,
    "explicit, with the loss": functools.partial(step_explicitly, cheaply=False),
    "by hand": step_by_hand,
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("make", [Plain, Adam])
def test_against_whole_jacobians(make, backend):
    """Every way to say what the outputs are, bit for bit alike, with a label that is masked."""
    x, y = batch(dtype=torch.float64)
    y[2] = -100
    found = []
    oracle = Jacobians(network(dtype=torch.float64), 0.4)
    for kind, take in KINDS.items():
        model = network(dtype=torch.float64)
        optimizer = make(model.parameters(), backend=backend, by_hand=kind == "by hand")
        for _ in range(3):
            take(optimizer, model, x, y)
            if not found:  # one oracle serves all kinds
                (oracle.sgd if make is Plain else oracle.adamw)([(x, y)])
                assert_close(model, oracle)
        assert not [key for state in optimizer.state.values() for key in state if "ascent" in key]
        found.append(bits(model))
    assert all(same(found[0], other) for other in found[1:])
    other = network(dtype=torch.float64)
    sam = fastsam.SAM(
        other.parameters(), rho=0.4, backend=backend, **(SGD if make is Plain else ADAMW)
    )
    for _ in range(3):
        sam.step(marking_nothing(other, x, y))
    assert max((p - q).abs().max() for p, q in zip(bits(other), found[0], strict=True)) > 1e-4


def marking_nothing(model, x, y):
    def closure():
        loss = cross_entropy(model(x), y)
        loss.backward()
        return loss

    return closure


@pytest.mark.parametrize("how", ["closure", "module", "explicit", "micro-batches"])
def test_accumulation_and_a_loss_that_is_none_of_the_outputs(how):
    """Every micro-batch has a derivative of its own; the other loss goes in as SAM's."""
    model = network(dtype=torch.float64)
    batches = [batch(8, torch.float64), batch(5, torch.float64, seed=2)]
    oracle = Jacobians(model, 0.4, extra=0.3)
    optimizer = Plain(model.parameters())
    handle = optimizer.outputs_of(model) if how == "module" else None

    def extra(model):
        return 0.15 * sum(p.square().sum() for p in model.parameters())

    class Unmarked:
        outputs = staticmethod(lambda outputs: outputs)

    closure = marking(Unmarked if handle else optimizer, model, batches, extra)
    for _ in range(2):
        if how == "explicit":
            closure()
            optimizer.first_step(zero_grad=True)
            closure()
            optimizer.second_step(zero_grad=True)
        elif how == "micro-batches":
            optimizer.step_micro_batches(
                [marking(optimizer, model, [one], extra) for one in batches]
            )
        else:
            optimizer.step(closure)
        if how == "micro-batches":  # each with a perturbation of its own
            finals = [oracle.final([one]) for one in batches]
            oracle.w = [w - 0.1 * (a + b) / 2 for w, a, b in zip(oracle.w, *finals, strict=True)]
        else:
            oracle.sgd(batches)
        assert_close(model, oracle)
    if handle is not None:
        assert optimizer.has_outputs
        handle.remove()
        with pytest.raises(RuntimeError, match="needs the model's outputs"):
            optimizer.step(closure)


def test_warmup_is_sam_and_not_normalized_moves_by_the_gradients_norm():
    x, y = batch(dtype=torch.float64)
    models = [network(dtype=torch.float64) for _ in range(2)]
    own = {"backend": "reference"}  # the others take other paths, and round otherwise
    warm = Adam(models[0].parameters(), warmup=2, **own)
    cold = fastsam.FunctionalSAM(models[1].parameters(), rho=0.4, **ADAMW, **own)
    for t in range(3):
        for optimizer, model in zip((warm, cold), models, strict=True):
            optimizer.step(marking(optimizer, model, [(x, y)]))
        assert same(*map(bits, models)) == (t < 2)
    assert warm.kept["t"] == 4 and not cold.preconditioned and warm.preconditioned

    model = network(dtype=torch.float64)
    optimizer = Adam(model.parameters(), rho=1e-4, normalize=False)
    optimizer.step(marking(optimizer, model, [(x, y)]))
    w = bits(model)
    cross_entropy(optimizer.outputs(model(x)), y).backward()
    grads = [p.grad.clone() for p in model.parameters()]
    n = torch.cat([g.flatten() for g in grads]).norm()
    second = [optimizer.state[p]["exp_avg_sq"].clone() for p in model.parameters()]
    optimizer.first_step()
    for p, before, g, v in zip(model.parameters(), w, grads, second, strict=True):
        torch.testing.assert_close(p.detach() - before, 1e-4 * g / n / (v.sqrt() + 1e-8))
    optimizer.restore()
    assert same(bits(model), w)


def reference_step(model, x, y, cast=contextlib.nullcontext, seed=5, rho=0.4, lr=0.1):
    """Plain torch: r kept by ``retain_grad``, seeded before either pass."""
    params = list(model.parameters())
    torch.manual_seed(seed)
    with cast():
        outputs = model(x)
        loss = cross_entropy(outputs, y)
    outputs.retain_grad()
    loss.backward()
    grads = [p.grad.clone() for p in params]
    n = torch.cat([g.double().flatten() for g in grads]).norm()
    before = bits(model)
    with torch.no_grad():
        for p, g in zip(params, grads, strict=True):
            p += (rho * g.double() / n).to(p)
    model.zero_grad()
    torch.manual_seed(seed)
    with cast():
        again = model(x)
    again.backward(gradient=outputs.grad)
    with torch.no_grad():
        for p, w in zip(params, before, strict=True):
            p.copy_(w - lr * p.grad)
    model.zero_grad()


@pytest.mark.parametrize("kind", ["closure", "two closures", "explicit"])
def test_dropout_draws_the_same_in_both_passes(kind):
    x, y = batch()
    model, other = network(dropout=0.5), network(dropout=0.5)
    optimizer = Plain(model.parameters())
    torch.manual_seed(5)
    KINDS[kind](optimizer, model, x, y)
    reference_step(other, x, y)
    for p, q in zip(bits(model), bits(other), strict=True):
        torch.testing.assert_close(p, q)
    assert optimizer.repeat_random
    torch.manual_seed(5)
    anew = Plain(network(dropout=0.5).parameters(), repeat_random=False)
    assert not anew.repeat_random


def test_autocast_and_a_loss_scale():
    """The derivative is in the outputs' own dtype, and carries the scale once."""
    cast = functools.partial(torch.autocast, DEVICE, torch.bfloat16, cache_enabled=False)
    x, y = batch()
    model, other, third = network(), network(), network()
    optimizer, scaled = Plain(model.parameters()), Plain(third.parameters())
    scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**10)

    def closure():
        with cast():
            outputs = optimizer.outputs(model(x))
            assert outputs.dtype == torch.bfloat16
            loss = cross_entropy(outputs, y)
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)
        reference_step(other, x, y, cast)
        pair = fastsam.functional_closures(
            third, cross_entropy, x, y, grad_scaler=scaler, context=cast
        )
        scaled.step(*pair, grad_scaler=scaler)
        scaler.update()
    for p, q, r in zip(bits(model), bits(other), bits(third), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(p, r, rtol=1e-5, atol=1e-6)
    assert int(scaled.metrics["skipped"]) == 0


def test_a_derivative_that_overflows_skips_the_step():
    x, y = batch()
    model = torch.nn.Linear(4, 3).to(DEVICE)
    optimizer = Plain(model.parameters())
    scaler = torch.amp.GradScaler(DEVICE, init_scale=3e38)
    before = bits(model)
    optimizer.step(marking(optimizer, model, [(1e4 * x, y)], scaler=scaler), grad_scaler=scaler)
    scaler.update()
    assert same(bits(model), before) and int(optimizer.metrics["skipped"]) == 1
    scaler.update(2.0)
    optimizer.step(marking(optimizer, model, [(x, y)], scaler=scaler), grad_scaler=scaler)
    assert not same(bits(model), before)


def test_batch_norm_counts_one_pass():
    def make():
        torch.manual_seed(0)
        return torch.nn.Sequential(
            torch.nn.Linear(4, 6), torch.nn.BatchNorm1d(6), torch.nn.Linear(6, 3)
        ).to(DEVICE)

    x, y = batch()
    once, two, one = make(), make(), make()
    once(x)
    Plain(two.parameters()).step(*fastsam.functional_closures(two, cross_entropy, x, y))
    frozen = fastsam.frozen_batch_norm(one)
    optimizer = Plain(one.parameters(), descent_context=frozen)
    optimizer.step(marking(optimizer, one, [(x, y)]))
    for model in (two, one):
        assert same(model[1].buffers(), once[1].buffers())
        assert same(bits(model), bits(two))


def test_inputs_and_outputs_of_other_kinds():
    """Arguments by position and by name; several outputs; outputs that need no gradient."""

    class Two(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = network(dtype=torch.float64), network(dtype=torch.float64)

        def forward(self, x, scale):
            return self.a(x), self.b(scale * x), x

    def loss_fn(outputs, y):
        return cross_entropy(outputs[0], y) + cross_entropy(outputs[1], y)

    x, y = batch(dtype=torch.float64)
    results = []
    for inputs in ((x, 2.0), {"x": x, "scale": 2.0}, None):
        torch.manual_seed(0)
        model = Two()
        optimizer = Plain(model.parameters())
        if inputs is None:

            def closure(model=model, optimizer=optimizer):
                loss = loss_fn(optimizer.outputs(model(x, 2.0)), y)
                loss.backward()
                return loss

            optimizer.step(closure)
        else:
            optimizer.step(*fastsam.functional_closures(model, loss_fn, inputs, y))
        results.append(bits(model))
    assert same(results[0], results[1]) and same(results[0], results[2])


def test_activation_checkpointing():
    """Outputs are marked again where they are computed again, in both passes alike."""
    from torch.utils.checkpoint import checkpoint

    x, y = batch(dtype=torch.float64)
    model, twin = network(dtype=torch.float64), network(dtype=torch.float64)
    optimizer, other = Plain(model.parameters()), Plain(twin.parameters())
    optimizer.outputs_of(model)
    batches = [(x, y), batch(5, torch.float64, seed=2)]

    def closure():
        for one, label in batches:
            cross_entropy(checkpoint(model, one, use_reentrant=False), label).div(2).backward()

    optimizer.step(closure)
    other.step(marking(other, twin, batches))
    assert same(bits(model), bits(twin))


def test_steps_of_the_base_keep_nothing():
    x, y = batch()
    model, twin = network(), network()
    optimizer = Plain(model.parameters(), perturb_every=2, start=1)
    base = torch.optim.SGD(twin.parameters(), lr=0.1)
    optimizer.step(marking(optimizer, model, [(x, y)]))
    marking_nothing(twin, x, y)()
    base.step()
    assert same(bits(model), bits(twin))
    optimizer.outputs(model(x)).sum().backward()  # of a pass that is dropped
    optimizer.zero_grad()
    optimizer.step(marking(optimizer, model, [(x, y)]))


# --- what goes wrong ---


def second_only(change):
    """A closure that does something else in the second pass."""

    def make(optimizer, model, x, y):
        calls = []

        def closure():
            calls.append(1)
            if len(calls) % 2 == 0:
                return change(optimizer, model, x, y)
            loss = cross_entropy(optimizer.outputs(model(x)), y)
            loss.backward()
            return loss

        return closure

    return make


def unmarked(optimizer, model, x, y):
    return marking_nothing(model, x, y)


def copied(optimizer, model, x, y):
    def closure():
        outputs = model(x)
        optimizer.outputs(outputs * 1)
        cross_entropy(outputs, y).backward()

    return closure


def twice(optimizer, model, x, y):
    for _ in range(2):
        cross_entropy(optimizer.outputs(model(x)), y).backward()


def forward_only(optimizer, model, x, y):
    optimizer.outputs(model(x))


def again(optimizer, model, x, y):
    loss = cross_entropy(optimizer.outputs(model(x)), y)
    loss.backward(retain_graph=True)
    loss.backward()


def smaller(optimizer, model, x, y):
    cross_entropy(optimizer.outputs(model(x[:5])), y[:5]).backward()


def nothing(optimizer, model, x, y):
    cross_entropy(model(x), y).backward()


WRONG = {
    "nothing marked": (unmarked, "needs the model's outputs"),
    "a copy marked": (copied, "no derivative of the loss with respect to the marked outputs"),
    "more in the second": (second_only(twice), "marks more outputs than the first, which marked 1"),
    "none in the second": (
        second_only(nothing),
        "marked 0 of the model's outputs, and the first 1",
    ),
    "no backward": (second_only(forward_only), "went back through 0 .* and the first 1"),
    "two backwards": (second_only(again), r"get 2 derivatives in the second pass and got 1"),
    "another batch": (second_only(smaller), r"have shape \(5, 3\) of .*float32, and .* \(8, 3\)"),
}


@pytest.mark.parametrize("name", WRONG)
def test_loops_that_go_wrong(name):
    """An error, the weights as they were, and a next step like any other."""
    make, message = WRONG[name]
    x, y = batch()
    model, twin = network(), network()
    optimizer, other = Plain(model.parameters()), Plain(twin.parameters())
    before, t = bits(model), optimizer.kept["t"]
    with pytest.raises(RuntimeError, match=message):
        optimizer.step(make(optimizer, model, x, y))
    assert same(bits(model), before) and optimizer.kept["t"] == t
    assert not optimizer.between_passes
    optimizer.step(marking(optimizer, model, [(x, y)]))
    other.step(marking(other, twin, [(x, y)]))
    assert same(bits(model), bits(twin))


def test_explicit_passes_that_go_wrong():
    x, y = batch()
    model = network()
    optimizer = Plain(model.parameters())
    before = bits(model)
    with pytest.raises(RuntimeError, match="between first_step and second_step"):
        optimizer.backward(model(x))
    cross_entropy(model(x), y).backward()
    with pytest.raises(RuntimeError, match="needs the model's outputs"):
        optimizer.first_step()
    assert same(bits(model), before) and not optimizer.between_passes
    optimizer.zero_grad()
    optimizer.outputs(model(x))  # a pass that failed, and is taken back
    optimizer.restore()
    cross_entropy(optimizer.outputs(model(x)), y).backward()
    optimizer.first_step(zero_grad=True)
    cross_entropy(model(x), y).backward()
    with pytest.raises(RuntimeError, match="marked 0 of the model's outputs"):
        optimizer.second_step()
    assert same(bits(model), before) and not optimizer.between_passes
    optimizer.zero_grad()
    step_explicitly(optimizer, model, x, y)
    assert not same(bits(model), before)


def test_a_derivative_that_was_written_to():
    x, y = batch()
    model = network()
    optimizer = Plain(model.parameters())
    outputs = optimizer.outputs(model(x))
    seen = []
    outputs.register_hook(seen.append)
    cross_entropy(outputs, y).backward()
    optimizer.first_step(zero_grad=True)
    seen[0].mul_(2)
    with pytest.raises(RuntimeError, match="has been written to between the passes"):
        optimizer.backward(model(x))
    optimizer.restore()


@pytest.mark.parametrize("failing", [1, 2])
def test_a_closure_that_fails(failing):
    x, y = batch()
    model, twin, calls = network(), network(), []
    optimizer, other = Plain(model.parameters()), Plain(twin.parameters())
    good = marking(optimizer, model, [(x, y)])

    def closure():
        calls.append(1)
        loss = good()
        if len(calls) == failing:
            raise KeyError("no")
        return loss

    with pytest.raises(KeyError):
        optimizer.step(closure)
    assert same(bits(model), bits(twin))
    optimizer.step(closure)
    other.step(marking(other, twin, [(x, y)]))
    assert same(bits(model), bits(twin))


@pytest.mark.parametrize(
    ("give", "error", "message"),
    [
        (lambda o, m: o.outputs(3.0), TypeError, "outputs must be a tensor .* got float"),
        (lambda o, m: o.outputs({"logits": m(batch()[0])}), TypeError, "got dict"),
        (lambda o, m: o.outputs([m(batch()[0]), None]), TypeError, "got list of Tensor, NoneType"),
        (lambda o, m: o.outputs_of(cross_entropy), TypeError, "module must be a torch.nn.Module"),
        (lambda o, m: setattr(o, "ascent_steps", 2), ValueError, "ascent_steps must be 1 .* got 2"),
        (lambda o, m: setattr(o, "warmup", -1), ValueError, "warmup must be an integer"),
        (lambda o, m: Adam(m.parameters(), preconditioned=1), ValueError, "preconditioned must be"),
        (lambda o, m: Adam(m.parameters(), normalize="no"), ValueError, "normalize must be"),
        (lambda o, m: Plain(m.parameters(), preconditioned=True), TypeError,
         "must be one that keeps 'exp_avg_sq', .* got SGD"),
        (lambda o, m: fastsam.functional_closures(1, cross_entropy, 1, 1), TypeError,
         "model must be callable, got 1"),
        (lambda o, m: fastsam.functional_closures(m, None, 1, 1), TypeError, "loss_fn must be"),
        (lambda o, m: fastsam.functional_closures(m, cross_entropy, 1, 1, context=3), TypeError,
         "context must be None or a function"),
    ],
)  # fmt: skip
def test_bad_input(give, error, message):
    model = network()
    with pytest.raises(error, match=message):
        give(Plain(model.parameters()), model)


def test_what_does_not_go_together():
    x, y = batch()
    model = network()
    optimizer = Plain(model.parameters())
    closure = marking(optimizer, model, [(x, y)])
    before = bits(model)
    with pytest.raises(RuntimeError, match="LETS does not support FunctionalSAM"):
        fastsam.LETS(optimizer).step(closure, closure)
    assert same(bits(model), before)

    class Measured(fastsam.SAMAR):
        ascent = Adam(network().parameters()).ascent

    with pytest.raises(TypeError, match="perturbation again .*, and ascent 'second_moment' reads"):
        Measured(model.parameters(), torch.optim.AdamW, lr=0.1)
    own = {"perturb": False, "base_optimizer": torch.optim.SGD}
    groups = [{"params": model[0].parameters(), **own}, {"params": model[3].parameters()}]
    mixed = Adam(groups)  # what is not perturbed may have any base
    mixed.step(marking(mixed, model, [(x, y)]))
    with pytest.raises(TypeError, match="keeps 'exp_avg_sq'"):
        mixed.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))],
                               "base_optimizer": torch.optim.SGD})  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_base_that_is_not_fused(backend):
    """Its state is read as well; one that keeps another is refused when that is known."""
    x, y = batch(dtype=torch.float64)

    class Subclass(torch.optim.AdamW):
        pass

    model, twin = network(dtype=torch.float64), network(dtype=torch.float64)
    own = {**ADAMW, "base_optimizer": Subclass}
    optimizer, fused = Adam(model.parameters(), backend=backend, **own), Adam(twin.parameters())
    for one, net in ((optimizer, model), (fused, twin)):
        for _ in range(3):
            one.step(marking(one, net, [(x, y)]))
    for p, q in zip(bits(model), bits(twin), strict=True):
        torch.testing.assert_close(p, q)

    model = network(dtype=torch.float64)
    other = fastsam.FunctionalSAM(
        model.parameters(), torch.optim.RMSprop, lr=0.01, preconditioned=True, backend=backend
    )
    other.step(marking(other, model, [(x, y)]))
    before = bits(model)
    with pytest.raises(RuntimeError, match="keeps 'exp_avg_sq', .* it keeps 'step', 'square_avg'"):
        other.step(marking(other, model, [(x, y)]))
    assert same(bits(model), before)


def test_copies_and_pickles():
    """A copy of the model marks nothing; one of the optimizer goes on as it is."""
    x, y = batch()
    model = network()
    optimizer = Adam(model.parameters(), by_hand=True)
    optimizer.outputs_of(model)
    average = copy.deepcopy(model)
    for net in (average, pickle.loads(pickle.dumps(model))):
        cross_entropy(net(x), y).backward()
    optimizer.step(marking(optimizer, model, [(x, y)]))
    twin = pickle.loads(pickle.dumps(optimizer))
    assert twin.by_hand and twin.preconditioned and twin.warmup == 0 and twin.repeat_random
    params = [p for group in twin.param_groups for p in group["params"]]
    for p, q in zip(params, model.parameters(), strict=True):
        p.grad = torch.ones_like(p)
        q.grad = torch.ones_like(q)
    for one in (twin, optimizer):
        one.first_step()
        one.second_step()
    assert same(params, list(model.parameters()))


# --- two closures, of every method ---


def test_the_second_closure_may_be_another_function():
    """Perturbed along one batch, updated with another."""
    ours, theirs = network(), network()
    one, two = batch(), batch(seed=2)
    optimizer = fastsam.SAM(ours.parameters(), rho=0.4, perturb_every=2, **SGD)
    twin = fastsam.SAM(theirs.parameters(), rho=0.4, **SGD)
    calls = []

    def closure(k):
        def run():
            calls.append(k)
            return marking_nothing(ours, *(one, two)[k])().detach()

        return run

    loss = optimizer.step(closure(0), closure(1))
    assert calls == [0, 1] and loss == cross_entropy(theirs(one[0]), one[1])
    marking_nothing(theirs, *one)()
    twin.first_step(zero_grad=True)
    marking_nothing(theirs, *two)()
    twin.second_step()
    assert same(bits(ours), bits(theirs))
    optimizer.step(closure(0), closure(1))  # the base's, with the second one's gradient
    assert calls == [0, 1, 0, 1]
    with pytest.raises(TypeError, match="closure must be a function"):
        optimizer.step(closure(0), 3)
