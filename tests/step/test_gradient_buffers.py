"""Gradients that keep their memory: parts of flat buffers, and ``zero_grad`` of another kind."""

import pytest
import torch

import fastsam
from fastsam.step.gradients import zero

from networks import bits, closure_of, model_and_data, same
from registry import BACKENDS, DEVICE

SGD = {"base_optimizer": torch.optim.SGD, "lr": 0.1, "momentum": 0.9}


def flatten_gradients(params):
    """One buffer of which every ``.grad`` is a part."""
    flat = torch.zeros(sum(p.numel() for p in params), device=DEVICE)
    for p, part in zip(params, flat.split([p.numel() for p in params]), strict=True):
        p.grad = part.view_as(p)
    return flat


def in_place(cls):
    """With a ``zero_grad`` that keeps the gradients unless it is told otherwise."""

    class Keeps(cls):
        def zero_grad(self, set_to_none=False):
            super().zero_grad(set_to_none=set_to_none)

    return Keeps


def without_arguments(cls):
    """With one that takes no argument, as loops of one's own have it."""

    class Keeps(cls):
        def zero_grad(self):
            super().zero_grad(set_to_none=False)

    return Keeps


def patched(cls):
    """With one that was put into an instance."""

    def make(*args, **kwargs):
        optimizer = cls(*args, **kwargs)
        optimizer.zero_grad = lambda: [p.grad.zero_() for p in optimizer.param_groups[0]["params"]]
        return optimizer

    return make


#: How a class is told to keep gradients: what is made of it, and its arguments.
KEEPING = {
    "set_to_none": (lambda cls: cls, {"set_to_none": False}),
    "overridden": (in_place, {}),
    "without arguments": (without_arguments, {}),
    "patched": (patched, {}),
}


def by_closure(optimizer, loss_fn):
    optimizer.step(closure_of(loss_fn))


def by_halves(optimizer, loss_fn):
    for p in optimizer.param_groups[0]["params"]:
        if p.grad is not None:
            p.grad.zero_()
    loss_fn().backward()
    optimizer.first_step(zero_grad=True)
    loss_fn().backward()
    optimizer.second_step()


def by_micro_batches(optimizer, loss_fn):
    optimizer.step_micro_batches([closure_of(loss_fn)] * 2)


@pytest.mark.parametrize("keeping", KEEPING)
@pytest.mark.parametrize(
    ("name", "take", "backend"),
    [("SAMAR", by_closure, backend) for backend in BACKENDS]
    + [("SAMAR", by_halves, "torch"), ("SAM", by_micro_batches, "torch")],
)
def test_flat_buffers(name, take, backend, keeping):
    """Each pass's gradients arrive in the buffer, and the weights are those without one."""
    change, kwargs = KEEPING[keeping]
    cls = getattr(fastsam, name)
    model, loss_fn = model_and_data()
    other, other_loss = model_and_data()
    params = list(model.parameters())
    flat = flatten_gradients(params)
    buffer = flat.untyped_storage().data_ptr()
    kept = change(cls)(params, backend=backend, **SGD, **kwargs)
    plain = cls(other.parameters(), backend=backend, **SGD)
    for _ in range(3):
        take(kept, loss_fn)
        take(plain, other_loss)
        left = torch.cat([p.grad.flatten() for p in other.parameters()])
        assert torch.equal(flat, left) and flat.count_nonzero() > 0
        assert all(p.grad.untyped_storage().data_ptr() == buffer for p in params)
    assert same(bits(model), bits(other))


@pytest.mark.parametrize("keeping", KEEPING)
@pytest.mark.parametrize("take", [by_closure, by_halves])
def test_zeroed_first_gradients(take, keeping):
    """Those that autograd made: what the update takes of the first pass is not zeroed with them."""
    change, kwargs = KEEPING[keeping]
    (model, loss_fn), (other, other_loss) = model_and_data(), model_and_data()
    kept = change(fastsam.SAMAR)(model.parameters(), **SGD, **kwargs)
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if keeping == "patched" else None  # it wants gradients
    plain = fastsam.SAMAR(other.parameters(), **SGD)
    for _ in range(3):
        take(kept, loss_fn)
        take(plain, other_loss)
    assert same(bits(model), bits(other))


