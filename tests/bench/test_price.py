"""``bench/price.py``: its times, its shares, its verdicts and its files."""

import csv

import pytest
import torch

import price
from claims import text_training
from common.text import Text
from prices import measure, report, tasks
from prices.contenders import CONTENDERS
from prices.measure import Outcome, Split, Training, time_steps
from prices.peers import EVERYONE, peers_of
from prices.tasks import TASKS


@pytest.fixture
def small(monkeypatch):
    """A twentieth of the images and of the text."""
    train, test = tasks._images("digits", "cpu")
    few = tuple(type(part)(*(x[:128] for x in part)) for part in (train, test))
    monkeypatch.setattr(tasks, "_images", lambda data, device: few)
    text = text_training.load()
    parts = [part[:4200] for part in text[:3]]
    monkeypatch.setattr(tasks, "load_text", lambda: Text(*parts, text.characters))


def training(contender, task="digits", rho=None, epochs=1, seed=0):
    rho = TASKS[task].radius if rho is None else rho
    return Training(task, contender, rho, seed, epochs)


@pytest.mark.parametrize(
    ("name", "task"),
    [
        *((name, "digits") for name in [*CONTENDERS, *peers_of(CONTENDERS)]),
        ("selected", "text"),
    ],
)
def test_passes_are_as_many_as_the_table_says(name, task, small):
    """A forward and backward pass counts 1, a forward pass a third, each by its part of a batch."""
    problem, loop, _ = measure.prepare(training(name, task), steps=30)
    batches = [batch for _ in range(15) for batch in problem.epoch()][:30]
    whole = [batch for batch in batches if len(batch[1]) == problem.batch_size]
    original, seen = problem.losses, []

    def losses(x, y):
        seen.append(len(y) / problem.batch_size / (1 if torch.is_grad_enabled() else 3))
        return original(x, y)

    problem.losses = losses
    for batch in (whole * 15)[:30]:
        loop.step(batch)
        loop.after()
    assert sum(seen) / 30 == pytest.approx(EVERYONE[name].passes, abs=0.04)


@pytest.mark.parametrize("task", ["digits", "text"])
def test_without_a_radius_all_are_the_base(task, small):
    """So they share weights and batches."""
    epochs = {"digits": 8, "text": 2}[task]
    base = measure.train(training("base", task, epochs=epochs))
    assert base.score > TASKS[task].chance
    # ESAM's selection trains on a part of the samples; pytorch-optimizer's LookSAM scales up the
    # rounding of two equal gradients
    others = {"base", "selected", "pytorch-optimizer"}
    for name in {*CONTENDERS, *peers_of(CONTENDERS)} - others:
        found = measure.train(training(name, task, rho=0.0, epochs=epochs))
        assert found.score == pytest.approx(base.score, abs=1e-3), name


def test_a_training_that_diverges_gets_the_score_of_chance(small):
    found = measure.train(training("sam", rho=1e30))
    assert (found.score, found.diverged) == (10.0, True)


def test_times_are_split_without_a_rest(small, monkeypatch):
    """With a clock that stands still outside closures and steps, by hand."""
    ticks = iter(range(10_000))
    monkeypatch.setattr(measure, "now", lambda device: float(next(ticks)))
    monkeypatch.setattr(measure, "STEPS", 2)
    splits = time_steps("digits", ["base", "sam"], rounds=1)
    # of two steps: a look before and after each, two around each closure, two around all
    assert splits["base"] == Split(1000.0, 2000.0, 1500.0)
    assert splits["sam"] == Split(2000.0, 3000.0, 1500.0)


def outcome(name, score, rho=0.1, seed=0, diverged=False, validation=None):
    validation = score if validation is None else validation
    return Outcome(Training("digits", name, rho, seed, 40), score, diverged, validation, score)


def found(**scores):
    """What was found, from each contender's scores by seed, and its time over the base's."""
    times = {name: Split(time, 0.0, 0.0) for name, (time, _) in scores.items()}
    runs = [
        outcome(name, score, seed=seed)
        for name, (_, of_seeds) in scores.items()
        for seed, score in enumerate(of_seeds)
    ]
    return report.Found("digits", times, runs)


