"""The API reference builds, lacks nothing and works in a browser; docstrings and their examples."""

import ast
import doctest
import fcntl
import inspect
import os
import re
import shlex
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch

import fastsam
import fastsam.testing
from fastsam.step.rule import _DECLARED

import processes
import site_checks

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
#: What else has an example of its own; those of the other rules are files that the guide shows.
WITH_EXAMPLES = PUBLIC | {
    "fastsam.optimizer.SharpnessAwareOptimizer": COMMON,
    "fastsam.rules.Flag": fastsam.rules.Flag,
    "fastsam.rules.Number": fastsam.rules.Number,
    "fastsam.testing.check_method": fastsam.testing.check_method,
}
#: Examples that take what not every machine has, or a group of processes.
ON_A_GPU = ("fastsam.graphed",)
OF_RANKS = ("fastsam.compare_ranks", "fastsam.per_replica")
#: Modules for other training loops, which need not be there: read, not imported.
LOOPS = ("accelerate", "huggingface", "lightning")
#: What users are given and do not make, so that it refuses nothing.
RESULTS = ("fastsam.Landscape", "fastsam.theory.StepSizes")
#: What no paper describes; the docstring of the module names the one of fastsam.theory.
NO_PAPER = ("fastsam.DelayedSAM", "fastsam.Landscape", "fastsam.SharpnessRatio",
            "fastsam.SharpnessTrend", "fastsam.frozen_batch_norm", "fastsam.compare_ranks",
            "fastsam.frozen_updates", "fastsam.functional_closures", "fastsam.graphed",
            "fastsam.LambdaRho", "fastsam.Monitor", "fastsam.RhoScheduler",
            "fastsam.tail")  # fmt: skip

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


def build(folder):
    """The command of docs/api.md, with another folder."""
    text = (ROOT / "docs" / "api.md").read_text()
    (command,) = re.findall(r"^pip install .* && (sphinx-build .*)$", text, re.MULTILINE)
    _, *arguments, out = shlex.split(command)
    built = subprocess.run(
        [sys.executable, "-m", "sphinx", *arguments, folder], capture_output=True, text=True,
        cwd=ROOT,
    )  # fmt: skip
    assert built.returncode == 0, built.stdout + built.stderr
    assert out.startswith("build/")  # which git ignores


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder with the pages, built once even where workers share the tests."""
    for package in ("furo", "latex2mathml", "sphinx"):
        pytest.importorskip(package, reason=f"{package} is not installed: pip install -e '.[docs]'")
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    with open(folder / "reference.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        folder /= "reference"
        if not (folder / "objects.inv").exists():  # what Sphinx writes last
            build(folder)
    return folder


def test_nothing_is_missing_from_the_site(site):
    """Sphinx leaves out what has no docstring."""
    text = "".join(path.read_text() for path in site.glob("*.html"))
    present = set(re.findall(r'id="(fastsam[\w.]*)"', text))
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


def test_every_equation_is_on_the_site(site):
    text = "".join(path.read_text() for path in site.glob("*.html"))
    docs = [inspect.getdoc(value) for value in (*PUBLIC.values(), COMMON)]
    # those of classes and functions; methods and the module have some, too
    drawn = text.count('<div class="math">\n<math')
    assert drawn >= sum(doc.count(".. math::") for doc in docs) > 20
    assert ":math:" not in text and ".. math" not in text


def test_links(site):
    """To files and places that are there, and to pages of torch's that torch.inv has."""
    pages = sorted(site.glob("*.html"))
    assert {"index.html", "methods.html", "search.html"} <= {path.name for path in pages}
    found = [site_checks.Page(path.read_text()) for path in pages]
    for path, page in zip(pages, found, strict=True):
        assert not page.broken_links(path), path.name
        assert not page.loaded_from_elsewhere(), path.name
    torch_links = {link for page in found for link in page.links if "pytorch.org" in link}
    inventory = (ROOT / "docs" / "reference" / "torch.inv").read_text().splitlines()[3:]
    known = {line.split()[2] for line in inventory}
    assert {re.sub("#.*", "", link).split("/stable/")[1] for link in torch_links} <= known
    assert any(link.endswith("torch.optim.AdamW.html#torch.optim.AdamW") for link in torch_links)


@pytest.mark.parametrize("name", ["methods", "analysis", "optimizer"])
def test_in_a_browser(site, tmp_path, name):
    """The equations of three pages are drawn, with no network, and links lead somewhere."""
    browser = site_checks.Browser(tmp_path)
    html = browser.open(site / f"{name}.html", then=site_checks.MEASURE)
    page = site_checks.Page(html)
    assert not page.broken_links(site / f"{name}.html")
    equations = site_checks.measured(html)
    assert len(equations) == (site / f"{name}.html").read_text().count("<math") > 5
    for equation in equations:
        assert equation["width"] > 3 and equation["height"] > 3, equation
        # numerators stand above denominators; without MathML both are on one line
        assert all(top["bottom"] <= below["top"] + 1 for top, below in equation["fractions"])
    assert any(equation["fractions"] for equation in equations)


def test_search_in_a_browser(site, tmp_path):
    html = site_checks.Browser(tmp_path).open(site / "search.html", "q=Polyak")
    (found,) = re.findall(r'<ul[^>]*class="search"[^>]*>(.*?)</ul>', html, re.DOTALL)
    assert 'href="methods.html' in found


def run_example(name):
    """With what all examples share, which the reference's first page shows."""
    text = section(inspect.cleandoc(WITH_EXAMPLES[name].__doc__), "Example")
    test = doctest.DocTestParser().get_doctest(text, {}, name, None, None)
    assert test.examples and "fastsam." in text, f"{name} has no example"
    torch.manual_seed(0)
    path = ROOT / "docs" / "reference" / "example_setup.py"
    exec(compile(path.read_text(), path, "exec"), test.globs)
    output = []
    runner = doctest.DocTestRunner(verbose=False)
    failed, _ = runner.run(test, out=output.append, clear_globs=False)
    assert not failed, "".join(output)


def run_on_rank(rank, size):
    for name in OF_RANKS:
        run_example(name)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.gpu) if name in ON_A_GPU else name
     for name in WITH_EXAMPLES if name not in OF_RANKS],
)  # fmt: skip
def test_example(name, monkeypatch):
    # the rules that an example declares do not stay
    monkeypatch.setattr("fastsam.step.rule._DECLARED", weakref.WeakSet(_DECLARED))
    run_example(name)


def test_examples_of_ranks():
    try:
        processes.run(2, run_on_rank)
    finally:
        processes.close()


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