@pytest.mark.parametrize("keeping", KEEPING)
@pytest.mark.parametrize(("hessian", "flat"), [("diag", True), ("difference", False)])
def test_learned_radius(hessian, flat, keeping):
    """Each of LETS's four gradients is its own pass's, and ``.grad`` what the step left."""
    change, kwargs = KEEPING[keeping]
    results = []
    for kept in (True, False):
        model, loss_fn = model_and_data()
        _, other_loss = model_and_data(1)
        buffer = flatten_gradients(list(model.parameters()))
        if not (kept and flat):
            for p in model.parameters():
                p.grad = torch.zeros_like(p) if kept else None
        cls = change(fastsam.SAM) if kept else fastsam.SAM
        optimizer = fastsam.LETS(
            cls(model.parameters(), **SGD, **(kwargs if kept else {})), rho_lr=0.1, hessian=hessian
        )

        def validation(model=model, data=other_loss):
            _, x, y = (cell.cell_contents for cell in data.__closure__)
            loss = torch.nn.functional.cross_entropy(model(x), y)
            loss.backward()
            return loss

        for _ in range(3):
            optimizer.step(closure_of(loss_fn), validation)
        grads = [p.grad.flatten() for p in model.parameters()]
        if kept and flat:
            assert torch.equal(buffer, torch.cat(grads))
        results.append([*bits(model), *grads, optimizer.param_groups[0]["rho"]])
    assert same(*results)
    assert abs(results[0][-1] - 0.05) > 1e-4


def test_step_of_the_base():
    """``perturb_every`` and ``plain_step`` zero as every step does."""
    model, loss_fn = model_and_data()
    flat = flatten_gradients(list(model.parameters()))
    optimizer = fastsam.SAM(model.parameters(), start=5, set_to_none=False, **SGD)
    optimizer.step(closure_of(loss_fn))
    assert flat.count_nonzero() > 0
    optimizer.plain_step(zero_grad=True)
    assert flat.count_nonzero() == 0 and model[0].weight.grad._is_view()


@pytest.mark.parametrize("value", [None, 0, 1, "False"])
def test_what_is_neither_true_nor_false(value):
    model, _ = model_and_data()
    with pytest.raises(ValueError, match="set_to_none must be True or False, got"):
        fastsam.SAM(model.parameters(), set_to_none=value, **SGD)


def gradients_of_all_kinds():
    """Parameters whose gradients are there, missing, of a graph, wanted one of, sparse, a view."""
    params = [torch.nn.Parameter(torch.ones(3, 2, device=DEVICE)) for _ in range(6)]
    params.append(torch.nn.Parameter(torch.ones(3, 2, dtype=torch.float64, device=DEVICE)))
    for k, param in enumerate(params[1:], start=1):
        param.grad = torch.full_like(param, k)
    params[2].grad = 2 * torch.ones_like(params[2], requires_grad=True)
    params[3].grad.requires_grad_()
    sparse = torch.sparse_coo_tensor([[0]], torch.ones(1, 2), (3, 2), check_invariants=True)
    params[4].grad = sparse.to(DEVICE)
    params[5].grad = torch.ones(4, 2, device=DEVICE)[1:]
    return params


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zeroing_is_torchs(set_to_none):
    ours, theirs = gradients_of_all_kinds(), gradients_of_all_kinds()
    held = [param.grad for param in ours]
    zero([{"params": ours[:3]}, {"params": ours[3:]}], set_to_none)
    torch.optim.SGD(theirs, lr=0.1).zero_grad(set_to_none)
    for param, param_, grad in zip(ours, theirs, held, strict=True):
        assert (param.grad is None) == (param_.grad is None)
        if param.grad is None:
            continue
        assert param.grad is grad and not grad.to_dense().any() and not param_.grad.to_dense().any()
        assert grad.requires_grad == param_.grad.requires_grad and grad.grad_fn is None