def test_share_of_the_gain():
    one = found(base=(1, [70, 72]), sam=(2, [90, 92]), looksam=(1.2, [89, 90]), msam=(1, [80, 78]))
    best = one.best()
    assert one.share(best["looksam"]) == pytest.approx(100 * 18.5 / 20)
    assert one.ratio("looksam") == 1.2
    lines = report.verdicts(one)
    assert "LookSAM(k=5) keeps 92.5 % of SAM's gain (goal 90 %): met" in lines[0]
    assert "MSAM keeps 40.0 % of SAM's gain (goal 85 %): MISSED" in lines[1]
    slow = found(base=(1, [70]), sam=(2, [90]), looksam=(1.4, [90]), msam=(1.1, [88]))
    assert "MSAM keeps 90.0 %" in report.verdicts(slow)[0]


def test_times_against_their_goals():
    one = found(base=(2, [70]), sam=(4, [90]), msam=(2.2, [88]), looksam=(2.8, [88]))
    assert report.time_verdicts(one) == [
        "A step of MSAM takes 1.10 times the base's (goal 1.1): met.",
        "A step of LookSAM(k=5) takes 1.40 times the base's (goal 1.35): MISSED.",
    ]


def test_no_share_where_sam_gains_nothing():
    one = found(base=(1, [70, 80]), sam=(2, [74, 82]), msam=(1, [80, 90]))
    assert one.share(one.best()["msam"]) is None
    assert report.verdicts(one) == [
        "SAM gains nothing here that is above the error of its mean: no share is told."
    ]


def test_the_best_radius_is_that_of_the_highest_mean_in_validation():
    one = found(base=(1, [70]), sam=(2, [90]))
    runs = [*one.equal_epochs, outcome("sam", 95, rho=0.2), outcome("sam", 10, 0.4, diverged=True)]
    runs.append(outcome("sam", 99, rho=0.3, validation=94))
    one = report.Found("digits", one.times, runs)
    assert one.best()["sam"][0].training.rho == 0.2
    assert report.shown([outcome("sam", 10, diverged=True)], "digits") == "10.0 (1 div.)"
    assert report.shown([outcome("sam", -1.5)], "text") == "1.5000"


def test_all_train_for_the_time_of_the_base_and_of_sam(tmp_path):
    times = {"base": Split(1, 0, 0), "sam": Split(2, 0, 0.1), "msam": Split(1, 0.1, 0)}
    argv = ["--tasks", "digits", "--seeds", "2", "--epochs", "10", "--output", str(tmp_path)]
    args = price.parse(argv)
    best = {"base": 0.0, "sam": 0.2, "msam": 1.0}
    runs = price.equal_time(TASKS["digits"], times, best, "sam", args)
    assert [(t.contender, t.rho, t.seed, t.epochs) for t in runs] == [
        ("base", 0.0, 0, 21.0), ("base", 0.0, 1, 21.0),
        ("msam", 1.0, 0, pytest.approx(21 / 1.1)), ("msam", 1.0, 1, pytest.approx(21 / 1.1)),
    ]  # fmt: skip
    runs = price.equal_time(TASKS["digits"], times, best, "base", args)
    assert [(t.contender, t.seed, t.epochs) for t in runs] == [
        ("sam", 0, pytest.approx(10 / 2.1)), ("sam", 1, pytest.approx(10 / 2.1)),
        ("msam", 0, pytest.approx(10 / 1.1)), ("msam", 1, pytest.approx(10 / 1.1)),
    ]  # fmt: skip


