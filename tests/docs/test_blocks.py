"""Every block of README.md, CONTRIBUTING.md and docs/ runs, or is checked by the command line it is written for.

The Python blocks of a page run one after the other in one namespace and one folder; command lines run in that folder in
between, ``kvferry serve`` as a process of its own. ``tests/docs/shell.py`` lists what is only checked, and why.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from transformers.utils.logging import disable_progress_bar

from kvferry.codecs import CODECS
from kvferry.selection import BUDGETS, MERGES, POLICIES, SCORERS
from kvferry.testbed import sample
from tests.docs.blocks import PAGES, ROOT, SAMPLES, Block, blocks_of, module_of, run_python
from tests.docs.shell import CHECKED_ONLY, Servers, Shell, why_not_run

TABLES: tuple[dict[str, Any], ...] = (SCORERS, BUDGETS, POLICIES, MERGES, CODECS)
CIRCLE = 19
"""The validation sample of kind ``colour`` that asks "what colour is the circle?"."""
SHIPPED = ("mixed.json", "skip_visual.json", "transform.profile")
POINTS = """
from kvferry.cli.app import app

modes = ["--mode", "kv:full|int4", "--mode", "image", "--mode", "embeds:int4"]
app(["profile", "--n", "1", *modes], standalone_mode=False)
"""
CONFIGURATION = """
from pathlib import Path
from tests.docs.blocks import ROOT, blocks_of

page = [block for block in blocks_of(ROOT / "docs" / "operations.md") if block.text.startswith("# kvferry.toml")]
Path("kvferry.toml").write_text(page[0].text)
"""
PREAMBLES = {
    "README.md": """
from pathlib import Path
from tests.docs.stock import save_llava

save_llava(Path("llava-hf/llava-1.5-7b-hf"))
""",
    "docs/agents.md": POINTS,
    "docs/operations.md": CONFIGURATION,
    "docs/policy.md": POINTS,
}
"""What a page takes for granted: a checkpoint, here small and random, where its name says; measured points."""


def run_of(page: Path) -> list[Block]:
    return [block for block in blocks_of(page) if block.language in ("python", "sh", "console")]


TESTED = [page for page in PAGES if run_of(page)]


@pytest.fixture(scope="module")
def servers() -> Iterator[Servers]:
    servers = Servers()
    yield servers
    servers.stop()


@pytest.fixture(scope="module")
def scene() -> Image.Image:
    drawn = sample("validation", CIRCLE, kinds=["colour"])
    assert drawn.question == "what colour is the circle?"
    return drawn.images[0]


@pytest.fixture
def folder(tmp_path: Path, scene: Image.Image, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a reader is: pictures, questions of one's own, the cloud model's profiles under the names pages use."""
    photos = tmp_path / "photos"
    photos.mkdir()
    for path in ("scene.png", "picture.png", "scene.jpg", "photos/a.png"):
        scene.save(tmp_path / path)
    line = '{"image": "a.png", "question": "what colour is the circle?", "needs_image": true, "answer": "red"}\n'
    (tmp_path / "mine.jsonl").write_text(line)
    for name, other in zip(SHIPPED, ("mixed.json", "skip-visual.json", "cloud.profile"), strict=True):
        shutil.copy(ROOT / "testbed" / "cloud" / name, tmp_path / other)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("COLUMNS", "120")
    disable_progress_bar()
    return tmp_path


@pytest.fixture
def tables() -> Iterator[None]:
    """Methods that a page registers are gone after it."""
    before = [dict(table) for table in TABLES]
    yield
    for table, kept in zip(TABLES, before, strict=True):
        table.clear()
        table.update(kept)


@pytest.mark.usefixtures("folder", "tables")
@pytest.mark.parametrize("page", TESTED, ids=lambda page: str(page.relative_to(ROOT)))
def test_page(
    page: Path, servers: Servers, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shell = Shell(servers, monkeypatch, capsys.readouterr)
    module = module_of(page)
    try:
        preamble = PREAMBLES.get(str(page.relative_to(ROOT)))
        if preamble is not None:
            run_python(Block(page, 1, "python", preamble), module)
        for block in run_of(page):
            if block.language == "python":
                run_python(block, module, shell.addresses)
            else:
                shell.run(block)
    finally:
        del sys.modules[module.__name__]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_block_says_what_it_is(page: Path) -> None:
    """Nothing is passed over silently: a block is Python, of the shell, or says that it is a sample."""
    unknown = [
        f"{block.place} ({block.language or 'no language'})"
        for block in blocks_of(page)
        if block.language not in ("python", "sh", "console", *SAMPLES)
    ]
    assert not unknown


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("kvferry ask scene.png hm --uplnk 10mbit", "uplnk"),
        ("kvferry profile --n none", "none"),
        ("kvferry tune testbed/cloud --recipe nosuch@0.5", "nosuch"),
        ("kvferry sweep --selections nosuch", "nosuch"),
        ("kvferry ask a.png hm --answer-by 1 --mode morse", "morse"),
        ("kvferry nosuch", "nosuch"),
        ("make nosuch", "nosuch"),
        ("python benchmarks/nosuch.py", "nosuch"),
        ("pip install 'kvferry[nosuch]'", "nosuch"),
        ("nosuch --help", "tests/docs/shell.py"),
        ("kvferry inspect nosuch.kvf", "nosuch.kvf"),
    ],
)
def test_a_wrong_line_fails(
    text: str, said: str, servers: Servers, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(AssertionError, match=said):
        Shell(servers, monkeypatch, capsys.readouterr).run(Block(ROOT / "README.md", 1, "sh", text))


def test_a_block_of_nothing_known_has_no_language(tmp_path: Path) -> None:
    page = tmp_path / "x.md"
    page.write_text("```\nkvferry serve   # one\n\n```\n\n  ```\n  size = 3\n  ```\n\n```json\n{}\n```\n")
    assert [(b.language, b.line) for b in blocks_of(page)] == [("sh", 2), ("", 7), ("json", 11)]


def test_reasons_are_of_commands_that_exist() -> None:
    """A line is not run for a reason that the command line itself knows."""
    assert why_not_run("tune", [], {}) == CHECKED_ONLY["tune"]
    assert why_not_run("analyze", [], {"n": None})
    assert why_not_run("analyze", [], {"n": 3, "model": "testbed/cloud"}) is None
    assert why_not_run("analyze", [], {"n": 3, "model": "Qwen/Qwen2-VL-2B-Instruct"})
