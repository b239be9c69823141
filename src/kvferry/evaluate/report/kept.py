"""Pictures with the tokens that recipes keep, as they stand in the report."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from kvferry.evaluate.sweep import with_room
from kvferry.overlay import jpeg_bytes, kept_share, lit_pixels
from kvferry.pictures import open_picture
from kvferry.recipe import Recipe, compress, decompress

if TYPE_CHECKING:
    from kvferry.models import VLM
    from kvferry.testbed import Sample


@dataclass(frozen=True)
class Panel:
    """A JPEG as base64, and what it shows."""

    title: str
    jpeg: str


@dataclass(frozen=True)
class Shown:
    """One question: the picture as it is, then what each recipe keeps of it and what the model says on that."""

    question: str
    answer: str
    panels: tuple[Panel, ...]


def kept_pictures(vlm: VLM, asked: Iterable[Sample], recipes: Sequence[str]) -> Iterator[Shown]:
    """Prefill each question once a recipe (protocol A), send the cache through its bytes, and draw what is left.

    The brighter a cell, the more layers and heads keep its token.
    """
    for sample in asked:
        panels = [Panel("what the edge sees", _jpeg(np.asarray(open_picture(sample.images[0]))))]
        for text in recipes:
            recipe = Recipe.parse(text)
            prefilled = vlm.prefill(sample.images, sample.question, recipe=recipe)
            blob = with_room(partial(compress, prefilled), recipe)
            cache = decompress(blob)
            share = kept_share(cache)
            pixels = (255 * lit_pixels(sample.images[0], share)).round().astype(np.uint8)
            said = vlm.answer(cache)
            title = f"{text}: {share.mean():.0%} of it, {len(blob):,} bytes, says {said!r}"
            panels.append(Panel(title, _jpeg(pixels)))
        yield Shown(sample.question, sample.answer, tuple(panels))


def _jpeg(pixels: npt.NDArray[np.uint8]) -> str:
    from PIL import Image

    return base64.b64encode(jpeg_bytes(Image.fromarray(pixels))).decode()
