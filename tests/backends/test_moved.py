"""``scratch=True`` on the triton backend: between the passes parameters point at scratch memory.

Every step is compared, bit for bit, with that of an optimizer that perturbs the weights where they
are: the same kernels compute the same numbers.
"""

import pytest
import torch

import fastsam
from fastsam.backends.triton.scratch import has_graphs
from fastsam.kernels import table

from large import copies, gradients, halves, same, step
from registry import DEVICE, METHODS, create

SGD = {"base_optimizer": torch.optim.SGD, "lr": 0.1, "momentum": 0.9, "backend": "triton"}
SHAPES = (40, (5, 7), 1, 0, 17)


def parameters(*shapes, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.nn.Parameter(torch.randn(s, generator=generator).to(DEVICE, dtype))
        for s in shapes or SHAPES
    ]


def pair(make, *shapes, **kwargs):
    """Equal parameters and optimizers, of which the first moves."""
    found = []
    for scratch in (True, False):
        params = parameters(*shapes, **kwargs)
        found.append((params, make(params, scratch)))
    return found


def sam(params, scratch, **kwargs):
    return fastsam.SAM(params, **SGD | kwargs, scratch=scratch)


def places(params):
    return [p.data_ptr() for p in params]


def moved(params, homes):
    return [p.data_ptr() != home for p, home in zip(params, homes, strict=True)]


def check_halves(runs, expected=None, check=lambda number: None):
    """Both run a step, and have the same weights after each half.

    ``expected`` says which parameters are elsewhere between the halves.
    """
    (params, optimizer), (others, twin) = runs
    homes = places(params)
    for number, _ in enumerate(zip(halves(optimizer, params), halves(twin, others), strict=True)):
        assert same(copies(params), copies(others))
        if expected is not None:
            assert moved(params, homes) == (expected if number == 0 else [False] * len(params))
        check(number)


@pytest.mark.parametrize("method", METHODS)
def test_steps_are_those_in_place(method):
    runs = pair(lambda params, scratch: create(method, params, "triton", scratch=scratch))
    optimizer = runs[0][1]
    # renormalize takes ASAM's scale at w + e, when the weights are needed as well
    stays = optimizer.renormalize and optimizer.param_groups[0]["adaptive"]
    expected = [not stays and p.numel() > 0 for p in runs[0][0]]
    away = set()
    for _ in range(3):
        before = copies(runs[0][0])

        def check(number, before=before):
            if number == 0:
                pairs = dict(runs[0][1]._flight.backup.pairs())
                assert same(
                    [pairs[p] for p in runs[0][0] if p in pairs],
                    [x for p, x in zip(runs[0][0], before, strict=True) if p in pairs],
                )
                away.add(tuple(places(runs[0][0])))

        check_halves(runs, expected, check)
    assert len(away) == 1  # one memory for all steps
    for x, y in zip(runs[0][1].state.values(), runs[1][1].state.values(), strict=True):
        assert all(torch.equal(x[k], y[k]) for k in y)


@pytest.mark.parametrize("kwargs", [
    {"ascent_steps": 3}, {"norm": "layer"}, {"norm": "group"}, {"perturb_every": 2},
    {"skip_nonfinite": True, "max_grad_norm": 0.1},
], ids=str)  # fmt: skip
def test_settings(kwargs):
    runs = pair(lambda params, scratch: sam(params, scratch, **kwargs), 40, (5, 7), 17)
    homes = places(runs[0][0])
    for _ in range(4):
        for params, optimizer in runs:
            optimizer.step(lambda params=params: gradients(params))
        assert same(copies(runs[0][0]), copies(runs[1][0])) and places(runs[0][0]) == homes


def test_steps_of_the_base_in_between_find_their_tables_again():
    (params, optimizer), _ = pair(sam, 40, 17)
    for _ in range(2):
        step(optimizer, params)
        gradients(params)
        optimizer.plain_step()
    layouts = {id(x) for x in optimizer._passes.collector.layouts()}
    plans = {id(plan) for x in optimizer._passes.collector.layouts() for plan in x.plans.values()}
    step(optimizer, params)
    gradients(params)
    optimizer.plain_step()
    assert {id(x) for x in optimizer._passes.collector.layouts()} == layouts
    assert {id(plan) for x in optimizer._passes.collector.layouts()
            for plan in x.plans.values()} == plans  # fmt: skip


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.filterwarnings("ignore:some parameters are float16 or bfloat16")
def test_sixteen_bits_and_mixed_dtypes(rounding):
    def make(params, scratch):
        return sam(params, scratch, rounding=rounding)

    runs = pair(make, 40, (5, 7), dtype=torch.bfloat16)
    for (params, optimizer), extra in zip(runs, (parameters(33), parameters(33)), strict=True):
        optimizer.add_param_group({"params": extra, "rho": 0.2})
        params += extra
    for _ in range(2):
        check_halves(runs, [True] * 3)


# --- where parameters stay ---------------------------------------------------------------------


