"""FSDP2: every process works on its shards, and norms are those of all of them."""

import contextlib

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import fastsam

import processes
from processes import Fleet, are_equal_everywhere, data, difference, network, train
from registry import BACKENDS, METHODS, numpy
from shards import (
    EVERYTHING,
    INTERPRETED,
    WITHOUT_NOISE,
    closure_of,
    formula,
    gpus,
    made,
    mesh_of,
    same,
    sharded,
    snapshot,
    squared_error,
    whole,
)


@pytest.fixture(scope="module", autouse=True)
def _end_processes():
    yield
    processes.close()


def shards_of(model):
    """This rank's part of every parameter."""
    return [p.to_local() if isinstance(p, DTensor) else p for p in model.parameters()]


# --- equal to one process -------------------------------------------------------------------------


def one_process(rank, size, kind, combinations, backend, steps, device="cpu"):
    """The largest difference from the same training in one process, and how small shards are."""
    fleets = [Fleet(len(combinations)).to(device) for _ in range(2)]
    shards = sharded(fleets[0], kind)
    batches = [tuple(x.to(device) for x in batch) for batch in (data(rank, size), data())]
    for fleet, batch in zip(fleets, batches, strict=True):
        several = [
            made(method, base, one.parameters(), backend)
            for one, (method, base) in zip(fleet.networks, combinations, strict=True)
        ]
        train(fleet, several, batch, steps)
    sizes = [p.to_local().numel() for p in shards.parameters() if isinstance(p, DTensor)]
    return difference(whole(shards.parameters()), list(fleets[1].parameters())), min(sizes)


FEW = [("vasso-all", "adamw"), ("samar", "adagrad_norm")]


@pytest.mark.parametrize(
    ("kind", "size", "backend", "combinations", "steps"),
    [
        ("sharded", 2, "torch", EVERYTHING, 2),
        ("sharded", 4, "torch", EVERYTHING[::11], 3),
        ("replicated", 4, "torch", EVERYTHING[1::8], 3),
        ("mixed", 2, "torch", EVERYTHING[2::6], 3),
        ("mixed", 2, "reference", [(name, "adamw") for name in WITHOUT_NOISE], 2),
        ("copied", 2, "torch", EVERYTHING[3::12], 2),
        ("replicated", 4, "reference", EVERYTHING[::16], 2),
        pytest.param("mixed", 2, "triton", FEW, 1, marks=INTERPRETED),
        pytest.param("sharded", 4, "triton", [("sam", "sgd")], 1, marks=INTERPRETED),
    ],
)
def test_equal_to_one_process(kind, size, backend, combinations, steps):
    """Only the order of sums differs: roundings of 2**-53, grown a little."""
    found = processes.run(size, one_process, kind, combinations, backend, steps)
    assert all(worst < 2e-14 for worst, _ in found)
    assert (
        kind == "copied" or found[-1][1] == 0
    )  # one weight over several ranks: on the last there is none


def in_scratch_memory(rank, size):
    """How far steps with ``scratch=True`` are from others, and whether anything has moved."""
    fleet = Fleet(2)
    sharded(fleet, "mixed")
    both = [
        made("sam", "sgd", one.parameters(), "triton", scratch=scratch)
        for one, scratch in zip(fleet.networks, (True, False), strict=True)
    ]
    train(fleet, both, data(rank, size), 1)
    memory = both[0]._passes.backends._made["triton"]._moving.memory
    return difference(*(whole(one.parameters()) for one in fleet.networks)), len(memory)


@INTERPRETED
def test_shards_stay_where_they_are():
    for found in processes.run(2, in_scratch_memory):
        assert found == (0.0, 0)


