"""The command end to end: shipped models, a text-only model, two models, bad input."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image
from transformers.utils.logging import disable_progress_bar
from typer.testing import CliRunner

import kvferry
from kvferry.analyze import Analysis, Asked, Questions, analyze, drawn_questions
from kvferry.analyze.figures import INK
from kvferry.analyze.observe import DROPS, FRACTIONS, Subject
from kvferry.analyze.report import render, write_html
from kvferry.cli.app import app
from kvferry.errors import InputError
from kvferry.evidence import EvidenceRequest
from kvferry.models import VLM
from kvferry.models.attention import rows_of
from tests.models.families import build
from tests.models.test_vlm import words_tokenizer

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
VOID = {"meta", "img", "br", "link"}


class Page(HTMLParser):
    """Checks that tags nest, and collects what a reader would need from elsewhere."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.links: list[str] = []
        self.words = ""
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        names = ("src", "href", "xlink:href", "data")
        self.links += [v for k, v in attrs if k in names and v and not v.startswith(("#", "data:"))]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data


@pytest.fixture(scope="module")
def edge() -> VLM:
    disable_progress_bar()
    return kvferry.load("testbed/edge")


@pytest.fixture(scope="module")
def analysis(edge: VLM) -> Analysis:
    return analyze(edge, drawn_questions("validation", 3), edge)


def test_what_was_measured(analysis: Analysis) -> None:
    assert (analysis.prompts.n, analysis.prompts.with_pictures) == (3, 3)
    assert [x.verdict for x in analysis.answers] == ["undecided"] * 4
    assert 1 <= analysis.rank.mean[0].min() <= analysis.rank.mean[0].max() <= analysis.rank.tokens
    np.testing.assert_allclose(analysis.mass.mean.sum(-1), 1, rtol=1e-3)
    assert (np.diff(analysis.tail.visual, axis=-1) >= -1e-9).all()
    # A model keeps what it keeps itself: q2c ranks once for all layers.
    q2c = analysis.overlap.scorers.index("q2c")
    np.testing.assert_allclose(analysis.overlap.between_models[:, :, q2c], 1)
    assert analysis.harm.divergence[DROPS.index(("visual", 0.0))] > analysis.harm.divergence[0]
    assert len(analysis.survivors.drawn) == 3


def test_json_holds_everything_but_pictures(analysis: Analysis) -> None:
    plain = json.loads(json.dumps(analysis.as_dict(), allow_nan=False))
    assert set(plain) == {*Analysis.__dataclass_fields__, "axes"}
    assert np.array(plain["rank"]["mean"]).shape == analysis.rank.mean.shape
    assert len(plain["answers"]) == 4


