"""MSAM's norm of the momentum: what an update leaves for the next step, and where it is not used.

Every perturbation is compared with its equation in float64, on what the optimizer holds then.
"""

import copy
import pickle
from enum import IntEnum

import pytest
import torch
import triton
import triton.language as tl

import fastsam
from fastsam.rules import Ascent

import launches
from registry import DEVICE

SGD = {"base_optimizer": torch.optim.SGD, "lr": 0.1, "momentum": 0.9}
ADAMW = {"base_optimizer": torch.optim.AdamW, "lr": 0.01}
NAMES = ("momentum_buffer", "exp_avg")
KNOWS = ["perturb_kernel", "update_kernel"]
MEASURES = ["reduce_kernel", *KNOWS]
pytestmark = pytest.mark.skipif(
    not triton.knobs.runtime.interpret, reason="counts in Triton's interpreter, not on a GPU"
)


class Loop:
    """MSAM on three tensors in two groups; two of them take the same steps."""

    rho = 0.5

    def __init__(
        self, steps=2, sizes=((1030,), (3, 5), ()), dtypes=(torch.float32,) * 3, seed=0, **kwargs
    ):
        self.random = torch.Generator().manual_seed(seed)
        drawn = map(self.draw, sizes, dtypes)
        self.params = [torch.nn.Parameter(x) for x in drawn]
        kwargs = (
            ({} if "base_optimizer" in kwargs else SGD)
            | {"rho": self.rho, "backend": "triton"}
            | kwargs
        )
        self.optimizer = fastsam.MSAM(self.groups(), **kwargs)
        for _ in range(steps):
            self.step()

    def groups(self):
        return [{"params": self.params[:2]}, {"params": self.params[2:]}]

    def draw(self, shape, dtype=torch.float32):
        return torch.randn(shape, generator=self.random).to(DEVICE, dtype)

    def momentum(self, p):
        state = self.optimizer.state[p]
        return next((state[name] for name in NAMES if name in state), None)

    def step(self, missing=(), grads=None):
        """A step, whose perturbation is checked; the kernels that it launched."""
        perturbed = [p for group in self.optimizer.param_groups for p in group["params"]
                     if group["perturb"] and p.requires_grad]  # fmt: skip
        vs = {p: self.momentum(p) for p in perturbed}
        vs = {p: v.double() for p, v in vs.items() if v is not None}
        norm = torch.cat([v.flatten() for v in vs.values()]).norm() + 1e-12 if vs else 0.0
        exact = [p.detach().double() - (self.rho / norm * vs[p] if p in vs and norm > 0 else 0)
                 for p in self.params]  # fmt: skip
        with launches.record() as log:
            self.optimizer.perturb()
            for p, w in zip(self.params, exact, strict=True):
                tolerance = 2e-6 if p.dtype == torch.float32 else 2e-2
                torch.testing.assert_close(p.double(), w, rtol=tolerance, atol=tolerance)
            for i, p in enumerate(self.params):
                grad = self.draw(p.shape, p.dtype)
                p.grad = None if i in missing or not p.requires_grad else grad
            if grads is not None:
                grads(self)
            self.optimizer.step()
        return log.kernels


def squared_norm_of(loop):
    """Of all that is perturbed, in float64."""
    return sum(loop.momentum(p).double().square().sum() for p in loop.params)


@pytest.mark.parametrize("base", [SGD, ADAMW], ids=["sgd", "adamw"])
def test_known_from_the_second_step_on(base):
    loop = Loop(steps=0, **base)
    assert loop.step() == KNOWS[1:]  # no momentum yet
    assert [loop.step() for _ in range(3)] == [KNOWS] * 3
    squared = float(squared_norm_of(loop))
    saved = loop.optimizer.state_dict()["param_groups"][0]["fastsam_momentum_squared_norm"]
    assert float(saved) == pytest.approx(squared, rel=1e-6)
    loop.optimizer.perturb()
    assert float(loop.optimizer.metrics["momentum_norm"]) == float(saved) ** 0.5  # bit for bit


def first_state(loop):
    """Of the first parameter, and the name of its momentum."""
    state = loop.optimizer.state[loop.params[0]]
    return state, next(name for name in NAMES if name in state)


