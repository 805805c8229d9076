"""The studies of ``bench/studies.py``: their files, their statistics, their verdicts."""

import csv
import math
import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tqdm import tqdm

import fastsam

import studies
from claims import (
    study_core,
    study_flatness,
    study_lambda,
    study_language,
    study_lets,
    study_normalization,
    study_radius,
    study_regularisation,
    study_robustness,
    study_saddle,
    study_samar,
    study_stability,
    study_training,
    text_training,
)
from claims.study_core import Result, Run, Size
from claims.study_training import train_network
from common.data import Images
from common.jobs import execute_all
from common.text import PARTS, Decoder, Text, load_text, windows

TINY = {
    study_robustness: {"GRID": (1e-3, 1e-1)},
    study_stability: {"LRS": (0.1, 0.4)},
    study_saddle: {"NOISES": (0.0, 0.1), "RADII": (0.1,), "STARTS": 2, "STEPS": 70},
    study_radius: {"STARTS": (0.01, 0.1), "FIXED": (0.1,)},
    study_lambda: {"RADII": (0.1,)},
    study_regularisation: {"RADII": (0.1,)},
    study_samar: {"DATA": ("digits", "text"), "RADII": dict.fromkeys(study_samar.DATA, (0.1,))},
    study_lets: {
        "DATA": ("digits", "text"),
        "STARTS": dict.fromkeys(study_lets.DATA, (0.05,)),
        "FIXED": dict.fromkeys(study_lets.DATA, (0.1,)),
    },
    study_normalization: {"RADII": dict.fromkeys(study_normalization.RADII, (0.1,)) | {"sgd": ()}},
    study_flatness: {
        "HIDDEN": 2,
        "TRIED": {name: tried[:1] for name, tried in study_flatness.TRIED.items()},
    },
    study_language: {"RADII": dict.fromkeys(study_language.RADII, (0.1,)) | {"adamw": ()}},
}


@pytest.fixture
def tiny(monkeypatch):
    for module, values in TINY.items():
        for name, value in values.items():
            monkeypatch.setattr(module, name, value)
    images = [Images(*(x[:400] for x in part)) for part in study_training.load("digits", "cpu")]
    for module in (study_training, study_normalization, study_flatness):
        monkeypatch.setattr(module, "load", lambda name, device: images)
    text = text_training.load()
    few = [part[:2200] for part in text[:3]]
    monkeypatch.setattr(text_training, "load", lambda: Text(*few, text.characters))