def several_bases(rank, size, backend, steps):
    """The difference from one process, of bases that are fused and not, and of both norms."""
    model, alone = network(), network()
    sharded(model, "sharded")
    several = []
    for one in (model, alone):
        halves = [[p for p in one.parameters() if (p.ndim == 2) is own] for own in (True, False)]
        first = {"params": halves[0], "base_optimizer": torch.optim.RMSprop, "lr": 0.01}
        several.append(fastsam.SAM(
            [first, {"params": halves[1]}], torch.optim.AdamW, lr=0.02, eps=1e-3,
            max_grad_norm=0.1, backend=backend,
        ))  # fmt: skip
    for _ in range(steps):
        several[0].step(closure_of(model, data(rank, size)))
        several[1].step(closure_of(alone, data()))
    metrics = [list(optimizer.metrics.values()) for optimizer in several]
    found = difference(whole(model.parameters()), list(alone.parameters()))
    return max(found, difference(*metrics))


@pytest.mark.parametrize(
    ("backend", "steps"),
    [("torch", 2), ("reference", 2), pytest.param("triton", 1, marks=INTERPRETED)],
)
def test_several_bases(backend, steps):
    assert max(processes.run(2, several_bases, backend, steps)) < 2e-14


def variants(rank, size, kwargs, options):
    """Differences from one process of SSAM on AdamW, stepped by closures in several ways."""
    results = {}
    for way in ("one batch", "accumulated", "micro-batches"):
        batch = data(rank, size)
        half = [tuple(x.chunk(2)[i] for x in batch) for i in range(2)]
        model, alone = network(), network()
        sharded(model, "sharded", **options)
        cls = fastsam.SAM if way == "micro-batches" else fastsam.SSAM
        several = [
            cls(m.parameters(), torch.optim.AdamW, lr=0.02, eps=1e-3, **kwargs)
            for m in (model, alone)
        ]

        def accumulated(model=model, half=half):
            """Reduces gradients with the last micro-batch alone."""
            for last, share in enumerate(half):
                model.set_requires_gradient_sync(bool(last))
                (squared_error(model, share) / 2).backward()

        for _ in range(3):
            if way == "micro-batches":
                several[0].step_micro_batches([closure_of(model, share) for share in half])
                columns = list(zip(*(data(r, size) for r in range(size)), strict=True))
                everyone = [
                    tuple(torch.cat([xs.chunk(2)[i] for xs in column]) for column in columns)
                    for i in range(2)
                ]
                several[1].step_micro_batches([closure_of(alone, share) for share in everyone])
            else:
                several[0].step(accumulated if way == "accumulated" else closure_of(model, batch))
                several[1].step(closure_of(alone, data()))
        results[way] = difference(whole(model.parameters()), list(alone.parameters()))
        metrics = [list(optimizer.metrics.values()) for optimizer in several]
        results[f"{way}: metrics"] = difference(*metrics)
    return results


@pytest.mark.parametrize(
    ("kwargs", "options"),
    [
        ({}, {"reshard_after_forward": True}),
        ({"max_grad_norm": 0.1}, {"reshard_after_forward": False}),
        ({"adaptive": True, "rho": 0.5}, {"reshard_after_forward": 2}),
        ({"perturb_every": 2, "ascent_steps": 2}, {"shard_placement_fn": None}),
    ],
)
def test_ways_to_step(kwargs, options):
    for results in processes.run(4, variants, kwargs, options):
        assert max(results.values()) < 2e-14, results


