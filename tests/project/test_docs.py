"""README and docs: their Python runs, errors are as quoted, and what they name exists.

A page's ``python`` blocks run in order and share their names. A ``text`` block right after one
quotes the error or warning that it has to give. ``python torchrun`` blocks run in two processes,
``python gpu`` blocks where there is a GPU, ``python frameworks`` blocks where these are installed.
``python docs/examples/...`` blocks show a part of that file, word for word.
"""

import os
import re
import shlex
import sys
import warnings
import weakref
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from urllib.parse import unquote

import pytest
import torch

import fastsam
import fastsam.testing
from fastsam import bases
from fastsam.step.closures import CLOSURELESS
from fastsam.step.rule import _DECLARED

import processes

ROOT = Path(__file__).resolve().parents[2]
PAGES = {str(p.relative_to(ROOT)): p for p in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))}
FENCE = re.compile(r"^```(.*?)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
#: What a block of quoted output starts with, where it has to be the case.
RAISED = re.compile(r"(\w*(?:Error|Warning)): ")
LANGUAGES = {"python", "python gpu", "python torchrun", "python frameworks", "bash", "diff", "text"}
#: Files that pages show in parts.
EXAMPLES = {str(p.relative_to(ROOT)): p for p in (ROOT / "docs" / "examples").glob("*.py")}
#: What the pages on frameworks import.
FRAMEWORKS = {
    "docs/lightning.md": ("lightning",),
    "docs/huggingface.md": ("transformers", "accelerate"),
}


@dataclass(frozen=True)
class Block:
    """A fenced block; ``output`` is what the page quotes right after it."""

    info: str
    body: str
    line: int
    output: str = ""

    def run(self, page: Path, names: dict) -> None:
        code = "\n" * self.line + self.body  # so that tracebacks have the page's lines
        exec(compile(code, str(page), "exec", dont_inherit=True), names)


def blocks(page: Path, info: str | None = None) -> list[Block]:
    text, found = page.read_text(encoding="utf-8"), []
    matches = list(FENCE.finditer(text))
    for match, follower in zip_longest(matches, matches[1:]):
        output = ""
        if follower and follower[1] == "text" and RAISED.match(follower[2]):
            if not text[match.end() : follower.start()].strip():
                output = " ".join(follower[2].split())
        line = text.count("\n", 0, match.start()) + 1
        found.append(Block(match[1], match[2], line, output))
    return [block for block in found if info in (None, block.info)]


def prose(page: Path) -> str:
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def with_blocks(info: str) -> list[str]:
    return [name for name, page in PAGES.items() if blocks(page, info)]


# --- what runs ------------------------------------------------------------------------------------


@pytest.fixture
def user(tmp_path, monkeypatch):
    """A user's environment: a folder of their own, no interpreter, and no framework imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for module in CLOSURELESS:  # messages mention those that are
        monkeypatch.delitem(sys.modules, module, raising=False)
    torch.manual_seed(0)


@pytest.fixture
def examples(monkeypatch):
    """Those of the documents can be imported, anew, and nothing is left of them afterwards."""
    monkeypatch.syspath_prepend(ROOT / "docs" / "examples")
    monkeypatch.setattr(bases, "BASES", dict(bases.BASES))
    monkeypatch.setattr("fastsam.step.rule._DECLARED", weakref.WeakSet(_DECLARED))
    names = [path.stem for path in EXAMPLES.values()]
    before = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    yield
    for name in names:
        sys.modules.pop(name, None)
    sys.modules.update(before)


@pytest.mark.parametrize("name", with_blocks("python"))
def test_python_runs(name, user, examples):
    names: dict = {}
    for block in blocks(PAGES[name], "python"):
        if block.output:
            check_output(block, PAGES[name], names)
            continue
        block.run(PAGES[name], names)
        if isinstance(loss := names.get("loss"), torch.Tensor):
            assert torch.isfinite(loss), block.line
        if hasattr(optimizer := names.get("optimizer"), "metrics"):
            assert optimizer.metrics.get("grad_norm", 1.0) > 0, block.line
    if name == "README.md":
        assert torch.isfinite(names["rise"]) and names["figure"].axes


def check_output(block: Block, page: Path, names: dict) -> None:
    """The block gives the error or the one warning that the page quotes, word for word."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            block.run(page, names)
        except Exception as error:
            assert f"{type(error).__name__}: {error}" == block.output, block.line
        else:
            given = [f"{type(w.message).__name__}: {w.message}" for w in caught]
            assert given == [block.output], block.line


@pytest.mark.parametrize("kind", ["python gpu", "python frameworks"])
def test_python_for_elsewhere_compiles(kind):
    for name in with_blocks(kind):
        for block in blocks(PAGES[name], kind):
            compile(block.body, name, "exec", dont_inherit=True)


@pytest.mark.parametrize("name", with_blocks("python frameworks"))
@pytest.mark.filterwarnings("default")
def test_python_runs_in_frameworks(name, user):
    for package in FRAMEWORKS[name]:
        pytest.importorskip(package)
    names: dict = {}
    for block in blocks(PAGES[name], "python frameworks"):
        block.run(PAGES[name], names)


@pytest.mark.gpu
@pytest.mark.parametrize("name", with_blocks("python gpu"))
def test_python_runs_on_a_gpu(name, user):
    names: dict = {}
    for block in blocks(PAGES[name], "python gpu"):
        if block.output:
            check_output(block, PAGES[name], names)
        else:
            block.run(PAGES[name], names)


@pytest.mark.parametrize("name", with_blocks("python torchrun"))
def test_python_runs_in_two_processes(name, user, tmp_path):
    """All of a page's blocks as one script, as torchrun starts it."""
    script = tmp_path / "script.py"
    script.write_text("".join(block.body for block in blocks(PAGES[name], "python torchrun")))
    # where it listens is its own choice, so no port can be taken; and the name of this machine
    # need not be known anywhere
    options = "--standalone", "--nproc-per-node=2", "--local-addr=127.0.0.1"
    command = [sys.executable, "-m", "torch.distributed.run", *options, str(script)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    if sys.platform == "linux":
        env["GLOO_SOCKET_IFNAME"] = "lo"
    code, output, errors = processes.run_command(command, env)
    assert code == 0, errors[-4000:]
    # what a process writes last is not lost, though it ends without Python's clean-up. The two
    # share a pipe, to which text and the end of its line go apart, so that lines may mix
    assert [output.count(f"rank {rank} is done") for rank in range(2)] == [1, 1], output


# --- what is shown of files -----------------------------------------------------------------------


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_are_shown_as_they_are(name):
    """Whole lines of the file, one after the other, on some page that links to it."""
    text, folder = EXAMPLES[name].read_text(encoding="utf-8"), Path("docs")
    pages = [page for page in PAGES.values() if blocks(page, f"python {name}")]
    for page in pages:
        assert f"]({Path(name).relative_to(folder)})" in page.read_text(encoding="utf-8")
        for block in blocks(page, f"python {name}"):
            assert f"\n{block.body}" in text, f"{page.name}:{block.line} is not in {name}"
    shown = "".join(block.body for page in pages for block in blocks(page, f"python {name}"))
    assert all(f"def {f}(" in shown for f in re.findall(r"^def (\w+)", text, re.MULTILINE))


# --- what is named --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PAGES)
def test_blocks_are_of_known_kinds(name):
    text = PAGES[name].read_text(encoding="utf-8")
    assert len(re.findall("^```", text, re.MULTILINE)) == 2 * len(blocks(PAGES[name]))
    known = LANGUAGES | {f"python {example}" for example in EXAMPLES}
    assert {block.info for block in blocks(PAGES[name])} <= known


@pytest.mark.parametrize("name", with_blocks("bash"))
def test_commands_exist(name):
    scripts = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "bench").glob("*.py"))
    for block in blocks(PAGES[name], "bash"):
        for command in re.split(r"&&|\n", block.body.strip()):
            words = [w for w in shlex.split(command, comments=True) if not re.match(r"[A-Z_]+=", w)]
            assert words[0] in ("pip", "pytest", "python", "sphinx-build", "torchrun"), command
            for word in words[1:]:
                if re.match(r"(bench|docs|fastsam|kernels|tests)/", word):
                    assert (ROOT / word).exists(), command
                if word.startswith("--") and words[0] == "python":
                    assert f'"{word.partition("=")[0]}"' in scripts, command


