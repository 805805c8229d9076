"""The tables that kernels walk, and the device math that is hard to see from outside."""

import numpy as np
import pytest
import torch

from fastsam.backends.triton import launcher
from fastsam.kernels.layout import Row
from fastsam.kernels.table import Table, chunk_table

from registry import DEVICE, METHODS, create


def unpack(entries):
    where, part = entries[:, 0], entries[:, 1]
    size = np.abs(part)
    return where & 0xFFFFFFFF, where >> 32, size >> 16, size & 0xFFFF, part >= 0


def test_chunks_cover_every_element_once():
    sizes = np.array([0, 1, 1023, 1024, 1025, 5000])
    groups = np.array([0, 2, 1, 1, 0, 3])
    aligned = np.array([True, True, False, True, False, True])
    tensor, group, index, length, vector = unpack(chunk_table(sizes, groups, aligned, 1024))
    assert len(tensor) == 1 + 1 + 1 + 1 + 2 + 5
    for t, size in enumerate(sizes):
        mine = tensor == t
        assert length[mine].sum() == size
        np.testing.assert_array_equal(index[mine], np.arange(mine.sum()))
        assert (length[mine][:-1] == 1024).all()
        assert (group[mine] == groups[t]).all()
        # the sign is lost only where there is nothing to do
        assert (vector[mine] == aligned[t]).all() or size == 0


def test_chunks_of_a_tensor_beyond_32_bits():
    size = 2**31 + 5
    chunk = 2**15
    tensor, _, index, length, _ = unpack(
        chunk_table(np.array([size]), np.array([0]), np.array([False]), chunk)
    )
    assert (tensor == 0).all() and index[-1] == 2**16 and length.sum() == size and length[-1] == 5


def test_uploads_only_what_moved(monkeypatch):
    from fastsam.kernels import table as module

    uploads = []
    upload = module.Upload.__call__
    monkeypatch.setattr(
        module.Upload, "__call__", lambda self, *args: uploads.append(1) or upload(self, *args)
    )
    table = Table(torch.device(DEVICE))
    rows = {Row.GRAD: [1024, 2048], Row.PARAM: [4096, 8192]}
    table.set(rows, [3000, 5], [0, 1])
    chunks, pointers, revision = table.chunks(1024), table.pointers, table.revision
    assert len(chunks) == 4 and len(uploads) == 2
    table.set(rows, [3000, 5], [0, 1])
    assert len(uploads) == 2
    table.set(rows | {Row.GRAD: [1024, 2064]}, [3000, 5], [0, 1])  # moved, still aligned
    assert len(uploads) == 3 and table.chunks(1024) is chunks
    assert pointers[Row.GRAD].tolist() == [1024, 2064] and table.revision is revision
    table.set(rows | {Row.GRAD: [1024, 2052]}, [3000, 5], [0, 1])  # now misaligned
    assert table.aligned.tolist() == [True, False]
    assert table.chunks(1024) is not chunks and len(uploads) == 5
    assert table.revision is not revision
    revision = table.revision
    table.set(rows, [3000, 6], [0, 1])  # another size
    assert table.aligned.all() and len(uploads) == 6
    assert table.revision is not revision
    chunks, revision = table.chunks(1024), table.revision
    table.move({Row.GRAD: np.array([4096, 4112])})  # one row alone
    assert len(uploads) == 8 and table.chunks(1024) is chunks
    assert table.pointers is pointers and table.revision is revision
    assert pointers[Row.GRAD].tolist() == [4096, 4112]
    assert pointers[Row.PARAM].tolist() == [4096, 8192]
    table.move({Row.GRAD: [4096, 4108]})
    assert table.aligned.tolist() == [True, False] and table.chunks(1024) is not chunks
    table.set(rows | {Row.GRAD: [1024, 2048]}, [3000, 5], [0, 1])
    assert table.pointers is pointers and table.revision is not revision
    table.set({row: column[:1] for row, column in rows.items()}, [3000], [0])  # one tensor less
    assert table.pointers is not pointers