def low_precision(rank, size, method):
    """Forward and backward in bfloat16, gradients summed in float32; weights in float32."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model, alone = network(torch.float32), network(torch.float32)
    sharded(model, "sharded", mp_policy=policy)
    several = [made(method, "sgd-momentum", m.parameters()) for m in (model, alone)]

    def cast(rank):
        x, y = data(rank, size, torch.float32)
        params = {name: p.bfloat16() for name, p in alone.named_parameters()}
        return (torch.func.functional_call(alone, params, x.bfloat16()) - y).square().mean()

    def everyone():
        torch.stack([cast(rank) for rank in range(size)]).mean().backward()

    for _ in range(3):
        several[0].step(closure_of(model, data(rank, size, torch.float32)))
        several[1].step(everyone)
    return [p.dtype for p in model.parameters()], difference(
        whole(model.parameters()), list(alone.parameters())
    )


@pytest.mark.parametrize("method", ["sam", "ssam-adaptive-clip", "lightsam-1", "samar"])
def test_mixed_precision(method):
    """Where a rounding to bfloat16 falls to the other side a weight moves 2**-9 differently."""
    for dtypes, worst in processes.run(2, low_precision, method):
        assert set(dtypes) == {torch.float32}
        assert worst < 1e-3


def communication(rank, size, kind, method, backend):
    """All-reduces of the optimizer's own in each half of a step: how many numbers each."""
    model = sharded(network(), kind)
    optimizer = made(method, "adamw", model.parameters(), backend)
    addresses = [x.data_ptr() for x in shards_of(model)]
    plain_all_reduce, seen, halves = dist.all_reduce, [], []

    def noted(x, *args, **kwargs):
        seen.append(x.numel())
        return plain_all_reduce(x, *args, **kwargs)

    for half in (optimizer.first_step, optimizer.second_step) * 2:
        squared_error(model, data(rank, size)).backward()
        dist.all_reduce = noted
        try:
            half(zero_grad=True)
        finally:
            dist.all_reduce = plain_all_reduce
        halves.append(seen[:])
        seen.clear()
        assert [x.data_ptr() for x in shards_of(model)] == addresses  # in place
    return halves[2:]  # in its first step VaSSO's average begins, and has its norm taken again


@pytest.mark.parametrize("kind", ["sharded", "replicated", "mixed"])
@pytest.mark.parametrize(
    ("method", "first", "second"),
    [
        ("sam", 1, 0),
        ("sam-clip", 1, 1),
        ("ssam", 1, 1),
        ("ssam-adaptive-clip", 1, 2),
        ("vasso", 2, 0),
        ("samar", 1, [1, 3]),  # the second norm; the first, their product and the sharpness
        ("lightsam-1", 1, 1),
        ("lightsam-3", 0, 0),
        ("adasam", 1, 0),
    ],
)
def test_one_all_reduce_for_each_norm(kind, method, first, second):
    for halves in processes.run(2, communication, kind, method, "torch"):
        assert halves == [[1] * first, [1] * second if isinstance(second, int) else second]


@INTERPRETED
@pytest.mark.parametrize(("method", "second"), [("vasso", 0), ("samar", 1)])
def test_kernels_sum_in_one_all_reduce(method, second):
    """At most five sums, of which the norms and products of a pass are made."""
    for halves in processes.run(2, communication, "sharded", method, "triton"):
        assert halves == [[5], [5] * second]


# --- what goes wrong on one rank ------------------------------------------------------------------


def spoil(model, value):
    """Put a value into one element of one shard of the gradients; equal shards stay equal."""
    for p in model.parameters():
        if isinstance(p.grad, DTensor):
            if p.device_mesh.get_local_rank(p.device_mesh.ndim - 1) == 0:
                p.grad.to_local().view(-1)[0] = value
            return


def nonfinite(rank, size, kind, base, backend, which, scaler_class, unscales):
    """One of three steps finds a value that is not finite, in one pass, on one shard."""
    results = []
    for method in ("ssam", "vasso", "sam" if base == "rmsprop" else "lightsam-3-all"):
        model = sharded(network(torch.float32), kind)
        x, y = data(rank, size, torch.float32)
        optimizer = made(method, base, model.parameters(), backend, skip_nonfinite=True)
        scaler = scaler_class and scaler_class("cpu", init_scale=2.0**10)
        moved = []
        for step in range(3):
            before = snapshot(model, optimizer)
            for i, half in enumerate((optimizer.first_step, optimizer.second_step)):
                loss = squared_error(model, (x, y))
                (scaler.scale(loss) if scaler else loss).backward()
                if step == 1 and i == which:
                    spoil(model, float("nan") if i else float("inf"))
                if unscales:
                    scaler.unscale_(optimizer)
                half(zero_grad=True, grad_scaler=scaler)
            if scaler:
                scaler.update()
            moved.append(not same(before, snapshot(model, optimizer)))
        finite = all(bool(x.isfinite().all()) for x in shards_of(model))
        results.append((moved, finite, scaler.get_scale() if scaler else None,
                        float(optimizer.metrics["skipped"])))  # fmt: skip
    return results


