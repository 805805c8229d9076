"""The wheel and the sdist: what is in them, and that they work in new environments."""

import email
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

import fastsam

ROOT = Path(__file__).resolve().parents[2]
KERNELS = {f"fastsam/{p.relative_to(ROOT)}" for p in (ROOT / "kernels").rglob("*.py")}
PACKAGE = {str(p.relative_to(ROOT)) for p in (ROOT / "fastsam").rglob("*.py")}
#: What is in the repository; beside it lie caches, virtual environments and what commands wrote.
FOLDERS = (".ci", "bench", "docs", "examples", "fastsam", "kernels", "tests")
LEFT_OUT = shutil.ignore_patterns("__pycache__", "train")  # bench/results/train, from the README


@dataclass
class Made:
    source: Path
    wheel: Path
    sdist: Path


def run(*command, **kwargs):
    return subprocess.run(command, capture_output=True, text=True, **kwargs)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Made:
    """Both, the wheel from the sdist, of a copy: building leaves files behind."""
    folder = tmp_path_factory.mktemp("dist")
    source = folder / "source"
    for name in FOLDERS:
        # fastsam/kernels is a link to kernels: a copy of it would be packed twice
        shutil.copytree(ROOT / name, source / name, ignore=LEFT_OUT, symlinks=True)
    for path in ROOT.iterdir():
        if path.is_file() and not path.name.startswith("."):
            shutil.copy(path, source)
    # the backend that the `test` extra brings; an isolated build would load it again
    built = run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, source)
    assert built.returncode == 0, built.stdout + built.stderr
    assert "is deprecated" not in built.stderr.lower(), built.stderr
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    assert wheel.name == f"fastsam-{fastsam.__version__}-py3-none-any.whl"
    return Made(source, wheel, sdist)


def test_wheel_holds_the_package_and_nothing_else(made):
    names = set(zipfile.ZipFile(made.wheel).namelist())
    information = f"fastsam-{fastsam.__version__}.dist-info/"
    assert {n for n in names if not n.startswith(information)} == (
        PACKAGE | KERNELS | {"fastsam/py.typed"}
    )
    assert len(names) == len(zipfile.ZipFile(made.wheel).namelist())
    assert f"{information}licenses/LICENSE" in names


def test_metadata(made):
    information = f"fastsam-{fastsam.__version__}.dist-info/METADATA"
    metadata = email.message_from_bytes(zipfile.ZipFile(made.wheel).read(information))
    assert metadata["Version"] == fastsam.__version__
    assert metadata["License-Expression"] == "MIT"
    assert metadata.get_all("License-File") == ["LICENSE"]
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert metadata.get_payload().startswith("# fastsam")
    needed = {n for n in metadata.get_all("Requires-Dist") if "extra ==" not in n}
    # CPU builds of torch do not bring triton; elsewhere than on Linux there is none
    assert needed == {"torch>=2.11", "numpy", 'triton>=3.6; platform_system == "Linux"'}


def test_sdist_holds_what_its_tests_need(made):
    with tarfile.open(made.sdist) as archive:
        names = {m.name.partition("/")[2] for m in archive.getmembers() if m.isfile()}
    expected = {str(p.relative_to(made.source)) for p in made.source.rglob("*") if p.is_file()}
    expected = {n for n in expected if ".egg-info/" not in n}
    assert {n for n in names if ".egg-info/" not in n} == expected | {"PKG-INFO"}
    some = {"LICENSE", "tests/conftest.py", "docs/api.md", "examples/lora.py", ".ci/run"}
    assert expected > PACKAGE | some


def environment(folder: Path, without: tuple[str, ...]) -> Path:
    """The Python of a new virtual environment: with what is installed here, but for some packages.

    Installing torch anew would take a minute; links to its files do not.
    """
    venv.create(folder, with_pip=False, symlinks=True)
    (target,) = folder.glob("lib/python*/site-packages")
    for place in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        for path in Path(place).iterdir():
            name = path.name.lower().partition("-")[0]
            hides = name in without or name.startswith(tuple(f"__editable__.{n}" for n in without))
            if not hides and path.suffix != ".pth" and not path.name.startswith("__editable__"):
                (target / path.name).symlink_to(path)
    return folder / "bin" / "python"


SMOKE = """
import importlib.util, os, sys
import torch, fastsam

os.environ["TRITON_INTERPRET"] = "1"  # before any kernel is imported
assert fastsam.__file__.startswith(sys.prefix), fastsam.__file__
has_triton = importlib.util.find_spec("triton") is not None

def step(backend):
    w = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    optimizer = fastsam.SAM([w], torch.optim.SGD, rho=0.5, lr=0.1, backend=backend)
    def closure():
        loss = w.square().sum() / 2  # the gradient is w, of norm 5; at w + e it is 1.1 w
        loss.backward()
        return loss
    assert optimizer.step(closure) == 12.5
    torch.testing.assert_close(w.detach(), torch.tensor([2.67, 3.56]))

for backend in ("auto", "torch", "reference"):
    step(backend)
if has_triton:
    step("triton")
else:
    try:
        step("triton")
    except ImportError as error:
        assert "triton" in str(error)
    else:
        raise AssertionError("no ImportError")
    assert not [name for name in sys.modules if name.startswith("triton")]
print("with" if has_triton else "without", "triton")
"""


@pytest.mark.parametrize("kind, has_triton", [("wheel", True), ("sdist", False)])
def test_works_in_a_new_environment(made, tmp_path, kind, has_triton):
    """From the wheel, with triton, and from the sdist, without; far from the source tree."""
    without = ("fastsam",) if has_triton else ("fastsam", "triton")
    python = environment(tmp_path / "environment", without)
    variables = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "TRITON_INTERPRET")}
    options = ("--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check")
    installed = run(python, "-m", "pip", "install", *options, getattr(made, kind), env=variables)
    assert installed.returncode == 0, installed.stdout + installed.stderr
    smoke = run(python, "-c", SMOKE, env=variables, cwd=tmp_path)
    assert smoke.stdout.strip() == ("with triton" if has_triton else "without triton"), smoke.stderr
