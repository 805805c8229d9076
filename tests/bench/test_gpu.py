"""``bench/gpu.py``, without a GPU: which stages run, how they end, what is written of them."""

import dataclasses
import importlib.util
import json
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch

from fastsam.kernels.layout import Launch, Launches

from common.options import OneLineParser
from common.pages import PAGE
from on_gpu import checks, figures, kernels, problems, profiles, records, report_page, steps
from on_gpu.clock import Clock, launch_names
from on_gpu.records import DONE, FAILED, MACHINE, RUNNING, TIMED_OUT, Record
from on_gpu.stages import STAGES, Context
from speed.contenders import COMPILED, Contender

ROOT = Path(__file__).resolve().parents[2]
SPEC = importlib.util.spec_from_file_location("bench_gpu", ROOT / "bench" / "gpu.py")
gpu = importlib.util.module_from_spec(SPEC)  # `import gpu` may find another
SPEC.loader.exec_module(gpu)

machine = dict.fromkeys(MACHINE, "?") | {
    "gpu": "Some GPU", "driver": "555.1", "torch": "2.13.0", "triton": "3.9.0",
    "platform": "CUDA 13.0", "date": "2026-01-02", "commit": "abc",
}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    """Where results go."""
    path = tmp_path / "gpu-x"
    path.mkdir()
    return path


@pytest.fixture
def parse(monkeypatch, folder):
    """The command line, as on a machine with a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    return lambda *argv: gpu.parse(["--output", str(folder), *argv])


# --- the command line ------------------------------------------------------------------------


def test_without_a_gpu_it_ends_with_one_line(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        gpu.main([])
    assert ended.value.code == 2
    assert capsys.readouterr().err == (
        "gpu.py: error: no GPU: torch.cuda.is_available() is False\n"
    )


@pytest.mark.parametrize("argv", [["--minutes", "0"], ["--stages", "nonsense"], ["--run", "x"],
                                  ["--output", "results"]])  # fmt: skip
def test_a_bad_option(argv, parse, capsys):
    with pytest.raises(SystemExit) as ended:
        parse(*argv)
    assert ended.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1


def test_stages_keep_their_order(parse):
    assert parse("--stages", "graphs", "memory").stages == ["memory", "graphs"]
    args = parse("--python", "python3 'a b.py'")
    assert args.stages == list(STAGES) and args.python == ["python3", "a b.py"]
    assert args.minutes == 12 and isinstance(OneLineParser(), OneLineParser)


def test_all_stages_fit_the_budget_and_can_be_imported():
    assert sum(stage.seconds for stage in STAGES.values()) <= 60 * gpu.MINUTES
    for stage in STAGES.values():
        module, _, name = stage.function.partition(":")
        assert callable(getattr(importlib.import_module(f"on_gpu.{module}"), name))


# --- which stages run ------------------------------------------------------------------------


class Runs:
    """Stands for ``run_stage``: every stage takes so long, and is done or not."""

    def __init__(self, seconds=50.0, **statuses):
        self.now, self.seconds, self.statuses = 0.0, seconds, statuses
        self.limits, self.said = {}, []

    def __call__(self, name, limit):
        self.limits[name] = limit
        taken = min(limit, self.seconds)
        self.now += taken
        return Record(name, machine, status=self.statuses.get(name, DONE), seconds=taken)

    def conduct(self, args, on=machine):
        return gpu.conduct(args, on, self, self.said.append, lambda: self.now)


def test_every_stage_has_its_limit(parse):
    runs = Runs()
    assert [record.stage for record in runs.conduct(parse())] == list(STAGES)
    assert runs.limits == {name: stage.seconds for name, stage in STAGES.items()}
    rehearsed = Runs()
    rehearsed.conduct(parse("--rehearse"))
    assert rehearsed.limits["graphs"] == STAGES["graphs"].seconds * gpu.SLOWER


def test_the_budget_is_kept(parse):
    runs = Runs(seconds=1000.0)
    runs.conduct(parse("--minutes", "5"))
    assert sum(runs.limits.values()) <= 300
    assert list(runs.limits) == list(STAGES)[: len(runs.limits)]
    assert runs.limits["kernels"] == 300 - STAGES["memory"].seconds - STAGES["tests"].seconds
    assert runs.said[-1] == "profile: no time is left; the next call begins here"


def test_it_goes_on_where_it_was_stopped(parse, folder):
    for name, status in (("memory", DONE), ("tests", FAILED), ("kernels", TIMED_OUT),
                         ("peers", RUNNING), ("graphs", DONE)):  # fmt: skip
        Record(name, machine, status=status).save(folder)
    left = ["tests", "kernels", "peers", "candidates", "profile"]
    assert [record.stage for record in Runs().conduct(parse())] == left
    assert [record.stage for record in Runs().conduct(parse("--again"))] == list(STAGES)
    assert [r.stage for r in Runs().conduct(parse("--stages", "memory", "tests"))] == ["tests"]


@pytest.mark.parametrize("key", ["gpu", "driver", "torch", "triton"])
def test_results_of_another_machine_do_not_count(key, parse, folder):
    Record("memory", machine, status=DONE).save(folder)
    args = parse("--stages", "memory")
    assert not Runs().conduct(args, machine | {"date": "2027-01-01", "commit": "other"})
    assert Runs().conduct(args, machine | {key: "another"})
    assert Runs().conduct(parse("--stages", "memory", "--rehearse"))


# --- children --------------------------------------------------------------------------------

CHILD = """\
import json, subprocess, sys, time
name, folder = sys.argv[sys.argv.index("--run") + 1], sys.argv[sys.argv.index("--output") + 1]
path = f"{folder}/{name}.json"
record = json.load(open(path))
record["results"].append({"kernel": "copy"})
json.dump(record, open(path, "w"))
if name == "tests":
    sys.exit("first line\\nValueError: odd")
