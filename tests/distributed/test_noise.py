"""Methods with noise on several ranks: all draw the same, and losses are the mean over them."""

import pytest
import torch

import fastsam

import processes
from processes import data, network
from shards import sharded, squared_error, whole, wrapped

CASES = {
    "det": (fastsam.DetSAM, {"rho": 1.0, "half_width": 0.05, "samples": 2}),
    "frob": (fastsam.FrobSAM, {"rho": 0.1, "weight": 0.05}),
    "bsam": (fastsam.BSAM, {"n": 16, "prior_precision": 1.0}),
}


@pytest.fixture(scope="module", autouse=True)
def _end_processes():
    yield
    processes.close()


def trained(rank, size, case, layout, backend="torch"):
    """The weights after some steps, of a rank's share of the data."""
    cls, kwargs = CASES[case]
    model = network()
    if size > 1:
        model = wrapped(model) if layout == "ddp" else sharded(model, layout)
    base = () if cls is fastsam.BSAM else (torch.optim.SGD,)
    optimizer = cls(model.parameters(), *base, lr=0.1, backend=backend, **kwargs)
    batch = data(rank, size)

    def closure():
        loss = squared_error(model, batch)
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)
    return [x.clone() for x in whole(model.parameters())]


@pytest.mark.parametrize("case", CASES)
def test_ddp_is_one_process_with_all_data(case):
    """In which the noise is the same, and every rank comes to the same weights."""
    alone = trained(0, 1, case, "")
    for found in processes.run(2, trained, case, "ddp"):
        for ours, exact in zip(found, alone, strict=True):
            torch.testing.assert_close(ours, exact, rtol=0, atol=1e-12)


@pytest.mark.parametrize("case", ["frob", "bsam"])
def test_shards_draw_noise_of_their_own(case):
    """So the weights are others than on one process, and the same on both."""
    first, second = processes.run(2, trained, case, "sharded")
    for ours, others in zip(first, second, strict=True):
        assert torch.equal(ours, others) and ours.isfinite().all()