def replace(loop):
    state, name = first_state(loop)
    state[name] = 3 * state[name]


def write(loop):
    loop.momentum(loop.params[1]).mul_(5.0)


def write_through_a_view(loop):
    loop.momentum(loop.params[0])[3:900].zero_()


def move(loop):
    """Past torch's count."""
    v = loop.momentum(loop.params[0])
    v.data = 2 * v.data


def remove(loop):
    state, name = first_state(loop)
    del state[name]


def load(loop):
    """The state dict's tensors are the optimizer's own, and go on to be written to."""
    saved = loop.optimizer.state_dict()
    loop.step()
    loop.optimizer.load_state_dict(saved)


def load_into_the_base(loop):
    saved = copy.deepcopy(loop.optimizer.base_optimizer.state_dict())
    for state in saved["state"].values():
        state["momentum_buffer"].mul_(2.0)
    loop.optimizer.base_optimizer.load_state_dict(saved)


def load_what_lacks_the_number(loop):
    saved = copy.deepcopy(loop.optimizer.state_dict())
    for group in saved["param_groups"]:
        del group["fastsam_momentum_squared_norm"]
    loop.optimizer.load_state_dict(saved)


def freeze(loop):
    loop.params[0].requires_grad_(False)


def leave_out_of_the_perturbation(loop):
    loop.optimizer.param_groups[1]["perturb"] = False


def leave_one_without_gradient(loop):
    """Its momentum stays, and is not among what the update has written."""
    loop.step(missing=(1,))


def copy_it(loop):
    loop.params, loop.optimizer = copy.deepcopy((loop.params, loop.optimizer))


def pickle_it(loop):
    loop.params, loop.optimizer = pickle.loads(pickle.dumps((loop.params, loop.optimizer)))


def take_over(loop):
    base = torch.optim.SGD(loop.groups(), lr=0.1, momentum=0.9)
    base.load_state_dict(loop.optimizer.base_optimizer.state_dict())
    loop.optimizer = fastsam.MSAM.from_optimizer(base, rho=loop.rho, backend="triton")


def step_the_base(loop):
    """torch does not count the writes of its fused optimizers."""
    loop.optimizer.base_optimizer.step()


def step_a_copy(loop):
    """The copy has the same momenta, and kernels that write to them: torch does not count that."""
    other = copy.copy(loop.optimizer)
    assert other.state[loop.params[0]] is loop.optimizer.state[loop.params[0]]
    step_with(loop, other)


def step_one_that_has_loaded_the_state(loop):
    """Of another method; what it has loaded are the same tensors."""
    other = fastsam.SAM(loop.params[1:], torch.optim.SGD, lr=0.1, momentum=0.9, backend="triton")
    for p in loop.params[1:]:
        other.state[p] = dict(loop.optimizer.state[p])
    step_with(loop, other)


def step_with(loop, other):
    other.first_step()
    for p in loop.params:
        p.grad = 100 * loop.draw(p.shape, p.dtype)
    other.second_step()


def change_backends(loop):
    loop.optimizer.backend = "torch"
    loop.step()
    loop.optimizer.backend = "triton"


CHANGES = [replace, write, write_through_a_view, move, remove, load, load_into_the_base,
           load_what_lacks_the_number, freeze, leave_out_of_the_perturbation,
           leave_one_without_gradient, copy_it, pickle_it, take_over, change_backends,
           step_the_base, step_a_copy, step_one_that_has_loaded_the_state]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_measured_where_it_may_be_another(change):
    loop = Loop()
    assert loop.step() == KNOWS
    change(loop)
    assert [loop.step(), loop.step()] == [MEASURES, KNOWS]


@pytest.mark.parametrize("base", [SGD, ADAMW], ids=["sgd", "adamw"])
def test_measured_after_a_step_of_a_fused_base(base):
    loop = Loop(**base, fused=True)
    assert loop.step() == KNOWS
    for p in loop.params:
        p.grad = 100 * loop.draw(p.shape)
    loop.optimizer.base_optimizer.step()
    assert [loop.step(), loop.step()] == [MEASURES, KNOWS]


def test_two_optimizers_of_other_parameters_do_not_disturb_each_other():
    loops = Loop(), Loop()
    assert [[loop.step() for loop in loops] for _ in range(2)] == [[KNOWS] * 2] * 2


