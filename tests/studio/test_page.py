"""The page in a real browser: a visitor asks, drags, chooses, mistypes, drops a picture and sends."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import uvicorn
from PIL import Image

from kvferry import VLM
from kvferry.studio.app import listening, studio_app
from kvferry.studio.examples import examples
from kvferry.studio.live import Shelf
from tests.crossing.process import CloudProcess
from tests.studio.browser import CHROMIUM, Browser, wait_for

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH")
NAME = "testbed/cloud"
PICTURE = "document.querySelector('.pictures img').src"


class Visit:
    """A tab with the page in it."""

    def __init__(self, browser: Browser) -> None:
        self.browser = browser

    @property
    def bytes(self) -> int:
        return int(self.browser.text(".headline b").replace(",", ""))

    @property
    def recipe(self) -> str:
        return str(self.browser.js("document.querySelector('.recipe textarea').value"))

    @property
    def complaint(self) -> str:
        return self.browser.text(".complaint:not(.hidden)")

    def settled(self, recipe: str) -> None:
        """Wait until the page shows this recipe and rests, without a complaint."""
        self.browser.until(f"document.querySelector('.recipe-shown')?.innerText === {recipe!r}")
        self.browser.until("document.querySelector('.q-spinner').closest('.hidden') !== null")
        self.browser.until("document.querySelector('.complaint.hidden') !== null")
        assert self.recipe == recipe


@pytest.fixture(scope="module")
def address(model: VLM) -> Iterator[str]:
    """The page as it is served, in this process; its cloud is a second one, as always."""
    with CloudProcess(Path(NAME)) as cloud, listening("127.0.0.1:0") as sock:
        shelf = Shelf([NAME], clouds={NAME: cloud.address})
        shelf.put(NAME, model)
        sock.listen()
        with closing(shelf):
            server = uvicorn.Server(uvicorn.Config(studio_app(shelf), log_level="warning", timeout_graceful_shutdown=1))
            thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
            thread.start()
            wait_for(lambda: server.started, "the page")
            yield "http://{}:{}/".format(*sock.getsockname())
            server.should_exit = True
            thread.join(20)


@pytest.fixture(scope="module")
def visit(address: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Visit]:
    with Browser(tmp_path_factory.mktemp("profile")) as browser:
        browser.open(address)
        browser.until("document.querySelector('.answers')")
        visit = Visit(browser)
        yield visit
        assert browser.complaints == []
        outside = [x for x in browser.requests if address.split("/")[2] not in x and not x.startswith("data:")]
        assert outside == []


def test_the_first_look_answers(visit: Visit) -> None:
    visit.settled("leaveout@0.1|int4|zstd")
    said = visit.browser.text(".answers").split("\n")
    assert examples()[0].truth in said[1]
    assert visit.browser.js("document.querySelectorAll('.columns.kept div').length") == 6
    assert visit.browser.text(".words .question").strip() == examples()[0].question.split()[0]


def test_dragging_the_budget_changes_bytes_and_picture(visit: Visit) -> None:
    bytes_before, picture_before = visit.bytes, visit.browser.js(PICTURE)
    visit.browser.drag(".slider", 0.7)
    visit.settled("leaveout@0.4|int4|zstd")
    assert visit.bytes > 2 * bytes_before
    assert visit.browser.js(PICTURE) != picture_before


def test_a_layer_of_its_own(visit: Visit) -> None:
    picture_before = visit.browser.js(PICTURE)
    visit.browser.drag(".layer", 0.5)
    visit.browser.until("document.querySelector('.columns .current') !== null")
    visit.browser.until(f"{PICTURE} !== {picture_before!r}")
    visit.browser.click(".look .q-btn:nth-child(2)")
    visit.browser.until("document.querySelector('.scale').offsetParent !== null")


def test_menus_and_typed_recipes_agree(visit: Visit) -> None:
    visit.browser.choose(".menu-scorer", "knorm")
    visit.settled("knorm@0.4|int4|zstd")
    visit.browser.type(".recipe textarea", "snapkv@0.1,window=16 | int8")
    visit.settled("snapkv@0.1,window=16|int8")
    assert visit.browser.js("document.querySelector('.menu-scorer input').value") == "snapkv,window=16"
    visit.browser.type(".recipe textarea", "leaveot@0.1|int4")
    visit.browser.until("document.querySelector('.complaint:not(.hidden)') !== null")
    assert "did you mean 'leaveout'" in visit.complaint
    visit.browser.type(".recipe textarea", "leaveout@0.1|int4")
    visit.settled("leaveout@0.1|int4")


def test_mistakes_are_sentences_on_the_page(visit: Visit, tmp_path: Path) -> None:
    visit.browser.type(".question textarea", " ")
    visit.browser.until("document.querySelector('.complaint')?.innerText.startsWith('there is no question yet')")
    (tmp_path / "notes.png").write_bytes(b"no picture")
    visit.browser.upload(".q-uploader__input", tmp_path / "notes.png")
    visit.browser.until("document.querySelector('.complaint')?.innerText.startsWith('notes.png')")


def test_a_picture_of_ones_own(visit: Visit, tmp_path: Path) -> None:
    Image.new("RGB", (120, 80), (200, 30, 30)).save(tmp_path / "mine.png")
    visit.browser.type(".question textarea", "what colour is it?")
    visit.browser.upload(".q-uploader__input", tmp_path / "mine.png")
    visit.browser.until("document.querySelector('.thumbs .chosen') === null")
    visit.browser.until("document.querySelector('.pictures img').naturalWidth === 720")
    assert visit.browser.js("document.querySelector('.answers i')") is None
    assert "knows drawn scenes only" in visit.browser.text(".studio")


def test_ship_first_and_two_pictures(visit: Visit) -> None:
    visit.browser.click(".thumbs img:nth-child(8)")
    visit.browser.until("document.querySelectorAll('.pictures img').length === 2")
    visit.settled("leaveout@0.1|int4")
    visit.browser.click(".protocol .q-btn:nth-child(2)")
    visit.browser.until("document.querySelector('.words .question') === null")
    visit.browser.choose(".menu-scorer", "q2c")
    visit.browser.until("document.querySelector('.complaint:not(.hidden)') !== null")
    assert "ask first" in visit.complaint
    visit.browser.choose(".menu-scorer", "knorm")
    visit.settled("knorm@0.1|int4")


def test_live_over_a_link(visit: Visit) -> None:
    visit.browser.click(".send")
    visit.browser.until("document.querySelectorAll('.way').length === 2")
    cache, jpeg = visit.browser.js("[...document.querySelectorAll('.way > span')].map((x) => x.innerText)")
    wire = [int(text.split(" bytes")[0].replace(",", "")) for text in (cache, jpeg)]
    assert wire[0] > visit.bytes
    assert wire[1] > 10_000
    assert "first token after" in cache
    visit.browser.until("document.querySelector('.send').disabled === false")
