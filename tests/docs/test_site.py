"""The documentation site builds without a warning, with everything on it that a page needs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.docs.blocks import ROOT

OUTSIDE = re.compile(r"<(?:script|link|img|iframe)[^>]*(?:src|href)=\"?(https?:)?//")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("material", reason="mkdocs-material is in the extra 'docs'")
    pytest.importorskip("mkdocstrings_handlers.python", reason="mkdocstrings-python is in the extra 'docs'")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return folder


def test_every_page_is_there(site: Path) -> None:
    for name in ("index", "tutorial", "RESULTS", "CONTRIBUTING", "reference/library", "results/scorers-cloud"):
        assert (site / f"{name}.html").is_file()
    for path in (ROOT / "docs").glob("*.md"):
        assert path.stem + ".html" in (site / "index.html").read_text(), f"{path.name} is not in the navigation"


def test_pages_fetch_nothing_from_elsewhere(site: Path) -> None:
    for path in site.rglob("*.html"):
        assert not OUTSIDE.search(path.read_text()), path


def test_the_reference_holds_the_public_names(site: Path) -> None:
    pages = "".join(path.read_text() for path in (site / "reference").glob("*.html"))
    for name in ("models.load.load", "models.vlm.VLM", "recipe.Recipe", "edge.client.Edge", "cloud.server.serve"):
        assert f'id="kvferry.{name}"' in pages
    assert ":class:`" not in pages


def test_the_citation_is_complete() -> None:
    """What version 1.2.0 of the format requires, and what must agree with the package."""
    found = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(found)
    assert (found["cff-version"], found["title"], found["license"]) == ("1.2.0", "kvferry", "Apache-2.0")
    version = re.search(r'__version__ = "(.+)"', (ROOT / "src" / "kvferry" / "__init__.py").read_text())
    assert version is not None
    assert found["version"] == version[1]
