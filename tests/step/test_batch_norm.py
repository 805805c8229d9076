"""Running statistics, which count one pass of a step or neither: against torch's own layers."""

import contextlib
import copy
import pickle
import re

import pytest
import torch
from torch import nn

import fastsam
from fastsam import frozen_batch_norm

from graphs import Graph
from networks import bits, same
from reads import Reads, never_waiting
from registry import DEVICE

FEATURES, STEPS = 6, 3


class InPlace(nn.Module):
    """A class of somebody's own that writes to its buffers, with one more than torch has."""

    def __init__(self):
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(FEATURES))
        self.register_buffer("mean_square", torch.ones(FEATURES), persistent=False)

    def forward(self, x):
        with torch.no_grad():
            self.running_mean.lerp_(x.mean(0), 0.1)
            self.mean_square.lerp_(x.square().mean(0), 0.1)
        return (x - x.mean(0)) * x.square().mean(0).rsqrt()


class Rebinding(InPlace):
    """One that puts new tensors in their place."""

    def forward(self, x):
        self.running_mean = 0.9 * self.running_mean + 0.1 * x.mean(0).detach()
        self.mean_square = 0.9 * self.mean_square + 0.1 * x.square().mean(0).detach()
        return (x - x.mean(0)) * x.square().mean(0).rsqrt()


class Blocks(nn.Module):
    """Features as channels of length 1, or as FEATURES channels of an image."""

    def __init__(self, layer, shape):
        super().__init__()
        self.layer, self.shape = layer, shape

    def forward(self, x):
        return self.layer(x.reshape(-1, FEATURES, *self.shape)).reshape(x.shape)


def lazy():
    layer = nn.LazyBatchNorm1d()
    layer(torch.randn(8, FEATURES))
    return layer


LAYERS = {
    "BatchNorm1d": lambda: nn.BatchNorm1d(FEATURES),
    "BatchNorm2d": lambda: Blocks(nn.BatchNorm2d(FEATURES), (2, 1)),
    "momentum=None": lambda: nn.BatchNorm1d(FEATURES, momentum=None),
    "momentum=1": lambda: nn.BatchNorm1d(FEATURES, momentum=1.0, affine=False),
    "SyncBatchNorm": lambda: nn.SyncBatchNorm(FEATURES),  # of one process: runs anywhere
    "InstanceNorm1d": lambda: Blocks(nn.InstanceNorm1d(FEATURES, track_running_stats=True), (2,)),
    "lazy": lazy,
    "shared": lambda: nn.Sequential(*[nn.BatchNorm1d(FEATURES)] * 2),
    "in place": InPlace,
    "rebinding": Rebinding,
}
COUNTING = ("BatchNorm1d", "BatchNorm2d", "momentum=None", "momentum=1", "SyncBatchNorm")
OWN = {"in place": ("mean_square",), "rebinding": ("mean_square",)}


def network(layer="BatchNorm1d"):
    torch.manual_seed(1)
    layers = [nn.Linear(4, FEATURES), LAYERS[layer](), nn.Tanh(), nn.Linear(FEATURES, 2)]
    return nn.Sequential(*layers).to(DEVICE)


def batches(count=STEPS):
    torch.manual_seed(2)
    return [torch.randn(16, 4, device=DEVICE) * (k + 1) + k for k in range(count)]


def statistics(model):
    return [x.clone() for x in model.buffers()]


def addresses(model):
    return [(id(x), x.data_ptr()) for x in model.buffers()]


def train(model, how, frozen=None, context="descent_context"):
    """Some steps; what the statistics have to be after each, if only ``w`` or ``w + e`` counts."""
    contexts = {}
    if frozen is not None and how != "explicit":
        contexts = {context: frozen if how == "object" else lambda: frozen}
    optimizer = fastsam.SAM(model.parameters(), torch.optim.SGD, lr=0.1, rho=0.5, **contexts)
    frozen = contextlib.nullcontext() if frozen is None else frozen
    for x in batches():
        once = []

        def closure(x=x, once=once):
            twin = copy.deepcopy(model)
            loss = model(x).square().mean()
            loss.backward()
            twin(x)
            once.append(statistics(twin))
            return loss

        if how == "explicit":
            closure()
            optimizer.first_step(zero_grad=True)
            with frozen:
                closure()
            optimizer.second_step(zero_grad=True)
        else:
            optimizer.step(closure)
        yield once


