"""``bench/report.py``: verdicts, results on disk, the page's section, a whole run on tiny sets."""

import json
import platform
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import host_time
import report
from common.pages import PAGE, link
from speed import report_page, report_sections, report_verdicts
from speed.contenders import COMPILED, METHODS
from speed.measure import Times, Timing
from speed.report_verdicts import Report, Row

SIZES = {"resnet50": 25_557_032, "gpt2": 124_439_808, "small": 271_898}
PEERS = {
    "pytorch-optimizer": 4.0, "pytorch-optimizer, fused base": 3.0,
    "unifiedsam": 3.2, "unifiedsam, fused base": 2.3,
}  # fmt: skip


def timing(section, name, method, contender, seconds, size=0, tensors=161, parameters=None):
    parameters = SIZES.get(name, 1000) if parameters is None else parameters
    times = Times(seconds, 0.9 * seconds, 1.1 * seconds, 41, 1)
    return Timing(section, name, method, contender, tensors, parameters, size, times)


def sam(name, method, ours, copy=1.0, section="sam", more=()):
    """fastsam's time, the copy's, and peers that take 3 and 2.3 to 4 times the copy's."""
    size = METHODS[method].scratch_bytes
    entries = {"fastsam": ours, f"copy, {size} B": copy, **PEERS, **dict(more)}
    return [timing(section, name, method, who, x, size) for who, x in entries.items()]


def host(tensors, sweep, sgd, adamw):
    name, made = f"{tensors} tensors", [("", "sweep", sweep)]
    for method, seconds in (("sam-sgd", sgd), ("sam-adamw", adamw)):
        made += [(method, "step", seconds), (method, "step, moved gradients", 2 * seconds)]
    return [timing("host", name, m, who, s, tensors=tensors) for m, who, s in made]


GROWTH = [
    timing("growth", f"uniform:{n}", "sam-sgd", "fastsam", s * n, 36, parameters=n)
    for n, s in ((10**7, 1.0e-9), (10**8, 1.05e-9), (2 * 10**8, 0.98e-9))
]
HOST = [*host(161, 1e-5, 8e-5, 9e-5), *host(1000, 5e-5, 3e-4, 3e-4)]
HOST += [*host(100, 1e-5, 4e-5, 1), *host(300, 1e-5, 1.2e-4, 1), *host(3000, 1e-5, 1.2e-3, 1)]
METHOD_TIMES = [
    timing("methods", "resnet50", "asam-sgd", "fastsam", 1.3, 40),
    timing("methods", "resnet50", "lightsam-3", "fastsam", 2.0, 56),
    timing("methods", "resnet50", "", "copy, 40 B", 1.0, 40),
    timing("methods", "resnet50", "", "copy, 56 B", 1.5, 56),
]
CPU_TIMES = [
    *sam("resnet50", "sam-sgd", 1.16), *sam("resnet50", "sam-adamw", 1.0),
    *sam("small", "sam-sgd", 2.3), *sam("small", "sam-adamw", 2.31),
    *METHOD_TIMES, *HOST, *GROWTH,
]  # fmt: skip


def verdicts(rows):
    return [(round(row.value, 4), row.target, row.relation, row.verdict) for row in rows]


@pytest.mark.parametrize(
    ("value", "target", "relation", "verdict"),
    [
        (1.15, 1.15, "≤", "pass"),
        (1.1500001, 1.15, "≤", "FAIL"),
        (0.5, 1.15, "≤", "pass"),
        (2.0, 2.0, "≥", "pass"),
        (1.9999999, 2.0, "≥", "FAIL"),
        (3.0, 2.0, "≥", "pass"),
        (float("nan"), 2.0, "≥", "FAIL"),
        (float("nan"), 2.0, "≤", "FAIL"),
        (3.0, None, "≥", "-"),
        (None, 2.0, "≥", "-"),
    ],
)
def test_verdict(value, target, relation, verdict):
    assert Row("copy", "what", value, target, relation).verdict == verdict


def test_cells_say_why_nothing_was_measured():
    assert Row("copy", "a", None, 0.9, "≥", "not measured: no GPU").cells() == [
        "a", "not measured: no GPU", "≥ 0.9", "-",
    ]  # fmt: skip
    assert Row("copy", "b", 1.23456).cells() == ["b", "1.235", "-", "-"]


