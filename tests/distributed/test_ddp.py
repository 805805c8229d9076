"""DistributedDataParallel: all ranks perturb alike, or each along its own gradient."""

import contextlib
import multiprocessing
import os
import time
import warnings

import numpy as np
import pytest
import torch
import torch.distributed as dist

import fastsam

import processes
from processes import Fleet, are_equal_everywhere, data, difference, network, small_network, train
from registry import BACKENDS, COMBINATIONS, METHODS, create, numpy
from shards import INTERPRETED, formula, gpus, wrapped

#: Those whose update needs more of the first gradient than its norm.
REFUSED = [
    name for name, method in METHODS.items()
    if method.mixes or {"eta", "renormalize"} <= method.kwargs.keys()
]  # fmt: skip
OWN = [name for name in METHODS if name not in REFUSED]


@pytest.fixture(scope="module", autouse=True)
def _end_processes():
    yield
    processes.close()


def optimizers(fleet, combinations, backend="torch", **kwargs):
    """One for each network of the fleet: a method's and a base's name each."""
    return [
        create(method, one.parameters(), backend, base, **kwargs)
        for one, (method, base) in zip(fleet.networks, combinations, strict=True)
    ]


# --- all ranks alike ------------------------------------------------------------------------------


def one_process(rank, size, combinations, backend, steps, device="cpu"):
    """The largest difference from the same training in one process, on all of the batch."""
    fleet, whole = (Fleet(len(combinations)).to(device) for _ in range(2))
    share, everything = (tuple(x.to(device) for x in batch) for batch in (data(rank, size), data()))
    train(wrapped(fleet), optimizers(fleet, combinations, backend), share, steps)
    train(whole, optimizers(whole, combinations, backend), everything, steps)
    return difference(list(fleet.parameters()), list(whole.parameters()))


@pytest.mark.parametrize(
    ("size", "backend", "combinations", "steps"),
    [
        (2, "torch", COMBINATIONS, 3),
        (4, "torch", COMBINATIONS[::8], 2),
        (2, "reference", [(method, "adamw") for method in METHODS], 3),
        pytest.param(2, "triton", [("ssam", "adamw"), ("lightsam-3", "")], 1, marks=INTERPRETED),
    ],
)
def test_default_is_one_process(size, backend, combinations, steps):
    """Only the order of sums differs: roundings of 2**-53, grown a little."""
    for found in processes.run(size, one_process, combinations, backend, steps):
        assert found < 2e-14


def functional(rank, size, steps):
    """The largest difference of Functional-SAM from one process, with two micro-batches a rank."""
    ours, whole = network(), network()
    model = wrapped(ours)
    own = {"rho": 0.3, "lr": 0.05, "preconditioned": True, "warmup": 1, "eps": 1e-3}
    optimizer, other = (
        fastsam.FunctionalSAM(x.parameters(), torch.optim.AdamW, **own) for x in (ours, whole)
    )

    def parts(rank):
        return list(zip(*(x.chunk(2) for x in data(rank, size)), strict=True))

    def closure():
        first, last = parts(rank)
        for (x, y), context in ((first, model.no_sync), (last, contextlib.nullcontext)):
            with context():
                loss = (optimizer.outputs(model(x)) - y).pow(4).mean() / 2
                loss.backward()

    def everything():
        for one in range(size):
            for x, y in parts(one):
                loss = (other.outputs(whole(x)) - y).pow(4).mean() / 2 / size
                loss.backward()

    for _ in range(steps):
        optimizer.step(closure)
        other.step(everything)
    return difference(list(ours.parameters()), list(whole.parameters()))


def test_functional_sam_is_one_process():
    """Each rank keeps the derivatives of its own micro-batches."""
    for found in processes.run(2, functional, 4):
        assert found < 2e-14


