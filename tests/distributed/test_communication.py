"""What a step sends: the collectives that fastsam starts, and those of the two passes.

They are noted below Python, where torch hands them to a process group, whichever code starts them:
DDP's reducer, FSDP2, DTensor or the optimizer. Small networks send as often as large ones.
"""

import pytest
import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastsam

import processes
from processes import data, network
from registry import METHODS
from shards import INTERPRETED, closure_of, made, sharded, wrapped
from test_tensor_parallel import network as parallel_network
from test_tensor_parallel import parallel, share

#: Bytes of one number: networks, and with them their norms, are in float64.
NUMBER = 8

#: How models lie on processes: how many of these; how many numbers each of a norm's all-reduces
#: has, of which there is one for each mesh dimension; and how many the gradients have that come as
#: partial sums, which the optimizer is to add up.
LAYOUTS = {
    "ddp": (2, [], ()),
    "no_sync": (2, [], ()),
    "fsdp": (2, [1], ()),
    "hsdp": (4, [1], ()),  # two replicas of two shards: the replicas' dimension is not summed over
    "hsdp by replica": (4, [1], ()),
    "tensor": (2, [1], (6, 6)),  # of a normalisation whose samples are divided
    "tensor and fsdp": (4, [2, 1], ()),  # some are sharded along both dimensions, some along one
}
OWN = [name for name in LAYOUTS if name in ("no_sync", "hsdp by replica")]

CLIP, SKIP = {"max_grad_norm": 0.5}, {"skip_nonfinite": True}
#: The method, its further arguments, and how many norms and products it needs in each half; where
#: some are sent together, how many at a time.
CASES = {
    "sam": ("sam", {}, (1, 0)),
    "sam, clipped": ("sam", CLIP, (1, 1)),
    "sam, skipping": ("sam", SKIP, (1, 1)),
    "sam, both": ("sam", CLIP | SKIP, (1, 1)),  # of the same norm
    "asam": ("asam", {}, (1, 0)),
    "ssam": ("ssam", {}, (1, 1)),
    "ssam, both": ("ssam", CLIP | SKIP, (1, 1)),
    "vasso": ("vasso", {}, (2, 0)),  # the gradient's, which may not be finite, and the average's
    "vasso, clipped": ("vasso", CLIP, (2, 1)),
    # the second gradient's, and together the first one's, their product and the sharpness
    "samar": ("samar", {}, (1, [1, 3])),
    "samar, both": ("samar", CLIP | SKIP, (1, [1, 3])),
    "lightsam-1": ("lightsam-1", {}, (1, 1)),
    "lightsam-3": ("lightsam-3", {}, (0, 0)),
    "lightsam-3, both": ("lightsam-3", CLIP | SKIP, (0, 1)),
}


def cases_of(layout):
    """All of them on two processes; on four, which take longer, some."""
    if layout == "tensor and fsdp":
        return ["sam", "ssam, both", "vasso"]
    several = [case for case in CASES if LAYOUTS[layout][0] == 2 or case in METHODS]
    # samar mixes the first gradients, and is refused where they differ
    return [case for case in several if layout not in OWN or CASES[case][0] != "samar"]


@pytest.fixture(scope="module", autouse=True)
def _end_processes():
    yield
    processes.close()


