"""What the linters and the type checker say of the source: nothing."""

import configparser
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MODULES = sorted((ROOT / "fastsam").rglob("*.py"))
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def run(*command):
    """As from a shell in the root: what is checked, and how strictly, the settings there say."""
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "arguments", [["check", "--output-format", "concise"], ["format", "--check"]], ids=" ".join
)
def test_ruff(arguments):
    run("ruff", *arguments)


def test_mypy():
    """About 12 seconds, nearly all of them for torch; 1 where its cache is there."""
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    assert settings["mypy"].getboolean("strict")
    assert f"no issues found in {len(MODULES) + len(EXAMPLES)} source files" in run("mypy")


def test_pyright_of_examples():
    """As an editor shows them: with the types that users of the package see."""
    pytest.importorskip("pyright", reason="pyright is not installed: pip install -e '.[types]'")
    assert "0 errors, 0 warnings" in run("pyright", "--pythonpath", sys.executable)


def test_imports():
    """Which part may import which, as setup.cfg says."""
    command = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_ignored_types_say_which_error():
    """So that they hide no other."""
    lines = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in MODULES
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if "# type: ignore" in line and "# type: ignore[" not in line
    ]
    assert not lines
