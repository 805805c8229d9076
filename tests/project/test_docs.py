"""README and docs: their Python runs, errors are as quoted, and what they name exists.

A page's ``python`` blocks run in order and share their names. A ``text`` block right after one
quotes the error or warning that it has to give. ``python torchrun`` blocks run in two processes,
``python gpu`` blocks where there is a GPU, ``python frameworks`` blocks where these are installed;
the ``diff`` blocks of the page on adding a method are applied to a copy of the library, whose tests
of that method then pass.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import warnings
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from urllib.parse import unquote

import pytest
import torch

import fastsam
from fastsam.checks import CLOSURELESS

ROOT = Path(__file__).resolve().parents[2]
PAGES = {str(p.relative_to(ROOT)): p for p in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))}
FENCE = re.compile(r"^```(.*?)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
#: What a block of quoted output starts with, where it has to be the case.
RAISED = re.compile(r"(\w*(?:Error|Warning)): ")
LANGUAGES = {"python", "python gpu", "python torchrun", "python frameworks", "bash", "diff", "text"}
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


@pytest.mark.parametrize("name", with_blocks("python"))
def test_python_runs(name, user):
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
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    if sys.platform == "linux":
        env["GLOO_SOCKET_IFNAME"] = "lo"
    done = subprocess.run([*command, script], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]


# --- the worked example ---------------------------------------------------------------------------


def apply(diff: str, root: Path) -> Path:
    """Apply a unified diff of one file, without line numbers; returns the file."""
    header, *hunks = re.split(r"^@@.*\n", diff, flags=re.MULTILINE)
    old_name, new_name = re.fullmatch(r"--- (\S+)\n\+\+\+ b/(\S+)\n", header).groups()
    path = root / new_name
    text = "" if old_name == "/dev/null" else path.read_text(encoding="utf-8")
    for hunk in hunks:
        lines = hunk.splitlines(keepends=True)
        assert all(line[0] in " +-" for line in lines), new_name
        old, new = ("".join(x[1:] for x in lines if x[0] != mark) for mark in "+-")
        assert old_name == "/dev/null" or text.count(old) == 1, f"{new_name} has changed: {old}"
        text = text.replace(old, new) if old else new
    path.write_text(text, encoding="utf-8")
    return path


def test_adding_a_method(tmp_path):
    ignore = shutil.ignore_patterns("__pycache__", "results")
    for folder in ("fastsam", "kernels", "tests", "bench"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=ignore, symlinks=True)
    shutil.copy(ROOT / "setup.cfg", tmp_path)
    diffs = blocks(PAGES["docs/adding_a_method.md"], "diff")
    changed = [apply(block.body, tmp_path) for block in diffs]
    assert len(changed) > 5
    if not (kernels := tmp_path / "fastsam" / "kernels").is_symlink():  # an sdist holds no links
        kernels.symlink_to("../kernels")
    only = "power and sgd-momentum and fp32 and not bf16"
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", only]
    command = [sys.executable, "-m", "pytest", *options, "tests/methods/test_methods.py"]
    env = os.environ | {"PYTHONPATH": str(tmp_path), "FASTSAM_EVERY_CASE": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    passed = "3 passed" in done.stdout  # on every backend
    assert done.returncode == 0 and passed, done.stdout + done.stderr


# --- what is named --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PAGES)
def test_blocks_are_of_known_kinds(name):
    text = PAGES[name].read_text(encoding="utf-8")
    assert len(re.findall("^```", text, re.MULTILINE)) == 2 * len(blocks(PAGES[name]))
    assert {block.info for block in blocks(PAGES[name])} <= LANGUAGES


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
