"""The API reference builds, lacks nothing, and every public docstring says what it has to."""

import ast
import inspect
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastsam

ROOT = Path(__file__).resolve().parents[2]
COMMON = fastsam.optimizer.SharpnessAwareOptimizer
THEORY = [
    name for name, value in vars(fastsam.theory).items()
    if not name.startswith("_") and getattr(value, "__module__", "") == "fastsam.theory"
]  # fmt: skip
#: Every public name, as a user writes it, and what it is.
PUBLIC = {
    f"fastsam.{name}": getattr(fastsam, name)
    for name in fastsam.__all__
    if name not in ("theory", "rules")
} | {f"fastsam.theory.{name}": getattr(fastsam.theory, name) for name in THEORY}
#: Modules for other training loops, which need not be there: read, not imported.
LOOPS = ("accelerate", "huggingface", "lightning")
#: What users are given and do not make, so that it refuses nothing.
RESULTS = ("fastsam.Landscape", "fastsam.theory.StepSizes")
#: What no paper describes; the docstring of the module names the one of fastsam.theory.
NO_PAPER = ("fastsam.DelayedSAM", "fastsam.Landscape", "fastsam.SharpnessRatio",
            "fastsam.frozen_batch_norm", "fastsam.compare_ranks", "fastsam.frozen_updates",
            "fastsam.functional_closures", "fastsam.graphed", "fastsam.LambdaRho",
            "fastsam.RhoScheduler", "fastsam.tail")  # fmt: skip

SECTION = r"^{}:\n((?:(?: .*)?\n)+)"


def is_optimizer(value):
    return isinstance(value, type) and issubclass(value, torch.optim.Optimizer)


def public_methods(cls):
    """Methods and properties of a class of ours, and the class that has them."""
    for name in dir(cls):
        owner = next((c for c in cls.__mro__ if name in vars(c)), None)
        value = inspect.getattr_static(cls, name)
        # torch puts a wrapper of step into every class of which there has been an optimizer
        holder = getattr(value, "__qualname__", "").partition(".")[0]
        owner = next((c for c in cls.__mro__ if c.__name__ == holder), owner)
        is_method = callable(value) or isinstance(value, property | classmethod | staticmethod)
        if owner and is_method and not name.startswith("_") and "fastsam" in owner.__module__:
            yield name, owner


def section(doc, title):
    """A section's text, empty if there is none."""
    found = re.search(SECTION.format(title), doc + "\n", re.MULTILINE)
    return inspect.cleandoc(found[1]) if found else ""


def documented_names(text):
    """The names before the colons of a section."""
    lines = re.findall(r"^(\*{0,2}\w+(?:, \w+)*):", text, re.MULTILINE)
    return {name for line in lines for name in line.split(", ")}


def parameters(value):
    """Names as in an Args section: all that the signature has."""
    prefix = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    signature = inspect.signature(value)
    return {prefix.get(p.kind, "") + p.name for p in signature.parameters.values()}


def names_in(module):
    """Public classes and functions of a module, and the methods that it defines, by its source."""
    tree = ast.parse((ROOT / "fastsam" / f"{module}.py").read_text())
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
            yield f"fastsam.{module}.{node.name}"
            for inner in node.body if isinstance(node, ast.ClassDef) else ():
                if isinstance(inner, ast.FunctionDef) and not inner.name.startswith("_"):
                    yield f"fastsam.{module}.{node.name}.{inner.name}"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The page, made by the command of docs/api.md in another folder."""
    text = (ROOT / "docs" / "api.md").read_text()
    (command,) = re.findall(r"^pip install .* && (sphinx-build .*)$", text, re.MULTILINE)
    _, *arguments, out = shlex.split(command)
    folder = tmp_path_factory.mktemp("reference")
    built = subprocess.run(
        [sys.executable, "-m", "sphinx", *arguments, folder], capture_output=True, text=True,
        cwd=ROOT,
    )  # fmt: skip
    assert built.returncode == 0, built.stdout + built.stderr
    assert out.startswith("build/")  # which git ignores
    return (folder / "index.html").read_text()


def test_nothing_is_missing_from_the_page(page):
    """Sphinx leaves out what has no docstring."""
    present = set(re.findall(r'id="(fastsam[\w.]*)"', page))
    common = {f"fastsam.optimizer.{COMMON.__name__}.{name}" for name, _ in public_methods(COMMON)}
    names = {cls: name for name, cls in PUBLIC.items() if isinstance(cls, type)}
    own = {
        f"{names.get(owner, name)}.{method}"  # what is inherited is on the page once
        for cls, name in names.items()
        for method, owner in public_methods(cls) if owner not in COMMON.__mro__
    }  # fmt: skip
    loops = {name for module in LOOPS for name in names_in(module)}
    assert present >= {*PUBLIC, *common, *own, *loops}
    assert {"fastsam.SAM", "fastsam.theory.step_sizes", "fastsam.LETS.step"} <= present
    assert "fastsam.optimizer.SharpnessAwareOptimizer.first_step" in common
    assert "fastsam.accelerate.AcceleratedSAM.step" in loops


def test_every_equation_is_on_the_page(page):
    docs = [inspect.getdoc(value) for value in (*PUBLIC.values(), COMMON)]
    # those of classes and functions; methods and the module have some, too
    assert page.count('<div class="math') >= sum(doc.count(".. math::") for doc in docs) > 20
    assert ":math:" not in page and ".. math" not in page


@pytest.mark.parametrize("name", PUBLIC)
def test_docstring(name):
    value = PUBLIC[name]
    doc = inspect.cleandoc(value.__doc__ or "")  # its own, not one that it inherits
    first = doc.split("\n")[0]
    assert first.endswith((".", "`.")) and len(first) > 20, "no summary in one line"
    if is_optimizer(value):
        assert ".. math::" in doc, "no equation"
    if name in RESULTS:
        names = documented_names(section(doc, "Attributes"))
        assert names == set(parameters(value))
    else:
        assert documented_names(section(doc, "Args")) == parameters(value)
        assert "Error" in section(doc, "Raises")
    if name not in NO_PAPER and not name.startswith("fastsam.theory."):
        # authors if they are known, a title, and a year or a number of arXiv's
        assert re.search(r'^Reference: [^"]*"[^"]{20,}"[^"]*\b(20\d\d|arXiv)\b', doc, re.MULTILINE)


def test_theory_names_its_paper():
    assert 'Reference: Oikonomou and Loizou, "Sharpness-aware' in fastsam.theory.__doc__


@pytest.mark.parametrize("name", [name for name in PUBLIC if isinstance(PUBLIC[name], type)])
def test_methods_have_docstrings(name):
    cls = PUBLIC[name]
    for method, owner in public_methods(cls):
        assert inspect.getdoc(getattr(cls, method)), f"{owner.__name__}.{method}"


@pytest.mark.parametrize("method", ["step", "step_micro_batches", "first_step", "second_step",
                                    "plain_step"])  # fmt: skip
def test_steps_say_what_they_take_and_raise(method):
    function = getattr(COMMON, method)
    doc = inspect.getdoc(function)
    assert documented_names(section(doc, "Args")) == parameters(function) - {"self"}
    assert "RuntimeError" in section(doc, "Raises")
