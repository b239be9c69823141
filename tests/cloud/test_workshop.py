"""Pictures decoded in a process of their own: the same pixels, and it may die."""

from __future__ import annotations

import io
import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

from kvferry import VLM
from kvferry.cloud import Limits, workshop
from kvferry.cloud.costs import Account, Budget
from kvferry.cloud.workshop import APART_PIXELS, Workshop
from kvferry.errors import CancelledError, InputError
from kvferry.pictures import open_picture
from kvferry.pictures.apart import as_is
from tests.crossing.fixtures import model_folder, vlm
from tests.crossing.hostile.attacks import scanned

__all__ = ["model_folder", "vlm"]
SIDE = 1800
"""Of a picture that is decoded apart."""


@pytest.fixture
def shop() -> Iterator[Workshop]:
    shop = Workshop()
    yield shop
    shop.close()
    assert shop.pid is None


@pytest.fixture
def account() -> Iterator[Account]:
    with Budget(Limits()).account() as account:
        yield account


def drawn(width: int, height: int, **options: object) -> bytes:
    levels = np.random.default_rng(0).integers(0, 256, (height // 10, width // 10, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(levels).resize((width, height)).save(out, "JPEG", **options)
    return out.getvalue()


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return drawn(SIDE, SIDE - 400, exif=exif)


def until(true: Callable[[], object]) -> None:
    end = time.monotonic() + 20
    while not true():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_small_pictures_need_no_process(shop: Workshop, account: Account) -> None:
    side = int(APART_PIXELS**0.5)
    assert shop.open(account, drawn(side, side), as_is).size == (side, side)
    assert shop.pid is None
    assert account.seconds == 0


def test_the_pixels_are_those_of_a_picture_decoded_here(shop: Workshop, account: Account) -> None:
    for file in (drawn(SIDE, SIDE), turned()):
        there, here = shop.open(account, file, as_is), open_picture(file)
        assert there.size == here.size
        assert there.tobytes() == here.tobytes()
    assert account.seconds > 0
    with pytest.raises(InputError, match="cannot be decoded"):
        shop.open(account, drawn(SIDE, SIDE)[:-20000], as_is)


def test_a_scaled_picture_is_read_as_the_whole_one(shop: Workshop, account: Account, vlm: VLM) -> None:
    for file in (drawn(SIDE, SIDE - 500), turned()):
        scaled = shop.open(account, file, vlm.reduced)
        assert scaled.width * scaled.height < 70_000
        here, there = (vlm.prompt_of([x], "what is it?")[0].inputs for x in (open_picture(file), scaled))
        assert all(torch.equal(here[name], there[name]) for name in here)


def test_a_process_that_died_is_named_and_replaced(shop: Workshop, account: Account) -> None:
    file = scanned(40, 4000)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(shop.open, account, file, as_is)
        until(lambda: shop.pid)
        time.sleep(0.3)
        first = shop.pid
        assert first is not None
        os.kill(first, signal.SIGKILL)
        with pytest.raises(InputError, match="ended by SIGKILL; save the picture again"):
            waiting.result()
    assert shop.open(account, drawn(SIDE, SIDE), as_is).size == (SIDE, SIDE)
    assert shop.pid not in (None, first)


def test_it_is_killed_when_nobody_waits(shop: Workshop) -> None:
    with Budget(Limits()).account() as account, ThreadPoolExecutor(2) as pool:
        waiting = [
            pool.submit(shop.open, account, scanned(40, 4000), as_is) for _ in range(2)
        ]  # one is behind the other
        until(lambda: shop.pid)
        time.sleep(0.2)
        account.close()
        began = time.monotonic()
        for each in waiting:
            with pytest.raises(CancelledError):
                each.result()
        assert time.monotonic() - began < 1
        assert shop.pid is None


def test_it_has_the_processor_time_that_is_left(shop: Workshop) -> None:
    with Budget(Limits(decode_seconds=0.1)).account() as account:
        with pytest.raises(InputError, match=r"more than 0\.1 s to decode"):
            shop.open(account, scanned(64, 5000), as_is)
        assert account.seconds_left == 0


def test_it_has_the_memory_that_was_reckoned(shop: Workshop, account: Account, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workshop, "decoding_bytes", lambda _: 0)
    with pytest.raises(InputError, match="bytes to decode; save it smaller"):
        shop.open(account, scanned(1, 5000), as_is)
    monkeypatch.undo()
    assert shop.open(account, scanned(1, 2000), as_is).size == (2000, 2000)


@pytest.mark.parametrize("kind", ["L", "I;16", "RGB", "RGBA", "P", "CMYK", "WEBP", "LA"])
def test_what_is_reckoned_is_enough(
    shop: Workshop, account: Account, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For every kind of picture, without the slack."""
    monkeypatch.setattr(workshop, "SLACK_BYTES", 4 << 20)
    picture = Image.linear_gradient("L").resize((2400, 1600))
    picture = Image.fromarray(np.asarray(picture).astype(np.uint16) * 200) if kind == "I;16" else picture
    picture = picture.convert("RGB" if kind == "WEBP" else kind) if kind not in ("L", "I;16") else picture
    out = io.BytesIO()
    picture.save(out, {"WEBP": "WEBP", "CMYK": "JPEG"}.get(kind, "PNG"))
    assert shop.open(account, out.getvalue(), as_is).tobytes() == open_picture(out.getvalue()).tobytes()


def test_an_idle_process_ends(shop: Workshop, account: Account, monkeypatch: pytest.MonkeyPatch) -> None:
    shop.open(account, drawn(SIDE, SIDE), as_is)
    shop.rest()
    assert shop.pid is not None
    monkeypatch.setattr(workshop, "IDLE_SECONDS", 0.0)
    shop.rest()
    assert shop.pid is None