if name == "kernels":
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    print(child.pid, flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("name, status, error", [
    ("memory", DONE, ""), ("tests", FAILED, "ValueError: odd"), ("kernels", TIMED_OUT, ""),
])  # fmt: skip
def test_a_stage_is_a_process_of_its_own(name, status, error, parse, folder, monkeypatch):
    log = folder / f"{name}.log"

    class Popen(subprocess.Popen):
        """Its time is over as soon as it has said something."""

        def wait(self, timeout=None):
            if status == TIMED_OUT and timeout is not None:
                while not log.read_text().endswith("\n"):
                    time.sleep(0.02)
                raise subprocess.TimeoutExpired(self.args, timeout)
            return super().wait(timeout)

    monkeypatch.setattr(gpu.subprocess, "Popen", Popen)
    script = folder / "child.py"
    script.write_text(CHILD)
    args = parse("--python", f"{sys.executable} {script}")
    record = gpu.run_stage(args, machine, name, 60.0)
    assert (record.status, record.error) == (status, error)
    assert record.results == [{"kernel": "copy"}]  # what came before the end is kept
    assert Record.load(folder / f"{name}.json") == record
    if status == TIMED_OUT:  # and what it had started has ended as well
        for _ in range(500):
            if not is_running(int(log.read_text())):
                return
            time.sleep(0.02)
        raise AssertionError("what the stage had started goes on")


def is_running(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().split()[2] not in "ZX"
    except OSError:
        return False


def test_in_a_child(monkeypatch, parse, folder, capsys):
    def stage(context):
        context.add(a=1)
        context.say("one")
        raise ArithmeticError("two\nlines")

    monkeypatch.setattr(checks, "memory", stage)
    monkeypatch.setattr(torch, "device", lambda name: name)
    Record("memory", machine).save(folder)
    assert gpu.main(["--run", "memory", "--output", str(folder)]) == 1
    captured = capsys.readouterr()
    assert captured.out.splitlines() == ["one", "ArithmeticError: two lines"]
    assert "Traceback" in captured.err
    assert Record.load(folder / "memory.json").results == [{"a": 1}]


# --- records ---------------------------------------------------------------------------------


def test_a_record_is_what_was_saved(tmp_path):
    record = Record("graphs", machine, True, FAILED, 1.5, "error", [{"way": "graph", "wall": 0.1}])
    record.save(tmp_path)
    assert records.load_all(tmp_path) == {"graphs": record}
    assert [path.name for path in tmp_path.iterdir()] == ["graphs.json"]
    assert record.of(way="graph") == record.results and record.of(way="graph", wall=0) == []


@pytest.mark.parametrize("change, message", [
    ({"status": "odd"}, "status must be one of done, failed"),
    ({"results": [1]}, "results must be a list of objects"),
    ({"results": {}}, "results must be a list of objects"),
    ({"machine": {"gpu": "x"}}, "machine has no 'driver'"),
    ({"stage": 3}, "stage must be a string"),
    ({"more": 1}, "unexpected keyword"),
])  # fmt: skip
def test_another_file_is_no_record(change, message, tmp_path):
    path = tmp_path / "graphs.json"
    path.write_text(json.dumps(dataclasses.asdict(Record("graphs", machine)) | change))
    with pytest.raises(ValueError, match=f"graphs.json is no record of a stage: .*{message}"):
        Record.load(path)
    path.write_text("{")
    with pytest.raises(ValueError, match=r"graphs\.json is no record"):
        Record.load(path)


def test_names_of_folders():
    assert records.slug("NVIDIA H200") == "nvidia-h200"
    assert records.slug("AMD Instinct MI300X (gfx942)") == "amd-instinct-mi300x-gfx942"


# --- the report ------------------------------------------------------------------------------

KERNELS = [
    {"size": "100M float32", "case": "copy", "kernel": "copy", "bytes_per_second": 4.1e12},
    {"size": "1B bfloat16", "case": "copy", "kernel": "copy", "bytes_per_second": 4.2e12},
    {"size": "100M float32", "case": "sam-sgd", "kernel": "update", "of_copy": 0.954},
    {"size": "1B bfloat16", "case": "sam-sgd", "kernel": "update", "of_copy": 0.9},
    {"size": "100M float32", "case": "samar-sgd", "kernel": "reduce again", "of_copy": 0.8},
]
PEERS = [
    {"set": "gpt2", "method": "sam-sgd", "contender": name, "seconds": seconds}
    for name, seconds in [
        ("fastsam", 1.2e-3),
        ("copy, 40 B", 1.0e-3),
        ("unifiedsam", 9e-3),
        ("unifiedsam, fused base", 3.6e-3),
        ("pytorch-optimizer, fused base", 2.4e-3),
        (COMPILED, 1.8e-3),
    ]
] + [{"set": "gpt2", "method": "sam-sgd", "contender": "another, fused base", "failed": "x"}]
# fmt: skip
EVERYTHING = {
    "memory": [{"tool": "memcheck", "ran": True, "passed": True, "summary": ""},
               {"tool": "racecheck", "ran": True, "passed": False, "summary": "2 hazards"}],
    "tests": [{"file": "a", "passed": 1000, "failed": []}, {"file": "b", "passed": 9,
                                                            "failed": ["b::c"]}],
    "kernels": KERNELS,
    "peers": PEERS,
    "graphs": [{"method": "SAM + SGD", "way": "eager", "wall": 3e-4},
               {"method": "SAM + SGD", "way": "graph", "wall": 2e-4},
               {"method": "SAM + SGD", "way": "comparison", "equal": True}],
}  # fmt: skip


def save_everything(folder, rehearsal=False):
    folder.mkdir(parents=True, exist_ok=True)
    for stage, results in EVERYTHING.items():
        status = TIMED_OUT if stage == "peers" else FAILED if stage == "tests" else DONE
        Record(stage, machine, rehearsal, status, results=results).save(folder)


@pytest.fixture
def page(tmp_path):
    path = tmp_path / "page.md"
    path.write_text("above\n<!-- gpu -->\nearlier words\n<!-- /gpu -->\nbelow\n")
    return path


def test_page_of_a_gpu(page, tmp_path):
    save_everything(tmp_path / "results" / "gpu-some-gpu")
    report_page.rewrite(page, tmp_path / "results", "bench/results")
    text = page.read_text()
    assert text.startswith("above\n<!-- gpu -->\n") and "earlier" not in text
    assert text.endswith("\n<!-- /gpu -->\nbelow\n")
    words = " ".join(text.split())
    assert "**Some GPU; driver 555.1; torch 2.13.0, triton 3.9.0, CUDA 13.0; 2026-01-02**" in words
    assert "([results](bench/results/gpu-some-gpu)):" in words and "REHEARSAL" not in words
    assert "memcheck: nothing found. compute-sanitizer racecheck: errors (2 hazards)." in words
    assert "Tests: 1,009 passed, 1 failed." in words
    assert "The stage `peers` was timed out." in words and "stage `tests` failed" in words
    assert "| copy | 4.10 TB/s | 4.20 TB/s |" in text
    assert "| SAM + SGD: update | 95 % | 90 % |" in text
    assert "| SAMAR + SGD: reduce again | 80 % | - |" in text
    row = "| GPT-2 · SAM + SGD | 1.2 ms | 1.20 | 2.00× (pytorch-optimizer) | 1.50× |"
    assert row in text
    assert "by the wall clock: SAM + SGD 200 µs instead of 300 µs." in words
    report_page.rewrite(page, tmp_path / "results", "bench/results")
    assert page.read_text() == text


def test_page_without_results(page, tmp_path):
    report_page.rewrite(page, tmp_path, "bench/results")
    assert "No GPU has been timed yet." in page.read_text()
    text = PAGE.read_text()
    known = list((ROOT / "bench" / "results").glob("gpu-*"))
    assert known or f"<!-- gpu -->\n{report_page.section({})}\n<!-- /gpu -->" in text


def test_a_rehearsal_is_no_measurement(page, tmp_path):
    save_everything(tmp_path / "gpu-rehearsal", rehearsal=True)
    report_page.rewrite(page, tmp_path, "bench/results")
    assert "No GPU has been timed yet." in page.read_text()
    report_page.rewrite(page, tmp_path, "bench/results", rehearsal=True)
    assert "**REHEARSAL, no measurement.**" in page.read_text()
    for path in (ROOT / "bench" / "results").glob("gpu-*/*.json"):
        assert not Record.load(path).rehearsal, f"{path.name} is of a rehearsal"


@pytest.mark.parametrize("text", ["", "<!-- gpu -->", "<!-- /gpu --><!-- gpu -->",
                                  2 * "<!-- gpu --><!-- /gpu -->"])  # fmt: skip
def test_page_needs_its_marks(text, tmp_path):
    path = tmp_path / "page.md"
    path.write_text(text)
    with pytest.raises(ValueError, match="must have <!-- gpu --> and <!-- /gpu --> in it, once"):
        report_page.rewrite(path, tmp_path, "x")
    assert path.read_text() == text


def test_a_report_of_whatever_is_there(parse, page, folder):
    said = []
    for rehearsal in (False, True):
        save_everything(folder, rehearsal)
        args = parse("--page", str(page), *["--rehearse"] * rehearsal)
        gpu.report(args, said.append)
        where = folder / "page.md" if rehearsal else page
        assert "([results](" in where.read_text()
    assert "REHEARSAL" not in page.read_text()
    assert {path.name for path in folder.glob("*.png")} == {"kernels.png", "peers.png"}
    assert figures.draw_kernels(Record("kernels", machine)) is None
    assert figures.draw_peers(Record("peers", machine)) is None


# --- what is timed ---------------------------------------------------------------------------


class Event:
    """An event that notes when it was recorded, in launches."""

    now = 0

    def record(self):
        self.at = Event.now

    def elapsed_time(self, other):
        return 1000.0 * (other.at - self.at)


@pytest.fixture
def clock(monkeypatch):
    """A clock on a CPU, whose time is that of ``Event``."""
    monkeypatch.setattr("on_gpu.clock._event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    clock = Clock.__new__(Clock)
    clock.device = torch.device("cpu")
    clock.prepare = lambda: None
    return clock


needs_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")


@needs_cpu
@pytest.mark.parametrize("name", problems.CASES)
def test_kernels_are_found_and_their_bytes_add_up(name, clock):
    """Every kernel of a step is timed under its name, and moves what the table of costs says."""
    trial = problems.Trial(name, 300, 3, torch.float32, torch.device("cpu"))
    found = clock.of_kernels(trial.first, trial.second, 1, warmup=2)
    assert list(found) == list(trial.case.streams)
    floors = {
        "sam-sgd": 40,
        "sam-adamw": 48,
        "asam-sgd": 44,
        "vasso-sgd": 52,
        "samar-sgd": 52,
        "lightsam-3": 60,
    }
    moved = {kernel: trial.case.bytes_of(kernel, torch.float32, False) for kernel in found}
    assert sum(moved.values()) == floors[name]
    for kernel in found:
        less = moved[kernel] - trial.case.bytes_of(kernel, torch.float32, True)
        assert less == (4 if kernel == "perturb" else 0)


def test_launches_have_names():
    assert launch_names(2, 1) == ["reduce", "perturb", "update"]
    assert launch_names(1, 1) == ["perturb", "update"]
    assert launch_names(2, 2) == ["reduce", "perturb", "reduce again", "update"]
    with pytest.raises(RuntimeError, match="expected one or two launches in each pass, got 3"):
        launch_names(3, 1)


def test_median_of_events(clock):
    steps = iter([0, 0, 5, 1, 9])

    def step():
        Event.now += next(steps)

    assert clock.median(step, 3, warmup=2) == 5.0


def test_launch_configurations():
    half, single = torch.bfloat16, torch.float32
    changed = kernels.with_chunk("reduce", 16_384)
    assert changed.reduce.on(True) == changed.reduce.on(False) == Launch(16_384, 256)
    assert dataclasses.replace(changed, reduce=Launches().reduce) == Launches()
    assert kernels.is_in_use(Launches(), "reduce", half)
    assert kernels.is_in_use(kernels.with_chunk("update", 1024), "update", single)
    assert not kernels.is_in_use(kernels.with_chunk("update", 512), "update", half)
    for kind in {kind for kind, *_ in kernels.CONFIGURATIONS}:
        trials = [entry for entry in kernels.CONFIGURATIONS if entry[0] == kind]
        assert all(case in problems.CASES for _, _, case, _ in trials)
        for dtype in {dtype for *_, dtype in trials}:  # what is in use is among them
            chunks = {chunk for _, chunk, _, type_ in trials if type_ == dtype}
            assert any(kernels.is_in_use(kernels.with_chunk(kind, x), kind, dtype) for x in chunks)


def test_sizes_fit_into_memory():
    bf16 = torch.bfloat16
    assert problems.fitting("sam-adamw", 10**9, bf16, 80 * 2**30) == 10**9
    assert problems.fitting("sam-adamw", 10**9, bf16, 8 * 2**30) == 5 * 10**8
    assert problems.fitting("sam-adamw", 10**9, bf16, 0) <= 1024


def test_a_contender_that_fails_is_left_out(tmp_path):
    def fails():
        raise ValueError("no\ncompiler")

    results, said = [], []
    context = context_of(results, said, tmp_path)
    assert steps._runs(Contender("fastsam", lambda: None, []), context, {})
    assert not steps._runs(Contender(COMPILED, fails, []), context, {"set": "gpt2"})
    assert results == [{"set": "gpt2", "contender": COMPILED, "failed": "ValueError: no compiler"}]
    for name in ("fastsam", "copy, 40 B"):
        with pytest.raises(ValueError):
            steps._runs(Contender(name, fails, []), context, {})


def test_kernels_in_a_trace():
    trace = {"traceEvents": [
        {"cat": "kernel", "name": "a", "dur": 3.0, "args": {"registers per thread": 48, "x": 1}},
        {"cat": "kernel", "name": "a", "dur": 5.0, "args": {}},
        {"cat": "cpu_op", "name": "b", "dur": 5.0},
    ]}  # fmt: skip
    assert profiles.kernels_in(trace) == [
        {"kernel": "a", "launches": 2, "seconds": pytest.approx(4e-6), "registers per thread": 48}
    ]


def context_of(results, said, tmp_path):
    return Context(
        torch.device("cpu"), False, tmp_path, ["python"], lambda **x: results.append(x), said.append
    )


@needs_cpu
def test_one_step_of_the_memory_check(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    monkeypatch.setattr(checks, "RAGGED", [(700, 0), (9, 1), (0, 0), (33, 3), (1, 1)])
    results = []
    checks.one_step(context_of(results, [], tmp_path))
    assert [(x["method"], x["dtype"]) for x in results] == [
        (method, dtype) for method in checks.METHODS for dtype in ("float32", "bfloat16")
    ]
    monkeypatch.setattr(checks, "TOLERANCE", -1.0)
    with pytest.raises(RuntimeError, match="SAM . AdamW in torch.float32 differs by"):
        checks.one_step(context_of([], [], tmp_path))


def test_the_memory_checker(monkeypatch, tmp_path):
    """Its command, and what is made of its end."""
    commands = []

    def run(command, **kwargs):
        commands.append((command, kwargs["env"]["PYTORCH_NO_CUDA_MEMORY_CACHING"]))
        found = "========= ERROR SUMMARY: 0 errors" if "memcheck" in command else ""
        status = 0 if "memcheck" in command else 9
        return types.SimpleNamespace(stdout=found, stderr="", returncode=status)

    monkeypatch.setattr(checks, "one_step", lambda context: None)
    monkeypatch.setattr(checks, "checker", lambda: "/bin/sanitizer")
    monkeypatch.setattr(checks.subprocess, "run", run)
    results, said = [], []
    checks.memory(context_of(results, said, tmp_path))
    assert [(x["tool"], x["passed"], x["summary"]) for x in results] == [
        ("memcheck", True, "ERROR SUMMARY: 0 errors"), ("racecheck", False, ""),
    ]  # fmt: skip
    command, caching = commands[0]
    assert command[:3] == ["/bin/sanitizer", "--tool", "memcheck"] and caching == "1"
    assert command[command.index("--run") + 1] == gpu.ONE_STEP
    monkeypatch.setattr(checks, "checker", lambda: None)
    results.clear()
    checks.memory(context_of(results, said, tmp_path))
    assert results == [{"tool": "compute-sanitizer", "ran": False, "why": "it is not installed"}]


def test_test_files_are_there():
    assert all((ROOT / name).is_file() for name in checks.TESTS)