@pytest.mark.parametrize(
    ("kind", "base", "backend", "which", "scaler_class", "unscales"),
    [
        ("sharded", "adamw", "torch", 1, None, False),
        ("replicated", "adamw", "reference", 1, None, False),
        ("mixed", "rmsprop", "torch", 1, None, False),
        ("sharded", "sgd-momentum", "torch", 0, torch.amp.GradScaler, False),
        ("replicated", "sgd-momentum", "torch", 1, torch.amp.GradScaler, False),
        ("sharded", "rmsprop", "torch", 0, ShardedGradScaler, False),
        ("mixed", "adamw", "torch", 1, ShardedGradScaler, False),
        ("sharded", "adamw", "torch", 0, ShardedGradScaler, True),
        ("sharded", "adamw", "torch", 1, torch.amp.GradScaler, True),
    ],
)
def test_all_ranks_skip(kind, base, backend, which, scaler_class, unscales):
    scale = 2.0**9 if scaler_class else None
    size = 2 if kind == "mixed" else 4
    for results in processes.run(
        size, nonfinite, kind, base, backend, which, scaler_class, unscales
    ):
        for result in results:
            assert result == ([True, False, True], True, scale, 1.0)


def scaled(rank, size, kind, method, backend, scaler_class):
    """Whether a loss scale of a power of two changes a bit."""
    ends = []
    for scaler in (None, scaler_class("cpu", init_scale=2.0**12, growth_interval=2)):
        model = sharded(network(torch.float32), kind)
        optimizer = made(method, "adamw", model.parameters(), backend)
        batch = data(rank, size, torch.float32)

        def closure(model=model, batch=batch, scaler=scaler):
            loss = squared_error(model, batch)
            (scaler.scale(loss) if scaler else loss).backward()
            return loss

        for _ in range(3):
            optimizer.step(closure, grad_scaler=scaler)
            if scaler:
                scaler.update()
        ends.append([x.detach() for x in whole(model.parameters())])
    return same(*ends), scaler.get_scale()


@pytest.mark.parametrize("scaler_class", [torch.amp.GradScaler, ShardedGradScaler])
@pytest.mark.parametrize(
    ("kind", "method", "backend"),
    [
        ("sharded", "ssam", "torch"),
        ("replicated", "samar", "torch"),
        ("mixed", "vasso", "reference"),
    ],
)
def test_loss_scales(kind, method, backend, scaler_class):
    for equal, scale in processes.run(2, scaled, kind, method, backend, scaler_class):
        assert equal and scale == 2.0**13


class Refusal(Exception):
    """What a closure raises."""


def failing(rank, size, kind, method, when):
    """A closure fails on all ranks, before or after the backward pass of one of its calls."""
    results = []
    call, after = when
    ends = []
    for fails in (True, False):
        model = sharded(network(), kind)
        optimizer = made(method, "adamw", model.parameters())
        batch = data(rank, size)
        calls = []

        def closure(model=model, batch=batch, calls=calls, fails=fails):
            calls.append(0)
            this = fails and len(calls) == 2 + call
            if this and not after:
                raise Refusal
            loss = squared_error(model, batch)
            loss.backward()
            if this:
                raise Refusal
            return loss

        optimizer.step(closure)
        before = snapshot(model, optimizer)
        if fails:
            try:
                optimizer.step(closure)
            except Refusal:
                results.append(same(before, snapshot(model, optimizer)))
        optimizer.step(closure)
        ends.append(snapshot(model, optimizer))
    return results == [True] and same(*ends)


@pytest.mark.parametrize("when", [(1, False), (1, True), (2, False), (2, True)])
def test_failures_on_all_ranks_change_nothing(when):
    for kind, method in (("sharded", "vasso"), ("replicated", "samar"), ("mixed", "lightsam-3")):
        assert processes.run(2, failing, kind, method, when) == [True, True]