@pytest.mark.parametrize("how", ["explicit", "object", "callable"])
@pytest.mark.parametrize("layer", LAYERS)
def test_only_the_first_pass_counts(layer, how):
    """What one plain forward at ``w`` makes of the statistics, bit for bit."""
    model, naive = network(layer), network(layer)
    before = addresses(model) if layer != "rebinding" else None
    frozen = frozen_batch_norm(model, OWN.get(layer, ()))
    for step, (once, twice) in enumerate(
        zip(train(model, how, frozen), train(naive, how), strict=True), start=1
    ):
        assert same(statistics(model), once[0])
        assert not same(statistics(naive), twice[0])
        if step == 1:  # the layers went on normalising by the batch: training is the same
            assert same(bits(model), bits(naive))
        for name, x in model.named_buffers():
            if name.endswith("num_batches_tracked") and layer in COUNTING:
                assert x == step
    if before is not None:
        assert addresses(model) == before


@pytest.mark.parametrize("how", ["object", "callable"])
def test_only_the_second_pass_counts(how):
    model = network()
    for once in train(model, how, frozen_batch_norm(model), "ascent_context"):
        # the second forward started from the statistics of the step before, as the first did
        assert same(statistics(model), once[1]) and not same(once[0], once[1])


@pytest.mark.parametrize("mode", ["eval", "untracked", "no layer"])
def test_nothing_to_keep(mode):
    model = network()
    if mode == "untracked":
        model[1] = nn.BatchNorm1d(FEATURES, track_running_stats=False).to(DEVICE)
    elif mode == "no layer":
        del model[1]
    model.train(mode != "eval")
    before = statistics(model)
    expected = model(batches()[0])
    with frozen_batch_norm(model):
        assert torch.equal(model(batches()[0]), expected)
        model.eval()
    assert same(statistics(model), before) and not model.training


# --- blocks in blocks, and blocks that fail -------------------------------------------------------


@pytest.mark.parametrize("same_object", [True, False])
def test_blocks_nest(same_object):
    model, (x, y, z) = network(), batches()
    outer = frozen_batch_norm(model)
    inner = outer if same_object else frozen_batch_norm(model[1])
    start = statistics(model)
    with outer:
        model(x)
        middle = statistics(model)
        with inner, inner:
            model(y)
            assert not same(statistics(model), middle)
        assert same(statistics(model), middle) and not same(middle, start)
        with pytest.raises(KeyboardInterrupt), inner():
            model(z)
            raise KeyboardInterrupt
        assert same(statistics(model), middle)
    assert same(statistics(model), start)
    model(x)  # and the statistics run on
    assert same(statistics(model), middle)


@pytest.mark.parametrize("call", [1, 2])
def test_a_failing_pass(call):
    """Of a step that fails in its second pass the first one's statistics stay, as it has been."""
    model, calls = network(), []
    optimizer = fastsam.SAM(
        model.parameters(), torch.optim.SGD, lr=0.1, descent_context=frozen_batch_norm(model)
    )
    twin = copy.deepcopy(model)
    twin(batches()[0])

    def closure():
        calls.append(1)
        loss = model(batches()[0]).mean()
        if len(calls) == call:
            raise ValueError("no")
        loss.backward()

    with pytest.raises(ValueError, match="no"):
        optimizer.step(closure)
    assert same(statistics(model), statistics(twin))


# --- what else happens inside ---------------------------------------------------------------------


def test_settings_changed_inside():
    model = network()
    before = statistics(model)
    with frozen_batch_norm(model):
        for momentum in (0.7, None, 1.0):
            model[1].momentum = momentum
            model(batches()[1])
        model[1].track_running_stats = False
        model[1].running_mean = None
    assert same(statistics(model), before)
    assert model[1].momentum == 1.0 and not model[1].track_running_stats