def in_scratch_memory(rank, size):
    """Steps with and without; how many parameters were elsewhere between the passes."""
    fleet = Fleet(2, small_network)
    model, moved = wrapped(fleet), []
    both = [
        create("sam", one.parameters(), "triton", scratch=scratch)
        for one, scratch in zip(fleet.networks, (True, False), strict=True)
    ]
    for _ in range(2):
        homes = [p.data_ptr() for p in fleet.parameters()]
        model(*data(rank, size)).backward()
        for optimizer in both:
            optimizer.first_step(zero_grad=True)
        moved.append([p.data_ptr() for p in fleet.parameters()] != homes)
        model(*data(rank, size)).backward()
        for optimizer in both:
            optimizer.second_step(zero_grad=True)
        assert [p.data_ptr() for p in fleet.parameters()] == homes
    networks = [list(one.parameters()) for one in fleet.networks]
    return moved, difference(*networks), are_equal_everywhere(networks[0])


@INTERPRETED
def test_scratch_memory():
    for found in processes.run(2, in_scratch_memory):
        assert found == ([True, True], 0.0, True)


def many_steps(rank, size, methods, own, steps):
    fleet = Fleet(len(methods), small_network)
    model = wrapped(fleet)
    context = model.no_sync if own else None
    combinations = [(name, "sgd-momentum") for name in methods]
    several = optimizers(fleet, combinations, ascent_context=context)
    start = [p.detach().clone() for p in fleet.parameters()]
    train(model, several, data(rank, size), steps, context or contextlib.nullcontext)

    def is_shared(name):  # the ascent's state follows from each rank's own gradient
        return not (own and name.startswith("ascent_"))

    return {
        "moved": min(difference([x], [y]) for x, y in zip(start, fleet.parameters(), strict=True)),
        "weights": are_equal_everywhere(list(fleet.parameters())),
        "states": [
            are_equal_everywhere(
                [x for s in one.state.values() for name, x in s.items() if is_shared(name)]
            )
            for one in several
        ],
        "kept": [
            are_equal_everywhere([x for x in one.kept.values() if isinstance(x, torch.Tensor)])
            for one in several
        ],
    }


@pytest.mark.parametrize(("own", "steps"), [(False, 80), (True, 80)])
def test_replicas_stay_identical(own, steps):
    methods = OWN if own else list(METHODS)
    for found in processes.run(2, many_steps, methods, own, steps):
        assert found["moved"] > 0.01
        assert found["weights"] and all(found["states"])
        different = [name for name, same in zip(methods, found["kept"], strict=True) if not same]
        # what an ascent adds up of its own gradients
        assert different == (["lightsam-1", "preconditioned", "preconditioned-all"] if own else [])


# --- each along its own gradient ------------------------------------------------------------------


def trajectory(rank, size, combinations, steps):
    """Weights of networks that are each stepped by a closure."""
    x, y = data(rank, size)
    ends = []
    for method, base in combinations:
        model = wrapped(network())
        optimizer = create(method, model.parameters(), "torch", base, ascent_context=model.no_sync)

        def closure(model=model):
            loss = (model(x) - y).square().mean()
            loss.backward()
            return loss

        for _ in range(steps):
            optimizer.step(closure)
        ends.append(numpy(list(model.parameters())))
    return ends


@pytest.mark.parametrize(("size", "every"), [(2, 4), (4, 9)])
def test_own_perturbations_by_formula(size, every):
    combinations = [(name, base) for name in OWN for base in METHODS[name].bases[::every]]
    found = processes.run(size, trajectory, combinations, 4)
    for i, (method, base) in enumerate(combinations):
        expected = formula(method, base, size, 4)
        for ends in found:
            for ours, theirs in zip(ends[i], expected, strict=True):
                np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-14, err_msg=method)
    # and it is not what all ranks do alike
    alike, own = (formula("sam", "sgd", n, 4) for n in (1, size))
    assert max(abs(a - b).max() for a, b in zip(alike, own, strict=True)) > 1e-5