class Columns(IntEnum):
    """Of a rule of the user's, with as many as there may be."""

    AHEAD = 0
    POWER = 1
    GAIN = 2


AHEAD, GAIN = tl.constexpr(0), tl.constexpr(2)


@triton.jit
def direction(g, state, h):
    return tl.load(h + AHEAD) * tl.load(h + GAIN) * g


@triton.jit
def radius(rho, norm, total, h):
    return rho / norm


def test_a_rule_of_three_columns():
    """Along the momentum, times a gain; ``rho`` is 0.5."""
    rule = Ascent(
        name="gained", kernel=__name__, momentum="momentum_buffer",
        direction=lambda g, state, h: h["AHEAD"] * h["GAIN"] * g,
        radius=lambda rho, norm, total, h: rho / norm,
        columns=lambda group, lam: {"AHEAD": -1.0, "POWER": 1.0, "GAIN": 0.25},
    )  # fmt: skip

    class Gained(fastsam.MSAM):
        @staticmethod
        def _rule_of(base_optimizer):
            return rule

    for backend in ("torch", "triton"):
        loop = Loop(steps=0)
        optimizer = Gained(loop.params, **SGD, rho=0.5, backend=backend)
        for step in range(4):
            before = torch.cat([p.detach().flatten() for p in loop.params])
            with launches.record() as log:
                optimizer.perturb()
            after = torch.cat([p.detach().flatten() for p in loop.params])
            if step:
                assert float((after - before).norm()) == pytest.approx(0.25 * 0.5, rel=1e-5)
            if step > 1 and backend == "triton":
                assert log.kernels == KNOWS[:1]
            for p in loop.params:
                p.grad = loop.draw(p.shape)
            optimizer.step()


def add_a_group(loop):
    """It has no momentum yet, and takes part from the next step on."""
    loop.params.append(torch.nn.Parameter(loop.draw((4,))))
    loop.optimizer.add_param_group({"params": loop.params[-1:]})


def fail(loop):
    def closure():
        raise KeyError("data")

    with pytest.raises(KeyError, match="data"):
        loop.optimizer.step(closure)


def restore(loop):
    loop.optimizer.perturb()
    loop.optimizer.restore()


def turn(loop):
    loop.optimizer.param_groups[0]["maximize"] = True


def schedule(loop):
    loop.optimizer.param_groups[0]["momentum"] = 0.5
    loop.optimizer.param_groups[1]["lr"] = 0.01


def skip(loop):
    """The device rejects a step, of which the host does not know: the momentum is as it was."""
    loop.optimizer.skip_nonfinite = True

    def spoil(loop):
        loop.params[0].grad[7] = float("inf")

    before = loop.momentum(loop.params[0]).clone()
    loop.step(grads=spoil)
    assert torch.equal(loop.momentum(loop.params[0]), before)
    loop.optimizer.skip_nonfinite = False


NO_CHANGES = [add_a_group, fail, restore, turn, schedule, skip]


@pytest.mark.parametrize("change", NO_CHANGES)
def test_known_where_it_is_not(change):
    loop = Loop()
    change(loop)
    assert [loop.step(), loop.step()] == [KNOWS, KNOWS]


def test_begins_anew_without_a_momentum():
    loop = Loop()
    loop.optimizer.state.clear()
    assert [loop.step() for _ in range(3)] == [KNOWS[1:], KNOWS, KNOWS]


def test_steps_of_the_base_alone_leave_no_norm():
    """Nor does a step before one that the schedule has: it would be left in vain."""
    loop = Loop()
    with launches.record() as log:
        loop.optimizer.plain_step()
    assert log.kernels == KNOWS[1:] and log.launches[0].variant["SQUARES"] is None
    assert [loop.step() for _ in range(3)] == [MEASURES, KNOWS, KNOWS]
    optimizer = fastsam.MSAM(loop.params, **SGD, perturb_every=2, backend="triton")
    for i in range(6):
        with launches.record() as log:
            optimizer.perturb()
            optimizer.step()
        assert log.kernels == (MEASURES[i % 2 * 2 :] if i else KNOWS[1:])
        assert log.launches[-1].variant["SQUARES"] is None
        assert i <= 2 or not log.copied  # nothing is cleared


