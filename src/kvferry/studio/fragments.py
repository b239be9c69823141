"""Pieces of the page as HTML, made from plain data; whatever a user typed or a model said is escaped."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from kvferry.studio.bench import View, Word, layer_bytes, parts_of
from kvferry.testbed import exact_match

if TYPE_CHECKING:
    from kvferry.studio.live import Crossed

LEAST = 100
"""Bytes where the logarithmic scale of sizes begins."""


@dataclass(frozen=True)
class Size:
    """One bar; ``length`` in 0..1."""

    name: str
    bytes: int
    role: str
    length: float


@dataclass(frozen=True)
class Shown:
    """A word with one share instead of one for each layer."""

    text: str
    kind: str
    share: float | None
    tokens: int


def answers(view: View, truth: str = "") -> str:
    """The three answers side by side, judged where the true one is known."""
    return _call("answers", view, truth)


def headline(view: View) -> str:
    """How many bytes, and how many times fewer than in BF16."""
    return _call("headline", view)


def sizes(view: View) -> str:
    """The bitstream among what else could be sent."""
    named = [("full, BF16", view.report.full_bf16_bytes, "full"), ("floor, BF16", view.floor.bytes, "floor")]
    named.append(("this cache", view.this.bytes, "this"))
    if view.jpeg_bytes:
        named.append(("the JPEG", view.jpeg_bytes, "jpeg"))
    most = max(size for _, size, _ in named)
    rows = [Size(name, size, role, _length(size, most)) for name, size, role in sorted(named, key=lambda x: -x[1])]
    return _call("sizes", rows)


def parts(view: View) -> str:
    """Where the bytes went: by part, and by layer."""
    return _call("parts", parts_of(view.report), layer_bytes(view.report))


def layers(view: View, current: int | None) -> str:
    """How much of the picture each layer keeps."""
    shares = [float(x) for x in view.visual_by_layer]
    return _call("layers", shares, -1 if current is None else current, max(shares))


def words(view: View, layer: int | None) -> str:
    """The prompt's words, the brighter the more heads keep them."""
    return _call("words", [_shown(word, layer) for word in view.words])


def crossings(rows: Sequence[Crossed]) -> str:
    """What crossing took, each way on one scale."""
    return _call("crossings", rows, max(row.seconds for row in rows))


def number(value: float) -> str:
    """Three digits, and zero where nothing is left to tell."""
    return "0" if value < 5e-7 else f"{value:.2g}" if value < 1e-3 else f"{value:.3f}"


def ratio(value: float) -> str:
    """Three digits, never an exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def milliseconds(seconds: float) -> str:
    """Milliseconds, or seconds from ten on."""
    return f"{1e3 * seconds:,.0f} ms" if seconds < 10 else f"{seconds:.1f} s"


def _length(size: int, most: int) -> float:
    return max(0.01, math.log(max(size, LEAST) / LEAST) / math.log(max(most, 10 * LEAST) / LEAST))


def _shown(word: Word, layer: int | None) -> Shown:
    share = None if word.share is None else float(word.share.mean() if layer is None else word.share[layer])
    return Shown(word.text, word.kind, share, word.tokens)


def _call(macro: str, *values: object) -> str:
    return str(getattr(_template().module, macro)(*values))


@cache
def _template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined
    )
    environment.globals |= {"same": exact_match, "number": number, "milliseconds": milliseconds, "ratio": ratio}
    return environment.get_template("fragments.html.j2")