def test_judge_on_a_cpu():
    sets = ["resnet50", "small"]

    def judge(section):
        return report_verdicts.judge(CPU_TIMES, [section], sets, on_gpu=False)

    assert verdicts(judge("copy")) == [
        (1.16, 1.15, "≤", "FAIL"), (1.0, 1.15, "≤", "pass"),
        (2.3, None, "≤", "-"), (2.31, None, "≤", "-"),
    ]  # fmt: skip
    assert judge("copy")[1].what == (
        "ResNet-50 · SAM + AdamW: time ÷ that of a copy of 44 B per parameter"
    )
    rows = judge("peers")
    assert verdicts(rows) == [
        (2.7586, 2.0, "≥", "pass"), (1.9828, 1.7, "≥", "pass"),
        (3.2, 3.2, "≥", "pass"), (2.3, 2.3, "≥", "pass"),
        (1.0, 1.0, "≥", "pass"), (0.9957, 1.0, "≥", "FAIL"),
    ]  # fmt: skip
    assert [re.search(r"\((.*)\)", row.what)[1] for row in rows] == [
        "unifiedsam", "unifiedsam, fused base", "unifiedsam", "unifiedsam, fused base",
        "unifiedsam, fused base", "unifiedsam, fused base",
    ]  # fmt: skip
    assert verdicts(judge("methods")) == [
        (1.3, 1.3, "≤", "pass"), (1.3333, 1.3, "≤", "FAIL"),
    ]  # fmt: skip
    assert verdicts(judge("host")) == [
        (8.0, 8.0, "≤", "pass"), (16.0, None, "≤", "-"), (9.0, 8.0, "≤", "FAIL"),
        (18.0, None, "≤", "-"), (6.0, 6.0, "≤", "pass"), (12.0, None, "≤", "-"),
        (6.0, 6.0, "≤", "pass"), (12.0, None, "≤", "-"),
    ]  # fmt: skip
    ratio, per_tensor, slope, start = judge("growth")
    assert (round(ratio.value, 4), ratio.verdict) == (1.0714, "pass")
    assert (per_tensor.value, per_tensor.verdict) == (pytest.approx(1.0), "pass")
    assert slope.value > 0 and slope.verdict == start.verdict == "-"


def test_fit_of_host_times():
    timings = [
        timing("host", "", "sam-sgd", "step", 2e-6 * n + 3e-5, tensors=n) for n in (100, 300, 3000)
    ]
    assert report_verdicts.host_line(timings) == pytest.approx((2e-6, 3e-5))


def test_judge_on_a_gpu():
    timings = [
        *sam("gpt2", "sam-sgd", 1.1, more={COMPILED: 1.2}.items()),
        *sam("small", "sam-sgd", 1.25, more={COMPILED: 2.4}.items()),
        *sam("small", "sam-sgd", 1.25, section="wall", more={COMPILED: 2.4}.items()),
        timing("methods", "gpt2", "lightsam-3", "fastsam", 2.0, 60),
        timing("methods", "gpt2", "", "copy, 60 B", 1.7, 60),
    ]

    def judge(section):
        return report_verdicts.judge(timings, [section], ["gpt2", "small"], on_gpu=True)

    assert verdicts(judge("copy")) == [(0.9091, 0.9, "≥", "pass"), (0.8, None, "≥", "-")]
    assert verdicts(judge("methods")) == [(0.85, 0.85, "≥", "pass")]
    assert verdicts(judge("peers")) == [
        (2.0909, 1.5, "≥", "pass"), (1.0909, 1.1, "≥", "FAIL"),
        (1.84, 1.5, "≥", "pass"), (1.92, 2.0, "≥", "FAIL"),
        (1.84, None, "≥", "-"), (1.92, None, "≥", "-"),
    ]  # fmt: skip


def test_rows_without_peers_say_so():
    timings = [t for t in sam("small", "sam-sgd", 1.0) if t.contender not in PEERS]
    timings += [t for t in sam("small", "sam-adamw", 1.0) if t.contender not in PEERS]
    rows = report_verdicts.judge_peers(report_verdicts.Medians(timings), ["small"])
    assert [row.cells()[1:] for row in rows] == [
        ["not measured: none is installed", "≥ 1", "-"]
    ] * 2