def test_what_a_graph_reads_is_not_written_to():
    kept = []
    table = Table(torch.device(DEVICE), kept)
    table.set({Row.GRAD: [1024, 2048]}, [3000, 5], [0, 1])
    before, revision = table.pointers, table.revision
    table.captured(1024)
    assert any(x is before for x in kept)
    table.move({Row.GRAD: [4096, 4112]})
    assert table.pointers is not before and table.revision is not revision
    assert before[Row.GRAD].tolist() == [1024, 2048]
    assert table.pointers[Row.GRAD].tolist() == [4096, 4112]
    before = table.pointers
    table.move({Row.GRAD: [1024, 2048]})  # that one is the table's own again
    assert table.pointers is before


#: Whose lam is another one in every step.
SCHEDULED = ("unified-1/t", "unified-1-1/t", "unified-callable")
STEADY = [(method, "sgd-momentum", {}) for method in METHODS if method not in SCHEDULED] + [
    ("sam", "adamw", {"rounding": "stochastic"}), ("sam", "adamw", {"master_weights": True}),
    ("vasso-all", "adagrad_norm", {"rounding": "stochastic"}), ("asam", "adagrad_norm", {}),
]  # fmt: skip


@pytest.mark.parametrize(("method", "base", "kwargs"), STEADY)
def test_hyper_parameters_are_looked_at_once(method, base, kwargs, monkeypatch):
    """What a step counts or keeps in its groups makes no table; a number that changes does."""
    made, make = [], launcher.hyper_rows
    monkeypatch.setattr(launcher, "hyper_rows", lambda *args: made.append(1) or make(*args))
    dtype = torch.bfloat16 if kwargs else torch.float32
    param = torch.nn.Parameter(torch.ones(9, dtype=dtype, device=DEVICE))
    optimizer = create(method, [("weight", param)], "triton", base, **kwargs)

    def step():
        for half in (optimizer.first_step, optimizer.second_step):
            param.grad = torch.ones_like(param)
            half()
        return len(made)

    seen = [step() for _ in range(4)]
    assert 0 < seen[1] == seen[3]
    optimizer.param_groups[0]["lr"] *= 0.5
    assert step() > seen[3]


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 0.999, 0.999999])
def test_bias_correction_does_not_cancel(beta):
    """AdamW's first update is lr * sign(g) to float32 precision only if 1 - beta^1 is exact."""
    import fastsam

    param = torch.nn.Parameter(torch.zeros(7, device=DEVICE))
    optimizer = fastsam.SAM(
        [param], torch.optim.AdamW, rho=0.0, lr=1.0, betas=(beta, beta), eps=0.0,
        weight_decay=0.0, backend="triton",
    )  # fmt: skip
    for _ in range(3):
        for half in (optimizer.first_step, optimizer.second_step):
            param.grad = torch.full_like(param, 0.3)
            half()
    # a constant gradient: every step is -lr, whatever beta
    torch.testing.assert_close(param.detach(), torch.full_like(param, -3.0), rtol=2e-6, atol=0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="times everything on a GPU")
@pytest.mark.parametrize("kind", ["perturb", "update", "reduce", "reduce_scaled", "reduce_streams"])
def test_launch_configurations_change_no_numbers(kind, tmp_path, capsys):
    """What ``bench/sweep.py`` compares differs in the order of sums alone."""
    from fastsam.kernels.layout import Launches

    import sweep

    found = sweep.main(["--kinds", kind, "--parameters", "1500", "--output", str(tmp_path)])
    configurations = [launch for launch, *_ in found[kind]]
    assert getattr(Launches(), kind).on(False) in configurations and len(set(configurations)) >= 12
    # the norms' last bits, in a step of 1e-3 that they scale
    assert all(difference <= 1e-7 for *_, difference in found[kind])
    if kind in ("perturb", "update"):  # element by element: the same bits
        assert all(difference == 0 for *_, difference in found[kind])
    assert len((tmp_path / f"{kind}.csv").read_text().splitlines()) == len(configurations) + 2
    assert "in use" in capsys.readouterr().out
