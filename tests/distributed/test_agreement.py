"""Ranks that train one model with different settings: each says so, before weights differ."""

import contextlib
import time
import warnings
from unittest import mock

import pytest
import torch
import torch.distributed as dist

import fastsam
from fastsam import meetings
from fastsam.rank_settings import ATTRIBUTES

import processes
from processes import are_equal_everywhere, data, small_network
from shards import sharded, wrapped

SGD = {"base_optimizer": torch.optim.SGD, "lr": 0.1}


@pytest.fixture(scope="module", autouse=True)
def _end_processes():
    yield
    processes.close()


def closure_for(model, rank, size):
    x, y = data(rank, size)

    def closure():
        loss = (model(x) - y).square().mean()
        loss.backward()
        return loss

    return closure


@contextlib.contextmanager
def quick(patience, limit):
    """Ranks that wait no longer than that; gives the list of warnings."""
    with (
        mock.patch.object(meetings, "PATIENCE", patience),
        mock.patch.object(meetings, "LIMIT", limit),
        mock.patch.object(meetings, "LOOK_AGAIN", 0.0),
        warnings.catch_warnings(record=True) as seen,
    ):
        warnings.simplefilter("always")
        yield seen


def message_of(step, *args):
    """Of the error that it raises; nothing where it raises none."""
    try:
        step(*args)
    except RuntimeError as error:
        return str(error)
    return ""


# --- before the first step ------------------------------------------------------------------------

#: What one of two ranks has, and what is said of it.
UNLIKE = {
    "rho": ({"rho": 0.1}, "rho of group 0 is 0.05 on rank 0 and 0.1 on rank 1"),
    "tensor": (
        {"rho": torch.tensor(0.25)}, "rho of group 0 is 0.05 on rank 0 and 0.25 on rank 1"
    ),
    "lr": ({"lr": 0.2}, "lr of group 0 is 0.1 on rank 0 and 0.2 on rank 1"),
    "momentum": ({"momentum": 0.9}, "momentum of group 0 is 0 on rank 0 and 0.9 on rank 1"),
    "perturb_every": ({"perturb_every": 2}, "perturb_every is 1 on rank 0 and 2 on rank 1"),
    "start": ({"start": 1}, "start is 0 on rank 0 and 1 on rank 1"),
    "stop": ({"stop": 5}, "stop is None on rank 0 and 5 on rank 1"),
    "amplify": ({"amplify": True}, "amplify is False on rank 0 and True on rank 1"),
    "renormalize": ({"renormalize": True}, "renormalize is False on rank 0 and True on rank 1"),
    "max_grad_norm": (
        {"max_grad_norm": 1.5}, "max_grad_norm is None on rank 0 and 1.5 on rank 1"
    ),
    "skip_nonfinite": (
        {"skip_nonfinite": True}, "skip_nonfinite is False on rank 0 and True on rank 1"
    ),
    "norm": ({"norm": "layer"}, "norm is 'global' on rank 0 and 'layer' on rank 1"),
    "base": (
        {"base_optimizer": torch.optim.Adam}, "base_optimizer is SGD on rank 0 and Adam on rank 1"
    ),
    "class": ({"cls": fastsam.USAM}, "method is SAM on rank 0 and USAM on rank 1"),
    "context": (
        {"ascent_context": "no_sync"}, "ascent_context is None on rank 0 and of replicas on rank 1"
    ),
}  # fmt: skip


def begin(rank, size, cases, shard):
    """What is raised where rank 1 has something else; and what a step then does that agrees."""
    found = {}
    for name, (unlike, _) in cases.items():
        model = sharded(small_network(), "sharded") if shard else wrapped(small_network())
        before = [p.detach().clone() for p in model.parameters()]
        kwargs = {**SGD, **(unlike if rank else {})}
        if "ascent_context" in kwargs:
            kwargs["ascent_context"] = model.no_sync
        optimizer = kwargs.pop("cls", fastsam.SAM)(model.parameters(), **kwargs)
        closure = closure_for(model, rank, size)
        said = message_of(optimizer.step, closure)
        same = all(map(torch.equal, before, model.parameters()))
        if name in ("rho", "tensor"):  # mended, it trains
            optimizer.param_groups[0]["rho"] = 0.05
            for _ in range(3):
                optimizer.step(closure)
            assert not all(map(torch.equal, before, model.parameters()))
            assert shard or are_equal_everywhere(list(model.parameters()))
        found[name] = said, same
    return found


@pytest.mark.parametrize("shard", [False, True])
def test_first_step(shard):
    cases = {k: v for k, v in UNLIKE.items() if not shard or k in ("rho", "start", "class")}
    for found in processes.run(2, begin, cases, shard):
        for name, (said, same) in found.items():
            start = f"ranks disagree about settings that have to be the same: {UNLIKE[name][1]}"
            assert f"{said}; ".startswith(f"{start}; "), name
            assert same, name