@pytest.mark.parametrize("name", PAGES)
def test_names_exist(name):
    """Files, and what of the library is called by its full name, in code between backquotes."""
    for code in re.findall(r"`([^`\n]+)`", prose(PAGES[name])):
        if path := re.fullmatch(r"((?:fastsam|kernels|tests|bench|docs)/[\w./]*)", code):
            assert (ROOT / path[1]).exists(), code
        if dotted := re.match(r"fastsam((?:\.\w+)+)", code):
            thing = fastsam
            for part in dotted[1][1:].split("."):
                thing = getattr(thing, part)


def slugs(page: Path) -> set[str]:
    """The anchors that a code host gives to a page's headings."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", PAGES)
def test_links(name):
    page = PAGES[name]
    for image, text, target in re.findall(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"https?://|mailto:", target):
            continue
        file, _, anchor = unquote(target).partition("#")
        path = (page.parent / file).resolve() if file else page
        assert path.exists() and path.is_relative_to(ROOT), target
        if image:
            assert text and path.suffix == ".png", f"{target} needs a description"
        if anchor:
            assert anchor in slugs(path), target
        if path.suffix == ".py" and (known := re.fullmatch(r"`(\w+)`", text)):
            definition = rf"^\s*(?:def |class )?{known[1]}\b\s*[(:=]"
            assert re.search(definition, path.read_text(), re.MULTILINE), f"{text} in {target}"


def test_every_page_is_reachable():
    index = PAGES["docs/README.md"].read_text(encoding="utf-8")
    assert "docs/README.md" in PAGES["README.md"].read_text(encoding="utf-8")
    for name in PAGES:
        if name not in ("README.md", "docs/README.md"):
            assert f"]({Path(name).name})" in index, name


def test_two_commands():
    text = PAGES["README.md"].read_text(encoding="utf-8")
    commands = re.findall(r"^pip install .*$", text, re.MULTILINE)
    assert len(commands) == 2
    assert all(c.startswith("pip install torch==2.13.0 && pip install -e ") for c in commands)
    assert commands[0].endswith("python bench/train.py") and "pytest" in commands[1]
