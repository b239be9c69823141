"""MkDocs hooks: pages that lie outside ``docs/``, links that are right in both places, pages that nobody listed.

The repository's own pages are read where they are, not copied. All links are written as they are right in the
repository; on the site, those to pages lead to the page, and those to other files become plain text. Pages of ``docs/``
that ``mkdocs.yml`` does not name are added to its section "More", those of ``docs/results/`` to "Results".
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
INCLUDED = {
    "README.md": "index.md",
    **{name: name for name in ("RESULTS.md", "BENCHMARKS.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md")},
}
"""Where the repository's own pages stand on the site."""
_HOMES = {there: here for here, there in INCLUDED.items()}
_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s]+)\)")
_FENCED = re.compile(r"(^ *```.*?^ *```$)", re.M | re.S)
_TABLE_ROW = re.compile(r"^\|.*$", re.M)
_CODE = re.compile(r"`[^`\n]+`")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Add pages to the navigation that it does not name."""
    named = set(_names(config.nav))
    folder = Path(config.docs_dir)
    for section, pattern in (("More", "*.md"), ("Results", "results/*.md")):
        found = (path.relative_to(folder).as_posix() for path in sorted(folder.glob(pattern)))
        _section(config.nav, section).extend(page for page in found if page not in named)
    config.nav = [entry for entry in config.nav if entry != {"More": []}]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the repository's own pages."""
    for here, there in INCLUDED.items():
        files.append(File.generated(config, there, abs_src_path=str(ROOT / here)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn the repository's links into the site's, and GitHub's escaped bars in code into plain ones."""
    there = page.file.src_uri
    here = posixpath.dirname(_HOMES.get(there, f"docs/{there}"))

    def turned(match: re.Match[str]) -> str:
        bang, text, target = match.groups()
        if re.match(r"[a-z]+:|#", target):
            return match[0]
        path, mark, anchor = target.partition("#")
        site = _on_site(posixpath.normpath(posixpath.join(here, path)))
        if site is None:
            return text
        return f"{bang}[{text}]({posixpath.relpath(site, posixpath.dirname(there) or '.')}{mark}{anchor})"

    parts = _FENCED.split(markdown)
    parts[::2] = [_TABLE_ROW.sub(_plain_bars, _LINK.sub(turned, part)) for part in parts[::2]]
    return "".join(parts)


def _plain_bars(row: re.Match[str]) -> str:
    """A row of a table without the backslashes that GitHub wants before bars in code."""
    return _CODE.sub(lambda code: code[0].replace("\\|", "|"), row[0])


def _on_site(path: str) -> str | None:
    """Where a file of the repository stands on the site; None where it does not."""
    if path in INCLUDED:
        return INCLUDED[path]
    return path.removeprefix("docs/") if path.startswith("docs/") else None


def _names(entry: Any) -> list[str]:
    """All pages that a part of the navigation names."""
    if isinstance(entry, str):
        return [entry]
    children = entry.values() if isinstance(entry, dict) else entry
    return [name for child in children for name in _names(child)]


def _section(nav: list[Any], title: str) -> list[Any]:
    """The pages of the section with this title."""
    for entry in nav:
        if isinstance(entry, dict) and title in entry:
            pages: list[Any] = entry[title]
            return pages
    raise ValueError(f"mkdocs.yml has no section {title!r} in its nav; docs/hooks/pages.py adds pages to it")
