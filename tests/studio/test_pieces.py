"""Pieces of the page: nothing that was typed becomes markup, bars have lengths, uploads have an end."""

from __future__ import annotations

import asyncio
import io
import re
from dataclasses import replace
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from kvferry.cli import studio as command
from kvferry.cli.app import app
from kvferry.edge import Answer, Seconds
from kvferry.errors import DependencyError, InputError, LinkError
from kvferry.studio import fragments
from kvferry.studio.bench import Bench
from kvferry.studio.live import Crossed, Shelf, phases_of
from kvferry.studio.uploads import MAX_UPLOAD, BoundedUploads, picture_of


def test_words_and_answers_are_no_markup(bench: Bench) -> None:
    view = bench.view("knorm@0.3|int8")
    evil = replace(view, this=replace(view.this, text="<script>x</script>"))
    assert "<script" not in fragments.answers(evil, "blue")
    assert "&lt;script&gt;" in fragments.answers(evil, "blue")
    words = tuple(replace(word, text="<b>") if word.kind == "question" else word for word in view.words)
    assert "<b>" not in fragments.words(replace(view, words=words), None)
    assert "&lt;b&gt;" in fragments.words(replace(view, words=words), 2)


def test_answers_are_judged_only_where_the_truth_is_known(bench: Bench) -> None:
    view = bench.view("none|bf16")
    assert fragments.answers(view, view.full.text).count('class="right"') == 1
    assert fragments.answers(view, view.full.text).count('class="wrong"') == 2
    assert 'class="right"' not in fragments.answers(view)


def test_bars_are_in_order(bench: Bench) -> None:
    html = fragments.sizes(bench.view("leaveout@0.05|int4|zstd"))
    widths = [float(x) for x in re.findall(r"width: ([\d.]+)%", html)]
    sizes = [int(x.replace(",", "")) for x in re.findall(r"<em>([\d,]+)</em>", html)]
    assert len(widths) == 4
    assert widths == sorted(widths, reverse=True)
    assert sizes == sorted(sizes, reverse=True)
    assert widths[0] == 100


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (Seconds(prefill=0.2, send=0.5, first_token=1.0, total=1.5), (0.2, 0.5, 0.3, 0.5)),
        (Seconds(prefill=0.2, send=0.9, first_token=1.0, total=1.0), (0.2, 0.8, 0.0, 0.0)),
        (Seconds(first_token=0.4, send=0.1, total=0.5), (0.0, 0.1, 0.3, 0.1)),
    ],
)
def test_phases_are_all_of_the_time(seconds: Seconds, expected: tuple[float, ...]) -> None:
    answer = Answer("blue", "kv", "full|bf16", 1, seconds=seconds)
    phases = phases_of(answer)
    assert [phase.seconds for phase in phases] == pytest.approx(expected)
    assert sum(phase.seconds for phase in phases) == pytest.approx(seconds.total)
    assert "blue" in fragments.crossings([Crossed("full|bf16", answer, phases)])


def test_uploads_are_read_as_a_viewer_shows_them() -> None:
    image, exif = Image.new("RGB", (30, 20)), Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    image.save(file, "JPEG", exif=exif)
    assert picture_of(file.getvalue(), "phone.jpg").size == (20, 30)
    with pytest.raises(InputError, match=r"^notes\.txt "):
        picture_of(b"nonsense", "notes.txt")
    with pytest.raises(InputError, match="at most"):
        picture_of(bytes(MAX_UPLOAD + 1), "large.png")


@pytest.mark.parametrize("announced", [True, False])
def test_requests_that_never_end_are_cut_off(announced: bool) -> None:
    async def inner(scope: Any, receive: Any, send: Any) -> None:
        while (message := await receive())["type"] == "http.request" and message["more_body"]:
            taken.append(len(message["body"]))

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": bytes(10), "more_body": True}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    taken: list[int] = []
    sent: list[dict[str, Any]] = []
    headers = [(b"content-length", b"1000")] if announced else []
    asyncio.run(BoundedUploads(inner, most=35)({"type": "http", "headers": headers}, receive, send))  # type: ignore[arg-type]
    assert sum(taken) == (0 if announced else 30)
    assert [x["status"] for x in sent if "status" in x] == ([413] if announced else [])


def test_a_shelf_has_what_it_was_given() -> None:
    with pytest.raises(InputError, match="was not started with other"):
        Shelf(["testbed/cloud"]).model("other")
    with pytest.raises(InputError, match="needs a model"):
        Shelf([])


def test_mistakes_on_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    done = CliRunner().invoke(app, ["studio", "--listen", "nowhere"])
    assert isinstance(done.exception, InputError)
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    done = CliRunner().invoke(app, ["studio"])
    assert isinstance(done.exception, DependencyError)
    assert "pip install 'kvferry[studio]'" in str(done.exception)


def test_a_taken_port_is_named() -> None:
    from kvferry.studio.app import listening

    with listening("127.0.0.1:0") as taken:
        taken.listen()
        with pytest.raises(LinkError, match="the port is taken"), listening(f"127.0.0.1:{taken.getsockname()[1]}"):
            pass