def run_main(folder: Path, name: str, *options: str) -> list[dict[str, str]]:
    """Run a study in this process, for one epoch and seed unless told otherwise; read its CSV."""
    argv = [name, "--epochs", "1", "--seeds", "1", "--jobs", "1", "--output", str(folder)]
    assert studies.main([*argv, *options]) == 0
    with (folder / f"{name}.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("name", studies.STUDIES)
def test_study_writes_its_three_files(name, tiny, tmp_path, capsys):
    if name in ("samar", "lets"):
        pytest.importorskip("mlxtend")
    folder = tmp_path / "made" / "here"
    rows = run_main(folder, name)
    study = studies.STUDIES[name]
    runs = study.make_runs(study.small._replace(epochs=1, seeds=1))
    assert [row["method"] for row in rows] == [run.method for run in runs]
    for row, run in zip(rows, runs, strict=True):
        assert all(row[key] == str(value) for key, value in run.settings.items())
        assert (row["seed"], row["data"]) == (str(run.seed), run.data)
        assert float(row["seconds"]) > 0 and row["diverged"] == "0"
        if run.data == "digits":
            assert 0 <= float(row["test_accuracy_percent"]) <= 100 and float(row["train_loss"]) > 0
            watched = study_training.WATCHED.get(run.method)
            trace = [float(value) for value in row["trace"].split()]
            assert len(trace) == (2 if watched else 0)  # at the start, and in the one epoch
            if watched:
                assert trace[0] == run.settings[watched] != trace[1] > 0
    assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    text = (folder / f"{name}.txt").read_text(encoding="utf-8")
    assert text.strip() in capsys.readouterr().out
    assert f"{len(runs)} runs" in text and "CPU cores" in text and torch.__version__ in text
    verdicts = [line for line in text.splitlines() if line.startswith("Verdict: ")]
    assert len(verdicts) == text.count("Claim: ") > 0
    assert "Criterion. " + study.criterion.split()[0] in text  # the docstring is there


@pytest.mark.parametrize("name", [k for k, x in studies.STUDIES.items() if x.images is not None])
def test_study_on_other_images_has_files_and_sizes_of_its_own(name, tiny, tmp_path):
    pytest.importorskip("mlxtend")
    assert studies.STUDIES[name].images.data == "mnist5k"
    argv = [name, "--data", "mnist5k", "--epochs", "1", "--seeds", "1", "--jobs", "1"]
    assert studies.main([*argv, "--output", str(tmp_path)]) == 0
    stem = f"{name}-mnist5k"
    assert {path.name for path in tmp_path.iterdir()} == {
        f"{stem}.{x}" for x in ("csv", "png", "txt")
    }
    with (tmp_path / f"{stem}.csv").open(newline="", encoding="utf-8") as file:
        assert {row["data"] for row in csv.DictReader(file)} - {"saddle"} == {"mnist5k"}
    assert "mnist5k" in (tmp_path / f"{stem}.txt").read_text(encoding="utf-8").splitlines()[0]


@pytest.mark.parametrize(
    "options, allowed",
    [(["flatness", "--data", "mnist5k"], "robustness, stability"),
     (["lambda", "--data", "mnist5k", "--full"], "left out with --full"),
     (["lambda", "--data", "digits"], "mnist5k")],
)  # fmt: skip
def test_other_images_are_refused_where_a_study_has_none(options, allowed, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        studies.main([*options, "--output", str(tmp_path)])
    assert end.value.code == 2 and allowed in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_every_grid_is_as_large_as_the_study_promises():
    sizes = {name: study.make_runs(study.small) for name, study in studies.STUDIES.items()}
    grid = {run.method: set() for run in sizes["robustness"]}
    for run in sizes["robustness"]:
        grid[run.method].add((run.settings["lr"], run.settings.get("rho")))
    assert {method: len(cells) for method, cells in grid.items()} == {
        "adam": 5, "sam": 25, "adasam": 25, "lightsam-1": 25, "lightsam-2": 25, "lightsam-3": 25,
    }  # fmt: skip
    assert max(study_robustness.GRID) / min(study_robustness.GRID) == pytest.approx(1e4)
    lrs = {run.settings["lr"] for run in sizes["stability"] if run.data == "digits"}
    assert len(lrs) >= 10 and min(lrs) < 0.02 and max(lrs) > 3
    for name, runs in sizes.items():
        assert len({run.seed for run in runs if run.data != "saddle"}) >= 3, name
        assert all(run.epochs >= 15 for run in runs if run.data == "digits"), name
    full = {name: study.full.data for name, study in studies.STUDIES.items()}
    assert {name for name, data in full.items() if data != "mnist5k"} == {"language", "flatness"}
    assert {run.data for run in sizes["language"]} == {"text"}


# --- runs ---


def quick(method: str, seed: int = 0, **settings) -> Run:
    return Run(method, {"lr": 0.05, **settings}, seed, epochs=1)


def test_methods_share_weights_and_batches_at_a_seed():
    sgd, sam = train_network(quick("sgd")), train_network(quick("sam", rho=0.0))
    assert sam.measured == pytest.approx(sgd.measured, rel=1e-4)
    other = train_network(quick("sgd", seed=1))
    assert other.measured["train_loss"] != pytest.approx(sgd.measured["train_loss"], rel=1e-4)


def test_one_and_two_processes_give_the_same_rows_in_the_same_order():
    samar = {"rho": 0.1, **study_regularisation.RULE}
    runs = [quick("sam", rho=0.1), quick("samar", **samar), quick("sgd", seed=1)]
    runs += study_saddle.make_runs()[:2]
    one, two = (
        execute_all(study_stability.execute, runs, jobs, tqdm(disable=True)) for jobs in (1, 2)
    )
    assert [r.run for r in one] == [r.run for r in two] == runs
    for first, second in zip(one, two, strict=True):
        assert replace(first, seconds=0) == replace(second, seconds=0)


def test_diverged_run_is_a_row_that_counts_as_chance(tmp_path):
    run = replace(quick("sam", rho=0.1, lr=1e20), epochs=3)
    result = train_network(run)
    assert result.diverged and result.measured["epochs_done"] == 1
    assert study_core.accuracy(result) == 10 and study_core.loss(result) == math.log(10)
    fine = train_network(quick("sam", seed=1, rho=0.1))
    studies.write_results([result, fine], tmp_path / "x.csv")
    with (tmp_path / "x.csv").open(newline="") as file:
        row, other = csv.DictReader(file)
    assert (row["diverged"], row["train_loss"], row["test_accuracy_percent"]) == ("1", "", "")
    assert (other["diverged"], other["epochs_done"]) == ("0", "1")
    expected = statistics.fmean([10, fine.measured["test_accuracy_percent"]])
    assert study_core.mean_accuracy([result, fine]) == pytest.approx(expected)
    assert study_core.accuracy_cell([result, fine]).endswith("(1 div.)")
    assert study_core.diverged([result, fine]) == "1 of 2"


def test_validation_part_is_of_training_images_and_stratified():
    train_set, test = study_training.load("digits", "cpu")
    marked = train_set._replace(x=torch.arange(len(train_set.y)))
    kept, validation = study_training.split(marked, train_set.y, 0.2)
    assert sorted([*kept.x.tolist(), *validation.x.tolist()]) == list(range(len(train_set.y)))
    for part in (kept, validation):
        assert torch.equal(part.y, train_set.y[part.x])
    counts = torch.bincount(validation.y, minlength=10) / torch.bincount(train_set.y)
    torch.testing.assert_close(counts, torch.full((10,), 0.2), rtol=0, atol=0.01)


def test_lets_gets_a_validation_batch_and_the_gap_batch_of_its_settings(monkeypatch):
    settings = {"rho": 0.1, "rho_lr": 0.1, "hessian": "difference", "momentum": 0.0}
    run = Run("lets", {"lr": 0.05, "gap_batch": "same", **settings}, 0, 1, validation=0.2)
    drawn = []
    original = study_training.Stepper._loss_of_batch

    def record(self, images):
        drawn.append("validation" if images is self.validation else "training")
        return original(self, images)

    monkeypatch.setattr(study_training.Stepper, "_loss_of_batch", record)
    same = train_network(run)
    steps = len(drawn)
    assert drawn == ["validation"] * steps and steps == math.ceil(958 / 64)
    drawn.clear()
    fresh = train_network(replace(run, settings={**run.settings, "gap_batch": "fresh"}))
    assert drawn == ["training", "validation"] * steps
    assert same.trace[0] == fresh.trace[0] == 0.1 and same.trace[1] != fresh.trace[1]
    assert "validation_accuracy_percent" in same.measured


# --- text ---


def test_text_is_split_by_topics():
    from pydoc_data.topics import topics

    text = load_text()
    lengths = [len(topics[name]) for name in sorted(topics)]
    assert len(text.test) == sum(lengths[::PARTS]) + len(lengths[::PARTS]) - 1
    assert len(text.validation) == sum(lengths[1::PARTS]) + len(lengths[1::PARTS]) - 1
    total = sum(map(len, (text.training, text.validation, text.test)))
    assert total == sum(lengths) + len(lengths) - 3  # newlines between topics
    assert int(text.training.min()) == 1 and int(text.training.max()) == text.characters - 1


def test_windows_follow_each_other():
    cut = windows(torch.arange(20), 5, start=3)
    assert cut.tolist() == [list(range(i, i + 6)) for i in (3, 8, 13)]
    assert len(windows(torch.arange(21), 5)) == 4 and len(windows(torch.arange(20), 5)) == 3


def test_decoder_sees_no_character_to_come():
    torch.manual_seed(0)
    model = Decoder(10, length=8, width=16, heads=2).double()
    x = torch.randint(10, (2, 8))
    changed = x.clone()
    changed[:, 5:] = (changed[:, 5:] + 1) % 10
    before, after = model(x), model(changed)
    torch.testing.assert_close(after[:, :5], before[:, :5], rtol=0, atol=1e-12)
    assert not torch.allclose(after[:, 5:], before[:, 5:])
    torch.testing.assert_close(model(x[:, :3]), before[:, :3], rtol=0, atol=1e-12)


def test_text_methods_share_weights_and_batches_at_a_seed(tiny):
    def train(method: str, seed: int = 0, **settings) -> dict[str, float]:
        run = Run(method, {"lr": 3e-3, **settings}, seed, epochs=1, data="text")
        return text_training.train_decoder(run).measured

    adamw = train("adamw")
    assert adamw.pop("passes") == 1.0
    for method in ("sam", "asam", "sam-on", "functional"):
        found = train(method, rho=0.0)
        assert found.pop("passes") == 2.0
        assert found == pytest.approx(adamw, rel=1e-4), method
    other = train("adamw", seed=1)
    assert other["train_loss"] != pytest.approx(adamw["train_loss"], rel=1e-4)
    assert text_training.train_decoder(
        Run("sam", {"lr": 1e20, "rho": 0.1}, 0, epochs=1, data="text")
    ).diverged


def test_lets_on_text_is_given_other_batches_than_those_of_the_step(tiny, monkeypatch):
    learning = {"rho_lr": 0.0, "hessian": "diag", "gap_batch": "fresh"}
    run = Run("lets", {"lr": 3e-3, "rho": 0.1, **learning}, 0, epochs=2, data="text")
    seen, original = [], text_training.loss_of

    def record(model, batch, mark):
        if torch.is_grad_enabled():  # not where the losses at the end are measured
            seen.append(batch.tolist())
        return original(model, batch, mark)

    monkeypatch.setattr(text_training, "loss_of", record)
    text = text_training.load()
    lets = text_training.train_decoder(run)
    steps = len(seen) // 4
    held_out = windows(text.validation, text_training.LENGTH).tolist()
    kept = text.training.unfold(0, text_training.LENGTH + 1, 1).tolist()
    for first, second, fresh, validation in zip(*(seen[i::4] for i in range(4)), strict=True):
        assert first == second != fresh and all(window in kept for window in fresh)
        assert all(window in held_out for window in validation)
    seen.clear()
    sam = text_training.train_decoder(
        Run("sam", {"lr": 3e-3, "rho": 0.1}, 0, epochs=2, data="text")
    )
    passes = lets.measured.pop("passes"), sam.measured.pop("passes")
    assert passes == (8.0, 4.0) and steps == len(seen) // 2  # both have the same batches
    assert lets.measured == pytest.approx(sam.measured, rel=1e-4)  # as its radius does not move
    assert lets.trace == pytest.approx([0.1] * len(lets.trace)) and len(lets.trace) == 1 + steps


# --- the saddle ---


def leave_by_hand(method: str, lr: float, rho: float, noise: float, seed: int, steps: int) -> int:
    """Count the steps of an independent simulation; ``steps`` where it stays."""
    generator = torch.Generator().manual_seed(seed)

    def draw() -> np.ndarray:
        return torch.randn(2, generator=generator, dtype=torch.float64).numpy()

    w = draw()
    w *= study_saddle.START_DISTANCE / np.linalg.norm(w)
    curvature = np.array([2.0, -2.0])
    for step in range(steps):
        if abs(w[1]) > study_saddle.LEFT:
            return step
        tilt = noise * draw()
        g = curvature * w + tilt
        e = {"sgd": 0 * g, "usam": rho * g, "ssam-usam": rho * g}.get(
            method, rho * g / np.linalg.norm(g)
        )
        u = curvature * (w + e) + tilt
        if method.startswith("ssam"):
            u *= np.linalg.norm(g) / np.linalg.norm(u)
        w = w - lr * u
    return steps


@pytest.mark.parametrize("noise", [0.0, 0.1])
@pytest.mark.parametrize("method", ["sgd", "sam", "ssam", "usam", "ssam-usam"])
def test_descent_from_the_saddle_is_that_of_an_independent_simulation(method, noise, monkeypatch):
    monkeypatch.setattr(study_saddle, "STEPS", 150)
    settings = {"lr": 0.05, "gradient_noise": noise}
    if method != "sgd":
        settings["rho"] = 0.05
    for seed in range(2):
        result = study_saddle.descend(Run(method, settings, seed, epochs=0, data="saddle"))
        expected = leave_by_hand(method, 0.05, 0.05, noise, seed, 150)
        assert result.measured["steps_to_leave"] == expected
        stays = noise == 0 and method in ("sam", "ssam")  # within rho of a saddle without noise
        assert stays == (not result.measured["left"]) == (expected == 150)


# --- statistics and verdicts, on made-up results ---


def make_up(
    study: study_core.Study, outcome: Callable[[Run], dict], seeds: int = 3
) -> list[Result]:
    """Return a result for every run of a study: ``outcome`` gives what differs from a good one."""
    results = []
    for run in study.make_runs(Size("digits", 20, seeds, 0.2)):
        made = {"accuracy": 90.0, "loss": 0.5, "diverged": False, "trace": (1.0, 1.0), "steps": 60}
        made |= outcome(run)
        measured = {
            "train_loss": made["loss"],
            "test_accuracy_percent": made["accuracy"],
            "validation_accuracy_percent": made["accuracy"],
            "optimizer_us": 100.0,
            **dict.fromkeys(study_flatness.MEASURES, made["loss"]),
        }
        if run.data == "text":
            measured = dict.fromkeys(("train_loss", "validation_loss", "test_loss"), made["loss"])
        if run.data == "saddle":
            left = made["steps"] < study_saddle.STEPS
            measured = {"steps_to_leave": made["steps"], "left": int(left)}
        results.append(Result(run, measured, made["diverged"], 1.0, made["trace"]))
    return results


def outcomes(study: study_core.Study, outcome: Callable[[Run], dict]) -> list[str]:
    results = make_up(study, outcome)
    assert study.tabulate(results)
    return [verdict.outcome.split()[0] for verdict in study.judge(results)]


def noisy(run: Run, accuracy: float) -> dict:
    """An accuracy that differs by seed, alike for every method."""
    return {"accuracy": accuracy + 2.0 * run.seed}


def test_several_runs_of_a_seed_count_by_their_mean():
    def runs(*accuracies):
        return [Result(quick("sam", i % 2), {"test_accuracy_percent": a})
                for i, a in enumerate(accuracies)]  # fmt: skip

    gap = study_core.compare(runs(90, 80, 92, 84), runs(88, 80))
    assert gap.mean == 2.5 and gap.error == pytest.approx(0.5)  # 91 less 88, 82 less 80


def test_of_radii_with_equal_scores_the_smallest_is_the_best():
    """Means of the same accuracies in another order differ in their last bits."""

    def runs(rho, *accuracies):
        return [Result(quick("sam", i, rho=rho), {"test_accuracy_percent": a})
                for i, a in enumerate(accuracies)]  # fmt: skip

    larger = runs(0.2, 77.41666412353516, 77.41666793823242)
    smaller = runs(0.1, 77.41666412353516, 77.41666412353516)
    assert study_core.mean_accuracy(larger) > study_core.mean_accuracy(smaller)
    found = study_core.best_radii([*larger, *smaller], study_core.mean_accuracy, "method")
    assert found == {"sam": smaller}
    better = runs(0.3, 77.5, 77.5)
    found = study_core.best_radii([*larger, *smaller, *better], study_core.mean_accuracy, "method")
    assert found == {"sam": better}


def test_difference_is_taken_seed_by_seed():
    results = make_up(
        study_lambda.STUDY,
        lambda run: noisy(run, 90 + (run.method == "unified") * (1 + 0.1 * run.seed)),
    )
    by_method = study_core.group(results, "method")
    rho = study_core.group(by_method["unified"], "lam", "rho")[0.0, 0.1]
    gap = study_core.compare(rho, by_method["sgd"])
    assert gap.mean == pytest.approx(1.1)
    assert gap.error == pytest.approx(0.1 / math.sqrt(3))  # not the seeds' spread of 2 points
    assert gap.higher and not gap.lower
    back = study_core.compare(by_method["sgd"], rho)
    assert back.lower and not back.higher
    assert study_core.compare(rho[:1], by_method["sgd"]).error == 0


@pytest.mark.parametrize(
    "winning, expected",
    [(0, "not"), (1, "partly"), (2, "partly"), (3, "reproduced"), (4, "reproduced")],
)
def test_verdict_of_lambda(winning, expected):
    good = study_lambda.RADII[:winning]

    def outcome(run):
        between = run.settings.get("lam") == "1/t" and run.settings["rho"] in good
        return noisy(run, 90 + 3 * between)

    assert outcomes(study_lambda.STUDY, outcome) == [expected]


def test_lambda_that_does_not_beat_sgd_is_not_reproduced():
    def outcome(run):
        return noisy(run, 95 if run.method == "sgd" else 90 + (run.settings["lam"] == 0.5))

    assert outcomes(study_lambda.STUDY, outcome) == ["not"]


@pytest.mark.parametrize(
    "wide, expected",
    [(["ssam", "ssam-usam"], "reproduced"), (["ssam"], "partly"), (["sam", "usam"], "not")],
)
def test_verdict_of_the_learning_rate_range(wide, expected):
    def outcome(run):
        lr = run.settings["lr"]
        limit = 1.0 if run.method in wide else 0.3
        if run.method == "sgd" or lr > limit:
            return noisy(run, 30 if lr > 1 and run.method != "sgd" else 80)
        return noisy(run, 82)

    assert outcomes(study_stability.STUDY, outcome)[0] == expected


def test_method_wins_only_where_it_trains_and_a_diverged_sgd_counts_as_chance():
    def outcome(run):
        lr = run.settings["lr"]
        if run.method == "sgd":
            return {"diverged": lr > 0.5, "accuracy": 80.0}
        return {"accuracy": 81.0 if lr < 1.0 else 45.0, "diverged": lr == 0.1 and run.seed == 2}

    trainings, _ = study_stability.parts(make_up(study_stability.STUDY, outcome))
    won = study_stability.winning_lrs(trainings, "sam")
    assert won == [lr for lr in study_stability.LRS if lr < 1.0 and lr != 0.1]


@pytest.mark.parametrize(
    "steps, expected",
    [
        ({"sam": 1000, "ssam": 100, "usam": 90, "ssam-usam": 95}, "reproduced"),
        ({"sam": 1000, "ssam": 1000, "usam": 1000, "ssam-usam": 100}, "partly"),
        ({"sam": 1000, "ssam": 1000, "usam": 90, "ssam-usam": 80}, "partly"),
        ({"sam": 1000, "ssam": 1000, "usam": 90, "ssam-usam": 95}, "not"),
        ({"sam": 80, "ssam": 1000, "usam": 90, "ssam-usam": 95}, "not"),
    ],
)
def test_verdict_of_the_saddle(steps, expected):
    found = outcomes(study_stability.STUDY, lambda run: {"steps": steps.get(run.method, 50)})
    assert found[1] == expected


@pytest.mark.parametrize(
    "flat, expected",
    [
        (["lightsam-1", "lightsam-2", "lightsam-3"], "reproduced"),
        (["lightsam-2"], "partly"),
        ([], "not"),
        (["sam", "lightsam-2"], "not"),
    ],
)
def test_verdict_of_robustness(flat, expected):
    def outcome(run):
        if run.method in flat:
            return {"accuracy": 97.0 + run.settings["rho"], "loss": 0.1}
        good = run.settings["lr"] in (0.01, 0.1)
        return {"accuracy": 98.0 if good else 12.0, "loss": 0.1 if good else 2.3}

    assert outcomes(study_robustness.STUDY, outcome) == [expected]


def test_flat_but_bad_is_not_reproduced():
    def outcome(run):
        if run.method in study_robustness.LIGHT:
            return {"accuracy": 50.0, "loss": 1.0}
        return {"accuracy": 98.0 if run.settings["lr"] == 0.1 else 12.0, "loss": run.settings["lr"]}

    assert outcomes(study_robustness.STUDY, outcome) == ["not"]


PUBLISHED = study_radius.PUBLISHED


@pytest.mark.parametrize(
    "forms, matching, expected",
    [
        ([PUBLISHED], 4, "reproduced"),
        ([PUBLISHED], 3, "partly"),
        ([("difference", "fresh")], 4, "partly"),
        ([("difference", "fresh")], 3, "partly"),
        ([PUBLISHED], 2, "not"),
        ([], 4, "not"),
    ],
)
def test_verdicts_of_radius(forms, matching, expected):
    """``matching`` starts of ``forms`` end at one radius and at the best accuracy."""

    def outcome(run):
        if run.method == "sam":
            return {"accuracy": 95.0 + 0.5 * run.seed if run.settings["rho"] == 0.1 else 80.0}
        form = run.settings["hessian"], run.settings["gap_batch"]
        start = study_radius.STARTS.index(run.settings["rho"])
        good = form in forms and start < matching
        end = 0.1 * (1 + 0.2 * start) if good else 10.0 ** (2 * start)
        return {"accuracy": 95.1 if good else 85.0, "trace": (run.settings["rho"], end)}

    assert outcomes(study_radius.STUDY, outcome) == [expected, expected]


@pytest.mark.parametrize(
    "gains, expected",
    [
        ({0.0: 1.0, 0.2: 1.0}, "reproduced"),
        ({0.0: 0.0, 0.2: 1.0}, "partly"),
        ({0.0: 0.0, 0.2: 0.0}, "not"),
        ({0.0: -1.0, 0.2: -1.0}, "not"),
    ],
)
def test_verdict_of_regularisation(gains, expected):
    def outcome(run):
        return noisy(run, 90 + (run.method == "samar") * gains[run.label_noise])

    assert outcomes(study_regularisation.STUDY, outcome) == [expected]


@pytest.mark.parametrize(
    "gains, expected",
    [
        ({"digits": 1.0, "text": 1.0}, ["reproduced", "partly", "partly"]),
        ({"mnist5k": 1.0}, ["partly", "partly", "partly"]),
        ({"digits": 1.0, "mnist5k": 1.0, "text": -1.0}, ["not", "partly", "partly"]),
        ({}, ["not", "not", "not"]),
    ],
)
def test_verdicts_of_samar(gains, expected):
    """By how much the second rule is better than the first, both than the base where it is."""

    def outcome(run):
        gain = gains.get(run.data, 0.0)
        better = {"samar-trend": gain, "samar": 0.0, "sam": 0.0}.get(run.method, -abs(gain))
        return {"accuracy": 90 + better + 2.0 * run.seed, "loss": 2 - 0.1 * better + 0.1 * run.seed}

    assert outcomes(study_samar.STUDY, outcome) == expected


@pytest.mark.parametrize(
    "gains, expected",
    [
        ({"digits": 1.0, "text": 1.0}, "reproduced"),
        ({"mnist5k": 1.0}, "partly"),
        ({"digits": 1.0, "mnist5k": 1.0, "text": -1.0}, "not"),
        ({}, "not"),
    ],
)
def test_default_of_lets_is_by_the_mean_over_both_starts(gains, expected):
    def outcome(run):
        gain = gains.get(run.data, 0.0) * (run.settings.get("hessian") == "difference")
        at_low = run.settings["rho"] == min(study_lets.STARTS[run.data])
        better = 3 * gain if at_low else -gain  # from the other start it is the worse one
        return {"accuracy": 90 + better + 2.0 * run.seed, "loss": 2 - 0.1 * better + 0.1 * run.seed}

    assert outcomes(study_lets.STUDY, outcome)[0] == expected


@pytest.mark.parametrize(
    "low, high, expected",
    [
        ({"digits": 0.11, "mnist5k": 0.06, "text": 1e-5}, 1.9, "reproduced"),
        ({"digits": 0.11, "mnist5k": 0.06, "text": 1e-5}, 2.1, "not"),
        ({"digits": 0.09, "mnist5k": 0.06, "text": 1e-5}, 1.0, "partly"),
    ],
)
def test_radius_of_lets_is_compared_with_the_best_fixed_one(low, high, expected):
    """The best fixed radius is the second one, on the text the first; ``high`` is relative."""
    best = {"digits": 0.2, "mnist5k": 0.1, "text": 0.003}

    def outcome(run):
        rho, data = run.settings["rho"], run.data
        if run.method == "sam":
            good = 1.0 if rho == best[data] else 0.0
            return {"accuracy": 80 + good, "loss": 2 - good}
        ends = low[data], high * best[data]
        return {"trace": (rho, ends[study_lets.STARTS[data].index(rho)])}

    assert outcomes(study_lets.STUDY, outcome)[1:] == [expected, expected]


def test_better_than_sgd_and_worse_than_sam_is_not_reproduced():
    level = {"sgd": 90, "sam": 94, "vasso": 92, "samar": 92}
    found = outcomes(study_regularisation.STUDY, lambda run: noisy(run, level[run.method]))
    assert found == ["not"]


def test_mean_lam_of_the_first_and_last_quarter():
    results = make_up(
        study_regularisation.STUDY, lambda run: {"trace": (9.0, 1.0, 2.0, *[5.0] * 4, 3.0, 4.0)}
    )
    first, last = study_regularisation.quarters(results[:1])
    assert (first, last) == ([1.5], [3.5])


@pytest.mark.parametrize(
    "losses, expected",
    [
        ({"sam": 2.2, "functional": 1.9}, ["reproduced", "reproduced"]),
        ({"sam": 2.2, "functional-p": 1.9}, ["reproduced", "reproduced"]),
        ({"sam": 2.2, "functional": 2.1, "functional-p": 2.1}, ["reproduced", "partly"]),
        ({"functional": 2.1}, ["partly", "not"]),
        ({"sam": 1.9}, ["not", "not"]),
    ],
)
def test_verdicts_of_language(losses, expected):
    def outcome(run):
        at_best = run.settings.get("rho") == study_language.RADII["sam"][1]
        low = losses.get(run.method, 2.0) if at_best or run.method == "adamw" else 2.5
        return {"loss": low + 0.1 * run.seed}

    assert outcomes(study_language.STUDY, outcome) == expected


def test_radius_of_language_is_chosen_by_validation():
    def run(rho, seed, validation, test, diverged=False):
        measured = {} if diverged else {"validation_loss": validation, "test_loss": test}
        return Result(Run("sam", {"rho": rho}, seed, 3, "text"), measured, diverged)

    results = [run(0.1, 0, 2.0, 3.0), run(0.1, 1, 2.2, 3.0), run(0.2, 0, 2.15, 1.0)]
    results += [run(0.2, 1, 2.15, 1.0), run(0.3, 0, 1.0, 1.0), run(0.3, 1, 0, 0, diverged=True)]
    best = study_language.pick_best(results)["sam", 3]
    assert [r.run.settings["rho"] for r in best] == [0.1, 0.1]
    assert study_language.test_loss(results[-1]) == math.log(100)


@pytest.mark.parametrize(
    "gains, expected",
    [
        ({"batch": 1, "layer": 1}, ["reproduced", "reproduced"]),
        ({"batch": 0, "layer": 0}, ["partly", "reproduced"]),
        ({"batch": -1, "layer": -1}, ["not", "not"]),
    ],
)
@pytest.mark.parametrize("form", ["sam-on", "asam-on"])
def test_verdicts_of_normalization(form, gains, expected):
    def outcome(run):
        best = run.settings.get("rho") in study_normalization.RADII[run.method][1:2]
        gain = gains[run.settings["network"]] if run.method == form else -5 * ("on" in run.method)
        return noisy(run, 90 + gain + best)

    assert outcomes(study_normalization.STUDY, outcome) == expected


def test_networks_of_the_normalization_study_are_as_they_are_said_to_be():
    for kind, counts in {"batch": (26_090, 224), "layer": (43_402, 768)}.items():
        network = study_normalization.make_network(kind, 8)
        groups = fastsam.normalization_groups(network)
        sizes = [sum(p.numel() for p in group["params"]) for group in groups]
        assert (sum(sizes), sizes[0]) == counts
        assert network(torch.randn(3, 1, 8, 8)).shape == (3, 10)


@pytest.mark.parametrize(
    ("loss", "gain", "expected"),
    [(0.4, 0, "reproduced"), (0.4, -1, "partly"), (0.5, 0, "not"), (0.6, 1, "not")],
)
def test_verdicts_of_flatness(loss, gain, expected):
    def outcome(run):
        strong = run.settings.get("weight", 0) == study_flatness.TRIED["frob"][1]["weight"]
        made = {"loss": loss, **noisy(run, 90 + gain)} if strong else noisy(run, 90)
        return made

    assert outcomes(study_flatness.STUDY, outcome) == ["not", "not", expected]


def test_hessian_is_that_of_finite_differences():
    torch.manual_seed(0)
    model = study_flatness.make_perceptron(2)
    x, y = torch.randn(7, 1, 2, 2), torch.randint(10, (7,))
    found = study_flatness.hessian_of(model, x, y)
    flat = torch.nn.utils.parameters_to_vector(model.parameters()).detach().double()
    model.double()

    def gradient(flat):
        torch.nn.utils.vector_to_parameters(flat, model.parameters())
        loss = torch.nn.functional.cross_entropy(model(x.double()), y)
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, model.parameters())])

    for i in (0, 5, len(flat) - 1):
        step = torch.zeros_like(flat)
        step[i] = 1e-5
        column = (gradient(flat + step) - gradient(flat - step)) / 2e-5
        torch.testing.assert_close(found[i], column, rtol=1e-6, atol=1e-9)
    torch.nn.utils.vector_to_parameters(flat, model.parameters())
    model.float()
    measured = study_flatness.measure(model, x, y)
    found = study_flatness.hessian_of(model, x, y)
    assert measured["hessian_trace"] == pytest.approx(found.trace().item(), rel=1e-9)
    assert measured["frobenius"] == pytest.approx(found.norm().item(), rel=1e-9)


