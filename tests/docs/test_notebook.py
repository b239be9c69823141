"""The notebook runs from its first cell to its last, and shows what it promises."""

from __future__ import annotations

import re
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from kvferry.testbed import sample
from tests.docs.blocks import ROOT

NOTEBOOK = ROOT / "examples" / "quickstart.ipynb"


@pytest.fixture(scope="module")
def cells() -> list[Any]:
    """The code cells, run in a kernel of their own."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    NotebookClient(notebook, timeout=240, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}).execute()
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_it_is_committed_without_outputs() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None


def test_it_runs_and_is_right(cells: list[Any]) -> None:
    load, recipes, kept, later, stock, mine = cells
    truth = sample("test", 0).answer
    assert text_of(load).strip().endswith(f"-> {truth}")
    for cell in (load, kept):
        assert any("image/png" in output.get("data", {}) for output in cell.outputs)
    rows = re.findall(r"^(\S+) +([\d,]+) bytes +([\d.]+) x smaller +says (.*)$", text_of(recipes), re.MULTILINE)
    said = {recipe: answer for recipe, _, _, answer in rows}
    sizes = {recipe: int(size.replace(",", "")) for recipe, size, _, _ in rows}
    assert len(rows) == 4
    assert said["full|bf16"] == said["leaveout@0.1|int4|zstd"] == truth != said["none|int4|zstd"]
    assert sizes["leaveout@0.1|int4|zstd"] < sizes["full|bf16"] / 30
    both = [line.split("?")[1].split("full cache:") for line in text_of(later).strip().splitlines()]
    assert [small.strip() == full.strip() for small, full in both[:2]] == [True, True]
    answer, counts = text_of(stock).strip().splitlines()
    assert answer.strip() == truth
    before, after = (int(x.replace(",", "")) for x in re.findall(r"([\d,]+) (?:bytes before|after)", counts))
    assert 0 < after < before / 4
    assert text_of(mine).count(f"says {truth}") >= 2


def text_of(cell: Any) -> str:
    """What a cell printed on stdout."""
    return "".join(output.text for output in cell.outputs if output.output_type == "stream" and output.name == "stdout")