def test_by_default_they_stay():
    """Without a word, and where False is said; and both may be said at any time."""
    params = parameters()
    homes, optimizer = places(params), fastsam.SAM(params, **SGD)
    assert optimizer.scratch == "auto"
    for scratch, moves in (("auto", False), (True, True), (False, False), (True, True)):
        optimizer.scratch = scratch
        gradients(params)
        optimizer.first_step()
        assert any(moved(params, homes)) is moves
        assert bool(optimizer._passes.backends._made["triton"]._moving.memory) is moves
        optimizer.second_step()
        assert places(params) == homes


def test_in_one_bucket_some_move_and_some_are_seen_by_others():
    def make(params, scratch):
        flat = torch.cat([params[0].data, params[0].data])
        params.append(torch.nn.Parameter(flat[:40]))  # a part of something larger
        return sam(params, scratch)

    runs = pair(make, 40, (8, 9), 33)
    params = runs[0][0]
    check_halves(runs, [True, True, True, False])
    view = params[0].detach()  # taken between two steps
    check_halves(runs, [False, True, True, False])
    assert torch.equal(view, params[0].detach())
    del view
    check_halves(runs, [True, True, True, False])


def test_another_shape_of_the_same_memory_between_the_steps():
    runs = pair(lambda params, scratch: sam(params, scratch, momentum=0.0), (5, 8), 17)
    for shape in ((5, 8), (8, 5), (40,)):
        for params, _ in runs:
            params[0].grad = None
            params[0].data = params[0].data.view(shape)
        for _ in range(2):
            check_halves(runs, [True, True])
            assert all(params[0].shape == shape for params, _ in runs)


@pytest.mark.parametrize("method", ["sam", "vasso"])
def test_which_parameters_move_may_change_in_every_step(method):
    """Also where state of the ascent takes turns between two memories, and plans with it."""
    runs = pair(lambda params, scratch: create(method, params, "triton", scratch=scratch), 40, 33)
    params, views = runs[0][0], []
    for seen in (0, 0, 1, 0, 2, 3, 1, 1, 0, 0):
        views[:] = [p.detach() for k, p in enumerate(params) if seen >> k & 1]
        check_halves(runs, [not seen >> k & 1 for k in range(2)])


@pytest.mark.parametrize("case", ["unfused", "masters", "gaps", "subclass"])
@pytest.mark.filterwarnings("ignore:some parameters are float16 or bfloat16")
def test_what_cannot_move_stays(case):
    dtype = torch.bfloat16 if case == "masters" else torch.float32
    more = {"unfused": {"base_optimizer": torch.optim.RMSprop, "momentum": 0.0},
            "masters": {"master_weights": True}}.get(case, {})  # fmt: skip

    def make(params, scratch):
        if case == "gaps":
            params[0].data = torch.stack([params[0].data] * 2, 1)[:, 0]
        if case == "subclass":
            params[0] = type("Tagged", (torch.nn.Parameter,), {})(params[0].data)
        return sam(params, scratch, **more)

    runs = pair(make, 40, dtype=dtype)
    for _ in range(2):
        check_halves(runs, [False])


def test_lets():
    runs = pair(lambda params, scratch: fastsam.LETS(
        sam(params, scratch), hessian="diag", rho_optimizer=torch.optim.SGD
    ), 40, 17)  # fmt: skip
    for _ in range(3):
        for params, optimizer in runs:
            optimizer.step(*[lambda params=params: gradients(params) or 0.0] * 2)
        assert same(copies(runs[0][0]), copies(runs[1][0]))
        radii = [[float(group["rho"]) for group in optimizer.param_groups] for _, optimizer in runs]
        assert radii[0] == radii[1]


def test_gradients_that_are_missing():
    """In the first pass: not moved; in the second: restored and nothing else."""
    runs = pair(sam, 40, 33, 17)
    for without in ((0, None), (None, 0), (None, None), (1, 2)):
        homes = places(runs[0][0])
        for number in range(2):
            for params, optimizer in runs:
                gradients(params)
                if without[number] is not None:
                    params[without[number]].grad = None
                (optimizer.first_step, optimizer.second_step)[number]()
            assert same(copies(runs[0][0]), copies(runs[1][0]))
        assert places(runs[0][0]) == homes


# --- between the passes ------------------------------------------------------------------------


def test_restored_bit_for_bit():
    (params, optimizer), _ = pair(sam, 40, (5, 7))
    step(optimizer, params)
    homes, before = places(params), copies(params)
    gradients(params)
    optimizer.first_step()
    with optimizer.unperturbed():
        assert same(params, before)
    assert moved(params, homes) == [True, True] and not same(params, before)
    optimizer.restore()
    optimizer.restore()
    assert same(params, before) and places(params) == homes
    gradients(params)
    optimizer.first_step()
    with optimizer.unperturbed():
        optimizer.restore()
    assert same(params, before) and places(params) == homes
    for call in (1, 2):
        for error in (ValueError, KeyboardInterrupt):
            calls = []

            def closure(calls=calls, call=call, error=error):
                calls.append(any(moved(params, homes)))
                gradients(params)
                if len(calls) == call:
                    raise error

            with pytest.raises(error):
                optimizer.step(closure)
            assert calls == [False, True][:call]
            assert same(params, before) and places(params) == homes