def make_report(**changes):
    hardware = {"kind": "cpu", "name": "Some CPU", "cores": 2, "threads": 2}
    versions = {"Python": "3.11.1", "torch": "2.13.0", "fastsam": "0.1.0", "unifiedsam": "1.0.0"}
    rows = report_verdicts.judge(CPU_TIMES, ["copy"], ["resnet50"], on_gpu=False)
    made = Report(hardware, versions, "2026-01-02", 41, False, CPU_TIMES, rows)
    return replace(made, **changes)


def make_gpu_report():
    timings = sam("gpt2", "sam-sgd", 2e-3, 1.8e-3, more={COMPILED: 2.2e-3}.items())
    hardware = {"kind": "gpu", "name": "NVIDIA Some GPU", "processor": "Some CPU"}
    return make_report(hardware=hardware, timings=timings, rounds=5)


@pytest.mark.parametrize("made", [make_report(), make_gpu_report()])
def test_results_survive_the_file(made, tmp_path):
    rows = [*made.rows, *report_verdicts.not_measured(["copy", "peers", "methods"])]
    made = replace(made, rows=rows)
    path = tmp_path / f"{made.name}.json"
    made.save(path)
    assert Report.load(path) == made
    assert path.name == ("nvidia-some-gpu.json" if made.on_gpu else "cpu.json")
    entry = json.loads(path.read_text())["rows"][0]
    assert entry["verdict"] == "FAIL" and entry["target"] == 1.15  # readable without this code


def write_page(folder, *reports):
    for made in reports:
        made.save(folder / f"{made.name}.json")
    page = folder / "page.md"
    page.write_text("above\n<!-- performance -->\nold\n<!-- /performance -->\nbelow\n")
    report_page.rewrite(page, folder, "here")
    return page.read_text()


def test_page_of_a_cpu(tmp_path):
    text = write_page(tmp_path, make_report())
    assert text.startswith("above\n<!-- performance -->\n") and "old" not in text
    assert text.endswith("\n<!-- /performance -->\nbelow\n")
    assert "Some CPU, 2 cores; torch 2.13.0; 2026-01-02" in text
    words = " ".join(text.split())
    assert "SAM of unifiedsam 1.0.0" in words and "41 turns, 21 on sets above 50M" in words
    assert (
        "| ResNet-50 · SAM + SGD (161 tensors, 25.6M) | 1160.0 ms | 1.16 | 2.76× (unifiedsam) | "
        "1.98× (unifiedsam) |"
    ) in text
    assert "| LightSAM III | 56 | 2000.0 ms | 1.33 |" in text
    assert "| SAM + SGD, 1,000 tensors | 300 µs | 6.0 | 12.0 |" in text
    assert "10M to 200M parameters the time per parameter of SAM + SGD varies by 7 %." in words
    assert "(here/cpu-bars.png)" in text and "(here/cpu-growth.png)" in text
    prose = [line for line in text.splitlines() if not line.startswith("|")]
    assert max(map(len, prose)) <= 100
    report_page.rewrite(tmp_path / "page.md", tmp_path, "here")
    assert (tmp_path / "page.md").read_text() == text


def test_gpus_come_after_the_cpus(tmp_path):
    text = write_page(tmp_path, make_gpu_report(), make_report())
    assert "No GPU" not in text and "do_bench" in text
    assert text.index("Some CPU, 2 cores") < text.index("NVIDIA Some GPU; torch")
    assert "| 2.0 ms | 1.11 |" in text and "| 1.10× |" in text  # over the copy, and compiled
    assert "(here/nvidia-some-gpu-bars.png)" in text


@pytest.mark.parametrize(
    "text",
    ["", "<!-- performance -->", "<!-- /performance --><!-- performance -->",
     2 * "<!-- performance --><!-- /performance -->"],
)  # fmt: skip
def test_page_without_its_marks_stays(text, tmp_path):
    make_report().save(tmp_path / "cpu.json")
    page = tmp_path / "page.md"
    page.write_text(text)
    with pytest.raises(ValueError, match="page.md must have <!-- performance --> and"):
        report_page.rewrite(page, tmp_path, "here")
    assert page.read_text() == text


def test_the_page_is_of_the_results_that_are_here():
    text = report_page.section([Report.load(path) for path in sorted(report.OUTPUT.glob("*.json"))],
                               link(report.OUTPUT, PAGE))  # fmt: skip
    assert f"<!-- performance -->\n{text}\n<!-- /performance -->" in PAGE.read_text()


