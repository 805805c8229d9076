"""FriendlySAM and LE-SAM by hand: which average counts, and what a rise of the loss takes."""

import pytest
import torch

import fastsam

from registry import BACKENDS, DEVICE

SGD = {"base_optimizer": torch.optim.SGD, "lr": 0.0}


def perturbations(optimizer, param, grads):
    """e of every step, from weights that stay 0."""
    found = []
    for g in grads:
        param.grad = torch.tensor(g, device=DEVICE)
        optimizer.first_step()
        found.append(param.tolist())
        param.grad = torch.zeros_like(param)
        optimizer.second_step()
    return found


@pytest.mark.parametrize("backend", BACKENDS)
def test_perturbs_along_what_the_old_average_lacks(backend):
    """m is 4, 4; 4, 4; and 2, 4 when the last step begins."""
    param = torch.nn.Parameter(torch.zeros(2, device=DEVICE))
    optimizer = fastsam.FriendlySAM([param], **SGD, rho=5.0, lmbda=0.5, backend=backend)
    grads = [[4.0, 4.0], [4.0, 4.0], [0.0, 4.0], [5.0, 8.0]]
    found = perturbations(optimizer, param, grads)
    along = 5 / 2**0.5
    expected = [[along, along], [0.0, 0.0], [-5.0, 0.0], [3.0, 4.0]]
    for e, exact in zip(found, expected, strict=True):
        assert e == pytest.approx(exact, rel=1e-6)
    assert optimizer.state[param]["ascent_ema"].tolist() == [3.5, 6.0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_stays_out(bad, backend):
    param = torch.nn.Parameter(torch.zeros(2, device=DEVICE))
    optimizer = fastsam.FriendlySAM([param], **SGD, rho=1.0, lmbda=0.5, backend=backend)
    assert perturbations(optimizer, param, [[bad, 1.0], [2.0, 0.0], [bad, 0.0], [2.0, 1.0]]) == [
        [0.0, 0.0], [1.0, 0.0], [0.0, 0.0], [0.0, 1.0]
    ]  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("hessian", ["diag", "difference"])
def test_lets_measures_with_the_same_average(hessian, backend):
    """From a second step on the old average and the new differ: <delta, H e> by hand."""
    param = torch.nn.Parameter(torch.zeros(2, device=DEVICE))
    inner = fastsam.FriendlySAM([param], torch.optim.SGD, rho=5.0, lmbda=0.5, lr=0.5,
                                backend=backend)  # fmt: skip
    lets = fastsam.LETS(inner, hessian=hessian, rho_lr=0.0)
    for g in ([4.0, 4.0], [7.0, 8.0]):  # d = (3, 4), and e = d
        grads = iter([g, [9.0, 11.0], [2.0, 3.0], [5.0, 1.0]])
        losses = iter([2.0, 1.0, 1.0, 3.0])

        def closure(grads=grads, losses=losses):
            param.grad = torch.tensor(next(grads), device=DEVICE)
            return next(losses)

        lets.step(closure, closure)
    product = (81 * 3, 121 * 4) if hessian == "diag" else (2, 3)
    slope = 0.5 * ((5 - 2) * product[0] + (1 - 3) * product[1])
    found = lets.metrics["hypergradient"].item() * 5.0
    assert found == pytest.approx(-(3 - 1) * slope, rel=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_lesam_goes_as_far_as_the_loss_rises(backend):
    """By sigma = 2, to first order, and no farther than rho_max = 1."""
    param = torch.nn.Parameter(torch.zeros(2, device=DEVICE))
    optimizer = fastsam.LESAM([param], **SGD, sigma=2.0, rho_max=1.0, backend=backend)
    grads = [[3.0, 4.0], [0.6, 0.8], [0.0, 0.0], [float("inf"), 1.0], [1e-30, 0.0]]
    expected = [[0.24, 0.32], [0.6, 0.8], [0.0, 0.0], [0.0, 0.0]]
    found = perturbations(optimizer, param, grads)
    for e, exact in zip(found, expected, strict=False):
        assert e == pytest.approx(exact, rel=1e-6)
    assert 0 < found[-1][0] <= 1.0
    assert optimizer.metrics["rho"].item() == 1.0


def test_out_of_range():
    param = [torch.nn.Parameter(torch.ones(2, device=DEVICE))]
    with pytest.raises(TypeError, match="LESAM takes no rho; rho_max is"):
        fastsam.LESAM(param, **SGD, rho=0.1)
    with pytest.raises(ValueError, match="rho_max must be at least 0 and finite, got inf"):
        fastsam.LESAM(param, **SGD, rho_max=float("inf"))
    with pytest.raises(ValueError, match="sigma must be at least 0 and finite, got -1.0"):
        fastsam.LESAM(param, **SGD, sigma=-1.0)
    with pytest.raises(ValueError, match=r"lmbda must be in \[0, 1\], got 1.5"):
        fastsam.FriendlySAM(param, **SGD, lmbda=1.5)
    with pytest.raises(ValueError, match="ascent_steps must be 1 with FriendlySAM"):
        fastsam.FriendlySAM(param, **SGD, ascent_steps=2)
