"""The testbed's small language: what can be seen in a scene, and every word that can be said about it."""

from __future__ import annotations

RGB = tuple[int, int, int]

COLOURS: dict[str, RGB] = {
    "red": (214, 39, 40),
    "green": (36, 150, 60),
    "blue": (38, 84, 214),
    "yellow": (245, 218, 40),
    "purple": (128, 44, 160),
    "orange": (250, 128, 14),
    "cyan": (40, 205, 220),
    "white": (246, 246, 246),
}
RARE_COLOURS: dict[str, RGB] = {"pink": (255, 130, 190)}
"""Appears in about one scene in a hundred."""

SHAPES: dict[str, str] = {
    "circle": "circles",
    "square": "squares",
    "triangle": "triangles",
    "star": "stars",
    "diamond": "diamonds",
    "cross": "crosses",
}
RARE_SHAPES: dict[str, str] = {"heart": "hearts"}
"""Appears in about one scene in a hundred."""

ALL_COLOURS = COLOURS | RARE_COLOURS
ALL_SHAPES = SHAPES | RARE_SHAPES
SINGULAR = {plural: shape for shape, plural in ALL_SHAPES.items()}

DIGITS = tuple("0123456789")
GLYPH_LETTERS = tuple("aehkmr")
"""Letters drawn (as capitals) on shapes; chosen to look unlike each other and unlike digits."""

LEXICON = (
    "cat", "dog", "sun", "map", "key", "box", "cup", "hat", "bus", "pen",
    "tree", "fish", "bird", "milk", "ship", "ring", "cake", "lamp", "wolf", "frog",
)  # fmt: skip
"""Words drawn into pictures, to be spelled letter by letter."""

NAMES = ("tom", "ann", "ben", "sue", "max", "eva", "joe", "kim")
"""People in text-only notes."""

SIZES = ("small", "medium", "large")
DIRECTIONS = ("left", "right", "above", "below")
ASKED_DIRECTIONS = ("left", "right")
"""The directions that questions use; four at once took too long to learn."""

IM_START, IM_END = "<|im_start|>", "<|im_end|>"
VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"
IMAGE_PAD, VIDEO_PAD = "<|image_pad|>", "<|video_pad|>"
END_OF_TEXT, UNKNOWN = "<|endoftext|>", "<unk>"
SPECIALS = (END_OF_TEXT, IM_START, IM_END, VISION_START, VISION_END, IMAGE_PAD, VIDEO_PAD, UNKNOWN)

_FUNCTION_WORDS = (
    "system", "user", "assistant", "what", "which", "colour", "shape", "shapes", "digit", "letter", "number",
    "word", "is", "are", "the", "on", "of", "in", "it", "has", "how", "many", "there", "picture", "first",
    "second", "written", "with", "largest", "smallest", "yes", "no", "note", "that", "and", "does", "a", "an",
    "to", "say", "sign", "at", "more", "than", "larger", "smaller", "or", "answer", "question", "nothing",
    *".,?:!",
)  # fmt: skip

VOCABULARY: tuple[str, ...] = tuple(
    dict.fromkeys(
        (
            *SPECIALS,
            *DIGITS,
            *"abcdefghijklmnopqrstuvwxyz",
            *ALL_COLOURS,
            *ALL_SHAPES,
            *ALL_SHAPES.values(),
            *NAMES,
            *SIZES,
            *DIRECTIONS,
            *_FUNCTION_WORDS,
        )
    )
)
TOKEN_ID: dict[str, int] = {word: index for index, word in enumerate(VOCABULARY)}