def looking(rank, size, kind, backend):
    """What the unperturbed weights are in the middle of a step, and how it ends."""
    ends, found = [], []
    for looks in (True, False):
        model = sharded(network(), kind)
        optimizer = made("sam", "adamw", model.parameters(), backend)
        before = snapshot(model, optimizer)[: len(list(model.parameters()))]
        squared_error(model, data(rank, size)).backward()
        optimizer.first_step(zero_grad=True)
        perturbed = [x.clone() for x in shards_of(model)]
        if looks:
            with optimizer.unperturbed():
                found.append(same(before, shards_of(model)))
            found += [same(perturbed, shards_of(model)), not same(perturbed, before)]
        squared_error(model, data(rank, size)).backward()
        optimizer.second_step()
        ends.append(snapshot(model, optimizer))
    return all(found) and same(*ends)


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=INTERPRETED)])
def test_unperturbed_shards(backend):
    assert processes.run(2, looking, "sharded", backend) == [True, True]


# --- replicas that perturb for themselves ---------------------------------------------------------


def trajectory(rank, size, kind, combinations, steps):
    """Weights of networks on two replicas, which perturb each along its own gradient."""
    ends = []
    for method, base in combinations:
        model = sharded(network(), kind)
        context = fastsam.per_replica(model)
        optimizer = made(method, base, model.parameters(), ascent_context=context)
        closure = closure_of(model, data(rank, size))
        for _ in range(steps):
            optimizer.step(closure)
        ends.append(numpy(whole(model.parameters())))
    return ends


@pytest.mark.parametrize(("kind", "size"), [("replicated", 4), ("copied", 2)])
def test_perturbations_by_replica(kind, size):
    """By the formula of DDP's, with a replica's two ranks in the place of a rank.

    Every rank puts its replica's shards together, so all of them agree only if the replicas do.
    """
    combinations = [("sam", "sgd-nesterov"), ("asam", "adagrad"), ("usam", "adam"),
                    ("ssam", "adagrad_norm"), ("vasso", "adamw"), ("lightsam-1", ""),
                    ("lightsam-3-all", ""), ("adasam", "")]  # fmt: skip
    combinations = [(m, METHODS[m].bases[0] if not b else b) for m, b in combinations]
    found = processes.run(size, trajectory, kind, combinations, 4)
    for i, (method, base) in enumerate(combinations):
        expected = formula(method, base, 2, 4)
        for ends in found:
            for ours, theirs in zip(ends[i], expected, strict=True):
                np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-14, err_msg=method)


def by_replica(rank, size):
    """What else is to be seen of it: communication, a loss scale, an exception, refusals."""
    found = {}
    model = sharded(network(torch.float32), "replicated")
    before = [p.detach().clone() for p in model.parameters()]
    batch = data(rank, size, torch.float32)
    context = fastsam.per_replica(model)
    optimizer = fastsam.SAM(model.parameters(), torch.optim.SGD, lr=0.1, ascent_context=context)
    replicas = [rank % 2, rank % 2 + 2]
    plain_all_reduce, seen, passes = dist.all_reduce, [], []

    def noted(x, *args, group=None, **kwargs):
        if dist.get_process_group_ranks(group) == replicas:
            seen.append(x.numel())
        return plain_all_reduce(x, *args, group=group, **kwargs)

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    overflows = [False]

    def closure():
        factor = float("inf") if overflows.pop() and rank == 1 else 1.0
        overflows.append(False)
        loss = squared_error(model, batch)
        scaler.scale(factor * loss).backward()
        passes.append(sum(seen))
        seen.clear()
        return loss

    dist.all_reduce = noted
    try:
        optimizer.step(closure, grad_scaler=scaler)
        scaler.update()
        found["reduced"] = passes[:]
        overflows = [True]  # in the first pass of one replica
        middle = snapshot(model, optimizer)
        optimizer.step(closure, grad_scaler=scaler)
        scaler.update()
    finally:
        dist.all_reduce = plain_all_reduce
    found["skipped"] = same(middle, snapshot(model, optimizer)), scaler.get_scale()
    found["moved"] = difference(whole(before), whole(model.parameters())) > 0
    with contextlib.suppress(Refusal), context():
        raise Refusal
    ours = whole(model.parameters())
    optimizer.zero_grad()
    squared_error(model, batch).backward()  # as if the block had never been
    full = [p.grad.full_tensor() for p in model.parameters()]
    alone = network(torch.float32)
    alone.load_state_dict(dict(zip(alone.state_dict(), ours, strict=True)))
    squared_error(alone, data(dtype=torch.float32)).backward()
    found["synchronised"] = difference(full, [p.grad for p in alone.parameters()])
    samar = fastsam.SAMAR(model.parameters(), torch.optim.SGD, lr=0.1, ascent_context=context)
    with pytest.raises(RuntimeError, match="SAMAR mixes the first gradient"):
        samar.step(closure)
    with pytest.raises(RuntimeError, match="holds only its shard"):
        fastsam.per_replica(sharded(network(), "sharded"))
    return found