class Counted:
    """Collectives of a step: DDP's buckets by their bytes, and the optimizer's own."""

    def __init__(self, model):
        self.model, self.buckets, self.own = model, [], []
        model.register_comm_hook(None, self._reduce)

    def _reduce(self, _, bucket):
        self.buckets.append(bucket.buffer().nbytes)
        reduced = self._all_reduce(bucket.buffer().div_(dist.get_world_size()), async_op=True)
        return reduced.get_future().then(lambda future: future.value()[0])

    def __enter__(self):
        self._all_reduce = dist.all_reduce

        def noted(x, *args, **kwargs):
            self.own.append(x.nbytes)
            return self._all_reduce(x, *args, **kwargs)

        dist.all_reduce = noted
        return self

    def __exit__(self, *_):
        dist.all_reduce = self._all_reduce


def communication(rank, size, method, own, scaled, every):
    """Bytes of DDP's and of the optimizer's collectives, in each of two steps."""
    model = wrapped(network(torch.float32))
    x, y = data(rank, size, torch.float32)
    optimizer = create(method, model.parameters(), "torch", perturb_every=every,
                       ascent_context=model.no_sync if own else None)  # fmt: skip
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, enabled=scaled)
    counted = Counted(model)

    def closure():
        loss = (model(x) - y).square().mean()
        scaler.scale(loss).backward()
        return loss

    steps = []
    with counted:
        for _ in range(2):
            optimizer.step(closure, grad_scaler=scaler)
            scaler.update()
            steps.append((sum(counted.buckets), counted.own[:]))
            counted.buckets.clear()
            counted.own.clear()
    return steps


WEIGHTS = 4 * sum(p.numel() for p in network().parameters())
TWO_NUMBERS = [16]


@pytest.mark.parametrize(
    ("method", "own", "scaled", "expected"),
    [
        ("sam", False, False, (2 * WEIGHTS, [])),
        ("ssam", False, True, (2 * WEIGHTS, [])),
        ("sam", True, False, (WEIGHTS, [])),
        ("sam-clip", True, False, (WEIGHTS, [])),
        ("ssam", True, False, (WEIGHTS, TWO_NUMBERS)),
        ("sam", True, True, (WEIGHTS, TWO_NUMBERS)),
        ("lightsam-3-all", True, True, (WEIGHTS, TWO_NUMBERS)),
    ],
)
def test_communication(method, own, scaled, expected):
    for found in processes.run(2, communication, method, own, scaled, 1):
        assert found == [expected] * 2


def test_steps_of_the_base_are_synchronized():
    """Their only gradient is the one that the weights follow."""
    for found in processes.run(2, communication, "sam", True, False, 2):
        assert found == [(WEIGHTS, [])] * 2


def several_modes(rank, size):
    """Weights after a few steps of SSAM whose contexts reach ``no_sync`` in different ways."""
    x, y = data(rank, size)

    def ends(steps, **kwargs):
        model = wrapped(network())
        if "wrap" in kwargs:
            kwargs["ascent_context"] = kwargs.pop("wrap")(model)
        optimizer = fastsam.SSAM(model.parameters(), torch.optim.SGD, lr=0.1, **kwargs)
        steps(model, optimizer)
        weights = [p.detach() for p in model.parameters()]
        return torch.cat([w.reshape(-1) for w in weights]), are_equal_everywhere(weights)

    def closures(model, optimizer):
        def closure():
            loss = (model(x) - y).square().mean()
            loss.backward()
            return loss

        for _ in range(3):
            optimizer.step(closure)

    def by_hand(first):
        """Explicit passes; ``first`` takes the first gradient."""

        def steps(model, optimizer):
            for _ in range(3):
                first(model)
                optimizer.first_step(zero_grad=True)
                (model(x) - y).square().mean().backward()
                optimizer.second_step(zero_grad=True)

        return steps

    def naive(model):
        """What is often written: by the time of the backward pass it is decided."""
        loss = (model(x) - y).square().mean()
        with model.no_sync():
            loss.backward()

    def whole(model):
        with model.no_sync():
            (model(x) - y).square().mean().backward()

    def stacked(model):
        def context():
            stack = contextlib.ExitStack()
            stack.enter_context(model.no_sync())
            return stack

        return context

    class Strategy:
        """As Lightning's, which has the model and a method that gives ``no_sync``."""

        def __init__(self, model):
            self.model = model

        @contextlib.contextmanager
        def block_backward_sync(self):
            with self.model.no_sync():
                yield

    def warned(steps, **kwargs):
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            found = ends(steps, **kwargs)
        return *found, [str(one.message) for one in seen if one.category is UserWarning]

    return {
        "alike": ends(closures),
        "naive": ends(by_hand(naive)),
        "method": ends(closures, wrap=lambda model: model.no_sync),
        "function": ends(closures, wrap=lambda model: lambda: model.no_sync()),
        "per_replica": ends(closures, wrap=fastsam.per_replica),
        "by hand": ends(by_hand(whole), wrap=lambda model: model.no_sync),
        "function, by hand": ends(by_hand(whole), wrap=lambda model: lambda: model.no_sync()),
        "strategy": ends(closures, wrap=lambda model: Strategy(model).block_backward_sync),
        "compiled": ends(closures, wrap=lambda model: fastsam.per_replica(torch.compile(model))),
        "stack": warned(closures, wrap=stacked),
        "unknown": ends(by_hand(whole)),
    }


