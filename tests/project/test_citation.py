"""CITATION.cff, the changelog and the licence agree with the code."""

import re
from pathlib import Path

import pytest
import yaml

import fastsam

ROOT = Path(__file__).resolve().parents[2]
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text())
PAPERS = CITATION["references"]


def named_papers():
    """Papers in the Reference paragraphs of all docstrings: authors, title and what follows it."""
    found = set()
    for path in sorted((ROOT / "fastsam").rglob("*.py")):
        paragraphs = re.findall(
            r'^ *Reference: (.*?)(?=\n\n| *""")', path.read_text(), re.MULTILINE | re.DOTALL
        )
        for text in paragraphs:
            found.update(re.findall(r'([^";]*)"([^"]+)"([^";]*)', " ".join(text.split())))
    return sorted(found)


def family_names(paper):
    return [author["family-names"] for author in paper["authors"]]


def arxiv_numbers(paper):
    return [x["value"].removeprefix("arXiv:") for x in paper.get("identifiers", [])]


def test_is_a_citation_file():
    assert CITATION["cff-version"] == "1.2.0"
    assert CITATION["title"].startswith("fastsam") and CITATION["type"] == "software"
    assert CITATION["message"] and CITATION["authors"] == [{"name": "The fastsam authors"}]
    assert CITATION["version"] == fastsam.__version__
    assert CITATION["license"] == "MIT"
    for paper in PAPERS:
        assert {"type", "title", "authors", "year"} <= paper.keys()
        assert isinstance(paper["year"], int) and 2018 <= paper["year"] <= 2026
        # the format forbids two equal authors; one paper has three of the same family name
        authors = [tuple(author.items()) for author in paper["authors"]]
        assert authors and len(set(authors)) == len(authors)


@pytest.mark.parametrize("authors, title, rest", named_papers())
def test_papers_of_docstrings_are_cited(authors, title, rest):
    # one docstring has only the first word of a title
    (paper,) = (p for p in PAPERS if re.match(rf"{re.escape(title)}\b", p["title"]))
    if authors:
        assert family_names(paper) == re.findall(r"[A-Z]\w+", authors)
    for number in re.findall(r"arXiv (\d+\.\d+)", rest):
        assert arxiv_numbers(paper) == [number]
    for year in re.findall(r"\b(20\d\d)\b(?!\.\d)", rest.partition("arXiv")[0]):
        assert paper["year"] == int(year)
    for venue in re.findall(r"\b(ICLR|ICML|NeurIPS|JMLR|ECML-PKDD)\b", rest):
        assert f"({venue})" in paper.get("collection-title", paper.get("journal", ""))


def test_every_cited_paper_is_in_a_docstring():
    titles = {title for _, title, _ in named_papers()}
    assert {paper["title"] for paper in PAPERS} <= titles
    assert len(PAPERS) == len({paper["title"] for paper in PAPERS}) >= 12


def test_changelog():
    text = (ROOT / "CHANGELOG.md").read_text()
    versions = re.findall(r"^## \[(.+?)\] - (unreleased|\d{4}-\d\d-\d\d)$", text, re.MULTILINE)
    assert [version for version, _ in versions][0] == fastsam.__version__
    assert len(versions) == len(re.findall("^## ", text, re.MULTILINE))
    kinds = set(re.findall(r"^### (.+)$", text, re.MULTILINE))
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    for name in fastsam.__all__:  # what there is
        assert re.search(rf"`(?:fastsam\.)?{name}`", text), name


def test_licence():
    text = (ROOT / "LICENSE").read_text()
    assert text.startswith("MIT License\n") and "(c) 2026 The fastsam authors" in text
