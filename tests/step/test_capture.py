"""A step in a CUDA graph: replays go on as steps would, and what cannot be captured is refused.

Without a GPU a stand-in plays the graph: it records every operator and every kernel launch of one
step, and runs them again on the same memory. Anything that a step decides on the host, or keeps in
another place than the step before, makes its replays differ from steps.
"""

import pytest
import torch

import fastsam
from fastsam.kernels import table

from graphs import CASES, Graph, batches, cpu_only, problem, refused


def check(name, capture, replay):
    """Two steps, then four replays of which the last two have another learning rate and radius."""
    (model, optimizer, x, closure), (model_, optimizer_, x_, closure_) = map(problem, [name] * 2)
    data = batches(7)
    for batch in data[:2]:
        for input_, step, f in ((x, optimizer, closure), (x_, optimizer_, closure_)):
            input_.copy_(batch)
            step.step(f)
    capture(lambda: x.copy_(data[2]), lambda: optimizer.step(closure))
    x_.copy_(data[2])
    optimizer_.step(closure_)
    for i, batch in enumerate(data[3:]):
        if i == 2:
            for group in (optimizer.param_groups[0], optimizer_.param_groups[0]):
                group["lr"].fill_(0.01)
                group["rho"].fill_(0.7)
        x.copy_(batch)
        replay()
        x_.copy_(batch)
        optimizer_.step(closure_)
        for p, p_ in zip(model.parameters(), model_.parameters(), strict=True):
            torch.testing.assert_close(p, p_, rtol=0, atol=0)  # the same launches: the same bits
        for p, p_ in zip(model.parameters(), model_.parameters(), strict=True):
            for key, value in optimizer_.state[p_].items():
                torch.testing.assert_close(optimizer.state[p][key], value, rtol=0, atol=0)
        for key, value in optimizer_.metrics.items():
            torch.testing.assert_close(optimizer.metrics[key], value, rtol=0, atol=0)
    x.copy_(data[0])  # the optimizer goes on outside, and the graph after it
    optimizer.step(closure)
    replay()
    x_.copy_(data[0])
    optimizer_.step(closure_)
    optimizer_.step(closure_)
    for p, p_ in zip(model.parameters(), model_.parameters(), strict=True):
        torch.testing.assert_close(p, p_, rtol=0, atol=0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
@pytest.mark.parametrize("name", CASES)
def test_replays_are_steps(name, monkeypatch):
    graph = Graph()

    def capture(prepare, step):
        prepare()
        with graph.capture(monkeypatch):
            step()

    check(name, capture, graph.replay)


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_replays_are_steps_on_a_gpu(name):
    graph = torch.cuda.CUDAGraph()

    def capture(prepare, step):
        with torch.cuda.graph(graph):
            step()
        prepare()
        graph.replay()  # capture does not run

    check(name, capture, graph.replay)


@cpu_only
@pytest.mark.parametrize("name", ["SAM + SGD", "SAM + AdamW", "VaSSO", "LightSAM III"])
def test_state_has_to_be_there(name, monkeypatch):
    model, optimizer, x, closure = problem(name)
    x.copy_(batches(1)[0])
    refused(monkeypatch, optimizer, closure, "take a step outside|taken no step outside")
    assert not optimizer.state
    optimizer.step(closure)
    key = next(iter(optimizer.state[model[0].weight]))
    del optimizer.state[model[0].weight][key]
    refused(monkeypatch, optimizer, closure, "only after its first step")


@cpu_only
def test_what_the_host_decides_is_refused(monkeypatch):
    model, _, x, closure = problem("SAM + SGD")
    x.copy_(batches(1)[0])
    params, sgd = list(model.parameters()), torch.optim.SGD

    def rule(lam, sharpness, old):
        return 0.5

    for optimizer, match in [
        (fastsam.UnifiedSAM(params, sgd, lam="1/t", lr=0.1, backend="triton"), "lam that changes"),
        (fastsam.UnifiedSAM(params, sgd, lam=lambda t: 0.5, lr=0.1, backend="triton"), "lam that"),
        (fastsam.SAM(params, torch.optim.RMSprop, skip_nonfinite=True, backend="triton"), "skip_"),
        (
            fastsam.SAMAR(params, sgd, rule=rule, lr=0.1, backend="triton"),
            "rule must give a tensor",
        ),
    ]:
        optimizer.step(closure)
        refused(monkeypatch, optimizer, closure, match)
        optimizer.step(closure)  # and the optimizer is as it was
    lets = fastsam.LETS(fastsam.SAM(params, sgd, lr=0.1, backend="triton"))
    monkeypatch.setattr(table, "is_capturing", lambda device: True)
    with pytest.raises(RuntimeError, match="LETS cannot be captured"):
        lets.step(closure, closure)


@pytest.mark.gpu
def test_capture_before_a_step_on_a_gpu():
    model, optimizer, x, closure = problem("SAM + AdamW")
    x.normal_()
    closure()  # else cuBLAS would make its handle inside the capture
    optimizer.zero_grad()
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="step outside"), torch.cuda.graph(graph):
        optimizer.step(closure)