def test_ways_to_no_sync():
    for found in processes.run(2, several_modes):
        alike, own = found["alike"][0], found["method"][0]
        assert (alike - own).abs().max() > 1e-4
        assert torch.equal(found["naive"][0], alike)  # around backward alone it has no effect
        for way in ("function", "per_replica", "by hand", "function, by hand", "strategy",
                    "compiled"):  # fmt: skip
            assert torch.equal(found[way][0], own), way
        _, equal, messages = found.pop("stack")  # in which nothing can be seen
        assert not equal and len(messages) == 1
        assert "use ascent_context=fastsam.per_replica(model)" in messages[0]
        # without ascent_context nothing says that the norms are those of single ranks
        unknown = found.pop("unknown")
        assert not unknown[1]
        assert all(equal for _, equal in found.values())


def refusals(rank, size):
    found = {}
    x, y = data(rank, size)
    for method in REFUSED:
        model = wrapped(network())
        before = [p.detach().clone() for p in model.parameters()]
        optimizer = create(method, model.parameters(), "torch", ascent_context=model.no_sync)

        def closure(model=model, x=x, y=y):
            (model(x) - y).square().mean().backward()

        try:
            optimizer.step(closure)
        except RuntimeError as error:
            same = difference(before, list(model.parameters())) == 0
            found[method] = str(error) if same else "weights changed"
        optimizer.ascent_context = None
        optimizer.step(closure)
    with pytest.raises(TypeError, match="fully_shard, got Sequential"):
        fastsam.per_replica(network())
    return found


def test_updates_that_need_more_are_refused():
    for found in processes.run(2, refusals):
        assert list(found) == REFUSED
        for method, message in found.items():
            reason = "mixes" if METHODS[method].mixes else "adaptive"
            assert reason in message and "ascent_context" in message


# --- overflows on one rank ------------------------------------------------------------------------


def overflow(rank, size, method, backend, own, which, scaled):
    """One of three steps overflows in one pass of one rank."""
    model = wrapped(network(torch.float32))
    x, y = data(rank, size, torch.float32)
    context = model.no_sync if own else None
    optimizer = create(method, model.parameters(), backend, "adamw", ascent_context=context,
                       skip_nonfinite=True)  # fmt: skip
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=scaled)
    calls = 0

    def closure():
        nonlocal calls
        factor = float("inf") if rank == 1 and calls == 2 + which else 1.0
        calls += 1
        loss = factor * (model(x) - y).square().mean()
        scaler.scale(loss).backward()
        return loss

    weights, same = [], []
    for _ in range(3):
        optimizer.step(closure, grad_scaler=scaler)
        scaler.update()
        weights.append([p.detach().clone() for p in model.parameters()])
        same.append(are_equal_everywhere(weights[-1]))
    return {
        "same": all(same),
        "moved": [difference(a, b) > 0 for a, b in zip(weights, weights[1:], strict=False)],
        "finite": all(bool(w.isfinite().all()) for w in weights[-1]),
        "skipped": float(optimizer.metrics["skipped"]),
        "scale": scaler.get_scale(),
    }


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_overflow_on_one_rank(which, own, scaled):
    """All ranks skip, or none does."""
    skips = scaled or which == 1
    expected = {
        "same": True, "moved": [not skips, True], "finite": True, "skipped": float(skips),
        "scale": (2.0**9 if skips else 2.0**10) if scaled else 1.0,
    }  # fmt: skip
    for method in ("sam", "ssam", "vasso", "lightsam-1", "lightsam-3-all"):
        for found in processes.run(2, overflow, method, "torch", own, which, scaled):
            assert found == expected, method