def test_the_report_stands_alone(analysis: Analysis) -> None:
    html = render(analysis)
    page = Page(html)
    assert page.links == []
    assert "script" not in page.seen
    figures = re.findall("<svg.*?</svg>", html, re.DOTALL)
    assert len(figures) == page.seen.count("svg") == 8
    for figure in figures:
        ElementTree.fromstring(figure)
        # Ink comes from the page, so that a dark one can be read too.
        assert "currentColor" in figure
        assert INK not in figure
    assert page.seen.count("img") == 3 * (1 + len(analysis.survivors.scorers))
    assert page.seen.count("table") == 2
    assert f"overlap [95 %]{FRACTIONS[0]:.0%} kept" in page.words.replace("\n", "")
    for answer in analysis.answers:
        assert f"{answer.question} {answer.verdict.capitalize()}: {answer.words}" in page.words


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH")
@pytest.mark.parametrize("dark", [False, True])
def test_a_browser_opens_it(analysis: Analysis, tmp_path: Path, dark: bool) -> None:
    report, shot = tmp_path / "report.html", tmp_path / "shot.png"
    write_html(analysis, report)
    probe = "<script>console.log('width ' + document.documentElement.scrollWidth)</script></body>"
    report.write_text(report.read_text().replace("</body>", probe))
    done = subprocess.run(
        [
            str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync",
            "--disable-background-networking", "--disable-component-update", "--hide-scrollbars",
            f"--user-data-dir={tmp_path / 'profile'}", f"--blink-settings=preferredColorScheme={int(not dark)}",
            "--enable-logging=stderr", "--window-size=1200,7000", f"--screenshot={shot}", report.as_uri(),
        ],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    said = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert len(said) == 1, said
    assert "width 1200" in said[0]
    pixels = np.asarray(Image.open(shot).convert("L"), np.float32)
    page = np.median(pixels)
    assert page < 40 if dark else page > 240
    # Every stretch of the page has ink on it, as far down as the last pictures.
    inked = (np.abs(pixels - page) > 60).mean(1) > 0.002
    assert np.diff(np.flatnonzero(inked)).max() < 120
    assert np.flatnonzero(inked).max() > 3000


def test_one_prefill_feeds_everything_and_evidence_agrees(edge: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    forward = edge.model.forward

    def spy(**inputs: Any) -> Any:
        calls.append(inputs["input_ids"].shape[1])
        return forward(**inputs)

    monkeypatch.setattr(edge.model, "forward", spy)
    (asked,) = drawn_questions("validation", 1).each()
    seen = Subject(edge).observe(asked)
    n = len(seen.cache.layout)
    assert calls[0] == n
    assert calls[1:] == [1] * (1 + len(DROPS))
    request = EvidenceRequest("post_vision")
    told = edge.prefill(asked.images, asked.question, requests=[request]).evidence
    for layer, attention in enumerate(seen.attention):
        expected = told.of(request, layer).mean(0)
        np.testing.assert_allclose(attention.columns[1, :-1], expected, rtol=1e-3, atol=1e-4)
    assert seen.attention[0].rows[1] == rows_of(request, seen.cache.layout).sum()


def test_a_text_only_model() -> None:
    vlm = VLM(build("mistral")[0], words_tokenizer())
    asked = Asked("one", (Image.new("RGB", (8, 8)),), "what colour is the circle ? note says red")
    found = analyze(vlm, Questions("two questions", 2, lambda: iter([asked, asked])), vlm)
    assert found.prompts.with_pictures == 0
    assert {x.verdict for x in found.answers} == {"not applicable"}
    assert np.isfinite(found.rank.mean[0, :, 0, 1]).all()
    page = Page(render(found))
    assert "no picture to speak of" in page.words
    assert page.seen.count("svg") == 5
    json.dumps(found.as_dict(), allow_nan=False)


def test_a_model_without_a_token_grid(edge: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvferry.models.layout.grids_of", lambda *_: ())
    found = analyze(edge, drawn_questions("validation", 1))
    assert found.prompts.with_pictures == 1
    assert found.survivors.drawn == ()
    assert "img" not in Page(render(found)).seen


def test_a_second_model_that_reads_otherwise(edge: VLM) -> None:
    other = VLM(build("qwen2")[0], words_tokenizer())
    with pytest.raises(InputError, match="--against takes a model with the same"):
        analyze(edge, drawn_questions("validation", 1), other)


def run(*words: object) -> Any:
    disable_progress_bar()
    return CliRunner().invoke(app, ["analyze", *map(str, words)])


def test_the_command(tmp_path: Path) -> None:
    Image.radial_gradient("L").convert("RGB").resize((192, 192)).save(tmp_path / "a.png")
    file, report = tmp_path / "asked.jsonl", tmp_path / "report.html"
    file.write_text('{"image": "a.png", "question": "what colour is the circle?"}\n{"question": "what?"}\n')
    done = run("testbed/edge", "--questions", file, "--images", tmp_path, "--html", report)
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith("Do visual tokens have lower rank than text? Undecided: ")
    assert "1 with" in Page(report.read_text()).words
    done = run("testbed/edge", "--n", 1, "--json")
    assert json.loads(done.stdout)["prompts"]["n"] == 1


def test_user_errors(tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    file = tmp_path / "asked.jsonl"
    file.write_text('{"question": "what?"}\n{"image": "broken.png", "question": "what?"}\n')
    for words, what in (
        (["testbed/edge", "--questions", file], "line 2: .*broken.png"),
        (["testbed/edge", "--images", tmp_path], "--data"),
        (["testbed/edge", "--split", "tests"], "validation"),
        (["testbed/edge", "--html", tmp_path / "no" / "report.html"], "no folder"),
    ):
        done = run(*words)
        assert isinstance(done.exception, InputError)
        with pytest.raises(InputError, match=what):
            raise done.exception


def test_a_report_that_cannot_be_written(analysis: Analysis, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot write"):
        write_html(analysis, tmp_path)
