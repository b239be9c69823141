"""Where an edge that stays gets its questions from."""

from __future__ import annotations

import threading
import time
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kvferry.edge.sources import Item, filmed, from_lines, watched
from kvferry.errors import InputError

av = pytest.importorskip("av")


@pytest.fixture
def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (16, 16)).save("a.png")
    Image.new("RGB", (16, 16)).save("b.png")
    return "a.png"


def test_lines(scene: str) -> None:
    lines = [
        "a.png\twhat?\n", "\n", "b.png\n", "which?\n", "why?", "a.png\tb.png\thow many?", '{"question": "and now?"}',
        '{"image": "a.png", "question": "who?"}', '{"images": [], "question": "2 + 2?"}',
        '{"messages": [{"role": "user", "content": [{"type": "image", "path": "b.png"}, {"type": "text", "text": "x"}]}'
        "]}",
    ]  # fmt: skip
    items = list(from_lines(lines))
    assert [item.error for item in items] == [None] * 8
    assert [(item.images, item.question) for item in items[:8]] == [
        (("a.png",), "what?"), (("b.png",), "which?"), (("b.png",), "why?"), (("a.png", "b.png"), "how many?"),
        (("b.png",), "and now?"), (("a.png",), "who?"), ((), "2 + 2?"), ((), ""),
    ]  # fmt: skip
    assert items[1].shown == {"images": ["b.png"], "question": "which?"}
    assert items[7].messages is not None
    (first,) = from_lines(["what?"], ["a.png"])
    assert first == Item({"images": ["a.png"], "question": "what?"}, ("a.png",), "what?")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("nowhere.png\twhat?", "there is no picture at nowhere.png"),
        ("nowhere.png", "there is no picture at nowhere.png"),
        ("a.png\t ", "the question is empty"),
        ("{", "is no JSON"),
        ('{"picture": "a.png", "question": "x"}', "no picture; there are image, images"),
        ('{"image": "a.png"}', "the question is empty"),
        ('{"image": "a.png", "images": [], "question": "x"}', "not both"),
        ('{"image": 3, "question": "x"}', "images are paths"),
        ('{"messages": [], "question": "x"}', "leave the other fields out"),
        ('{"messages": []}', "one message at least"),
    ],
)
def test_a_wrong_line_does_not_end_it(scene: str, line: str, expected: str) -> None:
    wrong, right = from_lines([line, "a.png\twhat?"])
    assert expected in str(wrong.error)
    assert wrong.shown == {"line": line}
    assert right.error is None


def test_a_folder(tmp_path: Path, scene: str) -> None:
    def write() -> None:
        time.sleep(0.2)
        (tmp_path / "notes.txt").write_text("no picture")
        with (tmp_path / "new.png").open("wb") as file:  # it grows
            data = Path("a.png").read_bytes()
            file.write(data[:20])
            file.flush()
            time.sleep(0.2)
            file.write(data[20:])
        (tmp_path / "broken.jpg").write_bytes(b"no picture")

    thread = threading.Thread(target=write)
    thread.start()
    found = {Path(item.shown["images"][0]).name: item.error for item in islice(watched(tmp_path, "what?"), 2)}
    thread.join()
    assert found["new.png"] is None
    assert "is not an image" in str(found["broken.jpg"])
    with pytest.raises(InputError, match="there is no folder"):
        watched(tmp_path / "nowhere", "what?")


def write_video(path: Path, seconds: int, turn: int = 0) -> None:
    """Ten frames a second, each as grey as its number; the upper half is white."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        if turn:
            stream.set_display_rotation(turn)
        for number in range(10 * seconds):
            pixels = np.full((32, 64, 3), 5 * number, np.uint8)
            pixels[:16] = 255
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))


@pytest.mark.parametrize(("fps", "times"), [(0.5, [0, 2]), (1, [0, 1, 2]), (2, [0, 0.5, 1, 1.5, 2, 2.5]), (1000, None)])
def test_a_video(tmp_path: Path, fps: float, times: list[float] | None) -> None:
    write_video(tmp_path / "film.mp4", 3)
    items = list(filmed(str(tmp_path / "film.mp4"), "what?", fps))
    expected = times or [number / 10 for number in range(30)]
    assert [item.shown["seconds"] for item in items] == pytest.approx(expected)
    for item in items:
        grey = np.asarray(item.images[0])[20:, :, 0].mean()
        assert abs(grey - 50 * item.shown["seconds"]) < 6


def test_a_video_of_a_phone_is_upright(tmp_path: Path) -> None:
    write_video(tmp_path / "film.mp4", 1, turn=90)
    image = next(filmed(str(tmp_path / "film.mp4"), "what?", 1)).images[0]
    assert image.size == (32, 64)
    left, right = (np.asarray(image)[:, part].mean() for part in (slice(0, 12), slice(20, 32)))
    assert (left > 200) != (right > 200)  # what was above stands at a side
    assert left > right  # turned counter-clockwise


def test_a_camera_gives_the_newest_frame() -> None:
    began = time.monotonic()
    items = filmed("testsrc=size=64x48:rate=10", "what?", 100, live=True, format="lavfi")
    first = next(items)
    assert first.images[0].size == (64, 48)
    time.sleep(0.3)
    second = next(items)
    assert second.shown["seconds"] > first.shown["seconds"] + 1  # this camera is as fast as it can be
    items.close()
    assert time.monotonic() - began < 20


@pytest.mark.parametrize(("fps", "expected"), [(0, "a frame rate is"), (1, "cannot be read")])
def test_no_video(tmp_path: Path, fps: float, expected: str) -> None:
    (tmp_path / "film.mp4").write_text("no film")
    with pytest.raises(InputError, match=expected):
        list(filmed(str(tmp_path / "film.mp4"), "what?", fps))