def test_table_of_lambda_is_mean_and_std_of_the_csv(tiny, tmp_path, capsys):
    rows = run_main(tmp_path, "lambda", "--seeds", "2")
    line = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("lam = 1-1/t"))
    values = [float(row["test_accuracy_percent"]) for row in rows if row["lam"] == "1-1/t"]
    assert len(values) == 2
    mean, std = sum(values) / 2, abs(values[0] - values[1]) / math.sqrt(2)
    assert line.split("  ")[-1].strip() == f"{mean:.2f} ± {std:.2f}"


def test_table_of_robustness_is_recomputed_from_the_csv(tiny, tmp_path, capsys):
    rows = run_main(tmp_path, "robustness", "--seeds", "2")
    out = capsys.readouterr().out.splitlines()
    line = next(x for x in out if x.startswith("LightSAM II "))
    cells = [cell.strip() for cell in line.split("  ") if cell.strip()]
    columns = []
    for seed in "01":
        mine = [row for row in rows if row["method"] == "lightsam-2" and row["seed"] == seed]
        accuracies = np.array([float(row["test_accuracy_percent"]) for row in mine])
        losses = np.minimum([float(row["train_loss"]) for row in mine], np.log(10))
        near = 100 * np.mean(accuracies >= accuracies.max() - 2)
        columns.append([
            accuracies.max(), accuracies.mean(), np.ptp(accuracies), accuracies.std(ddof=1), near,
            np.ptp(losses), losses.std(ddof=1),
        ])  # fmt: skip
    mean, std = np.mean(columns, 0), np.std(columns, 0, ddof=1)
    digits = [2, 2, 2, 2, 0, 3, 3]
    expected = [f"{m:.{d}f} ± {s:.{d}f}" for m, s, d in zip(mean, std, digits, strict=True)]
    assert cells == ["LightSAM II", "4", *expected, "0 of 8"]