def of_methods(rank, size):
    """What methods have of their own, and explicit passes."""
    found = []
    model = wrapped(small_network())
    rule = fastsam.SharpnessRatio(c=1.5 if rank else 1.1)
    for cls, kwargs in (
        (fastsam.UnifiedSAM, {**SGD, "lam": "1/t" if rank else 0.5}),
        (fastsam.LightSAM, {"rule": ("adagrad", "adam")[rank], "lr": 0.1, "rho": 0.1}),
        (fastsam.SAMAR, {**SGD, "rule": rule}),
        (fastsam.VaSSO, {**SGD, "theta": 0.5 + rank / 4}),
    ):
        optimizer = cls(model.parameters(), **kwargs)
        model.zero_grad()
        closure_for(model, rank, size)()
        found.append(message_of(optimizer.first_step))
    return found


def test_first_step_of_methods_by_hand():
    for found in processes.run(2, of_methods):
        assert "lam is 0.5 on rank 0 and '1/t' on rank 1" in found[0]
        assert "rule is 'adagrad' on rank 0 and 'adam' on rank 1" in found[1]
        assert "c=1.1" in found[2] and "c=1.5" in found[2]
        assert "theta of group 0 is 0.5 on rank 0 and 0.75 on rank 1" in found[3]


# --- changes --------------------------------------------------------------------------------------


def schedules(rank, size):
    """Comparisons in 40 steps of a schedule, and whether anything is left in the store."""
    model = wrapped(small_network())
    optimizer = fastsam.SAM(model.parameters(), **SGD)
    closure = closure_for(model, rank, size)
    numbers = []
    with mock.patch.object(
        meetings.Meeting, "compare", autospec=True, side_effect=meetings.Meeting.compare
    ) as compare:
        for i in range(40):
            optimizer.param_groups[0]["lr"] = 0.1 / (i + 1)
            optimizer.step(closure)
            numbers.append(compare.call_count)
        optimizer.perturb_every = 2
        optimizer.step(closure)
        optimizer.load_state_dict(optimizer.state_dict())
        optimizer.step(closure)
    meeting = optimizer._agreement._meeting
    dist.barrier()
    keys = [f"{n}/{k}" for n in range(13) for k in (0, 1, "came", "verdict", "taken")]
    left = [key for key in keys if meeting._store.check([key])]
    return numbers, compare.call_count, left


def test_schedules_are_not_compared_in_every_step():
    """The first step, eight changes of the learning rate, the 16th and the 32nd."""
    expected = [min(i + 1, 9) + (i >= 16) + (i >= 32) for i in range(40)]
    for numbers, in_all, left in processes.run(2, schedules):
        assert numbers == expected
        assert in_all == 13  # perturb_every, and loading
        assert left == []


def disagreeing_changes(rank, size):
    found = []
    model = wrapped(small_network())
    optimizer = fastsam.SAM(model.parameters(), **SGD)
    closure = closure_for(model, rank, size)
    optimizer.step(closure)
    optimizer.param_groups[0]["rho"] = 0.1 + rank
    found.append(message_of(optimizer.step, closure))
    optimizer.param_groups[0]["rho"] = 0.1
    optimizer.step(closure)
    optimizer.stop = 7 + rank
    found.append(message_of(optimizer.step, closure))
    return found, are_equal_everywhere(list(model.parameters()))


def test_changes_that_differ():
    for found, same in processes.run(2, disagreeing_changes):
        assert found[0].endswith("rho of group 0 is 0.1 on rank 0 and 1.1 on rank 1")
        assert found[1].endswith("stop is 7 on rank 0 and 8 on rank 1")
        assert same


def lone_change(rank, size):
    """Rank 1 alone changes something; rank 0 waits for it in its closure."""
    model = wrapped(small_network())
    optimizer = fastsam.SAM(model.parameters(), **SGD)
    closure = closure_for(model, rank, size)
    optimizer.step(closure)
    start = [p.detach().clone() for p in model.parameters()]
    if rank == 0:
        optimizer.step(closure)
        return None
    optimizer.perturb_every = 2
    with quick(0.1, 0.3) as seen:
        said = message_of(optimizer.step, closure)
        assert message_of(optimizer.step, closure) == said  # again
        del seen[1:]
    same = all(map(torch.equal, start, model.parameters()))
    closure(), closure()  # for rank 0
    return said, [str(one.message) for one in seen], same


