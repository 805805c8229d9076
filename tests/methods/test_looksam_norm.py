"""LookSAM's norm of what it keeps: known from step to step, and measured where it may be another.

Every step that reuses is compared with its equation in float64, on what the optimizer holds then.
"""

import copy
import pickle

import pytest
import torch
import triton

import fastsam

import launches
from registry import BACKENDS, DEVICE

STATE = "ascent_orthogonal"
ALPHA = 0.7
#: Measured, and known.
MEASURES = ["reduce_kernel", "reduce_kernel", "update_kernel"]
KNOWS = ["reduce_kernel", "update_kernel"]
pytestmark = pytest.mark.skipif(
    not triton.knobs.runtime.interpret, reason="counts in Triton's interpreter, not on a GPU"
)


class Loop:
    """LookSAM on three tensors in two groups, without a momentum: a step leaves ``w - u``.

    Everything has a seed of its own, so that two of them take the same steps.
    """

    def __init__(self, backend="triton", base=torch.optim.SGD, **kwargs):
        self.random = torch.Generator().manual_seed(0)
        self.params = [torch.nn.Parameter(self.draw(shape)) for shape in ((1030,), (3, 5), ())]
        kwargs = {"lr": 1.0, "alpha": ALPHA, "k": 100} | kwargs
        groups = [{"params": self.params[:2]}, {"params": self.params[2:]}]
        self.optimizer = fastsam.LookSAM(groups, base, backend=backend, **kwargs)
        self.look()

    def draw(self, shape):
        return torch.randn(shape, generator=self.random).to(DEVICE)

    def give(self, missing=()):
        for i, p in enumerate(self.params):
            p.grad = None if i in missing or not p.requires_grad else self.draw(p.shape)

    def look(self):
        """A step with a perturbation, which keeps something."""
        self.give()
        self.optimizer.first_step(zero_grad=True)
        self.give()
        self.optimizer.second_step()
        assert all(STATE in self.optimizer.state[p] for p in self.params)

    def reuse(self, missing=()):
        """A step that reuses it, checked; the kernels that it launched."""
        self.give(missing)
        present = [p for p in self.params if p.grad is not None]
        states = [self.optimizer.state.get(p, {}) for p in present]
        vs = [
            state.get(STATE, torch.zeros_like(p)).double()
            for p, state in zip(present, states, strict=True)
        ]
        gs = [p.grad.double() for p in present]
        n, m = (torch.cat([x.flatten() for x in xs]).norm() for xs in (gs, vs))
        exact = [
            p.detach().double() - (g + (ALPHA * n / m * v if m > 0 else 0))
            for p, g, v in zip(present, gs, vs, strict=True)
        ]
        with launches.record() as log:
            self.optimizer.plain_step()
        for p, w in zip(present, exact, strict=True):
            torch.testing.assert_close(p.double(), w, rtol=0, atol=3e-6)
        return log.kernels


def test_measured_once_for_all_steps_that_reuse():
    loop = Loop(k=4)
    assert [loop.reuse() for _ in range(3)] == [MEASURES, KNOWS, KNOWS]
    loop.look()
    assert [loop.reuse() for _ in range(2)] == [MEASURES, KNOWS]


def test_not_kept_in_distributed_training(monkeypatch):
    """Collectives write to tensors, and torch does not count that: as a write to ``.data``."""
    monkeypatch.setattr("fastsam.carried.is_distributed", lambda: True)
    loop = Loop()
    assert [loop.reuse() for _ in range(2)] == [KNOWS, KNOWS]  # one reduction for both norms
    loop.optimizer.state[loop.params[0]][STATE].data.mul_(5.0)
    assert loop.reuse() == KNOWS


def replace(loop):
    state = loop.optimizer.state[loop.params[0]]
    state[STATE] = 3 * state[STATE]


def write(loop):
    loop.optimizer.state[loop.params[1]][STATE].mul_(5.0)


def write_through_a_view(loop):
    loop.optimizer.state[loop.params[0]][STATE][3:900].zero_()


def remove(loop):
    del loop.optimizer.state[loop.params[0]][STATE]


def clear(loop):
    loop.optimizer.state.clear()


def load(loop):
    """The state dict's tensors are the optimizer's own, and have been written to."""
    saved = loop.optimizer.state_dict()
    write(loop)
    loop.optimizer.load_state_dict(saved)


def load_into_the_base(loop):
    saved = copy.deepcopy(loop.optimizer.base_optimizer.state_dict())
    for state in saved["state"].values():
        state[STATE].mul_(2.0)
    loop.optimizer.base_optimizer.load_state_dict(saved)


def add_a_group(loop):
    loop.params.append(torch.nn.Parameter(loop.draw((4,))))
    loop.optimizer.add_param_group({"params": loop.params[-1:]})


def freeze(loop):
    loop.params[0].requires_grad_(False)


def leave_out_of_the_perturbation(loop):
    """The norms are over all groups whatever is perturbed: nothing is another."""
    loop.optimizer.param_groups[1]["perturb"] = False


def fail(loop):
    def closure():
        raise KeyError("data")

    with pytest.raises(KeyError, match="data"):
        loop.optimizer.step(closure)


