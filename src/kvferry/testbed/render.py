"""Draw a scene: background, distractor lines, things with their glyphs, signs."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from .backgrounds import Pixels, background
from .scenes import Scene, Sign, Thing
from .words import ALL_COLOURS, RGB

Points = list[tuple[float, float]]
Backdrop = Callable[[np.random.Generator, int, int], Pixels]
GLYPH_SIZE = 18
"""Font size of glyphs in pixels, on small and large things alike; capitals are about 13 pixels tall."""

_FINE = 3
"""Things are drawn this many times larger and shrunk, for smooth edges."""


@lru_cache(maxsize=64)
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's built-in face; needs no font file on the machine."""
    return ImageFont.load_default(size)


@lru_cache(maxsize=16)
def _unit_outline(shape: str) -> tuple[tuple[float, float], ...]:
    """The shape's corners for a diameter of 2, centred on the origin."""
    turn = 2 * math.pi
    if shape == "circle":
        return tuple((math.cos(turn * i / 40), math.sin(turn * i / 40)) for i in range(40))
    if shape == "square":
        return ((-0.84, -0.84), (0.84, -0.84), (0.84, 0.84), (-0.84, 0.84))
    if shape == "triangle":
        return ((0.0, -1.0), (0.98, 0.86), (-0.98, 0.86))
    if shape == "star":
        spokes = [(1.0 if i % 2 == 0 else 0.56) for i in range(10)]
        return tuple((r * math.sin(turn * i / 10), -r * math.cos(turn * i / 10)) for i, r in enumerate(spokes))
    if shape == "diamond":
        return ((0.0, -1.0), (0.74, 0.0), (0.0, 1.0), (-0.74, 0.0))
    if shape == "cross":
        a = 0.42
        return (
            (-a, -1), (a, -1), (a, -a), (1, -a), (1, a), (a, a), (a, 1), (-a, 1), (-a, a), (-1, a), (-1, -a), (-a, -a),
        )  # fmt: skip
    if shape == "heart":
        steps = [turn * i / 40 for i in range(40)]
        return tuple(
            (
                math.sin(t) ** 3,
                -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 16 - 0.08,
            )
            for t in steps
        )
    raise ValueError(f"unknown shape {shape!r}")


def outline(thing: Thing, centre: tuple[float, float] | None = None, scale: float = 1.0) -> Points:
    """The thing's corners in pixels."""
    cx, cy = centre or (thing.x, thing.y)
    r = thing.diameter / 2 * scale
    return [(cx + r * x, cy + r * y) for x, y in _unit_outline(thing.shape)]


def cover_map(scene: Scene) -> npt.NDArray[np.uint8]:
    """Which thing or sign is on top at every pixel, `[height, width]`.

    0 is background, 1.. the things in order, 101.. the signs.
    """
    canvas = Image.new("L", (scene.width, scene.height), 0)
    pen = ImageDraw.Draw(canvas)
    for index, thing in enumerate(scene.things):
        pen.polygon(outline(thing), fill=index + 1)
    for index, sign in enumerate(scene.signs):
        pen.rectangle(sign.box, fill=101 + index)
    return np.asarray(canvas)


def _ink(colour: RGB) -> RGB:
    """Black or white, whichever reads better on a colour."""
    luminance = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]
    return (12, 12, 12) if luminance > 125 else (250, 250, 250)


def _shade(rng: np.random.Generator, colour: RGB) -> RGB:
    """The colour in slightly different light."""
    light, tint = rng.uniform(0.86, 1.06), rng.uniform(-8, 8, 3)
    r, g, b = (int(min(255, max(0, value * light + t))) for value, t in zip(colour, tint, strict=True))
    return r, g, b


def _draw_thing(picture: Image.Image, rng: np.random.Generator, thing: Thing) -> None:
    """Draw one thing, larger and then shrunk, and lay it over the picture."""
    side = math.ceil(thing.diameter) + 4
    left, top = round(thing.x - side / 2), round(thing.y - side / 2)
    centre = ((thing.x - left) * _FINE, (thing.y - top) * _FINE)
    big = (side * _FINE, side * _FINE)
    mask = Image.new("L", big, 0)
    points = outline(thing, centre, _FINE)
    ImageDraw.Draw(mask).polygon(points, fill=255)
    fill = _shade(rng, ALL_COLOURS[thing.colour])
    tile = Image.new("RGB", big, fill)
    pen = ImageDraw.Draw(tile)
    edge = (int(fill[0] * 0.4), int(fill[1] * 0.4), int(fill[2] * 0.4))
    pen.line([*points, points[0], points[1]], fill=edge, width=3 * _FINE, joint="curve")
    if thing.glyph:
        drop = (4 if thing.level == 0 else 8) if thing.shape == "triangle" else 0
        ink, font = _ink(ALL_COLOURS[thing.colour]), _font(GLYPH_SIZE * _FINE)
        first = -8 * (len(thing.glyph) - 1)
        for place, character in enumerate(thing.glyph.upper()):
            spot = (centre[0] + (first + 16 * place) * _FINE, centre[1] + drop * _FINE)
            pen.text(spot, character, fill=ink, font=font, anchor="mm")
    small = (side, side)
    tile = tile.resize(small, Image.Resampling.BOX)
    picture.paste(tile, (left, top), mask.resize(small, Image.Resampling.BOX))


def _draw_sign(picture: Image.Image, sign: Sign) -> None:
    """Write a word in its colour with a contrasting rim."""
    colour = ALL_COLOURS[sign.colour]
    middle = ((sign.box[0] + sign.box[2]) / 2, (sign.box[1] + sign.box[3]) / 2)
    ImageDraw.Draw(picture).text(
        middle, sign.word, fill=colour, font=_font(sign.height), anchor="mm", stroke_width=2, stroke_fill=_ink(colour)
    )


def _draw_lines(picture: Image.Image, rng: np.random.Generator, count: int, width: int) -> None:
    """Straight lines that mean nothing."""
    pen = ImageDraw.Draw(picture)
    for _ in range(count):
        x0, x1 = rng.uniform(0, picture.width, 2)
        y0, y1 = rng.uniform(0, picture.height, 2)
        r, g, b = (int(value) for value in rng.integers(0, 256, 3))
        pen.line((x0, y0, x1, y1), fill=(r, g, b), width=width)


def render(scene: Scene, backdrop: Backdrop = background) -> Image.Image:
    """The scene as an RGB picture; the same scene always gives the same pixels.

    Parameters
    ----------
    backdrop
        Draws what is behind the scene: float32 ``[height, width, 3]`` in 0..255.
    """
    rng = np.random.default_rng(scene.style)
    pixels = backdrop(rng, scene.width, scene.height)
    picture = Image.fromarray(pixels.astype(np.uint8))
    _draw_lines(picture, rng, int(rng.integers(0, 4)), int(rng.integers(1, 3)))
    for thing in scene.things:
        _draw_thing(picture, rng, thing)
    for sign in scene.signs:
        _draw_sign(picture, sign)
    _draw_lines(picture, rng, int(rng.random() < 0.3), 1)
    return picture
