"""``bench/price.py --page``: the tables of the documents, from price.csv."""

import csv

import pytest

import price
from prices import page
from prices.contenders import CONTENDERS
from prices.tasks import TASKS


def line(task, contender, rho, seed, score, comparison="equal_epochs", **more):
    return {
        "task": task, "comparison": comparison, "contender": contender, "rho": rho, "seed": seed,
        "score": score, "validation": score, "stopped": score + 1, "time_ratio": 1.5,
    } | more  # fmt: skip


def lines():
    """All tasks and contenders, two seeds and two radii; SAM's first is better in validation."""
    made = []
    for task in TASKS:
        unit = 1 if TASKS[task].unit == "%" else -1 / 20
        for name in CONTENDERS:
            for rho in (0.0,) if name == "base" else (0.1, 0.2):
                for seed in (0, 1):
                    score = unit * (80 + 10 * rho + seed)
                    made.append(line(task, name, rho, seed, score))
        for seed in (0, 1):
            made.append(line(task, "msam", 0.2, seed, unit * (60 + seed), "sam_time"))
    return made


def change(made, task, contender, rho, **values):
    for found in made:
        if (found["task"], found["contender"], found["rho"]) == (task, contender, rho):
            found.update(values)


def write(made, folder):
    with (folder / "price.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, made[0])
        writer.writeheader()
        writer.writerows(made)
    return folder / "price.csv"


def rows(table):
    """Cells by the first one of their line."""
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in table.split("\n")]
    return {first: rest for first, *rest in cells}


def test_tables_have_the_numbers_of_the_file(tmp_path):
    made = lines()
    change(made, "digits", "sam", 0.1, validation=99)
    change(made, "digits", "msam", 0.2, time_ratio=1.204)
    made.append(line("digits", "looksam", 0.4, 0, 10.0))
    tables = page.tables(page.Results(write(made, tmp_path)))

    digits = rows(tables["docs/choosing.md", "digits"])
    assert digits["method"] == [
        "time of a step", "`rho`", "equal epochs", "best epoch", "SAM's time"
    ]  # fmt: skip
    assert digits["the base alone"] == [
        "1.50", "-", "80.5 ± 0.7", "81.5 ± 0.7", "80.5 ± 0.7"
    ]  # fmt: skip
    assert digits["`MSAM`"] == ["1.20", "0.2\\*", "82.5 ± 0.7", "83.5 ± 0.7", "60.5 ± 0.7"]
    assert digits["`SAM`"][1:] == ["0.1\\*", "81.5 ± 0.7", "82.5 ± 0.7", "81.5 ± 0.7"]
    assert digits["`LookSAM(k=5)`"][1] == "0.2"  # not at an end
    text = rows(tables["docs/choosing.md", "text"])
    assert text["`SAM`"][1:3] == ["0.1\\*", "4.075 ± 0.035"]  # losses with their sign back

    images = rows(tables["README.md", "images"])
    assert images["method"][:3] == ["time of a step", "digits: equal epochs", "digits: SAM's time"]
    assert images["`MSAM`"][0] == "1.20 / 1.50" and len(images) == 2 + len(page.FEW)

    radii = rows(tables["docs/choosing.md", "radii"])
    assert radii["`LookSAM(k=5)`"][0] == "0.1: 81.5, **0.2: 82.5**, 0.4: fails"
    assert radii["`LookSAM(k=5)`"][2] == "**0.1: 4.075**, 0.2: 4.125"
    assert set(radii) == {"method", "---", *page.ROWS.values()} - {page.ROWS["base"]}


def test_some_runs_that_fail_are_counted(tmp_path):
    made = lines()
    change(made, "digits", "sam", 0.2, score=10.0, validation=10.0)
    made.append(line("digits", "sam", 0.2, 2, 90.0))
    radii = page.tables(page.Results(write(made, tmp_path)))["docs/choosing.md", "radii"]
    assert rows(radii)["`SAM`"][0] == "**0.1: 81.5**, 0.2: 36.7 (2 of 3 fail)"


def test_rewrites_only_what_is_between_the_marks(tmp_path, monkeypatch, capsys):
    path = write(lines(), tmp_path)
    (tmp_path / "docs").mkdir()
    for name in ("README.md", "docs/choosing.md"):
        text = (page.ROOT / name).read_text(encoding="utf-8")
        (tmp_path / name).write_text(text, encoding="utf-8")
    monkeypatch.setattr(page, "ROOT", tmp_path)
    page.rewrite(path)
    once = (tmp_path / "docs/choosing.md").read_text(encoding="utf-8")
    assert "| `MSAM` | 1.50 | 0.2\\* | 82.5 ± 0.7 |" in once and "## Which radius?" in once
    page.rewrite(path)
    assert (tmp_path / "docs/choosing.md").read_text(encoding="utf-8") == once

    assert price.main(["--page", "--output", str(tmp_path)]) == 0
    (tmp_path / "README.md").write_text("no marks", encoding="utf-8")
    assert price.main(["--page", "--output", str(tmp_path)]) == 2
    assert "README.md must have <!-- price: images -->" in capsys.readouterr().err


@pytest.mark.parametrize("lacking", ["contender", "column"])
def test_a_file_that_is_not_whole_changes_nothing(lacking, tmp_path, capsys):
    made = lines()
    if lacking == "contender":
        made = [found for found in made if found["contender"] != "part"]
    else:
        made = [{key: x for key, x in found.items() if key != "stopped"} for found in made]
    write(made, tmp_path)
    before = (page.ROOT / "README.md").read_text(encoding="utf-8")
    assert price.main(["--page", "--output", str(tmp_path)]) == 2
    assert "price.csv lacks" in capsys.readouterr().err
    assert (page.ROOT / "README.md").read_text(encoding="utf-8") == before


def test_the_documents_are_of_the_results_that_are_here():
    made = page.tables(page.Results(price.OUTPUT / "price.csv"))
    for (name, table), text in made.items():
        found = (page.ROOT / name).read_text(encoding="utf-8")
        assert f"{page.BEGIN.format(table)}\n{text}\n{page.END.format(table)}" in found, name
