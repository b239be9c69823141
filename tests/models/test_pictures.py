"""Pictures that cannot be used are named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kvferry.errors import InputError
from kvferry.models.pictures import open_picture


def test_every_mode_becomes_rgb() -> None:
    for mode in ("1", "L", "P", "RGBA", "CMYK", "I;16"):
        assert open_picture(Image.new(mode, (5, 4))).mode == "RGB"
    for shape in ((4, 5), (4, 5, 1), (4, 5, 3), (4, 5, 4)):
        image = open_picture(np.zeros(shape, np.uint8))
        assert (image.mode, image.size) == ("RGB", (5, 4))
    assert open_picture(np.ones((2, 2, 3))).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((3, 4, 5), np.uint8), "shape"),
        (np.zeros((0, 4, 3), np.uint8), "shape"),
        (np.zeros(7, np.uint8), "shape"),
        (np.full((2, 2, 3), 255.0), "divide by 255"),
        (np.full((2, 2, 3), np.nan), "divide by 255"),
        (np.zeros((2, 2, 3), np.int64), "int64"),
        (None, "NoneType"),
        (b"GIF89a", "bytes"),
    ],
)
def test_what_is_no_picture(array: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        open_picture(array)


def test_files(tmp_path: Path) -> None:
    words, cut, bomb = tmp_path / "a.png", tmp_path / "b.png", tmp_path / "c.png"
    words.write_text("no picture at all")
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    noise.save(cut)
    cut.write_bytes(cut.read_bytes()[:2000])
    Image.new("1", (20_000, 10_000)).save(bomb)
    for path, message in (
        (words, "not an image"), (cut, "cannot be decoded"), (bomb, "too large"), (tmp_path, "cannot be read"),
        (tmp_path / "none.png", "no picture at"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            open_picture(path)


def test_a_huge_picture_in_memory() -> None:
    with pytest.raises(InputError, match="too large"):
        open_picture(Image.new("1", (12_000, 9_000)))