def test_change_of_one_rank():
    change = "perturb_every is 2 on rank 1 and was 1 when the ranks last agreed"
    said, seen, same = processes.run(2, lone_change)[1]
    assert said == f"ranks [0] have not made a change of rank 1: {change}"
    assert seen == [f"waiting for ranks [0], which have not come with the change: {change}"]
    assert same


class LostOnCleaning:
    """A store that is gone as soon as something is to be removed: its host has ended."""

    def __init__(self, store):
        self._store = store

    def __getattr__(self, name):
        return getattr(self._store, name)

    def delete_key(self, key):
        raise dist.DistNetworkError("the host of the store has closed the connection")


def parting(rank, size):
    """Rank 1 is slow to take a verdict, in the second round of a store that fails after it."""
    said, gone = [], []
    model = wrapped(small_network())
    closure = closure_for(model, rank, size)
    for is_lost in (False, True):
        optimizer = fastsam.SAM(model.parameters(), **SGD)
        optimizer.step(closure)
        meeting = optimizer._agreement._meeting
        wait = meeting._wait

        def slowly(number, seconds, wait=wait):
            found = wait(number, seconds)
            time.sleep(0.5)
            return found

        if rank == 1:
            meeting._wait = slowly
            if is_lost:
                meeting._store = LostOnCleaning(meeting._store)
        optimizer.stop = 7 + rank
        parting = 0.0 if is_lost else processes.TIMEOUT
        with mock.patch.object(meetings, "PARTING", parting), quick(60.0, None) as seen:
            said.append(message_of(optimizer.first_step))
        gone.append(rank == 1 or not meeting._store.check(["1/verdict"]))
        said += [str(one.message) for one in seen]
        dist.barrier()
    return said, gone[0]


def test_every_rank_has_the_verdict_before_one_ends():
    """A rank that raises waits for the others; one that has read it raises without the store."""
    for said, gone in processes.run(2, parting):
        assert [one.rpartition("; ")[2].rpartition("same: ")[2] for one in said] == [
            "stop is 7 on rank 0 and 8 on rank 1"
        ] * 2
        assert gone


def test_a_rank_does_not_wait_for_good():
    """For one that does not take the verdict: it has gone on or has ended."""
    with mock.patch.object(dist, "get_rank", return_value=0):
        meeting = meetings.Meeting(dist.HashStore(), [0, 1], "key")
    meeting._store.set("0/verdict", "!they differ")
    with mock.patch.object(meetings, "PARTING", 0.05):
        assert meeting._take(0) == "they differ"
    assert meeting._store.check(["0/verdict"])  # for the other


# --- what is compared -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_every_attribute_is_one_that_some_optimizer_has(name):
    classes = (
        fastsam.SAM, fastsam.UnifiedSAM, fastsam.SAMAR, fastsam.PreconditionedSAM, fastsam.TraceSAM,
        fastsam.ASAM,
    )  # fmt: skip
    params = list(small_network().parameters())
    made = [cls(params, **SGD) for cls in classes] + [fastsam.LightSAM(params, lr=0.1, rho=0.1)]
    assert any(hasattr(optimizer, name) for optimizer in made)


# --- who is compared ------------------------------------------------------------------------------


def independent(rank, size):
    """Models of single ranks, and a DDP model that one rank goes on with: nobody waits for good."""
    own = small_network()
    optimizer = fastsam.SAM(own.parameters(), **SGD, rho=0.1 + rank)
    for _ in range(2 + rank):
        optimizer.step(closure_for(own, rank, size))
    compared = optimizer._agreement.needed
    model = wrapped(small_network())
    said = []
    with quick(0.1, 0.0) as seen:
        if rank == 0:
            optimizer = fastsam.SAM(model.parameters(), **SGD)
            for i in range(3):
                optimizer.stop = 5 + i
                optimizer.step(closure_for(model.module, rank, size))
            del optimizer
    dist.barrier()
    # the model's next optimizers are each other's again
    for stop in (7, 8 + rank):
        optimizer = fastsam.SAM(model.parameters(), **SGD, stop=stop)
        said.append(message_of(optimizer.step, closure_for(model, rank, size)))
    return compared, [str(one.message) for one in seen], said


def test_ranks_with_models_of_their_own():
    for rank, (compared, seen, said) in enumerate(processes.run(2, independent)):
        assert not compared
        assert len(seen) == (rank == 0)
        assert all("ranks [1] have not come to a first step of this SAM" in one for one in seen)
        assert said[0] == "" and said[1].endswith("stop is 8 on rank 0 and 9 on rank 1")


def late(rank, size):
    """Rank 1 begins when rank 0 waits no longer, and its first step differs."""
    model = wrapped(small_network())
    optimizer = fastsam.SAM(model.parameters(), **SGD, start=rank)
    closure = closure_for(model.module, rank, size)
    with quick(0.05, 0.0) as seen:
        for turn in (0, 1, 0):
            if rank == turn:
                optimizer.step(closure)
            dist.barrier()
    optimizer.start = 3
    optimizer.stop = 9 + rank
    said = message_of(optimizer.step, closure)
    return [str(one.message) for one in seen], said