def take_a_plain_step(loop):
    loop.optimizer.plain_step()


def capture_a_step(loop):
    with pytest.MonkeyPatch.context() as capture:
        capture.setattr("fastsam.step.left.is_captured", lambda batch: True)
        loop.step()


SINGLE, DOUBLE = torch.float32, torch.float64
#: Where the sum in the bins has other bits than that of a reduction, whatever the dtypes.
LARGE = {"sizes": ((9001,), (3000,)), "seed": 1, **ADAMW}
#: What is done before the state is saved, and the kernels of two steps that are resumed after it.
RESUMED = {
    "after a step": (lambda loop: None, [MEASURES, KNOWS]),
    "after a step of the base alone": (take_a_plain_step, [MEASURES, KNOWS]),
    "after a capture": (capture_a_step, [MEASURES, MEASURES]),
}


@pytest.mark.parametrize("when", RESUMED)
@pytest.mark.parametrize("dtypes", [(SINGLE, SINGLE), (SINGLE, DOUBLE)])
def test_goes_on_bit_for_bit(when, dtypes):
    """The one that is resumed measures what the other knows, and takes the other's number."""
    before, expected = RESUMED[when]
    loop = Loop(**LARGE, dtypes=dtypes)
    before(loop)
    saved = copy.deepcopy(loop.optimizer.state_dict())
    other = twin(loop)
    other.optimizer = fastsam.MSAM(other.groups(), **ADAMW, rho=loop.rho, backend="triton")
    other.optimizer.load_state_dict(saved)
    assert go_on(loop, other) == expected


@pytest.mark.parametrize("dtypes", [(DOUBLE, DOUBLE), (DOUBLE, SINGLE)])
def test_a_pickle_goes_on_bit_for_bit(dtypes):
    loop = Loop(**LARGE, dtypes=dtypes)
    other = twin(loop)
    other.optimizer = loop.optimizer
    other.params = loop.params
    pickle_it(other)
    assert go_on(loop, other) == [MEASURES, KNOWS]


def twin(loop):
    """One that draws the same numbers and has the same weights."""
    other = copy.copy(loop)
    other.random = torch.Generator()
    other.random.set_state(loop.random.get_state())
    other.params = [torch.nn.Parameter(p.detach().clone()) for p in loop.params]
    return other


def go_on(loop, other):
    """The norms of both are the same in two steps, and their weights; the kernels of the other."""
    found = []
    for _ in range(2):
        loop.step()
        found.append(list(dict.fromkeys(other.step())))
        norm, same = (float(one.optimizer.metrics["momentum_norm"]) for one in (loop, other))
        assert norm == same
        for p, q in zip(loop.params, other.params, strict=True):
            assert torch.equal(p, q)
    return found


@pytest.mark.parametrize("number", [0.0, -1.0, 1e30])
def test_a_number_that_is_not_that_of_the_momentum_is_not_used(number):
    loop = Loop()
    saved = loop.optimizer.state_dict()
    for group in saved["param_groups"]:
        group["fastsam_momentum_squared_norm"] = number
    loop.optimizer.load_state_dict(saved)
    assert loop.step() == MEASURES


@pytest.mark.parametrize("kwargs", [{"adaptive": True, "eta": 1.0}, {"norm": "layer"}])
def test_norms_of_other_things_are_measured(kwargs):
    loop = Loop(steps=0)
    optimizer = fastsam.MSAM(loop.params, **SGD | kwargs, backend="triton")
    for i in range(3):
        with launches.record() as log:
            optimizer.perturb()
            for p in loop.params:
                p.grad = loop.draw(p.shape)
            optimizer.step()
        assert ("reduce_kernel" in log.kernels) == (i > 0)


@pytest.mark.filterwarnings("ignore:some parameters are float16 or bfloat16")
@pytest.mark.parametrize("more", [{}, {"master_weights": True}, {"rounding": "stochastic"}])
def test_several_dtypes(more):
    """One launch each: the first begins the sum, and the others add to it."""
    loop = Loop(steps=0)
    loop.params[1].data = loop.params[1].data.bfloat16()
    loop.optimizer = fastsam.MSAM(loop.groups(), **SGD, rho=loop.rho, backend="triton", **more)
    for _ in range(3):
        found = loop.step()
    assert found == ["perturb_kernel"] * 2 + ["update_kernel"] * 2


