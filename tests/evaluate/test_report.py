"""The page of results: what is on the front, that the page stands alone, and that a browser shows it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import kvferry
from kvferry.cli.app import app
from kvferry.errors import InputError
from kvferry.evaluate.records import Line, Outcome
from kvferry.evaluate.report import good_recipes, kept_pictures, render, results_files, sheets, write_report
from kvferry.testbed import samples
from tests.analyze.test_analyze import Page

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
ROWS = {
    "full|bf16": (0.95, 9000), "none|bf16": (0.2, 700), "snapkv@0.5|int4": (0.93, 900), "snapkv@0.1|int4": (0.5, 300),
    "knorm@0.5|int4": (0.8, 950), "image:30": (0.94, 2000), "q2c@0.5|int8 oracle": (0.95, 200),
}  # fmt: skip


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    head = {
        "sweep": {"model": "testbed/cloud", "split": "validation"}, "command": "kvferry sweep </script><b>x",
        "commit": "c0ffee", "model": "testbed/cloud",
    }  # fmt: skip
    lines = [json.dumps(head)]
    for i in range(100):
        outcomes = {name: Outcome(int(i < 100 * share), size) for name, (share, size) in ROWS.items()}
        line = Line(i, ("count", "word")[i % 2], "A", 10_000, 3_000, 60, outcomes)
        lines.append(json.dumps(line.__dict__))
    path = tmp_path / "some.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_the_front_holds_what_nothing_beats(raw: Path) -> None:
    (sheet,) = sheets(raw)
    assert {row.name for row in sheet.rows if row.front} == {
        "snapkv@0.1|int4", "snapkv@0.5|int4", "image:30", "full|bf16",
    }  # fmt: skip
    assert {row.role for row in sheet.rows} == {"", "ceiling", "floor", "oracle"}
    by_name = {row.name: row for row in sheet.rows}
    assert by_name["snapkv@0.5|int4"].of_full == pytest.approx(0.93 / 0.95)
    assert by_name["snapkv@0.5|int4"].smaller == pytest.approx(10_000 / 900)
    assert [(kind.name, kind.n) for kind in by_name["image:30"].kinds] == [("count", 50), ("word", 50)]
    assert good_recipes(sheet) == ["snapkv@0.5|int4"]


def test_places_are_found_or_named(raw: Path, tmp_path: Path) -> None:
    assert results_files([tmp_path]) == results_files([raw]) == [raw]
    with pytest.raises(InputError, match="nothing at"):
        results_files([tmp_path / "away"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no raw results"):
        results_files([tmp_path / "empty"])
    raw.write_text(raw.read_text().splitlines()[0] + "\n")
    with pytest.raises(InputError, match="no answer yet"):
        list(sheets(raw))
    with pytest.raises(InputError, match="cannot write"):
        write_report([], tmp_path / "away" / "report.html")


def test_the_page_stands_alone(raw: Path) -> None:
    html = render(list(sheets(raw)))
    page = Page(html)
    assert page.links == []
    assert page.seen.count("table") == 1
    assert page.seen.count("tr") == 1 + len(ROWS)
    (data,) = re.findall('id="data">(.*?)</script>', html, re.DOTALL)
    assert json.loads(data)[0]["origin"]["command"] == "kvferry sweep </script><b>x"
    assert "0.930 [0." in page.words


def test_kept_tokens_are_drawn_with_what_is_said_on_them() -> None:
    asked = list(samples("validation", 1))
    (shown,) = kept_pictures(kvferry.load("testbed/edge"), asked, ["leaveout@0.25|int8", "knorm@0.02|int4"])
    assert (shown.question, shown.answer) == (asked[0].question, asked[0].answer)
    assert len(shown.panels) == 3
    assert re.match(r"leaveout@0\.25\|int8: \d+% of it, [\d,]+ bytes, says '\w+'", shown.panels[1].title)
    assert len({panel.jpeg for panel in shown.panels}) == 3


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH")
def test_a_browser_shows_it(raw: Path, tmp_path: Path) -> None:
    out, shot = tmp_path / "report.html", tmp_path / "shot.png"
    assert CliRunner().invoke(app, ["report", str(raw), "--out", str(out), "--pictures", "1"]).exit_code == 0
    probe = """<script>
        document.querySelectorAll("circle")[3].dispatchEvent(new Event("pointerenter"));
        document.querySelector("th:nth-child(2)").click();
        console.log(`card ${document.querySelector(".card b").textContent}, marks ${document.querySelectorAll("circle")
            .length}, first ${document.querySelector("tbody tr").textContent.trim().split(/\\s/)[0]}, images ${
            [...document.images].filter((each) => each.naturalWidth > 0).length}`);
        </script></body>"""
    out.write_text(out.read_text().replace("</body>", probe))
    done = subprocess.run(
        [
            str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync",
            "--disable-background-networking", "--disable-component-update", "--hide-scrollbars",
            f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr", "--window-size=1200,1600",
            f"--screenshot={shot}", out.as_uri(),
        ],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    (said,) = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert "card snapkv@0.5|int4, marks 7, first full|bf16, images 2" in said
    pixels = np.asarray(Image.open(shot).convert("L"), np.float32)
    inked = (np.abs(pixels - np.median(pixels)) > 60).mean(1) > 0.002
    assert np.flatnonzero(inked).max() > 1000