def test_replicas_share_what_updates_need():
    model = network()
    weights = sum(p.numel() for p in model.parameters())
    for found in processes.run(4, by_replica):
        first, second = found["reduced"]
        assert first == 0
        assert (
            weights / 2 <= second < weights / 2 + 100
        )  # shards are padded; the norm's two numbers
        assert found["skipped"] == (True, 2.0**9) and found["moved"]
        assert found["synchronised"] < 1e-6


def unsynchronised(rank, size, kind, setting, how):
    """First gradients that are not reduced: refused, without a trace."""
    ends = []
    for fails in (True, False):
        model = sharded(network(), kind)
        closure = closure_of(model, data(rank, size))

        @contextlib.contextmanager
        def unsynchronised(model=model):
            getattr(model, setting)(False)
            try:
                yield
            finally:
                getattr(model, setting)(True)

        optimizer = fastsam.VaSSO(model.parameters(), torch.optim.AdamW, lr=0.02)
        optimizer.step(closure)
        before = snapshot(model, optimizer)
        if fails:
            with pytest.raises(RuntimeError, match="its shard of the weights.*per_replica"):
                if how == "closure":
                    optimizer.ascent_context = unsynchronised
                    optimizer.step(closure)
                else:
                    optimizer.zero_grad()
                    with unsynchronised():
                        closure()
                    optimizer.first_step(zero_grad=True)
                    closure()
                    optimizer.second_step()
            assert same(before, snapshot(model, optimizer))
            optimizer.ascent_context = None
        optimizer.step(closure)
        ends.append(snapshot(model, optimizer))
    return same(*ends)


@pytest.mark.parametrize("how", ["closure", "by hand"])
@pytest.mark.parametrize(
    ("kind", "setting"),
    [
        ("sharded", "set_requires_gradient_sync"),
        ("replicated", "set_requires_gradient_sync"),
        ("replicated", "set_requires_all_reduce"),
    ],
)
def test_ranks_have_no_perturbation_of_their_own(kind, setting, how):
    """FSDP keeps what it does not reduce, and adds it to the next gradients."""
    assert processes.run(2 if kind == "sharded" else 4, unsynchronised, kind, setting, how)


# --- weights in 16 bits, learned radii, state -----------------------------------------------------