@pytest.mark.parametrize("which", ["perturb_kernel", "update_kernel", "allocation"])
def test_a_failure_of_the_backend(which, monkeypatch):
    (params, optimizer), _ = pair(sam, 40, (5, 7))
    step(optimizer, params)
    extra = parameters(9, dtype=torch.float64)  # a second launch, which fails
    optimizer.add_param_group({"params": extra})
    homes, before = places(params), copies(params)
    backend = optimizer._passes.backends._made["triton"]
    prepare = type(backend)._prepare

    def failing(self, kernel, bucket, *args, **kwargs):
        launched = prepare(self, kernel, bucket, *args, **kwargs)
        if kernel.__name__ == which and bucket.types["P"].name == "fp64":

            def run(origin):
                raise MemoryError

            launched.run = run
        if which == "allocation" and kernel.__name__ == "update_kernel":
            raise MemoryError
        return launched

    monkeypatch.setattr(type(backend), "_prepare", failing)
    with pytest.raises(MemoryError):
        for half in (optimizer.first_step, optimizer.second_step):
            gradients([*params, *extra])
            half()
    assert places(params) == homes
    if which != "update_kernel":  # which has updated the others
        assert same(params, before)
    monkeypatch.undo()
    gradients([*params, *extra])
    optimizer.first_step()
    assert all(moved(params, homes))
    gradients([*params, *extra])
    optimizer.second_step()
    assert places(params) == homes


def state_dict(param):
    module = torch.nn.Module()
    module.register_parameter("w", param)
    return module.state_dict()["w"].view(-1)


#: To a parameter between the passes.
DONE = {
    "view": lambda p: p.detach().view(-1), "state_dict": state_dict,
    "another tensor": lambda p: setattr(p, "data", p.data.clone()),
    "another shape": lambda p: setattr(p, "data", p.data.view(8, 5)),
}  # fmt: skip


@pytest.mark.parametrize("kind", DONE)
def test_what_others_do_between_the_passes(kind):
    """A view goes on following its parameter; a parameter stays where it has been pointed."""
    runs = pair(lambda params, scratch: sam(params, scratch, momentum=0.0), (5, 8), 17)
    views = []
    for _ in range(2):
        check_halves(runs)
    for number in range(2):
        for params, optimizer in runs:
            gradients(params)
            (optimizer.first_step, optimizer.second_step)[number]()
            if number == 0:
                views.append(DONE[kind](params[0]))
        assert same(copies(runs[0][0]), copies(runs[1][0]))
    for _ in range(2):
        check_halves(runs)
    for view, (params, _) in zip(views, runs, strict=True):
        if view is not None:
            assert torch.equal(view, params[0].detach().view(-1))
    views.clear()
    del view
    runs[0][0][0].data = runs[0][0][0].data.clone()  # memory of its own again
    check_halves(runs, [True, True])


def test_two_optimizers_take_turns():
    def make(params, scratch):
        return sam(params, scratch), sam(params, scratch, momentum=0.0)

    (params, both), (others, twins) = pair(make, 40, 17)
    for optimizer, twin in zip(both * 2, twins * 2, strict=True):
        check_halves([(params, optimizer), (others, twin)], [True, True])


# --- CUDA graphs -------------------------------------------------------------------------------


def test_a_capture_by_hand_is_refused(monkeypatch):
    (params, optimizer), _ = pair(sam, 40)
    step(optimizer, params)
    before, homes = copies(params), places(params)
    gradients(params)
    with monkeypatch.context() as patch:
        patch.setattr(table, "is_capturing", lambda device: True)
        with pytest.raises(RuntimeError, match="captured in a CUDA graph: scratch=True"):
            optimizer.first_step()
    assert same(params, before) and places(params) == homes
    step(optimizer, params)


@pytest.mark.gpu
def test_graphs_that_hold_addresses_on_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda.graph, "default_capture_stream", None)
    (params, optimizer), (others, twin) = runs = pair(sam, 40, 17)
    step(optimizer, params), step(twin, others)
    check_halves(runs, [True, True])
    gradients(params), gradients(others)
    optimizer.first_step(), twin.first_step()
    away = places(params)
    graph, out = torch.cuda.CUDAGraph(), torch.empty(40, device=DEVICE)
    with torch.cuda.graph(graph):
        out.copy_(params[0].detach())
    assert has_graphs(params[0].device)
    gradients(params), gradients(others)
    optimizer.second_step(), twin.second_step()
    assert places(params) == away  # which the graph goes on reading
    for _ in range(2):
        check_halves(runs, [False, False])
        graph.replay()
        assert torch.equal(out, params[0])