def test_title_says_how_long_each_data_set_was_trained(tmp_path):
    size = study_lets.STUDY.small
    title = studies.describe("lets", size, study_lets.make_runs(size))
    assert title == (
        "lets: digits, mnist5k, text, 20 % of the training labels wrong, 30 epochs of digits, "
        "6 epochs of mnist5k, 1 epochs of text, 3 seed(s)"
    )
    size = study_language.STUDY.small
    title = studies.describe("language", size, study_language.make_runs(size))
    assert title == "language: text, 3 epochs, 3 seed(s)"


# --- the command line ---

BAD_OPTIONS = [
    ([], ["NAME"]),
    (["nosuch"], ["nosuch", "stability"]),
    (["lambda", "--epochs", "0"], ["--epochs", "'0'", "at least 1"]),
    (["lambda", "--seeds", "two"], ["--seeds", "two", "at least 1"]),
    (["lambda", "--jobs", "0"], ["--jobs", "'0'", "at least 1"]),
    (["lambda", "--label-noise", "1"], ["--label-noise", "'1'", "[0, 1)"]),
    (["lambda", "--device", "tpu"], ["--device", "tpu", "cuda"]),
    (["lambda", "--device", "cuda"], ["--device", "cuda", "cpu"]),
    (["lambda", "--full"], ["--full", "mlxtend"]),
    (["lambda", "--nonsense"], ["--nonsense"]),
]