def half_precision(rank, size, kind, kwargs, backend):
    """The same gradients for shards and for one process: only norms may be rounded differently."""
    results = {"difference": 0.0, "master": 0.0, "same": True, "moved": 1.0}
    for method in ["sam"] if backend == "triton" else ["ssam", "vasso", "lightsam-3"]:
        model, alone = (network(torch.bfloat16) for _ in range(2))
        sharded(model, kind)
        several = [made(method, "adamw", m.parameters(), backend, **kwargs) for m in (model, alone)]
        before = whole(model.parameters())
        generator = torch.Generator().manual_seed(0)
        for half in ("first_step", "second_step") * (1 if backend == "triton" else 3):
            for p, q in zip(model.parameters(), alone.parameters(), strict=True):
                q.grad = torch.randn(q.shape, generator=generator).to(q.dtype)
                p.grad = q.grad
                if isinstance(p, DTensor):
                    p.grad = distribute_tensor(q.grad, p.device_mesh, p.placements)
            for optimizer in several:
                getattr(optimizer, half)()
        found = whole(model.parameters())
        results["difference"] = max(
            results["difference"],
            difference([x.float() for x in found], [x.float() for x in alone.parameters()]),
        )
        if "master_weights" in kwargs:
            masters = [
                [optimizer.state[p]["master_weight"] for p in m.parameters()]
                for m, optimizer in zip((model, alone), several, strict=True)
            ]
            results["master"] = max(results["master"], difference(*map(whole, masters)))
        results["same"] &= are_equal_everywhere(found)
        results["moved"] = min(results["moved"], difference(before, found))
    return results


@pytest.mark.parametrize(
    ("kind", "size", "backend"),
    [("sharded", 4, "torch"), ("replicated", 4, "torch"), ("mixed", 2, "reference"),
     pytest.param("mixed", 2, "triton", marks=INTERPRETED)],
)  # fmt: skip
def test_master_weights(kind, size, backend):
    for found in processes.run(size, half_precision, kind, {"master_weights": True}, backend):
        assert found["same"] and found["moved"] > 1e-2
        assert found["master"] < 1e-6 and found["difference"] < 2**-8


def stochastic(rank, size, kind, seed):
    """Weights after a step that moves all of them from 1 by a quarter of their spacing."""
    layer = torch.nn.Linear(40, 40, dtype=torch.bfloat16)
    torch.nn.init.ones_(layer.weight)
    mesh = mesh_of(kind)
    fully_shard(layer, mesh=mesh)
    optimizer = fastsam.SAM(
        layer.parameters(), torch.optim.SGD, lr=2.0**-9, rounding="stochastic", seed=seed
    )
    for half in (optimizer.first_step, optimizer.second_step):
        layer.weight.grad = distribute_tensor(
            -torch.ones(40, 40, dtype=torch.bfloat16), mesh, layer.weight.placements
        )
        half()
    return layer.weight.full_tensor().detach().float()


@pytest.mark.parametrize("kind", ["sharded", "replicated"])
def test_stochastic_rounding(kind):
    """1 + 2**-9 becomes 1 + 2**-7 in one of four elements, on each shard in others."""
    found, again, other = (processes.run(4, stochastic, kind, seed) for seed in (1, 1, 2))
    for x in found:
        assert torch.equal(x, found[0]) and torch.equal(x, again[0])
        assert not torch.equal(x, other[0])
    up = found[0] > 1
    assert set(found[0].unique().tolist()) == {1.0, 1 + 2.0**-7}
    assert 320 < int(up.sum()) < 480  # 400 expected, with a standard deviation of 17
    shards = up.chunk(4 if kind == "sharded" else 2)
    assert not any(torch.equal(shards[0], shard) for shard in shards[1:])


def lets(rank, size, kind, hessian, backend):
    """LETS, with losses averaged over the ranks, against one process."""
    found = []
    for share, several in ((data(rank, size), True), (data(), False)):
        model = sharded(network(), kind) if several else network()
        sam = fastsam.ASAM(model.parameters(), torch.optim.SGD, lr=0.1, backend=backend)
        optimizer = fastsam.LETS(sam, rho_lr=0.1, hessian=hessian)

        def closure_for(sign, model=model, share=share, several=several):
            def closure():
                x, y = share
                loss = squared_error(model, (x, sign * y))
                loss.backward()
                loss = loss.detach()
                if several:
                    dist.all_reduce(loss)
                    loss /= size
                return loss

            return closure

        for _ in range(3):
            optimizer.step(closure_for(1), closure_for(-1))
        found.append([optimizer.param_groups[0]["rho"], *whole(model.parameters())])
    return difference(*found)