def test_validation_images_are_not_trained_on():
    train, _ = tasks._images("digits", "cpu")
    problem = TASKS["digits"].make(0, "cpu")
    count = problem.count
    assert (count, len(problem.validation.y)) == (len(train.y) - len(train.y) // 5, 239)
    assert torch.equal(torch.cat([problem.x, problem.validation.x]), train.x)
    assert torch.equal(problem.validation.y, train.y[count:])  # the right labels
    assert (problem.y != train.y[:count]).sum() == round(tasks.WRONG * count)


def test_the_score_after_the_best_epoch(small, monkeypatch):
    scores = iter([(50, 1), (80, 2), (70, 3)])
    present = []

    def validate(problem):
        present[:] = next(scores)
        return present[0]

    monkeypatch.setattr(tasks.ImageProblem, "validate", validate)
    monkeypatch.setattr(tasks.ImageProblem, "score", lambda problem: 10.0 + present[1])
    found = measure.train(training("base", epochs=2.5))  # looked at after 1, 2 and 2.5
    assert (found.score, found.validation, found.stopped) == (13.0, 70, 12.0)


def test_a_part_of_an_epoch_is_so_many_steps(small):
    problem, _, steps = measure.prepare(training("sam", epochs=2.5))
    assert (problem.steps, steps) == (2, 5)


def test_radii_go_on_where_the_best_is_at_an_end(tmp_path):
    argv = ["--tasks", "digits", "--seeds", "1", "--epochs", "10", "--output", str(tmp_path)]
    args = price.parse(argv)
    scores = {
        "sam": {0.1: 80, 0.2: 90, 0.4: 70}, "msam": {0.3: 90, 1: 80, 2: 10},
        "delayed": {0.1: 80, 0.2: 90, 0.4: 95}, "looksam": dict.fromkeys((1, 2, 4, 8, 16, 32), 5),
        "base": {0.0: 50},
    }  # fmt: skip
    runs = [outcome(name, x, rho) for name, radii in scores.items() for rho, x in radii.items()]
    one = report.Found("digits", {}, runs)
    found = price.further_radii(TASKS["digits"], one, args)
    assert [(t.contender, t.rho) for t in found] == [("msam", 0.15), ("delayed", 0.8)]


def test_the_median_turn_and_its_variation():
    turns = [Split(total, 0.0, 0.0) for total in (9, 10, 11, 13, 100)]
    assert measure.median(turns) == Split(11, 0.0, 0.0, pytest.approx(100 * 3 / 11))


def test_writes_its_three_files(small, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(measure, "STEPS", 5)
    monkeypatch.setattr(price, "MOST_RADII", 3)
    folder = tmp_path / "made" / "here"
    argv = ["--tasks", "digits", "text", "--methods", "msam", "--epochs", "1", "--seeds", "1",
            "--rounds", "1", "--jobs", "1", "--output", str(folder)]  # fmt: skip
    assert price.main(argv) == 0
    text = (folder / "price.txt").read_text(encoding="utf-8")
    assert text.strip() in capsys.readouterr().out
    assert all(
        title in text
        for title in (
            "base alone",
            "SAM",
            "MSAM",
            "digits, 40% of the labels wrong: 1 epoch(s)",
            "text, clean: ",
        )
    )
    assert (folder / "price.png").read_bytes().startswith(b"\x89PNG")
    with (folder / "price.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    at_equal_epochs = [row for row in rows if row["comparison"] == "equal_epochs"]
    assert len(at_equal_epochs) == 2 * (1 + 3 + 3)
    of_peers = {row["contender"] for row in rows if row["comparison"] == "peers"}
    assert of_peers == {"plain-sam", "plain-msam"}
    assert {row["contender"] for row in rows} == {"base", "sam", "msam"} | of_peers
    assert "SAM, plain loop" in text and "MSAM, plain loop" in text
    assert all(float(row["time_ratio"]) > 0 for row in rows)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--tasks", "cifar"], ["cifar", "digits"]),
        (["--methods", "sgd"], ["sgd", "looksam"]),
        (["--epochs", "0"], ["--epochs", "'0'"]),
        (["--device", "cuda"], ["--device", "cuda", "cpu"]),
    ],
)
def test_bad_option_ends_with_one_line_and_status_2(options, words, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        price.parse(options)
    assert ended.value.code == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and all(word in err for word in words)