def test_modules_that_come_and_go_inside():
    model = network()
    gone, found = model[1], statistics(model)
    with frozen_batch_norm(model):
        model(batches()[0])
        model[1] = nn.Sequential(gone, nn.BatchNorm1d(FEATURES).to(DEVICE))
        model(batches()[1])
        model[1] = model[1][1]
        del gone.num_batches_tracked
    assert same([gone.running_mean, gone.running_var], found[:2])
    assert not hasattr(gone, "num_batches_tracked")
    assert model[1].num_batches_tracked == 1  # a new module's statistics are its own


def test_a_buffer_of_another_dtype_or_shape():
    model, other = network().double(), network("rebinding")
    with torch.no_grad():
        model[1].running_mean.fill_(1.5)
    with frozen_batch_norm(model), frozen_batch_norm(other):
        model.float()
        model(batches()[0])
        other[1].running_mean = torch.full((3,), 5.0)
    assert model[1].running_mean.tolist() == [1.5] * FEATURES
    assert model[1].running_mean.dtype == torch.float32
    assert other[1].running_mean.tolist() == [5.0] * 3  # not what it was at all


def test_lazy_modules_begin_inside():
    model = nn.Sequential(nn.LazyBatchNorm1d()).to(DEVICE)
    frozen = frozen_batch_norm(model)
    with frozen:
        model(batches()[0])
    assert model[0].num_batches_tracked == 1
    with frozen:
        model(batches()[0])
    assert model[0].num_batches_tracked == 1


def test_views_of_one_memory():
    """Values are put back in place: other code that looks at the memory sees them."""
    flat = torch.arange(2.0 * FEATURES, device=DEVICE)
    model = network()
    model[1].running_mean, model[1].running_var = flat[::2], flat[1::2]
    before = flat.clone()
    with frozen_batch_norm(model):
        model(batches()[1])
        assert not torch.equal(flat, before)
    assert torch.equal(flat, before)


def test_spectral_norm():
    """Vectors that every forward in training mode changes, and that are not statistics."""
    torch.manual_seed(0)
    model = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 3)).to(DEVICE)
    # those of the constructor may be exact to the last bit, where a forward changes nothing
    vector = model.parametrizations.weight[0]._u
    vector.copy_(nn.functional.normalize(torch.ones_like(vector), dim=0))
    before = statistics(model)
    with frozen_batch_norm(model, buffers=["_u", "_v"]):
        model(batches()[0])
        assert not same(statistics(model), before)
    assert same(statistics(model), before)


# --- autograd, wrappers, compilers, graphs --------------------------------------------------------


@pytest.mark.parametrize("layer", LAYERS)
def test_backward_after_the_block(layer):
    model = network(layer)
    x = batches()[0]
    expected = torch.autograd.grad(model(x).square().mean(), list(model.parameters()))
    with frozen_batch_norm(model):
        loss = model(x).square().mean()
    for grad, exact in zip(torch.autograd.grad(loss, list(model.parameters())), expected,
                           strict=True):  # fmt: skip
        assert torch.equal(grad, exact)


