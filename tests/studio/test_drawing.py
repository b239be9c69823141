"""Kept patches are bright and coloured, dropped ones dim and grey."""

from __future__ import annotations

import base64
import io

import numpy as np
from PIL import Image

from kvferry.studio.drawing import DIM, EDGE, SIDE, data_uri, heat, heat_colour, lit, plain

ORANGE = Image.new("RGB", (64, 32), (200, 100, 20))


def test_kept_patches_keep_their_colours() -> None:
    pixels = lit(ORANGE, np.array([[1, 0], [0, 0]], np.float32))
    height, width = pixels.shape[:2]
    assert (width, height) == (64 * (SIDE // 64), 32 * (SIDE // 64))
    kept, dropped = pixels[height // 4, width // 4], pixels[3 * height // 4, 3 * width // 4]
    np.testing.assert_allclose(kept, plain(ORANGE)[0, 0], atol=1e-6)
    np.testing.assert_allclose(dropped, DIM * plain(ORANGE)[0, 0].mean(), atol=1e-6)
    for edge in (pixels[0, 0], pixels[height // 2 - 1, width // 4], pixels[height // 4, width // 2 - 1]):
        np.testing.assert_array_equal(edge, EDGE)
    assert not (pixels[height // 2 :] == EDGE).all(-1).any()


def test_fewer_heads_are_less_bright() -> None:
    pixels = lit(ORANGE, np.array([[1, 0.5, 0.1, 0]], np.float32))
    width = pixels.shape[1]
    brightness = [float(pixels[pixels.shape[0] // 2, width * i // 8].sum()) for i in (1, 3, 5, 7)]
    assert brightness == sorted(brightness, reverse=True)
    assert brightness[2] > 2 * brightness[3]


def test_heat_tells_shares_apart() -> None:
    colours = heat_colour(np.linspace(0, 1, 9, dtype=np.float32))
    assert len({tuple(colour) for colour in colours.round(3)}) == 9
    pixels = heat(ORANGE, np.array([[0, 1]], np.float32))
    left, right = pixels[5, 5], pixels[5, -5]
    assert np.ptp(left) < 1e-6
    assert right.mean() > 2 * left.mean()


def test_large_pictures_are_scaled_down() -> None:
    assert plain(Image.new("RGB", (3000, 1500))).shape == (SIDE // 2, SIDE, 3)
    assert plain(Image.new("RGB", (1, 4000))).shape == (SIDE, 1, 3)


def test_a_page_needs_no_file() -> None:
    uri = data_uri(plain(ORANGE))
    with Image.open(io.BytesIO(base64.b64decode(uri.removeprefix("data:image/jpeg;base64,")))) as image:
        assert np.abs(np.asarray(image, np.float32).mean((0, 1)) - (200, 100, 20)).max() < 3