def test_late_ranks():
    """A warning: it may have been another optimizer. From then on they are compared."""
    zero, one = processes.run(2, late)
    what = "start is 0 on rank 0 and 1 on rank 1"
    assert len(zero[0]) == 2 and "which goes on" in zero[0][0] and zero[0][1].endswith(what)
    assert len(one[0]) == 1 and one[0][0].endswith(what)
    assert zero[1] == one[1]  # rank 0 has come twice
    assert one[1].endswith(
        "same: steps is 2 on rank 0 and 1 on rank 1; stop is 9 on rank 0 and 10 on rank 1"
    )


def uneven(rank, size):
    """Rank 0 has more batches than rank 1, and a schedule."""
    model = wrapped(small_network())
    optimizer = fastsam.SAM(model.parameters(), **SGD)
    closure = closure_for(model, rank, size)
    optimizer.step(closure)
    with quick(0.1, 0.1) as seen, model.join():
        for i in range(3 - rank):
            optimizer.param_groups[0]["lr"] = 0.1 / (i + 2)
            optimizer.step(closure)
    return [str(one.message) for one in seen], are_equal_everywhere(list(model.parameters()))


def test_ranks_that_end_early():
    for seen, same in processes.run(2, uneven):
        assert not [one for one in seen if "rank" in one]
        assert same  # join hands out the weights of a rank that went on to the end


def by_function(rank, size):
    """Models that only the training loop connects."""
    model = small_network()
    optimizer = fastsam.SAM(model.parameters(), **SGD, rho=0.1)
    fastsam.compare_ranks(optimizer)
    optimizer.max_grad_norm = 1 + rank
    lets = fastsam.LETS(fastsam.SAM(model.parameters(), **SGD), interval=1 + rank)
    return message_of(fastsam.compare_ranks, optimizer), message_of(fastsam.compare_ranks, lets)


def test_compare_ranks():
    for sam, lets in processes.run(2, by_function):
        assert sam.endswith("same: max_grad_norm is 1 on rank 0 and 2 on rank 1")
        assert lets.endswith("same: interval is 1 on rank 0 and 2 on rank 1")


def test_one_process_has_nothing_to_compare():
    model = small_network()
    optimizer = fastsam.SAM(model.parameters(), **SGD)
    fastsam.compare_ranks(optimizer)
    with pytest.raises(TypeError, match="optimizer must be one of fastsam's, got Adam"):
        fastsam.compare_ranks(torch.optim.Adam(model.parameters()))
    optimizer.step(closure_for(model, 0, 1))
    assert not optimizer._agreement.needed


# --- closures that raise --------------------------------------------------------------------------


def raising(rank, size):
    """Rank 1's closure raises in its second call, when the others wait for it."""
    model = wrapped(small_network())
    optimizer = fastsam.SAM(model.parameters(), **SGD)
    inner = closure_for(model, rank, size)
    optimizer.step(inner)
    before = [p.detach().clone() for p in model.parameters()]
    calls = []

    def closure():
        calls.append(None)
        if len(calls) == 2:
            assert not all(map(torch.equal, before, model.parameters()))
            raise ValueError("bad batch")
        return inner()

    if rank == 0:
        optimizer.step(inner)
        return None
    with contextlib.suppress(ValueError):
        optimizer.step(closure)
    restored = all(map(torch.equal, before, model.parameters()))
    inner()  # for rank 0
    return restored, optimizer.kept["t"]


def test_a_rank_whose_closure_raises_has_its_weights_again():
    assert processes.run(2, raising)[1] == (True, 2)


def noted(rank, size):
    """A closure fails while the other rank waits with a change."""
    model = wrapped(small_network())
    optimizer = fastsam.SAM(model.parameters(), **SGD)
    closure = closure_for(model, rank, size)
    optimizer.step(closure)

    def broken():
        dist.barrier()
        raise ConnectionError("closed by peer")

    with quick(0.1, 0.2) as seen:
        if rank == 1:
            optimizer.renormalize = True
            with contextlib.suppress(RuntimeError):
                optimizer.step(closure)
            dist.barrier()
            return ""
        try:
            optimizer.step(broken)
        except ConnectionError as error:
            notes = getattr(error, "__notes__", [])
    return " ".join([*notes, *(str(one.message) for one in seen)])


def test_an_error_of_the_closure_names_what_others_have():
    said = processes.run(2, noted)[0]
    assert said.endswith("renormalize is True on rank 1 and False on rank 0")