def test_autograd_objects_where_the_gradient_would_be_wrong():
    """A graph that reads a buffer which is put back under it."""

    class Reading(InPlace):
        def forward(self, x):
            with torch.no_grad():
                self.running_mean.add_(1)
            return x * self.running_mean

    model, x = Reading().to(DEVICE), torch.ones(1, FEATURES, device=DEVICE, requires_grad=True)
    with frozen_batch_norm(model):
        (grad,) = torch.autograd.grad(model(x).sum(), x)
    assert grad.tolist() == [[1.0] * FEATURES]
    with frozen_batch_norm(model):
        y = model(x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_wrapper_that_writes_to_the_buffers():
    """As ``DistributedDataParallel`` does on ranks above 0, before every forward."""

    class Broadcasting(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module
            self.sent = [torch.full_like(x, 7) for x in module.buffers()]

        def forward(self, x):
            with torch.no_grad():
                for buffer, sent in zip(self.module.buffers(), self.sent, strict=True):
                    buffer.copy_(sent)
            return self.module(x)

    model = Broadcasting(network())
    frozen = frozen_batch_norm(model)
    for once in train(model, "object", frozen):
        assert same(statistics(model), once[0])
    before = statistics(model)
    with frozen:
        model(batches()[0])
    assert same(statistics(model), before)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_models(backend):
    """Compiled once: neither entering nor leaving the block makes the compiler look again."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch.compiler.reset()
    model, compiler = network(), CompileCounterWithBackend(backend)
    compiled = torch.compile(model, backend=compiler, fullgraph=True)
    frozen = frozen_batch_norm(compiled)
    for k, x in enumerate(batches()):
        twin = copy.deepcopy(model)
        for inside in (False, True):
            with frozen if inside else contextlib.nullcontext():
                loss = compiled(x).square().mean()
                loss.backward()
            if k == 0 and not inside:
                assert compiler.frame_count == 1
        twin(x)
        # the compiler may take the sums in another order
        for ours, exact in zip(statistics(model), statistics(twin), strict=True):
            torch.testing.assert_close(ours, exact, rtol=1e-6, atol=1e-6)
        assert model[1].num_batches_tracked == k + 1
    assert compiler.frame_count == 1


def test_the_device_is_not_read():
    model = network()
    frozen = frozen_batch_norm(model)
    with Reads() as reads, frozen:
        model(batches()[0])
    assert reads.seen == []


@pytest.mark.skipif(DEVICE != "cpu", reason="the stand-in is for CPUs")
def test_replays(monkeypatch):
    """Recorded like a CUDA graph: replays keep the statistics that they find."""
    model, x = network(), batches()[0]
    twin, graph = copy.deepcopy(model), Graph()
    with graph.capture(monkeypatch), torch.no_grad():
        model(x)
        with frozen_batch_norm(model):
            model(x)
    twin(x)
    for y in batches()[1:]:
        assert same(statistics(model), statistics(twin))
        x.copy_(y)
        graph.replay()
        twin(x)
    assert same(statistics(model), statistics(twin))


@pytest.mark.gpu
def test_replays_of_cuda_graphs():
    model, x = network(), batches()[0]
    frozen = frozen_batch_norm(model)

    def passes():
        for context in (contextlib.nullcontext(), frozen):
            with context:
                model(x).square().mean().backward()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            passes()
    torch.cuda.current_stream().wait_stream(side)
    twin, graph = copy.deepcopy(model), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        passes()
    for y in batches():
        x.copy_(y)
        graph.replay()
        twin(x)
        assert same(statistics(model), statistics(twin))


@pytest.mark.gpu
def test_the_gpu_is_not_waited_for():
    model = network()
    with never_waiting(), frozen_batch_norm(model):
        model[1](torch.ones(3, FEATURES, device=DEVICE))


# --- copies and bad input -------------------------------------------------------------------------


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_go_with_the_copied_model(duplicate):
    model = network()
    frozen = frozen_batch_norm(model)
    with frozen:  # a copy has no open block
        twin, other = duplicate((model, frozen))
    assert other.model is twin
    before = statistics(twin)
    with other:
        twin(batches()[0])
    assert same(statistics(twin), before)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((None,), TypeError, "model must be a torch.nn.Module, got None"),
        (([nn.BatchNorm1d(2)],), TypeError, "model must be a torch.nn.Module, got [BatchNorm1d("),
        ((nn.Linear(2, 2), "_u"), TypeError, "buffers must be a sequence of names, got '_u'"),
        ((nn.Linear(2, 2), [1]), TypeError, "buffers must be a sequence of names, got (1,)"),
        ((nn.Linear(2, 2), ["_u"]), ValueError, "buffers must name buffers of the model's modules"),
    ],
)
def test_bad_input(arguments, error, message):
    with pytest.raises(error, match=re.escape(message)):
        frozen_batch_norm(*arguments)


def test_repr():
    assert repr(frozen_batch_norm(InPlace(), ["mean_square"])) == (
        "frozen_batch_norm(InPlace, buffers=('mean_square',))"
    )