@pytest.mark.parametrize("hessian", ["diag", "difference"])
@pytest.mark.parametrize(
    ("kind", "backend"), [("sharded", "torch"), ("replicated", "reference"), ("mixed", "torch")]
)
def test_learned_radii(kind, hessian, backend):
    assert max(processes.run(2, lets, kind, hessian, backend)) < 2e-14


def misplaced(rank, size):
    """State that is not sharded as its parameter: an error, with nothing changed."""
    model, alone = sharded(network(), "sharded"), network()
    batch = data(rank, size)
    for method, base in (("sam", "adamw"), ("lightsam-2", "")):
        optimizers = [made(method, base, m.parameters()) for m in (model, alone)]
        for m, optimizer in zip((model, alone), optimizers, strict=True):
            optimizer.step(closure_of(m, batch))
        states = [optimizer.state_dict() for optimizer in optimizers]
        for m, optimizer, state in zip((model, alone), optimizers, states[::-1], strict=True):
            before = snapshot(m, optimizer)
            with pytest.raises(ValueError, match="torch.distributed.checkpoint"):
                optimizer.load_state_dict(state)
            assert same(before, snapshot(m, optimizer))
        own, other = ([dict(x.state) for x in xs] for xs in (optimizers, optimizers[::-1]))
        for m, optimizer, mine, foreign in zip(
            (model, alone), optimizers, own, other, strict=True
        ):  # given by hand it is found in the step
            optimizer.state.update(zip(mine, foreign.values(), strict=True))
            before = snapshot(m, optimizer)
            with pytest.raises(RuntimeError, match="torch.distributed.checkpoint"):
                optimizer.step(closure_of(m, batch))
            assert same(before, snapshot(m, optimizer))
    return True


def test_state_of_another_sharding_is_refused():
    assert processes.run(2, misplaced) == [True, True]


# --- on GPUs --------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["sharded", "replicated", "mixed"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_to_one_process_on_gpus(kind, backend):
    """Matrix products are in another order, too."""
    combinations = EVERYTHING[::3]
    found = processes.run(
        gpus(), one_process, kind, combinations, backend, 3, "cuda", backend="nccl"
    )
    assert all(worst < 1e-12 for worst, _ in found)


# --- methods of whose steps some have one pass ----------------------------------------------------

ONE_PASS = {
    "MSAM": {},
    "DelayedSAM": {"rho": 0.5},
    "LookSAM": {"k": 2, "rho": 0.5},
}  # fmt: skip


def some_one_pass(rank, size, name, kind):
    """The difference from one process on the whole batch, with DDP or with sharded parameters."""
    worst = 0.0
    for base, kwargs in (("SGD", {"lr": 0.1, "momentum": 0.9}), ("AdamW", {"eps": 1e-3})):
        ours, alone = network(), network()
        model = DistributedDataParallel(ours) if kind == "ddp" else sharded(ours, "sharded")
        cls, of = getattr(fastsam, name), getattr(torch.optim, base)
        for one, batch in ((model, data(rank, size)), (alone, data())):
            optimizer = cls(one.parameters(), of, **kwargs, **ONE_PASS[name])
            for _ in range(4):
                optimizer.step(closure_of(one, batch))
            kept = {"LookSAM": "ascent_orthogonal", "DelayedSAM": "ascent_last"}.get(name)
            for p in one.parameters() if kept and one is ours else ():
                v = optimizer.state[p][kept]
                assert v.placements == p.placements and v.shape == p.shape
        worst = max(worst, difference(whole(ours.parameters()), list(alone.parameters())))
    return worst


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", ONE_PASS)
def test_steps_of_one_pass_are_those_of_one_process(name, kind):
    """LookSAM's v is a difference of gradients whose sums differ by roundings, over its norm."""
    assert all(worst < 1e-12 for worst in processes.run(2, some_one_pass, name, kind))
