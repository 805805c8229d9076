"""The wheel holds the whole package, the kernels under their installed name included."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # a copy: building leaves files behind
    for name in ("fastsam", "kernels"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "setup.cfg"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", folder, source]
    built = subprocess.run(command, capture_output=True, text=True)
    if "No matching distribution found for setuptools" in built.stderr:
        pytest.skip("building a wheel needs a package index")
    assert built.returncode == 0, built.stderr
    (path,) = folder.glob("fastsam-*.whl")
    return path


def test_wheel_contents(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {
        *(str(p.relative_to(ROOT)) for p in (ROOT / "fastsam").rglob("*.py")),
        *(f"fastsam/kernels/{p.name}" for p in (ROOT / "kernels").glob("*.py")),
        "fastsam/py.typed",
    }
    assert {n for n in names if ".dist-info/" not in n} == expected


def test_installed_from_the_wheel(wheel, tmp_path):
    """The same import works as from an editable install, far from the source tree."""
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "import fastsam, fastsam.kernels.update, fastsam.backends.triton\n"
        "print(fastsam.__file__, fastsam.kernels.update.__file__)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert run.stdout.split() == [
        str(tmp_path / "fastsam" / "__init__.py"),
        str(tmp_path / "fastsam" / "kernels" / "update.py"),
    ], run.stderr