def test_quick_results_do_not_reach_the_page(tmp_path):
    with pytest.raises(ValueError, match="no results of a full run"):
        write_page(tmp_path, make_report(quick=True))


@pytest.fixture
def tiny(monkeypatch):
    """Growth and host times on few and small tensors."""
    monkeypatch.setattr(report_sections, "GROWTH_PARAMETERS", (100, 400))
    for name, value in (("HOST_TENSORS", (3, 6)), ("GROWTH_TENSORS", (2, 6))):
        monkeypatch.setattr(report_sections, name, value)
        monkeypatch.setattr(report_verdicts, name, value)
    monkeypatch.setattr(report_page, "HOST_TENSORS", (3, 6))


def test_quick_run_from_end_to_end(tiny, tmp_path, capsys):
    pytest.importorskip("pytorch_optimizer")
    pytest.importorskip("unifiedsam")
    folder = tmp_path / "made" / "here"
    sets = ["uniform:200:4", "uniform:30:30"]
    options = ["--quick", "--device", "cpu", "--output", str(folder), "--sets", *sets]
    assert report.main(options) == 0
    out, err = capsys.readouterr()
    found = Report.load(folder / "cpu.json")
    assert found.quick and found.rounds == 3 and found.versions["torch"] == torch.__version__
    assert [row.section for row in found.rows if row.value is not None] == (
        ["copy"] * 4 + ["peers"] * 4 + ["methods"] * 5 + ["host"] * 8 + ["growth"] * 4
    )
    assert [row.note[:12] for row in found.rows if row.value is None] == ["not measured"] * 7
    assert all(t.times.rounds == 3 and t.times.median > 0 for t in found.timings)
    for row in found.rows:
        assert re.search(rf"^{re.escape(row.what)} .*{row.verdict}$", out, re.MULTILINE)
    assert "too few rounds" in out and "uniform:200:4 (4 tensors, 200 parameters)" in out
    assert err.count("uniform:") == 5
    for what in ("bars", "growth"):
        assert (folder / f"cpu-{what}.png").read_bytes().startswith(b"\x89PNG")
    text = (folder / "cpu.json").read_text()
    assert str(Path.home()) not in text and str(tmp_path) not in text
    assert f'"{platform.node()}"' not in text

    page = tmp_path / "page.md"
    page.write_text("<!-- performance -->\n<!-- /performance -->\n")
    options = ["--page", str(page), "--output", str(folder)]
    assert report.main(options) == 2  # a quick run's
    assert "report.py: error: no results of a full run" in capsys.readouterr().err
    replace(found, quick=False).save(folder / "cpu.json")
    assert report.main(options) == 0
    text = page.read_text()
    assert "(made/here/cpu-bars.png)" in text and "uniform:30:30 · SAM + AdamW (30 tensors" in text


def test_a_part_is_not_written_over_the_whole(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "OUTPUT", tmp_path / "whole")
    options = ["--sections", "copy", "--sets", "uniform:9:2", "--rounds", "1", "--device", "cpu"]
    assert report.main(options) == 0
    assert "nothing written" in capsys.readouterr().out and not (tmp_path / "whole").exists()
    whole = report.parse(["--device", "cpu"])
    assert whole.output == tmp_path / "whole" and whole.rounds == whole.host_rounds == 41
    assert whole.sections == list(report.SECTIONS) and whole.sets == list(report.SETS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sets", "vgg"], "must be one of resnet50, .*, got 'vgg'"),
        (["--sections", "all"], "invalid choice: 'all'"),
        (["--rounds", "0"], "an integer of at least 1, got '0'"),
    ],
)
def test_bad_options_end_with_status_2(options, message, capsys):
    with pytest.raises(SystemExit) as ended:
        report.main(options)
    assert ended.value.code == 2
    err = capsys.readouterr().err
    assert re.search(message, err) and err.count("\n") == 1


def test_host_child_gets_the_interpreter(monkeypatch, capsys):
    """Run by hand without it, the script says what is missing instead of failing somewhere."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        host_time.main(["--tensors", "1"])
    assert "must have TRITON_INTERPRET=1" in capsys.readouterr().err