def fail_in_a_step_that_looks(loop):
    loop.give()
    loop.optimizer.first_step()
    loop.optimizer.restore()


def copy_it(loop):
    loop.params, loop.optimizer = copy.deepcopy((loop.params, loop.optimizer))


def move(loop):
    """As by what takes state to the host and back, past torch's count."""
    v = loop.optimizer.state[loop.params[0]][STATE]
    v.data = 2 * v.data


def pickle_it(loop):
    loop.params, loop.optimizer = pickle.loads(pickle.dumps((loop.params, loop.optimizer)))


def take_over(loop):
    groups = [{"params": loop.params[:2]}, {"params": loop.params[2:]}]
    base = torch.optim.SGD(groups, lr=1.0)
    base.load_state_dict(loop.optimizer.base_optimizer.state_dict())
    loop.optimizer = fastsam.LookSAM.from_optimizer(base, alpha=ALPHA, k=100, backend="triton")


def change_backends(loop):
    loop.optimizer.backend = "torch"
    loop.give()
    loop.optimizer.plain_step()
    write(loop)
    loop.optimizer.backend = "triton"


def turn_and_turn_back(loop):
    loop.optimizer.param_groups[0]["maximize"] = True
    loop.optimizer.param_groups[0]["maximize"] = False


def step_the_base(loop):
    """What its own step writes to, nobody counts."""
    loop.optimizer.base_optimizer.step()


CHANGES = [replace, write, write_through_a_view, remove, clear, load, load_into_the_base,
           add_a_group, freeze, fail_in_a_step_that_looks, move, copy_it, pickle_it, take_over,
           change_backends, step_the_base]  # fmt: skip
NO_CHANGES = [leave_out_of_the_perturbation, fail, turn_and_turn_back]


@pytest.mark.parametrize("change", CHANGES)
def test_measured_again_where_it_may_be_another(change):
    loop = Loop()
    assert [loop.reuse(), loop.reuse()] == [MEASURES, KNOWS]
    change(loop)
    kernels = loop.reuse()
    assert kernels == (KNOWS if change is clear else MEASURES)  # where nothing is left to measure
    assert loop.reuse() == KNOWS


def test_known_with_a_base_that_is_not_fused():
    """Its own step runs in every step of ours."""
    loop = Loop(base=torch.optim.Rprop, lr=0.01)
    found = []
    for _ in range(3):
        loop.give()
        with launches.record() as log:
            loop.optimizer.plain_step()
        found.append(log.kernels)
    assert found == [MEASURES[:2], KNOWS[:1], KNOWS[:1]]


@pytest.mark.parametrize("change", NO_CHANGES)
def test_known_where_it_is_not(change):
    loop = Loop()
    loop.reuse()
    change(loop)
    assert loop.reuse() == KNOWS


def test_of_the_parameters_that_have_a_gradient():
    loop = Loop()
    patterns = [(), (), (1,), (1,), (), (0, 2)]
    found = [loop.reuse(missing) for missing in patterns]
    assert found == [MEASURES, KNOWS, MEASURES, KNOWS, MEASURES, MEASURES]


def test_a_step_that_is_skipped_keeps_what_there_was():
    """Rejected on the device, of which the host does not know."""
    loop = Loop(k=3, skip_nonfinite=True)
    before = [loop.optimizer.state[p][STATE].clone() for p in loop.params]
    loop.give()
    loop.params[0].grad[7] = float("inf")
    with launches.record() as log:
        loop.optimizer.plain_step()
    assert log.kernels == MEASURES
    assert loop.reuse() == KNOWS
    loop.give()
    loop.optimizer.first_step(zero_grad=True)
    loop.give()
    loop.params[1].grad[0] = float("nan")
    loop.optimizer.second_step()
    assert float(loop.optimizer.metrics["skipped"]) == 2
    for p, v in zip(loop.params, before, strict=True):
        assert torch.equal(loop.optimizer.state[p][STATE], v)
    assert loop.reuse() == MEASURES


def test_clipping_needs_the_product_as_well():
    loop = Loop(max_grad_norm=1e9)
    assert [loop.reuse(), loop.reuse()] == [KNOWS, KNOWS]
    loop.optimizer.max_grad_norm = None
    assert [loop.reuse(), loop.reuse()] == [MEASURES, KNOWS]
    loop.optimizer.max_grad_norm = 1e9
    write(loop)
    assert loop.reuse() == KNOWS


def test_goes_on_bit_for_bit_from_the_middle():
    """The one that is resumed measures what the other knows."""
    loop, other = Loop(), Loop()
    for _ in range(2):
        loop.reuse()
        other.reuse()
    other.optimizer.load_state_dict(copy.deepcopy(other.optimizer.state_dict()))
    assert (loop.reuse(), other.reuse()) == (KNOWS, MEASURES)
    for p, q in zip(loop.params, other.params, strict=True):
        assert torch.equal(p, q)


@pytest.mark.filterwarnings("ignore:overflow encountered")  # the interpreter's, on the first look
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [1e-25, 1e18])
def test_norms_whose_squares_leave_float32(scale, backend):
    loop = Loop(backend)
    for p in loop.params:
        loop.optimizer.state[p][STATE].mul_(scale)
    loop.reuse()
    loop.reuse()