@INTERPRETED
def test_overflow_on_one_rank_in_the_kernels():
    for found in processes.run(2, overflow, "ssam", "triton", True, 0, True):
        assert found["same"] and found["skipped"] == 1 and found["scale"] == 2.0**9


# --- what DDP may be told -------------------------------------------------------------------------


class Branches(torch.nn.Module):
    """Takes one branch or another, so that some parameters have no gradient."""

    def __init__(self):
        super().__init__()
        self.stem = network()
        self.ways = torch.nn.ModuleList(torch.nn.Linear(1, 1, dtype=torch.float64) for _ in "abc")

    def forward(self, x, way):
        return self.ways[way](self.stem(x))


class Scale(torch.nn.Module):
    """One parameter, which then fills a bucket of DDP's."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.linspace(0.5, 1, 7, dtype=torch.float64))

    def forward(self, x, way):
        return x @ self.weight[:, None]


def told(rank, size, options, branches, own, cases):
    """Differences from one process that has the batches of all ranks."""
    x, y = data(rank, size)
    worst, same = 0.0, True
    for method, base in cases:
        modules = [Branches() if branches else Scale() for _ in range(2)]
        modules[1].load_state_dict(modules[0].state_dict())
        model = wrapped(modules[0], **{k: x for k, x in options.items() if k != "set_to_none"})
        kept = {k: x for k, x in options.items() if k == "set_to_none"}
        context = model.no_sync if own else None
        # with static_graph torch wants gradients of the first pass ever to be synchronised
        start = int(own and "static_graph" in options)
        optimizer = create(
            method, model.parameters(), "torch", base, ascent_context=context, start=start, **kept
        )
        whole = create(method, modules[1].parameters(), "torch", base)

        def closure(model=model, x=x, y=y):
            loss = (model(x, rank if branches == "differ" else 0) - y).square().mean()
            loss.backward()
            return loss

        def everything(model=modules[1]):
            shares = [(r, *data(r, size)) for r in range(size)]
            losses = [
                (model(x, r if branches == "differ" else 0) - y).square().mean()
                for r, x, y in shares
            ]
            torch.stack(losses).mean().backward()

        for _ in range(3):
            optimizer.step(closure)
            whole.step(everything)
        same &= are_equal_everywhere(list(model.parameters()))
        worst = max(worst, difference(*(list(module.parameters()) for module in modules)))
    return worst, same


SOME = [("sam", "sgd-momentum"), ("ssam", "adamw"), ("vasso", "adagrad"), ("lightsam-3", "")]
MIXING = [("samar", "adagrad_norm"), ("samar-callable", "adamw")]


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize(
    ("options", "branches"),
    [
        ({"gradient_as_bucket_view": True}, None),
        ({"gradient_as_bucket_view": True, "set_to_none": False}, None),
        ({"static_graph": True}, None),
        ({"find_unused_parameters": True}, "same"),
        ({"find_unused_parameters": True}, "differ"),
        ({"find_unused_parameters": True, "gradient_as_bucket_view": True}, "differ"),
    ],
)
def test_options(options, branches, own):
    cases = SOME if own else SOME + MIXING
    for worst, same in processes.run(2, told, options, branches, own, cases):
        assert same
        assert worst > 1e-4 if own else worst < 2e-14


def in_16_bits(rank, size, kwargs, own):
    """Whether replicas and their states stay the same, and how far they moved."""
    same, moved = True, []
    for method in ("sam", "ssam", "lightsam-1", "adasam"):
        model = wrapped(network(torch.bfloat16))
        before = [p.detach().clone() for p in model.parameters()]
        context = model.no_sync if own else None
        several = create(
            method, model.parameters(), "torch", "adamw", ascent_context=context, **kwargs
        )
        x, y = data(rank, size, torch.bfloat16)

        def closure(model=model, x=x, y=y):
            (model(x) - y).float().square().mean().backward()

        for _ in range(5):
            several.step(closure)
        states = [x for state in several.state.values() for x in state.values()]
        same &= are_equal_everywhere([*model.parameters(), *states])
        moved.append(difference(before, list(model.parameters())))
    return same, min(moved)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize(
    "kwargs", [{"master_weights": True}, {"rounding": "stochastic", "seed": 3}]
)
def test_weights_in_16_bits(kwargs, own):
    for same, moved in processes.run(2, in_16_bits, kwargs, own):
        assert same and moved > 1e-3


def batch_norm(rank, size, own):
    layers = torch.nn.Linear(7, 5), torch.nn.BatchNorm1d(5), torch.nn.Tanh(), torch.nn.Linear(5, 1)
    model = wrapped(torch.nn.Sequential(*layers).double())
    optimizer = fastsam.SAM(
        model.parameters(), torch.optim.SGD, lr=0.1,
        ascent_context=model.no_sync if own else None,
        descent_context=fastsam.frozen_batch_norm(model),
    )  # fmt: skip
    x, y = data(rank, size)
    expected = torch.zeros(5, dtype=torch.float64)

    def closure():
        loss = (model(x) - y).square().mean()
        loss.backward()
        return loss

    norm = layers[1]
    for _ in range(3):
        with torch.no_grad():
            mean = layers[0](x).mean(0)
        dist.broadcast(expected, 0)  # DDP hands out rank 0's, before every other forward pass
        expected = 0.9 * expected + 0.1 * mean
        optimizer.step(closure)
    return {
        "batches": int(norm.num_batches_tracked),
        "mean": float((norm.running_mean - expected).abs().max()),
        "same": are_equal_everywhere(list(model.parameters())),
    }


@pytest.mark.parametrize("own", [False, True])
def test_batch_norm_counts_one_pass(own):
    for found in processes.run(2, batch_norm, own):
        assert found["batches"] == 3 and found["mean"] < 1e-15 and found["same"]


def lets(rank, size, own, hessian):
    """LETS with losses averaged over the ranks; the radii, and what one process finds."""
    x, y = data(rank, size)
    found = []
    for share, several in (((x, y), True), (data(), False)):
        model = wrapped(network()) if several else network()
        sam = fastsam.SAM(model.parameters(), torch.optim.SGD, lr=0.1)
        if several and own:
            sam.ascent_context = model.no_sync
        optimizer = fastsam.LETS(sam, rho_lr=0.1, hessian=hessian)

        def closure_for(sign, model=model, share=share, several=several):
            def closure():
                x, y = share
                loss = (model(x) - sign * y).square().mean()
                loss.backward()
                loss = loss.detach()
                if several:
                    dist.all_reduce(loss)
                    loss /= size
                return loss

            return closure

        for _ in range(3):
            optimizer.step(closure_for(1), closure_for(-1))
        rho = optimizer.param_groups[0]["rho"]
        found.append(torch.stack([rho.double(), *[p.detach().sum() for p in model.parameters()]]))
    return are_equal_everywhere(found[:1]), float((found[0] - found[1]).abs().max())


@pytest.mark.parametrize("hessian", ["diag", "difference"])
@pytest.mark.parametrize("own", [False, True])
def test_learned_radii(own, hessian):
    for same, worst in processes.run(2, lets, own, hessian):
        assert same
        assert worst > 1e-6 if own else worst < 2e-14


# --- on GPUs --------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("backend", BACKENDS)
def test_default_is_one_process_on_gpus(backend):
    """Matrix products are in another order, too."""
    combinations = COMBINATIONS[::3]
    for found in processes.run(
        gpus(), one_process, combinations, backend, 3, "cuda", backend="nccl"
    ):
        assert found < 1e-12


def own_on_gpus(rank, size, backend, scaled):
    """Whether replicas that perturb for themselves stay the same."""
    same = []
    for method in ("sam", "ssam", "vasso", "lightsam-1"):
        model = wrapped(network(torch.float32).cuda())
        optimizer = create(
            method, model.parameters(), backend, "adamw", ascent_context=model.no_sync
        )
        scaler = torch.amp.GradScaler("cuda", enabled=scaled)
        x, y = (z.cuda() for z in data(rank, size, torch.float32))

        def closure(model=model, x=x, y=y, scaler=scaler):
            loss = (model(x) - y).square().mean()
            scaler.scale(loss).backward()
            return loss

        for _ in range(20):
            optimizer.step(closure, grad_scaler=scaler)
            scaler.update()
        same.append(are_equal_everywhere([p.cpu() for p in model.parameters()]))
    return same


@pytest.mark.gpu
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_replicas_stay_identical_on_gpus(backend, scaled):
    for same in processes.run(gpus(), own_on_gpus, backend, scaled, backend="nccl"):
        assert all(same)


def sync_batch_norm(rank, size):
    """The difference from BatchNorm in one process, in weights and statistics."""
    models = []
    for share, several in ((data(rank, size), True), (data(), False)):
        torch.manual_seed(0)
        layers = torch.nn.Linear(7, 5), torch.nn.BatchNorm1d(5), torch.nn.Linear(5, 1)
        model = torch.nn.Sequential(*layers).double().cuda()
        models.append(model)
        if several:
            model = wrapped(torch.nn.SyncBatchNorm.convert_sync_batchnorm(model))
            models[0] = model.module
        optimizer = fastsam.SAM(
            model.parameters(), torch.optim.SGD, lr=0.1,
            descent_context=fastsam.frozen_batch_norm(model),
        )  # fmt: skip
        x, y = (z.cuda() for z in share)

        def closure(model=model, x=x, y=y):
            (model(x) - y).square().mean().backward()

        for _ in range(3):
            optimizer.step(closure)
    return difference(*(list(model.state_dict().values()) for model in models))


@pytest.mark.gpu  # torch has it for GPUs alone
def test_sync_batch_norm():
    assert max(processes.run(gpus(), sync_batch_norm, backend="nccl")) < 1e-12


# --- the processes themselves ---------------------------------------------------------------------


def misbehave(rank, size, how):
    if rank == 1 and how == "raise":
        raise ValueError("on purpose")
    if rank == 1 and how == "exit":
        os._exit(3)
    if how == "hang" or rank == 0:
        dist.barrier() if how != "hang" else time.sleep(60)


@pytest.mark.parametrize(
    ("how", "what"),
    [
        ("raise", r"rank 0: it had not come to an end\nrank 1: Traceback(.|\n)*on purpose"),
        ("exit", r"rank 1: it ended with exit code 3"),
        ("hang", r"rank 0: it had not come to an end\nrank 1: it had not come to an end"),
    ],
)
def test_failures_are_reported_and_nothing_is_left_running(how, what):
    processes.close()
    before = set(multiprocessing.active_children())
    if how != "hang":  # starting them may take long, and is not what is timed
        assert processes.run(2, are_alive) == [[0, 1], [0, 1]]
    with pytest.raises(processes.Failed, match=what):
        processes.run(2, misbehave, how, timeout=20 if how != "hang" else 1)
    assert set(multiprocessing.active_children()) == before  # none of the two is left
    assert processes.run(2, are_alive) == [[0, 1], [0, 1]]


def are_alive(rank, size):
    everyone = [None] * size
    dist.all_gather_object(everyone, rank)
    return everyone
