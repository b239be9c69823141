"""Scenes: what stands where in a picture, drawn from a seed and never touching a pixel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from . import words

Box = tuple[int, int, int, int]
"""x0, y0, x1, y1 in pixels."""

DIAMETERS: tuple[tuple[int, ...], ...] = ((30,), (42,), (56,))
"""Diameters in pixels of small, medium and large things."""

LATTICE = 4
"""Centres lie on a lattice of this many pixels, a quarter of a visual token. With one pixel the towers read two
thirds to three quarters of the glyphs after 2,700 steps, and there was no time for more."""

MARGIN = 1
"""Pixels between a thing's edge and the picture's, at least."""

RARE = 0.01
"""Share of scenes with a rare colour, and share of scenes with a rare shape."""


@dataclass(frozen=True)
class Thing:
    """One object: a coloured shape, possibly with a digit, a letter or a two-digit number on it."""

    colour: str
    shape: str
    glyph: str
    x: float
    y: float
    diameter: float
    level: int

    @property
    def box(self) -> Box:
        """The square that the thing fills."""
        r = self.diameter / 2
        return (int(self.x - r), int(self.y - r), int(self.x + r), int(self.y + r))

    @property
    def name(self) -> str:
        """Colour and shape, as an answer says them."""
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True)
class Sign:
    """A word drawn into the picture."""

    word: str
    colour: str
    box: Box
    height: int


@dataclass(frozen=True)
class Scene:
    """Everything that a picture shows; later things lie over earlier ones."""

    width: int
    height: int
    things: tuple[Thing, ...]
    signs: tuple[Sign, ...]
    style: int
    """Seed of everything that no question asks for: background, distractor lines, shades."""


def _palette(rng: np.random.Generator, common: list[str], rare: list[str], size: int) -> list[str]:
    """A few attributes that the scene's things share, so that no single attribute names a thing."""
    chosen = [str(name) for name in rng.choice(common, size=size, replace=False)]
    if rng.random() < RARE:
        chosen[0] = str(rng.choice(rare))
    return chosen


def _glyph(rng: np.random.Generator, level: int, shape: str) -> str:
    """Mostly a digit or a letter; a two-digit number where there is room; sometimes nothing."""
    kind = rng.random()
    if kind < 0.15:
        return ""
    if kind < 0.65 and level > 0 and shape in ("circle", "square"):
        return f"{rng.integers(1, 10)}{rng.integers(0, 10)}"
    if rng.random() < 0.4:
        return str(rng.choice(words.GLYPH_LETTERS))
    return str(rng.choice(words.DIGITS))


def _far_enough(x: float, y: float, diameter: float, other: Thing) -> bool:
    """Whether two things overlap at most mildly, and neither covers the other's glyph."""
    big, small = max(diameter, other.diameter), min(diameter, other.diameter)
    least = max(0.42 * (big + small), 0.5 * big + 0.32 * small)
    return (x - other.x) ** 2 + (y - other.y) ** 2 >= least**2


def _clear_of(x: float, y: float, diameter: float, box: Box) -> bool:
    """Whether a thing keeps off a sign."""
    r = diameter / 2 + 1
    return x + r <= box[0] or x - r >= box[2] or y + r <= box[1] or y - r >= box[3]


def _place_signs(rng: np.random.Generator, width: int, height: int, lattice: int, heights: Sequence[int]) -> list[Sign]:
    """No sign in a quarter of the scenes, one in a half, two in a quarter; two never share a colour or a row."""
    count = int(rng.choice([0, 1, 1, 2]))
    texts = rng.choice(words.LEXICON, size=count, replace=False)
    colours = rng.choice(list(words.COLOURS), size=count, replace=False)
    signs: list[Sign] = []
    for index, (text, colour) in enumerate(zip(texts, colours, strict=True)):
        tall = heights[0] if len(heights) == 1 else int(rng.choice(heights))
        wide = round(0.62 * tall * len(text)) + 4
        top = 0 if index == 0 else height // 2
        bottom = height if count == 1 else top + height // 2
        x = lattice * int(rng.integers(0, (width - wide) // lattice + 1))
        y = lattice * int(rng.integers(top // lattice, (bottom - tall - 4) // lattice + 1))
        signs.append(Sign(str(text), str(colour), (x, y, x + wide, y + tall + 2), tall))
    return signs


def draw_scene(
    rng: np.random.Generator,
    width: int,
    height: int,
    *,
    most: int | None = None,
    signs: bool = True,
    lattice: int = LATTICE,
    sign_heights: Sequence[int] = (20,),
) -> Scene:
    """Draw one scene.

    Parameters
    ----------
    width, height
        Size of the picture in pixels.
    most
        The largest number of things; by default what fits (3 to 8).
    signs
        Whether words may appear.
    lattice
        Centres and signs lie on multiples of this many pixels.
    sign_heights
        Font sizes of words in pixels.
    """
    fits = most or min(8, max(2, 3 + (width * height - 128 * 128) // 6000))
    count = int(rng.integers(min(3, fits), fits + 1))
    placed_signs = _place_signs(rng, width, height, lattice, sign_heights) if signs else []
    colours = _palette(rng, list(words.COLOURS), list(words.RARE_COLOURS), int(rng.integers(2, 6)))
    shapes = _palette(rng, list(words.SHAPES), list(words.RARE_SHAPES), int(rng.integers(2, 5)))
    things: list[Thing] = []
    for _ in range(count):
        level = int(rng.choice(3, p=(0.4, 0.4, 0.2)))
        for attempt in range(40):
            if attempt == 20 or 1.6 * DIAMETERS[level][-1] > min(width, height):
                level = 0
            diameter = float(rng.choice(DIAMETERS[level]))
            least = -(-int(diameter / 2 + MARGIN) // lattice)
            x = float(lattice * rng.integers(least, width // lattice - least + 1))
            y = float(lattice * rng.integers(least, height // lattice - least + 1))
            if all(_far_enough(x, y, diameter, other) for other in things) and all(
                _clear_of(x, y, diameter, sign.box) for sign in placed_signs
            ):
                colour, shape = str(rng.choice(colours)), str(rng.choice(shapes))
                glyph = _glyph(rng, level, shape)
                things.append(Thing(colour, shape, glyph, x, y, diameter, level))
                break
    return Scene(width, height, tuple(things), tuple(placed_signs), int(rng.integers(2**31)))


def neighbour(scene: Scene, of: int, direction: str) -> int | None:
    """The nearest thing clearly left of, right of, above or below another, or None.

    A thing counts as *left* when its centre is further left than it is up or down. The answer is -1 where it would be
    a matter of opinion: a second thing nearly as near, or one near the diagonal.
    """
    centre = scene.things[of]
    clear: list[tuple[float, int]] = []
    doubtful: list[float] = []
    for index, thing in enumerate(scene.things):
        dx, dy = thing.x - centre.x, thing.y - centre.y
        along, across = {
            "left": (-dx, abs(dy)),
            "right": (dx, abs(dy)),
            "above": (-dy, abs(dx)),
            "below": (dy, abs(dx)),
        }[direction]
        distance = (dx * dx + dy * dy) ** 0.5
        if index == of or along <= 0:
            continue
        if across <= 0.8 * along:
            clear.append((distance, index))
        elif across <= 1.25 * along:
            doubtful.append(distance)
    if not clear:
        return -1 if doubtful else None
    clear.sort()
    nearest = clear[0][0]
    rivals = [distance for distance, _ in clear[1:]] + doubtful
    return clear[0][1] if all(distance > 1.2 * nearest for distance in rivals) else -1