class Noted(TorchDispatchMode):
    """The collectives inside the block: by what, which, and how many bytes all of it is."""

    def __init__(self) -> None:
        super().__init__()
        self.by = "optimizer"
        self.seen: list[tuple[str, str, int]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # what it consists of comes here again
        name = function._schema.name.split("::")[1].strip("_")
        collective = function.namespace in ("c10d", "_c10d_functional")
        if collective and name not in ("wait_tensor", "wrap_tensor_autograd"):
            tensors = torch.utils._pytree.tree_leaves(args[:2])
            size = max(x.nbytes for x in tensors if isinstance(x, torch.Tensor))
            if name == "all_gather_into_tensor":  # which has the shard and the number of them
                size *= args[1]
            self.seen.append((self.by, name.replace("_", ""), size))
        return function(*args, **(kwargs or {}))


def model_of(layout, size, rank):
    """A model, this rank's data, and what keeps first gradients apart."""
    if layout in ("ddp", "no_sync"):
        model = wrapped(network())
        return model, data(rank, size), model.no_sync
    if layout.startswith("tensor"):
        return parallel(parallel_network(), size), share(rank, size), None
    model = sharded(network(), "sharded" if layout == "fsdp" else "replicated")
    return model, data(rank, size), layout.startswith("hsdp") and fastsam.per_replica(model)


def steps(rank, size, layout, cases, backend):
    """What each case sends in a step, and what one pass of the model alone sends."""
    found = {}
    for case in cases:
        method, kwargs, _ = CASES[case]
        model, batch, context = model_of(layout, size, rank)
        optimizer = made(method, "adamw", model.parameters(), backend, **kwargs)
        optimizer.ascent_context = context if layout in OWN else None
        plain, noted, passes = closure_of(model, batch), Noted(), []

        def closure(plain=plain, noted=noted, passes=passes):
            passes.append(0)
            noted.by = f"pass {len(passes)}"
            loss = plain()
            noted.by = "optimizer"
            return loss

        for _ in range(2):  # DDP arranges its buckets, VaSSO's average begins
            optimizer.step(plain)
        with noted:
            optimizer.step(closure)
        alone = Noted()
        optimizer.zero_grad()
        with alone:
            plain()
        found[case] = noted.seen, [what for _, *what in alone.seen]
    return found


def expected(layout, case):
    """Bytes of each of the optimizer's own collectives."""
    _, each, partial = LAYOUTS[layout]
    method, _, (first, second) = CASES[case]
    agreed = [2] * (layout in OWN and method == "ssam")  # the norm, and whether it is finite
    seconds = [1] * second if isinstance(second, int) else second
    sums = [count * together for together in seconds for count in each]
    numbers = [*partial, *each * first, *agreed, *partial, *sums]
    return [NUMBER * count for count in numbers]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_steps_send_two_passes_and_a_number_for_each_norm(layout):
    """Nothing at all with DDP; else an all-reduce of one number for each norm and dimension."""
    for found in processes.run(LAYOUTS[layout][0], steps, layout, cases_of(layout), "torch"):
        for case, (seen, one_pass) in found.items():
            own = [(kind, size) for by, kind, size in seen if by == "optimizer"]
            assert own == [("allreduce", size) for size in expected(layout, case)], case
            first, second = (
                [what for by, *what in seen if by == which] for which in ("pass 1", "pass 2")
            )
            assert second == one_pass, case
            if layout not in OWN:
                assert first == one_pass, case
            else:  # no gradients are reduced between replicas
                assert first == [what for what in one_pass if what[0] != "allreduce"], case
                assert len(first) < len(second)


def test_sizes():
    """DDP reduces every gradient once in a pass that synchronises, and only there."""
    weights = NUMBER * sum(p.numel() for p in network().parameters())
    for layout, passes in (("ddp", ["pass 1", "pass 2"]), ("no_sync", ["pass 2"])):
        for found in processes.run(2, steps, layout, ["sam"], "torch"):
            seen, _ = found["sam"]
            assert seen == [(by, "allreduce", weights) for by in passes]


@INTERPRETED
@pytest.mark.parametrize(("case", "sums"), [("vasso", 1), ("ssam, both", 2)])
def test_kernels_send_all_sums_of_a_pass_together(case, sums):
    """Five numbers; those that a step does not need are along for nothing."""
    for found in processes.run(2, steps, "fsdp", [case], "triton"):
        seen, one_pass = found[case]
        own = [(kind, size) for by, kind, size in seen if by == "optimizer"]
        assert own == [("allreduce", 5 * NUMBER)] * sums
        assert len(seen) == sums + 2 * len(one_pass)