@pytest.mark.filterwarnings("ignore:overflow encountered")  # the interpreter's, on the first look
@pytest.mark.parametrize("scale", [0.0, 1e-25, 1e18])
def test_norms_whose_squares_leave_float32(scale):
    loop = Loop(steps=0)

    def shrink(loop):
        for p in loop.params:
            p.grad.mul_(scale)

    with torch.no_grad():
        loop.step(grads=shrink)
        for p in loop.params:
            p.zero_()
    assert loop.step(grads=shrink) == KNOWS


def test_a_momentum_that_is_not_finite():
    """It perturbs nothing, and a state dict of it can be loaded."""
    loop = Loop()

    def spoil(loop):
        loop.params[0].grad[7] = float("inf")

    loop.step(grads=spoil)
    with torch.no_grad():
        loop.params[0].zero_()
    before = [p.detach().clone() for p in loop.params]
    assert loop.optimizer.state_dict()["param_groups"][0]["fastsam_momentum_squared_norm"] == -1
    for _ in range(2):
        loop.optimizer.perturb()
        assert all(torch.equal(p, w) for p, w in zip(loop.params, before, strict=True))
        assert not loop.optimizer.metrics["momentum_norm"].isfinite()
        loop.optimizer.restore()
        loop.optimizer.load_state_dict(copy.deepcopy(loop.optimizer.state_dict()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_programs_whose_sums_have_all_sizes(dtype):
    """The norm is as exact as each program's own sum; each element is all there is in its chunk."""
    scales = torch.tensor([1.0, 2.0**-13, 3.0, 2.0**-20, 1 + 2.0**-20, 2.0**-9, 2.0**-11, 5.0],
                          dtype=torch.float64)  # fmt: skip
    for scale in (1.0, 2.0**-60, 2.0**60, 2.0**-140 if dtype == torch.float32 else 2.0**-400):
        param = torch.nn.Parameter(torch.zeros(len(scales) * 1024 + 5, dtype=dtype, device=DEVICE))
        optimizer = fastsam.MSAM([param], **SGD | {"lr": 0.0}, backend="triton")
        param.grad = torch.zeros_like(param)
        param.grad[7:-5:1024] = scale * scales
        seen = param.grad[7:-5:1024].double()
        optimizer.perturb()
        optimizer.step()
        optimizer.perturb()
        norm = float(optimizer.metrics["momentum_norm"])
        assert norm == pytest.approx(float((seen / scale).norm()) * scale, rel=1e-7)
        if dtype == torch.float64:
            assert norm == pytest.approx(float((seen / scale).norm()) * scale, rel=1e-14)
        optimizer.restore()


@pytest.mark.parametrize(
    "where", ["fastsam.step.left.MOST_PROGRAMS", "fastsam.carried.is_distributed"]
)
def test_not_with_too_many_programs_nor_processes(monkeypatch, where):
    """A bin could overflow; collectives write to tensors without torch's counting it."""
    loop = Loop()
    monkeypatch.setattr(where, 3 if where.endswith("PROGRAMS") else lambda: True)
    assert [loop.step() for _ in range(2)] == [MEASURES] * 2
    monkeypatch.undo()
    assert [loop.step() for _ in range(2)] == [MEASURES, KNOWS]


def test_never_again_once_a_step_has_been_captured(monkeypatch):
    """Replays write to the momentum, and the host does not know when."""
    loop = Loop()
    with monkeypatch.context() as capture:
        capture.setattr("fastsam.step.left.is_captured", lambda batch: True)
        assert loop.step() == MEASURES
    assert [loop.step() for _ in range(3)] == [MEASURES] * 3


def test_a_state_dict_of_between_the_passes():
    loop, other = Loop(), Loop(steps=0)
    loop.optimizer.perturb()
    saved = copy.deepcopy(loop.optimizer.state_dict())
    loop.optimizer.restore()
    other.optimizer.load_state_dict(saved)
    for p, q in zip(loop.params, other.params, strict=True):
        q.data.copy_(p)
    for one in (loop, other):
        one.optimizer.perturb()
    for p, q in zip(loop.params, other.params, strict=True):
        assert torch.equal(p, q)