@pytest.mark.parametrize("options, words", BAD_OPTIONS, ids=lambda value: " ".join(value))
def test_bad_option_ends_with_one_line_and_status_2(options, words, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(sys.modules, "mlxtend", None)  # as if it were not installed
    assert_refused([*options, "--output", str(tmp_path / "out")], words, capsys)
    assert not (tmp_path / "out").exists()


def test_several_processes_on_a_gpu_are_refused(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert_refused(["radius", "--device", "cuda", "--jobs", "2"], ["--jobs", "1", "2"], capsys)


def test_output_that_is_a_file_is_refused(tmp_path, capsys):
    path = tmp_path / "file"
    path.write_text("in the way")
    assert_refused(["radius", "--output", str(path)], ["--output", str(path), "folder"], capsys)


def assert_refused(argv: list[str], words: list[str], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as exit_info:
        studies.main(argv)
    assert exit_info.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1 and captured.err.endswith("\n")
    for word in words:
        assert word in captured.err


def test_options_go_over_the_study_s_own_size(tmp_path):
    study = studies.STUDIES["lambda"]
    options = ["--epochs", "3", "--seeds", "2", "--label-noise", "0", "--output", str(tmp_path)]
    args = studies.parse(["lambda", *options])
    size = studies.choose_size(study, args)
    assert size == study.small._replace(epochs=3, seeds=2, label_noise=0.0)
    runs = study.make_runs(size)
    assert {run.seed for run in runs} == {0, 1} and {run.epochs for run in runs} == {3}
    assert {run.label_noise for run in runs} == {0.0}
